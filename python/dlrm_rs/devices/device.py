"""Where dense layers run: how pooled rows get there, and gradients back, without waiting.

A device's work is a queue: what the calling thread has started on it runs in that order, later. Copies run beside the
queue. `send` and `fetch` start a copy and return; the queue waits for what it needs, and the host only where it reads.
"""

from __future__ import annotations

import abc
import time
from typing import Any, Protocol

import torch
from torch import Tensor

from dlrm_rs.devices.clock import EventClock, Zero
from dlrm_rs.devices.ring import Ring, RingPerThread, huge_pages, pinned

__all__ = ["CPU", "CpuDevice", "CudaDevice", "Device", "Fetched", "Mark", "Moment", "Sent", "Span", "output_device"]

# Begin and end in seconds, as of `time.perf_counter`.
Span = tuple[float, float]


class Sent(Protocol):
    """Pooled rows on their way to the device."""

    def tensor(self) -> Tensor:
        """The rows on the device, for the work that the calling thread queues from here on."""


class Fetched(Protocol):
    """A gradient on its way to the host."""

    def wait(self) -> Tensor:
        """The gradient on the host, contiguous, once it is there."""

    def span(self) -> Span:
        """When the device worked, from having the rows to having their gradient; asked after `wait`."""


class Mark(Protocol):
    """A place in the device's queue."""

    def time(self) -> float:
        """When all before it had been done, as of `time.perf_counter`; waits for it."""


class Device(abc.ABC):
    """A device with copies to and from it.

    Attributes:
        torch_device: As torch has it.
        outputs: Where lookups write.
    """

    torch_device: torch.device
    outputs: Ring

    @abc.abstractmethod
    def send(self, rows: Tensor) -> Sent:
        """Start the copy of `rows`, from `outputs`, to the device."""

    @abc.abstractmethod
    def fetch(self, grad: Tensor, dtype: torch.dtype, sent: Sent) -> Fetched:
        """Start the copy of a gradient, which the device may still be computing, to the host.

        Args:
            grad: On the device.
            dtype: To which the device converts it first.
            sent: The rows that it is the gradient of.
        """

    @abc.abstractmethod
    def mark(self) -> Mark:
        """The end of what is queued now."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait for all that is queued."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a module gets memory and streams of its own."""
        return output_device, (str(self.torch_device),)


class CpuDevice(Device):
    """The CPU itself: nothing is copied.

    All collections share it. So every thread that looks tables up has a ring of its own, as that of a pipeline's loop,
    which goes when the loop ends. A large output is written where one was before that nobody looks at any more.
    """

    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self.outputs = RingPerThread(huge_pages)

    def send(self, rows: Tensor) -> Sent:
        """The rows are there already."""
        return _Here(rows)

    def fetch(self, grad: Tensor, dtype: torch.dtype, sent: Sent) -> Fetched:
        """The gradient is there already."""
        assert isinstance(sent, _Here)
        return _There(grad.detach().to(dtype).contiguous(), (sent.taken, time.perf_counter()))

    def mark(self) -> Mark:
        """Now."""
        return Moment(time.perf_counter())

    def synchronize(self) -> None:
        """Nothing is queued."""


class Moment:
    """A mark whose time is known.

    Args:
        time: As of `time.perf_counter`.
    """

    def __init__(self, time: float) -> None:
        self._time = time

    def time(self) -> float:
        """As given."""
        return self._time


# What collections share that keep their output where it is.
CPU = CpuDevice()


class _Here:
    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self.taken = 0.0

    def tensor(self) -> Tensor:
        self.taken = time.perf_counter()
        return self._rows


class _There:
    def __init__(self, grad: Tensor, span: Span) -> None:
        self._grad, self._span = grad, span

    def wait(self) -> Tensor:
        return self._grad

    def span(self) -> Span:
        return self._span


class CudaDevice(Device):
    """A GPU: page-locked memory, and a stream beside the current one for each direction.

    Args:
        device: As torch has it.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.torch_device = torch.device("cuda", index)
        self.outputs = Ring(pinned)
        self._gradients = Ring(pinned)
        self._there = torch.cuda.Stream(self.torch_device)
        self._back = torch.cuda.Stream(self.torch_device)
        idle = torch.cuda.Stream(self.torch_device)

        def record() -> torch.cuda.Event:
            event = torch.cuda.Event(enable_timing=True)
            event.record(idle)
            return event

        torch.cuda.synchronize(self.torch_device)
        first = record()
        first.synchronize()
        self._clock = EventClock(record, Zero(first, time.perf_counter()))

    def send(self, rows: Tensor) -> Sent:
        """Copy on the stream that leads there."""
        with torch.cuda.stream(self._there):
            # Memory of this stream: nothing that the current stream still has queued can use it.
            on_device = rows.to(self.torch_device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._there)
        self.outputs.keep(rows, lambda: not copied.query())
        return _OnStream(self, on_device, copied)

    def fetch(self, grad: Tensor, dtype: torch.dtype, sent: Sent) -> Fetched:
        """Copy on the stream that leads back."""
        assert isinstance(sent, _OnStream)
        converted = grad.detach().to(dtype).contiguous()
        computed = torch.cuda.Event(enable_timing=True)
        computed.record(torch.cuda.current_stream(self.torch_device))
        host = self._gradients.take(tuple(converted.shape), dtype)
        # `blocking`: the thread that waits sleeps.
        copied = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._back):
            self._back.wait_event(computed)
            host.copy_(converted, non_blocking=True)
            copied.record(self._back)
        converted.record_stream(self._back)
        self._gradients.keep(host, lambda: not copied.query())
        return _Copied(host, copied, sent.begun, _Marked(sent.begun.zero, computed))

    def mark(self) -> _Marked:
        """The end of what the current stream has."""
        zero = self._clock.zero()
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(torch.cuda.current_stream(self.torch_device))
        return _Marked(zero, event)

    def synchronize(self) -> None:
        """Wait for the current stream."""
        torch.cuda.current_stream(self.torch_device).synchronize()


class _Marked:
    def __init__(self, zero: Zero, event: torch.cuda.Event) -> None:
        self.zero, self._event = zero, event

    def time(self) -> float:
        self._event.synchronize()
        return self.zero.time(self._event)


class _OnStream:
    begun: _Marked

    def __init__(self, device: CudaDevice, rows: Tensor, copied: torch.cuda.Event) -> None:
        self._device, self._rows, self._copied = device, rows, copied

    def tensor(self) -> Tensor:
        current = torch.cuda.current_stream(self._device.torch_device)
        current.wait_event(self._copied)
        self._rows.record_stream(current)
        self.begun = self._device.mark()
        return self._rows


class _Copied:
    def __init__(self, host: Tensor, copied: torch.cuda.Event, begun: _Marked, computed: _Marked) -> None:
        self._host, self._copied, self._begun, self._computed = host, copied, begun, computed

    def wait(self) -> Tensor:
        self._copied.synchronize()
        return self._host

    def span(self) -> Span:
        return self._begun.time(), self._computed.time()


def output_device(device: Device | torch.device | str | int | None) -> Device:
    """The device that the user means.

    Raises:
        ValueError: One that pooled rows cannot be sent to.
        RuntimeError: A GPU, where there is none.
    """
    if isinstance(device, Device):
        return device
    try:
        wanted = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"output_device: expected 'cpu' or 'cuda', got {device!r}") from error
    if wanted.type == "cpu":
        return CPU
    if wanted.type != "cuda":
        raise ValueError(f"output_device: expected 'cpu' or 'cuda', got {str(device)!r}")
    if not torch.cuda.is_available():
        raise RuntimeError(f"output_device: expected a device of this machine, got {str(device)!r}, and no GPU")
    if (wanted.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(
            f"output_device: expected a device of this machine, which has {torch.cuda.device_count()}, got "
            f"{str(device)!r}"
        )
    return CudaDevice(wanted)
