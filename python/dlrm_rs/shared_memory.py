"""Memory that processes of one host have in common: a file without a name, gone when the last of them lets it go."""

from __future__ import annotations

import mmap
import os
import secrets
import weakref
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Place", "Shape", "SharedMemory"]

# Of an array, and the string of its dtype.
Shape = tuple[tuple[int, ...], str]

_TOKEN_BYTES = 16

# Arrays begin on pages, the first after that of the token. No system has longer ones for such files, unless asked.
_PAGE = 64 << 10


class Place(NamedTuple):
    """By what another process finds the memory.

    Attributes:
        pid: Of a process that has it.
        descriptor: Of the file there.
        token: What the memory begins with.
    """

    pid: int
    descriptor: int
    token: bytes


class SharedMemory:
    """Arrays of zeros in memory that other processes can have, too; the arrays keep it.

    Args:
        shapes: Of the arrays.
        descriptor: Of the file.

    Attributes:
        arrays: The arrays, writable.

    Example:
        >>> memory, place = SharedMemory.create([((2, 3), "float32")])
        >>> other = SharedMemory.open([((2, 3), "float32")], place)
        >>> memory.arrays[0][1, 2] = 7.0
        >>> float(other.arrays[0][1, 2])
        7.0
    """

    def __init__(self, shapes: Sequence[Shape], descriptor: int) -> None:
        sizes = [prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes]
        self._bounds = list(accumulate((-(-size // _PAGE) * _PAGE for size in (_TOKEN_BYTES, *sizes)), initial=0))
        if os.fstat(descriptor).st_size == 0:
            os.ftruncate(descriptor, self._bounds[-1])
        # Open as long as this object is there, for others to find; the arrays stay longer.
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self._map = mmap.mmap(descriptor, self._bounds[-1])
        self.arrays: list[NDArray[Any]] = [
            np.frombuffer(self._map, dtype, prod(shape), start).reshape(shape)
            for (shape, dtype), start in zip(shapes, self._bounds[1:], strict=False)
        ]

    @classmethod
    def create(cls, shapes: Sequence[Shape]) -> tuple[SharedMemory, Place]:
        """Make it; nothing is taken from the system yet but what the token needs.

        Raises:
            OSError: The system has no such memory.
        """
        if not hasattr(os, "memfd_create"):
            raise OSError("expected a system with memfd_create, as Linux, got none")
        token = secrets.token_bytes(_TOKEN_BYTES)
        memory = cls(shapes, os.memfd_create("dlrm_rs"))
        memory._map[:_TOKEN_BYTES] = token
        return memory, Place(os.getpid(), memory._descriptor, token)

    @classmethod
    def open(cls, shapes: Sequence[Shape], place: Place) -> SharedMemory:
        """Have what another process of this host has made, of the same shapes, and still has the object of.

        Raises:
            OSError: It is not there, as on another host or in another container.
        """
        memory = cls(shapes, os.open(f"/proc/{place.pid}/fd/{place.descriptor}", os.O_RDWR))
        if memory._map[:_TOKEN_BYTES] != place.token:
            raise OSError(f"expected the memory of process {place.pid}, got another's of the same number")
        return memory

    def reserve(self, array: int) -> None:
        """Take an array's memory from the system now, which would end the process if it had none at its use.

        Raises:
            OSError: There is not as much.
        """
        start, end = list(pairwise(self._bounds))[1 + array]
        if end > start:
            os.posix_fallocate(self._descriptor, start, end - start)
