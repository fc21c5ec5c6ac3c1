"""What is to be known of a set of tables beside their tensors, as one string: what an operator is told.

A graph holds tensors, numbers and strings, and may be saved and run by another process. So an operator gets the tables'
tensors, and in a string how the engine is to read them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

__all__ = ["FeatureSpec", "Layout", "TableSpec"]


class TableSpec(NamedTuple):
    """A table, as the engine takes it."""

    name: str
    num_embeddings: int
    embedding_dim: int
    row_format: str


class FeatureSpec(NamedTuple):
    """What looks up in a table, as the engine takes it: `pooling` is "sum", "mean", "max" or "none"."""

    table: int
    pooling: str
    padding_idx: int | None


@dataclass(frozen=True)
class Layout:
    """Tables, what looks them up, and what a lookup gives.

    Args:
        tables: The tables, in their present row formats.
        parts: How many tensors each table's rows are: 1, or 2 or 3 where they are quantized (codes, scales, codebook).
        features: What looks them up, in the order of the output.
        output_dtype: Of what lookups give.
    """

    tables: tuple[TableSpec, ...]
    parts: tuple[int, ...]
    features: tuple[FeatureSpec, ...]
    output_dtype: torch.dtype

    @staticmethod
    @lru_cache(maxsize=256)  # a graph has the same string at every call
    def parse(text: str) -> Layout:
        """What `str` has made a string of."""
        tables, parts, features, dtype = json.loads(text)
        return Layout(
            tuple(TableSpec(*table) for table in tables),
            tuple(parts),
            tuple(FeatureSpec(*feature) for feature in features),
            getattr(torch, dtype),
        )

    def __str__(self) -> str:
        dtype = str(self.output_dtype).removeprefix("torch.")
        return json.dumps([self.tables, self.parts, self.features, dtype], separators=(",", ":"))

    @cached_property
    def width(self) -> int:
        """Columns of the output: the sum of the features' `D`; where nothing is pooled, the one `D` they have."""
        dims = [self.tables[feature.table].embedding_dim for feature in self.features]
        return sum(dims) if self.pooled else dims[0]

    @cached_property
    def pooled(self) -> bool:
        """Whether there is one output row per bag, rather than one per id."""
        return all(feature.pooling != "none" for feature in self.features)

    @cached_property
    def pools_by_max(self) -> bool:
        """Whether any feature does."""
        return any(feature.pooling == "max" for feature in self.features)

    @cached_property
    def places(self) -> list[int]:
        """Where among all tables' tensors the first of each table is."""
        return [sum(self.parts[:table]) for table in range(len(self.parts))]
