"""Features with numbers of bags of their own, against the same batch with every sample's bags written out."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import dlrm_rs
from batches import batch
from dlrm_rs import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

# Sum and mean in turn, a table of two features, and one that is pooled by max.
TABLES = [
    EmbeddingBagConfig("t1", 10, 3, ["f1"], pooling="sum"),
    EmbeddingBagConfig("t2", 7, 16, ["f2", "f3"], pooling="mean"),
    EmbeddingBagConfig("t3", 5, 33, ["f4"], pooling="max"),
]
KEYS = ["f1", "f2", "f3", "f4"]
ROWS = [10, 7, 7, 5]
STRIDES = [2, 5, 1, 3]
SAMPLES = 9


def varying(*, weighted: bool = False, dtype: torch.dtype = torch.int64) -> KeyedJaggedTensor:
    """A random batch; every feature's bags are used, in any order."""
    parts = [batch(rows, stride, dtype) for rows, stride in zip(ROWS, STRIDES, strict=True)]
    inverse = torch.stack([torch.cat([torch.randperm(n), torch.randint(0, n, (SAMPLES - n,))]) for n in STRIDES])
    return KeyedJaggedTensor(
        KEYS,
        torch.cat([part.indices for part in parts]),
        torch.cat([part.weights for part in parts]) if weighted else None,
        lengths=torch.cat([part.offsets.diff() for part in parts]),
        stride_per_key_per_rank=[[n] for n in STRIDES],
        inverse_indices=(KEYS, inverse),
    )


def written_out(jagged: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same batch, with the bags of every sample."""
    names, inverse = jagged.inverse_indices_or_none() or ([], torch.empty(0))
    values: list[Tensor] = []
    weights: list[Tensor] = []
    for key in jagged:
        feature = jagged[key]
        bags = feature.to_dense()
        factors = None if feature.weights_or_none() is None else feature.weights().split(feature.lengths().tolist())
        for bag in inverse[names.index(key)].tolist():
            values.append(bags[bag])
            weights += [] if factors is None else [factors[bag]]
    lengths = torch.tensor([len(bag) for bag in values])
    return KeyedJaggedTensor.from_lengths_sync(
        jagged.keys(), torch.cat(values), lengths, torch.cat(weights) if weights else None
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_is_the_batch_written_out(dtype: torch.dtype) -> None:
    collection = EmbeddingBagCollection(TABLES)
    jagged = varying(dtype=dtype)
    assert (jagged.stride(), jagged.stride_per_key()) == (SAMPLES, STRIDES)
    pooled, expected = collection(jagged), collection(written_out(jagged))
    assert pooled.keys() == KEYS
    assert torch.equal(pooled.values(), expected.values())
    grad = torch.randn_like(expected.values())
    weights = list(collection.parameters())
    got = torch.autograd.grad(pooled.values(), weights, grad)
    assert_close(got, torch.autograd.grad(expected.values(), weights, grad))


def test_weighted_and_in_another_order_and_fused() -> None:
    jagged = varying(weighted=True)
    expected = EmbeddingBagCollection(TABLES[:2], is_weighted=True, optimizer=dlrm_rs.optim.SGD(lr=0.1))
    collection = EmbeddingBagCollection(TABLES[:2], is_weighted=True, optimizer=dlrm_rs.optim.SGD(lr=0.1))
    collection.load_state_dict(expected.state_dict())
    for module, features in ((collection, jagged.permute([3, 2, 0, 1])), (expected, written_out(jagged))):
        module(features).values().square().sum().backward()
    assert_close(collection.state_dict(), expected.state_dict())


def test_parts_keep_their_strides_and_samples() -> None:
    jagged = varying(weighted=True)
    first, second = jagged.split([1, 3])
    assert (first.stride_per_key(), second.stride_per_key()) == ([2], [5, 1, 3])
    assert second.stride() == SAMPLES
    permuted = jagged.permute([3, 0])
    assert permuted.stride_per_key() == [3, 2]
    for part in (second, permuted, jagged.to("cpu")):
        assert torch.equal(part["f4"].lengths(), jagged["f4"].lengths())
        assert torch.equal(part["f4"].weights(), jagged["f4"].weights())
        assert part.inverse_indices_or_none() is not None
    assert jagged.to("meta").inverse_indices_or_none()[1].is_meta  # type: ignore[index]


def test_equal_strides_need_no_inverse() -> None:
    collection = EmbeddingBagCollection(TABLES[:1])
    values, lengths = torch.tensor([1, 2, 3]), torch.tensor([2, 0, 1])
    plain = KeyedJaggedTensor.from_lengths_sync(["f1"], values, lengths)
    ranks = KeyedJaggedTensor(["f1"], values, lengths=lengths, stride_per_key_per_rank=[[2, 1]])
    assert torch.equal(collection(ranks).values(), collection(plain).values())


def test_a_bad_id_is_told_by_feature_and_bag() -> None:
    jagged = KeyedJaggedTensor(
        ["f1", "f2", "f3"],
        torch.tensor([1, 1, 7]),
        lengths=torch.tensor([1, 0, 1, 1]),
        stride_per_key_per_rank=[[1], [2], [1]],
        inverse_indices=(["f1", "f2", "f3"], torch.zeros(3, 4, dtype=torch.int64)),
    )
    with pytest.raises(IndexError, match=r"indices\[2\].*'t2'.* got 7.*feature 2, bag 0"):
        EmbeddingBagCollection(TABLES[:2])(jagged)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, ValueError, r"expected inverse_indices where features differ .* \[2, 1\], got None; give the"),
        ({"inverse_indices": (["f1"], torch.zeros(1, 4).long())}, ValueError, r"got \['f1'\], which lack \['f2'\]"),
        (
            {"inverse_indices": (["f1", "f2"], torch.zeros(4).long())},
            ValueError,
            r"shape \(F, B\) with F = 2, .*\(4,\)",
        ),
        ({"inverse_indices": (["f1", "f2"], torch.zeros(2, 4))}, TypeError, "inverse_indices: .* got torch.float32"),
        (
            {"inverse_indices": (["f1", "f2"], torch.tensor([[0, 1], [0, 1]]))},
            IndexError,
            "bags of feature 'f2', 0 to 0, got 0 to 1",
        ),
        (
            {"inverse_indices": (["f1", "f2"], torch.tensor([[0, -1], [0, 0]]))},
            IndexError,
            "bags of feature 'f1', 0 to 1, got -1 to 0",
        ),
        ({"stride_per_key_per_rank": [[2], [2]]}, ValueError, r"lengths: expected the sum of .* 4 bags, got 3"),
        ({"stride_per_key_per_rank": [[3]]}, ValueError, "stride_per_key_per_rank: .* each of 2 keys"),
        ({"stride_per_key_per_rank": [[4], [-1]]}, ValueError, "stride_per_key_per_rank: expected numbers of at least"),
        ({"stride": 3}, ValueError, "stride: expected None with stride_per_key_per_rank, got 3"),
        (
            {"stride_per_key_per_rank": None, "inverse_indices": (["f1", "f2"], torch.zeros(2, 4).long())},
            ValueError,
            "inverse_indices: expected None without stride_per_key_per_rank",
        ),
    ],
)
def test_what_cannot_be(options: dict[str, object], error: type[Exception], words: str) -> None:
    tables = [EmbeddingBagConfig("t1", 10, 3, ["f1"]), EmbeddingBagConfig("t2", 10, 4, ["f2"])]
    arguments = {"stride_per_key_per_rank": [[2], [1]], **options}
    with pytest.raises(error, match=words):
        EmbeddingBagCollection(tables)(
            KeyedJaggedTensor(["f1", "f2"], torch.tensor([1, 2, 3]), lengths=torch.ones(3).long(), **arguments)  # type: ignore[arg-type]
        )
