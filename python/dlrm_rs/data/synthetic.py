"""A click log with a known teacher, made on the fly: any number of rows, nothing stored, every batch by its number.

The teacher is a logistic model: `logit = bias + dense @ w + sum over features of effects(ids of the bag)`. The effect
of an id is a hash of (seed, table, id), so tables of 10^8 rows cost nothing until they are looked up. Knowing the
teacher, one knows the best log loss and AUC that any model can have: `ClickLog.bayes`.

Batch `k` of a log is a function of the log's arguments and `k` alone, whoever asks and in whatever order: workers of a
`DataLoader` can share the work.

Letters: `T` tables (one feature each), `N` rows of a table, `B` batch, `P` dense features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from dlrm_rs.data.batch import Batch
from dlrm_rs.data.zipf import MAX_ROWS, scatter, zipf_ranks
from dlrm_rs.keyed_jagged import KeyedJaggedTensor

__all__ = ["SHAPES", "ClickLog", "Shape"]

# Standard deviations of the two parts of the teacher's logit, and its bias: about one sample in four is a click.
DENSE_DEVIATION = 0.6
SPARSE_DEVIATION = 1.2
BIAS = -1.5

# What is drawn apart gets a stream apart.
_TEACHER, _BATCH = 0, 1


@dataclass(frozen=True)
class Shape:
    """Sizes of a log and of the tables it needs.

    Attributes:
        num_embeddings: `N` of every table.
        embedding_dim: `D`.
        ids_per_bag: Ids in every bag of every table.
        batch_sizes: Usual `B`.
        zipf: Usual exponent of the ids' frequencies; 0 is uniform.
    """

    num_embeddings: tuple[int, ...]
    embedding_dim: int
    ids_per_bag: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    zipf: float


# fmt: off
_KAGGLE_ROWS = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652,
    2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)
_MLPERF_ROWS = (
    40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938, 155, 4, 976,
    14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36,
)
_MLPERF_IDS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
# fmt: on

# KAGGLE has the sizes of Criteo's Kaggle log, MLPERF those of MLPerf's DLRM-DCNv2 with the tables capped at 2 M rows.
# The others have a trait each: one id a bag, many ids a bag, long bags over large tables, a giant table, many tables.
SHAPES: Mapping[str, Shape] = {
    "KAGGLE": Shape(_KAGGLE_ROWS, 16, (1,) * 26, (128, 2048), 1.05),
    "SINGLE": Shape((1_000_000,) * 26, 64, (1,) * 26, (16, 2048), 1.05),
    "MULTI": Shape((1_000_000,) * 8, 128, (40,) * 8, (512,), 1.05),
    "MLPERF": Shape(tuple(min(rows, 2_000_000) for rows in _MLPERF_ROWS), 128, _MLPERF_IDS, (128, 2048), 1.15),
    "RM1": Shape((4_000_000,) * 8, 32, (80,) * 8, (64, 512), 1.09),
    "RM2": Shape((500_000,) * 32, 64, (120,) * 32, (64, 512), 1.09),
    "RM3": Shape((2_000_000,) * 10, 32, (20,) * 10, (64, 512), 1.09),
    "GIANT": Shape((16_000_000,), 64, (32,), (4096,), 0.0),
    "MANY": Shape((20_000,) * 400, 64, (14,) * 400, (256,), 1.05),
}


class ClickLog(Dataset[Batch]):
    """Batches of a synthetic click log; item `k` is batch `k`.

    Args:
        num_embeddings: `N` of every table, 1 to 2^32; feature `t` is named `"t{t}"`.
        batch_size: `B`.
        num_batches: The log's length in batches.
        ids_per_bag: Ids in every bag of every table, or one number for all of them; 0 leaves the bags empty.
        dense_features: `P`.
        zipf: Exponent of the ids' frequencies, about 1.05 to 1.2 in click logs; 0 is uniform.
        seed: Of the teacher and of the batches.

    Raises:
        ValueError: A size is out of range, or `ids_per_bag` is not one per table.

    Example:
        >>> log = ClickLog([100_000_000, 50], batch_size=4, num_batches=1000, ids_per_bag=[2, 1], seed=7)
        >>> dense, sparse, labels = log[999]
        >>> dense.shape, sparse.lengths().tolist(), labels.shape
        (torch.Size([4, 13]), [2, 2, 2, 2, 1, 1, 1, 1], torch.Size([4]))
        >>> torch.equal(sparse.values(), log[999].sparse.values())
        True

        With two workers, each making whole batches:

        >>> loader = torch.utils.data.DataLoader(log, batch_size=None, num_workers=2)
    """

    def __init__(
        self,
        num_embeddings: Sequence[int],
        batch_size: int,
        num_batches: int,
        ids_per_bag: Sequence[int] | int = 1,
        dense_features: int = 13,
        zipf: float = 1.05,
        seed: int = 0,
    ) -> None:
        T = len(num_embeddings)
        ids = [ids_per_bag] * T if isinstance(ids_per_bag, int) else list(ids_per_bag)
        if len(ids) != T:
            raise ValueError(f"ids_per_bag: expected one number per table, {T}, got {len(ids)}")
        for rows in num_embeddings:
            _check_range("num_embeddings", rows, 1, MAX_ROWS)
        for count in ids:
            _check_range("ids_per_bag", count, 0)
        _check_range("batch_size", batch_size, 1)
        _check_range("num_batches", num_batches, 0)
        _check_range("dense_features", dense_features, 1)
        _check_range("seed", seed, 0)
        if not 0 <= zipf < np.inf:
            raise ValueError(f"zipf: expected a finite number of at least 0, got {zipf}")
        self.num_embeddings = list(num_embeddings)
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.ids_per_bag = ids
        self.dense_features = dense_features
        self.zipf = zipf
        self.seed = seed
        direction = np.random.default_rng([_TEACHER, seed]).standard_normal(dense_features)
        self._dense_weights = direction * (DENSE_DEVIATION / np.linalg.norm(direction))  # (P,)

    @classmethod
    def from_shape(
        cls, name: str, batch_size: int, num_batches: int, zipf: float | None = None, seed: int = 0
    ) -> ClickLog:
        """The log of one of `SHAPES`.

        Args:
            name: One of `SHAPES`.
            batch_size: `B`.
            num_batches: The log's length in batches.
            zipf: Exponent; None is the shape's own.
            seed: Of the teacher and of the batches.

        Raises:
            ValueError: There is no such shape.
        """
        if name not in SHAPES:
            raise ValueError(f"name: expected one of {list(SHAPES)}, got {name!r}")
        shape = SHAPES[name]
        exponent = shape.zipf if zipf is None else zipf
        return cls(shape.num_embeddings, batch_size, num_batches, shape.ids_per_bag, zipf=exponent, seed=seed)

    def keys(self) -> list[str]:
        """The names of the features."""
        return [f"t{table}" for table in range(len(self.num_embeddings))]

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, k: int) -> Batch:
        batch, _ = self._make(k)
        return batch

    def probabilities(self, k: int) -> torch.Tensor:
        """What the teacher gives the samples of batch `k`, `(B,)` float64: the best prediction there is."""
        _, probabilities = self._make(k)
        return torch.from_numpy(probabilities)

    def bayes(self, batches: Sequence[int]) -> tuple[float, float]:
        """AUC and log loss (nats) of the teacher itself on these batches: the bounds that no model passes but by luck.

        Args:
            batches: Their numbers.

        Raises:
            ModuleNotFoundError: scikit-learn is not installed.
        """
        try:
            from sklearn.metrics import log_loss, roc_auc_score
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('scikit-learn is missing: pip install "dlrm_rs[demo]"', name="sklearn") from error
        made = [self._make(k) for k in batches]
        labels = np.concatenate([batch.labels.numpy() for batch, _ in made])
        probabilities = np.concatenate([probabilities for _, probabilities in made])
        return float(roc_auc_score(labels, probabilities)), float(log_loss(labels, probabilities))

    def _make(self, k: int) -> tuple[Batch, NDArray[np.float64]]:
        """Batch `k` and its teacher's probabilities, `(B,)`."""
        if not 0 <= k < self.num_batches:
            # IndexError also ends a `for` loop over the log.
            raise IndexError(f"k: expected a batch from 0 to {self.num_batches - 1}, got {k}")
        B, T = self.batch_size, len(self.num_embeddings)
        rng = np.random.default_rng([_BATCH, self.seed, k])
        dense = rng.standard_normal((B, self.dense_features), dtype=np.float32)
        logit = BIAS + dense @ self._dense_weights  # (B,)
        values = []
        for table, (rows, count) in enumerate(zip(self.num_embeddings, self.ids_per_bag, strict=True)):
            ids = scatter(zipf_ranks(rng, self.zipf, rows, B * count), rows).reshape(B, count)
            effects = id_effects(self.seed, table, ids)  # of unit variance each
            logit += effects.sum(axis=1) * (SPARSE_DEVIATION / np.sqrt(max(T * count, 1)))
            values.append(ids.ravel())
        probabilities = 1 / (1 + np.exp(-logit))
        labels = (rng.random(B) < probabilities).astype(np.float32)
        sparse = KeyedJaggedTensor.from_lengths_sync(
            keys=self.keys(),
            values=torch.from_numpy(np.concatenate(values) if values else np.empty(0, dtype=np.int64)),
            lengths=torch.tensor(self.ids_per_bag, dtype=torch.int64).repeat_interleave(B),
        )
        return Batch(torch.from_numpy(dense), sparse, torch.from_numpy(labels)), probabilities


def id_effects(seed: int, table: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """The teacher's effect of every id: uniform with mean 0 and variance 1 over the ids of a table.

    Args:
        seed: Of the teacher.
        table: The table's number.
        ids: Any shape.

    Returns:
        The shape of `ids`, float64; the same for the same arguments on every machine.

    Example:
        >>> id_effects(seed=0, table=3, ids=np.array([0, 1, 99_999_999])).round(3).tolist()
        [-0.414, 0.561, -1.145]
    """
    # One key per (seed, table), so that tables do not share a stream; then a hash of every id.
    key = np.random.SeedSequence([_TEACHER, seed, table]).generate_state(1, np.uint64)[0]
    bits = _mix(ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key)
    unit: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
    return (2 * unit - 1) * math.sqrt(3)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: expected {expected}, got {value}")
