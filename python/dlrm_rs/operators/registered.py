"""The way to the engine that a graph can hold: the operators `torch.ops.dlrm_rs`.

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

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dlrm_rs.layout import Layout
from dlrm_rs.operators import calls
from dlrm_rs.operators.whose import at_home, handle_of, tables_of
from dlrm_rs.row_formats import TORCH_DTYPES
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
    """As `operators.lookup`, to be traced."""
    rows = tables.parts()
    tied = tables.tied()
    trained = [weight for weight in tied if weight.requires_grad] if torch.is_grad_enabled() else []
    bags = (indices, offsets, batch_size, per_sample_weights)
    with_argmax = tables.pools_by_max and len(trained) > 0
    if tables.algorithm is not None and trained and not _exporting():
        trainable = [weight.requires_grad for weight in tied]
        memory = [part for parts in tables.memory.parts for part in parts]
        out, _ = torch.ops.dlrm_rs.fused_lookup(
            trained[0],
            memory,
            tables.memory.states,
            tables.key,
            tables.layout,
            *bags,
            trainable,
            with_argmax,
            scale_grad_by_freq,
        )
    else:
        if sparse and trained and tables.algorithm is None:
            torch.ops.dlrm_rs.refuse(
                "sparse: expected False in a model that torch.compile traces for training, as its graphs hold no "
                "sparse gradients, got True; a fused optimizer, optimizer=dlrm_rs.optim..., needs no gradient at all"
            )
        out, _ = torch.ops.dlrm_rs.lookup(rows, tables.key, tables.layout, *bags, with_argmax, scale_grad_by_freq)
    pooled: Tensor = out
    return pooled


def renorm(
    tables: EmbeddingTables,
    indices: Tensor,
    offsets: Tensor | None,
    batch_size: int,
    per_sample_weights: Tensor | None,
    max_norm: float,
    norm_type: float,
) -> None:
    """As `operators.renorm`, to be traced."""
    rows = [part.detach() for part in tables.parts()]
    bags = (indices, offsets, batch_size, per_sample_weights)
    torch.ops.dlrm_rs.renorm_(rows, tables.key, tables.layout, *bags, max_norm, norm_type)


def _exporting() -> bool:
    # Not `torch.compiler.is_exporting()`, of which torch.compile says True as well in some versions. Where there is no
    # telling, as before torch 2.7, a saved program keeps `fused_lookup`, which looks up as well.
    return getattr(torch.compiler, "_is_exporting_flag", False)


_BAGS = "Tensor indices, Tensor? offsets, SymInt batch_size, Tensor? per_sample_weights"


def _register(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    torch.library.define(f"dlrm_rs::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"dlrm_rs::{name}", "cpu", kernel)
    torch.library.register_fake(f"dlrm_rs::{name}", fake)


def _contiguous(indices: Tensor, offsets: Tensor | None, batch_size: int) -> calls.Bags:
    # A compiled graph may hand over tensors in another layout than those that the module has checked.
    return indices.contiguous(), None if offsets is None else offsets.contiguous(), batch_size


def _refuse(message: str) -> None:
    raise ValueError(message)


# What traced code raises, torch.compile replaces by words of its own before torch 2.12; not what an operator raises.
torch.library.define("dlrm_rs::refuse", "(str message) -> ()")
torch.library.impl("dlrm_rs::refuse", "default", _refuse)
torch.library.register_fake("dlrm_rs::refuse", _refuse)


# --- lookup


def _lookup(
    rows: Sequence[Tensor],
    key: Tensor,
    layout: str,
    indices: Tensor,
    offsets: Tensor | None,
    batch_size: int,
    per_sample_weights: Tensor | None,
    with_argmax: bool,
    scale_grad_by_freq: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    described = Layout.parse(layout)
    # Zeros, since the engine leaves the columns of features alone that are pooled otherwise.
    argmax = torch.zeros(batch_size, described.width if with_argmax else 0, dtype=torch.int32, device="cpu")
    bags = _contiguous(indices, offsets, batch_size)
    weights = None if per_sample_weights is None else per_sample_weights.contiguous()
    handle = handle_of(rows, key, described)
    return calls.lookup(handle, described, bags, weights, argmax if with_argmax else None), argmax


def _fake_lookup(
    rows: Sequence[Tensor],
    key: Tensor,
    layout: str,
    indices: Tensor,
    offsets: Tensor | None,
    batch_size: int,
    per_sample_weights: Tensor | None,
    with_argmax: bool,
    scale_grad_by_freq: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    described = Layout.parse(layout)
    outputs = batch_size if described.pooled else indices.numel()
    out = indices.new_empty(outputs, described.width, dtype=described.output_dtype)  # (B, W) or (L, D)
    return out, indices.new_empty(batch_size, described.width if with_argmax else 0, dtype=torch.int32)


def _save_lookup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows, key, layout, indices, offsets, ctx.batch_size, per_sample_weights, ctx.with_argmax, ctx.scale = inputs
    ctx.layout, ctx.parts = layout, len(rows)
    # Only the gradient of per_sample_weights reads the rows: then torch is to notice if they changed meanwhile.
    wanted = per_sample_weights is not None and per_sample_weights.requires_grad
    ctx.save_for_backward(key, indices, offsets, per_sample_weights, output[1], *(rows if wanted else ()))


def _backward_of_lookup(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    key, indices, offsets, per_sample_weights, argmax, *rows = ctx.saved_tensors
    bags = (indices, offsets, ctx.batch_size)
    weights_grad = None
    if ctx.needs_input_grad[6]:
        weights_grad = torch.ops.dlrm_rs.per_sample_weights_gradient(rows, key, ctx.layout, *bags, grad)
    places = Layout.parse(ctx.layout).places
    trainable = [ctx.needs_input_grad[0][place] for place in places]
    grads: list[Tensor | None] = [None] * ctx.parts
    if True in trainable:
        given = (per_sample_weights, argmax if ctx.with_argmax else None, grad, trainable, ctx.scale)
        dense = iter(torch.ops.dlrm_rs.dense_gradient(key, ctx.layout, *bags, *given))
        for place, trained in zip(places, trainable, strict=True):
            if trained:
                grads[place] = next(dense)
    return grads, None, None, None, None, None, weights_grad, None, None


_register(
    "lookup",
    f"(Tensor[] rows, Tensor key, str layout, {_BAGS}, bool with_argmax, bool[] scale_grad_by_freq) "
    "-> (Tensor, Tensor)",
    _lookup,
    _fake_lookup,
)
torch.library.register_autograd("dlrm_rs::lookup", _backward_of_lookup, setup_context=_save_lookup)


# --- fused_lookup


def _fused_lookup(
    tie: Tensor,
    rows: Sequence[Tensor],
    states: Sequence[Tensor],
    key: Tensor,
    layout: str,
    indices: Tensor,
    offsets: Tensor | None,
    batch_size: int,
    per_sample_weights: Tensor | None,
    trainable: Sequence[bool],
    with_argmax: bool,
    scale_grad_by_freq: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    bags = (indices, offsets, batch_size, per_sample_weights)
    return _lookup(rows, key, layout, *bags, with_argmax, scale_grad_by_freq)


def _fake_fused_lookup(
    tie: Tensor,
    rows: Sequence[Tensor],
    states: Sequence[Tensor],
    key: Tensor,
    layout: str,
    indices: Tensor,
    offsets: Tensor | None,
    batch_size: int,
    per_sample_weights: Tensor | None,
    trainable: Sequence[bool],
    with_argmax: bool,
    scale_grad_by_freq: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    bags = (indices, offsets, batch_size, per_sample_weights)
    return _fake_lookup(rows, key, layout, *bags, with_argmax, scale_grad_by_freq)


def _save_fused_lookup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, rows, states, key, ctx.layout, indices, offsets, ctx.batch_size, per_sample_weights, *flags = inputs
    ctx.trainable, ctx.with_argmax, ctx.scale = flags
    ctx.parts, ctx.states = len(rows), len(states)
    ctx.save_for_backward(key, indices, offsets, per_sample_weights, output[1], *rows, *states)


def _backward_of_fused_lookup(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    key, indices, offsets, per_sample_weights, argmax, *tensors = ctx.saved_tensors
    rows, states = tensors[: ctx.parts], tensors[ctx.parts :]
    bags = (indices, offsets, ctx.batch_size)
    weights_grad = None
    if ctx.needs_input_grad[8]:  # before the update, which writes to the rows that this reads
        weights_grad = torch.ops.dlrm_rs.per_sample_weights_gradient(rows, key, ctx.layout, *bags, grad)
    given = (per_sample_weights, argmax if ctx.with_argmax else None, grad, ctx.trainable, ctx.scale)
    torch.ops.dlrm_rs.update(rows, states, key, ctx.layout, *bags, *given)
    lists = ([None] * ctx.parts, [None] * ctx.states)
    return None, *lists, None, None, None, None, None, weights_grad, None, None, None


_register(
    "fused_lookup",
    "(Tensor tie, Tensor[] rows, Tensor[] states, Tensor key, str layout, "
    f"{_BAGS}, bool[] trainable, bool with_argmax, bool[] scale_grad_by_freq) -> (Tensor, Tensor)",
    _fused_lookup,
    _fake_fused_lookup,
)
torch.library.register_autograd("dlrm_rs::fused_lookup", _backward_of_fused_lookup, setup_context=_save_fused_lookup)


# --- gradients


def _dense_gradient(
    key: Tensor,
    layout: str,
    indices: Tensor,
    offsets: Tensor | None,
    batch_size: int,
    per_sample_weights: Tensor | None,
    argmax: Tensor | None,
    grad: Tensor,
    trainable: Sequence[bool],
    scale_grad_by_freq: Sequence[bool],
) -> list[Tensor]:
    tables = tables_of(key)
    calls.check_unshared(tables)
    bags = _contiguous(indices, offsets, batch_size)
    grad = grad.float().contiguous()
    terms = calls.gradient_terms(bags, per_sample_weights, argmax, grad, trainable, scale_grad_by_freq)
    dtypes = [TORCH_DTYPES.get(table.row_format, torch.float32) for table in Layout.parse(layout).tables]
    return [rows for rows in calls.dense_gradient(tables.handle, dtypes, terms) if rows is not None]


def _fake_dense_gradient(
    key: Tensor,
    layout: str,
    indices: Tensor,
    offsets: Tensor | None,
    batch_size: int,
    per_sample_weights: Tensor | None,
    argmax: Tensor | None,
    grad: Tensor,
    trainable: Sequence[bool],
    scale_grad_by_freq: Sequence[bool],
) -> list[Tensor]:
    return [
        grad.new_empty(table.num_embeddings, table.embedding_dim, dtype=TORCH_DTYPES[table.row_format])
        for table, trained in zip(Layout.parse(layout).tables, trainable, strict=True)
        if trained
    ]


def _per_sample_weights_gradient(
    rows: Sequence[Tensor],
    key: Tensor,
    layout: str,
    indices: Tensor,
    offsets: Tensor | None,
    batch_size: int,
    grad: Tensor,
) -> Tensor:
    handle = handle_of(rows, key, Layout.parse(layout))
    bags = _contiguous(indices, offsets, batch_size)
    return calls.per_sample_weights_gradient(handle, bags, grad.float().contiguous())


def _fake_per_sample_weights_gradient(
    rows: Sequence[Tensor],
    key: Tensor,
    layout: str,
    indices: Tensor,
    offsets: Tensor | None,
    batch_size: int,
    grad: Tensor,
) -> Tensor:
    return grad.new_empty(indices.numel(), dtype=torch.float32)


_GRADIENT = f"{_BAGS}, Tensor? argmax, Tensor grad, bool[] trainable, bool[] scale_grad_by_freq"
_register("dense_gradient", f"(Tensor key, str layout, {_GRADIENT}) -> Tensor[]", _dense_gradient, _fake_dense_gradient)
_register(
    "per_sample_weights_gradient",
    "(Tensor[] rows, Tensor key, str layout, Tensor indices, Tensor? offsets, SymInt batch_size, Tensor grad) "
    "-> Tensor",
    _per_sample_weights_gradient,
    _fake_per_sample_weights_gradient,
)


# --- changes in place


def _update(
    rows: Sequence[Tensor],
    states: Sequence[Tensor],
    key: Tensor,
    layout: str,
    indices: Tensor,
    offsets: Tensor | None,
    batch_size: int,
    per_sample_weights: Tensor | None,
    argmax: Tensor | None,
    grad: Tensor,
    trainable: Sequence[bool],
    scale_grad_by_freq: Sequence[bool],
) -> None:
    tables = tables_of(key)
    calls.check_fused(tables)
    if layout != tables.layout:
        raise RuntimeError(
            "update: expected tables whose rows are stored as in the forward, and they have been quantized or "
            "dequantized since"
        )
    bags = _contiguous(indices, offsets, batch_size)
    grad = grad.float().contiguous()
    if tables.memory.overlaps(grad):
        grad = grad.clone()  # the update would write to what it still has to read
    terms = calls.gradient_terms(bags, per_sample_weights, argmax, grad, trainable, scale_grad_by_freq)
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
    rows: Sequence[Tensor],
    key: Tensor,
    layout: str,
    indices: Tensor,
    offsets: Tensor | None,
    batch_size: int,
    per_sample_weights: Tensor | None,
    max_norm: float,
    norm_type: float,
) -> None:
    indices, offsets, _ = _contiguous(indices, offsets, batch_size)
    handle = handle_of(rows, key, Layout.parse(layout))
    ids = (indices.numpy(), calls.array(offsets), batch_size, calls.array(per_sample_weights))
    handle.renorm(*ids, max_norm, norm_type)
    increment_version(list(rows))


def _no_output(*_: Any) -> None:
    """The fake kernel of an operator that gives nothing."""


_register(
    "update",
    f"(Tensor(a!)[] rows, Tensor(b!)[] states, Tensor key, str layout, {_GRADIENT}) -> ()",
    _update,
    _no_output,
)
_register(
    "renorm_",
    f"(Tensor(a!)[] rows, Tensor key, str layout, {_BAGS}, float max_norm, float norm_type) -> ()",
    _renorm,
    _no_output,
)
