"""A pipeline over a model of two collections: one that fails, one that is frozen, and what the device waits for."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlrm_rs
from clicks import click_log
from dlrm_rs import EmbeddingBagCollection, EmbeddingBagConfig, Pipeline
from dlrm_rs.data import Batch
from dlrm_rs.optim import SGD
from dlrm_rs.pipeline.lane import Visit
from dlrm_rs.pipeline.parting import Parting, Trials

pytestmark = pytest.mark.usefixtures("one_torch_thread")


class Two(nn.Module):
    """Two collections, the first of one table and the second of two."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = (
            EmbeddingBagCollection(
                [EmbeddingBagConfig(feature, 3000, 4, [feature]) for feature in features], optimizer=SGD(lr=0.5)
            )
            for features in (["t0"], ["t1", "t3"])
        )
        self.second.requires_grad_(not frozen)
        self.top = nn.Linear(12, 1)

    def forward(self, sparse: dlrm_rs.KeyedJaggedTensor) -> Tensor:
        rows = torch.cat([self.first(sparse).values(), self.second(sparse).values()], 1)
        logits: Tensor = self.top(rows).squeeze(1)
        return logits

    def tables(self, collection: str) -> list[Tensor]:
        """Copies of a collection's weights."""
        return [weight.detach().clone() for weight in self.get_submodule(collection).parameters()]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(batch.sparse)
    return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)


def sgd(model: Two) -> torch.optim.SGD:
    return torch.optim.SGD(model.top.parameters(), lr=0.1)


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("parting", Parting)
def test_an_update_that_fails_leaves_its_tables_and_the_others_have_it_once(
    monkeypatch: pytest.MonkeyPatch, parting: Parting
) -> None:
    monkeypatch.setattr(Trials, "choose", lambda _: parting)
    log, model, plain = click_log(9), Two(), Two()
    states = [(plain.tables("first"), plain.tables("second"))]
    optimizer = sgd(plain)
    for batch in log[:5]:
        optimizer.zero_grad()
        loss(plain, batch).backward()
        optimizer.step()
        states.append((plain.tables("first"), plain.tables("second")))

    def train() -> None:
        for number, _ in enumerate(Pipeline(model, sgd(model), log, loss)):
            if number == 2:
                assert model.second.fused_optimizer is not None
                model.second.fused_optimizer.param_groups[0]["lr"] = -1.0  # refused by the update of batch 3

    with pytest.raises(ValueError, match="lr") as raised:
        train()
    assert "update" in raised.value.__notes__[0]
    assert raised.value.__notes__[0].endswith("of batch 3")
    assert same(model.tables("first"), states[4][0])
    assert same(model.tables("second"), states[3][1])


def test_synchronize_waits_for_what_is_trained_beside_frozen_tables() -> None:
    log, model, plain = click_log(6), Two(frozen=True), Two(frozen=True)
    optimizer, plain_optimizer = sgd(model), sgd(plain)
    pipeline = Pipeline(model, None, log)
    for batch in pipeline.batches():
        for one, step in ((model, optimizer), (plain, plain_optimizer)):
            step.zero_grad()
            loss(one, batch).backward()
            step.step()
        pipeline.synchronize()
        assert same(model.tables("first"), plain.tables("first"))
    assert pipeline.summary().steps == 6


class Sometimes(Two):
    """Looks up the second collection for every third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, sparse: dlrm_rs.KeyedJaggedTensor) -> Tensor:
        self.calls += 1
        first = self.first(sparse).values()
        second = self.second(sparse).values() if self.calls % 3 == 0 else first.new_zeros(len(first), 8)
        logits: Tensor = self.top(torch.cat([first, second], 1)).squeeze(1)
        return logits


@pytest.mark.parametrize("seen", ["synchronize", "state_dict", "lookup"])
def test_a_collection_that_is_not_called_keeps_nobody_from_the_updates_of_the_others(seen: str) -> None:
    log, model, plain = click_log(9), Sometimes(), Sometimes()
    optimizer, plain_optimizer = sgd(model), sgd(plain)
    pipeline = Pipeline(model, None, log[1:])
    for batch in pipeline.batches():
        for one, step in ((model, optimizer), (plain, plain_optimizer)):
            step.zero_grad()
            loss(one, batch).backward()
            step.step()
        if seen == "synchronize":
            pipeline.synchronize()
        elif seen == "lookup":
            with torch.no_grad():
                assert torch.equal(model.first(log[0].sparse).values(), plain.first(log[0].sparse).values())
        got = model.state_dict() if seen == "state_dict" else dict(model.named_parameters())
        if seen != "lookup":
            assert all(torch.equal(got[name], parameter) for name, parameter in plain.named_parameters())
    assert pipeline.summary().steps == 8


@pytest.mark.parametrize("stage", ["prepare", "lookup", "update"])
def test_the_summary_counts_what_the_device_waits_for(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    seconds = 0.05
    run: Callable[..., Any] = getattr(Visit, stage)

    def slow(visit: Visit, *arguments: Any) -> None:
        time.sleep(seconds)
        run(visit, *arguments)

    monkeypatch.setattr(Visit, stage, slow)
    monkeypatch.setattr(Trials, "choose", lambda _: Parting.NOTHING)
    model, log = Two(), click_log(6)
    pipeline = Pipeline(model, sgd(model), log, loss)
    list(pipeline)
    # Of two collections, in all steps but the first, which has nothing to hide behind; the model takes little of it.
    assert pipeline.summary().exposed > 2 * seconds * 5 * 0.5
    assert pipeline.summary().hidden < 0.5
