"""FBGEMM told which instructions the CPU has, as it may not find out.

Of torch 2.14 both libc10 and libtorch bring a copy of cpuinfo. What that finds is written into libtorch's, while FBGEMM
1.9 reads libc10's, which stays empty: FBGEMM then takes its scalar reference kernels, and a step with row-wise Adagrad
several times as long. Nothing in its environment changes that. A peer counts at its best, so the one copy is brought
into the other before FBGEMM looks.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

# Where this was seen, and how large `cpuinfo_isa` is there: a bool for every extension of the instruction set.
_TORCH = "2.14."
_BYTES = 85


def tell_instructions() -> None:
    """Bring what cpuinfo has found into the copy that FBGEMM reads, if that is empty."""
    if not torch.__version__.startswith(_TORCH):
        return
    folder = Path(torch.__file__).parent / "lib"
    try:
        read, written = (_instructions(folder / name) for name in ("libc10.so", "libtorch.so"))
    except (AttributeError, ValueError):  # one copy, as in builds for other systems
        return
    if not any(read):
        ctypes.memmove(read, written, _BYTES)


def _instructions(library: Path) -> ctypes.Array[ctypes.c_uint8]:
    loaded = ctypes.CDLL(str(library))
    loaded.cpuinfo_initialize()
    return (ctypes.c_uint8 * _BYTES).in_dll(loaded, "cpuinfo_isa")
