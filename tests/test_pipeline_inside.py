"""What a model and a user do inside of a pipeline's loop beside training on its batches."""

import copy
import queue
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlrm_rs
from clicks import Updates, assert_same_state, click_log, click_model, dense_adam, pipelined, trained
from dlrm_rs import DLRM, EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, Pipeline
from dlrm_rs.data import Batch
from dlrm_rs.devices import StandIn
from dlrm_rs.optim import SGD
from dlrm_rs.pipeline.lane import Visit
from dlrm_rs.pipeline.pipeline import click_loss

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


class Plus(nn.Module):
    """Numbers added to the rows, element by element, whose gradient is that of the rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        tables = [EmbeddingBagConfig("t", 50, 4, ["a", "b"])]
        self.embeddings = EmbeddingBagCollection(tables, is_weighted=True, optimizer=SGD(lr=0.5))
        self.plus = nn.Parameter(torch.zeros(16, 8))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        rows: Tensor = self.embeddings(features).values() + self.plus
        return rows


def test_the_update_is_by_the_gradient_as_it_was_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is also that of a Parameter, which is clipped in place before the tables are updated."""

    def train(model: Plus, batches: Iterable[KeyedJaggedTensor]) -> list[float]:
        losses = []
        for batch in batches:
            model.plus.grad = None
            loss = (model(batch) - 1).square().sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([model.plus], 1e-3)
            losses.append(loss.item())
        return losses

    def late(visit: Visit, *part: Any) -> None:
        time.sleep(0.01)
        update(visit, *part)

    update = Visit.update
    monkeypatch.setattr(Visit, "update", late)
    batches, plain, model = weighted_batches(8), Plus(), Plus()
    assert train(model, Pipeline(model, None, batches).batches()) == train(plain, batches)


def test_who_looks_a_batch_up_twice_has_the_rows_twice() -> None:
    def twice(batch: KeyedJaggedTensor, embeddings: EmbeddingBagCollection) -> list[float]:
        first, second = embeddings(batch).values(), embeddings(batch).values()
        first.mul_(2)
        return [first.sum().item(), second.sum().item()]

    batches = weighted_batches(4)
    model = Plus()
    model.embeddings.requires_grad_(False)
    expected = [twice(batch, model.embeddings) for batch in batches]
    assert [twice(batch, model.embeddings) for batch in Pipeline(model, None, batches).batches()] == expected


def test_rows_that_were_looked_at_before_are_not_those_that_are_trained() -> None:
    def train(model: Plus, batches: Iterable[KeyedJaggedTensor]) -> list[float]:
        losses = []
        for batch in batches:
            with torch.no_grad():
                looked_at = model.embeddings(batch).values()
            loss = model.embeddings(batch).values().square().sum()
            looked_at.zero_()
            loss.backward()
            losses.append(loss.item())
        return losses

    batches, plain, model = weighted_batches(6), Plus(), Plus()
    assert train(model, Pipeline(model, None, batches).batches()) == train(plain, batches)


Train = Callable[[DLRM, Iterable[Batch], Callable[[], None]], list[float]]


def with_evaluation(model: DLRM, batches: Iterable[Batch], _: Callable[[], None]) -> list[float]:
    """The loss of every batch before, while and after it is trained, by a model that works on its rows in place."""

    def double(_: nn.Module, __: Any, pooled: KeyedTensor) -> None:
        pooled.values().mul_(2)

    optimizer = dense_adam(model)
    hook = model.embeddings.register_forward_hook(double)
    losses = []
    for batch in batches:
        with torch.no_grad():
            losses += [click_loss(model, batch).item(), click_loss(model, batch).item()]
        losses += trained(model, optimizer, [batch])
        with torch.no_grad():
            losses.append(click_loss(model, batch).item())
    hook.remove()
    return losses


def with_changes(change: Callable[[DLRM, int], Any], when: str = "after") -> Train:
    """The losses of a loop in which something is done to the model."""

    def train(model: DLRM, batches: Iterable[Batch], synchronize: Callable[[], None]) -> list[float]:
        optimizer = dense_adam(model)
        losses = []
        for number, batch in enumerate(batches):
            if when == "before":
                change(model, number)
            optimizer.zero_grad()
            loss = click_loss(model, batch)
            if when == "between":
                change(model, number)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if when == "after":
                synchronize()
                change(model, number)
        return losses

    return train


def freeze(model: DLRM, number: int) -> None:
    model.embeddings.requires_grad_(number % 4 > 1)


def freeze_one(model: DLRM, number: int) -> None:
    model.get_parameter("embeddings.embedding_bags.t0.weight").requires_grad_(number % 2 == 1)


def write(model: DLRM, number: int) -> None:
    with torch.no_grad():
        model.get_parameter(f"embeddings.embedding_bags.t{number % 4}.weight").clamp_(-0.02, 0.02)


def replace(model: DLRM, number: int) -> None:
    bag = model.get_submodule(f"embeddings.embedding_bags.t{number % 4}")
    assert isinstance(bag.weight, nn.Parameter)
    if number % 3 == 1:
        bag.weight.data = bag.weight.detach() * 0.5
    elif number % 3 == 2:
        bag.weight = nn.Parameter(bag.weight.detach() * 0.5)


def fill(model: DLRM, number: int) -> None:
    if number == 3:
        torch.manual_seed(number)
        assert isinstance(model.embeddings, EmbeddingBagCollection)
        model.embeddings.reset_parameters()


def requantize(model: DLRM, number: int) -> None:
    if number in (3, 7):
        dlrm_rs.quantize(model, "int8" if number == 3 else "int4")
    if number == 9:
        dlrm_rs.dequantize(model)


def give_up_the_optimizer(model: DLRM, number: int) -> None:
    if number == 4:
        dlrm_rs.quantize(model, "int8", keep_optimizer=False)


class Load:
    """A checkpoint of the first step."""

    def __call__(self, model: DLRM, number: int) -> None:
        assert isinstance(model.embeddings, EmbeddingBagCollection)
        optimizer = model.embeddings.fused_optimizer
        assert optimizer is not None
        if number == 0:
            self.saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        elif number % 3 == 0:
            model.load_state_dict(self.saved[0], assign=number == 6)
            optimizer.load_state_dict(self.saved[1])


@pytest.mark.parametrize(
    "train_with",
    [
        lambda: with_evaluation,
        lambda: with_changes(freeze),
        lambda: with_changes(freeze, "before"),
        lambda: with_changes(freeze, "between"),
        lambda: with_changes(freeze_one, "before"),
        lambda: with_changes(write),
        lambda: with_changes(replace),
        lambda: with_changes(fill),
        lambda: with_changes(requantize),
        lambda: with_changes(requantize, "between"),
        lambda: with_changes(give_up_the_optimizer),
        lambda: with_changes(Load()),
    ],
    ids=[
        "evaluation",
        "freeze",
        "freeze before",
        "freeze between",
        "freeze one",
        "write",
        "replace",
        "fill",
        "quantize",
        "quantize between",
        "give up the optimizer",
        "load",
    ],
)
@pytest.mark.parametrize("device", [None, (0.004, True), (0.004, False)], ids=["cpu", "stand-in", "no copies"])
def test_what_is_done_to_the_tables_inside_of_the_loop_is_seen_by_the_next_batch(
    train_with: Callable[[], Train], device: tuple[float, bool] | None
) -> None:
    log = click_log(12)
    plain = click_model()
    model = click_model(device=None if device is None else StandIn(device[0], copies=device[1]))
    expected = train_with()(plain, log, lambda: None)
    pipeline = Pipeline(model, None, log)
    assert train_with()(model, pipeline.batches(), pipeline.synchronize) == expected
    got = model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("updates", ["exact", "stale"])
def test_what_is_loaded_stays_when_the_loop_is_left(updates: Updates) -> None:
    model = click_model(device=StandIn(0.02))
    saved = copy.deepcopy(model.state_dict())
    for number, _ in enumerate(Pipeline(model, dense_adam(model), click_log(9), updates=updates)):
        if number == 3:
            model.load_state_dict(saved)
            break
    got = model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in saved.items())


def test_tables_without_an_optimizer_have_to_stay_frozen() -> None:
    model = click_model(None)
    model.embeddings.requires_grad_(False)
    with pytest.raises(ValueError, match="expected weights of collection 'embeddings' that stay frozen"):  # noqa: PT012
        for _ in Pipeline(model, dense_adam(model), click_log(6)):
            model.embeddings.requires_grad_(True)


def test_torch_notices_that_rows_have_been_updated() -> None:
    model = click_model()
    weight = model.get_parameter("embeddings.embedding_bags.t0.weight")
    pipelined(model, click_log(1))
    before = weight._version
    pipelined(model, click_log(3))
    assert weight._version >= before + 3


def test_the_gradient_of_the_rows_is_left_before_layers_below_have_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late these ran in forward."""
    order = []
    leave = Visit.leave

    def noted(visit: Visit, grad: Tensor) -> None:
        order.append("rows")
        leave(visit, grad)

    monkeypatch.setattr(Visit, "leave", noted)
    model = click_model()
    for weight in model.bottom.parameters():
        weight.register_post_accumulate_grad_hook(lambda _: order.append("bottom"))
    pipelined(model, click_log(2), split_backward=False)
    assert order == ["rows", "bottom", "bottom"] * 2


def test_a_collection_that_has_taken_the_place_of_another_is_the_one_that_takes_part() -> None:
    log, plain, model = click_log(6), click_model(), click_model()
    pipeline = Pipeline(model, dense_adam(model), log)
    model.embeddings = copy.deepcopy(model.embeddings)
    assert isinstance(model.embeddings, EmbeddingBagCollection)
    assert model.embeddings._tables.lane is None
    losses: list[float] = []
    for loss in pipeline:
        assert model.embeddings._tables.lane is not None
        losses.append(loss.item())
    assert losses == trained(plain, dense_adam(plain), log)
