"""The synthetic click log: determinism, Zipf's law, and a teacher that is what it says."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dlrm_rs.data.batch import Batch
from dlrm_rs.data.synthetic import SHAPES, ClickLog, id_effects
from dlrm_rs.data.zipf import MAX_ROWS, scatter, zipf_ranks


def assert_same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.dense, b.dense)
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(a.sparse.values(), b.sparse.values())
    assert torch.equal(a.sparse.lengths(), b.sparse.lengths())


def test_batch_k_is_the_same_in_any_order_and_any_log() -> None:
    log, other = (ClickLog([1000, 7, 10**8], 64, 10, [1, 3, 2], seed=5) for _ in range(2))
    forward = [log[k] for k in range(10)]
    for k in (9, 0, 4):
        assert_same(other[k], forward[k])
    assert not torch.equal(forward[0].sparse.values(), forward[1].sparse.values())
    reseeded = ClickLog([1000, 7, 10**8], 64, 10, [1, 3, 2], seed=6)
    assert not torch.equal(reseeded[0].dense, forward[0].dense)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_make_the_same_batches() -> None:
    log = ClickLog([1000, 50], 32, 6)
    loader = DataLoader(log, batch_size=None, num_workers=2)
    for k, batch in enumerate(loader):
        assert_same(batch, log[k])


def test_shapes_dtypes_and_bounds() -> None:
    log = ClickLog([10, MAX_ROWS, 1], 16, 1, [4, 2, 0], dense_features=5)
    dense, sparse, labels = log[0]
    assert dense.shape == (16, 5)
    assert dense.dtype is labels.dtype is torch.float32
    assert sparse.keys() == ["t0", "t1", "t2"]
    assert sparse.values().dtype is torch.int64
    assert sparse.length_per_key() == [64, 32, 0]
    assert sparse.stride() == 16
    for key, rows in zip(sparse.keys(), log.num_embeddings, strict=True):
        ids = sparse[key].values()
        assert ((ids >= 0) & (ids < rows)).all()
    assert set(labels.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.05, 1.2, 3.0])
@pytest.mark.parametrize("rows", [1, 2, 3, 50])
def test_zipf_frequencies_of_every_id(exponent: float, rows: int) -> None:
    size = 200_000
    counts = np.bincount(zipf_ranks(np.random.default_rng(1), exponent, rows, size), minlength=rows)
    mass = np.arange(1, rows + 1, dtype=np.float64) ** -exponent
    expected = size * mass / mass.sum()
    assert counts.sum() == size
    assert len(counts) == rows
    # Pearson's statistic has mean rows - 1 and variance 2 * (rows - 1); ids expected less than five times are left out.
    often = expected >= 5
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert statistic < rows - 1 + 5 * np.sqrt(2 * (rows - 1)) + 1e-9


@pytest.mark.parametrize("exponent", [1.0, 1.05, 1.2])
def test_zipf_shares_of_a_large_table(exponent: float) -> None:
    rows, size = 2**31 + 11, 400_000
    ranks = zipf_ranks(np.random.default_rng(2), exponent, rows, size)
    # The sum of the first million terms, and the Euler-Maclaurin remainder of the rest.
    head = np.cumsum(np.arange(1, 10**6 + 1, dtype=np.float64) ** -exponent)

    def integral(x: float) -> float:
        return math.log(x) if exponent == 1 else (x ** (1 - exponent) - 1) / (1 - exponent)

    tail = integral(rows + 0.5) - integral(10**6 + 0.5)
    for below in (1, 10, 1000, 10**6):
        share = head[below - 1] / (head[-1] + tail)
        sigma = np.sqrt(share * (1 - share) / size)
        assert (ranks < below).mean() == pytest.approx(share, abs=5 * sigma)


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 10, 97, 1000, 4096, 99_999])
def test_scatter_is_a_bijection(rows: int) -> None:
    assert np.array_equal(np.sort(scatter(np.arange(rows), rows)), np.arange(rows))


def test_scatter_stays_within_the_largest_table() -> None:
    for rows in (MAX_ROWS, MAX_ROWS - 1, 2 * (2**31 - 1), 2**31 - 1):
        ranks = np.array([0, 1, rows // 2, rows - 1])
        ids = scatter(ranks, rows)
        assert ((ids >= 0) & (ids < rows)).all()
        assert len(set(ids.tolist())) == 4


def test_effects_are_uniform_with_unit_variance_and_independent() -> None:
    ids = np.arange(200_000)
    a, b, c = id_effects(0, 0, ids), id_effects(0, 1, ids), id_effects(1, 0, ids)
    for effects in (a, b, c):
        assert effects.mean() == pytest.approx(0, abs=0.01)
        assert effects.var() == pytest.approx(1, abs=0.01)
    assert np.abs(a).max() <= np.sqrt(3)
    correlations = np.corrcoef([a, b, c, np.roll(a, 1)])
    assert np.abs(correlations - np.eye(4)).max() < 0.02
    assert np.array_equal(id_effects(0, 0, ids[::-1]), a[::-1])


def test_labels_follow_the_teacher() -> None:
    log = ClickLog([1000, 50], 5000, 8, zipf=0.5)
    labels = torch.cat([log[k].labels for k in range(8)]).double()
    probabilities = torch.cat([log.probabilities(k) for k in range(8)])
    # Calibrated in every fifth of the predictions.
    for chunk in probabilities.argsort().chunk(5):
        p = probabilities[chunk]
        sigma = (p * (1 - p)).sum().sqrt() / len(p)
        assert labels[chunk].mean().item() == pytest.approx(p.mean().item(), abs=5 * sigma.item())


def test_bayes_is_what_the_teacher_scores() -> None:
    log = ClickLog([1000, 50], 5000, 8, zipf=0.5)
    auc, loss = log.bayes(range(8))
    p = torch.cat([log.probabilities(k) for k in range(8)])
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean().item()
    assert loss == pytest.approx(entropy, abs=0.01)
    assert 0.7 < auc < 0.9


def test_shapes_by_name() -> None:
    for name, shape in SHAPES.items():
        assert len(shape.ids_per_bag) == len(shape.num_embeddings), name
        assert ClickLog.from_shape(name, 1, 1)[0].sparse.length_per_key() == list(shape.ids_per_bag)
    assert sum(SHAPES["KAGGLE"].num_embeddings) == 33_762_577
    assert sum(SHAPES["MLPERF"].ids_per_bag) == 214
    with pytest.raises(ValueError, match=r"name: expected one of .*, got 'TERABYTE'"):
        ClickLog.from_shape("TERABYTE", 1, 1)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="ids_per_bag: expected one number per table, 2, got 1"):
        ClickLog([10, 10], 4, 1, [1])
    with pytest.raises(ValueError, match=f"num_embeddings: expected 1 to {MAX_ROWS}, got 0"):
        ClickLog([0], 4, 1)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        ClickLog([10], 0, 1)
    with pytest.raises(ValueError, match="zipf: expected a finite number of at least 0, got -1"):
        ClickLog([10], 4, 1, zipf=-1)
    with pytest.raises(IndexError, match="k: expected a batch from 0 to 2, got 3"):
        ClickLog([10], 4, 3)[3]
    with pytest.raises(ValueError, match="exponent"):
        zipf_ranks(np.random.default_rng(0), float("nan"), 10, 1)
    with pytest.raises(ValueError, match="rows: expected 1 to"):
        zipf_ranks(np.random.default_rng(0), 1.0, MAX_ROWS + 1, 1)
