"""When the events of a GPU happened, by the clock of the host.

Of two events a GPU tells the milliseconds between them, as a float32: after some hours that is good for milliseconds
alone, and meanwhile the clocks of GPU and host have drifted apart. So events are timed against a zero of the last
second: an event on a stream that has no work, and the host's time when it happened.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple, Protocol

__all__ = ["Event", "EventClock", "Zero"]

# A zero is replaced after so many seconds.
_LIFETIME = 1.0
# How long a new one may take, in seconds. One behind the work of other streams, as happens to those that share a queue
# of the hardware, would keep the thread, and tell nothing.
_PATIENCE = 1e-4


class Event(Protocol):
    """As `torch.cuda.Event`."""

    def elapsed_time(self, other: Any, /) -> float:
        """Milliseconds from this one to the other, in the precision of a float32."""

    def query(self) -> bool:
        """Whether it has happened."""


class Zero(NamedTuple):
    """An event, and when it happened, as of `time.perf_counter`."""

    event: Event
    at: float

    def time(self, event: Event) -> float:
        """When another event of the same GPU happened, which has."""
        return self.at + self.event.elapsed_time(event) / 1e3


class EventClock:
    """Gives zeros.

    Args:
        record: Puts an event on a stream that has no work.
        zero: The first.
    """

    def __init__(self, record: Callable[[], Event], zero: Zero) -> None:
        self._record = record
        self._zero = zero
        self._next = zero.at + _LIFETIME

    def zero(self) -> Zero:
        """The zero for an event that is recorded now."""
        begin = perf_counter()
        if begin < self._next:
            return self._zero
        self._next = begin + _LIFETIME
        event = self._record()
        while not event.query():
            if perf_counter() > begin + _PATIENCE:
                return self._zero  # the one before is still good
        self._zero = Zero(event, (begin + perf_counter()) / 2)
        return self._zero
