"""The optimizers of a training step by name, and what they do in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

# By the names of `dlrm_rs.optim`.
OPTIMIZERS = ("SGD", "Adagrad", "RowWiseAdagrad", "Adam")

# The same for all sides. So small an `eps` that it does not matter where a formula has it: torch's `SparseAdam` has it
# elsewhere than torch's `Adam`.
LR = 0.125
EPS = 1e-12
BETAS = (0.9, 0.999)

# Gradients are multiples of this, so that sums of thousands are exact in float32: Adagrad's and Adam's first step has
# the sign of the gradient, which rounding must not decide.
GRID = 2.0**-8


@lru_cache(maxsize=1)
def upstream_gradient(batch_size: int, width: int) -> Tensor:
    """What every backward begins with, `(B, W)`: random multiples of `GRID` in [-1, 1), the same for all sides.

    Example:
        >>> bool((upstream_gradient(2, 3) * 256 % 1 == 0).all())
        True
    """
    numbers = torch.randint(-256, 256, (batch_size, width), generator=torch.Generator().manual_seed(0))
    return numbers.float() * GRID


def state_bytes(optimizer: str, dim: int) -> int:
    """Bytes of a row's state.

    Example:
        >>> [state_bytes(optimizer, dim=64) for optimizer in OPTIMIZERS]
        [0, 256, 4, 512]
    """
    return 4 * {"SGD": 0, "Adagrad": dim, "RowWiseAdagrad": 1, "Adam": 2 * dim}[optimizer]


class Reference:
    """An optimizer of the rows of one table, all of them in float64.

    Args:
        optimizer: Its name.
        rows: `N`.
        dim: `D`.

    Example:
        >>> reference = Reference("RowWiseAdagrad", rows=2, dim=2)
        >>> reference.moves(torch.tensor([1]), torch.tensor([[3.0, 4.0]], dtype=torch.float64))
        tensor([[-0.1061, -0.1414]], dtype=torch.float64)
    """

    def __init__(self, optimizer: str, rows: int, dim: int) -> None:
        self._rule = _RULES[optimizer]
        # Two numbers of every element, of which a rule uses what it needs.
        self._state = torch.zeros(rows, 2, dim, dtype=torch.float64)
        self._steps = 0

    def moves(self, ids: Tensor, gradients: Tensor) -> Tensor:
        """By how much a step moves rows.

        Args:
            ids: Rows, each once, `(n,)`.
            gradients: Of each the sum, `(n, D)` float64.
        """
        self._steps += 1
        state = self._state[ids]  # a copy
        moved = -LR * self._rule(state, gradients, self._steps)
        self._state[ids] = state
        return moved


def _sgd(_state: Tensor, g: Tensor, _steps: int) -> Tensor:
    return g


def _adagrad(state: Tensor, g: Tensor, _steps: int) -> Tensor:
    state[:, 0] += g.square()
    return g / (state[:, 0].sqrt() + EPS)


def _rowwise_adagrad(state: Tensor, g: Tensor, _steps: int) -> Tensor:
    state[:, 0] += g.square().mean(dim=1, keepdim=True)
    return g / (state[:, 0].sqrt() + EPS)


def _adam(state: Tensor, g: Tensor, steps: int) -> Tensor:
    (b1, b2), (m, v) = BETAS, state.unbind(dim=1)
    m.lerp_(g, 1 - b1)
    v.lerp_(g.square(), 1 - b2)
    return m / (1 - b1**steps) / ((v / (1 - b2**steps)).sqrt() + EPS)


_RULES: Mapping[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "SGD": _sgd,
    "Adagrad": _adagrad,
    "RowWiseAdagrad": _rowwise_adagrad,
    "Adam": _adam,
}
