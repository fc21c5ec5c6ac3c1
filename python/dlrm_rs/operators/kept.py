"""Calls whose update waits for `step()`: kept by backward, and made one call.

Bags of the same feature are put side by side, in the order of the backwards. So the update has the bits of that of one
batch of all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dlrm_rs.operators import calls
from dlrm_rs.optim import FusedOptimizer
from dlrm_rs.tables import EmbeddingTables

__all__ = ["KeptCall", "keep", "merged"]


class KeptCall(NamedTuple):
    """A lookup and the gradient of its output.

    Attributes:
        tables: Which were looked up.
        bags: As of `operators.lookup`; offsets are None where every bag has as many ids.
        per_sample_weights: `(L,)`, or None.
        argmax: `(B, W)`, or None.
        grad: `(B, W)` float32, or `(L, D)` where nothing is pooled.
        trainable: `(T,)`.
        scale_grad_by_freq: As of `operators.lookup`.
        versions: Of the tensors when they were kept.
    """

    tables: EmbeddingTables
    bags: calls.Bags
    per_sample_weights: Tensor | None
    argmax: Tensor | None
    grad: Tensor
    trainable: Sequence[bool]
    scale_grad_by_freq: Sequence[bool]
    versions: list[int]

    def tensors(self) -> list[Tensor]:
        """All that must stay as it is."""
        given = (*self.bags[:2], self.per_sample_weights, self.argmax, self.grad)
        return [tensor for tensor in given if tensor is not None]

    def run(self, others: Sequence[KeptCall], factor: float, groups: list[dict[str, Any]]) -> None:
        """Update the tables by this call's gradients and the others'.

        Args:
            others: Later calls on the same tables.
            factor: By what the gradients are multiplied.
            groups: As of `TableSet.update`.
        """
        for call in (self, *others):
            if [tensor._version for tensor in call.tensors()] != call.versions:
                raise RuntimeError(
                    "step: expected ids, weights of ids and gradients as they were in backward, and one has been "
                    "changed in place since"
                )
        whole = merged([self, *others]) if others else self
        weights = self.tables.weights()
        memory = self.tables.memory
        grad = whole.grad.clone() if memory.overlaps(whole.grad) else whole.grad
        given = (whole.per_sample_weights, whole.argmax, grad, whole.trainable, whole.scale_grad_by_freq)
        calls.run_update(self.tables, memory, calls.gradient_terms(whole.bags, *given), factor, groups)
        increment_version([weight for weight, trained in zip(weights, whole.trainable, strict=True) if trained])


def keep(optimizer: FusedOptimizer, call: KeptCall, weight: Tensor) -> Tensor:
    """Keep a call for the optimizer's next step.

    Args:
        optimizer: Of the call's tables.
        call: The call.
        weight: A weight of the tables.

    Returns:
        A gradient for the weight that stands for that of all tables, as `FusedOptimizer` tells.

    Raises:
        FloatingPointError: The gradient is not finite, and the optimizer refuses that.
    """
    smallest, largest = torch.aminmax(call.grad) if call.grad.numel() else (torch.zeros(()), torch.zeros(()))
    finite = calls.agree(call.tables, bool(torch.isfinite(smallest) & torch.isfinite(largest)))
    optimizer.refuse(finite)
    optimizer.keep(call, weight)
    return optimizer.token(weight, finite)


def merged(kept: Sequence[KeptCall]) -> KeptCall:
    """One call of all bags, those of a feature in the order of the calls."""
    first = kept[0]
    features = len(first.tables.features)
    offsets = [_whole_offsets(call, features) for call in kept]
    # Where the ids of every feature begin in each call, and where the last's end.
    bounds = [
        [*of_call[:: max(call.bags[2], 1)][:features].tolist(), int(of_call[-1])]
        if call.bags[2]
        else [0] * (features + 1)
        for call, of_call in zip(kept, offsets, strict=True)
    ]

    def side_by_side(of_ids: Sequence[Tensor]) -> Tensor:
        parts = [
            tensor[bound[feature] : bound[feature + 1]]
            for feature in range(features)
            for tensor, bound in zip(of_ids, bounds, strict=True)
        ]
        return torch.cat(parts)

    lengths = [of_call.diff().view(features, call.bags[2]) for call, of_call in zip(kept, offsets, strict=True)]
    all_offsets = torch.nn.functional.pad(torch.cat(lengths, dim=1).view(-1).cumsum(0), (1, 0))
    weights = [call.per_sample_weights for call in kept if call.per_sample_weights is not None]
    argmax = [call.argmax for call in kept if call.argmax is not None]
    grads = [call.grad for call in kept]
    return first._replace(
        bags=(side_by_side([call.bags[0].long() for call in kept]), all_offsets, sum(call.bags[2] for call in kept)),
        per_sample_weights=side_by_side(weights) if weights else None,
        argmax=torch.cat(argmax) if argmax else None,
        grad=torch.cat(grads) if first.tables.pooled else side_by_side(grads),
        trainable=[any(flags) for flags in zip(*(call.trainable for call in kept), strict=True)],
    )


def _whole_offsets(call: KeptCall, features: int) -> Tensor:
    """`(F * B + 1,)` int64."""
    indices, offsets, batch_size = call.bags
    bags = features * batch_size
    if offsets is None:
        return torch.arange(bags + 1) * (indices.numel() // max(bags, 1))
    whole = offsets.long()
    return whole if len(whole) > bags else torch.cat([whole, whole.new_tensor([indices.numel()])])
