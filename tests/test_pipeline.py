"""`Pipeline` against the plain loop and a loop that is one step stale, bit for bit, and what ends it early."""

import copy
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor, nn

import dlrm_rs
from dlrm_rs import Pipeline
from dlrm_rs.data import Batch, ClickLog
from dlrm_rs.devices import Device, StandIn
from dlrm_rs.optim import SGD, Adagrad, Adam, OptimizerSpec, RowWiseAdagrad
from dlrm_rs.pipeline.pipeline import click_loss

ROWS = [3000, 40, 3, 800]
POOLINGS = ["sum", "mean", "sum", "max"]
IDS = [4, 1, 1, 2]
DIM = 8


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of torch that wait for more work would keep the pipeline's from theirs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def click_log(steps: int, batch_size: int = 48) -> list[Batch]:
    """Ids of Zipf's law: almost every batch touches rows of the one before."""
    log = ClickLog(ROWS, batch_size, steps, IDS, dense_features=5)
    return [log[k] for k in range(steps)]


NAMES = [f"t{t}" for t in range(len(ROWS))]

Updates = Literal["exact", "stale"]


def click_model(
    optimizer: OptimizerSpec | None = RowWiseAdagrad(lr=0.05),  # noqa: B008
    output_dtype: torch.dtype = torch.float32,
    device: Device | None = None,
    data_type: str = "fp32",
) -> dlrm_rs.DLRM:
    """The same weights every time."""
    torch.manual_seed(1)
    tables = [
        dlrm_rs.EmbeddingBagConfig(f"t{t}", rows, DIM, [f"t{t}"], pooling, data_type)
        for t, (rows, pooling) in enumerate(zip(ROWS, POOLINGS, strict=True))
    ]
    embeddings = dlrm_rs.EmbeddingBagCollection(
        tables, optimizer=optimizer, output_dtype=output_dtype, output_device=device
    )
    return dlrm_rs.DLRM(embeddings, dense_in_features=5, bottom_mlp=[DIM], top_mlp=[16, 1])


def dense_adam(model: nn.Module) -> torch.optim.Adam:
    dense = [parameter for name, parameter in model.named_parameters() if "embedding_bags" not in name]
    return torch.optim.Adam(dense, lr=0.01)


def plain_losses(model: nn.Module, log: Any) -> list[float]:
    optimizer = dense_adam(model)
    losses = []
    for batch in log:
        optimizer.zero_grad()
        loss = click_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def pipelined(model: nn.Module, log: Any, **options: Any) -> list[float]:
    return [loss.item() for loss in Pipeline(model, dense_adam(model), log, **options)]


def loop(pipeline: Pipeline) -> Generator[Tensor]:
    """The losses, to be asked for one by one and left."""
    return cast(Generator[Tensor], iter(pipeline))


def state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training changes, tables and their optimizer's state among it."""
    embeddings = model.get_submodule("embeddings")
    assert isinstance(embeddings, dlrm_rs.EmbeddingBagCollection)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if embeddings.fused_optimizer is not None:
        for t, sums in embeddings.fused_optimizer.state_dict()["state"].items():
            tensors |= {f"{t}.{name}": tensor.clone() for name, tensor in sums.items() if isinstance(tensor, Tensor)}
    return tensors


def assert_same_state(model: nn.Module, expected: nn.Module, *, but: str | None = None) -> None:
    got = state(model)
    for name, tensor in state(expected).items():
        if but is None or not name.startswith(but):
            assert torch.equal(got[name], tensor), name


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


@pytest.mark.parametrize("optimizer", [RowWiseAdagrad(lr=0.05), Adam(lr=0.01)], ids=lambda spec: spec.algorithm)
@pytest.mark.parametrize("data_type", ["fp32", "fp16", "bf16"])
def test_exact_updates_give_the_bits_of_the_plain_loop(optimizer: OptimizerSpec, data_type: str) -> None:
    log = click_log(200)
    plain, model = click_model(optimizer, data_type=data_type), click_model(optimizer, data_type=data_type)
    expected = plain_losses(plain, log)
    assert len(set(expected)) == 200
    assert pipelined(model, log) == expected
    assert_same_state(model, plain)


@pytest.mark.parametrize("optimizer", [SGD(lr=0.1), Adagrad(lr=0.05)], ids=lambda spec: spec.algorithm)
@pytest.mark.parametrize("output_dtype", [torch.float16, torch.bfloat16])
def test_other_optimizers_and_outputs_of_half_precision(optimizer: OptimizerSpec, output_dtype: torch.dtype) -> None:
    log = click_log(60)
    plain, model = click_model(optimizer, output_dtype), click_model(optimizer, output_dtype)
    assert pipelined(model, log) == plain_losses(plain, log)
    assert_same_state(model, plain)


@pytest.mark.parametrize("updates", ["exact", "stale"])
def test_a_stand_in_gives_the_same_bits(updates: Updates) -> None:
    log = click_log(60)
    device = StandIn(latency=0.002, bandwidth=2e8)
    model, other = click_model(device=device), click_model()
    assert pipelined(model, log, updates=updates) == pipelined(other, log, updates=updates)
    assert_same_state(model, other)
    assert device.busy > 60 * 0.002


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


def test_stale_updates_are_one_step_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_pipeline.POOLINGS", ["sum", "mean", "sum", "sum"])
    log = click_log(60)
    model, reference, plain = click_model(), click_model(), click_model()
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


# What ends a loop early.


@pytest.mark.parametrize("updates", ["exact", "stale"])
def test_a_loop_that_is_left_ends_after_a_whole_step(updates: Updates) -> None:
    log = click_log(30)
    plain, model = click_model(), click_model()
    for number, _ in enumerate(Pipeline(model, dense_adam(model), log, updates=updates)):
        if number == 6:
            break
    if updates == "exact":
        plain_losses(plain, log[:7])
        assert_same_state(model, plain)
    assert threads() == []
    assert pipelined(model, click_log(2), updates=updates)  # and the next loop is as good as any


def threads() -> list[str]:
    """Those of a pipeline that are still there."""
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("dlrm-rs-") for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dlrm-rs-")]


def failing_loader(log: list[Batch]) -> Iterator[Batch]:
    yield from log[:5]
    raise OSError("the disk is gone")


def bad_id(log: list[Batch]) -> Iterator[Batch]:
    yield from log[:5]
    batch = log[5]
    batch.sparse.values()[7] = 3000
    yield batch
    yield log[6]


def bad_offsets(log: list[Batch]) -> Iterator[Batch]:
    yield from log[:5]
    values, lengths = log[5].sparse.values(), log[5].sparse.lengths().clone()
    lengths[0] += 1
    sparse = dlrm_rs.KeyedJaggedTensor(NAMES, values, lengths=lengths)
    yield Batch(log[5].dense, sparse, log[5].labels)


def no_features(log: list[Batch]) -> Iterator[Any]:
    yield from log[:5]
    yield log[5].dense


@pytest.mark.parametrize(
    ("loader", "error", "words", "note"),
    [
        (failing_loader, OSError, "the disk is gone", "loading of batch 5"),
        (bad_id, IndexError, r"indices\[7\]: expected 0 <= id < 3000, the rows of table 't0'", "sort of batch 5"),
        (bad_offsets, ValueError, "offsets", "sort of batch 5"),
        (no_features, ValueError, "expected one KeyedJaggedTensor in a batch, got 0 in Tensor", "loading of batch 5"),
    ],
)
@pytest.mark.parametrize("updates", ["exact", "stale"])
def test_a_failure_of_a_thread_reaches_the_loop_after_the_batches_before_it(
    loader: Callable[[list[Batch]], Iterator[Any]], error: type[Exception], words: str, note: str, updates: Updates
) -> None:
    log = click_log(7)
    model = click_model()
    losses: list[float] = []
    with pytest.raises(error, match=words) as raised:
        losses.extend(loss.item() for loss in Pipeline(model, dense_adam(model), loader(log), updates=updates))
    assert note in "".join(raised.value.__notes__)
    other = click_model()
    assert losses == pipelined(other, log[:5], updates=updates)
    assert_same_state(model, other)
    assert threads() == []


def infinite_at(number: int) -> Callable[[nn.Module, Batch], Tensor]:
    """A loss whose gradient is infinite in one batch."""
    count = -1

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal count
        count += 1
        return click_loss(model, batch) * (torch.inf if count == number else 1.0)

    return loss


def test_an_infinite_gradient_does_what_it_does_in_a_plain_loop() -> None:
    log = click_log(6)
    plain, model = click_model(), click_model()
    optimizer, infinite = dense_adam(plain), infinite_at(4)
    for batch in log:
        optimizer.zero_grad()
        infinite(plain, batch).backward()
        optimizer.step()
    assert len(list(Pipeline(model, dense_adam(model), log, infinite_at(4)))) == 6
    expected, got = state(plain), state(model)
    assert any(tensor.isnan().any() for tensor in expected.values())
    for name, tensor in expected.items():
        assert torch.equal(got[name].nan_to_num(0.5), tensor.nan_to_num(0.5)), name


@pytest.mark.parametrize("updates", ["exact", "stale"])
def test_an_infinite_gradient_that_is_refused_gets_into_no_table(updates: Updates) -> None:
    log = click_log(8)
    model = click_model()
    pipeline = Pipeline(model, dense_adam(model), log, infinite_at(4), check_finite=True, updates=updates)
    with pytest.raises(FloatingPointError, match=r"expected finite numbers, got \d+ that are inf") as raised:
        list(pipeline)
    assert "gradient of batch 4" in "".join(raised.value.__notes__)
    other = click_model()
    losses = loop(Pipeline(other, dense_adam(other), log, updates=updates))
    for _ in range(4):
        next(losses)
    losses.close()
    got, expected = state(model), state(other)
    assert all(torch.equal(got[name], expected[name]) for name in expected if "embedding_bags" in name)
    assert steps(model) == 4
    assert threads() == []


def steps(model: dlrm_rs.DLRM) -> int:
    """Those that the tables' optimizer has counted."""
    assert isinstance(model.embeddings, dlrm_rs.EmbeddingBagCollection)
    assert model.embeddings.fused_optimizer is not None
    count: int = model.embeddings.fused_optimizer.param_groups[0]["step"]
    return count


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Whoever started the tests may have left SIGINT ignored, as a shell does for what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("where", ["loss", "body", "wait"])
def test_ctrl_c_ends_the_loop_after_a_whole_step(where: str) -> None:
    log = click_log(40)
    gate = threading.Event()
    count = 0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal count
        count += 1
        if where == "loss" and count == 5:
            raise KeyboardInterrupt
        return click_loss(model, batch)

    def loader() -> Iterator[Batch]:
        for number, batch in enumerate(log):
            if where == "wait" and number == 4:
                gate.wait(60)
            yield batch

    model, plain = click_model(), click_model()
    done = 0
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        for done, _ in enumerate(Pipeline(model, dense_adam(model), loader(), loss), 1):
            if where == "body" and done == 4:
                raise KeyboardInterrupt
            if where == "wait" and done == 4:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    gate.set()
    assert done == 4
    plain_losses(plain, log[:4])
    assert_same_state(model, plain)
    assert threads() == []


def test_a_failing_update_reaches_the_loop() -> None:
    model = click_model()
    assert isinstance(model.embeddings, dlrm_rs.EmbeddingBagCollection)
    assert model.embeddings.fused_optimizer is not None
    done = 0
    with pytest.raises(ValueError, match="lr") as raised:  # noqa: PT012
        for done, _ in enumerate(Pipeline(model, dense_adam(model), click_log(9)), 1):
            model.embeddings.fused_optimizer.param_groups[0]["lr"] = -1.0 if done == 3 else 0.05
    assert done in (3, 4)
    assert "update" in "".join(raised.value.__notes__)
    assert threads() == []


# What is refused.


def test_models_and_options_that_cannot_be_are_refused() -> None:
    model = click_model()
    adam = dense_adam(model)
    with pytest.raises(ValueError, match="expected an EmbeddingBagCollection in it, got none"):
        Pipeline(nn.Linear(1, 1), adam, [])
    with pytest.raises(ValueError, match=r"expected a fused optimizer in collection 'embeddings'.*RowWiseAdagrad"):
        Pipeline(click_model(None), adam, [])
    with pytest.raises(ValueError, match="expected rows of collection 'embeddings' to move in backward"):
        Pipeline(click_model(SGD(lr=0.1, update="step")), adam, [])
    with pytest.raises(ValueError, match="expected the dense layers' parameters alone, got weights of tables"):
        Pipeline(model, torch.optim.SGD(model.parameters(), 0.1), [])
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer or None, got float"):
        Pipeline(model, 0.1, [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="updates: expected 'exact' or 'stale', got 'late'"):
        Pipeline(model, adam, [], updates="late")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prefetch: expected at least 1, got 0"):
        Pipeline(model, adam, [], prefetch=0)
    with pytest.raises(ValueError, match="without one use batches"):
        list(Pipeline(model, None, []))
    with pytest.raises(ValueError, match=r"expected those of \['embeddings'\], got none of \['embeddings'\]"):
        list(Pipeline(model, adam, click_log(1), features=lambda batch: {"other": batch.sparse}))
    pipeline = Pipeline(model, adam, click_log(3))
    losses = loop(pipeline)
    next(losses)
    with pytest.raises(RuntimeError, match="one loop over a pipeline at a time"):
        next(iter(pipeline))
    losses.close()


def test_frozen_tables_need_no_optimizer() -> None:
    model = click_model(None)
    model.embeddings.requires_grad_(False)
    other = copy.deepcopy(model)
    assert pipelined(model, click_log(5)) == plain_losses(other, click_log(5))


def test_other_features_and_second_lookups_are_refused_where_they_are_trained() -> None:
    log = click_log(3)
    model = click_model()

    def with_other(model: nn.Module, batch: Batch) -> Tensor:
        return click_loss(model, Batch(batch.dense, log[2].sparse, batch.labels))

    with pytest.raises(RuntimeError, match="expected those of the batch that the pipeline gave"):
        list(Pipeline(model, dense_adam(model), log, with_other))

    def twice(model: nn.Module, batch: Batch) -> Tensor:
        return click_loss(model, batch) + click_loss(model, batch)

    with pytest.raises(RuntimeError, match="expected one lookup of every batch, got a second one"):
        list(Pipeline(model, dense_adam(model), log, twice))
    assert pipelined(model, log)


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

    def train(model: nn.Module, batches: Iterator[Batch]) -> list[float]:
        optimizer = torch.optim.SGD(model.get_submodule("top").parameters(), lr=0.1)
        losses = []
        for batch in batches:
            optimizer.zero_grad()
            loss = click_loss(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert train(model, Pipeline(model, None, log).batches()) == train(plain, iter(log))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


# What it tells.


def test_the_profile_is_a_trace_of_every_stage(tmp_path: Path) -> None:
    model = click_model(device=StandIn(latency=0.001))
    pipeline = Pipeline(model, dense_adam(model), click_log(7), profile=tmp_path / "trace.json")
    list(pipeline)
    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    tracks = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    batches = {
        stage: {event["args"]["batch"] for event in spans if event["name"] == stage}
        for stage in {event["name"] for event in spans}
    }
    every = set(range(7))
    assert batches["dense layers"] == batches["sort"] == every
    assert batches["update shared"] == batches["update apart"] == every - {6}
    assert batches["lookup shared"] == every - {0}
    assert all(event["dur"] >= 0 and {"ts", "pid", "cat"} <= event.keys() for event in spans)
    assert {tracks[event["tid"]] for event in spans} == {"loader", "tables", "device"}
    summary = pipeline.summary()
    on_device = sum(event["dur"] for event in spans if tracks[event["tid"]] == "device")
    assert summary.steps == 7
    assert summary.device == pytest.approx(on_device / 1e6)
    assert summary.device >= 7 * 0.001
    assert 0 <= summary.hidden <= 1
    assert "hidden" in str(summary)
    assert "misses the last update" not in str(summary)


def test_a_stale_summary_says_so() -> None:
    model = click_model()
    pipeline = Pipeline(model, dense_adam(model), click_log(3), updates="stale")
    list(pipeline)
    assert "every lookup misses the last update" in str(pipeline.summary())


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
