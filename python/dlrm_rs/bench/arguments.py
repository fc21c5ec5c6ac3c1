"""What a run of the comparison can be asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dlrm_rs.data.synthetic import SHAPES
from dlrm_rs.row_formats import ROW_FORMATS

FAMILIES = ("lookup", "quantize")
FORMATS = ("fp32", "int8", "int4")
DISTRIBUTIONS = ("uniform", "zipf")
THREADS = ("1", "all")

# Together they end in two minutes on two cores: few shapes, and tables that are beyond a cache but soon made.
QUICK_SHAPES = ("SINGLE", "MULTI")
QUICK_ROWS = 100_000
QUICK_SECONDS = 0.3
# After so many seconds a quick run begins nothing more, and tells what it left out: the machine may be slow, or busy.
QUICK_LAST_START = 100.0


@dataclass(frozen=True)
class Arguments:
    """Arguments of the comparison.

    Attributes:
        families: Of "lookup" and "quantize", what is timed.
        shapes: Names from `dlrm_rs.data.SHAPES`.
        batches: Batch sizes; none for those of each shape.
        formats: Row formats that the installed engine stores.
        distributions: Of "uniform" and "zipf", those that a shape has.
        threads: Numbers, or "all" for the CPUs that this process may use.
        seconds: For how long a case is timed, all sides together.
        rows: No table has more rows than this; None for the shapes' own.
        quick: A few cases on small tables, within two minutes.

    Raises:
        ValueError: One of them cannot be.
    """

    families: tuple[str, ...] = FAMILIES
    shapes: tuple[str, ...] = tuple(SHAPES)
    batches: tuple[int, ...] = ()
    formats: tuple[str, ...] = FORMATS
    distributions: tuple[str, ...] = DISTRIBUTIONS
    threads: tuple[str, ...] = THREADS
    seconds: float = 3.0
    rows: int | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        _check_names("families", self.families, FAMILIES)
        _check_names("shapes", self.shapes, tuple(SHAPES))
        _check_names("distributions", self.distributions, DISTRIBUTIONS)
        _check_names("formats", self.formats, ROW_FORMATS)
        self.thread_counts()

    @classmethod
    def chosen(cls, quick: bool, given: Mapping[str, Any]) -> Arguments:
        """Those that are given, and else the defaults, which are others for a quick run."""
        quickly = {"shapes": QUICK_SHAPES, "threads": ("all",), "seconds": QUICK_SECONDS, "rows": QUICK_ROWS}
        return cls(**{**(quickly if quick else {}), **given, "quick": quick})

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
