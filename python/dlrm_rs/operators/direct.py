"""The way to the engine that modules take: an `autograd.Function`, which costs less than an operator.

Ids, offsets and weights of ids are saved by torch, so it reports a change made to them in place between forward and
backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from dlrm_rs.devices import CPU
from dlrm_rs.memory import Memory
from dlrm_rs.operators import calls
from dlrm_rs.operators.kept import KeptCall, keep
from dlrm_rs.optim import FusedOptimizer
from dlrm_rs.tables import EmbeddingTables

__all__ = ["lookup", "renorm"]


def lookup(
    tables: EmbeddingTables,
    indices: Tensor,
    offsets: Tensor | None,
    batch_size: int,
    per_sample_weights: Tensor | None,
    sparse: bool,
    scale_grad_by_freq: Sequence[bool],
) -> Tensor:
    """As `operators.lookup`."""
    weights = tables.weights()
    if torch.is_grad_enabled():
        trainable = [weight.requires_grad for weight in weights]
        if True in trainable or (per_sample_weights is not None and per_sample_weights.requires_grad):
            inputs = weights if tables.optimizer is None else _tie(tables.optimizer, weights)
            fused = tables.optimizer is not None
            call = _Call(tables, tables.memory, weights, batch_size, trainable, sparse, scale_grad_by_freq, fused)
            out: Tensor = _Lookup.apply(call, indices, offsets, per_sample_weights, *inputs)
            return out
    bags = (indices, offsets, batch_size)
    return calls.lookup(tables.handle, tables, bags, per_sample_weights, None, tables.output_device.outputs)


def renorm(
    tables: EmbeddingTables,
    indices: Tensor,
    offsets: Tensor | None,
    batch_size: int,
    per_sample_weights: Tensor | None,
    max_norm: float,
    norm_type: float,
) -> None:
    """As `operators.renorm`."""
    weights = tables.weights()
    tables.handle.renorm(
        indices.numpy(), calls.array(offsets), batch_size, calls.array(per_sample_weights), max_norm, norm_type
    )
    increment_version(weights)


class _Call(NamedTuple):
    """What backward needs of a forward, beside tensors."""

    tables: EmbeddingTables
    # That of the forward: the tables may have moved since.
    memory: Memory
    weights: Sequence[nn.Parameter]
    batch_size: int
    trainable: Sequence[bool]
    sparse: bool
    scale_grad_by_freq: Sequence[bool]
    fused: bool


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        indices: Tensor,
        offsets: Tensor | None,
        per_sample_weights: Tensor | None,
        *inputs: nn.Parameter,
    ) -> Tensor:
        tables, argmax = call.tables, None
        if tables.pools_by_max:
            argmax = CPU.outputs.take((call.batch_size, tables.width), torch.int32)
        bags = (indices, offsets, call.batch_size)
        out = calls.lookup(tables.handle, tables, bags, per_sample_weights, argmax, tables.output_device.outputs)
        # Only the gradient of per_sample_weights reads the rows: then torch is to notice if they changed meanwhile.
        rows = call.weights if ctx.needs_input_grad[3] else ()
        ctx.save_for_backward(indices, offsets, per_sample_weights, argmax, *rows)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        call: _Call = ctx.call
        if call.fused:
            calls.check_fused(call.tables)
        indices, offsets, per_sample_weights, argmax, *_ = ctx.saved_tensors
        bags = (indices, offsets, call.batch_size)
        grad = grad.float().contiguous()  # (B, W) or (L, D)
        if call.fused and call.memory.overlaps(grad):
            grad = grad.clone()  # the update would write to what it still has to read
        weights_grad = None
        if ctx.needs_input_grad[3]:  # before the update, which writes to the rows that this reads
            weights_grad = calls.per_sample_weights_gradient(call.memory.handle, bags, grad)
        grads: Sequence[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 4)
        if True in call.trainable:
            if not call.fused:
                calls.check_unshared(call.tables)
            terms = calls.gradient_terms(
                bags, per_sample_weights, argmax, grad, call.trainable, call.scale_grad_by_freq
            )
            if call.fused and calls.check_fused(call.tables).update_at == "step":
                grads = [_keep(call, bags, per_sample_weights, argmax, grad)]
            elif call.fused:
                calls.update(call.tables, call.memory, terms)
                increment_version([w for w, trained in zip(call.weights, call.trainable, strict=True) if trained])
            elif call.sparse:
                grads = _sparse_gradient(call, terms)
            else:
                dtypes = [weight.dtype for weight in call.weights]
                grads = calls.dense_gradient(call.memory.handle, dtypes, terms)
        return (None, None, None, weights_grad, *grads)


def _tie(optimizer: FusedOptimizer, weights: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """What ties the fused update into the graph: one operation for all tables, so any one weight, or the gate."""
    if optimizer.gate is not None:
        return [optimizer.gate]
    return [weight for weight in weights if weight.requires_grad][:1]


def _keep(
    call: _Call, bags: calls.Bags, per_sample_weights: Tensor | None, argmax: Tensor | None, grad: Tensor
) -> Tensor:
    given = (bags, per_sample_weights, argmax, grad, call.trainable, call.scale_grad_by_freq)
    kept = KeptCall(call.tables, *given, [])
    kept.versions.extend(tensor._version for tensor in kept.tensors())
    return keep(calls.check_fused(call.tables), kept)


def _sparse_gradient(call: _Call, terms: calls.Terms) -> list[Tensor | None]:
    touched = call.memory.handle.sparse_gradient(*terms)
    return [
        None if pair is None else _sparse_tensor(torch.from_numpy(pair[0]), torch.from_numpy(pair[1]), weight)
        for pair, weight in zip(touched, call.weights, strict=True)
    ]


def _sparse_tensor(rows: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    # The engine's rows are in the table, unique and ascending: nothing is to be checked, and nothing coalesced again.
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0),
        values.to(weight.dtype),
        weight.shape,
        device="cpu",
        check_invariants=False,
        is_coalesced=True,
    )
