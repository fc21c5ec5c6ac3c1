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
from dlrm_rs.optim.waiting import Waiting
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

    def run(self, kept: Sequence[tuple[KeptCall, float]], groups: list[dict[str, Any]]) -> None:
        """Update the tables by the gradients of calls on them, this one among them.

        Args:
            kept: The calls, each with what its gradients are multiplied by.
            groups: As of `TableSet.update`.

        Raises:
            RuntimeError: A tensor of a call has changed since, or not all calls train the same tables.
        """
        _check_unchanged([call for call, _ in kept])
        whole, factor = merged(kept)
        weights = self.tables.weights()
        memory = self.tables.memory
        grad = whole.grad.clone() if memory.overlaps(whole.grad) else whole.grad
        given = (whole.per_sample_weights, whole.argmax, grad, whole.trainable, whole.scale_grad_by_freq)
        terms = calls.gradient_terms(whole.bags, *given)
        calls.check_sums(calls.check_fused(self.tables), self.tables, terms, factor)
        calls.run_update(self.tables, memory, terms, factor, groups)
        increment_version([weight for weight, trained in zip(weights, whole.trainable, strict=True) if trained])


def _check_unchanged(kept: Sequence[KeptCall]) -> None:
    for call in kept:
        if [tensor._version for tensor in call.tensors()] != call.versions:
            raise RuntimeError(
                "step: expected ids, weights of ids and gradients as they were in backward, and one has been "
                "changed in place since"
            )
        differs = [now != first for now, first in zip(call.trainable, kept[0].trainable, strict=True)]
        if any(differs):
            table = call.tables.tables[differs.index(True)].name
            raise RuntimeError(
                "step: expected the same tables to be trained in all backwards since zero_grad(), got table "
                f"{table!r} in some of them: its requires_grad has changed"
            )


def keep(optimizer: FusedOptimizer, call: KeptCall) -> Tensor:
    """Keep a call for the optimizer's next step.

    Args:
        optimizer: Of the call's tables.
        call: The call.

    Returns:
        A gradient for the optimizer's gate that stands for that of all tables, as `FusedOptimizer` tells.

    Raises:
        FloatingPointError: The gradient is not finite, and the optimizer refuses that.
    """
    sums_are_finite = calls.sums_are_finite(call.grad, call.per_sample_weights, call.bags[0].numel())
    finite = calls.agree(call.tables, sums_are_finite)
    optimizer.refuse(finite)
    optimizer.keep(call, call.tables.mark())
    return Waiting.token(finite)


def merged(kept: Sequence[tuple[KeptCall, float]]) -> tuple[KeptCall, float]:
    """One call of all bags, those of a feature in the order of the calls, and what to multiply its gradients by."""
    if len(kept) == 1:
        return kept[0]
    factors = {factor for _, factor in kept}
    if len(factors) == 1:
        return _side_by_side([_alone(call) for call, _ in kept]), factors.pop()
    return _side_by_side([_alone(call._replace(grad=call.grad * factor)) for call, factor in kept]), 1.0


def _alone(call: KeptCall) -> KeptCall:
    """A call among others, in which the occurrences of a row are counted as if it were alone."""
    if True not in call.scale_grad_by_freq:
        return call
    divisors = _occurrences(call)
    plain = call._replace(scale_grad_by_freq=[False] * len(call.scale_grad_by_freq))
    if not call.tables.pooled:
        return plain._replace(grad=call.grad / divisors.unsqueeze(1))
    return plain._replace(per_sample_weights=_or_ones(call) / divisors)


def _occurrences(call: KeptCall) -> Tensor:
    """How often the row of every id occurs in its table, `(L,)`; 1 where the table does not divide by it."""
    bounds = _bounds(call, _whole_offsets(call, len(call.tables.features)))
    counts = torch.ones(call.bags[0].numel(), dtype=torch.float32)
    for table, scaled in enumerate(call.scale_grad_by_freq):
        if scaled:
            parts = [
                torch.arange(bounds[f], bounds[f + 1])
                for f, feature in enumerate(call.tables.features)
                if feature.table == table
            ]
            places = torch.cat(parts)
            _, inverse, count = call.bags[0][places].unique(return_inverse=True, return_counts=True)
            counts[places] = count[inverse].float()
    return counts


def _side_by_side(kept: Sequence[KeptCall]) -> KeptCall:
    first = kept[0]
    features = len(first.tables.features)
    offsets = [_whole_offsets(call, features) for call in kept]
    bounds = [_bounds(call, of_call) for call, of_call in zip(kept, offsets, strict=True)]

    def side_by_side(of_ids: Sequence[Tensor]) -> Tensor:
        parts = [
            tensor[bound[feature] : bound[feature + 1]]
            for feature in range(features)
            for tensor, bound in zip(of_ids, bounds, strict=True)
        ]
        return torch.cat(parts)

    lengths = [of_call.diff().view(features, call.bags[2]) for call, of_call in zip(kept, offsets, strict=True)]
    all_offsets = torch.nn.functional.pad(torch.cat(lengths, dim=1).view(-1).cumsum(0), (1, 0))
    weighted = any(call.per_sample_weights is not None for call in kept)
    argmax = [call.argmax for call in kept if call.argmax is not None]
    grads = [call.grad for call in kept]
    return first._replace(
        bags=(side_by_side([call.bags[0].long() for call in kept]), all_offsets, sum(call.bags[2] for call in kept)),
        per_sample_weights=side_by_side([_or_ones(call) for call in kept]) if weighted else None,
        argmax=torch.cat(argmax) if argmax else None,
        grad=torch.cat(grads) if first.tables.pooled else side_by_side(grads),
    )


def _or_ones(call: KeptCall) -> Tensor:
    """The weights of ids, 1 where there are none."""
    if call.per_sample_weights is None:
        return torch.ones(call.bags[0].numel(), dtype=torch.float32)
    return call.per_sample_weights


def _bounds(call: KeptCall, offsets: Tensor) -> list[int]:
    """Where the ids of every feature begin, and where the last's end; `offsets` are `_whole_offsets`."""
    features, batch_size = len(call.tables.features), call.bags[2]
    if not batch_size:
        return [0] * (features + 1)
    return [*offsets[::batch_size][:features].tolist(), int(offsets[-1])]


def _whole_offsets(call: KeptCall, features: int) -> Tensor:
    """`(F * B + 1,)` int64."""
    indices, offsets, batch_size = call.bags
    bags = features * batch_size
    if offsets is None:
        return torch.arange(bags + 1) * (indices.numel() // max(bags, 1))
    whole = offsets.long()
    return whole if len(whole) > bags else torch.cat([whole, whole.new_tensor([indices.numel()])])
