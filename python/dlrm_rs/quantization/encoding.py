"""How rows are encoded, as the user has said, and what they lose."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dlrm_rs._dlrm_rs import Spare, TableRows
from dlrm_rs.quantization.model_tables import ModelTable
from dlrm_rs.row_formats import METHODS, QUANTIZED, TORCH_DTYPES

__all__ = ["PLAIN", "Encoded", "Encoding", "check_method", "scale_format_of", "zeroes_nonfinite"]


class Encoded(NamedTuple):
    """Rows in their new format, and what they lost."""

    rows: TableRows
    errors: NDArray[np.float32]
    largest_error: float


class Encoding(NamedTuple):
    """How rows are encoded, beside their format."""

    method: str | None
    scale_format: str | None
    zero_nonfinite: bool

    def encode(self, table: ModelTable, row_format: str, hot_share: float, spare: Spare | None = None) -> Encoded:
        """Rows in another format; hot rows come along, without a loss, where a table keeps as many of them."""
        handle = table.tables.handle
        with table.named():
            encoded = Encoded(*handle.encode(*self._of(table, row_format), spare))
            hot = handle.hot_rows(table.place)
            if hot is not None and hot_share == table.hot_share and row_format in QUANTIZED:
                encoded.rows.put_hot_rows(table.name, *hot)
                ids = hot[1]
                encoded.errors[ids[ids >= 0]] = 0
            return encoded

    def check(self, table: ModelTable, row_format: str) -> None:
        """Refuse what `encode` refuses."""
        with table.named():
            table.tables.handle.check_encoding(*self._of(table, row_format))

    def _of(self, table: ModelTable, row_format: str) -> tuple[int, str, str, str | None, bool]:
        table.tables.weights()  # what the user has put into a weight is to be in the engine
        method = self.method or METHODS.get(row_format, "minmax")
        return table.place, row_format, method, self.scale_format, self.zero_nonfinite


# What the user gets who says nothing.
PLAIN = Encoding(None, None, False)


def check_method(method: str | None, row_format: str) -> None:
    """Refuse a method that has nothing to search for in a row format, or is none."""
    fitting = {"minmax": (*TORCH_DTYPES, *QUANTIZED), "lsq": QUANTIZED, "codebook": ("int4",)}
    if method is not None and method not in fitting:
        raise ValueError(f"method: expected one of {', '.join(fitting)}, got {method!r}")
    if method is not None and row_format not in fitting[method]:
        formats = " or ".join(", ".join(fitting[method]).rsplit(", ", 1))
        raise ValueError(f"method: expected {formats} rows with {method!r}, got {row_format}")


def scale_format_of(scale_dtype: torch.dtype | None) -> str | None:
    """The engine's name of a dtype of scales; None to be chosen for each table."""
    for name, dtype in TORCH_DTYPES.items():
        if scale_dtype is dtype:
            return name
    if scale_dtype is not None:
        raise TypeError(f"scale_dtype: expected None or one of {list(TORCH_DTYPES.values())}, got {scale_dtype}")
    return None


def zeroes_nonfinite(nonfinite: str) -> bool:
    """Whether a NaN or an infinity is to become zero, and no error."""
    if nonfinite not in ("error", "zero"):
        raise ValueError(f"nonfinite: expected 'error' or 'zero', got {nonfinite!r}")
    return nonfinite == "zero"
