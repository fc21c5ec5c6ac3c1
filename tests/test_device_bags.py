"""Tables on the device beside those of the host: the same numbers, ids and weights checked before anything is done."""

import copy
import pickle
from typing import Any

import pytest
import torch

from dlrm_rs import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from dlrm_rs.devices import StandIn
from dlrm_rs.optim import SGD
from dlrm_rs.placement import PlacedEmbeddingBags

TABLES = [
    EmbeddingBagConfig("t0", 30, 8, ["a", "b"]),
    EmbeddingBagConfig("t1", 20, 4, ["c"], pooling="mean"),
    EmbeddingBagConfig("t2", 10, 8, ["b", "d"], data_type="bf16"),
    EmbeddingBagConfig("t3", 40, 4, ["e"], pooling="max"),
]
SUMS = [TABLES[0], TABLES[2]]


def batch(keys: str = "abcde", is_weighted: bool = False, batch_size: int = 6) -> KeyedJaggedTensor:
    torch.manual_seed(5)
    lengths = torch.randint(0, 4, (len(keys) * batch_size,))
    L = int(lengths.sum())
    weights = torch.rand(L) if is_weighted else None
    return KeyedJaggedTensor(list(keys), torch.randint(0, 10, (L,)), weights, lengths=lengths)


def pair(tables: list[EmbeddingBagConfig], **options: Any) -> tuple[PlacedEmbeddingBags, EmbeddingBagCollection]:
    placed = PlacedEmbeddingBags(tables, [table.name for table in tables if table.name != "t3"], "cpu", **options)
    collection = EmbeddingBagCollection(tables, **options)
    weights = {name.split(".")[-2]: weight for name, weight in placed.named_parameters()}
    with torch.no_grad():
        for name, weight in collection.named_parameters():
            weight.copy_(weights[name.split(".")[-2]])
    return placed, collection


@pytest.mark.parametrize(
    ("tables", "is_weighted"), [(TABLES, False), (TABLES[:3], False), (SUMS, True)], ids=["some", "all", "weighted"]
)
@pytest.mark.parametrize("keys", ["abcde", "ecxbad"])  # in the order of the tables, or not
def test_pooled_rows_and_gradients_are_those_of_a_collection(
    tables: list[EmbeddingBagConfig], is_weighted: bool, keys: str
) -> None:
    placed, collection = pair(tables, is_weighted=is_weighted)
    features, same = batch(keys, is_weighted), batch(keys, is_weighted)
    for one in (features, same):
        if is_weighted:
            one.weights().requires_grad_()
    got, expected = placed(features), collection(same)
    assert got.keys() == expected.keys() == collection.embedding_names()
    torch.testing.assert_close(got.values(), expected.values(), rtol=1e-2, atol=1e-3)  # torch sums bf16 in bf16
    for pooled in (got, expected):
        pooled.values().square().sum().backward()
    by_name = {name.split(".")[-2]: weight.grad for name, weight in placed.named_parameters()}
    for name, weight in collection.named_parameters():
        torch.testing.assert_close(by_name[name.split(".")[-2]], weight.grad, rtol=2e-2, atol=2e-2)
    if is_weighted:
        torch.testing.assert_close(features.weights().grad, same.weights().grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("batch_size", [0, 1])
def test_small_batches(batch_size: int) -> None:
    placed, collection = pair(TABLES)
    got, expected = placed(batch(batch_size=batch_size)), collection(batch(batch_size=batch_size))
    torch.testing.assert_close(got.values(), expected.values(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("bad", [20, -1])
def test_a_bad_id_is_an_error_that_says_where(bad: int) -> None:
    placed = PlacedEmbeddingBags(TABLES, ["t1", "t2"], "cpu", optimizer=SGD(lr=0.1))
    values = torch.tensor([1, 2, 3, 4, 5, bad, 6, 7, 8, 9])  # of feature c, bag 1
    features = KeyedJaggedTensor(list("abcde"), values, lengths=torch.ones(10, dtype=torch.int64))
    message = rf"features\['c'\]: expected 0 <= id < 20, the rows of table 't1', got {bad} \(bag 1\)"
    with pytest.raises(IndexError, match=message):
        placed(features)


def test_weights_and_offsets_that_cannot_be_are_refused() -> None:
    placed = PlacedEmbeddingBags(SUMS, ["t2"], "cpu")
    with pytest.raises(ValueError, match="expected no weights, as these tables have is_weighted=False, got some"):
        placed(batch("abd", is_weighted=True))
    weighted = PlacedEmbeddingBags(SUMS, ["t2"], "cpu", is_weighted=True)
    with pytest.raises(ValueError, match=r"expected a weight for every id, as these .* is_weighted=True, got none"):
        weighted(batch("abd"))
    with pytest.raises(ValueError, match=r"lack \['d'\]"):
        placed(batch("ab"))
    for lengths in ([1, 3], [1, 1], [2, -1], [-1, 2]):
        features = KeyedJaggedTensor(["b", "d"], torch.tensor([1, 2, 3]), lengths=torch.tensor(lengths))
        with pytest.raises(ValueError, match=r"features.offsets\(\): expected to begin at 0, never to fall"):
            PlacedEmbeddingBags(SUMS[1:], ["t2"], "cpu")(features)
    ones = torch.ones(3, dtype=torch.int64)
    variable = KeyedJaggedTensor(["b", "d"], ones, lengths=ones, stride_per_key_per_rank=[[1], [2]])
    with pytest.raises(ValueError, match="expected as many bags of every feature, as tables are on the device"):
        PlacedEmbeddingBags(SUMS[1:], ["t2"], "cpu")(variable)


def test_names_and_devices_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"on_device: expected names of tables, got \['huge'\]"):
        PlacedEmbeddingBags(TABLES, ["huge"], "cpu")
    with pytest.raises(ValueError, match="output_device: expected 'cpu' or 'cuda', got 'meta'"):
        PlacedEmbeddingBags(SUMS, ["t0", "t2"], "meta")


def test_tables_beside_a_stand_in_copied_and_pickled() -> None:
    placed = PlacedEmbeddingBags(TABLES, ["t1"], StandIn(0.0))
    expected = placed(batch()).values()
    for other in (copy.deepcopy(placed), pickle.loads(pickle.dumps(placed))):
        assert torch.equal(other(batch()).values(), expected)
