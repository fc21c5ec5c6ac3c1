"""Mean and 99th percentile of the errors of rows, over one table or over many.

Guarantees that nothing of the size of a table is allocated: all there is to keep are the errors themselves, 4 bytes a
row, and their weights, another 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["RowErrors", "mean_error", "p99_error", "row_weights"]

# Rows looked at together: their indices into a histogram take 8 bytes each.
_CHUNK = 1 << 16

# Rows that tell where the 99th percentile is about, and of those near it the most that are kept.
_SAMPLES = 1 << 13
_MANY = 1 << 20


class RowErrors(NamedTuple):
    """The errors of a table's rows.

    Attributes:
        errors: `(N,)` float32, none negative.
        weights: `(N,)` float32, how often each row is used; None where all count alike.
    """

    errors: NDArray[np.float32]
    weights: NDArray[np.float32] | None = None


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
    weighted = total = 0.0
    for errors, weights in tables:
        # Both sum in float64 as they read, without a copy in it.
        if weights is None:
            weighted += float(np.sum(errors, dtype=np.float64))
            total += len(errors)
        else:
            weighted += float(np.einsum("i,i->", errors, weights, dtype=np.float64))
            total += float(np.sum(weights, dtype=np.float64))
    return weighted / total if total else 0.0


def p99_error(tables: Sequence[RowErrors]) -> float:
    """The least error that 99 % of all rows of some tables, by weight, do not exceed; 0 without rows.

    Exact: it is the error of a row. Floats of one sign are ordered as their bits are; so rows that count alike are
    compared with two that it lies between, as some of the rows tell, and of those in between it is picked. Else, or
    where these are many, two histograms of 16 bits each find it. NaN counts as the largest.

    Example:
        >>> p99_error([RowErrors(np.arange(200, dtype=np.float32))])
        197.0
    """
    if all(weights is None for _, weights in tables):
        found = _pick(tables)
        if found is not None:
            return _of_bits(found)
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
    return _of_bits(upper << 16 | lower)


def _of_bits(bits: int) -> float:
    return float(np.array(bits, dtype=np.uint32).view(np.float32))


def _pick(tables: Sequence[RowErrors]) -> int | None:
    """The bits of the error, where all rows count alike; None where it is not between those guessed, or many are."""
    count = sum(len(errors) for errors, _ in tables)
    place = -(-99 * count // 100) - 1  # of all rows, from the least error on
    if place < 0:
        return None
    step = -(-count // _SAMPLES)
    some = np.sort(np.concatenate([np.abs(errors[::step]).view(np.uint32) for errors, _ in tables]))
    # Of samples, as many are off by more than this as one in 10,000 guesses.
    slack = len(some) // 200 + 1
    middle = place * len(some) // count
    low, high = some[max(middle - slack, 0)], some[min(middle + slack, len(some) - 1)]
    below, between, found = 0, 0, []
    for bits, _ in _chunks(tables):
        not_below = bits[bits >= low]
        below += len(bits) - len(not_below)
        found.append(not_below[not_below <= high])
        between += len(found[-1])
        if between > _MANY:
            return None
    if not below <= place < below + between:
        return None
    return int(np.partition(np.concatenate(found), place - below)[place - below])


def _first_at_99(histogram: NDArray[np.float64], below: float, total: float) -> int:
    """The bin at which 99 % of `total` is reached, with `below` in earlier bins."""
    # Not 0.99 * total, which may be just above the whole number that it stands for.
    reached = int(np.searchsorted(100 * (below + np.cumsum(histogram)), 99 * total))
    # Rounding may leave the sum of all bins short of it.
    return min(reached, int(np.flatnonzero(histogram)[-1]))


def _chunks(tables: Sequence[RowErrors]) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.float32] | None]]:
    """Bits of the errors, and their weights."""
    for errors, weights in tables:
        for start in range(0, len(errors), _CHUNK):
            rows = slice(start, start + _CHUNK)
            # The sign of a NaN is arbitrary.
            yield np.abs(errors[rows]).view(np.uint32), None if weights is None else weights[rows]
