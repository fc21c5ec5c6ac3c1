"""A record of a run: what was measured, on what, to keep and to read again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from dlrm_rs.bench.arguments import Arguments
from dlrm_rs.bench.lookup import CEILING
from dlrm_rs.bench.measurement import Measurement
from dlrm_rs.bench.sides.ours import NAME
from dlrm_rs.bench.timing import Times


@dataclass
class Record:
    """What a run measured.

    Attributes:
        machine: Processor, memory, system, versions, and the commit if run in a checkout.
        arguments: Of the run.
        measurements: In the order of the run.
        skipped: What was not measured, each with the reason.
    """

    machine: dict[str, Any]
    arguments: Arguments
    measurements: list[Measurement] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """The measurements of one case, each peer at its best.

    Attributes:
        ceiling: Touching the rows; None where nothing is touched.
        ours: Ours, in the process of the best peer.
        peers: The best use and environment of each, the fastest first.
    """

    ceiling: Measurement | None
    ours: Measurement
    peers: tuple[Measurement, ...]

    @property
    def ratio(self) -> float | None:
        """The best peer's time over that of ours beside it; None without peers."""
        return self.peers[0].ratio if self.peers else None


def comparisons(measurements: Sequence[Measurement]) -> Iterator[Comparison]:
    """The cases, in the order in which they were first measured.

    A peer's best use and environment are those of its lowest median. They are held against ours of the same process, so
    that the two had the same minutes of the machine.
    """
    order = {case: i for i, case in reversed(list(enumerate(m.case for m in measurements)))}
    ordered = sorted(measurements, key=lambda m: order[m.case])
    for _, of_case in groupby(ordered, key=lambda m: m.case):
        yield _comparison(list(of_case))


def _comparison(of_case: Sequence[Measurement]) -> Comparison:
    best: dict[str, Measurement] = {}
    for m in of_case:
        if m.side not in (NAME, CEILING) and (m.side not in best or m.times.median < best[m.side].times.median):
            best[m.side] = m
    peers = tuple(sorted(best.values(), key=lambda m: m.times.median))

    def beside(side: str) -> Measurement | None:
        """Of the best peer's process: there the median of ours is the same."""
        of_side = [m for m in of_case if m.side == side]
        same_process = [m for m in of_side if peers and m.ours == peers[0].ours]
        return next(iter(same_process or of_side), None)

    ours = beside(NAME)
    assert ours is not None, "every process measures ours"
    return Comparison(beside(CEILING), ours, peers)


def save_record(record: Record, path: Path) -> None:
    """Write a record as JSON."""
    path.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def load_record(path: Path) -> Record:
    """Read a record.

    Raises:
        ValueError: It is no record of the comparison, or of another version of it.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        arguments: dict[str, Any] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in content["arguments"].items()
        }
        measurements = [Measurement(**{**m, "times": Times(**m["times"])}) for m in content["measurements"]]
        return Record(content["machine"], Arguments(**arguments), measurements, content["skipped"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a record written by `dlrm-rs bench`, got one without {error}") from error
