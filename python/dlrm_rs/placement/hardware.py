"""What a machine can do in a second, as far as a training step needs it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from dlrm_rs.arguments import check_number
from dlrm_rs.collection import EmbeddingBagCollection
from dlrm_rs.table_configs import EmbeddingBagConfig

__all__ = ["Hardware"]

# Large enough to leave caches, small enough to take a second.
_MEASURED_ROWS, _MEASURED_DIM, _MEASURED_IDS = 1 << 20, 64, 1 << 17
_COPIED_BYTES = 64 << 20
_MATRIX = 4096
_REPEATS = 5


@dataclass(frozen=True)
class Hardware:
    """Speeds, measured or as given.

    Args:
        host_bandwidth: Bytes per second of random rows that the engine reads from the memory of the host.
        pcie_bandwidth: Bytes per second between host and GPU, one way; the ways do not disturb each other.
        gpu_bandwidth: Bytes per second of the GPU's memory.
        gpu_flops: Floating-point operations per second of the dense layers.
        measured: The names of those that were measured; the others are assumptions.

    Raises:
        ValueError: A speed that is not above 0.
        TypeError: One that is not a number.
    """

    host_bandwidth: float = 10e9
    pcie_bandwidth: float = 25e9
    gpu_bandwidth: float = 1.5e12
    gpu_flops: float = 50e12
    measured: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("host_bandwidth", "pcie_bandwidth", "gpu_bandwidth", "gpu_flops"):
            check_number(name, getattr(self, name), is_positive=True, can_be_infinite=True)

    @classmethod
    def measure(cls) -> Hardware:
        """Measure this machine, which takes seconds: the host always, the GPU if there is one.

        Example:
            >>> hardware = Hardware.measure()
            >>> "host_bandwidth" in hardware.measured, hardware.host_bandwidth > 1e6
            (True, True)
        """
        hardware = replace(cls(), host_bandwidth=_host_bandwidth(), measured=("host_bandwidth",))
        if not torch.cuda.is_available():
            return hardware
        names = ("host_bandwidth", "pcie_bandwidth", "gpu_bandwidth", "gpu_flops")
        host = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        there = torch.empty_like(host, device="cuda")
        matrix = torch.randn(_MATRIX, _MATRIX, device="cuda")
        return replace(
            hardware,
            pcie_bandwidth=_COPIED_BYTES / _on_gpu(lambda: there.copy_(host, non_blocking=True)),
            gpu_bandwidth=2 * _COPIED_BYTES / _on_gpu(lambda: there.clone()),
            gpu_flops=2 * _MATRIX**3 / _on_gpu(lambda: matrix @ matrix),
            measured=names,
        )


def _host_bandwidth() -> float:
    table = EmbeddingBagConfig("t", _MEASURED_ROWS, _MEASURED_DIM, ["t"], init_fn=lambda rows: rows.fill_(1.0))
    collection = EmbeddingBagCollection([table])
    offsets = torch.arange(_MEASURED_IDS + 1, device="cpu")
    seconds = []
    generator = torch.Generator("cpu").manual_seed(0)
    for _ in range(_REPEATS):
        ids = torch.randint(_MEASURED_ROWS, (_MEASURED_IDS,), generator=generator, device="cpu")
        with torch.no_grad():
            begin = time.perf_counter()
            collection.lookup(ids, offsets)
            seconds.append(time.perf_counter() - begin)
    return _MEASURED_IDS * _MEASURED_DIM * 4 / min(seconds)


def _on_gpu(work: Callable[[], object]) -> float:
    """Seconds, by the GPU's own clock."""
    work()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(_REPEATS):
        work()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3 / _REPEATS
