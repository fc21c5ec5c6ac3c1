"""A device that is not there: it takes as long as it is told, and the arithmetic is the CPU's.

For tests and benches of what overlaps with a GPU, on machines that have none. The calling thread computes at once and
goes on, as one that queues kernels does. The clock of the device runs on its own: a step begins when its rows are there
and the step before has ended, and ends after `latency`; its gradient then takes its time to the host. Whoever waits for
it sleeps, and the CPU is free. What the arithmetic takes of the calling thread is a cost, as queuing kernels is one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlrm_rs.arguments import check_number
from dlrm_rs.devices.device import Device, Fetched, Mark, Moment, Sent, Span
from dlrm_rs.devices.ring import Ring, huge_pages

__all__ = ["StandIn"]


class StandIn(Device):
    """A device of known speed.

    Args:
        latency: Seconds from having a step's rows to having their gradient.
        bandwidth: Bytes per second of copies, each way; infinite by default.
        rest: Seconds of a step that delay no gradient of rows: bottom layers, weights of the top ones, dense optimizer.
        copies: Whether data moves, which threads of the CPU then do. Without, a copy only takes its time, as that of a
            GPU, and the host has no work by it at all.

    Attributes:
        busy: Seconds that it has worked.

    Raises:
        ValueError: Seconds that are negative, NaN or infinite, or a bandwidth that is not above 0.
        TypeError: One that is not a number.

    Example:
        >>> import dlrm_rs
        >>> from dlrm_rs.devices import StandIn
        >>> table = dlrm_rs.EmbeddingBagConfig("t", 10, 4, ["a"])
        >>> collection = dlrm_rs.EmbeddingBagCollection([table], output_device=StandIn(latency=0.01))
        >>> clock = time.perf_counter()
        >>> pooled = collection.lookup(torch.tensor([1, 2]), torch.tensor([0, 2]))
        >>> pooled.sum().backward()
        >>> time.perf_counter() - clock > 0.01
        True
    """

    torch_device = torch.device("cpu")

    def __init__(self, latency: float, bandwidth: float = float("inf"), rest: float = 0.0, copies: bool = True) -> None:
        self._latency, self._rest = check_number("latency", latency), check_number("rest", rest)
        self._bandwidth = check_number("bandwidth", bandwidth, is_positive=True, can_be_infinite=True)
        self._copies = copies
        self.outputs = Ring(huge_pages)
        self._memory, self._gradients = Ring(huge_pages), Ring(huge_pages)
        self._there, self._back = (ThreadPoolExecutor(1, f"stand-in-{way}") for way in ("there", "back"))
        self._free_at = 0.0
        self.busy = 0.0

    def send(self, rows: Tensor) -> Sent:
        """Copy in a thread of its own."""
        rows, begin = rows.detach(), time.perf_counter()
        if not self._copies:  # the rows are in use for as long as they are there
            return _Sending(self, partial(self._arrival, rows, begin))
        copied = self._there.submit(self._copy, rows, self._memory, begin)
        is_done = threading.Event()  # not of `copied`, which holds the copy
        copied.add_done_callback(lambda _: is_done.set())
        self.outputs.keep(rows, lambda: not is_done.is_set())
        return _Sending(self, copied.result)

    def fetch(self, grad: Tensor, dtype: torch.dtype, sent: Sent) -> Fetched:
        """Copy in another, when the clock says that the gradient is there."""
        assert isinstance(sent, _Sending)
        end = max(sent.begin + self._latency, time.perf_counter())
        self._free_at = end + self._rest
        self.busy += self._free_at - sent.begin
        grad = grad.detach().to(dtype)
        if not self._copies:
            return _Fetching(partial(self._arrival, grad, end), (sent.begin, end))
        return _Fetching(self._back.submit(self._copy, grad, self._gradients, end).result, (sent.begin, end))

    def mark(self) -> Mark:
        """When the clock says that the last step ends."""
        return Moment(max(self._free_at, time.perf_counter()))

    def synchronize(self) -> None:
        """Sleep until the clock says that the last step has ended."""
        _sleep_until(self._free_at)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another stand-in of the same speed."""
        return StandIn, (self._latency, self._bandwidth, self._rest, self._copies)

    def begin(self, copied: float) -> float:
        """When a step begins whose rows are there at `copied`."""
        return max(copied, self._free_at, time.perf_counter())

    def _copy(self, source: Tensor, ring: Ring, begin: float) -> _Copied:
        _sleep_until(begin)
        copy = ring.take(tuple(source.shape), source.dtype).copy_(source)
        _, arrival = self._arrival(source, begin)
        _sleep_until(arrival)
        return copy, time.perf_counter()

    def _arrival(self, source: Tensor, begin: float) -> _Copied:
        """When a copy that begins at `begin` is there, of a tensor that stays where it is."""
        return source, begin + source.nbytes / self._bandwidth


# A tensor, and when it is there.
_Copied = tuple[Tensor, float]


class _Sending:
    def __init__(self, device: StandIn, copied: Callable[[], _Copied]) -> None:
        self._device, self._copied = device, copied
        self.begin = 0.0

    def tensor(self) -> Tensor:
        rows, arrival = self._copied()
        self.begin = self._device.begin(arrival)
        return rows


class _Fetching:
    def __init__(self, copied: Callable[[], _Copied], span: Span) -> None:
        self._copied, self._span = copied, span

    def wait(self) -> Tensor:
        grad, arrival = self._copied()
        _sleep_until(arrival)
        return grad

    def span(self) -> Span:
        return self._span


def _sleep_until(moment: float) -> None:
    remaining = moment - time.perf_counter()
    if remaining > 0:
        time.sleep(remaining)
