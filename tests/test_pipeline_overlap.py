"""That tables really work while the device does, with margins that a busy machine does not eat up.

What the tables take is sleep here, and so is what the device takes: neither wants a core. Where they ran in turn,
nothing would be hidden, however fast the machine; where they run beside each other, all is but what a stall takes. So a
stall is given two more chances.
"""

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from clicks import Updates, click_log, click_model, dense_adam
from dlrm_rs import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, Pipeline
from dlrm_rs.devices import StandIn
from dlrm_rs.optim import SGD
from dlrm_rs.pipeline import Summary
from dlrm_rs.pipeline.lane import Visit
from dlrm_rs.pipeline.parting import Parting, Trials

pytestmark = pytest.mark.usefixtures("one_torch_thread")

STEPS, TABLES, DEVICE = 7, 0.04, 0.12


def best(updates: Updates) -> Summary:
    """Of up to three loops the first in which most is hidden, or the last."""
    for _ in range(3):
        model = click_model(device=StandIn(DEVICE, copies=False))
        pipeline = Pipeline(model, dense_adam(model), click_log(STEPS), updates=updates)
        list(pipeline)
        summary = pipeline.summary()
        if summary.hidden > 0.8:
            break
    return summary


@pytest.fixture
def slow_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be done apart from the gradient takes a while."""
    for stage in ("lookup", "update"):
        run = getattr(Visit, stage)

        def slow(visit: Visit, overlap: Any = None, part: Any = None, run: Any = run) -> None:
            if part != "shared":
                time.sleep(TABLES)
            run(visit, overlap, part)

        monkeypatch.setattr(Visit, stage, slow)


@pytest.mark.usefixtures("slow_tables")
@pytest.mark.parametrize("updates", ["exact", "stale"])
def test_tables_work_while_the_device_does(updates: Updates) -> None:
    summary = best(updates)
    assert summary.cpu > 2 * TABLES * (STEPS - 1)
    assert summary.hidden > 0.6


@pytest.mark.usefixtures("slow_tables")
def test_without_parting_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test before tells the two apart."""
    monkeypatch.setattr(Trials, "choose", lambda _: Parting.NOTHING)
    assert best("exact").hidden < 0.4


@pytest.mark.parametrize("updates", ["exact", "stale"])
def test_nobody_waits_for_the_copies_of_rows(updates: Updates) -> None:
    seconds = 0.1
    rows = 48 * 4 * 8 * 4  # bytes
    for _ in range(3):
        model = click_model(device=StandIn(0.0, bandwidth=rows / seconds))
        pipeline = Pipeline(model, dense_adam(model), click_log(STEPS), updates=updates)
        list(pipeline)
        if (sending := pipeline.summary().stages["send"]) < STEPS * seconds / 4:
            break
    assert pipeline.summary().wall > STEPS * seconds
    assert sending < STEPS * seconds / 2


class OfTheTable(torch.autograd.Function):
    """Rows whose gradient is, for whatever reason, memory of their table."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return rows.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.weight.detach(), None


def test_a_gradient_that_is_memory_of_its_table_is_read_before_that_is_written_to() -> None:
    size = 1000  # rows that are updated after others
    ids = torch.arange(size).flip(0)  # and by the gradient that is another's memory
    batches = [KeyedJaggedTensor(["t"], ids, lengths=torch.ones(size, dtype=torch.int64)) for _ in range(3)]

    def model() -> EmbeddingBagCollection:
        torch.manual_seed(3)
        return EmbeddingBagCollection([EmbeddingBagConfig("t", size, 16, ["t"])], optimizer=SGD(lr=0.5))

    def train(model: EmbeddingBagCollection, batch: KeyedJaggedTensor) -> None:
        weight = model.get_parameter("embedding_bags.t.weight")
        OfTheTable.apply(model(batch).values(), weight.detach()).backward()

    plain, pipelined = model(), model()
    for batch in batches:
        train(plain, batch)
    for batch in Pipeline(pipelined, None, batches).batches():
        train(pipelined, batch)
    got, expected = (one.get_parameter("embedding_bags.t.weight") for one in (pipelined, plain))
    assert torch.equal(got, expected)
