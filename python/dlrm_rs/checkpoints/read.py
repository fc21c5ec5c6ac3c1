"""A checkpoint's file: read without running what it may hold, and without keeping it twice.

`torch.load(weights_only=True)` builds tensors and plain containers alone. Training loops save NumPy's numbers as well,
which are pickled as calls of NumPy; here these calls are answered by code of our own, which makes Python's numbers of
them, so nothing of NumPy is built as a file says.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["File", "read_checkpoint"]

# What a checkpoint can be read from.
File = str | os.PathLike[str] | IO[bytes]

# Booleans, integers and floats: NumPy's codes of kind and size.
_NUMBERS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}

_BYTE_ORDERS = ("<", ">", "|")


class _Dtype:
    """Stands in for `numpy.dtype`: what kind of number it is, and how its bytes are ordered."""

    def __init__(self, code: str, *_align_and_copy: object) -> None:
        if code not in _NUMBERS:
            raise pickle.UnpicklingError(f"expected NumPy's numbers alone, got dtype {code!r}")
        self.code = code
        self.byte_order = "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, byte_order, *_rest = state
        if byte_order not in _BYTE_ORDERS:
            raise pickle.UnpicklingError(f"expected a byte order of {_BYTE_ORDERS}, got {byte_order!r}")
        self.byte_order = byte_order


def _scalar(dtype: _Dtype, data: bytes) -> bool | int | float:
    """Stands in for `numpy.core.multiarray.scalar`."""
    number = np.dtype(dtype.byte_order + dtype.code)
    if not isinstance(data, bytes) or len(data) != number.itemsize:
        raise pickle.UnpicklingError(f"expected {number.itemsize} bytes of a NumPy number, got {data!r}")
    value: bool | int | float = np.frombuffer(data, number)[0].item()
    return value


# By the names under which files know them: NumPy 2 has renamed its module.
_NUMPYS = [
    (_Dtype, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]


def read_checkpoint(path: File) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `torch.save` wrote.

    Args:
        path: A `state_dict`, or a dictionary with one as "state_dict" or "model_state_dict".

    Returns:
        The `state_dict`, whose tensors may be views of the file, and the other entries, with NumPy's numbers as
        Python's.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file has other things than tensors, numbers, strings and containers, or no `state_dict`.
    """
    # Mapped into memory, tables are read once on the way to the engine. torch can do so with files, of its zip format.
    mapped = isinstance(path, str | os.PathLike) and zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(_NUMPYS):  # type: ignore[arg-type] # torch's annotation lacks the pairs
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "path: expected tensors, numbers, strings and containers alone, as loading others can run code, got others "
            f"in {path}; if you trust it, read it by torch.load(weights_only=False) and save its state_dict"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"path: expected a dictionary in {path}, got {type(content).__name__}")
    key = next((key for key in ("state_dict", "model_state_dict") if isinstance(content.get(key), dict)), None)
    state = content if key is None else content[key]
    if not state or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise ValueError(f"path: expected a state_dict, names and tensors, in {path}, got the entries {list(content)}")
    return state, {} if key is None else {name: _owned(value) for name, value in content.items() if name != key}


def _owned(value: Any) -> Any:
    """The same without views of the file, which may be overwritten."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _owned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_owned, value))
    return value
