"""Write README's tables of the comparison from a record of `dlrm-rs bench`.

    python benches/readme_table.py benches/record/2026-12-24.json

puts them between README's two markers, in the place of those that were there. No figure is typed by hand. `--steps`
names another record for the training steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlrm_rs.bench.record import Comparison, Record, comparisons, load_record

BEGIN = "<!-- comparison: written by benches/readme_table.py -->"
END = "<!-- comparison ends -->"

# The use of a peer that has all tables in one, and their outputs one upon another.
STACKED = "stacked"


FAMILIES = ("lookup", "step")


def tables(record: Record, families: Sequence[str] = FAMILIES) -> str:
    """Lookups, and then training steps by their optimizer, on the most threads; a family that has none is left out."""
    made = [_table(record, family) for family in families]
    return "\n\n".join(table for table in made if table)


def _table(record: Record, family: str) -> str:
    """For every case and row format the best peer's time over ours, lost or won."""
    threads = max(record.arguments.thread_counts())
    of_run = [m for m in record.measurements if (m.family, m.threads) == (family, threads)]
    if not of_run:
        return ""
    cells = {(_case(c), c.ours.row_format): _cell(c) for c in comparisons([m for m in of_run if m.use != STACKED])}
    for c in comparisons(of_run):
        if c.peers and c.peers[0].peer.use == STACKED:
            cells[_case(c), c.ours.row_format] += f"; {c.peers[0].ratio:.2f} stacked"
    formats = list(dict.fromkeys(row_format for _, row_format in cells))
    headings = ["shape", "batch", "ids", *(["optimizer"] if family == "step" else [])]
    lines = [_line([*headings, *formats]), _line(["---"] * (len(headings) + len(formats)))]
    rows = dict.fromkeys(case for case, _ in cells)
    lines += [_line([*case, *[cells.get((case, name), "") for name in formats]]) for case in rows]
    return "\n".join(lines)


def _case(comparison: Comparison) -> tuple[str, ...]:
    ours = comparison.ours
    case = (ours.shape, f"{ours.batch_size:,}", ours.ids)
    return (*case, ours.optimizer) if ours.optimizer else case


def _cell(comparison: Comparison) -> str:
    if not comparison.peers:
        return "no peer"
    best = comparison.peers[0]
    return f"{best.ratio:.2f} ({best.peer.side})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def caption(record: Record, source: str, families: Sequence[str] = FAMILIES) -> str:
    """What the figures are, and on what they were measured."""
    machine = record.machine
    threads = max(record.arguments.thread_counts())
    fbgemm = machine["fbgemm-gpu-cpu"] or machine["fbgemm-gpu"]
    limits = {family: record.arguments.rows_of(family) for family in families if family in record.arguments.families}
    rows = "".join(
        f", no table of a {family} of more than {limit:,} rows" for family, limit in limits.items() if limit is not None
    )
    return (
        f"The best peer's time over that of dlrm_rs (above 1: dlrm_rs is faster), medians, {threads} threads{rows}; "
        "both at their best use and environment, in turn in one process. Where torch is faster with the tables "
        "stacked, all in one and their outputs one upon another, that ratio is told as well. `dlrm-rs bench`, "
        f"{machine['time'][:10]}, {machine['processor']}, {machine['simd']}, "
        f"{machine['cores']} cores ({_other_work(machine)}), {machine['memory_bytes'] / 2**30:.0f} GiB; "
        f"torch {machine['torch']}, FBGEMM {fbgemm or 'not installed'}, "
        f"commit {(machine['commit'] or 'unknown')[:12]}; `{source}` has the rest."
    )


def _other_work(machine: Mapping[str, Any]) -> str:
    """What else the machine did just before the run; records of before 2026-12 have the load average alone."""
    if "busy" in machine:
        return f"{machine['busy']:.0%} busy with other work"
    return f"load average {machine['load']:.1f}"


def rewrite(readme: str, section: str) -> str:
    """The README with `section` between its markers.

    Raises:
        ValueError: The markers are not there, once each and in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"README: expected {BEGIN!r} and then {END!r}, once each")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def main() -> None:
    """Rewrite the README."""
    parser = argparse.ArgumentParser(description="Write README's tables of the comparison from a record.")
    parser.add_argument("record", type=Path)
    parser.add_argument("--steps", type=Path, help="another record, of which the training steps are")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    options = parser.parse_args()
    sources: list[tuple[Path, Sequence[str]]] = [(options.record, FAMILIES)]
    if options.steps is not None:
        sources = [(options.record, ("lookup",)), (options.steps, ("step",))]
    parts = []
    for source, families in sources:
        record = load_record(source)
        parts += [tables(record, families), caption(record, source.as_posix(), families)]
    section = "\n" + "\n\n".join(parts) + "\n"
    readme = options.readme.read_text(encoding="utf-8")
    options.readme.write_text(rewrite(readme, section), encoding="utf-8")


if __name__ == "__main__":
    main()
