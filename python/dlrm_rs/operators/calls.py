"""The engine's calls on tensors, which both ways share: nothing of autograd here, nor of whose the tables are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlrm_rs._dlrm_rs import TableSet
from dlrm_rs.devices.ring import Ring
from dlrm_rs.layout import Layout
from dlrm_rs.memory import Memory
from dlrm_rs.optim import FusedOptimizer
from dlrm_rs.row_formats import TAKES_TENSORS, as_array
from dlrm_rs.tables import EmbeddingTables

__all__ = [
    "agree",
    "array",
    "check_fused",
    "check_sums",
    "check_unshared",
    "dense_gradient",
    "gradient_terms",
    "lookup",
    "per_sample_weights_gradient",
    "run_update",
    "sums_are_finite",
    "update",
]

# `indices, offsets, batch_size`, as of `operators.lookup`.
Bags = tuple[Tensor, Tensor | None, int]

# What `gradient_terms` gives.
Terms = tuple[Any, Any, int, Any, Any, Any, Sequence[bool], Sequence[bool]]


def lookup(
    handle: TableSet,
    shape: EmbeddingTables | Layout,
    bags: Bags,
    per_sample_weights: Tensor | None,
    argmax: Tensor | None,
    outputs: Ring,
) -> Tensor:
    """Look up and pool: `(B, W)`, or `(L, D)` where nothing is pooled; into memory of `outputs`."""
    indices, offsets, batch_size = bags
    rows = batch_size if shape.pooled else indices.numel()
    out = outputs.take((rows, shape.width), shape.output_dtype)
    given: Any = indices, offsets, batch_size, per_sample_weights, out, argmax
    if not TAKES_TENSORS:
        given = [as_array(item) if isinstance(item, Tensor) else item for item in given]
    handle.lookup(*given)
    return out


def gradient_terms(
    bags: Bags,
    per_sample_weights: Tensor | None,
    argmax: Tensor | None,
    grad: Tensor,
    trainable: Sequence[bool],
    scale_grad_by_freq: Sequence[bool],
) -> Terms:
    """The arguments of every gradient: of `update`, of dense and of sparse ones; `grad` is float32 and contiguous."""
    indices, offsets, batch_size = bags
    arrays = (array(per_sample_weights), array(argmax), array(grad))
    return indices.numpy(), array(offsets), batch_size, *arrays, trainable, scale_grad_by_freq


def check_fused(tables: EmbeddingTables) -> FusedOptimizer:
    """The fused optimizer that a forward was made with, if it is still there.

    Raises:
        RuntimeError: It is not.
    """
    if tables.optimizer is None:
        raise RuntimeError(
            "backward: expected the fused optimizer that the forward was made with, and it was given up since: the "
            "tables have been quantized"
        )
    return tables.optimizer


def update(tables: EmbeddingTables, memory: Memory, terms: Terms) -> None:
    """Run the fused optimizer of `tables`, with its hyperparameters of now, on `memory`."""
    optimizer = check_fused(tables)
    if optimizer.update_at == "step":
        raise RuntimeError(
            "update: expected 'backward' in a model that is compiled or exported, got 'step', which keeps gradients"
        )
    check_sums(optimizer, tables, terms)
    groups = optimizer.begin_step()
    try:
        run_update(tables, memory, terms, 1.0, groups)
    except BaseException:
        optimizer.take_back_step()
        raise


def sums_are_finite(grad: Tensor, per_sample_weights: Tensor | None, ids: int, factor: float = 1.0) -> bool:
    """Whether no sum of a row's gradients can be infinite or NaN, whichever `ids` ids a call has.

    That is known of the largest numbers: a row has at most all ids.
    """
    largest = _largest(grad) * (1.0 if per_sample_weights is None else _largest(per_sample_weights))
    return largest * max(ids, 1) * abs(factor) <= torch.finfo(torch.float32).max  # NaN is not


def _largest(numbers: Tensor) -> float:
    """The largest size; NaN if there is one."""
    if not numbers.numel():
        return 0.0
    smallest, largest = torch.aminmax(numbers)
    return float(torch.maximum(-smallest, largest))


def check_sums(optimizer: FusedOptimizer, tables: EmbeddingTables, terms: Terms, factor: float = 1.0) -> None:
    """Refuse gradients of which a row's sum may not be finite, if the optimizer does."""
    if optimizer.check_finite:
        indices, _, _, weights, _, grad, *_ = terms
        given = torch.as_tensor(grad), None if weights is None else torch.as_tensor(weights)
        optimizer.refuse(agree(tables, sums_are_finite(*given, len(indices), factor)))


def run_update(
    tables: EmbeddingTables, memory: Memory, terms: Terms, factor: float, groups: list[dict[str, Any]]
) -> None:
    """Run the fused optimizer by gradients times `factor`; by those of all processes that have the tables."""
    if tables.sharing is None:
        memory.handle.update(*terms, factor, groups)
    else:
        tables.sharing.update(tables, memory, terms, factor, groups)


def agree(tables: EmbeddingTables, flag: bool) -> bool:
    """Whether all processes that have the tables say so."""
    return flag if tables.sharing is None else tables.sharing.agree(flag)


def check_unshared(tables: EmbeddingTables) -> None:
    """Refuse gradients for an optimizer that every process would run on the same rows.

    Raises:
        RuntimeError: Several have the tables.
    """
    tables.check_unshared(
        "backward: cannot give a weight its gradient, by which every process would move the same rows; make the tables "
        "with optimizer=dlrm_rs.optim..., or freeze them"
    )


def dense_gradient(handle: TableSet, dtypes: Sequence[torch.dtype], terms: Terms) -> list[Tensor | None]:
    """The gradient of every table, `(N, D)` of its dtype; None for one that is not trainable."""
    gradients = handle.dense_gradient(*terms)
    return [
        None if rows is None else torch.from_numpy(rows).to(dtype)
        for rows, dtype in zip(gradients, dtypes, strict=True)
    ]


def per_sample_weights_gradient(handle: TableSet, bags: Bags, grad: Tensor) -> Tensor:
    """The gradient of `per_sample_weights`, `(L,)`."""
    indices, offsets, batch_size = bags
    return torch.from_numpy(
        handle.per_sample_weights_gradient(indices.numpy(), array(offsets), batch_size, array(grad))
    )


def array(tensor: Tensor | None) -> Any:
    """A tensor as the engine takes it."""
    return None if tensor is None else tensor.detach().numpy()
