"""What was measured, as tables to read."""

from __future__ import annotations

from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dlrm_rs.bench.arguments import Arguments
from dlrm_rs.bench.cases import capped
from dlrm_rs.bench.measurement import Measurement
from dlrm_rs.bench.record import Comparison, Record, comparisons
from dlrm_rs.bench.sides.side import PLAIN

# Right-justified, after the side.
_COLUMNS = ("us", "p10-p90", "Mrows/s", "GB/s", "ceiling", "ratio")

# Load average, of the minute before a run, above which other work shows in the figures.
BUSY = 0.5

_LEGEND = (
    "ratio: the peer's time over that of dlrm_rs, in whose row it is that of the best peer",
    "ceiling: the time of touching the same rows and doing nothing else, over the side's",
    "GB/s: bytes of the rows' elements; of a step those of its lookup, which are read again and written",
    "All sides are at their best use and environment; the record has the others.",
)


def print_report(record: Record, console: Console) -> None:
    """Print a table for every case, then how to read them, and what was skipped."""
    of_run = list(comparisons(record.measurements))
    for work, of_work in groupby(of_run, key=lambda c: c.ours.work):
        console.print(_title(work, record.arguments), style="bold", highlight=False)
        for comparison in of_work:
            console.print(_table(comparison))
    machine = record.machine
    console.print(
        f"{machine['processor']}, {machine['cores']} cores; torch {machine['torch']}, "
        f"FBGEMM {machine['fbgemm-gpu-cpu'] or machine['fbgemm-gpu'] or 'none'}, "
        f"dlrm_rs {machine['dlrm_rs']} ({machine['simd']})"
    )
    if machine["load"] > BUSY:
        console.print(
            f"Load average {machine['load']:.1f} when this began: if that is other work that went on, do not keep the "
            "figures. Libraries that wait for all their threads suffer most.",
            style="bold red",
        )
    for line in _LEGEND:
        console.print(f"- {line}", highlight=False)
    for skipped in record.skipped:
        console.print(f"Skipped: {skipped}", markup=False, highlight=False)


def _title(work: tuple[str, str, str, str], arguments: Arguments) -> str:
    family, name, optimizer, row_format = work
    shape = capped(name, arguments.rows_of(family))
    sizes = f"{len(shape.num_embeddings)} tables, {sum(shape.num_embeddings):,} rows of {shape.embedding_dim}"
    if family == "quantize":
        return f"{name} quantized to {row_format}: {sizes}"
    few, many = min(shape.ids_per_bag), max(shape.ids_per_bag)
    what = f"{name} {row_format}" + (f", step with {optimizer}" if optimizer else "")
    return f"{what}: {sizes}, ids per bag {few if few == many else f'{few}-{many}'}"


def _table(comparison: Comparison) -> Table:
    # Without vertical lines, and with the settings beneath, it fits into 80 columns.
    sides = (comparison.ours, *(versus.peer for versus in comparison.peers))
    table = Table(
        title=_case(comparison.ours),
        caption="; ".join(f"{m.side}: {_setting(m)}" for m in sides),
        box=SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for heading in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    if comparison.ceiling is not None:
        table.add_row(*_cells(comparison.ceiling, None))
    best = comparison.peers[0].ratio if comparison.peers else None
    table.add_row(*_cells(comparison.ours, best), style="bold")
    for versus in comparison.peers:
        table.add_row(*_cells(versus.peer, versus.ratio))
    return table


def _case(ours: Measurement) -> str:
    threads = f"{ours.threads} thread" + "s" * (ours.threads > 1)
    return f"B {ours.batch_size}, {ours.ids}, {threads}" if ours.batch_size else threads


def _cells(m: Measurement, ratio: float | None) -> list[str]:
    times = m.times
    return [
        m.side,
        _microseconds(times.median),
        f"{_microseconds(times.low)}-{_microseconds(times.high)}",
        f"{m.rows_per_second / 1e6:,.1f}",
        f"{m.bytes_per_second / 1e9:.2f}",
        f"{m.of_ceiling:.0%}" if m.ceiling else "",
        "" if ratio is None else f"{ratio:.2f}",
    ]


def _setting(m: Measurement) -> str:
    return m.use if m.environment == PLAIN else f"{m.use}, {m.environment}"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}" if seconds > 1e-5 else f"{seconds * 1e6:.1f}"
