"""Row formats by their names, the torch dtypes that some are, and tensors as the arrays that the engine takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dlrm_rs._dlrm_rs import take_tensors

__all__ = [
    "METHODS",
    "QUANTIZED",
    "ROW_FORMATS",
    "TAKES_TENSORS",
    "TORCH_DTYPES",
    "as_array",
    "as_tensor",
    "output_dtype",
    "row_format",
]

# Whether the binding takes tensors as they are, since torch tells it where they are; an older torch does not.
TAKES_TENSORS = take_tensors(Tensor)

# Row formats whose elements are numbers of a torch dtype: such rows are a Parameter.
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Row formats whose elements are codes, with a scale and a bias for each row.
QUANTIZED = ("int8", "int4", "int2")

ROW_FORMATS = (*TORCH_DTYPES, *QUANTIZED)

# How scale and bias are found unless the user says how: 8 bits are enough to leave it at the range of the row.
METHODS = {"int8": "minmax", "int4": "lsq", "int2": "lsq"}


def row_format(name: str, dtype: object) -> str:
    """The engine's name of a row format.

    Args:
        name: The argument's name, for messages.
        dtype: None for fp32, a torch dtype, a name, or an enum member whose value is a name, in any case.

    Raises:
        TypeError: There is no such row format.
    """
    wanted = getattr(dtype, "value", dtype)
    if wanted is None:
        return "fp32"
    for row_format in ROW_FORMATS:
        if wanted is TORCH_DTYPES.get(row_format) or (isinstance(wanted, str) and wanted.lower() == row_format):
            return row_format
    available = ", ".join(map(repr, ROW_FORMATS))
    dtypes = ", ".join(map(str, TORCH_DTYPES.values()))
    raise TypeError(f"{name}: expected one of {available}, {dtypes}, got {dtype!r}")


def output_dtype(output: torch.dtype | None, dtype: object = None) -> torch.dtype:
    """The dtype of pooled rows.

    Args:
        output: What the user asks for; None for torch's own rule where `dtype` is a torch dtype, whose modules give
            what they store, and for float32 elsewhere.
        dtype: How rows are stored.

    Raises:
        TypeError: Not float32, float16 or bfloat16.
    """
    if output is None:
        return dtype if isinstance(dtype, torch.dtype) else torch.float32
    if output not in TORCH_DTYPES.values():
        raise TypeError(f"output_dtype: expected one of {', '.join(map(str, TORCH_DTYPES.values()))}, got {output}")
    return output


def as_tensor(array: NDArray[Any]) -> Tensor:
    """An array of the engine's, without a copy; int16 holds the bits of bfloat16, which NumPy has not."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.int16 else tensor


def as_array(tensor: Tensor) -> NDArray[Any]:
    """The same the other way."""
    detached = tensor.detach()
    return (detached.view(torch.int16) if tensor.dtype is torch.bfloat16 else detached).numpy()
