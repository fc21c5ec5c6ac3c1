"""Numbers as people read them, and the alignment of tables."""

from __future__ import annotations

from collections.abc import Container, Sequence

__all__ = ["aligned", "readable_bytes", "readable_count", "readable_error"]


def readable_bytes(count: float) -> str:
    """Bytes in units of 1000, to three digits.

    Example:
        >>> readable_bytes(999), readable_bytes(6_656_000_000)
        ('999 B', '6.66 GB')
    """
    if count < 1000:
        return f"{count:,.0f} B"
    units = ("kB", "MB", "GB", "TB")
    # A number that would round to 1000 belongs to the next unit.
    power = next((power for power in (1, 2, 3) if count / 1000**power < 999.5), len(units))
    size = count / 1000**power
    decimals = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{size:,.{decimals}f} {units[power - 1]}"


def readable_count(count: int) -> str:
    """A number of rows.

    Example:
        >>> readable_count(16_852), readable_count(40_000_000)
        ('16,852', '40.0M')
    """
    if count < 1_000_000:
        return f"{count:,}"
    return f"{count / 1e6:,.{1 if count < 100_000_000 else 0}f}M"


def readable_error(error: float) -> str:
    """An error or a difference, to three digits in at most 7 characters and a sign.

    Example:
        >>> readable_error(0.00551234), readable_error(0.0002), readable_error(0.0)
        ('0.00551', '2e-4', '0')
    """
    if not 0 < abs(error) < 1e-3:
        return f"{error:.3g}"
    mantissa, exponent = f"{error:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def aligned(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> list[str]:
    """Lines of text in columns, of which those of the indices `left` are aligned to the left and others to the right.

    Example:
        >>> aligned([["table", "rows"], ["t0", "5"]])
        ['table  rows', 't0        5']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
