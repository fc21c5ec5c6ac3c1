"""The learning-rate policy of facebookresearch/dlrm and of MLPerf's DLRM: warm-up, then quadratic decay."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["LRPolicyScheduler"]

# Decay does not go below this.
_LEAST = 1e-7


class LRPolicyScheduler(LRScheduler):
    """Linear warm-up, a plateau, quadratic decay, and what that ended with: facebookresearch/dlrm's scheduler.

    The learning rate of step `s`, counted from 1, with `W` steps of warm-up and `N` of decay that begin at step `S`:

    ```
    s < W             lr * s / W
    S <= s < S + N    max(lr * ((N - (s - S)) / N) ** 2, 1e-7)
    otherwise         that of the step before; without decay (N = 0), lr
    ```

    So the plateau between warm-up and decay is at `lr * (W - 1) / W`. As a function of the step alone it resumes from
    its `state_dict`, and has a rate before decay without warm-up, `lr`, where the original fails.

    Args:
        optimizer: Any of torch's, or the `fused_optimizer` of a module.
        num_warmup_steps: `W`.
        decay_start_step: `S`, at least `W`.
        num_decay_steps: `N`.
        last_epoch: As of torch's schedulers: the steps done before, less 1.

    Raises:
        ValueError: A number below 0, or decay that begins before warm-up ends.

    Example:
        >>> import torch, dlrm_rs
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = dlrm_rs.LRPolicyScheduler(optimizer, 4, 6, 2)
        >>> rates = []
        >>> for _ in range(9):
        ...     rates += scheduler.get_last_lr()
        ...     optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.25, 0.5, 0.75, 0.75, 0.75, 1.0, 0.25, 0.25, 0.25]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_warmup_steps: int,
        decay_start_step: int,
        num_decay_steps: int,
        last_epoch: int = -1,
    ) -> None:
        for name, steps in (
            ("num_warmup_steps", num_warmup_steps),
            ("decay_start_step", decay_start_step),
            ("num_decay_steps", num_decay_steps),
        ):
            if steps < 0:
                raise ValueError(f"{name}: expected at least 0, got {steps}")
        if decay_start_step < num_warmup_steps:
            raise ValueError(
                f"decay_start_step: expected at least num_warmup_steps, {num_warmup_steps}, as warm-up is first, got "
                f"{decay_start_step}"
            )
        self.num_warmup_steps = num_warmup_steps
        self.decay_start_step = decay_start_step
        self.num_decay_steps = num_decay_steps
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:  # type: ignore[override] # torch allows tensors too
        """The learning rate of every parameter group at this step."""
        return [self._rate(float(lr), self.last_epoch + 1) for lr in self.base_lrs]

    def _rate(self, lr: float, step: int) -> float:
        W, S, N = self.num_warmup_steps, self.decay_start_step, self.num_decay_steps
        if step < W:
            return lr * (1.0 - (W - step) / W)
        if N == 0:
            return lr
        if step < S:
            return lr * (1.0 - 1 / W) if W > 1 else lr
        decayed = min(step - S, N - 1)
        return max(lr * ((N - decayed) / N) ** 2, _LEAST)
