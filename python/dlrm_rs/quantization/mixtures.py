"""Which mixture of formats harms least for its bytes, when the harms of single tables are known and taken to add up.

A choice of one format for each table, with a sum of bytes and a sum of harm, is a multiple-choice knapsack. All its
undominated solutions are found together, table by table, as Nemhauser and Ullmann did for the plain knapsack
(Management Science 15 (9), 1969).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["MOST_MIXTURES", "Mixture", "Option", "undominated_mixtures"]

# Of more undominated mixtures, some that lie close together are dropped: less than bytes / MOST_MIXTURES apart.
MOST_MIXTURES = 1024


class Option(NamedTuple):
    """A format that a table may have.

    Attributes:
        format: Its name.
        bytes: Of the table in it.
        harm: What the table alone in it costs, at least 0.
        expected_harm: Decides between mixtures of equal harm; more for fewer bits.
    """

    format: str
    bytes: int
    harm: float
    expected_harm: int


class Mixture(NamedTuple):
    """A format for each table.

    Attributes:
        bytes: Of all tables.
        harm: Sum over the tables.
        expected_harm: Sum over the tables.
        format: The last table's.
        before: The mixture of the tables before it, which other mixtures share.
    """

    bytes: int
    harm: float
    expected_harm: int
    format: str = ""
    before: Mixture | None = None

    def in_order(self) -> tuple[str, ...]:
        """The format of each table, first to last."""
        names, mixture = [], self
        while mixture.before is not None:
            names.append(mixture.format)
            mixture = mixture.before
        return tuple(reversed(names))


def undominated_mixtures(tables: Sequence[Sequence[Option]]) -> list[Mixture]:
    """The mixtures for which no other has less harm and no more bytes.

    Args:
        tables: What each table may be.

    Returns:
        Most bytes first, and so least harm first. Mixtures of equal harm differ in expected harm in the same way.

    Example:
        >>> half_or_all = [Option("all", 8, 0.0, 0), Option("half", 4, 0.25, 1)]
        >>> none_matter = [Option("all", 2, 0.0, 0), Option("half", 1, 0.0, 1)]
        >>> for mixture in undominated_mixtures([half_or_all, none_matter]):
        ...     print(mixture.bytes, mixture.harm, mixture.in_order())
        10 0.0 ('all', 'all')
        9 0.0 ('all', 'half')
        6 0.25 ('half', 'all')
        5 0.25 ('half', 'half')
    """
    mixtures = [Mixture(0, 0.0, 0)]
    for options in tables:
        extended = (
            Mixture(
                mixture.bytes + option.bytes,
                mixture.harm + option.harm,
                mixture.expected_harm + option.expected_harm,
                option.format,
                mixture,
            )
            for mixture in mixtures
            for option in options
        )
        mixtures = _thinned(_undominated(extended))
    return mixtures[::-1]


def _undominated(mixtures: Iterable[Mixture]) -> list[Mixture]:
    """Fewest bytes first."""
    kept: list[Mixture] = []
    for mixture in sorted(mixtures, key=lambda mixture: mixture[:3]):
        if not kept or mixture[1:3] < kept[-1][1:3]:
            kept.append(mixture)
    return kept


def _thinned(mixtures: list[Mixture]) -> list[Mixture]:
    """The least harmful of each of many equal ranges of bytes, and the smallest of all."""
    if len(mixtures) <= MOST_MIXTURES:
        return mixtures
    smallest, largest = mixtures[0].bytes, mixtures[-1].bytes
    ranges = {(mixture.bytes - smallest) * (MOST_MIXTURES - 2) // (largest - smallest): mixture for mixture in mixtures}
    return [mixtures[0], *(mixture for mixture in ranges.values() if mixture is not mixtures[0])]
