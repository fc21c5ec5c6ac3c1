"""Devices: memory that goes round, a stand-in whose arithmetic is the CPU's, and those that are not there."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from clicks import Updates, assert_same_state, click_log, click_model, pipelined, plain_losses
from dlrm_rs.devices import StandIn

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.parametrize("updates", ["exact", "stale"])
def test_a_stand_in_gives_the_same_bits(updates: Updates) -> None:
    log = click_log(60)
    device = StandIn(latency=0.002, bandwidth=2e8)
    model, other = click_model(device=device), click_model()
    assert pipelined(model, log, updates=updates) == pipelined(other, log, updates=updates)
    assert_same_state(model, other)
    assert device.busy > 60 * 0.0019


@pytest.mark.parametrize("updates", ["exact", "stale", "plain"])
@pytest.mark.parametrize("copies", [True, False])
def test_after_some_steps_no_memory_is_allocated_for_rows_and_gradients(updates: Any, copies: bool) -> None:
    device = StandIn(latency=0.0005, copies=copies)
    model, log = click_model(device=device), click_log(40)

    def slots() -> list[int]:
        if updates == "plain":
            plain_losses(model, log)
        else:
            pipelined(model, log, updates=updates)
        return [len(device.outputs), len(device._memory), len(device._gradients)]

    assert max(slots()) <= 6
    assert max(slots()) <= 6


def test_a_stand_in_gives_the_bits_of_the_cpu_in_a_plain_loop() -> None:
    log = click_log(20)
    model = click_model(device=StandIn(latency=0.001), output_dtype=torch.bfloat16)
    other = click_model(output_dtype=torch.bfloat16)
    assert plain_losses(model, log) == plain_losses(other, log)
    assert_same_state(model, other)


def test_devices_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="output_device: expected 'cpu' or 'cuda', got 'meta'"):
        click_model(device="meta")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="expected a device of this machine, got 'cuda', and no GPU"):
            click_model(device="cuda")  # type: ignore[arg-type]


def test_a_model_with_an_output_device_is_copied_and_pickled(tmp_path: Path) -> None:
    model = click_model(device=StandIn(latency=0.0))
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    log = click_log(5)
    copied = copy.deepcopy(model)
    expected = plain_losses(model, log)
    assert pipelined(copied, log) == pipelined(loaded, log) == expected
