"""The tables of a model, by the names that they have there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from dlrm_rs.owner import HoldsWeight, OwnsTables
from dlrm_rs.row_formats import TORCH_DTYPES
from dlrm_rs.tables import EmbeddingTables

__all__ = ["ModelTable", "check_changeable", "tables_of"]


class ModelTable(NamedTuple):
    """A table of the model, by the name that it has there."""

    name: str
    tables: EmbeddingTables
    place: int

    @property
    def row_format(self) -> str:
        """How its rows are stored."""
        return self.tables.row_formats[self.place]

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, D)`."""
        _, num_embeddings, embedding_dim, _ = self.tables.tables[self.place]
        return num_embeddings, embedding_dim

    @property
    def hot_share(self) -> float:
        """The share of the rows that are kept in fp32 while the others are in codes."""
        return self.tables.hot_rows[self.place] if self.tables.keeps_hot_rows(self.place) else 0.0

    def bytes_in(self, row_format: str, scale_format: str | None) -> int:
        """What rows take in a format that they are quantized to, with scales in another, but for hot rows."""
        num_embeddings, embedding_dim = self.shape
        if row_format in TORCH_DTYPES:
            return num_embeddings * embedding_dim * TORCH_DTYPES[row_format].itemsize
        bits = int(row_format.removeprefix("int"))
        pair_bytes = 8 if scale_format == "fp32" else 4  # of scale and bias
        return num_embeddings * (-(-embedding_dim * bits // 8) + pair_bytes)

    def bytes_now(self) -> int:
        """What its rows take."""
        sizes = self.tables.handle.memory_report()[self.place]
        return sizes["payload"] + sizes["scales"] + sizes["hot"]

    @contextmanager
    def named(self) -> Iterator[None]:
        """Have errors name the table as the model does, which the engine does not know."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error


def tables_of(module: nn.Module) -> list[ModelTable]:
    """Every table of a model, once, by its name there: the module's, and in a collection the table's after it."""
    found: dict[int, list[ModelTable]] = {}
    for name, owner in module.named_modules():
        if isinstance(owner, OwnsTables):
            tables = owner._tables
            tables.settle()
            single = len(tables.tables) == 1 and isinstance(owner, nn.Embedding | nn.EmbeddingBag)
            names = [name or spec.name if single else f"{name}.{spec.name}".lstrip(".") for spec in tables.tables]
            of_owner = [ModelTable(table_name, tables, place) for place, table_name in enumerate(names)]
            found.setdefault(id(tables), of_owner)
    if not found:
        raise ValueError(
            "module: expected a model with tables of dlrm_rs, got none; dlrm_rs.replace_embeddings brings those of "
            "torch into the engine"
        )
    return [table for tables in found.values() for table in tables]


def check_changeable(module: nn.Module, tables: Sequence[ModelTable], row_format: str) -> None:
    """Refuse what would not work any more with rows of another format."""
    for table in tables:
        table.tables.check_unshared(f"module: cannot change the rows of {table.name!r}; do so before they are shared")
    weights = {id(weight) for table in tables for weight in table.tables.weights() if weight.numel()}
    for name, owner in module.named_modules():
        if getattr(owner, "max_norm", None) is not None and isinstance(owner, OwnsTables) and row_format != "fp32":
            raise ValueError(f"max_norm: expected None of {name!r} for rows of {row_format}, got {owner.max_norm}")
        shared = [key for key, value in owner._parameters.items() if id(value) in weights]
        if shared and not isinstance(owner, HoldsWeight):
            raise ValueError(
                f"weight: expected tables that share their Parameter with no other module, got {name!r}, whose "
                f"{shared[0]!r} is one's weight and would stay behind"
            )
