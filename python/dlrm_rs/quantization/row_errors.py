"""Mean and 99th percentile of the errors of rows, over one table or over many.

Guarantees that nothing of the size of a table is allocated: all there is to keep are the errors themselves, 4 bytes a
row, their weights, another 4, and once more those of the largest hundredth or so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["RowErrors", "mean_error", "p99_error", "row_weights"]

# Rows looked at together: their indices into a histogram take 8 bytes each.
_CHUNK = 1 << 16

# Of so many rows one tells where the 99th percentile is about.
_STEP = 128

# Up to so many rows are not asked where it is about.
_FEW = 1 << 14


@dataclass(frozen=True, eq=False)
class RowErrors:
    """The errors of a table's rows. What is made of them is kept: leave them as they are.

    Attributes:
        errors: `(N,)` float32, none negative.
        weights: `(N,)` float32, how often each row is used; None where all count alike.
    """

    errors: NDArray[np.float32]
    weights: NDArray[np.float32] | None = None

    @cached_property
    def sums(self) -> tuple[float, float]:
        """Of the errors, weighted, and of the weights; in float64, into which nothing is copied."""
        if self.weights is None:
            return float(np.sum(self.errors, dtype=np.float64)), float(len(self.errors))
        weighted = np.einsum("i,i->", self.errors, self.weights, dtype=np.float64)
        return float(weighted), float(np.sum(self.weights, dtype=np.float64))

    @cached_property
    def samples(self) -> NDArray[np.float32]:
        """Some errors, ascending."""
        return np.sort(self.errors[::_STEP])

    @cached_property
    def _tail(self) -> tuple[np.float32, NDArray[np.float32]]:
        low = _below_p99(self.samples) if len(self.errors) > _FEW else np.float32(-np.inf)
        return low, _above(self.errors, low)

    def above(self, low: np.float32) -> NDArray[np.float32]:
        """Those errors that are not up to `low`, in any order."""
        tail_low, tail = self._tail
        return _above(tail if low >= tail_low else self.errors, low)


def row_weights(table: str, weights: ArrayLike, num_embeddings: int) -> NDArray[np.float32]:
    """How often each row of a table is used, checked.

    Args:
        table: The table's name, for messages.
        weights: `(N,)` numbers of at least 0; only their ratios matter. A table that is never used has zeros.
        num_embeddings: `N`.

    Returns:
        The weights as float32; the same memory if they were that.

    Raises:
        ValueError: Another shape, a negative number or one that float32 does not hold.

    Example:
        >>> row_weights("t0", [1, 0, 3], 3)
        array([1., 0., 3.], dtype=float32)
    """
    with np.errstate(over="ignore"):  # what is too large for float32 is told below
        array = np.asarray(weights).astype(np.float32, copy=False)
    if array.shape != (num_embeddings,):
        raise ValueError(f"weights of {table!r}: expected shape {(num_embeddings,)}, one per row, got {array.shape}")
    if not num_embeddings:
        return array
    # A NaN is both the least and the greatest.
    least, greatest = int(np.argmin(array)), int(np.argmax(array))
    for row in (least, greatest):
        if not 0 <= array[row] < np.inf:
            raise ValueError(
                f"weights of {table!r}: expected finite float32 numbers of at least 0, got {array[row]} at row {row}"
            )
    return array


def mean_error(tables: Sequence[RowErrors]) -> float:
    """The mean over all rows of some tables, weighted; 0 without rows.

    Example:
        >>> mean_error([RowErrors(np.float32([1, 2])), RowErrors(np.float32([6]))])
        3.0
    """
    sums = [rows.sums for rows in tables]
    weighted, total = sum(of for of, _ in sums), sum(of for _, of in sums)
    return weighted / total if total else 0.0


def p99_error(tables: Sequence[RowErrors]) -> float:
    """The least error that 99 % of all rows of some tables, by weight, do not exceed; 0 without rows.

    Exact: it is the error of a row. Of rows that count alike it is picked among those beyond a number that is a little
    less, as some of the rows tell. Else two histograms of 16 bits each find it, as floats of one sign are ordered as
    their bits are. NaN counts as the largest.

    Example:
        >>> p99_error([RowErrors(np.arange(200, dtype=np.float32))])
        197.0
    """
    if all(rows.weights is None for rows in tables):
        found = _picked([rows for rows in tables if len(rows.errors)])
        if found is not None:
            return found
    high = np.zeros(1 << 16)
    for bits, weights in _chunks(tables):
        high += np.bincount(bits >> 16, weights, minlength=len(high))
    total = float(high.sum())
    if not total:
        return 0.0
    upper = _first_at_99(high, 0.0, total)
    low = np.zeros(1 << 16)
    for bits, weights in _chunks(tables):
        inside = bits >> 16 == upper
        low += np.bincount(bits[inside] & 0xFFFF, None if weights is None else weights[inside], minlength=len(low))
    lower = _first_at_99(low, float(high[:upper].sum()), total)
    return float(np.array(upper << 16 | lower, dtype=np.uint32).view(np.float32))


def _picked(tables: Sequence[RowErrors]) -> float | None:
    """The error, where all rows count alike; None where it is not beyond what is guessed to be a little less."""
    if not tables:
        return None
    count = sum(len(rows.errors) for rows in tables)
    place = -(-99 * count // 100) - 1  # of all rows, from the least error on
    for low in _guesses(tables):
        above = np.concatenate([rows.above(low) for rows in tables])
        at = place - (count - len(above))
        if at >= 0:
            return float(np.partition(above, at)[at])
    return None


def _guesses(tables: Sequence[RowErrors]) -> Iterator[np.float32]:
    # Where tables are alike, what is beyond every one's own guess is known already.
    yield max(rows._tail[0] for rows in tables)
    yield _below_p99(np.sort(np.concatenate([rows.samples for rows in tables])))


def _below_p99(samples: NDArray[np.float32]) -> np.float32:
    """A number that the 99th percentile of what ascending samples are of is hardly ever less than, and not far from."""
    # Off by four times the deviation of how many samples are beyond it.
    off = 4 * math.sqrt(0.01 * len(samples)) + 1
    return np.float32(samples[max(int(0.99 * len(samples) - off), 0)])


def _above(errors: NDArray[np.float32], low: np.float32) -> NDArray[np.float32]:
    """Those that are not up to `low`; NaN is not."""
    chunks = (errors[start : start + _CHUNK] for start in range(0, len(errors), _CHUNK))
    return np.concatenate([chunk[~(chunk <= low)] for chunk in chunks] or [errors])


def _first_at_99(histogram: NDArray[np.float64], below: float, total: float) -> int:
    """The bin at which 99 % of `total` is reached, with `below` in earlier bins."""
    # Not 0.99 * total, which may be just above the whole number that it stands for.
    reached = int(np.searchsorted(100 * (below + np.cumsum(histogram)), 99 * total))
    # Rounding may leave the sum of all bins short of it.
    return min(reached, int(np.flatnonzero(histogram)[-1]))


def _chunks(tables: Sequence[RowErrors]) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.float32] | None]]:
    """Bits of the errors, and their weights."""
    for table in tables:
        errors, weights = table.errors, table.weights
        for start in range(0, len(errors), _CHUNK):
            rows = slice(start, start + _CHUNK)
            # The sign of a NaN is arbitrary.
            yield np.abs(errors[rows]).view(np.uint32), None if weights is None else weights[rows]
