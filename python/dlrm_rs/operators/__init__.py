"""The engine's calls as torch operations: the only files that define autograd on the engine.

One crossing to Rust per forward and one per backward, however many tables. Three ways lead there:

- `direct`, an `autograd.Function`, is what modules take: it costs less than an operator.
- `at_once`, the same for calls that no backward follows: it asks nothing that such a call does not need.
- `traced`, by the operators `torch.ops.dlrm_rs` that a graph can hold, is what they take while `torch.compile` or
  `torch.export` traces them. `registered` has these operators.

`calls` is what they do with the engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlrm_rs.operators import direct, traced
from dlrm_rs.operators.at_once import lookup as lookup_at_once
from dlrm_rs.tables import EmbeddingTables

__all__ = ["lookup", "lookup_at_once", "renorm"]


def lookup(
    tables: EmbeddingTables,
    indices: Tensor,
    offsets: Tensor | None,
    batch_size: int,
    per_sample_weights: Tensor | None = None,
    *,
    sparse: bool = False,
    scale_grad_by_freq: Sequence[bool],
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
        scale_grad_by_freq: `(T,)`: divide the gradient of a row by the number of its occurrences in the call.

    Returns:
        `(B, W)` of the tables' `output_dtype`; for features that do not pool `(L, D)`.

    Raises:
        IndexError: An id is outside its table.
        ValueError: Offsets, lengths or weights of ids do not fit; sparse gradients in a traced model.
    """
    way = traced.lookup if torch.compiler.is_compiling() else direct.lookup
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise RuntimeError(
            "torch.jit.trace: expected operations that it records, got a lookup, which the engine computes; "
            "torch.export.export traces and saves a model with its tables"
        )
    return way(tables, indices, offsets, batch_size, per_sample_weights, sparse, scale_grad_by_freq)


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
    way = traced.renorm if torch.compiler.is_compiling() else direct.renorm
    way(tables, indices, offsets, batch_size, per_sample_weights, max_norm, norm_type)
