"""Lookups: what a process does when it is given a shape, a row format, and peers."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dlrm_rs.bench.cases import Case, IdBatch, capped, id_batches, set_threads
from dlrm_rs.bench.check import check_side
from dlrm_rs.bench.measurement import Measurement
from dlrm_rs.bench.rows import Rows, row_bytes
from dlrm_rs.bench.sides import PEERS, Side
from dlrm_rs.bench.sides.ours import Ours
from dlrm_rs.bench.timing import Call, Times, time_in_turn

CEILING = "ceiling"


@dataclass(frozen=True)
class LookupJob:
    """What one process does at a time: its tables are made once for all cases.

    Attributes:
        shape: The shape's name.
        row_format: How rows are stored.
        peers: Their names.
        environment: What the process was started with.
        cases: What to time.
        seconds: For how long each.
        rows: No table has more; None for the shape's own.
    """

    shape: str
    row_format: str
    peers: tuple[str, ...]
    environment: str
    cases: tuple[Case, ...]
    seconds: float
    rows: int | None

    def __str__(self) -> str:
        beside = ", ".join(self.peers) or "alone"
        return f"{self.shape} {self.row_format} ({beside}; {self.environment})"

    def run(self) -> list[Measurement]:
        """Make the tables, check every use, and time it.

        Raises:
            WrongOutputError: A side is wrong.
            MemoryError: The tables cannot be allocated.
        """
        shape, rows = capped(self.shape, self.rows), Rows()
        ours = Ours(shape, self.row_format, rows)
        peers = [peer.make(shape, self.row_format, rows) for peer in PEERS if peer.name in self.peers]
        measured: list[Measurement] = []
        with torch.no_grad():
            for case, batches in _with_batches(self):
                set_threads(case.threads)
                for side in (ours, *peers):
                    check_side(side, batches[0], rows, self.row_format)
                measured += self._measure(case, batches, ours, peers)
        del ours, peers
        gc.collect()  # modules are cycles: the next job needs their memory
        return measured

    def _measure(
        self, case: Case, batches: Sequence[IdBatch], ours: Ours, peers: Sequence[Side]
    ) -> Iterator[Measurement]:
        calls: dict[tuple[str, str], list[Call]] = {(CEILING, "touch"): [ours.touch(batch) for batch in batches]}
        for side in (ours, *peers):
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
                "lookup",
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
            )


def _with_batches(job: LookupJob) -> Iterator[tuple[Case, list[IdBatch]]]:
    """The cases, each with its ids; those of cases that differ in threads alone are drawn once."""
    shape = capped(job.shape, job.rows)
    drawn: tuple[tuple[int, float], list[IdBatch]] | None = None
    for case in job.cases:
        key = (case.batch_size, case.zipf)
        if drawn is None or drawn[0] != key:
            drawn = (key, id_batches(shape, case))
        yield case, drawn[1]
