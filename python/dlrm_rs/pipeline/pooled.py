"""Pooled rows as the model has them: an output of autograd as any other, whose gradient goes to the pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from dlrm_rs.pipeline.lane import Visit

__all__ = ["pooled"]

# Autograd takes the node with the highest number of those that are ready: that of a gradient that is only added up.
_FIRST = 2**64 - 1


def pooled(rows: Tensor, visit: Visit) -> Tensor:
    """Rows that backward leaves the gradient of, before it goes on to layers below.

    Args:
        rows: `(B, W)`, of a batch that has been looked up.
        visit: Whose they are.
    """
    tie = torch.empty(0, device=rows.device, requires_grad=True)
    out: Tensor = _Pooled.apply(tie, visit, (rows,))
    assert out.grad_fn is not None
    out.grad_fn._set_sequence_nr(_FIRST)  # type: ignore[attr-defined] # which torch has from 2.2
    return out


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tie: Tensor, visit: Visit, rows: tuple[Tensor]) -> Tensor:
        ctx.visit = visit
        # `.data`, as autograd would take `detach()` for a view, on which nothing can work in place.
        return rows[0].data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.visit.leave(grad)
        return None, None, None
