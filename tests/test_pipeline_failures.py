"""What ends a pipeline early, and what it refuses: nothing hangs, and tables end after a whole step."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlrm_rs
from clicks import (
    NAMES,
    Updates,
    assert_same_state,
    click_log,
    click_model,
    dense_adam,
    loop,
    pipelined,
    plain_losses,
    state,
    trained,
)
from dlrm_rs import Pipeline
from dlrm_rs.data import Batch
from dlrm_rs.devices import StandIn
from dlrm_rs.optim import SGD, RowWiseAdagrad
from dlrm_rs.pipeline.lane import Visit
from dlrm_rs.pipeline.parting import Parting, Trials
from dlrm_rs.pipeline.pipeline import click_loss

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def threads() -> list[str]:
    """Those of a pipeline that are still there."""
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("dlrm-rs-") for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dlrm-rs-")]


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


def interrupted(log: list[Batch]) -> Iterator[Batch]:
    yield from log[:5]
    raise KeyboardInterrupt("in the loader")


def no_features(log: list[Batch]) -> Iterator[Any]:
    yield from log[:5]
    yield log[5].dense


@pytest.mark.parametrize(
    ("loader", "error", "words", "note"),
    [
        (failing_loader, OSError, "the disk is gone", "loading of batch 5"),
        (interrupted, KeyboardInterrupt, "in the loader", "loading of batch 5"),
        (bad_id, IndexError, r"indices\[7\]: expected 0 <= id < 3000, the rows of table 't0'", "sort of batch 5"),
        (bad_offsets, ValueError, "offsets", "sort of batch 5"),
        (no_features, ValueError, "expected one KeyedJaggedTensor in a batch, got 0 in Tensor", "loading of batch 5"),
    ],
)
@pytest.mark.parametrize("updates", ["exact", "stale"])
def test_a_failure_of_a_thread_reaches_the_loop_after_the_batches_before_it(
    loader: Callable[[list[Batch]], Iterator[Any]], error: type[BaseException], words: str, note: str, updates: Updates
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


# The call that fails, how much is parted, and what the failure tells; in stale mode nothing is parted.
STAGES = [
    ("prepare", (), Parting.NOTHING, "sort of batch 5"),
    ("lookup", (), Parting.NOTHING, "lookup of batch 5"),
    ("send", (), Parting.NOTHING, "send of batch 5"),
    ("update", (), Parting.NOTHING, "update of batch 5"),
    ("overlap", (), Parting.ROWS_AND_BAGS, "overlap of batch 6"),
    ("lookup", ("apart",), Parting.ROWS_AND_BAGS, "lookup apart of batch 5"),
    ("lookup", ("shared",), Parting.ROWS_AND_BAGS, "lookup shared of batch 5"),
    ("lookup", ("shared",), Parting.ROWS, "lookup shared of batch 5"),
    ("wait", (), Parting.ROWS_AND_BAGS, "gradient of batch 5"),
    ("update", ("shared",), Parting.ROWS_AND_BAGS, "update shared of batch 5"),
    ("update", ("apart",), Parting.ROWS_AND_BAGS, "update apart of batch 5"),
]


@pytest.mark.parametrize("device", [None, StandIn(0.002, 2e8)], ids=["CPU", "stand-in"])
@pytest.mark.parametrize(
    ("updates", "method", "part", "parting", "stage"),
    [("exact", *stage) for stage in STAGES] + [("stale", *stage) for stage in STAGES if Parting.NOTHING in stage],
)
def test_a_failure_of_any_stage_ends_the_loop(
    monkeypatch: pytest.MonkeyPatch,
    device: StandIn | None,
    updates: Updates,
    method: str,
    part: tuple[str, ...],
    parting: Parting,
    stage: str,
) -> None:
    log = click_log(9)
    real = getattr(Visit, method)

    def failing(visit: Visit, *given: Any) -> Any:
        if visit.is_of(log[5].sparse) and (method == "overlap" or given[1:] == part):
            raise OSError("the stage is gone")
        return real(visit, *given)

    monkeypatch.setattr(Trials, "choose", lambda _: parting)
    monkeypatch.setattr(Visit, method, failing)
    model, other = click_model(device=device), click_model()
    losses: list[float] = []
    with pytest.raises(OSError, match="the stage is gone") as raised:
        losses.extend(loss.item() for loss in Pipeline(model, dense_adam(model), log, updates=updates))
    assert stage in "".join(raised.value.__notes__)
    assert threads() == []
    monkeypatch.undo()
    # A failure after the batch's loss comes with the next one, or the one after it.
    assert len(losses) == 5 if "lookup" in stage or method in ("prepare", "send") else len(losses) in (5, 6, 7)
    assert losses == pipelined(other, log, updates=updates)[: len(losses)]
    assert len(pipelined(model, log[:3], updates=updates)) == 3


class Faulty(StandIn):
    """A stand-in of which the copies in one direction fail from the fifth on."""

    def __init__(self, there: bool) -> None:
        super().__init__(0.001, 2e8)
        self._fails_there, self._copies_made = there, 0

    def _copy(self, source: Tensor, ring: Any, begin: float) -> Any:
        if (ring is self._memory) is self._fails_there:
            self._copies_made += 1
            if self._copies_made == 5:
                raise OSError("the bus is gone")
        return super()._copy(source, ring, begin)


@pytest.mark.parametrize("updates", ["exact", "stale"])
@pytest.mark.parametrize("there", [True, False])
def test_a_failure_of_the_device_ends_the_loop_after_a_whole_step(there: bool, updates: Updates) -> None:
    log, model, other = click_log(9), click_model(device=Faulty(there)), click_model()
    losses: list[float] = []
    with pytest.raises(OSError, match="the bus is gone") as raised:
        losses.extend(loss.item() for loss in Pipeline(model, dense_adam(model), log, updates=updates))
    if not there:
        assert "gradient of batch 4" in "".join(raised.value.__notes__)
    assert len(losses) == 4 if there else len(losses) in (4, 5, 6)
    assert losses == pipelined(other, log, updates=updates)[: len(losses)]
    assert steps(model) == 4
    assert threads() == []
    assert len(pipelined(model, log[:3], updates=updates)) == 3


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
@pytest.mark.parametrize("clip_norm", [None, 0.1], ids=["refused", "has no norm"])
def test_an_infinite_gradient_that_is_refused_gets_into_no_table(clip_norm: float | None, updates: Updates) -> None:
    log = click_log(8)
    optimizer = RowWiseAdagrad(lr=0.05, clip_norm=clip_norm)
    model = click_model(optimizer)
    pipeline = Pipeline(model, dense_adam(model), log, infinite_at(4), check_finite=clip_norm is None, updates=updates)
    words = r"got \d+ that are inf" if clip_norm is None else "clip_norm scales all by their norm, got a norm of"
    with pytest.raises(FloatingPointError, match=f"expected finite numbers, .*{words}") as raised:
        list(pipeline)
    assert "gradient of batch 4" in "".join(raised.value.__notes__)
    other = click_model(optimizer)
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
@pytest.mark.parametrize("updates", ["exact", "stale"])
def test_ctrl_c_ends_the_loop_after_a_whole_step(where: str, updates: Updates) -> None:
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
        for done, _ in enumerate(Pipeline(model, dense_adam(model), loader(), loss, updates=updates), 1):
            if where == "body" and done == 4:
                raise KeyboardInterrupt
            if where == "wait" and done == 4:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    gate.set()
    assert done == 4
    assert threads() == []
    losses = loop(Pipeline(plain, dense_adam(plain), log, updates=updates))
    for _ in range(4):
        next(losses)
    losses.close()
    assert_same_state(model, plain)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("thread", ["dlrm-rs-loader", "dlrm-rs-tables"])
@pytest.mark.parametrize("is_running", [False, True])
def test_ctrl_c_while_the_loop_begins_leaves_the_model_free(
    monkeypatch: pytest.MonkeyPatch, thread: str, is_running: bool
) -> None:
    model, plain, log = click_model(), click_model(), click_log(4)
    start = threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        if self.name != thread or is_running:
            start(self)
        if self.name == thread:
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipelined(model, log)
    monkeypatch.undo()
    assert threads() == []
    assert pipelined(model, log) == plain_losses(plain, log)


def test_ctrl_c_when_a_lock_has_just_been_taken_leaves_no_thread_that_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the lock's taking and the body of `with`, nothing but the pipeline itself knows that it is taken."""
    model, plain, log = click_model(), click_model(), click_log(6)
    is_left = threading.Event()

    def batches() -> Iterator[Batch]:
        yield log[0]
        is_left.wait(60)
        yield log[1]

    pipeline = Pipeline(model, dense_adam(model), batches())
    losses = iter(pipeline)
    assert [next(losses).item()] == plain_losses(plain, log[:1])
    enter = threading.Condition.__enter__

    def interrupted(self: threading.Condition) -> bool:
        taken = enter(self)
        if pipeline._run is not None and self is pipeline._run._shared.changed and threading.current_thread() is main:
            monkeypatch.undo()
            raise KeyboardInterrupt
        return taken

    main = threading.main_thread()
    monkeypatch.setattr(threading.Condition, "__enter__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(losses)
    is_left.set()
    assert threads() == []
    assert_same_state(model, plain)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("is_left", [False, True])
def test_ctrl_c_while_the_loop_is_being_left_waits_for_the_last_update(
    monkeypatch: pytest.MonkeyPatch, is_left: bool
) -> None:
    model, plain, log = click_model(), click_model(), click_log(5)
    update = Visit.update
    leaving = threading.Event()

    def late_update(visit: Visit, *part: Any) -> None:
        if visit.is_of(log[2].sparse):
            leaving.wait(60)
            time.sleep(0.1)  # by now the user's thread waits
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        update(visit, *part)

    def leave() -> None:
        for number, _ in enumerate(Pipeline(model, dense_adam(model), log)):
            if number == 2:
                leaving.set()
                break
        time.sleep(60)  # where it comes when nothing of the loop is left

    monkeypatch.setattr(Visit, "update", late_update)
    losses = loop(Pipeline(model, dense_adam(model), log))
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        if is_left:
            leave()
        for _ in range(3):
            next(losses)
        leaving.set()
        losses.close()
        time.sleep(60)
    monkeypatch.undo()
    assert threads() == []
    trained(plain, dense_adam(plain), log[:3])
    assert_same_state(model, plain)
    assert pipelined(model, log)


def test_a_loader_that_is_left_can_be_gone_on_with() -> None:
    """A generator cannot be asked for a batch while another thread waits for one."""
    ended = threading.Event()

    def loader() -> Iterator[Batch]:
        try:
            for batch in click_log(12):
                time.sleep(0.03)
                yield batch
        finally:
            ended.set()

    model, batches = click_model(), loader()
    for number, _ in enumerate(Pipeline(model, dense_adam(model), batches)):
        if number == 2:
            break
    assert len([thread for thread in threading.enumerate() if thread.name.startswith("dlrm-rs-")]) == 0
    assert 4 <= len(pipelined(model, batches)) <= 9  # without those that had been loaded ahead
    ended.clear()
    for _ in Pipeline(model, dense_adam(model), loader()):
        break
    assert ended.is_set()  # with the last that held it


ABANDONED = """
import atexit, sys, threading
# What is registered first comes last, just before the interpreter takes its threads down.
atexit.register(lambda: print([thread.name for thread in threading.enumerate() if "dlrm-rs-" in thread.name]))
import torch
torch.set_num_threads(1)
from clicks import click_log, click_model, dense_adam
from dlrm_rs import Pipeline
from dlrm_rs.devices import StandIn

model = click_model(device=StandIn(0.7))
losses = iter(Pipeline(model, dense_adam(model), click_log(9), updates=sys.argv[1]))
next(losses)
raise ValueError("the user's")
"""


@pytest.mark.parametrize("updates", ["exact", "stale"])
def test_an_interpreter_that_ends_inside_of_a_loop_ends_as_it_should(updates: Updates) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = [sys.executable, "-c", ABANDONED, updates]
    ended = subprocess.run(run, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout == "[]\n"
    assert ended.stderr.endswith("ValueError: the user's\n")


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_inside_of_a_loop_has_a_model_of_its_own() -> None:
    model, plain, log = click_model(), click_model(), click_log(6)
    losses = loop(Pipeline(model, dense_adam(model), log))
    expected = plain_losses(plain, log)
    first = next(losses).item()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            torch.set_num_threads(1)
            with torch.no_grad():
                click_loss(model, log[3]).item()
            with pytest.raises(RuntimeError, match="got one in a fork of it"):
                next(losses)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [first, *(loss.item() for loss in losses)] == expected


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


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError("backward is broken")


@pytest.mark.parametrize("updates", ["exact", "stale"])
@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_a_failure_of_the_model_ends_the_loop_after_a_whole_step(where: str, updates: Updates) -> None:
    log, model, other = click_log(9), click_model(), click_model()
    optimizer = dense_adam(model)
    count = 0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal count
        count += 1
        result = click_loss(model, batch)
        if count < 5:
            return result
        if where == "forward":
            raise ArithmeticError("forward is broken")
        return result if where == "optimizer" else Broken.apply(result)

    def fail(*_: Any) -> None:
        if count == 5:
            raise ArithmeticError("the optimizer is broken")

    if where == "optimizer":
        optimizer.register_step_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="is broken"):
        list(Pipeline(model, optimizer, log, loss, updates=updates))
    assert threads() == []
    # The tables have the gradients that there were.
    whole = 5 if where == "optimizer" else 4
    losses = loop(Pipeline(other, dense_adam(other), log, updates=updates))
    for _ in range(whole):
        next(losses)
    losses.close()
    assert_same_state(model, other, but=("bottom", "top") if where == "optimizer" else ())
    assert len(pipelined(model, click_log(3), updates=updates)) == 3


@pytest.mark.parametrize("updates", ["exact", "stale"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_loaders_of_no_and_of_few_batches(count: int, updates: Updates) -> None:
    model, plain = click_model(), click_model()
    pipeline = Pipeline(model, dense_adam(model), (batch for batch in click_log(count)), updates=updates)
    assert len([loss.item() for loss in pipeline]) == count
    assert list(pipeline) == []  # the generator has ended
    if count < 2 or updates == "exact":
        plain_losses(plain, click_log(count))
        assert_same_state(model, plain)
    assert threads() == []


def test_a_loader_that_cannot_be_iterated_over_fails_in_the_loop() -> None:
    model = click_model()
    with pytest.raises(TypeError, match="not iterable"):
        list(Pipeline(model, dense_adam(model), 7))  # type: ignore[arg-type]
    assert threads() == []


def test_two_pipelines_at_once_are_refused_over_the_same_tables_alone() -> None:
    log, model, other, plain = click_log(6), click_model(), click_model(), click_model()
    losses, others = loop(Pipeline(model, dense_adam(model), log)), loop(Pipeline(other, dense_adam(other), log))
    first = [next(losses).item(), next(others).item()]
    with pytest.raises(RuntimeError, match="collection 'embeddings' is in another pipeline's loop"):
        next(loop(Pipeline(model, dense_adam(model), log)))
    rest = [[one.item(), two.item()] for one, two in zip(losses, others, strict=True)]
    assert [first, *rest] == [[loss, loss] for loss in plain_losses(plain, log)]
    assert_same_state(model, plain)
    assert_same_state(other, plain)
    assert threads() == []


@pytest.mark.parametrize("updates", ["exact", "stale"])
def test_gradients_that_the_optimizer_refuses_are_refused(updates: Updates) -> None:
    model = click_model(device=StandIn(latency=0.0))
    (collection,) = (module for module in model.modules() if isinstance(module, dlrm_rs.EmbeddingBagCollection))
    assert collection.fused_optimizer is not None
    collection.fused_optimizer.param_groups[0]["check_finite"] = True
    with pytest.raises(FloatingPointError, match="expected finite numbers"):
        list(loop(Pipeline(model, dense_adam(model), click_log(9), infinite_at(2), updates=updates)))
    assert steps(model) == 2


@pytest.mark.parametrize("updates", ["exact", "stale"])
def test_a_failure_while_the_loop_is_being_left_does_not_hang(updates: Updates) -> None:
    """The gradient of the last batch, which the pipeline still waits for, is refused."""
    model = click_model(device=StandIn(latency=0.05))
    pipeline = Pipeline(model, dense_adam(model), click_log(9), infinite_at(2), check_finite=True, updates=updates)
    losses = loop(pipeline)
    for _ in range(3):
        next(losses)
    with pytest.raises(FloatingPointError, match="expected finite numbers"):
        losses.close()
    assert steps(model) == 2
    assert threads() == []
    assert len(pipelined(model, click_log(3), updates=updates)) == 3


def test_a_pipeline_that_is_dropped_in_a_loop_ends() -> None:
    model, plain = click_model(), click_model()
    losses = loop(Pipeline(model, dense_adam(model), click_log(9)))
    next(losses)
    del losses
    assert threads() == []
    plain_losses(plain, click_log(1))
    assert_same_state(model, plain)


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
    for prefetch in (2.5, float("nan"), "2"):
        with pytest.raises(TypeError, match="prefetch: expected an integer"):
            Pipeline(model, adam, [], prefetch=prefetch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without one use batches"):
        list(Pipeline(model, None, []))
    with pytest.raises(ValueError, match=r"expected those of \['embeddings'\], got none of \['embeddings'\]"):
        list(Pipeline(model, adam, click_log(1), features=lambda batch: {"other": batch.sparse}))
    with pytest.raises(TypeError, match=r"return a KeyedJaggedTensor, or a mapping of one .*, got NoneType"):
        list(Pipeline(model, adam, click_log(1), features=lambda batch: None))  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="got one of Tensor"):
        list(Pipeline(model, adam, click_log(1), features=lambda batch: {"embeddings": batch.dense}))
    pipeline = Pipeline(model, adam, click_log(3))
    losses = loop(pipeline)
    next(losses)
    with pytest.raises(RuntimeError, match="one loop over a pipeline at a time"):
        next(iter(pipeline))
    losses.close()


def test_other_features_and_second_lookups_are_refused_where_they_are_trained() -> None:
    log = click_log(3)
    model = click_model()

    def with_other(model: nn.Module, batch: Batch) -> Tensor:
        return click_loss(model, Batch(batch.dense, log[2].sparse, batch.labels))

    with pytest.raises(RuntimeError, match="expected the features of the batch that the pipeline gave"):
        list(Pipeline(model, dense_adam(model), log, with_other))

    def twice(model: nn.Module, batch: Batch) -> Tensor:
        return click_loss(model, batch) + click_loss(model, batch)

    with pytest.raises(RuntimeError, match="expected one lookup of every batch, got a second one"):
        list(Pipeline(model, dense_adam(model), log, twice))
    assert pipelined(model, log)


@pytest.mark.parametrize("is_left", [False, True])
def test_a_lookup_that_fails_ends_the_loop_at_once_and_only_for_who_wants_its_rows(
    monkeypatch: pytest.MonkeyPatch, is_left: bool
) -> None:
    log = click_log(9)
    lookup = Visit.lookup

    def failing(visit: Visit, *part: Any) -> None:
        if visit.is_of(log[5].sparse):
            raise OSError("no such row")
        lookup(visit, *part)

    def train() -> None:
        optimizer = dense_adam(model)
        batches = Pipeline(model, None, log).batches()
        for number, batch in enumerate(batches):
            if is_left and number == 5:
                break
            optimizer.zero_grad()
            click_loss(model, batch).backward()
            optimizer.step()

    monkeypatch.setattr(Visit, "lookup", failing)
    model, plain = click_model(), click_model()
    if is_left:
        train()
    else:
        with pytest.raises(OSError, match="no such row") as raised:
            train()
        assert "of batch 5" in raised.value.__notes__[0]
        del raised
    plain_losses(plain, log[:5])
    assert_same_state(model, plain)
    assert threads() == []
    monkeypatch.setattr(Visit, "lookup", lookup)
    assert len(pipelined(model, log[:2])) == 2  # the loop before has let go of the tables
