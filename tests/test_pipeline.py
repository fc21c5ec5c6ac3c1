"""`Pipeline` against the plain loop and a loop that is one step stale, bit for bit."""

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlrm_rs
from clicks import (
    NAMES,
    assert_same_state,
    click_log,
    click_model,
    dense_adam,
    pipelined,
    plain_losses,
    state,
    trained,
)
from dlrm_rs import Pipeline
from dlrm_rs.data import Batch, ClickLog
from dlrm_rs.devices import Device, StandIn
from dlrm_rs.optim import SGD, Adagrad, Adam, OptimizerSpec, RowWiseAdagrad
from dlrm_rs.pipeline.lane import Visit
from dlrm_rs.pipeline.parting import Parting, Trials
from dlrm_rs.pipeline.pipeline import click_loss

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def stale_losses(model: dlrm_rs.DLRM, log: list[Batch]) -> list[float]:
    """Every batch looked up before the update by the one before it."""
    optimizer = dense_adam(model)
    losses = []
    with torch.no_grad():
        rows = model.embed(log[0].sparse)
    for batch, following in zip(log, [*log[1:], None], strict=True):
        with torch.no_grad():
            next_rows = rows if following is None else model.embed(following.sparse)
        rows.requires_grad_()
        optimizer.zero_grad()
        logits = model.score(batch.dense, rows)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.squeeze(1), batch.labels)
        loss.backward()
        optimizer.step()
        assert rows.grad is not None
        # This lookup is for the update alone: but for max pooling its rows do not matter.
        model.embed(batch.sparse).backward(rows.grad)
        losses.append(loss.item())
        rows = next_rows
    return losses


# Beside the CPU itself, a device that copies, and takes longer than the tables do.
with_stand_in = pytest.mark.parametrize(
    "make_device", [lambda: None, lambda: StandIn(0.001, 2e8)], ids=["CPU", "other"]
)
MakeDevice = Callable[[], Device | None]

two_optimizers = pytest.mark.parametrize(
    "optimizer", [RowWiseAdagrad(lr=0.05), Adam(lr=0.01)], ids=lambda spec: spec.algorithm
)


@two_optimizers
@pytest.mark.parametrize(
    ("data_type", "hot_rows"), [("fp32", 0), ("fp16", 0), ("bf16", 0), ("int8", 0), ("int8", 0.05)]
)
@with_stand_in
def test_exact_updates_give_the_bits_of_the_plain_loop(
    optimizer: OptimizerSpec, data_type: str, hot_rows: float, make_device: MakeDevice
) -> None:
    log = click_log(200)
    plain = click_model(optimizer, data_type=data_type, hot_rows=hot_rows)
    model = click_model(optimizer, data_type=data_type, hot_rows=hot_rows, device=make_device())
    expected = plain_losses(plain, log)
    assert len(set(expected)) == 200
    assert pipelined(model, log) == expected
    assert_same_state(model, plain)


@pytest.mark.parametrize(
    "optimizer",
    [SGD(lr=0.1), Adagrad(lr=0.05), SGD(lr=0.5, clip_norm=0.05)],
    ids=lambda spec: f"{spec.algorithm} {spec.clip_norm}",
)
@pytest.mark.parametrize("output_dtype", [torch.float16, torch.bfloat16])
@with_stand_in
def test_other_optimizers_and_outputs_of_half_precision(
    optimizer: OptimizerSpec, output_dtype: torch.dtype, make_device: MakeDevice
) -> None:
    log = click_log(60)
    plain, model = click_model(optimizer, output_dtype), click_model(optimizer, output_dtype, make_device())
    assert pipelined(model, log) == plain_losses(plain, log)
    assert_same_state(model, plain)


@two_optimizers
@pytest.mark.parametrize("data_type", ["fp32", "bf16", "int8"])
@with_stand_in
def test_stale_updates_are_one_step_stale(optimizer: OptimizerSpec, data_type: str, make_device: MakeDevice) -> None:
    log, poolings = click_log(60), ["sum", "mean", "sum", "sum"]
    reference, plain = (click_model(optimizer, data_type=data_type, poolings=poolings) for _ in range(2))
    model = click_model(optimizer, data_type=data_type, poolings=poolings, device=make_device())
    expected = stale_losses(reference, log)
    assert pipelined(model, log, updates="stale") == expected
    assert_same_state(model, reference)
    assert plain_losses(plain, log) != expected


def test_batches_of_other_sizes_and_without_ids() -> None:
    def batches() -> list[Batch]:
        made = [click_log(k + 1, size)[k] for k, size in enumerate([8, 64, 1, 200, 64, 64, 3])]
        empty = dlrm_rs.KeyedJaggedTensor.from_lengths_sync(
            NAMES, torch.empty(0, dtype=torch.int64), torch.zeros(32, dtype=torch.int64)
        )
        return [*made, Batch(torch.randn(8, 5), empty, torch.ones(8)), made[1]]

    torch.manual_seed(3)
    log = batches()
    plain, model = click_model(), click_model()
    assert pipelined(model, log) == plain_losses(plain, log)
    assert_same_state(model, plain)


def test_a_loop_of_ones_own_with_a_scheduler_and_batches_that_are_left_out() -> None:
    def train(model: dlrm_rs.DLRM, batches: Iterator[Batch]) -> list[float]:
        optimizer = dense_adam(model)
        assert isinstance(model.embeddings, dlrm_rs.EmbeddingBagCollection)
        assert model.embeddings.fused_optimizer is not None
        scheduler = torch.optim.lr_scheduler.ExponentialLR(model.embeddings.fused_optimizer, 0.9)
        losses = []
        for number, batch in enumerate(batches):
            loss = click_loss(model, batch)
            if number % 5 != 3:
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.top.parameters(), 0.1)
                optimizer.step()
                model.embeddings.fused_optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        return losses

    log = click_log(40)
    plain, model = click_model(), click_model()
    expected = train(plain, iter(log))
    assert train(model, Pipeline(model, None, log).batches()) == expected
    assert_same_state(model, plain)


def test_inside_of_the_loop_a_checkpoint_and_an_evaluation_see_whole_steps() -> None:
    log, test = click_log(12), click_log(13)[12]
    plain, model = click_model(), click_model()
    optimizer = dense_adam(plain)
    seen = []
    for batch in log:
        optimizer.zero_grad()
        click_loss(plain, batch).backward()
        optimizer.step()
        with torch.no_grad():
            seen.append((click_loss(plain, test), state(plain)))
    pipeline = Pipeline(model, dense_adam(model), log)
    for _, (expected, checkpoint) in zip(pipeline, seen, strict=True):
        with torch.no_grad():
            assert torch.equal(click_loss(model, test), expected)
        got = state(model)
        assert all(torch.equal(got[name], tensor) for name, tensor in checkpoint.items())
        pipeline.synchronize()


def test_synchronize_does_not_wait_for_the_loader() -> None:
    gate = threading.Event()

    def loader() -> Iterator[Batch]:
        yield log[0]
        gate.wait(60)
        yield log[1]

    log = click_log(2)
    plain, model = click_model(), click_model()
    plain_losses(plain, [log[0]])
    pipeline = Pipeline(model, dense_adam(model), loader())
    losses = iter(pipeline)
    next(losses)
    pipeline.synchronize()
    assert_same_state(model, plain)
    gate.set()
    assert len(list(losses)) == 1


def test_a_batch_is_given_before_its_rows_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    given, in_time = threading.Event(), []
    lookup = Visit.lookup

    def late_lookup(visit: Visit, *part: Any) -> None:
        in_time.append(given.wait(60))
        lookup(visit, *part)

    monkeypatch.setattr(Visit, "lookup", late_lookup)
    model, plain, log = click_model(), click_model(), click_log(5)
    losses = []
    for batch in Pipeline(model, None, log).batches():
        given.set()
        losses.append(click_loss(model, batch).item())
        given.clear()
    with torch.no_grad():
        assert losses == [click_loss(plain, batch).item() for batch in log]
    assert len(in_time) >= 5
    assert all(in_time)


@pytest.mark.parametrize("parting", Parting)
def test_however_much_is_parted_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch, parting: Parting) -> None:
    monkeypatch.setattr(Trials, "choose", lambda _: parting)
    log = click_log(60)
    plain, model = click_model(), click_model()
    assert pipelined(model, log) == plain_losses(plain, log)
    assert_same_state(model, plain)


def test_frozen_tables_need_no_optimizer() -> None:
    model = click_model(None)
    model.embeddings.requires_grad_(False)
    other = copy.deepcopy(model)
    assert pipelined(model, click_log(5)) == plain_losses(other, click_log(5))


def test_several_collections_and_other_modules() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.first, self.second = (
                dlrm_rs.EmbeddingBagCollection(
                    [dlrm_rs.EmbeddingBagConfig("t", 500, 4, [feature])], optimizer=SGD(lr=0.5)
                )
                for feature in ("t0", "t3")
            )
            self.bag = dlrm_rs.EmbeddingBag(40, 4, mode="sum", optimizer=SGD(lr=0.5))
            self.top = nn.Linear(12, 1)

        def forward(self, dense: Tensor, sparse: dlrm_rs.KeyedJaggedTensor) -> Tensor:
            one = sparse["t1"]
            rows = [
                self.first(sparse).values(),
                self.bag(one.values(), one.offsets()[:-1]),
                self.second(sparse).values(),
            ]
            logits: Tensor = self.top(torch.cat(rows, 1))
            return logits

    clicks = ClickLog([500, 40, 3, 500], 32, 30, 2, dense_features=5)
    log = [clicks[k] for k in range(30)]
    plain, model = Two(), Two()

    def sgd(model: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(model.get_submodule("top").parameters(), lr=0.1)

    losses = trained(model, sgd(model), Pipeline(model, None, log).batches())
    assert losses == trained(plain, sgd(plain), log)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


class Clicks(torch.utils.data.Dataset[Batch]):
    """Batches, the item of a number too large a failure."""

    def __init__(self, log: list[Batch], count: int) -> None:
        self._log, self._count = log, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Batch:
        return self._log[number]


def data_loader(log: list[Batch], count: int) -> torch.utils.data.DataLoader[Batch]:
    """Batches loaded by two processes, which are forked from the pipeline's thread within its loop."""
    return torch.utils.data.DataLoader(Clicks(log, count), batch_size=None, num_workers=2)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_batches_of_a_data_loader_with_processes_of_its_own() -> None:
    log = click_log(30)
    plain, model = click_model(), click_model()
    assert pipelined(model, data_loader(log, 30)) == plain_losses(plain, log)
    assert_same_state(model, plain)
    for number, _ in enumerate(Pipeline(model, dense_adam(model), data_loader(log, 30))):
        if number == 3:
            break
    losses: list[float] = []
    with pytest.raises(IndexError, match="list index out of range") as raised:
        losses.extend(loss.item() for loss in Pipeline(model, dense_adam(model), data_loader(log, 31)))
    assert len(losses) == 30
    assert "loading of batch 30" in "".join(raised.value.__notes__)
