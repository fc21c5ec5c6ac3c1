"""What a quantization changed: bytes and errors, per table and in all, to print, to compute with and to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dlrm_rs.quantization.budget import Choice, Trial
from dlrm_rs.quantization.row_errors import RowErrors, mean_error, p99_error, row_weights
from dlrm_rs.quantization.text import report_lines

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["QuantizationReport", "ReportBuilder", "TableChange", "TableReport", "TotalReport"]


@dataclass(frozen=True)
class TableChange:
    """A table, before and after.

    Attributes:
        name: Of the table in the model.
        num_embeddings: `N`, its rows.
        embedding_dim: `D`, elements of a row.
        format_before: The row format that it had.
        format_after: The one that it has.
        bytes_before: What it took.
        bytes_after: What it takes.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    format_before: str
    format_after: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class TableReport(TableChange):
    """What a quantization changed in a table.

    The error of a row is relative: the L2 norm of the difference to what the row was, over the L2 norm of what it was.

    Attributes:
        error_mean: Mean error of its rows, weighted by how often they are used if that is known.
        error_p99: The error that 99 % of its rows, weighted so, do not exceed.
        error_worst: The largest error of a row, used or not.
        worst_row: The row that has it, the first of several; -1 for a table without rows.
        max_abs_error: The largest absolute error of an element.
    """

    error_mean: float
    error_p99: float
    error_worst: float
    worst_row: int
    max_abs_error: float

    @classmethod
    def of(
        cls,
        change: TableChange,
        errors: NDArray[np.float32],
        max_abs_error: float,
        weights: ArrayLike | None = None,
    ) -> TableReport:
        """Sum up the errors of a table's rows.

        Args:
            change: The table.
            errors: `(N,)` float32, the relative L2 error of each row; 0 for a row that did not change.
            max_abs_error: The largest absolute error of an element.
            weights: `(N,)`, how often each row is used; None where all count alike.

        Raises:
            ValueError: `errors` or `weights` of another shape; weights with a negative number.

        Example:
            >>> import numpy as np
            >>> change = TableChange("t0", 3, 64, "fp32", "int8", bytes_before=768, bytes_after=204)
            >>> table = TableReport.of(change, np.float32([0.25, 0.5, 0]), max_abs_error=0.125, weights=[3, 0, 1])
            >>> table.error_mean, table.error_p99, table.error_worst, table.worst_row
            (0.1875, 0.25, 0.5, 1)
        """
        return cls._of(change, _row_errors(change, errors, weights), max_abs_error)

    @classmethod
    def _of(cls, change: TableChange, rows: RowErrors, max_abs_error: float) -> TableReport:
        worst_row = int(np.argmax(rows.errors)) if len(rows.errors) else -1
        return cls(
            **asdict(change),
            error_mean=mean_error([rows]),
            error_p99=p99_error([rows]),
            error_worst=float(rows.errors[worst_row]) if len(rows.errors) else 0.0,
            worst_row=worst_row,
            max_abs_error=float(max_abs_error),
        )


@dataclass(frozen=True)
class TotalReport:
    """What a quantization changed in all tables together.

    Attributes:
        num_embeddings: Rows of all tables.
        bytes_before: What they took.
        bytes_after: What they take.
        error_mean: Mean error of all rows, weighted by how often they are used if that is known.
        error_p99: The error that 99 % of all rows, weighted so, do not exceed.
        error_worst: The largest error of a row.
        worst_table: The table that has this row; "" without rows.
        worst_row: The row; -1 without rows.
        max_abs_error: The largest absolute error of an element.
    """

    num_embeddings: int
    bytes_before: int
    bytes_after: int
    error_mean: float
    error_p99: float
    error_worst: float
    worst_table: str
    worst_row: int
    max_abs_error: float


@dataclass(frozen=True)
class QuantizationReport:
    """What a quantization changed. `print` shows it as a table.

    Attributes:
        tables: Of each table.
        total: Of all tables together.
        choice: What the search found, where a budget chose the formats; else None.
    """

    tables: tuple[TableReport, ...]
    total: TotalReport
    choice: Choice | None = None

    @property
    def trials(self) -> tuple[Trial, ...]:
        """What the search for the formats measured, in its order; empty where nothing was searched."""
        return self.choice.trials if self.choice else ()

    def __str__(self) -> str:
        return "\n".join(report_lines(self))

    def to_dataframe(self) -> pd.DataFrame:
        """A row per table, a column per attribute of `TableReport`.

        Raises:
            ModuleNotFoundError: pandas is not installed.

        Example:
            >>> ReportBuilder().build().to_dataframe().columns[:3].to_list()
            ['name', 'num_embeddings', 'embedding_dim']
        """
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('pandas is missing: pip install "dlrm_rs[report]"', name="pandas") from error
        columns = list(TableReport.__dataclass_fields__)
        return pd.DataFrame([asdict(table) for table in self.tables], columns=columns)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw bytes and errors of each table, and what was measured if a budget chose the formats.

        Args:
            path: Where to save the picture; its ending tells the kind, such as `.png` or `.svg`.

        Returns:
            The figure, to change or to show.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        try:
            from dlrm_rs.quantization.plot import draw_report
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'matplotlib is missing: pip install "dlrm_rs[report]"', name="matplotlib"
            ) from error
        figure = draw_report(self)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


class ReportBuilder:
    """Takes the errors of each table as they come, and makes the report of all.

    The 99th percentile over all tables needs the errors of all: they are kept until `build`, as they came, 4 bytes a
    row, and the weights, another 4.

    Example:
        >>> import numpy as np
        >>> builder = ReportBuilder()
        >>> for name, error in (("t0", 0.25), ("t1", 0.5)):
        ...     change = TableChange(name, 100, 64, "fp32", "int4", bytes_before=25_600, bytes_after=3_600)
        ...     table = builder.add(change, np.full(100, error, np.float32), max_abs_error=0.01)
        >>> print(str(builder.build()).splitlines()[0])
        2 tables of fp32: 51.2 kB -> 7.20 kB, 7.1 times smaller
    """

    def __init__(self) -> None:
        self._tables: list[TableReport] = []
        self._rows: list[RowErrors] = []

    def add(
        self,
        change: TableChange,
        errors: NDArray[np.float32],
        max_abs_error: float,
        weights: ArrayLike | None = None,
    ) -> TableReport:
        """Sum up a table, as `TableReport.of` does, and keep the errors of its rows.

        Args:
            change: The table.
            errors: `(N,)` float32. Kept without a copy: leave them as they are until `build`.
            max_abs_error: The largest absolute error of an element.
            weights: `(N,)`, kept likewise if they are float32. For every table or for none, all in one unit.

        Raises:
            ValueError: `errors` or `weights` that cannot be, or weights for some tables and not for others.
        """
        rows = _row_errors(change, errors, weights)
        if self._rows and (rows.weights is None) != (self._rows[0].weights is None):
            without, weighted = (change, self._tables[0]) if rows.weights is None else (self._tables[0], change)
            raise ValueError(
                f"weights: expected them for every table or for none, got them for {weighted.name!r} and not for "
                f"{without.name!r}"
            )
        self._rows.append(rows)
        self._tables.append(TableReport._of(change, rows, max_abs_error))
        return self._tables[-1]

    def build(self, choice: Choice | None = None) -> QuantizationReport:
        """Make the report and begin anew, without tables.

        Args:
            choice: What the search found, where a budget chose the formats.
        """
        tables, rows = tuple(self._tables), self._rows
        self._tables, self._rows = [], []
        return QuantizationReport(tables, _total(tables, rows), choice)


def _row_errors(change: TableChange, errors: NDArray[np.float32], weights: ArrayLike | None) -> RowErrors:
    if errors.shape != (change.num_embeddings,):
        raise ValueError(
            f"errors of {change.name!r}: expected shape {(change.num_embeddings,)}, one per row, got {errors.shape}"
        )
    return RowErrors(errors, None if weights is None else row_weights(change.name, weights, change.num_embeddings))


def _total(tables: Sequence[TableReport], rows: Sequence[RowErrors]) -> TotalReport:
    with_rows = [table for table in tables if table.num_embeddings]
    # As within a table, a NaN is the largest and the first of several counts.
    worst = max(with_rows, key=lambda table: (math.isnan(table.error_worst), table.error_worst), default=None)
    return TotalReport(
        num_embeddings=sum(table.num_embeddings for table in tables),
        bytes_before=sum(table.bytes_before for table in tables),
        bytes_after=sum(table.bytes_after for table in tables),
        error_mean=mean_error(rows),
        error_p99=p99_error(rows),
        error_worst=worst.error_worst if worst else 0.0,
        worst_table=worst.name if worst else "",
        worst_row=worst.worst_row if worst else -1,
        max_abs_error=float(np.max([table.max_abs_error for table in tables], initial=0.0)),
    )
