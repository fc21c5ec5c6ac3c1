"""What ran when: the stages of the table thread and of the device, their sums, and a trace for Chrome."""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Summary", "Timeline", "trace_path"]

# The tracks, and their order in the trace.
_TRACKS = ("loader", "tables", "device")


@dataclass(frozen=True)
class Summary:
    """Where the time of a run went.

    Attributes:
        steps: Batches that the loop has had, and whose updates are done.
        wall: Seconds from the first stage to the end of the last.
        stages: Seconds of each stage, by its name.
        cpu: Seconds that the table thread worked.
        device: Seconds that the device worked, from having rows to having their gradient.
        loading: Seconds that the device, with nothing else to do, waited for the loader.
        exposed: Likewise for the tables: for the ids of a batch that was loaded, and for its rows.
        updates: "exact" or "stale".
    """

    steps: int
    wall: float
    stages: dict[str, float]
    cpu: float
    device: float
    loading: float
    exposed: float
    updates: str

    @property
    def hidden(self) -> float:
        """The share of the CPU time that the device did not wait for; in a plain loop it would be 0."""
        return 1 - min(self.exposed / self.cpu, 1.0) if self.cpu else 0.0

    def __str__(self) -> str:
        def line(name: str, seconds: float) -> str:
            return f"  {name:<16} {1e3 * seconds / max(self.steps, 1):9.3f} ms/step  {seconds / (self.wall or 1):6.1%}"

        stale = "; every lookup misses the last update" if self.updates == "stale" else ""
        return "\n".join(
            [
                f"{self.steps} steps in {self.wall:.2f} s, updates {self.updates}{stale}",
                *(line(name, seconds) for name, seconds in self.stages.items()),
                line("CPU, tables", self.cpu),
                line("device", self.device),
                line("wait for tables", self.exposed),
                line("wait for loader", self.loading),
                f"  hidden: {self.hidden:.1%} of the CPU time",
            ]
        )


class Timeline:
    """Records stages; threads may share it.

    Args:
        path: Where `write` puts a trace; None to keep sums alone.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._events: list[tuple[str, str, float, float, int]] = []
        self._sums: dict[tuple[str, str], float] = defaultdict(float)
        self._begin, self._end = float("inf"), 0.0
        self._lock = threading.Lock()
        self.steps = 0
        self._loading = self._exposed = 0.0

    def record(self, track: str, stage: str, begin: float, end: float, batch: int) -> None:
        """A stage that has run: `begin` and `end` as of `time.perf_counter`."""
        with self._lock:
            self._sums[track, stage] += end - begin
            if track != "loader":
                self._begin, self._end = min(self._begin, begin), max(self._end, end)
            if self._path is not None:
                self._events.append((track, stage, begin, end, batch))

    @contextmanager
    def stage(self, track: str, stage: str, batch: int) -> Iterator[None]:
        """Record what runs inside."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.record(track, stage, begin, time.perf_counter(), batch)

    def waited(self, loading: float, exposed: float) -> None:
        """The device had nothing to do: seconds by the loader, and by the tables."""
        with self._lock:
            self._loading, self._exposed = self._loading + loading, self._exposed + exposed

    def summary(self, updates: str) -> Summary:
        """What has been recorded so far."""
        with self._lock:
            sums = dict(self._sums)
            wall = max(self._end - self._begin, 0.0)
        on = {track: {stage: s for (t, stage), s in sums.items() if t == track} for track in _TRACKS}
        cpu, device = sum(on["tables"].values()), sum(on["device"].values())
        stages = on["loader"] | on["tables"]
        return Summary(self.steps, wall, stages, cpu, device, self._loading, self._exposed, updates)

    def write(self) -> None:
        """Write the trace: the Trace Event Format of Chrome's tracing, which Perfetto reads too.

        A file that cannot be written is a warning: the training that the trace is of has been done.
        """
        if self._path is None:
            return
        try:
            self._path.write_text(self._trace(), encoding="utf-8")
        except OSError as error:
            warnings.warn(f"profile: could not write {str(self._path)!r}: {error}", RuntimeWarning, stacklevel=2)

    def _trace(self) -> str:
        names = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": track}}
            for tid, track in enumerate(_TRACKS)
        ]
        spans = [
            {
                "ph": "X",
                "name": stage,
                "cat": "device" if track == "device" else "cpu",
                "pid": 0,
                "tid": _TRACKS.index(track),
                "ts": 1e6 * begin,
                "dur": 1e6 * (end - begin),
                "args": {"batch": batch},
            }
            for track, stage, begin, end, batch in self._events
        ]
        return json.dumps({"traceEvents": names + spans, "displayTimeUnit": "ms"})


def trace_path(profile: object) -> Path | None:
    """Where a trace is to be written, if any.

    Raises:
        TypeError: No path.
        ValueError: No file can be written there.
    """
    if profile is None:
        return None
    if not isinstance(profile, str | os.PathLike):
        raise TypeError(f"profile: expected a path or None, got {type(profile).__name__}")
    path = Path(profile)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"profile: expected a file that can be written, in a directory that is there, got {profile!r}")
    return path
