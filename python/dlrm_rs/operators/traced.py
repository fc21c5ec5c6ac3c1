"""The way to the engine that modules take in a model that torch traces: the operators `torch.ops.dlrm_rs`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import dlrm_rs.operators.registered  # noqa: F401 - defines the operators
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
    if tables.any_hot_rows():
        torch.ops.dlrm_rs.refuse(
            "hot_rows: expected none in a model that torch.compile or torch.export traces, as its graphs hold codes "
            "and scales alone, got some; dlrm_rs.quantize(module, hot_rows=0) brings them into codes, and "
            "torch.compiler.disable(module) keeps the lookup out of a compiled graph"
        )
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
