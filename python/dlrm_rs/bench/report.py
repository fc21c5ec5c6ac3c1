"""What was measured, as tables to read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dlrm_rs.bench.arguments import Arguments
from dlrm_rs.bench.cases import capped
from dlrm_rs.bench.measurement import Measurement
from dlrm_rs.bench.record import Comparison, Record, comparisons, scaling
from dlrm_rs.bench.sides.side import PLAIN

# Right-justified, after the side.
_COLUMNS = ("us", "p10-p90", "Mrows/s", "GB/s", "ceiling", "ratio")

# Of the CPUs' time, what other work may take: more shows in the figures.
BUSY = 0.05

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
        compared = list(of_work)
        for comparison in compared:
            console.print(_table(comparison))
        scaled = list(scaling(compared))
        if scaled:
            console.print(_scaling_table(scaled))
    machine = record.machine
    console.print(
        f"{machine['processor']}, {machine['cores']} cores; torch {machine['torch']}, "
        f"FBGEMM {machine['fbgemm-gpu-cpu'] or machine['fbgemm-gpu'] or 'none'}, "
        f"dlrm_rs {machine['dlrm_rs']} ({machine['simd']})"
    )
    if machine["busy"] > BUSY:
        console.print(
            f"Other work took {machine['busy']:.0%} of the CPUs in the second before this began: if it went on, do not "
            "keep the figures. Libraries that wait for all their threads suffer most.",
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
    sides = (comparison.ours, *(versus.peer for versus in comparison.peers))
    caption = "; ".join(f"{m.side}: {_setting(m)}" for m in sides)
    table = _empty_table(_case(comparison.ours), caption, _COLUMNS)
    if comparison.ceiling is not None:
        table.add_row(*_cells(comparison.ceiling, None))
    best = comparison.peers[0].ratio if comparison.peers else None
    table.add_row(*_cells(comparison.ours, best), style="bold")
    for versus in comparison.peers:
        table.add_row(*_cells(versus.peer, versus.ratio))
    return table


def _scaling_table(scaled: Sequence[tuple[Comparison, Comparison]]) -> Table:
    """Ours, the ceiling and the best peer by threads, for all cases of a shape and row format."""
    caption = "x: how many times as fast as with the fewest threads"
    table = _empty_table("By threads", caption, ("threads", "us", "x", "ceiling x", "best peer", "us", "x"))
    for comparison, fewest in scaled:
        ours, peer = comparison.ours, _best_peer(comparison)
        table.add_row(
            _ids(ours) if comparison is fewest else "",
            str(ours.threads),
            _microseconds(ours.times.median),
            _speed_up(ours, fewest.ours),
            _speed_up(comparison.ceiling, fewest.ceiling),
            peer.side if peer else "",
            _microseconds(peer.times.median) if peer else "",
            _speed_up(peer, _best_peer(fewest)),
        )
    return table


def _best_peer(comparison: Comparison) -> Measurement | None:
    return comparison.peers[0].peer if comparison.peers else None


def _speed_up(m: Measurement | None, fewest: Measurement | None) -> str:
    return f"{fewest.times.median / m.times.median:.2f}" if m and fewest else ""


def _empty_table(title: str, caption: str, headings: Sequence[str]) -> Table:
    """Without vertical lines, and with the caption beneath, it fits into 80 columns."""
    table = Table(
        title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False, title_justify="left", caption_justify="left"
    )
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _case(ours: Measurement) -> str:
    threads = f"{ours.threads} thread" + "s" * (ours.threads > 1)
    return ", ".join(filter(None, [_ids(ours), threads]))


def _ids(ours: Measurement) -> str:
    return f"B {ours.batch_size}, {ours.ids}" if ours.batch_size else ""


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
