"""The losses of facebookresearch/dlrm, of logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["LOSS_FUNCTIONS", "DLRMLoss"]

LOSS_FUNCTIONS = ("mse", "bce", "wbce")


class DLRMLoss(nn.Module):
    """`--loss-function`, `--loss-weights` and `--loss-threshold` of facebookresearch/dlrm, of logits.

    There the model ends in a sigmoid `p`; here the loss has it, and so is finite where float32 has `p` at 0 or 1.

    Args:
        loss_function: "mse", the mean of `(p - target)^2`; "bce", binary cross-entropy; "wbce", the same with the terms
            weighted by their targets' classes.
        loss_weights: With "wbce", the weights of targets 0 and 1. The mean is over all terms, not over their weights.
        loss_threshold: Above 0, `p` is clamped to `[threshold, 1 - threshold]`.

    Raises:
        ValueError: A loss, weights or a threshold that cannot be.

    Example:
        >>> import torch, dlrm_rs
        >>> loss = dlrm_rs.DLRMLoss("wbce", loss_weights=[0.5, 2.0])
        >>> loss(torch.zeros(2, 1), torch.tensor([[0.0], [1.0]])).item()  # (0.5 + 2) / 2 * log(2)
        0.8664339780807495
    """

    def __init__(
        self, loss_function: str = "mse", loss_weights: Sequence[float] = (1.0, 1.0), loss_threshold: float = 0.0
    ) -> None:
        super().__init__()
        if loss_function not in LOSS_FUNCTIONS:
            raise ValueError(
                f"loss_function: expected one of {', '.join(map(repr, LOSS_FUNCTIONS))}, got {loss_function!r}"
            )
        weights = [float(weight) for weight in loss_weights]
        if len(weights) != 2 or not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ValueError(f"loss_weights: expected two finite numbers of at least 0, got {weights}")
        if weights != [1.0, 1.0] and loss_function != "wbce":
            raise ValueError(f"loss_weights: expected 1, 1 with {loss_function!r}, got {weights}; 'wbce' has weights")
        if not 0 <= loss_threshold < 0.5:
            raise ValueError(f"loss_threshold: expected a number from 0 to below 0.5, got {loss_threshold}")
        self.loss_function = loss_function
        self.loss_threshold = loss_threshold
        self.loss_weights: Tensor
        self.register_buffer("loss_weights", torch.tensor(weights), persistent=False)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over the batch.

        Args:
            logits: Of the model, any shape.
            targets: From 0 to 1, of the same shape.

        Returns:
            A scalar.

        Raises:
            ValueError: Another shape, or with "wbce" a target that is neither 0 nor 1.
        """
        if logits.shape != targets.shape:
            raise ValueError(f"targets: expected the logits' shape, {tuple(logits.shape)}, got {tuple(targets.shape)}")
        if self.loss_threshold:
            bound = math.log(1 / self.loss_threshold - 1)  # of logits, where p is at 1 - threshold
            logits = logits.clamp(-bound, bound)
        if self.loss_function == "mse":
            return functional.mse_loss(logits.sigmoid(), targets)
        if self.loss_function == "bce":
            return functional.binary_cross_entropy_with_logits(logits, targets)
        if not ((targets == 0) | (targets == 1)).all():
            raise ValueError("targets: expected 0 and 1 alone with 'wbce', whose weights are of these, got others")
        weight = self.loss_weights[targets.long()]
        return functional.binary_cross_entropy_with_logits(logits, targets, weight)

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        weights = f", loss_weights={self.loss_weights.tolist()}" if self.loss_function == "wbce" else ""
        return f"{self.loss_function!r}{weights}, loss_threshold={self.loss_threshold}"
