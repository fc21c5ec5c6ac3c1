"""The operators `torch.ops.dlrm_rs`: the way to the engine that a graph can hold.

An operator works from the tensors that it is given, for a graph may be saved and run where the module is not. Where
they are the memory of tables of this process, which `key` names, the engine's tables are used themselves, and with them
what the user has changed meanwhile: a weight put in the place of another, the learning rate. Otherwise the engine
borrows the tensors' memory, and nothing is copied.

- `lookup` has gradients for `rows` that are numbers and for `per_sample_weights`: `dense_gradient` and
  `per_sample_weights_gradient`.
- `fused_lookup` looks up `rows` that the backward of `tie` changes by `update`: torch is told of the change, but `rows`
  are no Parameters, so that forwards and backwards of several batches may come in any order. (In a compiled graph,
  backward reads rows as they are by then for the gradient of `per_sample_weights`.)
- `renorm_` is for `max_norm`.

Letters as of the engine: `F`, `T`, `B`, `L`, `N`, `D`, `W`. `rows` are the tensors of all tables in their order:
`(N, D)` of each, or codes, scales and codebook as in `HoldsWeight`. `layout` is a `Layout` as a string.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dlrm_rs.devices import CPU
from dlrm_rs.operators import calls
from dlrm_rs.operators.definition import BATCH, Batch, define
from dlrm_rs.operators.whose import at_home, handle_of, tables_of
from dlrm_rs.row_formats import TORCH_DTYPES


def _refuse(message: str) -> None:
    raise ValueError(message)


# What traced code raises, torch.compile replaces by words of its own before torch 2.12; not what an operator raises.
torch.library.define("dlrm_rs::refuse", "(str message) -> ()")
torch.library.impl("dlrm_rs::refuse", "default", _refuse)
torch.library.register_fake("dlrm_rs::refuse", _refuse)


# --- lookup


def _lookup(
    rows: Sequence[Tensor],
    batch: Batch,
    per_sample_weights: Tensor | None,
    with_argmax: bool,
    scale_grad_by_freq: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    layout = batch.parsed()
    # Zeros, since the engine leaves the columns of features alone that are pooled otherwise.
    argmax = torch.zeros(batch.batch_size, layout.width if with_argmax else 0, dtype=torch.int32, device="cpu")
    weights = None if per_sample_weights is None else per_sample_weights.contiguous()
    handle = handle_of(rows, batch.key, layout)
    return calls.lookup(handle, layout, batch.bags(), weights, argmax if with_argmax else None, CPU.outputs), argmax


def _fake_lookup(
    rows: Sequence[Tensor],
    batch: Batch,
    per_sample_weights: Tensor | None,
    with_argmax: bool,
    scale_grad_by_freq: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    layout, ids = batch.parsed(), batch.indices
    outputs = batch.batch_size if layout.pooled else ids.numel()
    out = ids.new_empty(outputs, layout.width, dtype=layout.output_dtype)  # (B, W) or (L, D)
    return out, ids.new_empty(batch.batch_size, layout.width if with_argmax else 0, dtype=torch.int32)


def _save(ctx: Any, batch: Batch, per_sample_weights: Tensor | None, argmax: Tensor, tensors: Sequence[Tensor]) -> None:
    key, ctx.layout, indices, offsets, ctx.batch_size = batch
    ctx.save_for_backward(key, indices, offsets, per_sample_weights, argmax, *tensors)


def _saved(ctx: Any) -> tuple[Batch, Tensor | None, Tensor | None, Sequence[Tensor]]:
    """What `_save` was given; of the argmax None where there is none."""
    key, indices, offsets, per_sample_weights, argmax, *tensors = ctx.saved_tensors
    batch = Batch(key, ctx.layout, indices, offsets, ctx.batch_size)
    return batch, per_sample_weights, argmax if ctx.with_argmax else None, tensors


def _save_lookup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows, *batch, per_sample_weights, ctx.with_argmax, ctx.scale = inputs
    ctx.parts = len(rows)
    # Only the gradient of per_sample_weights reads the rows: then torch is to notice if they changed meanwhile.
    wanted = per_sample_weights is not None and per_sample_weights.requires_grad
    _save(ctx, Batch(*batch), per_sample_weights, output[1], rows if wanted else ())


def _backward_of_lookup(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    batch, per_sample_weights, argmax, rows = _saved(ctx)
    weights_grad = None
    if ctx.needs_input_grad[6]:
        weights_grad = torch.ops.dlrm_rs.per_sample_weights_gradient(rows, *batch, grad)
    places = batch.parsed().places
    trainable = [ctx.needs_input_grad[0][place] for place in places]
    grads: list[Tensor | None] = [None] * ctx.parts
    if True in trainable:
        given = (per_sample_weights, argmax, grad, trainable, ctx.scale)
        dense = iter(torch.ops.dlrm_rs.dense_gradient(*batch, *given))
        for place, trained in zip(places, trainable, strict=True):
            if trained:
                grads[place] = next(dense)
    return grads, None, None, None, None, None, weights_grad, None, None


define(
    "lookup",
    f"(Tensor[] rows, {BATCH}, Tensor? per_sample_weights, bool with_argmax, bool[] scale_grad_by_freq) "
    "-> (Tensor, Tensor)",
    _lookup,
    _fake_lookup,
)
torch.library.register_autograd("dlrm_rs::lookup", _backward_of_lookup, setup_context=_save_lookup)


# --- fused_lookup: as lookup, with what the update by its backward needs


def _save_fused_lookup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, rows, states, *batch, per_sample_weights, ctx.trainable, ctx.with_argmax, ctx.scale = inputs
    ctx.parts, ctx.states = len(rows), len(states)
    _save(ctx, Batch(*batch), per_sample_weights, output[1], (*rows, *states))


def _backward_of_fused_lookup(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    batch, per_sample_weights, argmax, tensors = _saved(ctx)
    rows, states = tensors[: ctx.parts], tensors[ctx.parts :]
    weights_grad = None
    if ctx.needs_input_grad[8]:  # before the update, which writes to the rows that this reads
        weights_grad = torch.ops.dlrm_rs.per_sample_weights_gradient(rows, *batch, grad)
    given = (per_sample_weights, argmax, grad, ctx.trainable, ctx.scale)
    torch.ops.dlrm_rs.update(rows, states, *batch, *given)
    lists = ([None] * ctx.parts, [None] * ctx.states)
    return None, *lists, None, None, None, None, None, weights_grad, None, None, None


define(
    "fused_lookup",
    f"(Tensor tie, Tensor[] rows, Tensor[] states, {BATCH}, Tensor? per_sample_weights, bool[] trainable, "
    "bool with_argmax, bool[] scale_grad_by_freq) -> (Tensor, Tensor)",
    lambda tie, rows, states, batch, weights, trainable, *flags: _lookup(rows, batch, weights, *flags),
    lambda tie, rows, states, batch, weights, trainable, *flags: _fake_lookup(rows, batch, weights, *flags),
)
torch.library.register_autograd("dlrm_rs::fused_lookup", _backward_of_fused_lookup, setup_context=_save_fused_lookup)


# --- gradients


def _dense_gradient(batch: Batch, *gradient: Any) -> list[Tensor]:
    tables = tables_of(batch.key)
    calls.check_unshared(tables)
    dtypes = [TORCH_DTYPES.get(table.row_format, torch.float32) for table in batch.parsed().tables]
    terms = _terms(batch, *gradient)
    return [rows for rows in calls.dense_gradient(tables.handle, dtypes, terms) if rows is not None]


def _fake_dense_gradient(
    batch: Batch,
    per_sample_weights: Tensor | None,
    argmax: Tensor | None,
    grad: Tensor,
    trainable: Sequence[bool],
    scale_grad_by_freq: Sequence[bool],
) -> list[Tensor]:
    return [
        grad.new_empty(table.num_embeddings, table.embedding_dim, dtype=TORCH_DTYPES[table.row_format])
        for table, trained in zip(batch.parsed().tables, trainable, strict=True)
        if trained
    ]


def _terms(
    batch: Batch,
    per_sample_weights: Tensor | None,
    argmax: Tensor | None,
    grad: Tensor,
    trainable: Sequence[bool],
    scale_grad_by_freq: Sequence[bool],
) -> calls.Terms:
    grad = grad.float().contiguous()
    return calls.gradient_terms(batch.bags(), per_sample_weights, argmax, grad, trainable, scale_grad_by_freq)


def _per_sample_weights_gradient(rows: Sequence[Tensor], batch: Batch, grad: Tensor) -> Tensor:
    handle = handle_of(rows, batch.key, batch.parsed())
    return calls.per_sample_weights_gradient(handle, batch.bags(), grad.float().contiguous())


# Of `_terms`, beside the batch.
_GRADIENT = "Tensor? per_sample_weights, Tensor? argmax, Tensor grad, bool[] trainable, bool[] scale_grad_by_freq"
define("dense_gradient", f"({BATCH}, {_GRADIENT}) -> Tensor[]", _dense_gradient, _fake_dense_gradient)
define(
    "per_sample_weights_gradient",
    f"(Tensor[] rows, {BATCH}, Tensor grad) -> Tensor",
    _per_sample_weights_gradient,
    lambda rows, batch, grad: grad.new_empty(batch.indices.numel(), dtype=torch.float32),
)


# --- changes in place


def _update(
    rows: Sequence[Tensor],
    states: Sequence[Tensor],
    batch: Batch,
    per_sample_weights: Tensor | None,
    argmax: Tensor | None,
    grad: Tensor,
    trainable: Sequence[bool],
    scale_grad_by_freq: Sequence[bool],
) -> None:
    tables = tables_of(batch.key)
    calls.check_fused(tables)
    if batch.layout != tables.layout:
        raise RuntimeError(
            "update: expected tables whose rows are stored as in the forward, and they have been quantized or "
            "dequantized since"
        )
    grad = grad.float().contiguous()
    if tables.memory.overlaps(grad):
        grad = grad.clone()  # the update would write to what it still has to read
    terms = _terms(batch, per_sample_weights, argmax, grad, trainable, scale_grad_by_freq)
    if at_home(tables, rows):
        calls.update(tables, tables.memory, terms)
        weights = zip(tables.weights(), trainable, strict=True)
        increment_version([weight for weight, trained in weights if trained])
        return
    tables.check_unshared("update: cannot change copies of the rows, as backends for debugging make; take Inductor")
    # Copies of the rows, as some backends of torch.compile make for whatever is to be changed: change these.
    memory = tables.new_memory()
    pairs = list(zip([*chain.from_iterable(memory.parts), *memory.states], [*rows, *states], strict=True))
    for own, given in pairs:
        own.copy_(given)
    calls.update(tables, memory, terms)
    for own, given in pairs:
        given.copy_(own)


def _renorm(
    rows: Sequence[Tensor], batch: Batch, per_sample_weights: Tensor | None, max_norm: float, norm_type: float
) -> None:
    indices, offsets, batch_size = batch.bags()
    handle = handle_of(rows, batch.key, batch.parsed())
    ids = (indices.numpy(), calls.array(offsets), batch_size, calls.array(per_sample_weights))
    handle.renorm(*ids, max_norm, norm_type)
    increment_version(list(rows))


def _no_output(*_: Any) -> None:
    """The fake kernel of an operator that gives nothing."""


define(
    "update",
    f"(Tensor(a!)[] rows, Tensor(b!)[] states, {BATCH}, {_GRADIENT}) -> ()",
    _update,
    _no_output,
)
define(
    "renorm_",
    f"(Tensor(a!)[] rows, {BATCH}, Tensor? per_sample_weights, float max_norm, float norm_type) -> ()",
    _renorm,
    _no_output,
)
