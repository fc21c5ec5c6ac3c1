"""How much of two batches is parted, found by trial.

Parting lets the tables work while the device does, but is work itself: what is updated and looked up together costs
less than in two parts. With a device slower than the CPU it pays to part all that can be; with a fast one, nothing. In
every way losses and tables have the same bits, so the ways are tried in turn and the fastest one is kept for a while.
"""

from __future__ import annotations

import enum
import statistics

__all__ = ["Parting", "Trials"]

# Steps of a trial; how many of its first ones do not count, as what they begin with is the way before's; and steps from
# the end of the trials to the next ones: trials of two ways that take twice as long cost 2 % of them.
_TRIAL, _UNCOUNTED, _KEPT = 8, 3, 800


class Parting(enum.Enum):
    """What is parted of a batch and the next."""

    ROWS_AND_BAGS = enum.auto()
    """Of the first its rows, of the next its bags: most can be done while the device works."""
    ROWS = enum.auto()
    """Rows alone: the next is looked up whole, when the rows that both touch have been updated."""
    NOTHING = enum.auto()
    """The next is looked up when the first has been updated: what a plain loop does."""


class Trials:
    """The way of every step.

    Example:
        >>> trials = Trials()
        >>> time, seconds = 0.0, {Parting.ROWS_AND_BAGS: 3.0, Parting.ROWS: 1.0, Parting.NOTHING: 2.0}
        >>> for _ in range(100):
        ...     time += seconds[trials.choose()]
        ...     trials.record(time)
        >>> trials.choose()
        <Parting.ROWS: 2>
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._seconds: list[float] = []  # of the trial that runs
        self._medians: list[float] = []  # of those that have run
        self._fastest = Parting.ROWS_AND_BAGS
        self._kept = 0  # steps that it is still kept for

    def choose(self) -> Parting:
        """The way of the next step."""
        if self._kept:
            return self._fastest
        return list(Parting)[len(self._medians)]

    def record(self, time: float) -> None:
        """A step has been looked up.

        Args:
            time: When, in seconds.
        """
        last, self._last = self._last, time
        if last is None:
            return
        if self._kept:
            self._kept -= 1
            return
        self._seconds.append(time - last)
        if len(self._seconds) == _TRIAL:
            self._medians.append(statistics.median(self._seconds[_UNCOUNTED:]))
            self._seconds.clear()
        if len(self._medians) == len(Parting):
            self._fastest = min(zip(self._medians, Parting, strict=True), key=lambda way: way[0])[1]
            self._medians.clear()
            self._kept = _KEPT
