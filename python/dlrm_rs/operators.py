"""The engine's calls as torch operations: the only file that defines autograd on the engine.

One crossing to Rust per forward and one per backward, however many tables. Ids, offsets and weights of ids are saved by
torch, so it reports a change made to them in place between forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from dlrm_rs.row_formats import as_array
from dlrm_rs.tables import EmbeddingTables, Memory

__all__ = ["lookup", "renorm"]


def lookup(
    tables: EmbeddingTables,
    indices: Tensor,
    offsets: Tensor | None,
    batch_size: int,
    per_sample_weights: Tensor | None = None,
    *,
    sparse: bool = False,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """Look up and pool every feature of a set of tables, differentiably.

    With a fused optimizer, backward updates the rows, and the weights' gradients are None. Without one it gives each
    trainable weight its gradient.

    Args:
        tables: The tables.
        indices: `(L,)` ids, feature-major, int32 or int64, contiguous, on the CPU; offsets alike.
        offsets: `(F * B,)`, `(F * B + 1,)`, or None for bags of one length.
        batch_size: `B`.
        per_sample_weights: `(L,)` float32, contiguous, on the CPU, or None.
        sparse: Give sparse (coalesced) gradients.
        scale_grad_by_freq: Divide the gradient of a row by the number of its occurrences in the call.

    Returns:
        `(B, W)` of the tables' `output_dtype`; for features that do not pool `(L, D)`.

    Raises:
        IndexError: An id is outside its table.
        ValueError: Offsets, lengths or weights of ids do not fit.
    """
    weights = tables.weights()
    if torch.is_grad_enabled():
        trainable = [weight.requires_grad for weight in weights]
        if True in trainable or (per_sample_weights is not None and per_sample_weights.requires_grad):
            # The fused update is one operation for all tables: any one weight ties it into the graph.
            inputs = weights if tables.optimizer is None else [w for w in weights if w.requires_grad][:1]
            fused = tables.optimizer is not None
            call = _Call(tables, tables.memory, weights, batch_size, trainable, sparse, scale_grad_by_freq, fused)
            out: Tensor = _Lookup.apply(call, indices, offsets, per_sample_weights, *inputs)
            return out
    return _lookup(tables, indices, offsets, batch_size, per_sample_weights, None)


def renorm(
    tables: EmbeddingTables,
    indices: Tensor,
    offsets: Tensor | None,
    batch_size: int,
    per_sample_weights: Tensor | None,
    max_norm: float,
    norm_type: float,
) -> None:
    """Scale every row that `indices` name down to `max_norm`, in place and outside the graph, as `torch.nn` does.

    Args:
        tables: The tables.
        indices: As for `lookup`.
        offsets: As for `lookup`.
        batch_size: As for `lookup`.
        per_sample_weights: As for `lookup`, which follows: they scale nothing, but what it would refuse must not have
            changed the table.
        max_norm: The largest `norm_type`-norm that a row keeps.
        norm_type: The p of the p-norm.

    Raises:
        IndexError: An id is outside its table.
        ValueError: Offsets or weights of ids do not fit.
    """
    weights = tables.weights()
    tables.handle.renorm(indices.numpy(), _array(offsets), batch_size, _array(per_sample_weights), max_norm, norm_type)
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
    scale_grad_by_freq: bool
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
        argmax = None
        if call.tables.pools_by_max:
            argmax = torch.empty(call.batch_size, call.tables.width, dtype=torch.int32, device="cpu")
        out = _lookup(call.tables, indices, offsets, call.batch_size, per_sample_weights, argmax)
        # Only the gradient of per_sample_weights reads the rows: then torch is to notice if they changed meanwhile.
        rows = call.weights if ctx.needs_input_grad[3] else ()
        ctx.save_for_backward(indices, offsets, per_sample_weights, argmax, *rows)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        call: _Call = ctx.call
        if call.fused and call.tables.optimizer is None:
            raise RuntimeError(
                "backward: expected the fused optimizer that the forward was made with, and it was given up since: the "
                "tables have been quantized"
            )
        indices, offsets, per_sample_weights, argmax, *_ = ctx.saved_tensors
        bags = (indices.numpy(), _array(offsets), call.batch_size)
        grad = grad.float().contiguous()  # (B, W) or (L, D)
        if call.tables.optimizer is not None and call.memory.overlaps(grad):
            grad = grad.clone()  # the update would write to what it still has to read
        out_grad = _array(grad)
        weights_grad = None
        if ctx.needs_input_grad[3]:  # before the update, which writes to the rows that this reads
            weights_grad = torch.from_numpy(call.memory.handle.per_sample_weights_gradient(*bags, out_grad))
        grads: Sequence[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 4)
        if True in call.trainable:
            terms = (
                *bags,
                _array(per_sample_weights),
                _array(argmax),
                out_grad,
                call.trainable,
                call.scale_grad_by_freq,
            )
            if call.tables.optimizer is None:
                grads = _gradients(call, terms)
            else:
                group = call.tables.optimizer.param_groups[0]
                call.memory.handle.update(*terms, group)
                increment_version([w for w, trained in zip(call.weights, call.trainable, strict=True) if trained])
        return (None, None, None, weights_grad, *grads)


def _lookup(
    tables: EmbeddingTables,
    indices: Tensor,
    offsets: Tensor | None,
    batch_size: int,
    per_sample_weights: Tensor | None,
    argmax: Tensor | None,
) -> Tensor:
    # `device`, lest a default device that the user has set is taken.
    rows = batch_size if tables.pooled else indices.numel()
    out = torch.empty(rows, tables.width, dtype=tables.output_dtype, device="cpu")  # (B, W) or (L, D)
    tables.handle.lookup(
        indices.numpy(), _array(offsets), batch_size, _array(per_sample_weights), as_array(out), _array(argmax)
    )
    return out


def _gradients(call: _Call, terms: tuple[Any, ...]) -> list[Tensor | None]:
    if not call.sparse:
        dense = call.memory.handle.dense_gradient(*terms)
        return [
            None if rows is None else torch.from_numpy(rows).to(weight.dtype)
            for rows, weight in zip(dense, call.weights, strict=True)
        ]
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


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().numpy()
