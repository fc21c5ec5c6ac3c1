"""The report as text of at most 100 columns, for names of usual length."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dlrm_rs.quantization.budget import Choice, Trial
from dlrm_rs.quantization.readable import aligned, readable_bytes, readable_count, readable_error

if TYPE_CHECKING:
    from dlrm_rs.quantization.report import QuantizationReport, TableReport, TotalReport

__all__ = ["report_lines"]

_WIDTH = 100
_HEADINGS = ["table", "rows", "dim", "format", "before", "after", "mean", "p99", "worst", "at row", "max abs"]


def report_lines(report: QuantizationReport) -> Iterator[str]:
    """The lines of a report: the tables and their total, and what a search measured and chose."""
    yield _summary(report)
    if report.tables:
        yield ""
        yield from _table_lines(report)
        yield ""
        yield "mean, p99, worst: relative L2 errors of rows. max abs: the largest error of an element."
    if report.total.worst_table:
        yield f"The worst row is row {report.total.worst_row:,} of {report.total.worst_table!r}."
    if report.choice:
        yield ""
        yield from _choice_lines(report.choice)


def _summary(report: QuantizationReport) -> str:
    count, total = len(report.tables), report.total
    formats = "/".join(dict.fromkeys(table.format_before for table in report.tables))
    sizes = f"{readable_bytes(total.bytes_before)} -> {readable_bytes(total.bytes_after)}"
    times = f", {total.bytes_before / total.bytes_after:.1f} times smaller" if total.bytes_after else ""
    return f"{count} table{'' if count == 1 else 's'}{formats and f' of {formats}'}: {sizes}{times}"


def _table_lines(report: QuantizationReport) -> Iterator[str]:
    # Where all tables had one format, the line above tells it.
    same = len({table.format_before for table in report.tables}) == 1
    rows = [_HEADINGS]
    for table in report.tables:
        change = table.format_after if same else f"{table.format_before}>{table.format_after}"
        rows.append(
            [table.name, readable_count(table.num_embeddings), str(table.embedding_dim), change, *_numbers(table)]
        )
    rows.append(["total", readable_count(report.total.num_embeddings), "", "", *_numbers(report.total)])
    heading, *lines, total = aligned(rows)
    rule = "-" * max(map(len, (heading, *lines, total)))
    yield from (heading, rule, *lines, rule, total)


def _numbers(report: TableReport | TotalReport) -> list[str]:
    return [
        readable_bytes(report.bytes_before),
        readable_bytes(report.bytes_after),
        readable_error(report.error_mean),
        readable_error(report.error_p99),
        readable_error(report.error_worst),
        str(report.worst_row) if report.worst_row >= 0 else "",
        readable_error(report.max_abs_error),
    ]


def _choice_lines(choice: Choice) -> Iterator[str]:
    yield from textwrap.wrap(f"Chosen: {choice.reason}", _WIDTH, break_on_hyphens=False)
    alone = [trial for trial in choice.trials if len(trial.formats) == 1]
    if alone:
        yield ""
        yield "How much worse the metric is with one table alone in a format (* chosen; empty: not worth measuring)"
        yield from _alone_lines(choice, alone)
    others = [trial for trial in choice.trials if len(trial.formats) != 1 or trial is choice.trial]
    yield ""
    yield "What else was measured (* chosen)"
    rows = [["", "bytes", "metric", "worse by", "what"]]
    for trial in others:
        mark = "*" if trial is choice.trial else ""
        size, damage = readable_bytes(trial.total_bytes), readable_error(trial.damage)
        rows.append([mark, size, f"{trial.metric:.6g}", damage, trial.reason])
    yield from aligned(rows, left=(0, 4))


def _alone_lines(choice: Choice, alone: Sequence[Trial]) -> list[str]:
    formats = choice.candidates
    damages = {next(iter(trial.formats.items())): readable_error(trial.damage) for trial in alone}
    rows = [["table", *formats, "stays"]]
    for table, name in choice.formats.items():
        cells = [damages.get((table, other), "") + (" *" if other == name else "  ") for other in formats]
        rows.append([table, *cells, "*" if name not in formats else ""])
    return aligned(rows)
