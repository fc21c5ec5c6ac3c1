"""Host memory that is used over and over: written by the engine, read by a copy or by the user, and written again.

A slot is free again when nothing looks at its memory any more: no tensor made of it, and no copy that has begun. So a
tensor from a ring may be kept for as long as one likes, and after a few steps nothing is allocated any more. A free
slot that has not been wanted for some steps gives its memory back, and with a ring go all that nothing looks at.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["SMALL", "Bytes", "Ring", "RingPerThread", "huge_pages", "pinned"]

Bytes = NDArray[np.uint8]

_HUGE_PAGE = 2 << 20

# A free slot goes when it has not been wanted in so many takes: more than some steps have, whatever their collections.
_UNWANTED = 1000

# Bytes of a tensor up to which the C library may keep its memory for the next one (glibc's largest M_MMAP_THRESHOLD),
# and above which it is too much to be kept here.
SMALL, _LARGE = 32 << 20, 256 << 20


class Ring:
    """Slots of host memory.

    Args:
        allocate: Gives so many bytes.
        unwanted: In how many takes a free slot is not wanted that gives its memory back.

    Example:
        >>> ring = Ring(huge_pages)
        >>> first = ring.take((2, 3), torch.float32)
        >>> address = first.data_ptr()
        >>> ring.take((2, 3), torch.float32).data_ptr() == address  # `first` is still there
        False
        >>> del first
        >>> ring.take((1, 3), torch.bfloat16).data_ptr() == address
        True
    """

    def __init__(self, allocate: Callable[[int], Bytes], unwanted: int = _UNWANTED) -> None:
        self._allocate, self._unwanted = allocate, unwanted
        self._slots: list[_Slot] = []
        self._takes = 0
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of a free slot, or of a new one; what it holds is not defined."""
        size = prod(shape) * dtype.itemsize
        with self._lock:
            free = [slot for slot in self._slots if slot.is_free()]
            fitting = [slot for slot in free if len(slot.memory) >= size]
            # The smallest: a larger one may then be unwanted.
            slot = min(fitting, key=lambda slot: len(slot.memory), default=None)
            if slot is None:
                # Batches have grown, or more tensors are kept: a free slot that is too small makes place.
                if free:
                    self._slots.remove(free[0])
                slot = _Slot(self._allocate(max(size, 1)))
                self._slots.append(slot)
            slot.taken_at = self._takes
            self._age()
            return _tensor(slot.view(size), shape, dtype)

    def _age(self) -> None:
        """Count a take, and give back what has not been wanted for long."""
        self._takes += 1
        self._slots = [
            slot for slot in self._slots if self._takes - slot.taken_at <= self._unwanted or not slot.is_free()
        ]

    def keep(self, tensor: Tensor, is_busy: Callable[[], bool]) -> None:
        """Do not give the slot of a tensor out again while a copy is reading or writing it.

        Args:
            tensor: From `take`.
            is_busy: Whether the copy still runs.
        """
        with self._lock:
            for slot in self._slots:
                if slot.address == tensor.data_ptr():
                    slot.is_busy = is_busy

    def __len__(self) -> int:
        return len(self._slots)


class RingPerThread(Ring, threading.local):
    """A ring of its own for every thread, which goes with the thread; of large tensors, but not of the largest.

    The C library gives such memory back to the system as soon as it is free, and the next output would wait for
    thousands of pages to be cleared, for longer than a lookup takes.
    """

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As of `Ring`, or a tensor with memory of its own."""
        size = prod(shape) * dtype.itemsize
        if SMALL < size <= _LARGE:
            return super().take(shape, dtype)
        with self._lock:
            self._age()
        if size > _LARGE:
            return _tensor(self._allocate(size), shape, dtype)
        return torch.empty(shape, dtype=dtype, device="cpu")  # whatever default device the user has set


class _Slot:
    def __init__(self, memory: Bytes) -> None:
        self.memory = memory
        self.taken_at = 0
        self.address: int = memory.ctypes.data
        self.is_busy: Callable[[], bool] = _never
        self._view: weakref.ref[Bytes] | None = None

    def is_free(self) -> bool:
        return (self._view is None or self._view() is None) and not self.is_busy()

    def view(self, size: int) -> Bytes:
        view = self.memory[:size]  # torch keeps this very array for as long as any tensor of it lives
        self._view = weakref.ref(view)
        self.is_busy = _never
        return view


def _tensor(memory: Bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # `data`, which is no view for autograd: that refuses to have a view that a Function gives changed in place.
    return torch.from_numpy(memory).view(dtype).view(shape).data


def _never() -> bool:
    return False


def huge_pages(size: int) -> Bytes:
    """Memory on 2 MB pages where the system has them: rows of an output lie far apart, each on another small page."""
    # Private: by default a process that is forked writes to the same memory, and no page of it is a large one.
    try:
        mapped = mmap.mmap(-1, size + 2 * _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"expected {size:,} bytes of memory for an output, the system has none: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    memory: Bytes = np.frombuffer(mapped, np.uint8)
    start = -memory.ctypes.data % _HUGE_PAGE
    return memory[start : start + size]


def pinned(size: int) -> Bytes:
    """Page-locked memory, from and to which a GPU copies on its own."""
    memory: NDArray[Any] = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True).numpy()
    return memory
