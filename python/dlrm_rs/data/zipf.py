"""Ids whose frequencies follow Zipf's law, from tables of any size.

NumPy's `Generator.zipf` has no upper bound, and SciPy's `zipfian` searches a table of `N` probabilities. This is
rejection-inversion: W. Hörmann and G. Derflinger, "Rejection-inversion to generate variates from monotone discrete
distributions", ACM TOMACS 6(3), 1996, section 5. It needs no table, and accepts most draws at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Above it, products in `scatter` would leave 64 bits, and ranks the 53 bits of a float64's integers.
MAX_ROWS = 2**32


def zipf_ranks(rng: np.random.Generator, exponent: float, rows: int, size: int) -> NDArray[np.int64]:
    """Draw ranks `k` from 0 to `rows - 1` with probability proportional to `(k + 1) ** -exponent`.

    Args:
        rng: Where the randomness comes from.
        exponent: 0 is uniform; click logs have about 1.05 to 1.2.
        rows: `N`, from 1 to 2^32.
        size: How many to draw.

    Returns:
        `(size,)` int64.

    Raises:
        ValueError: `exponent` is negative or not finite, or `rows` or `size` are out of range.

    Example:
        >>> ranks = zipf_ranks(np.random.default_rng(0), exponent=1.05, rows=100_000_000, size=10_000)
        >>> bool((ranks == 0).mean() > 5 * (ranks == 9).mean())
        True
    """
    if not 0 <= exponent < np.inf:
        raise ValueError(f"exponent: expected a finite number of at least 0, got {exponent}")
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"rows: expected 1 to {MAX_ROWS}, got {rows}")
    if size < 0:
        raise ValueError(f"size: expected at least 0, got {size}")
    ranks = np.empty(size, dtype=np.int64)
    todo = np.arange(size)
    low = _integral(np.array(1.5), exponent) - 1
    high = _integral(np.array(rows + 0.5), exponent)
    while todo.size:
        u = low + (high - low) * rng.random(todo.size)
        k = np.clip(np.rint(_inverse(u, exponent)), 1, rows)
        # Under the curve from k - 1/2 to k + 1/2 there is at least the mass of k, as the curve is convex: keep so much.
        accepted = u >= _integral(k + 0.5, exponent) - k**-exponent
        ranks[todo[accepted]] = k[accepted].astype(np.int64) - 1
        todo = todo[~accepted]
    return ranks


def scatter(ranks: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """Spread the popular ids over the table, as hashing does, by a bijection of `0 .. rows - 1`.

    Args:
        ranks: Any shape, each from 0 to `rows - 1`.
        rows: `N`, from 1 to 2^32.

    Example:
        >>> scatter(np.arange(10), 10).tolist()
        [0, 7, 4, 1, 8, 5, 2, 9, 6, 3]
    """
    return ranks * _stride(rows) % rows


def _stride(rows: int) -> int:
    """A step near `rows` divided by the golden ratio that shares no factor with it, and fits 31 bits."""
    step = min(int(rows * 0.6180339887498949), 2**31 - 1) | 1
    while np.gcd(step, rows) != 1:
        step += 2
    return step


def _integral(x: Floats, exponent: float) -> Floats:
    """The integral of `t ** -exponent` from 1 to `x`, accurate for exponents near 1, where it is a logarithm."""
    log_x = np.log(x)
    power = (1 - exponent) * log_x
    return log_x * _ratio(np.expm1(power), power)


def _inverse(y: Floats, exponent: float) -> Floats:
    """The `x` whose `_integral` is `y`."""
    # Rounding may bring the argument of the logarithm to -1 or below at the far end; there x is clipped anyway.
    power = np.maximum((1 - exponent) * y, -1 + 1e-16)
    return np.exp(y * _ratio(np.log1p(power), power))


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Their quotient, and its limit 1 where both are 0."""
    return np.divide(numerator, denominator, out=np.ones_like(denominator), where=denominator != 0)
