"""What is looked up, or trained: the cases of a shape, and their ids.

Shapes are those of `dlrm_rs.data.SHAPES`; a case is a shape with a batch size, a distribution of ids and a number of
threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, product

import numpy as np
import torch
from torch import Tensor

import dlrm_rs
from dlrm_rs.bench.arguments import Arguments
from dlrm_rs.data.synthetic import SHAPES, Shape
from dlrm_rs.data.zipf import scatter, zipf_ranks

# Which distributions a shape is timed with: its own Zipf exponent, uniform, or both. Click logs are never uniform, but
# uniform ids show memory at its slowest.
UNIFORM_TOO = ("SINGLE", "MULTI", "RM1", "RM2", "RM3")

# Batches in rotation: enough for their rows to leave the caches before a batch comes again, and never fewer than 8.
FEWEST_BATCHES = 8
MOST_BATCHES = 512
ROTATION_BYTES = 64 << 20


@dataclass(frozen=True)
class Case:
    """A shape with a batch size, a distribution of ids and a number of threads.

    Attributes:
        batch_size: `B`.
        zipf: Exponent of the ids' frequencies; 0 is uniform.
        threads: For all sides alike.
    """

    batch_size: int
    zipf: float
    threads: int

    @property
    def ids(self) -> str:
        """The distribution in words.

        Example:
            >>> Case(16, 1.05, 2).ids, Case(16, 0, 2).ids
            ('Zipf 1.05', 'uniform')
        """
        return f"Zipf {self.zipf:g}" if self.zipf else "uniform"


def cases(name: str, arguments: Arguments, family: str = "lookup") -> list[Case]:
    """The cases of a shape, those of one distribution together; of steps the largest batch size alone.

    Example:
        >>> [case.ids for case in cases("GIANT", Arguments(threads=("1",)))]
        ['uniform']
    """
    shape = SHAPES[name]
    exponents = [0.0] if name in UNIFORM_TOO and shape.zipf else []
    exponents.append(shape.zipf)
    wanted = [exponent for exponent in exponents if ("zipf" if exponent else "uniform") in arguments.distributions]
    of_shape = shape.batch_sizes[-1:] if family == "step" else shape.batch_sizes
    batch_sizes = arguments.batches or of_shape
    return [Case(*case) for case in product(batch_sizes, wanted, arguments.thread_counts())]


def capped(name: str, rows: int | None) -> Shape:
    """A shape whose tables have no more than `rows` rows; None leaves them as they are."""
    shape = SHAPES[name]
    if rows is None:
        return shape
    capped_rows = tuple(min(n, rows) for n in shape.num_embeddings)
    return Shape(capped_rows, shape.embedding_dim, shape.ids_per_bag, shape.batch_sizes, shape.zipf)


def set_threads(threads: int) -> None:
    """Let torch and the engine use as many threads for a call; the other libraries ask torch, or have one."""
    torch.set_num_threads(threads)
    dlrm_rs.set_num_threads(threads)


@dataclass(frozen=True)
class IdBatch:
    """The ids of one call, as every side may want them; all are views of `indices`.

    Attributes:
        batch_size: `B`.
        indices: `(L,)` int64, feature-major.
        offsets: `(T * B + 1,)` int64.
        tables: For each table its ids, `(B, ids per bag)` int64, and its bags' offsets, `(B + 1,)` int64.
    """

    batch_size: int
    indices: Tensor
    offsets: Tensor
    tables: list[tuple[Tensor, Tensor]]


def id_batches(shape: Shape, case: Case, seed: int = 0) -> list[IdBatch]:
    """Batches to be taken in rotation; the same for the same arguments.

    Example:
        >>> shape = Shape((10, 20), 4, (1, 3), (2,), 0.0)
        >>> batch = id_batches(shape, Case(2, 0.0, 1))[0]
        >>> batch.offsets.tolist(), [ids.shape for ids, _ in batch.tables]
        ([0, 1, 2, 5, 8], [torch.Size([2, 1]), torch.Size([2, 3])])
    """
    row_bytes = shape.embedding_dim * 4
    batch_bytes = case.batch_size * sum(shape.ids_per_bag) * row_bytes
    count = min(max(math.ceil(ROTATION_BYTES / batch_bytes), FEWEST_BATCHES), MOST_BATCHES)
    rng = np.random.default_rng(seed)
    B = case.batch_size
    drawn = [
        scatter(zipf_ranks(rng, case.zipf, rows, count * B * L), rows).reshape(count, B * L)
        for rows, L in zip(shape.num_embeddings, shape.ids_per_bag, strict=True)
    ]
    return [_id_batch(shape, B, np.concatenate([ids[k] for ids in drawn])) for k in range(count)]


def _id_batch(shape: Shape, batch_size: int, indices: np.ndarray[tuple[int], np.dtype[np.int64]]) -> IdBatch:
    lengths = torch.tensor(shape.ids_per_bag).repeat_interleave(batch_size)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return IdBatch(batch_size, torch.from_numpy(indices), offsets, list(_tables(shape, batch_size, indices)))


def _tables(
    shape: Shape, batch_size: int, indices: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> Iterator[tuple[Tensor, Tensor]]:
    starts = accumulate((batch_size * L for L in shape.ids_per_bag), initial=0)
    for start, L in zip(starts, shape.ids_per_bag, strict=False):
        ids = torch.from_numpy(indices[start : start + batch_size * L]).view(batch_size, L)
        yield ids, torch.arange(batch_size + 1) * L
