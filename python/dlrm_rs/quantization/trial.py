"""The search for each table's row format, tried out on the tables of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from dlrm_rs.quantization.budget import Budget, Choice, TableSizes
from dlrm_rs.quantization.encoding import Encoding
from dlrm_rs.quantization.model_tables import ModelTable
from dlrm_rs.quantization.progress import Progress
from dlrm_rs.quantization.search import choose_formats
from dlrm_rs.tables import Displaced

__all__ = ["choose"]


def choose(
    module: nn.Module, tables: Sequence[ModelTable], budget: Budget, encoding: Encoding, bar: Progress
) -> Choice:
    """Search for the formats; every table is as it was afterwards."""
    sizes = []
    for table in tables:
        bytes_of = {name: table.bytes_in(name, encoding.scale_format) for name in budget.formats}
        bytes_of[table.row_format] = table.bytes_now()
        sizes.append(TableSizes(table.name, table.row_format, bytes_of))
    with _trying(tables, encoding) as switch, bar.steps("Measuring") as progress:

        def evaluate(formats: Mapping[str, str]) -> float:
            switch(formats)
            return float(budget.metric(module))

        return choose_formats(budget, sizes, evaluate, progress)


@contextmanager
def _trying(tables: Sequence[ModelTable], encoding: Encoding) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """A function that brings tables into formats, always from their original rows; these come back at the end."""
    originals: dict[str, Displaced] = {}

    def switch(table: ModelTable, row_format: str) -> None:
        if table.row_format == row_format:
            return
        if table.name in originals:
            table.tables.restore(table.place, originals.pop(table.name))
        if table.row_format != row_format:
            encoded = encoding.encode(table, row_format, 0.0)
            originals[table.name] = table.tables.swap(table.place, encoded.rows, row_format)

    def switch_all(formats: Mapping[str, str]) -> None:
        for table in tables:
            switch(table, formats[table.name])

    try:
        yield switch_all
    finally:
        for table in tables:
            if table.name in originals:
                table.tables.restore(table.place, originals.pop(table.name))
