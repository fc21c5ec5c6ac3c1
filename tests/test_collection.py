"""`EmbeddingBagCollection` against one torch module per feature."""

import dataclasses
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import dlrm_rs
from batches import batch
from dlrm_rs import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

BATCH = 6

# Poolings and dims that alternate, a table with two features, and features that are not sorted.
TABLES = [
    EmbeddingBagConfig("t1", 10, 3, ["f2"], pooling="sum"),
    EmbeddingBagConfig("t2", 7, 16, ["f1", "f4"], pooling="mean"),
    EmbeddingBagConfig("t3", 5, 33, ["f3"], pooling="sum"),
    EmbeddingBagConfig("t4", 12, 1, ["f0"], pooling="mean"),
]
FEATURES = ["f2", "f1", "f4", "f3", "f0"]

# The same, the gradients of some divided by how often a row occurs.
SCALED = [dataclasses.replace(table, scale_grad_by_freq=table.name != "t3") for table in TABLES]
ROWS = dict(zip(FEATURES, [10, 7, 7, 5, 12], strict=True))


def features(keys: Sequence[str] = FEATURES, *, weighted: bool = False) -> KeyedJaggedTensor:
    """A random batch of these features."""
    parts = [batch(ROWS[key], BATCH) for key in keys]
    return KeyedJaggedTensor.from_lengths_sync(
        keys,
        torch.cat([part.indices for part in parts]),
        torch.cat([part.offsets.diff() for part in parts]),
        torch.cat([part.weights for part in parts]) if weighted else None,
    )


def expected(collection: EmbeddingBagCollection, jagged: KeyedJaggedTensor) -> Tensor:
    """The same by torch, feature by feature, differentiable in the collection's weights."""
    columns = []
    for table in collection.embedding_bag_configs():
        weight = collection.get_parameter(f"embedding_bags.{table.name}.weight")
        parts = [jagged[feature] for feature in table.feature_names]
        ids = [part.values() for part in parts]
        # All features at once, for occurrences are counted in all of them together.
        every = torch.nn.functional.embedding(torch.cat(ids), weight, scale_grad_by_freq=table.scale_grad_by_freq)
        for part, rows in zip(parts, every.split([len(of_part) for of_part in ids]), strict=True):  # (L, D)
            if part.weights_or_none() is not None:
                rows = rows * part.weights()[:, None]
            bags = torch.split(rows, part.lengths().tolist())
            pooled = torch.stack([bag.sum(0) for bag in bags])  # (B, D)
            if table.pooling == "mean":
                pooled = pooled / part.lengths().clamp(min=1)[:, None]
            columns.append(pooled)
    return torch.cat(columns, dim=1)  # (B, sum of D)


def assert_same(collection: EmbeddingBagCollection, jagged: KeyedJaggedTensor) -> None:
    """Forward and the gradient of every table."""
    out = collection(jagged)
    assert_close(out.values(), expected(collection, jagged))
    grad = torch.randn_like(out.values())
    weights = list(collection.parameters())
    got = torch.autograd.grad(out.values(), weights, grad)
    assert_close(got, torch.autograd.grad(expected(collection, jagged), weights, grad))


@pytest.mark.parametrize("tables", [TABLES, SCALED], ids=["plain", "scaled by frequency"])
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_torch(weighted: bool, tables: list[EmbeddingBagConfig]) -> None:
    collection = EmbeddingBagCollection(tables, is_weighted=weighted)
    assert_same(collection, features(weighted=weighted))


def test_output_is_in_the_order_of_tables_and_their_features() -> None:
    collection = EmbeddingBagCollection(TABLES)
    pooled = collection(features())
    assert pooled.keys() == FEATURES == collection.embedding_names()
    assert pooled.length_per_key() == [3, 16, 16, 33, 1] == collection.lengths_per_embedding()
    assert pooled["f3"].shape == (BATCH, 33)


@pytest.mark.parametrize("weighted", [False, True])
def test_features_in_another_order_and_more_of_them(weighted: bool) -> None:
    collection = EmbeddingBagCollection(TABLES[:3], is_weighted=weighted)
    assert_same(collection, features(sorted(FEATURES), weighted=weighted))


def test_features_in_order_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    collection = EmbeddingBagCollection(TABLES)
    monkeypatch.delattr(KeyedJaggedTensor, "permute")
    collection(features())


def test_max_pooling() -> None:
    rows = torch.tensor([[1.0, 6.0], [3.0, 4.0], [5.0, 2.0]])
    collection = EmbeddingBagCollection(
        [
            EmbeddingBagConfig("t1", 3, 1, ["a"], init_fn=nn.init.ones_),
            EmbeddingBagConfig("t2", 3, 2, ["b"], pooling="max", init_fn=lambda weight: weight.copy_(rows)),
        ]
    )
    out = collection.lookup(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 4, 4]))
    assert out.tolist() == [[1, 3, 6], [1, 0, 0]]
    out.sum().backward()
    grads = [weight.grad.tolist() for weight in collection.parameters() if weight.grad is not None]
    assert grads == [[[2], [0], [0]], [[0, 1], [1, 0], [0, 0]]]


def test_a_feature_of_several_tables_is_named_with_the_table() -> None:
    tables = [EmbeddingBagConfig("t1", 10, 3, ["a", "b"]), EmbeddingBagConfig("t2", 10, 4, ["b"])]
    collection = EmbeddingBagCollection(tables)
    jagged = KeyedJaggedTensor.from_lengths_sync(["a", "b"], torch.tensor([1, 2, 3]), torch.tensor([1, 2]))
    pooled = collection(jagged)
    assert pooled.keys() == ["a", "b@t1", "b@t2"]
    assert_close(pooled.values(), expected(collection, jagged))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lookup(dtype: torch.dtype) -> None:
    collection = EmbeddingBagCollection(TABLES)
    jagged = features()
    out = collection.lookup(jagged.values().to(dtype), jagged.offsets().to(dtype))
    assert torch.equal(out, collection(jagged).values())


def test_batch_of_none() -> None:
    collection = EmbeddingBagCollection(TABLES)
    out = collection.lookup(torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert out.shape == (0, 69)
    out.sum().backward()


def test_gradient_of_weights_of_ids() -> None:
    collection = EmbeddingBagCollection(TABLES, is_weighted=True, optimizer=dlrm_rs.optim.SGD(lr=0.1))
    jagged = features(weighted=True)
    weights = jagged.weights().requires_grad_()
    (wanted,) = torch.autograd.grad(expected(collection, jagged).square().sum(), weights)
    before = {name: weight.clone() for name, weight in collection.state_dict().items()}
    collection(jagged).values().square().sum().backward()
    assert_close(weights.grad, wanted)  # that of the rows before the update
    assert all(not torch.equal(weight, before[name]) for name, weight in collection.state_dict().items())


@pytest.mark.parametrize("tables", [TABLES, SCALED], ids=["plain", "scaled by frequency"])
@pytest.mark.parametrize("update", ["backward", "step"])
def test_fused_sgd_is_torchs_sgd(update: Any, tables: list[EmbeddingBagConfig]) -> None:
    fused = EmbeddingBagCollection(tables, optimizer=dlrm_rs.optim.SGD(lr=0.1, update=update))
    assert fused.fused_optimizer is not None
    plain = EmbeddingBagCollection(tables)
    plain.load_state_dict(fused.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in [features() for _ in range(5)]:
        fused.fused_optimizer.zero_grad()
        fused(step).values().square().sum().backward()
        fused.fused_optimizer.step()
        optimizer.zero_grad()
        plain(step).values().square().sum().backward()
        optimizer.step()
    assert_close(fused.state_dict(), plain.state_dict())
    assert update == "step" or all(weight.grad is None for weight in fused.parameters())


def test_state_dict_keys_and_start() -> None:
    collection = EmbeddingBagCollection(
        [EmbeddingBagConfig("a", 400, 8, ["x"]), EmbeddingBagConfig("b", 4, 8, ["y"], init_fn=nn.init.ones_)]
    )
    state = collection.state_dict()
    assert list(state) == ["embedding_bags.a.weight", "embedding_bags.b.weight"]
    assert 0.049 < state["embedding_bags.a.weight"].abs().max() <= 0.05  # U(-sqrt(1/N), sqrt(1/N))
    assert abs(state["embedding_bags.a.weight"].mean()) < 0.002
    assert torch.equal(state["embedding_bags.b.weight"], torch.ones(4, 8))


def test_prints_its_tables() -> None:
    collection = EmbeddingBagCollection([EmbeddingBagConfig("a", 400, 8, ["x"])], optimizer=dlrm_rs.optim.SGD(lr=1))
    text = repr(collection)
    assert "features=['x'], is_weighted=False, optimizer=sgd" in text
    assert "(a): Table(400, 8, dtype=fp32)" in text


def test_accepts_torchrecs_classes_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrec = types.ModuleType("a_torchrec")

    class Pooling:
        value = "MEAN"

    class Data:
        value = "FP32"

    class Jagged(KeyedJaggedTensor):
        pass

    class Keyed(dlrm_rs.KeyedTensor):
        pass

    Jagged.__name__ = "KeyedJaggedTensor"
    Jagged.__module__ = torchrec.__name__
    torchrec.KeyedTensor = Keyed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, torchrec.__name__, torchrec)
    options: dict[str, Any] = {"pooling": Pooling(), "data_type": Data()}
    collection = EmbeddingBagCollection([EmbeddingBagConfig("t", 5, 2, ["a"], **options)])
    pooled = collection(Jagged(["a"], torch.tensor([0, 1]), lengths=torch.tensor([2])))
    assert type(pooled) is Keyed
    assert_close(pooled.values()[0], next(collection.parameters())[:2].mean(0))
