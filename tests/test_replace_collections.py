"""`replace_embeddings` of collections made as TorchRec makes them: what becomes of them, and what is refused.

`test_torchrec.py` has the same of TorchRec's own, where it is installed.
"""

import abc
import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import dlrm_rs
from batches import batch
from dlrm_rs import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, KeyedTensor
from dlrm_rs.jagged import JaggedTensor


class Interface(abc.ABC, nn.Module):
    """What TorchRec's collections inherit from."""


class EmbeddingBagCollection(Interface):
    """One `nn.EmbeddingBag` per table, called in turn."""

    def __init__(self, tables: Sequence[EmbeddingBagConfig], is_weighted: bool = False) -> None:
        super().__init__()
        self._embedding_bag_configs = list(tables)
        self._is_weighted = is_weighted
        self.embedding_bags = nn.ModuleDict(
            {
                table.name: nn.EmbeddingBag(
                    table.num_embeddings, table.embedding_dim, mode=table.pooling, include_last_offset=True
                )
                for table in tables
            }
        )

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._embedding_bag_configs

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        parts = {
            name: self.embedding_bags[table.name](
                features[name].values(), features[name].offsets(), features[name].weights_or_none()
            )
            for table in self._embedding_bag_configs
            for name in table.feature_names
        }
        return KeyedTensor(list(parts), [part.shape[1] for part in parts.values()], torch.cat([*parts.values()], dim=1))


class EmbeddingCollection(Interface):
    """One `nn.Embedding` per table, called in turn."""

    def __init__(self, tables: Sequence[EmbeddingConfig], need_indices: bool = False) -> None:
        super().__init__()
        self._embedding_configs = list(tables)
        self._need_indices = need_indices
        self.embeddings = nn.ModuleDict(
            {table.name: nn.Embedding(table.num_embeddings, table.embedding_dim) for table in tables}
        )

    def embedding_configs(self) -> list[EmbeddingConfig]:
        return self._embedding_configs

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        return {
            name: JaggedTensor(
                self.embeddings[table.name](features[name].values()),
                features[name].values() if self._need_indices else None,
                features[name].lengths(),
            )
            for table in self._embedding_configs
            for name in table.feature_names
        }


class Scaled(EmbeddingBagCollection):
    """A subclass with a behaviour of its own."""


class ShardedEmbeddingBagCollection(nn.Module):
    """Its rows are elsewhere."""


EmbeddingBagCollection.__module__ = EmbeddingCollection.__module__ = "torchrec.modules.embedding_modules"
ShardedEmbeddingBagCollection.__module__ = "torchrec.distributed.embeddingbag"


def bags(is_weighted: bool = False) -> EmbeddingBagCollection:
    pooling = "sum" if is_weighted else "mean"
    tables = [
        EmbeddingBagConfig("t1", 10, 3, ["f1"]),
        EmbeddingBagConfig("t2", 7, 16, ["f3", "f2"], pooling=pooling),
        EmbeddingBagConfig("t3", 12, 33, ["f4"]),
    ]
    return EmbeddingBagCollection(tables, is_weighted)


def rows() -> EmbeddingCollection:
    return EmbeddingCollection([EmbeddingConfig("t1", 10, 5, ["f1", "f4"]), EmbeddingConfig("t2", 7, 5, ["f2"])], True)


def features(keys: Sequence[str] = ("f4", "f1", "f2", "f3"), *, weighted: bool = False) -> KeyedJaggedTensor:
    parts = [batch(7, 6) for _ in keys]
    return KeyedJaggedTensor.from_lengths_sync(
        keys,
        torch.cat([part.indices for part in parts]),
        torch.cat([part.offsets.diff() for part in parts]),
        torch.cat([part.weights for part in parts]) if weighted else None,
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_bags_pool_and_train_as_before(weighted: bool) -> None:
    theirs = bags(weighted)
    ours: Any = copy.deepcopy(theirs)
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.1) for model in (theirs, ours)]
    assert dlrm_rs.replace_embeddings(ours) is ours
    assert type(ours) is dlrm_rs.EmbeddingBagCollection
    for jagged in (features(weighted=weighted), features(["f1", "f3", "f2", "f4"], weighted=weighted)):
        outs = [model(jagged) for model in (theirs, ours)]
        assert outs[1].keys() == outs[0].keys() == ["f1", "f3", "f2", "f4"]
        assert_close(outs[1].values(), outs[0].values())
        for optimizer, out in zip(optimizers, outs, strict=True):
            optimizer.zero_grad()
            out.values().square().sum().backward()
            optimizer.step()
    assert_close(ours.state_dict(), theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_rows_are_those_of_before() -> None:
    theirs = rows()
    ours: Any = dlrm_rs.replace_embeddings(copy.deepcopy(theirs))
    assert type(ours) is dlrm_rs.EmbeddingCollection
    jagged = features()
    expected, got = theirs(jagged), ours(jagged)
    assert list(got) == list(expected) == ["f1", "f4", "f2"]
    for name, part in expected.items():
        assert torch.equal(got[name].values(), part.values())
        assert torch.equal(got[name].weights(), part.weights())
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == ["embeddings.t1.weight", "embeddings.t2.weight"]


def test_beside_torchs_own_and_in_two_places() -> None:
    collection = bags()
    model = nn.ModuleDict({"a": collection, "b": nn.EmbeddingBag(5, 2), "c": nn.ModuleList([collection])})
    weights = dict(model.named_parameters())
    dlrm_rs.replace_embeddings(model, optimizer=dlrm_rs.optim.SGD(lr=0.1))
    assert type(model["b"]) is dlrm_rs.EmbeddingBag
    assert model["a"] is model["c"][0]  # type: ignore[index]
    assert all(weight is weights[name] for name, weight in model.named_parameters())
    before = copy.deepcopy(model.state_dict())
    model["a"](features()).values().square().sum().backward()
    assert not torch.equal(model.state_dict()["a.embedding_bags.t3.weight"], before["a.embedding_bags.t3.weight"])


def test_options_of_the_embeddings_count() -> None:
    collection = bags()
    one: Any = collection.embedding_bags["t1"]
    one.padding_idx = 3
    ours: Any = dlrm_rs.replace_embeddings(collection)
    jagged = KeyedJaggedTensor.from_lengths_sync(
        ["f1", "f3", "f2", "f4"], torch.tensor([3, 1, 3]), torch.tensor([3, 0, 0, 0])
    )
    assert torch.equal(ours(jagged)["f1"][0], one.weight[1])


def test_quantized_and_copied() -> None:
    theirs = bags()
    ours = dlrm_rs.replace_embeddings(copy.deepcopy(theirs), dtype="int8")
    again = copy.deepcopy(ours)
    jagged = features()
    assert torch.equal(again(jagged).values(), ours(jagged).values())
    assert_close(ours(jagged).values(), theirs(jagged).values(), rtol=0.1, atol=0.1)
    assert "embedding_bags.t1.weight_codes" in ours.state_dict()


def with_bag(change: Callable[[nn.ModuleDict], Any]) -> nn.Module:
    model = nn.Sequential(bags())
    holders: Any = model[0].embedding_bags
    change(holders)
    return model


def also_outside() -> nn.Module:
    collection = bags()
    return nn.ModuleDict({"0": collection, "again": nn.ModuleList([collection.embedding_bags["t1"]])})


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (lambda: nn.Sequential(Scaled([EmbeddingBagConfig("t", 5, 2, ["f"])])), {}, TypeError, "got Scaled at '0', a"),
        (
            lambda: nn.Sequential(ShardedEmbeddingBagCollection()),
            {},
            TypeError,
            "replace the embeddings before",
        ),
        (
            lambda: with_bag(lambda bags: bags["t1"].register_forward_hook(lambda *args: None)),
            {},
            ValueError,
            "no hooks on '0.embedding_bags.t1', .* hook the collection instead",
        ),
        (
            lambda: with_bag(lambda bags: setattr(bags["t2"], "sparse", True)),
            {},
            ValueError,
            "sparse of '0.embedding_bags.t2': expected False",
        ),
        (lambda: with_bag(lambda bags: setattr(bags["t2"], "max_norm", 1.0)), {}, ValueError, "max_norm of .* use opt"),
        (
            lambda: with_bag(lambda bags: setattr(bags["t2"], "forward", None)),
            {},
            ValueError,
            "expected torch's forward at '0.embedding_bags.t2'",
        ),
        (
            lambda: with_bag(lambda bags: bags.update({"t1": nn.Linear(1, 1)})),
            {},
            TypeError,
            "expected a torch.nn.EmbeddingBag at '0.embedding_bags.t1', .* got Linear",
        ),
        (
            lambda: with_bag(lambda bags: bags.update({"t1": nn.EmbeddingBag(10, 3).double()})),
            {},
            TypeError,
            "weight of '0.embedding_bags.t1': .* got torch.float64",
        ),
        (also_outside, {}, ValueError, "'0.embedding_bags.t1' to be in its collection alone, .* got 'again'"),
        (
            lambda: with_bag(lambda bags: nn.init.constant_(bags["t1"].weight, torch.nan)),  # type: ignore[arg-type]
            {"dtype": "int8"},
            ValueError,
            "row 0 of table 't1': expected finite numbers, got NaN",
        ),
    ],
)
def test_what_is_refused_and_leaves_the_model(
    make: Callable[[], nn.Module], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = make()
    classes = [type(module) for module in model.modules()]
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=words):
        dlrm_rs.replace_embeddings(model, **options)
    assert [type(module) for module in model.modules()] == classes
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state


def test_a_collection_of_another_layout_is_refused() -> None:
    class Slotted(Interface):
        """A version of theirs that Python cannot turn into ours."""

        __slots__ = ("extra",)

    Slotted.__name__, Slotted.__module__ = "EmbeddingBagCollection", "torchrec.modules.embedding_modules"
    with pytest.raises(TypeError, match=r"one of another layout .* make a dlrm_rs.EmbeddingBagCollection of the same"):
        dlrm_rs.replace_embeddings(nn.Sequential(Slotted()))
