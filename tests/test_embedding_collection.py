"""`EmbeddingCollection` against one torch module per table."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import dlrm_rs
from dlrm_rs import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

TABLES = [
    EmbeddingConfig("t1", 10, 17, ["f2"]),
    EmbeddingConfig("t2", 7, 17, ["f1", "f4"]),
    EmbeddingConfig("t3", 5, 17, ["f3", "f1"]),
]
NAMES = ["f2", "f1@t2", "f4", "f3", "f1@t3"]

# The same, the gradients of one divided by how often a row occurs.
SCALED = [dataclasses.replace(table, scale_grad_by_freq=table.name == "t3") for table in TABLES]
KEYS = ["f1", "f2", "f3", "f4", "unused"]


def features(dtype: torch.dtype = torch.int64, **options: Any) -> KeyedJaggedTensor:
    """A random batch of 4, with empty bags, duplicates, and a feature that no table has."""
    lengths = torch.randint(0, 4, (len(KEYS) * 4,))
    return KeyedJaggedTensor(KEYS, torch.randint(0, 5, (int(lengths.sum()),)).to(dtype), lengths=lengths, **options)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_matches_torch(dtype: torch.dtype) -> None:
    collection = EmbeddingCollection(TABLES)
    jagged = features(dtype)
    out = collection(jagged)
    assert list(out) == NAMES == [name for names in collection.embedding_names_by_table() for name in names]
    expected = {
        name: nn.functional.embedding(jagged[name[:2]].values(), collection.get_parameter(f"embeddings.{table}.weight"))
        for name, table in zip(NAMES, ["t1", "t2", "t2", "t3", "t3"], strict=True)
    }
    for name in NAMES:
        assert torch.equal(out[name].values(), expected[name])
        assert torch.equal(out[name].lengths(), jagged[name[:2]].lengths())
        assert out[name].weights_or_none() is None
    weights = list(collection.parameters())
    got = torch.autograd.grad(sum(part.values().square().sum() for part in out.values()), weights)
    wanted = torch.autograd.grad(sum(part.square().sum() for part in expected.values()), weights)  # type: ignore[arg-type]
    assert_close(got, wanted)


def test_gradients_scaled_by_frequency() -> None:
    collection, jagged = EmbeddingCollection(SCALED), features()
    out = collection(jagged)
    weights = list(collection.parameters())
    got = torch.autograd.grad([part.values().square().sum() for part in out.values()], weights)
    wanted: list[torch.Tensor] = []
    for table, weight in zip(SCALED, weights, strict=True):
        ids = torch.cat([jagged[feature].values() for feature in table.feature_names])
        rows = nn.functional.embedding(ids, weight, scale_grad_by_freq=table.scale_grad_by_freq)
        wanted += torch.autograd.grad(rows.square().sum(), weight)
    assert_close(got, tuple(wanted))


def test_ids_along() -> None:
    jagged = features()
    out = EmbeddingCollection(TABLES, need_indices=True)(jagged)
    assert torch.equal(out["f1@t3"].weights(), jagged["f1"].values())


def test_features_may_have_numbers_of_bags_of_their_own() -> None:
    values, lengths = torch.tensor([1, 2, 3, 4]), torch.tensor([2, 1, 0, 1])
    jagged = KeyedJaggedTensor(["a", "b"], values, lengths=lengths, stride_per_key_per_rank=[[1], [3]])
    collection = EmbeddingCollection([EmbeddingConfig("t", 5, 2, ["b", "a"])])
    out = collection(jagged)
    assert out["a"].lengths().tolist() == [2]
    assert out["b"].lengths().tolist() == [1, 0, 1]
    assert torch.equal(out["b"].values(), collection.get_parameter("embeddings.t.weight")[3:])


def test_fused() -> None:
    fused = EmbeddingCollection(TABLES, optimizer=dlrm_rs.optim.SGD(lr=0.1))
    plain = EmbeddingCollection(TABLES)
    plain.load_state_dict(fused.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in [features() for _ in range(3)]:
        for collection in (fused, plain):
            optimizer.zero_grad()
            torch.stack([part.values().square().sum() for part in collection(step).values()]).sum().backward()
        optimizer.step()
    assert_close(fused.state_dict(), plain.state_dict())


def test_quantized_rows() -> None:
    collection = EmbeddingCollection([EmbeddingConfig("t", 5, 4, ["a"], data_type="int8")])
    jagged = KeyedJaggedTensor.from_lengths_sync(["a"], torch.tensor([3, 0, 3]), torch.tensor([1, 2]))
    rows = collection(jagged)["a"].values()
    dlrm_rs.dequantize(collection)
    assert torch.equal(rows, collection.get_parameter("embeddings.t.weight")[torch.tensor([3, 0, 3])])
    assert list(collection.state_dict()) == ["embeddings.t.weight"]


def test_what_it_tells() -> None:
    collection = EmbeddingCollection(TABLES, need_indices=True)
    assert (collection.embedding_dim(), collection.need_indices(), collection.device.type) == (17, True, "cpu")
    assert collection.embedding_configs() == TABLES
    assert "(t2): Table(7, 17, dtype=fp32)" in repr(collection)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"one embedding_dim, got \[2, 3\]; make a collection for each"):
        EmbeddingCollection([EmbeddingConfig("a", 5, 2, ["x"]), EmbeddingConfig("b", 5, 3, ["y"])])
    collection = EmbeddingCollection(TABLES)
    jagged = KeyedJaggedTensor.from_lengths_sync(KEYS[:4], torch.tensor([1, 2, 5, 1]), torch.tensor([1, 1, 1, 1]))
    with pytest.raises(IndexError, match=r"indices\[3\].*'t3'.* got 5.*feature 3, bag 0"):
        collection(jagged)
    with pytest.raises(ValueError, match=r"features: expected the keys .* which lack \['f4'\]"):
        collection(jagged.split([3, 1])[0])
    with pytest.raises(TypeError, match="expected a KeyedJaggedTensor, got Tensor"):
        collection(torch.tensor([1]))
