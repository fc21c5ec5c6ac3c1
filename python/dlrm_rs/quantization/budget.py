"""What a quantized model may cost, and what a search for its formats found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from types import UnionType
from typing import Any

__all__ = ["Budget", "Choice", "TableSizes", "Trial"]


@dataclass(frozen=True)
class Budget:
    """How good or how small a quantized model has to be, for `dlrm_rs.quantize(model, budget=...)`.

    With `tolerance`: the smallest model whose metric is no more than that worse than the model's as it was.
    With `max_bytes`: the model with the best metric whose tables take no more than that.

    With `T` tables, the metric is called once for the model as it is, at most `(T + 1) * len(formats)` times with one
    table or all tables in a format, and at most 30 times with mixtures. It should be deterministic, and of enough
    samples that its noise is well below the tolerance: what noise hides, no search can see.

    Args:
        metric: Takes the model and returns its quality, such as AUC or log loss on a validation set.
        tolerance: By how much the metric may be worse, in its own units; at least 0.
        max_bytes: What all tables may take together.
        higher_is_better: Whether a higher metric is; False for a loss.
        formats: The row formats to choose from, most bits first. A table may also stay in the one that it has; so do
            tables that take next to nothing, which are not worth a measurement.

    Raises:
        TypeError: An argument of a type that cannot be.
        ValueError: Not exactly one of `tolerance` and `max_bytes`, a negative or infinite one, or `formats` that are
            none or repeat.

    Example:
        >>> budget = Budget(metric=lambda model: 0.75, tolerance=1e-3)
        >>> budget.damage(0.625, unquantized=0.75)
        0.125
        >>> Budget(metric=lambda model: 0.75)
        Traceback (most recent call last):
        ValueError: tolerance, max_bytes: expected exactly one of them, got None and None
    """

    metric: Callable[[Any], float]  # not of nn.Module alone, or mypy refuses a metric of the user's own class
    _: KW_ONLY
    tolerance: float | None = None
    max_bytes: int | None = None
    higher_is_better: bool = True
    formats: tuple[str, ...] = ("int8", "int4", "int2")

    def __post_init__(self) -> None:
        if not callable(self.metric):
            raise TypeError(f"metric: expected a function of the model, got {type(self.metric).__name__}")
        if (self.tolerance is None) == (self.max_bytes is None):
            raise ValueError(
                f"tolerance, max_bytes: expected exactly one of them, got {self.tolerance} and {self.max_bytes}"
            )
        _check_limit("tolerance", self.tolerance, int | float, "a number")
        _check_limit("max_bytes", self.max_bytes, int, "an integer")
        if isinstance(self.formats, str):
            raise TypeError(f"formats: expected names of row formats in a tuple, got the string {self.formats!r}")
        object.__setattr__(self, "formats", tuple(self.formats))
        if not self.formats or len(set(self.formats)) < len(self.formats):
            raise ValueError(f"formats: expected one row format or more, each once, got {self.formats}")

    def damage(self, metric: float, unquantized: float) -> float:
        """By how much a metric is worse than that of the unquantized model; below 0 if it is better."""
        return unquantized - metric if self.higher_is_better else metric - unquantized


@dataclass(frozen=True)
class TableSizes:
    """A table, as far as the search knows it.

    Attributes:
        name: In the model.
        format: The row format that it has.
        bytes_of: What it takes, by format: that which it has, and those to choose from. One that takes no less than
            that which it has is not tried.
    """

    name: str
    format: str
    bytes_of: Mapping[str, int]


@dataclass(frozen=True)
class Trial:
    """A model that was measured.

    Attributes:
        formats: The tables in another format than they were, and that format.
        total_bytes: Of all tables.
        metric: Its metric.
        damage: By how much that is worse than the unquantized model's; below 0 if it is better.
        reason: Why it was measured.
    """

    formats: Mapping[str, str]
    total_bytes: int
    metric: float
    damage: float
    reason: str


@dataclass(frozen=True)
class Choice:
    """What a search found.

    Attributes:
        formats: Of every table.
        candidates: The formats that there were to choose from.
        trial: The measurement of these.
        trials: All measurements, in their order; first of the unquantized model.
        reason: Why these formats, in a sentence.
    """

    formats: Mapping[str, str]
    candidates: tuple[str, ...]
    trial: Trial
    trials: tuple[Trial, ...]
    reason: str


def _check_limit(name: str, limit: float | None, kind: type | UnionType, kind_name: str) -> None:
    if limit is None:
        return
    if isinstance(limit, bool) or not isinstance(limit, kind):
        raise TypeError(f"{name}: expected {kind_name}, got {type(limit).__name__}")
    if not 0 <= limit < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {limit}")
