"""Calls timed in turn, so that whatever else the machine does hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter, process_time
from typing import TypeVar

import numpy as np

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

# Calls of a turn. Not one: after a call that ran on OpenMP's threads these spin for a while and take the cores of
# whoever comes next, so a turn begins with a call that is not timed, and is long enough to be past that.
TURN = 8
# A turn of slow calls is shorter, so that a case does not take many times its seconds.
SHORTEST_TURN = 3


@dataclass(frozen=True)
class Times:
    """What calls took.

    Attributes:
        median: Seconds.
        low: The 10th percentile.
        high: The 90th percentile.
        p99: The 99th.
        calls: How many were timed.
        cpus: CPU time by time: about how many cores were busy.
    """

    median: float
    low: float
    high: float
    p99: float
    calls: int
    cpus: float

    @classmethod
    def of(cls, seconds: Sequence[float], cpu_seconds: float) -> Times:
        """Sum up the times of calls, and the CPU time of all of them.

        Example:
            >>> Times.of([1.0, 3.0, 2.0], cpu_seconds=12.0)
            Times(median=2.0, low=1.2, high=2.8, p99=2.98, calls=3, cpus=2.0)
        """
        median, low, high, p99 = np.percentile(np.array(seconds), [50, 10, 90, 99]).round(12).tolist()
        return cls(median, low, high, p99, len(seconds), cpu_seconds / sum(seconds))


def time_in_turn(sides: Mapping[Name, Sequence[Call]], seconds: float) -> dict[Name, Times]:
    """Time sides, in turns of some calls each, until they have taken `seconds` together and each has had a turn.

    There is one rotation of batches for all of them: whoever comes next goes on where the one before has stopped. So no
    side finds in a cache what another, with the same tables, has just looked up: a batch comes again after all others.

    Args:
        sides: For each its calls, one for every batch; as many for all.
        seconds: When to stop.

    Example:
        >>> sorted(time_in_turn({"a": [lambda: 1] * 8, "b": [lambda: 2] * 8}, seconds=0.001))
        ['a', 'b']
    """
    names = list(sides)
    batches = cycle(range(len(sides[names[0]])))
    timed: dict[Name, list[float]] = {name: [] for name in names}
    cpu = dict.fromkeys(names, 0.0)
    start, turn = perf_counter(), 0
    while turn == 0 or perf_counter() - start < seconds:
        # Another begins every time.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            cpu[name] += _take_turn(sides[name], batches, seconds / len(names), timed[name])
        turn += 1
    return {name: Times.of(timed[name], cpu[name]) for name in names}


def _take_turn(calls: Sequence[Call], batches: Iterator[int], seconds: float, timed: list[float]) -> float:
    """Append the times of calls to `timed`, few when they take longer than `seconds`; returns their CPU time."""
    calls[next(batches)]()
    cpu, end = process_time(), perf_counter() + seconds
    for k in range(1, TURN + 1):
        call = calls[next(batches)]
        start = perf_counter()
        output = call()
        timed.append(perf_counter() - start)
        del output  # what freeing it takes is no part of the call
        if k >= SHORTEST_TURN and perf_counter() > end:
            break
    return process_time() - cpu
