"""The time of a GPU's events by the host's clock, with events that tell it in a float32 as CUDA's do."""

import numpy as np
import pytest

from dlrm_rs.devices import clock
from dlrm_rs.devices.clock import EventClock, Zero


class Gpu:
    """A GPU and the host, whose clocks differ by 20 ppm."""

    def __init__(self) -> None:
        self.now = 100.0  # of the host
        self.is_idle = True
        self.asked = 0

    def perf_counter(self) -> float:
        self.now += 1e-7
        return self.now

    def record(self) -> "Event":
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.milliseconds = gpu.now * (1 + 20e-6) * 1e3

    def elapsed_time(self, other: "Event") -> float:
        return float(np.float32(other.milliseconds - self.milliseconds))

    def query(self) -> bool:
        self._gpu.asked += 1
        return self._gpu.is_idle


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(clock, "perf_counter", gpu.perf_counter)
    return gpu


def test_microseconds_are_kept_for_days(gpu: Gpu) -> None:
    events = EventClock(gpu.record, Zero(gpu.record(), gpu.now))
    gpu.now += 3 * 86_400
    for _ in range(100):
        gpu.now += 0.0301
        zero = events.zero()
        gpu.now += 0.02  # what was queued before takes its time
        assert zero.time(gpu.record()) == pytest.approx(gpu.now, rel=0, abs=25e-6)  # 20 ppm of a second, and a bit


def test_a_busy_gpu_is_not_waited_for(gpu: Gpu) -> None:
    first = Zero(gpu.record(), gpu.now)
    events = EventClock(gpu.record, first)
    gpu.is_idle = False
    gpu.now += 10
    begin = gpu.now
    assert events.zero() is first
    assert gpu.now - begin < 2e-4
    asked = gpu.asked
    assert events.zero() is first  # and not asked again at once
    assert gpu.asked == asked
    gpu.is_idle = True
    gpu.now += 2
    assert events.zero().at == pytest.approx(gpu.now, abs=1e-5)
