"""The report as a picture: bytes and errors per table, and what a search measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from dlrm_rs.quantization.budget import Choice
from dlrm_rs.quantization.readable import readable_bytes

if TYPE_CHECKING:
    from dlrm_rs.quantization.report import QuantizationReport, TableReport

__all__ = ["MOST_TABLES", "draw_report"]

# Tables drawn, the largest of all: of more, no picture of a size to look at shows the names.
MOST_TABLES = 60

# Colours that the colour-blind can tell apart (Okabe and Ito).
BLUE, ORANGE, RED, GREY = "#0072B2", "#E69F00", "#D55E00", "#999999"


def draw_report(report: QuantizationReport) -> Figure:
    """Draw bytes before and after, the errors, and the measurements of a search if there was one."""
    tables = sorted(report.tables, key=lambda table: -table.bytes_before)[:MOST_TABLES]
    panels = 3 if report.choice else 2
    # A Figure of its own and no pyplot: there is no display to ask for, and no global state to leave behind.
    figure = Figure(figsize=(5.5 * panels, max(3.8, 2.2 + 0.25 * len(tables))), layout="constrained")
    axes = figure.subplots(1, panels)
    _draw_bytes(axes[0], tables)
    _draw_errors(axes[1], tables)
    if report.choice:
        _draw_trials(axes[2], report.choice)
    figure.suptitle(_title(report, len(tables)))
    return figure


def _title(report: QuantizationReport, drawn: int) -> str:
    count = len(report.tables)
    shown = f", the {drawn} largest shown" if drawn < count else ""
    sizes = f"{readable_bytes(report.total.bytes_before)} before and {readable_bytes(report.total.bytes_after)} after"
    return f"{count:,} tables{shown}; all together {sizes}"


def _draw_bytes(axes: Axes, tables: Sequence[TableReport]) -> None:
    # Dots and not bars: on a logarithmic axis the length of a bar means nothing.
    before, after = [table.bytes_before for table in tables], [table.bytes_after for table in tables]
    axes.hlines(range(len(tables)), after, before, color=GREY, zorder=1)
    axes.scatter(before, range(len(tables)), s=40, color=ORANGE, marker="s", label="before", zorder=2)
    axes.scatter(after, range(len(tables)), s=40, color=BLUE, marker="o", label="after", zorder=3)
    _finish_tables(axes, "Bytes of a table", "logarithmic", [*before, *after], len(tables))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: readable_bytes(size)))
    axes.set_yticks(range(len(tables)), [f"{table.name}  {table.format_after}" for table in tables])


def _draw_errors(axes: Axes, tables: Sequence[TableReport]) -> None:
    mean, worst = [table.error_mean for table in tables], [table.error_worst for table in tables]
    p99 = [table.error_p99 for table in tables]
    axes.hlines(range(len(tables)), mean, worst, color=GREY, zorder=1)
    axes.scatter(mean, range(len(tables)), s=40, color=BLUE, marker="o", label="mean", zorder=2)
    axes.scatter(p99, range(len(tables)), s=70, color=ORANGE, marker="d", label="99th percentile", zorder=3)
    axes.scatter(worst, range(len(tables)), s=45, color=RED, marker="x", label="worst row", zorder=4)
    _finish_tables(axes, "Errors of rows", "relative L2 error, logarithmic", [*mean, *worst], len(tables))
    axes.set_yticks(range(len(tables)), [""] * len(tables))
    for place, table in enumerate(tables):
        if not table.error_worst:  # which a logarithm has no place for
            axes.text(0.02, place, "no error", transform=axes.get_yaxis_transform(), va="center", color="#555555")


def _finish_tables(axes: Axes, title: str, label: str, values: Sequence[float], count: int) -> None:
    positive = [value for value in values if 0 < value < math.inf]
    if positive:
        # Whole decades with a margin: the labels of what is between them would overlap.
        low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        axes.set(xscale="log", xlim=(0.7 * 10.0**low, 1.4 * 10.0 ** max(high, low + 1)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=label, ylim=(max(count, 1) - 0.4, -0.6))  # the first table above
    axes.grid(alpha=0.3)
    _head(axes, title)


def _draw_trials(axes: Axes, choice: Choice) -> None:
    alone = [trial for trial in choice.trials if len(trial.formats) == 1]
    mixtures = [trial for trial in choice.trials if len(trial.formats) > 1]
    groups = (
        ("one table alone", alone, 18, GREY, "o"),
        ("several", mixtures, 45, RED, "x"),
        ("unquantized", choice.trials[:1], 70, ORANGE, "s"),
        ("chosen", [choice.trial], 160, BLUE, "*"),
    )
    for order, (label, trials, size, colour, marker) in enumerate(groups):
        sizes, metrics = [trial.total_bytes for trial in trials], [trial.metric for trial in trials]
        axes.scatter(sizes, metrics, s=size, color=colour, marker=marker, label=label, zorder=order + 2)
    axes.set(xlabel="bytes of all tables", ylabel="metric")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: readable_bytes(size)))
    axes.grid(alpha=0.3)
    _head(axes, "Models measured")


def _head(axes: Axes, title: str) -> None:
    """Title and legend, both above: anywhere inside, the legend would hide a table."""
    axes.set_title(title, pad=26)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, columnspacing=1, handletextpad=0.2
    )
