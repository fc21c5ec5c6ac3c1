"""Host memory that is used over and over: written by the engine, read by a copy or by the user, and written again.

A slot is free again when nothing looks at its memory any more: no tensor made of it, and no copy that has begun. So a
tensor from a ring may be kept for as long as one likes, and after a few steps nothing is allocated any more. A free
slot that has not been wanted for some steps gives its memory back, and with a ring go all that nothing looks at.

There is no lock: a tensor may die in any thread, in the midst of a take too, where a signal is handled or garbage
collected. Slots go from list to list by operations that Python does at once, and what runs when a tensor dies is no
Python code, in which a Ctrl-C could be raised and lost.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["LARGE", "Bytes", "Ring", "RingPerThread", "huge_pages", "pinned"]

Bytes = NDArray[np.uint8]

_HUGE_PAGE = 2 << 20

# A free slot goes when it has not been wanted in so many takes: more than some steps have, whatever their collections.
_UNWANTED = 1000

# Bytes of a tensor from which on the C library's memory is not as good (`benches/record/2026-11-30-outputs.md`), and
# those of all tensors of a thread above which they have it all the same: whoever keeps so much collects them.
LARGE, _MOST = 2 << 20, 1 << 30


class Ring:
    """Slots of host memory.

    Args:
        allocate: Gives so many bytes.

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

    def __init__(self, allocate: Callable[[int], Bytes]) -> None:
        self._allocate = allocate
        self._free: list[_Slot] = []
        # What tensors look at, by its identity, and what of it they have ceased to since the last take.
        self._taken: dict[int, _View] = {}
        self._dead: list[_View] = []
        self._takes = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of a free slot, or of a new one; what it holds is not defined."""
        size = prod(shape) * dtype.itemsize
        self._collect()
        slot = self._claim(size) or _Slot(self._allocate(max(size, 1)))
        slot.taken_at = self._takes
        view = slot.memory[:size]  # torch keeps this very array for as long as any tensor of it lives
        watched = _watched(view, self._dead.append, slot)
        self._taken[id(watched)] = watched
        self._age()
        return _tensor(view, shape, dtype)

    def _collect(self) -> None:
        """Count as free what nothing looks at any more."""
        for dead in list(self._dead):
            if self._taken.pop(id(dead), None) is not None:  # no other thread was here first
                self._free.append(dead.slot)
            with suppress(ValueError):
                self._dead.remove(dead)

    def _claim(self, size: int) -> _Slot | None:
        """A free slot of so many bytes, which is no longer among the free ones."""
        while free := [slot for slot in reversed(self._free) if not slot.is_busy()]:
            # The smallest, and of those that are as small the last that was in use: others may then be unwanted.
            slot = min((slot for slot in free if len(slot.memory) >= size), key=_size, default=None)
            # Where none does, batches have grown: one that is too small makes place.
            if self._remove(slot or free[-1]):
                return slot
        return None

    def _age(self) -> None:
        """Count a take, and give back what has not been wanted for long."""
        self._takes += 1
        for slot in [slot for slot in self._free if self._takes - slot.taken_at > _UNWANTED]:
            self._remove(slot)

    def _remove(self, slot: _Slot) -> bool:
        """Take a slot from the free ones, if it is still there and at rest: there are other threads."""
        try:
            self._free.remove(slot)
        except ValueError:
            return False
        if slot.is_busy():
            self._free.append(slot)
            return False
        return True

    def keep(self, tensor: Tensor, is_busy: Callable[[], bool]) -> None:
        """Do not give the slot of a tensor out again while a copy is reading or writing it.

        Args:
            tensor: From `take`.
            is_busy: Whether the copy still runs.
        """
        for view in list(self._taken.values()):
            if view.slot.address == tensor.data_ptr():
                view.slot.is_busy = is_busy

    def __len__(self) -> int:
        self._collect()
        return len(self._free) + len(self._taken)


class RingPerThread(Ring, threading.local):
    """A ring of its own for every thread, which goes with the thread; of large tensors, but not of too many.

    The C library may give such memory back to the system as soon as it is free, and the next output would wait for
    thousands of pages to be cleared, for longer than a lookup takes; what it does not give back lies on pages that are
    far apart.
    """

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As of `Ring`, or a tensor with memory of its own."""
        size = prod(shape) * dtype.itemsize
        if size > _MOST:
            return _tensor(self._allocate(size), shape, dtype)
        self._collect()
        if size >= LARGE and size + sum(len(view.slot.memory) for view in list(self._taken.values())) <= _MOST:
            return super().take(shape, dtype)
        self._age()
        return torch.empty(shape, dtype=dtype, device="cpu")  # whatever default device the user has set


class _Slot:
    def __init__(self, memory: Bytes) -> None:
        self.memory = memory
        self.taken_at = 0
        self.address: int = memory.ctypes.data
        self.is_busy: Callable[[], bool] = _never


class _View(weakref.ref[Bytes]):
    """What the tensors of a slot look at."""

    slot: _Slot


def _watched(view: Bytes, when_dead: Callable[[_View], None], slot: _Slot) -> _View:
    """Have `when_dead` called when the tensors of a slot have died."""
    made = _View(view, when_dead)
    made.slot = slot
    return made


def _size(slot: _Slot) -> int:
    return len(slot.memory)


def _tensor(memory: Bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # Set, as a view is what autograd lets nobody change in place that a Function has given.
    storage = torch.from_numpy(memory).untyped_storage()
    made: Tensor = torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape)  # type: ignore[call-overload]
    return made


def _never() -> bool:
    return False


def huge_pages(size: int) -> Bytes:
    """Memory on 2 MB pages where the system has them: rows of an output lie far apart, each on another small page."""
    # Private: by default a process that is forked writes to the same memory, and no page of it is a large one.
    try:
        mapped = mmap.mmap(-1, size + 2 * _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"expected {size:,} bytes of memory for an output, the system has none: {error}") from error
    memory: Bytes = np.frombuffer(mapped, np.uint8)
    start = -memory.ctypes.data % _HUGE_PAGE
    whole = size // _HUGE_PAGE * _HUGE_PAGE  # the rest takes no more than it needs
    if whole and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel that has none
            mapped.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return memory[start : start + size]


def pinned(size: int) -> Bytes:
    """Page-locked memory, from and to which a GPU copies on its own."""
    memory: NDArray[Any] = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True).numpy()
    return memory
