"""Whose the tensors are that an operator is given: of tables of this process, or of none, and then borrowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dlrm_rs._dlrm_rs import TableRows, TableSet
from dlrm_rs.layout import Layout
from dlrm_rs.row_formats import as_array
from dlrm_rs.tables import EmbeddingTables

__all__ = ["at_home", "handle_of", "tables_of"]


def tables_of(key: Tensor) -> EmbeddingTables:
    """The tables of this process that have a key.

    Raises:
        RuntimeError: They are gone.
    """
    tables = EmbeddingTables.find(key)
    if tables is None:
        raise RuntimeError(
            "key: expected the module whose lookup is trained to exist in this process, and it is gone; a saved "
            "program looks up, and is not trained"
        )
    return tables


def at_home(tables: EmbeddingTables, rows: Sequence[Tensor]) -> bool:
    """Whether `rows` are those of `tables`, which take over first what the user has put in their place."""
    were_at_home = tables.memory.is_at(rows)
    tables.adopt()
    return were_at_home or tables.memory.is_at(rows)


# The tables of rows that are in no module's memory, as long as the first of them exist.
_BORROWED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def handle_of(rows: Sequence[Tensor], key: Tensor, layout: Layout) -> TableSet:
    """The engine's tables whose memory `rows` are."""
    tables = EmbeddingTables.find(key)
    if tables is not None and at_home(tables, rows):
        return tables.handle
    where = (layout, [part.data_ptr() for part in rows])
    known = _BORROWED.get(rows[0])
    if known is None or known[0] != where:
        known = _BORROWED[rows[0]] = (where, _borrow(rows, layout))
    handle: TableSet = known[1]
    return handle


def _borrow(rows: Sequence[Tensor], layout: Layout) -> TableSet:
    borrowed = []
    for place, count, table in zip(layout.places, layout.parts, layout.tables, strict=True):
        parts = rows[place : place + count]
        if any(part.shape[0] != table.num_embeddings for part in parts[:2]):  # the third, a codebook, has 16 numbers
            shapes = [tuple(part.shape) for part in parts]
            raise ValueError(f"rows of table {table.name!r}: expected {table.num_embeddings}, got shapes {shapes}")
        arrays: list[Any] = [*map(as_array, parts), *[None] * (3 - count)]  # rows or codes, scales, codebook
        borrowed.append((table.name, TableRows.borrow(table.name, table.embedding_dim, table.row_format, *arrays)))
    return TableSet.of_rows(borrowed, layout.features)
