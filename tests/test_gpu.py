"""Pooled rows on a GPU and gradients back: the right numbers at the right time, in memory that is used again."""

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlrm_rs
from dlrm_rs import Pipeline
from dlrm_rs.data import Batch, ClickLog
from dlrm_rs.devices import CudaDevice, output_device
from dlrm_rs.optim import SGD, Adam, RowWiseAdagrad
from dlrm_rs.pipeline.pipeline import click_loss
from dlrm_rs.placement import Hardware, PlacedEmbeddingBags

ROWS = [100_000, 40, 3, 20_000]

pytestmark = pytest.mark.gpu

# Without it cuBLAS warns of what it does not promise; it is read once, by the first product of matrices.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def click_log(steps: int) -> list[Batch]:
    log = ClickLog(ROWS, 512, steps, [8, 1, 1, 3], dense_features=5)
    return [log[k] for k in range(steps)]


def click_model(output_dtype: torch.dtype = torch.float32) -> dlrm_rs.DLRM:
    torch.manual_seed(1)
    tables = [dlrm_rs.EmbeddingBagConfig(f"t{t}", rows, 64, [f"t{t}"]) for t, rows in enumerate(ROWS)]
    embeddings = dlrm_rs.EmbeddingBagCollection(
        tables, optimizer=RowWiseAdagrad(lr=0.05), output_device="cuda", output_dtype=output_dtype
    )
    return dlrm_rs.DLRM(embeddings, 5, [128, 64], [256, 1]).cuda()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for name, p in model.named_parameters() if "embedding_bags" not in name], lr=0.1)


def plain_losses(model: nn.Module, log: list[Batch]) -> list[float]:
    optimizer, losses = sgd(model), []
    for batch in log:
        optimizer.zero_grad()
        loss = click_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [loss.item() for loss in losses]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_and_gradients_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    def collection(device: str) -> dlrm_rs.EmbeddingBagCollection:
        torch.manual_seed(2)
        tables = [dlrm_rs.EmbeddingBagConfig("t", 1000, 33, ["a"])]
        return dlrm_rs.EmbeddingBagCollection(tables, optimizer=SGD(lr=0.5), output_device=device, output_dtype=dtype)

    on_gpu, on_cpu = collection("cuda"), collection("cpu")
    offsets = torch.arange(0, 2001, 20)
    for _ in range(10):  # more than there are slots
        ids = torch.randint(1000, (2000,))
        got, expected = on_gpu.lookup(ids, offsets), on_cpu.lookup(ids, offsets)
        assert got.is_cuda
        assert torch.equal(got.cpu(), expected)
        grad = torch.randn(100, 33, dtype=dtype)
        got.backward(grad.cuda())
        expected.backward(grad)
    for a, b in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_updates_give_the_bits_of_the_plain_loop(dtype: torch.dtype) -> None:
    log = click_log(200)
    plain, model = click_model(dtype), click_model(dtype)
    expected = plain_losses(plain, log)
    losses = [loss.clone() for loss in Pipeline(model, sgd(model), log)]
    assert [loss.item() for loss in losses] == expected
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rows_wait_for_their_copy_and_slots_for_theirs() -> None:
    device = CudaDevice(torch.device("cuda"))
    kept: list[tuple[Tensor, int]] = []
    for number in range(50):
        rows = device.outputs.take((4096, 1024), torch.float32)
        rows.fill_(number)
        kept.append((device.send(rows).tensor()[-1, -8:].clone(), number))
        del rows
    for got, number in kept:
        assert got.tolist() == [number] * 8


@pytest.mark.parametrize("updates", ["exact", "stale"])
def test_after_some_steps_nothing_is_allocated(updates: Any) -> None:
    model, log = click_model(), click_log(60)
    assert isinstance(model.embeddings, dlrm_rs.EmbeddingBagCollection)
    device = model.embeddings._tables.output_device
    assert isinstance(device, CudaDevice)

    def memory() -> tuple[int, int]:
        # Of the GPU only what the caching allocator asks of the driver.
        return len(device.outputs) + len(device._gradients), torch.cuda.memory_stats()["num_device_alloc"]

    list(Pipeline(model, sgd(model), log, updates=updates))
    before = memory()
    list(Pipeline(model, sgd(model), log, updates=updates))
    after = memory()
    assert after[0] <= 12
    assert after[1] == before[1]


def test_the_calling_thread_never_waits_for_the_gpu() -> None:
    model, log = click_model(), click_log(20)
    dense = [batch.dense.cuda() for batch in log]
    labels = [batch.labels.cuda() for batch in log]
    optimizer = sgd(model)
    mode = torch.cuda.get_sync_debug_mode()
    for number, batch in enumerate(Pipeline(model, None, log).batches()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.zero_grad()
            logits = model(dense[number], batch.sparse).squeeze(1)
            nn.functional.binary_cross_entropy_with_logits(logits, labels[number]).backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def test_the_profile_has_the_time_of_the_gpu() -> None:
    model = click_model()
    pipeline = Pipeline(model, sgd(model), click_log(20))
    list(pipeline)
    summary = pipeline.summary()
    assert 0 < summary.device < summary.wall


def test_a_placed_model_trains() -> None:
    tables = [dlrm_rs.EmbeddingBagConfig(f"t{t}", rows, 64, [f"t{t}"]) for t, rows in enumerate(ROWS)]
    plan = dlrm_rs.plan(tables, 1e6, batch_size=512, ids_per_bag=3, optimizer=SGD(lr=0.1))
    assert set(plan.hardware.measured) == {"host_bandwidth", "pcie_bandwidth", "gpu_bandwidth", "gpu_flops"}
    model = dlrm_rs.DLRM(plan.build(SGD(lr=0.1)), 5, [64], [16, 1]).cuda()
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if ".host." not in name], lr=0.1)
    losses = [loss.item() for loss in Pipeline(model, optimizer, click_log(50))]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_a_bad_id_of_a_table_on_the_gpu_is_an_error_and_the_gpu_goes_on() -> None:
    bags = PlacedEmbeddingBags([dlrm_rs.EmbeddingBagConfig("t", 10, 4, ["a"])], ["t"], "cuda")
    lengths = torch.tensor([1, 1])
    with pytest.raises(IndexError, match=r"features\['a'\]: expected 0 <= id < 10, .* table 't', got 10 \(bag 1\)"):
        bags(dlrm_rs.KeyedJaggedTensor(["a"], torch.tensor([9, 10]), lengths=lengths))
    pooled = bags(dlrm_rs.KeyedJaggedTensor(["a"], torch.tensor([9, 0]), lengths=lengths)).values()
    assert torch.equal(pooled, bags.device_bags.get_parameter("t.weight")[[9, 0]])


@pytest.mark.parametrize(
    ("spec", "optimizer"), [(SGD(lr=0.1), torch.optim.SGD), (Adam(lr=0.1), torch.optim.Adam)], ids=["sgd", "adam"]
)
def test_a_plan_tells_the_memory_that_training_takes(spec: Any, optimizer: Any) -> None:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    tables = [dlrm_rs.EmbeddingBagConfig("t", 1_000_000, 32, ["a", "b"])]
    plan = dlrm_rs.plan(tables, 4e9, batch_size=2, optimizer=spec, hardware=Hardware(gpu_bandwidth=1e15))
    bags = plan.build()
    trains = optimizer(bags.parameters(), lr=0.1)
    for _ in range(3):
        trains.zero_grad()
        ones = torch.ones(4, dtype=torch.int64)
        bags(dlrm_rs.KeyedJaggedTensor(["a", "b"], ones, lengths=ones)).values().sum().backward()
        trains.step()
    taken = torch.cuda.max_memory_allocated() - before
    assert 0.9 * taken < plan.gpu_bytes < 1.1 * taken


def test_events_are_timed_by_the_clock_of_the_host() -> None:
    device = CudaDevice(torch.device("cuda"))
    for _ in range(3):
        time.sleep(1.1)  # another zero
        begin = time.perf_counter()
        mark = device.mark()
        device.synchronize()
        assert begin - 1e-3 < mark.time() < time.perf_counter() + 1e-3


def test_a_gpu_is_found_by_its_number() -> None:
    assert output_device("cuda").torch_device == torch.device("cuda", torch.cuda.current_device())
    assert output_device("cuda:0").torch_device == torch.device("cuda", 0)
