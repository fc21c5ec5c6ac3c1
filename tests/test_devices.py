"""Devices: memory that goes round, a stand-in whose arithmetic is the CPU's, and those that are not there."""

import copy
import gc
import os
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import dlrm_rs
from clicks import Updates, assert_same_state, click_log, click_model, dense_adam, pipelined, plain_losses
from dlrm_rs import Pipeline
from dlrm_rs.devices import CPU, StandIn, output_device
from dlrm_rs.devices.ring import LARGE, Bytes, Ring, RingPerThread, huge_pages

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


def test_after_some_steps_no_memory_is_allocated_for_the_rows_that_max_pooling_takes() -> None:
    model = click_model()
    assert isinstance(model.embeddings, dlrm_rs.EmbeddingBagCollection)
    slots = []
    for _ in Pipeline(model, dense_adam(model), click_log(40)):
        lane = model.embeddings._tables.lane
        assert lane is not None
        slots.append(len(lane.argmaxes))
    assert 1 <= max(slots) <= 5


def test_a_stand_in_gives_the_bits_of_the_cpu_in_a_plain_loop() -> None:
    log = click_log(20)
    model = click_model(device=StandIn(latency=0.001), output_dtype=torch.bfloat16)
    other = click_model(output_dtype=torch.bfloat16)
    assert plain_losses(model, log) == plain_losses(other, log)
    assert_same_state(model, other)


def test_a_loop_on_the_cpu_leaves_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    slots: list[weakref.ref[Bytes]] = []

    def allocate(size: int) -> Bytes:
        memory = huge_pages(size)
        slots.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(CPU, "outputs", type(CPU.outputs)(allocate))
    monkeypatch.setattr("dlrm_rs.devices.ring.LARGE", 0)
    model, log = click_model(), click_log(40)
    for _ in range(2):
        pipelined(model, log)
    assert 2 <= len(slots) <= 12
    gc.collect()
    assert [slot() for slot in slots if slot() is not None] == []


@pytest.mark.parametrize("is_trained", [False, True])
def test_large_outputs_are_written_where_one_was_that_nobody_looks_at(is_trained: bool) -> None:
    configs = [dlrm_rs.EmbeddingBagConfig("t", 10, 64, ["f"])]
    collection = dlrm_rs.EmbeddingBagCollection(configs, optimizer=dlrm_rs.optim.SGD(0.1))
    B = LARGE // (64 * 4)
    ids, offsets = torch.arange(B) % 10, torch.arange(B + 1)
    with torch.set_grad_enabled(is_trained):
        first = collection.lookup(ids, offsets)
        kept, address = first[:, :1], first.data_ptr()
        del first
        second = collection.lookup(ids.flip(0), offsets)
        assert second.data_ptr() != address  # `kept` is a view of the first
        assert torch.equal(kept.flip(0), second[:, :1])
        expected = kept.clone()
        del kept
        third = collection.lookup(ids, offsets)
        assert third.data_ptr() == address
        assert torch.equal(third[:, :1], expected)
        assert second.data_ptr() != address
        del third
        third = collection.lookup(ids, offsets).relu_()  # as of memory of its own
        assert torch.equal(third[:, :1], expected.relu())
    del second, third
    for _ in range(1100):
        collection.lookup(ids[:10], offsets[:11])
    assert len(CPU.outputs) == 0


def test_who_keeps_many_large_outputs_keeps_the_c_librarys_memory() -> None:
    ring, most = RingPerThread(huge_pages), (1 << 30) // LARGE
    kept = [ring.take((LARGE,), torch.uint8) for _ in range(most + 10)]
    assert len(ring) == most
    assert len({tensor.data_ptr() for tensor in kept}) == most + 10
    assert kept[-1].resize_(LARGE + 1).numel() == LARGE + 1  # as memory of a ring cannot be
    with pytest.raises(RuntimeError, match="resiz"):
        kept[0].resize_(LARGE + 1)
    del kept
    assert len(ring) == most
    ring.take((LARGE,), torch.uint8)
    assert len(ring) == most


def test_a_tensor_of_a_ring_is_as_others_but_for_its_size() -> None:
    tensor = Ring(huge_pages).take((2, 3), torch.bfloat16)
    tensor.copy_(torch.arange(6).view(2, 3))
    assert tensor.t_().unsqueeze_(0).squeeze_(0).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert torch.equal(pickle.loads(pickle.dumps(tensor)), tensor)
    assert torch.equal(copy.deepcopy(tensor), tensor)


def test_a_tensor_may_die_in_another_thread_and_after_its_ring() -> None:
    ring = Ring(huge_pages)
    address = ring.take((10,), torch.uint8).data_ptr()
    tensors = [ring.take((10,), torch.uint8)]
    thread = threading.Thread(target=tensors.clear)
    thread.start()
    thread.join()
    last, free = ring.take((10,), torch.uint8), ring.take((10,), torch.uint8)
    assert last.data_ptr() == address
    of_last, of_free = (weakref.ref(view.slot.memory.base) for view in ring._taken.values())
    del free
    gc.disable()  # nothing waits for it
    try:
        del ring
        assert of_free() is None
        assert last.fill_(3).sum() == 30
        assert of_last() is not None
        del last
        assert of_last() is None
    finally:
        gc.enable()


def test_what_is_copied_when_its_tensor_dies_is_neither_given_out_nor_back() -> None:
    ring, is_busy = Ring(huge_pages), True
    tensor = ring.take((10,), torch.uint8)
    address = tensor.data_ptr()
    ring.keep(tensor, lambda: is_busy)
    del tensor
    for _ in range(1100):
        assert ring.take((10,), torch.uint8).data_ptr() != address
    is_busy = False
    ring.take((10,), torch.uint8)  # and since it has not been wanted for long
    assert address not in {slot.address for slot in ring._free}


def test_threads_and_whatever_runs_in_the_midst_of_a_take_have_memory_of_their_own() -> None:
    within: list[torch.Tensor] = []
    handled = iter(range(5))

    def allocate(size: int) -> Bytes:
        # As a signal handler that looks up, and is itself interrupted.
        within.extend(ring.take((10,), torch.uint8) for _ in handled)
        return huge_pages(size)

    ring = Ring(allocate)
    tensors = [ring.take((10,), torch.uint8), *within]
    assert len({tensor.data_ptr() for tensor in tensors}) == 6

    def work(number: int) -> bool:
        for _ in range(300):
            tensor = ring.take((1000,), torch.uint8).fill_(number)
            if not bool((tensor == number).all()):
                return False
        return True

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_has_memory_of_its_own() -> None:
    slots = Ring(huge_pages)
    slots.take((100,), torch.uint8).zero_()
    child = os.fork()
    if child == 0:
        try:
            slots.take((100,), torch.uint8).numpy()[:] = 7  # of the same slot as below
            os._exit(0)
        finally:
            os._exit(1)
    rows = slots.take((100,), torch.uint8).numpy()
    assert os.waitpid(child, 0)[1] == 0
    assert not rows.any()


def test_a_ring_gives_back_what_is_not_wanted_any_more() -> None:
    ring = Ring(huge_pages)
    large = [ring.take((1 << 20,), torch.uint8) for _ in range(3)]
    del large
    kept = ring.take((1 << 20,), torch.uint8)
    for _ in range(1100):
        small = ring.take((1000,), torch.uint8)
        del small
    assert len(ring) == 2  # one for small tensors, and what is kept
    assert kept.fill_(1).sum() == 1 << 20


def test_a_ring_takes_the_smallest_slot_that_does() -> None:
    ring = Ring(huge_pages)
    large, small = ring.take((1000,), torch.uint8), ring.take((10,), torch.uint8)
    address = small.data_ptr()
    del large, small
    assert ring.take((9,), torch.uint8).data_ptr() == address


@pytest.mark.parametrize("device", ["meta", "tpu", 1.5, "cuda:-3"])
def test_devices_that_cannot_be_are_refused(device: Any) -> None:
    with pytest.raises(ValueError, match=f"output_device: expected 'cpu' or 'cuda', got '?{device}"):
        click_model(device=device)


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="expected a device of this machine, got 'cuda', and no GPU"):
            output_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RuntimeError, match="expected a device of this machine, which has 1, got 'cuda:7'"):
        output_device("cuda:7")


@pytest.mark.parametrize("name", ["latency", "bandwidth", "rest"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ValueError, "expected a .*number .* 0, got -1"),
        (float("nan"), ValueError, "expected a .*number .* 0, got nan"),
        ("a", TypeError, "expected a number, got 'a'"),
        (None, TypeError, "expected a number, got None"),
    ],
)
def test_speeds_that_cannot_be_are_refused(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{name}: {message}"):
        StandIn(**{"latency": 0.0, name: value})


def test_a_stand_in_that_never_ends_is_refused() -> None:
    with pytest.raises(ValueError, match="latency: expected a finite number of at least 0, got inf"):
        StandIn(float("inf"))
    with pytest.raises(ValueError, match="bandwidth: expected a number above 0, got 0"):
        StandIn(0.0, bandwidth=0)


def test_a_model_with_an_output_device_is_copied_and_pickled(tmp_path: Path) -> None:
    model = click_model(device=StandIn(latency=0.0))
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    log = click_log(5)
    copied = copy.deepcopy(model)
    expected = plain_losses(model, log)
    assert pipelined(copied, log) == pipelined(loaded, log) == expected
