"""What a process does when it is given a shape, a row format, and peers: sides made, checked, and timed in turn."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from dlrm_rs.bench.cases import Case, IdBatch, capped, id_batches, set_threads
from dlrm_rs.bench.measurement import Measurement
from dlrm_rs.bench.rows import Rows, row_bytes
from dlrm_rs.bench.sides import Side
from dlrm_rs.bench.sides.ours import Ours
from dlrm_rs.bench.timing import Call, Times, time_in_turn
from dlrm_rs.data.synthetic import Shape

CEILING = "ceiling"

Make = Callable[[Shape, Rows], Side]


@dataclass(frozen=True)
class SidesJob(ABC):
    """What one process does at a time: its tables are made once for all cases.

    Attributes:
        shape: The shape's name.
        row_format: How rows are stored.
        peers: Their names.
        environment: What the process was started with.
        cases: What to time.
        seconds: For how long each.
        rows: No table has more; None for the shape's own.
        optimizer: Of a step.
    """

    family: ClassVar[str]

    shape: str
    row_format: str
    peers: tuple[str, ...]
    environment: str
    cases: tuple[Case, ...]
    seconds: float
    rows: int | None
    optimizer: str = ""

    def __str__(self) -> str:
        beside = ", ".join(self.peers) or "alone"
        what = f"{self.shape} {self.row_format} {self.optimizer}".rstrip()
        return f"{what} ({beside}; {self.environment})"

    @abstractmethod
    def makers(self) -> tuple[Callable[[Shape, Rows], Ours], list[Make]]:
        """What makes our side, and what makes the peers'."""

    @abstractmethod
    def check(self, case: Case, batch: IdBatch, sides: Sequence[Side], rows: Rows) -> None:
        """Check every use of every side before a case is timed.

        Raises:
            WrongOutputError: A side is wrong.
        """

    def run(self) -> list[Measurement]:
        """Make the tables, check every use, and time it.

        Raises:
            WrongOutputError: A side is wrong.
            MemoryError: The tables cannot be allocated.
        """
        shape, rows = capped(self.shape, self.rows), Rows()
        make_ours, make_peers = self.makers()
        ours = make_ours(shape, rows)
        sides: list[Side] = [ours, *(make(shape, rows) for make in make_peers)]
        measured: list[Measurement] = []
        for case, batches in _with_batches(self):
            set_threads(case.threads)
            self.check(case, batches[0], sides, rows)
            measured += self._measure(case, batches, ours, sides)
        del ours, sides
        gc.collect()  # modules are cycles: the next job needs their memory
        return measured

    def _measure(
        self, case: Case, batches: Sequence[IdBatch], ours: Ours, sides: Sequence[Side]
    ) -> Iterator[Measurement]:
        calls: dict[tuple[str, str], list[Call]] = {(CEILING, "touch"): [ours.touch(batch) for batch in batches]}
        for side in sides:
            for batch in batches:
                for use, call in side.calls(batch).items():
                    calls.setdefault((side.name, use), []).append(call)
        times = time_in_turn(calls, self.seconds)
        yield from self._measurements(case, batches[0], times)

    def _measurements(self, case: Case, batch: IdBatch, times: dict[tuple[str, str], Times]) -> Iterator[Measurement]:
        ceiling = times[CEILING, "touch"].median
        rows = len(batch.indices)
        dim = capped(self.shape, self.rows).embedding_dim
        for (side, use), timed in times.items():
            yield Measurement(
                self.family,
                self.shape,
                self.row_format,
                case.batch_size,
                case.ids,
                case.threads,
                side,
                use,
                self.environment,
                str(self),
                rows,
                rows * row_bytes(self.row_format, dim),
                timed,
                ceiling,
                self.optimizer,
            )


def _with_batches(job: SidesJob) -> Iterator[tuple[Case, list[IdBatch]]]:
    """The cases, each with its ids; those of cases that differ in threads alone are drawn once."""
    shape = capped(job.shape, job.rows)
    drawn: tuple[tuple[int, float], list[IdBatch]] | None = None
    for case in job.cases:
        key = (case.batch_size, case.zipf)
        if drawn is None or drawn[0] != key:
            drawn = (key, id_batches(shape, case, job.row_format))
        yield case, drawn[1]
