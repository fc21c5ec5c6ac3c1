"""The modules as users call them, by pytest-benchmark: `pytest benches`, or `make bench-python`.

What a call costs from Python, the cost of the call itself included; beside other libraries, see `dlrm-rs bench`.
"""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import NamedTuple, TypeVar

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import dlrm_rs
from dlrm_rs import EmbeddingBagConfig, KeyedJaggedTensor
from dlrm_rs.optim import OptimizerSpec

BATCHES = 8

Batch = TypeVar("Batch")


class Size(NamedTuple):
    """Tables of one size, each with one feature."""

    tables: int
    rows: int
    dim: int
    ids_per_bag: int
    batch: int

    def __str__(self) -> str:
        return "{}x{}x{}, {} ids, B {}".format(*self)


SIZES = [Size(26, 100_000, 64, 1, batch) for batch in (1, 16, 2048)] + [Size(8, 100_000, 128, 40, 512)]

# The update inside backward.
OPTIMIZERS = [dlrm_rs.optim.SGD(lr=0.01), dlrm_rs.optim.Adagrad(lr=0.01), dlrm_rs.optim.RowWiseAdagrad(lr=0.01)]


def features(size: Size) -> list[KeyedJaggedTensor]:
    """Batches of uniform ids."""
    count = size.tables * size.batch * size.ids_per_bag
    lengths = torch.full((size.tables * size.batch,), size.ids_per_bag)
    keys = [f"f{t}" for t in range(size.tables)]
    return [
        KeyedJaggedTensor.from_lengths_sync(keys=keys, values=torch.randint(size.rows, (count,)), lengths=lengths)
        for _ in range(BATCHES)
    ]


def collection(size: Size, optimizer: OptimizerSpec | None = None) -> dlrm_rs.EmbeddingBagCollection:
    """The tables, filled at random."""
    tables = [EmbeddingBagConfig(f"t{t}", size.rows, size.dim, [f"f{t}"]) for t in range(size.tables)]
    return dlrm_rs.EmbeddingBagCollection(tables, optimizer=optimizer)


def in_rotation(call: Callable[[Batch], object], batches: Sequence[Batch]) -> Callable[[], object]:
    """A call with the next of some batches every time."""
    rotation = cycle(batches)
    return lambda: call(next(rotation))


@pytest.mark.parametrize("size", SIZES, ids=str)
def bench_collection_lookup(benchmark: BenchmarkFixture, size: Size) -> None:
    tables = collection(size)
    batches = [(kjt.values(), kjt.offsets()) for kjt in features(size)]
    with torch.no_grad():
        benchmark(in_rotation(lambda batch: tables.lookup(*batch), batches))


@pytest.mark.parametrize("size", SIZES, ids=str)
def bench_collection_forward(benchmark: BenchmarkFixture, size: Size) -> None:
    tables = collection(size)
    with torch.no_grad():
        benchmark(in_rotation(tables, features(size)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.algorithm)
@pytest.mark.parametrize("size", SIZES, ids=str)
def bench_collection_step(benchmark: BenchmarkFixture, size: Size, optimizer: OptimizerSpec) -> None:
    """Forward, backward and update."""
    tables = collection(size, optimizer)
    grad = torch.rand(size.batch, size.tables * size.dim)

    def step(batch: KeyedJaggedTensor) -> None:
        tables(batch).values().backward(grad)

    benchmark(in_rotation(step, features(size)))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def bench_bag_forward(benchmark: BenchmarkFixture, mode: str) -> None:
    module = dlrm_rs.EmbeddingBag(1_000_000, 64, mode=mode)
    with torch.no_grad():
        benchmark(in_rotation(module, [torch.randint(1_000_000, (512, 20)) for _ in range(BATCHES)]))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def bench_bag_step(benchmark: BenchmarkFixture, mode: str) -> None:
    """Forward and backward to a sparse gradient, and torch's SGD."""
    module = dlrm_rs.EmbeddingBag(1_000_000, 64, mode=mode, sparse=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    grad = torch.rand(512, 64)

    def step(ids: torch.Tensor) -> None:
        optimizer.zero_grad()
        module(ids).backward(grad)
        optimizer.step()

    benchmark(in_rotation(step, [torch.randint(1_000_000, (512, 20)) for _ in range(BATCHES)]))
