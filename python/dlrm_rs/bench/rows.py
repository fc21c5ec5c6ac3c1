"""The rows that every side's tables hold, and what of them is left in a row format.

No array of all rows in float64 exists: a row is known by its table and number, so that tables of gigabytes are filled
at the speed of memory and checked at a few rows.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dlrm_rs.row_formats import TORCH_DTYPES

# Elements repeat after so many: a prime, so that rows begin at ever other places of the block.
PERIOD = 4_194_319
# How far the block is shifted from table to table.
SHIFT = 1_299_709

_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "bf16-split": 16, "int8": 8, "int4": 4, "int2": 2}


class Rows:
    """Random numbers in [-1, 1), the same for the same table and row.

    Example:
        >>> rows, table = Rows(), torch.empty(1000, 8)
        >>> rows.fill(3, table)
        >>> bool((table[[7, 999]].double().numpy() == rows.of(3, np.array([7, 999]), 8)).all())
        True
    """

    def __init__(self) -> None:
        block = np.random.default_rng(0).random(PERIOD, dtype=np.float32)
        self._block = torch.from_numpy(2 * block - 1)

    def fill(self, table: int, weight: Tensor) -> None:
        """Write all rows of a table into `weight`, `(N, D)`, contiguous, rounded to its dtype."""
        flat = weight.view(-1)
        at, start = 0, table * SHIFT % PERIOD
        while at < flat.numel():
            part = self._block[start : start + flat.numel() - at]
            flat[at : at + part.numel()] = part
            at, start = at + part.numel(), 0

    def of(self, table: int, ids: NDArray[np.int64], dim: int) -> NDArray[np.float64]:
        """Rows `ids`, `(n,)`, of a table: `(n, D)` float64, exact."""
        places = ids[:, None] * dim + np.arange(dim) + table * SHIFT
        block: NDArray[np.float32] = self._block.numpy()
        picked: NDArray[np.float64] = block[places % PERIOD].astype(np.float64)
        return picked


def row_bytes(row_format: str, dim: int) -> int:
    """Bytes of the elements of a row; a scale and a bias beside or inside it are not counted.

    Example:
        >>> row_bytes("int4", 63)
        32
    """
    return -(-dim * _BITS[row_format] // 8)


def pooled_dtype(row_format: str) -> torch.dtype:
    """The dtype of outputs in lookups: the rows' own, as `nn.EmbeddingBag` has no other; of codes float32.

    A peer that is faster with float32 gives that: see `sides/fbgemm_training.py`.

    Example:
        >>> pooled_dtype("bf16"), pooled_dtype("int8")
        (torch.bfloat16, torch.float32)
    """
    return TORCH_DTYPES.get(row_format, torch.float32)


def rounding(row_format: str) -> float:
    """How far an element in [-1, 1) may be from what a row format makes of it.

    A quantized row spans its own minimum to maximum, at most 2, and an element is off by half a step; another half of
    that, and the last term, leave room for a scale and a bias that are stored as fp16.

    Example:
        >>> rounding("fp32"), rounding("int8") < 0.01
        (0.0, True)
    """
    match row_format:
        case "fp32":
            return 0.0
        case "fp16":
            return 2.0**-11
        case "bf16" | "bf16-split":
            return 2.0**-8
        case _:
            return 1.5 / ((1 << _BITS[row_format]) - 1) + 2.0**-9


def decode(
    codes: NDArray[np.uint8], scale: NDArray[np.float64], bias: NDArray[np.float64], bits: int
) -> NDArray[np.float64]:
    """Rows that are stored as codes, `scale * code + bias`; the first element of a byte is in its low bits.

    Args:
        codes: `(n, bytes of a row)`.
        scale: `(n,)`.
        bias: `(n,)`.
        bits: Of a code: 8, 4 or 2.

    Example:
        >>> decode(np.array([[0x21]], np.uint8), np.array([0.5]), np.array([1.0]), bits=4)
        array([[1.5, 2. ]])
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (codes[:, :, None] >> shifts) & np.uint8(2**bits - 1)
    return parts.reshape(len(codes), -1) * scale[:, None] + bias[:, None]
