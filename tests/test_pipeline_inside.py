"""What a model and a user do inside of a pipeline's loop beside training on its batches."""

import copy
import queue
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clicks import Updates, assert_same_state, click_log, click_model, dense_adam, trained
from dlrm_rs import DLRM, EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, Pipeline
from dlrm_rs.data import Batch
from dlrm_rs.devices import StandIn
from dlrm_rs.optim import SGD

pytestmark = pytest.mark.usefixtures("one_torch_thread")

Remade = Callable[[KeyedJaggedTensor, Tensor], KeyedJaggedTensor]


class Weighted(nn.Module):
    """Looks up what `remade` makes of the features and of a Parameter that scales their weights."""

    def __init__(self, remade: Remade) -> None:
        super().__init__()
        torch.manual_seed(2)
        table = EmbeddingBagConfig("t", 50, 4, ["a", "b"])
        self.embeddings = EmbeddingBagCollection([table], is_weighted=True, optimizer=SGD(lr=0.5))
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.top = nn.Linear(8, 1)
        self.remade = remade

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        pooled: Tensor = self.top(self.embeddings(self.remade(features, self.scale)).values())
        return pooled


def weighted_batches(steps: int) -> list[KeyedJaggedTensor]:
    generator = torch.Generator().manual_seed(0)

    def batch() -> KeyedJaggedTensor:
        lengths = torch.randint(0, 4, (32,), generator=generator)
        ids = torch.randint(0, 50, (int(lengths.sum()),), generator=generator)
        return KeyedJaggedTensor(["a", "b"], ids, torch.rand(len(ids), generator=generator), lengths=lengths)

    return [batch() for _ in range(steps)]


def train(model: Weighted, batches: Iterable[KeyedJaggedTensor]) -> list[float]:
    optimizer = torch.optim.SGD([model.scale, *model.top.parameters()], lr=0.1)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = (model(batch) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def remade(batch: KeyedJaggedTensor, **other: Any) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        other.get("keys", batch.keys()), batch.values(), other.get("weights", batch.weights()), other.get("lengths")
    )


@pytest.mark.parametrize(
    "made_in_model",
    [
        lambda batch, scale: remade(batch, weights=batch.weights() * scale.detach(), lengths=batch.lengths()),
        lambda batch, scale: remade(batch, weights=batch.weights() * scale, lengths=batch.lengths()),
        lambda batch, _: remade(batch, lengths=batch.lengths().flip(0)),
        lambda batch, _: remade(batch, keys=["b", "a"], lengths=batch.lengths()),
    ],
    ids=["weights", "weights that are learned", "bags", "names"],
)
def test_what_the_model_makes_of_the_features_is_not_taken_for_them(made_in_model: Remade) -> None:
    """The ids are the same tensor."""
    batches, model = weighted_batches(6), Weighted(made_in_model)
    with pytest.raises(RuntimeError, match=r"features: expected the features of the batch.*features="):
        train(model, Pipeline(model, None, batches).batches())
    model.embeddings.requires_grad_(False)
    plain = Weighted(made_in_model)
    plain.embeddings.requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    assert train(model, Pipeline(model, None, batches).batches()) == train(plain, batches)
    assert model.scale.item() == plain.scale.item()


def test_features_that_are_made_anew_of_the_same_tensors_are_the_batch() -> None:
    def same(batch: KeyedJaggedTensor, _: Tensor) -> KeyedJaggedTensor:
        return remade(batch, lengths=batch.lengths())

    batches, plain, model = weighted_batches(6), Weighted(same), Weighted(same)
    assert train(model, Pipeline(model, None, batches).batches()) == train(plain, batches)


@pytest.mark.parametrize("latency", [None, 0.003])
def test_lookups_by_ids_and_offsets_see_whole_steps_and_are_not_trained(latency: float | None) -> None:
    device = None if latency is None else StandIn(latency)
    plain, model = click_model(), click_model(device=device)
    ids, offsets, log = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 3, 4]), click_log(12)
    seen, expected = [], []
    optimizer = dense_adam(plain)
    for batch in log:
        trained(plain, optimizer, [batch])
        with torch.no_grad():
            expected.append(lookup(plain, ids, offsets).tolist())
    for _ in Pipeline(model, dense_adam(model), log):
        with torch.no_grad():
            seen.append(lookup(model, ids, offsets).tolist())
    assert seen == expected
    assert len({str(rows) for rows in seen}) == len(log)
    for _ in Pipeline(model, dense_adam(model), log):
        with pytest.raises(RuntimeError, match="indices: expected the features of the batch"):
            lookup(model, ids, offsets)


def lookup(model: DLRM, ids: Tensor, offsets: Tensor) -> Tensor:
    assert isinstance(model.embeddings, EmbeddingBagCollection)
    return model.embeddings.lookup(ids, offsets)


@pytest.mark.parametrize("updates", ["exact", "stale"])
@pytest.mark.parametrize("wait", ["synchronize", "state_dict"])
def test_to_wait_for_updates_is_not_to_wait_for_the_next_batch(updates: Updates, wait: str) -> None:
    """The loop makes it."""
    log, given = click_log(6), queue.Queue[Batch | None]()

    def loader() -> Iterator[Batch]:
        while (batch := given.get(timeout=60)) is not None:
            yield batch

    given.put(log[0])
    plain, model = click_model(), click_model()
    optimizer = dense_adam(plain)
    pipeline = Pipeline(model, dense_adam(model), loader(), updates=updates)
    for number, _ in enumerate(pipeline, 1):
        trained(plain, optimizer, log[number - 1 : number])
        if wait == "synchronize":
            pipeline.synchronize()
        assert_same_state(model, plain)  # by its state_dict
        given.put(log[number] if number < len(log) else None)


@pytest.mark.parametrize("way", ["deepcopy", "deepcopy of the optimizer", "save", "save of a module"])
def test_copies_made_inside_of_the_loop_are_of_whole_steps(tmp_path: Path, way: str) -> None:
    log, model, plain = click_log(6), click_model(device=StandIn(0.02)), click_model()
    optimizer = dense_adam(plain)
    for number, _ in enumerate(Pipeline(model, dense_adam(model), log)):
        trained(plain, optimizer, [log[number]])
        assert isinstance(model.embeddings, EmbeddingBagCollection)
        if way == "deepcopy":
            assert_same_state(copy.deepcopy(model), plain)
        elif way == "save":
            torch.save(model, tmp_path / "model.pt")
            assert_same_state(torch.load(tmp_path / "model.pt", weights_only=False), plain)
        elif way == "save of a module":
            torch.save(model.embeddings.embedding_bags, tmp_path / "bags.pt")
            loaded = torch.load(tmp_path / "bags.pt", weights_only=False).state_dict()
            expected = plain.get_submodule("embeddings.embedding_bags").state_dict()
            assert all(torch.equal(loaded[name], expected[name]) for name in expected)
        else:
            assert isinstance(plain.embeddings, EmbeddingBagCollection)
            assert plain.embeddings.fused_optimizer is not None
            copied_optimizer = copy.deepcopy(model.embeddings.fused_optimizer)
            assert copied_optimizer is not None
            sums = copied_optimizer.state_dict()["state"]
            expected = plain.embeddings.fused_optimizer.state_dict()["state"]
            assert all(torch.equal(sums[t][name], expected[t][name]) for t in expected for name in expected[t])
    copied = copy.deepcopy(model)
    assert trained(copied, dense_adam(copied), log) == trained(model, dense_adam(model), log)
