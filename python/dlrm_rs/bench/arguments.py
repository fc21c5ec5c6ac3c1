"""What a run of the comparison can be asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dlrm_rs.bench.optimizers import OPTIMIZERS
from dlrm_rs.data.synthetic import SHAPES
from dlrm_rs.row_formats import ROW_FORMATS

# Row formats of every family, and those that it takes when none are asked for. "bf16-split" has the lower 16 bits of
# every element in the optimizer's state: of a lookup that is "bf16".
FORMATS: Mapping[str, tuple[str, ...]] = {
    "lookup": ROW_FORMATS,
    "quantize": ("int8", "int4", "int2"),
    "step": ("fp32", "fp16", "bf16", "bf16-split", "int8"),
}
DEFAULT_FORMATS: Mapping[str, tuple[str, ...]] = {
    "lookup": ("fp32", "int8", "int4"),
    "quantize": ("int8", "int4"),
    "step": FORMATS["step"],
}
FAMILIES = tuple(FORMATS)
# The shapes of a family when none are asked for.
DEFAULT_SHAPES: Mapping[str, tuple[str, ...]] = {
    "lookup": tuple(SHAPES),
    "quantize": ("SINGLE",),
    "step": ("SINGLE", "MULTI"),
}
DISTRIBUTIONS = ("uniform", "zipf")
THREADS = ("1", "all")

# A quick run ends in two minutes on two cores: few cases, and tables that are beyond a cache but soon made.
QUICK_SHAPES: Mapping[str, tuple[str, ...]] = {**DEFAULT_SHAPES, "lookup": ("SINGLE", "MULTI")}
QUICK_DISTRIBUTIONS = ("zipf",)
QUICK_ROWS = 100_000
QUICK_SECONDS = 0.3
QUICK_OPTIMIZERS = ("RowWiseAdagrad",)
QUICK_STEP_FORMATS = ("fp32",)
# After so many seconds it ends what it does, and tells what it left out: the machine may be slow, or busy. Tables and
# picture take a few more.
QUICK_END = 112.0


# Tables of a step have no more rows: with the two numbers of Adam's state for every element, three sides of a million
# rows a table would take 60 GB.
STEP_ROWS = 250_000


@dataclass(frozen=True)
class Arguments:
    """Arguments of the comparison.

    Attributes:
        families: Of "lookup", "quantize" and "step", what is timed.
        shapes: Names from `dlrm_rs.data.SHAPES`; none for those of each family.
        batches: Batch sizes; none for those of each shape.
        formats: Row formats, of which a family takes those that it has; none for its own.
        optimizers: Those that steps are taken with.
        distributions: Of "uniform" and "zipf", those that a shape has.
        threads: Numbers, or "all" for the CPUs that this process may use.
        seconds: For how long a case is timed, all sides together.
        rows: No table has more rows than this; None for the shapes' own, in a step `STEP_ROWS` at most.
        quick: A few cases on small tables, within two minutes.

    Raises:
        ValueError: One of them cannot be.
    """

    families: tuple[str, ...] = FAMILIES
    shapes: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    formats: tuple[str, ...] = ()
    optimizers: tuple[str, ...] = OPTIMIZERS
    distributions: tuple[str, ...] = DISTRIBUTIONS
    threads: tuple[str, ...] = THREADS
    seconds: float = 3.0
    rows: int | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        _check_names("families", self.families, FAMILIES)
        _check_names("shapes", self.shapes, tuple(SHAPES))
        _check_names("distributions", self.distributions, DISTRIBUTIONS)
        _check_names("formats", self.formats, tuple(dict.fromkeys(name for of in FORMATS.values() for name in of)))
        _check_names("optimizers", self.optimizers, OPTIMIZERS)
        self.thread_counts()

    @classmethod
    def chosen(cls, quick: bool, given: Mapping[str, Any]) -> Arguments:
        """Those that are given, and else the defaults, which are others for a quick run."""
        quickly = {
            "distributions": QUICK_DISTRIBUTIONS,
            "optimizers": QUICK_OPTIMIZERS,
            "threads": ("all",),
            "seconds": QUICK_SECONDS,
            "rows": QUICK_ROWS,
        }
        return cls(**{**(quickly if quick else {}), **given, "quick": quick})

    def shapes_of(self, family: str) -> tuple[str, ...]:
        """The shapes of a family."""
        return self.shapes or (QUICK_SHAPES if self.quick else DEFAULT_SHAPES)[family]

    def formats_of(self, family: str) -> tuple[str, ...]:
        """The row formats of a family.

        Example:
            >>> Arguments(formats=("fp32", "int8")).formats_of("quantize")
            ('int8',)
        """
        if self.formats:
            return tuple(name for name in self.formats if name in FORMATS[family])
        return QUICK_STEP_FORMATS if self.quick and family == "step" else DEFAULT_FORMATS[family]

    def rows_of(self, family: str) -> int | None:
        """The most rows that a table of a family has; None for the shape's own."""
        if family != "step":
            return self.rows
        return STEP_ROWS if self.rows is None else min(self.rows, STEP_ROWS)

    def thread_counts(self) -> list[int]:
        """The numbers of threads, ascending, each once."""
        return sorted({_thread_count(threads) for threads in self.threads})


def _thread_count(threads: str) -> int:
    if threads == "all":
        return len(os.sched_getaffinity(0))
    if not threads.isdecimal() or int(threads) < 1:
        raise ValueError(f"threads: expected 'all' or a number of at least 1, got {threads!r}")
    return int(threads)


def _check_names(argument: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{argument}: expected some of {', '.join(known)}, got {name!r}")
