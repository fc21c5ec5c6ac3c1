"""Hot rows: those of a table of codes that are used most, which the engine keeps in fp32.

What a user asks for, checked, and the tensors that they are. Which rows these are is the engine's own choice, after
every update.
"""

from __future__ import annotations

import math

from torch import Tensor

from dlrm_rs.row_formats import QUANTIZED, row_format

__all__ = ["HOT_PARTS", "check_hot_rows", "hot_ways", "without_marks"]

# The tensors, as parts of a table: `(W, D)`, their numbers and how often each was touched lately, `(W,)`.
HOT_PARTS = ("hot_rows", "hot_ids", "hot_counts")


def check_hot_rows(of: str, share: float, data_type: object, stored: str, *, trained: bool) -> float:
    """The share of a table's rows that are to be hot, which is 0 for none.

    Args:
        of: What follows the argument's name in messages, as " of table 'ads'".
        share: What the user asks for.
        data_type: How hot rows are to be stored.
        stored: How the other rows are.
        trained: Whether there is a fused optimizer.

    Raises:
        ValueError: No share, hot rows that are not fp32, rows that are not codes, or no fused optimizer.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ValueError(f"hot_rows{of}: expected a share of the rows, from 0 to 1, got {share!r}")
    if row_format(f"hot_data_type{of}", data_type) != "fp32":
        raise ValueError(f"hot_data_type{of}: expected 'fp32', got {data_type!r}")
    if share > 0 and stored not in QUANTIZED:
        raise ValueError(
            f"hot_rows{of}: expected 0 for rows of {stored}, got {share}; hot rows are in fp32 beside rows of 'int8', "
            "'int4' or 'int2'"
        )
    if share > 0 and not trained:
        raise ValueError(
            f"hot_rows{of}: expected a fused optimizer, by whose updates rows become hot, got none; give "
            "optimizer=dlrm_rs.optim..., or hot_rows=0"
        )
    return float(share)


def hot_ways(share: float, num_embeddings: int) -> int:
    """Rows that a share is, at least; the engine makes it a multiple of 16."""
    return math.ceil(share * num_embeddings)


def without_marks(scales: Tensor, hot_ids: Tensor) -> Tensor:
    """Scales with zeros for hot rows, where the engine has its marks."""
    ids = hot_ids.long()
    scales = scales.clone()
    scales[ids[(ids >= 0) & (ids < len(scales))]] = 0
    return scales
