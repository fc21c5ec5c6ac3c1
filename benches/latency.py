"""What one small request takes from Python: the median of many calls, and the slowest hundredth beside it.

    python benches/latency.py                                  # 26 tables, B 1; half a minute
    python benches/latency.py --batch-size 16 --rows 100000
    python benches/latency.py --output latency.json

A table for every feature, one id for each sample, `lookup` of ids and offsets and a call with a KeyedJaggedTensor, fp32
and int8 rows, one thread and all. Every call is timed by itself, with another batch than the one before; what is timed
takes turns, so that what else the machine does falls on all. "sum(range)" is some microseconds of Python alone: its
slowest hundredth is what the machine's interruptions make of any call. "clock" is the timing of nothing: it is in every
figure.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter_ns

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import dlrm_rs
from dlrm_rs import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from dlrm_rs.machine import describe_machine

TABLES, DIM = 26, 64
BATCHES = 64
# Calls of a turn, and those before it that are not timed.
TURN, WARM_UP = 500, 50

# What a request of one sample is to take: microseconds of the median, and how often that the slowest hundredth.
P50, RATIO = 10.0, 3.0

Call = Callable[[KeyedJaggedTensor], object]

# What has no part of ours.
CONTROLS: dict[str, Call] = {"sum(range)": lambda batch: sum(range(500)), "clock": lambda batch: None}


@dataclass(frozen=True)
class Result:
    """What a call took.

    Attributes:
        row_format: Of the tables.
        threads: Those of the engine.
        call: Its name.
        p50: Microseconds, the median of all calls.
        p99: Microseconds, which a hundredth of them exceeds.
        ratio: Of the two.
        calls: How many were timed.
    """

    row_format: str
    threads: int
    call: str
    p50: float
    p99: float
    ratio: float
    calls: int

    @classmethod
    def of(cls, row_format: str, threads: int, call: str, nanoseconds: NDArray[np.int64]) -> Result:
        """Sum up calls."""
        p50, p99 = (np.percentile(nanoseconds, [50, 99]) / 1e3).tolist()
        return cls(row_format, threads, call, p50, p99, p99 / max(p50, 1e-3), len(nanoseconds))

    @property
    def holds(self) -> bool:
        """Whether it is within what a request of one sample is to take."""
        return self.p50 <= P50 and self.ratio <= RATIO


def make_tables(rows: int, row_format: str) -> EmbeddingBagCollection:
    """One table for each feature."""
    configs = [EmbeddingBagConfig(f"t{t}", rows, DIM, [f"f{t}"], data_type=row_format) for t in range(TABLES)]
    return EmbeddingBagCollection(configs)


def make_batches(rows: int, batch_size: int) -> list[KeyedJaggedTensor]:
    """Uniform ids, one in each bag."""
    keys, offsets = [f"f{t}" for t in range(TABLES)], torch.arange(TABLES * batch_size + 1)
    ids = torch.randint(rows, (BATCHES, TABLES * batch_size))
    return [KeyedJaggedTensor.from_offsets_sync(keys=keys, values=of_batch, offsets=offsets) for of_batch in ids]


def calls_of(tables: EmbeddingBagCollection) -> dict[str, Call]:
    """What is timed, by name."""
    return {
        "lookup": lambda batch: tables.lookup(batch.values(), batch.offsets()),
        "KeyedJaggedTensor": lambda batch: tables(batch).values(),
        **CONTROLS,
    }


def check(tables: EmbeddingBagCollection, batches: Sequence[KeyedJaggedTensor]) -> None:
    """Hold both ways against each other.

    Raises:
        AssertionError: They differ.
    """
    names = ("lookup", "KeyedJaggedTensor")
    for batch in batches:
        outputs: list[Tensor] = [torch.as_tensor(calls_of(tables)[name](batch)) for name in names]
        if not torch.equal(*outputs):
            raise AssertionError(f"{' and '.join(names)}: expected the same rows of both")


def measure(row_formats: Sequence[str], threads: Sequence[int], rows: int, batch_size: int, calls: int) -> list[Result]:
    """Time all calls of all kinds, in turn."""
    batches = make_batches(rows, batch_size)
    timed: dict[tuple[str, int, str], tuple[Call, list[NDArray[np.int64]]]] = {}
    with torch.no_grad():
        for row_format in row_formats:
            tables = make_tables(rows, row_format)
            check(tables, batches)
            timed |= {
                (row_format, count, name): (call, []) for count in threads for name, call in calls_of(tables).items()
            }
        rotation = cycle(batches)
        for turn in range(-(-calls // TURN)):
            for (_, count, _), (call, times) in timed.items() if turn % 2 else reversed(timed.items()):
                dlrm_rs.set_num_threads(count)
                _time(call, list(islice(rotation, WARM_UP)))
                times.append(_time(call, list(islice(rotation, TURN))))
    return [Result.of(*kind, np.concatenate(times)) for kind, (_, times) in timed.items()]


def _time(call: Call, batches: Sequence[KeyedJaggedTensor]) -> NDArray[np.int64]:
    """Nanoseconds of a call with each batch."""
    times, clock = np.empty(len(batches), np.int64), perf_counter_ns
    for k, batch in enumerate(batches):
        begin = clock()
        call(batch)
        times[k] = clock() - begin
    return times


def print_results(results: Sequence[Result], batch_size: int) -> None:
    """A line for every call."""
    print(f"{'rows':<6}{'threads':>8}  {'call':<18}{'p50 us':>8}{'p99 us':>8}{'p99/p50':>9}")
    for result in results:
        line = f"{result.row_format:<6}{result.threads:>8}  {result.call:<18}{result.p50:>8.2f}{result.p99:>8.2f}"
        is_judged = batch_size == 1 and result.call not in CONTROLS
        verdict = ("" if result.holds else f"  above {P50:g} us or {RATIO:g}x") if is_judged else ""
        print(f"{line}{result.ratio:>9.2f}{verdict}")


def main() -> None:
    """Time what the options say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000, help="of each table")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--calls", type=int, default=60_000, help="that are timed of each kind")
    parser.add_argument("--output", type=Path, help="a JSON file for the record")
    options = parser.parse_args()
    threads = sorted({1, torch.get_num_threads()})
    print(f"{TABLES} tables of {options.rows:,} rows of {DIM}, one id a bag, B {options.batch_size}")
    results = measure(("fp32", "int8"), threads, options.rows, options.batch_size, options.calls)
    print_results(results, options.batch_size)
    if options.output is not None:
        record = {"machine": describe_machine(), "tables": TABLES, "rows": options.rows, "dim": DIM}
        record |= {"batch_size": options.batch_size, "results": [asdict(result) for result in results]}
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
