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
from dlrm_rs.bench.arguments import FORMATS, Arguments
from dlrm_rs.bench.rows import row_bytes
from dlrm_rs.data.synthetic import SHAPES, Shape
from dlrm_rs.data.zipf import scatter, zipf_ranks
from dlrm_rs.machine import cache_bytes

# Which distributions a shape is timed with: its own Zipf exponent, uniform, or both. Click logs are never uniform, but
# uniform ids show memory at its slowest.
UNIFORM_TOO = ("SINGLE", "MULTI", "RM1", "RM2", "RM3")

# Batches in rotation: as many as read twice the last-level cache, and this at least, before a batch comes again.
ROTATION_BYTES = 64 << 20
# But never fewer than 8, and no more than can be made in seconds.
FEWEST_BATCHES = 8
MOST_BATCHES = 4096
CACHE_LINE = 64


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


def not_there(arguments: Arguments) -> Iterator[str]:
    """What is asked for and cannot be timed, in words.

    Example:
        >>> list(not_there(Arguments(families=("lookup", "quantize"), shapes=("GIANT",), distributions=("zipf",))))
        ['lookup GIANT: there are no zipf ids']
    """
    for family in arguments.families:
        unknown = [name for name in arguments.formats if name not in FORMATS[family]]
        if unknown:
            yield f"{family}: expected row formats of {', '.join(FORMATS[family])}, got {', '.join(unknown)}"
        for name in arguments.shapes_of(family):
            if family != "quantize" and not cases(name, arguments, family):
                yield f"{family} {name}: there are no {' or '.join(arguments.distributions)} ids"


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


def batches_in_rotation(shape: Shape, batch_size: int, row_format: str) -> int:
    """How many batches read the bytes of a rotation, by the cache lines of their rows.

    Example:
        >>> shape = Shape((1 << 20,), 64, (1,), (2,), 0.0)
        >>> batches_in_rotation(shape, 1 << 20, "fp32"), batches_in_rotation(shape, 1, "fp32")
        (8, 4096)
    """
    lines = math.ceil(row_bytes(row_format, shape.embedding_dim) / CACHE_LINE)
    of_batch = batch_size * sum(shape.ids_per_bag) * lines * CACHE_LINE
    wanted = math.ceil(max(ROTATION_BYTES, 2 * cache_bytes()) / of_batch)
    return min(max(wanted, FEWEST_BATCHES), MOST_BATCHES)


def id_batches(shape: Shape, case: Case, row_format: str, seed: int = 0) -> list[IdBatch]:
    """Batches to be taken in rotation; the same for the same arguments, on one machine.

    Example:
        >>> shape = Shape((10, 20), 4, (1, 3), (2,), 0.0)
        >>> batch = id_batches(shape, Case(2, 0.0, 1), "fp32")[0]
        >>> batch.offsets.tolist(), [ids.shape for ids, _ in batch.tables]
        ([0, 1, 2, 5, 8], [torch.Size([2, 1]), torch.Size([2, 3])])
    """
    count = batches_in_rotation(shape, case.batch_size, row_format)
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
