"""A record of a run: what was measured, on what, to keep and to read again."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from dlrm_rs.bench.arguments import Arguments
from dlrm_rs.bench.job import CEILING
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
class Versus:
    """A peer and ours, each at its best.

    Attributes:
        peer: The peer's use and environment of the lowest median.
        ours: The environment of our lowest median, of the processes that the peer was in: the two had the same minutes
            of the machine, and neither had more tries.
    """

    peer: Measurement
    ours: Measurement

    @property
    def ratio(self) -> float:
        """The peer's time over ours: how many times as fast ours is."""
        return self.peer.times.median / self.ours.times.median


@dataclass(frozen=True)
class Comparison:
    """The measurements of one case.

    Attributes:
        ceiling: Touching the rows, in the process of `ours`; None where nothing is touched.
        ours: Ours, as held against the best peer.
        peers: The peers, the fastest first.
    """

    ceiling: Measurement | None
    ours: Measurement
    peers: tuple[Versus, ...]


def comparisons(measurements: Sequence[Measurement]) -> Iterator[Comparison]:
    """The cases, in the order in which they were first measured."""
    order = {case: i for i, case in reversed(list(enumerate(m.case for m in measurements)))}
    ordered = sorted(measurements, key=lambda m: order[m.case])
    for _, of_case in groupby(ordered, key=lambda m: m.case):
        yield _comparison(list(of_case))


def scaling(of_run: Iterable[Comparison]) -> Iterator[tuple[Comparison, Comparison]]:
    """Cases that were measured with several numbers of threads, each with that of the fewest; ascending."""
    of_cases: dict[Hashable, list[Comparison]] = defaultdict(list)
    for comparison in of_run:
        of_cases[comparison.ours.case_but_threads].append(comparison)
    for of_case in of_cases.values():
        ascending = sorted(of_case, key=lambda c: c.ours.threads)
        if len(ascending) > 1:
            yield from ((comparison, ascending[0]) for comparison in ascending)


def _comparison(of_case: Sequence[Measurement]) -> Comparison:
    sides: dict[str, list[Measurement]] = defaultdict(list)
    for m in of_case:
        sides[m.side].append(m)
    ours, touched = sides.pop(NAME), sides.pop(CEILING, [])
    peers = sorted((_versus(peer, ours) for peer in sides.values()), key=lambda versus: versus.peer.times.median)
    chosen = peers[0].ours if peers else _best(ours)
    ceiling = next((m for m in touched if m.process == chosen.process), None)
    return Comparison(ceiling, chosen, tuple(peers))


def _versus(peer: Sequence[Measurement], ours: Sequence[Measurement]) -> Versus:
    processes = {m.process for m in peer}
    return Versus(_best(peer), _best([m for m in ours if m.process in processes]))


def _best(of_side: Sequence[Measurement]) -> Measurement:
    return min(of_side, key=lambda m: m.times.median)


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
