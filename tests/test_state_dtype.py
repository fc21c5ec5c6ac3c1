"""Optimizer state in bf16: near that in fp32, unbiased, and as exact to save, resume and copy."""

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from torch import Tensor

import dlrm_rs
from batches import Batch, batch
from dlrm_rs.optim import FTRL, SGD, Adagrad, Adam, FusedOptimizer, OptimizerSpec, RowWiseAdagrad
from test_optim import SPECS, loss

SPECS_WITH_STATE = [
    dataclasses.replace(spec, state_dtype="bf16")
    for spec in SPECS
    if spec.algorithm != "sgd" and not isinstance(spec, FTRL)
]
each_spec = pytest.mark.parametrize("spec", SPECS_WITH_STATE, ids=lambda spec: type(spec).__name__)


def bags(spec: OptimizerSpec, dtype: str = "fp32", rows: int = 20) -> tuple[dlrm_rs.EmbeddingBag, FusedOptimizer]:
    """A module and its optimizer."""
    torch.manual_seed(2)
    module = dlrm_rs.EmbeddingBag(rows, 17, mode="sum", dtype=dtype, optimizer=spec)
    assert module.fused_optimizer is not None
    return module, module.fused_optimizer


def state_of(optimizer: FusedOptimizer) -> list[Tensor]:
    return [tensor for by_name in optimizer.state.values() for tensor in by_name.values()]


def train(module: dlrm_rs.EmbeddingBag, batches: list[Batch]) -> None:
    for step in batches:
        loss(module(step.indices, step.offsets[:-1])).backward()


def batches(count: int) -> list[Batch]:
    torch.manual_seed(5)
    return [batch(20, 16) for _ in range(count)]


@each_spec
def test_fifty_steps_are_near_those_with_state_in_fp32(spec: OptimizerSpec) -> None:
    (ours, optimizer), (fp32, wanted) = bags(spec), bags(dataclasses.replace(spec, state_dtype="fp32"))
    start = ours.weight.detach().clone()
    torch.manual_seed(6)
    for step in batches(50):
        # The same gradients for both: what differs is what is made of them.
        grad = torch.randn(len(step.offsets) - 1, 17)
        for module in (ours, fp32):
            module(step.indices, step.offsets[:-1]).backward(grad)
    for got, expected in zip(state_of(optimizer), state_of(wanted), strict=True):
        assert got.dtype is torch.bfloat16
        assert (got.float() - expected).norm() <= 0.05 * expected.norm()
    moved = (fp32.weight - start).norm()
    assert 0 < (ours.weight - fp32.weight).norm() <= 0.03 * moved


@pytest.mark.parametrize("kind", [Adagrad, RowWiseAdagrad])
def test_sums_grow_by_less_than_they_can_hold(kind: type[Adagrad]) -> None:
    steps = 3000
    module, optimizer = bags(kind(lr=0.0, state_dtype="bf16"), rows=1000)
    nearest = torch.zeros(1, dtype=torch.bfloat16)
    for _ in range(steps):
        module(torch.arange(1000).view(1000, 1)).backward(torch.ones(1000, 17))
        nearest += 1
    (sums,) = state_of(optimizer)
    assert nearest.item() == 256  # where 1 is half of what separates neighbours
    assert abs(sums.double().mean().item() / steps - 1) < 4 * 0.07 / sums.numel() ** 0.5
    assert 0.01 < sums.double().std().item() / steps < 0.07


def test_a_second_moment_follows_a_gradient_that_fades() -> None:
    # By rounding to the nearest it would stay: 0.001 of a number is less than half of what separates it from the next.
    module, optimizer = bags(Adam(lr=0.0, state_dtype="bf16"), rows=1000)
    ids = torch.arange(1000).view(1000, 1)
    module(ids).backward(torch.ones(1000, 17))
    start = [tensor.double().mean().item() for tensor in state_of(optimizer)]
    for _ in range(1000):
        module(ids).backward(torch.zeros(1000, 17))
    first, second = (tensor.double() for tensor in state_of(optimizer))
    assert first.abs().max() < 1e-30 * start[0]
    assert abs(second.mean().item() / start[1] / 0.999**1000 - 1) < 0.01
    assert second.std() < 0.07 * second.mean()


@each_spec
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_checkpoints_and_copies_resume_to_the_same_bits(dtype: str, spec: OptimizerSpec) -> None:
    steps = batches(10)
    straight, expected = bags(spec, dtype)
    train(straight, steps)
    first, optimizer = bags(spec, dtype)
    train(first, steps[:5])
    file = io.BytesIO()
    torch.save((first.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    rows, saved = torch.load(file, weights_only=True)
    second, optimizer = bags(spec, dtype)
    train(second, steps[3:4])
    second.load_state_dict(rows)
    optimizer.load_state_dict(saved)
    twin = copy.deepcopy(second)
    assert twin.fused_optimizer is not None
    for module, of in ((second, optimizer), (twin, twin.fused_optimizer)):
        train(module, steps[5:])
        assert all(map(torch.equal, state_of(of), state_of(expected)))
        assert all(map(torch.equal, module.state_dict().values(), straight.state_dict().values()))


def test_it_takes_half_the_bytes() -> None:
    half, full = (bags(Adam(state_dtype=dtype))[0] for dtype in (torch.bfloat16, torch.float32))
    reports = [module.memory_report()["embedding_bag"]["state"] for module in (half, full)]
    assert reports == [20 * 17 * 2 * 2, 20 * 17 * 2 * 4]


def test_state_of_fp32_loads_as_the_nearest() -> None:
    (full, of_full), (_, of_half) = bags(Adagrad(lr=0.1)), bags(Adagrad(lr=0.1, state_dtype="bf16"))
    train(full, batches(3))
    of_half.load_state_dict(copy.deepcopy(of_full.state_dict()))
    assert torch.equal(state_of(of_half)[0], state_of(of_full)[0].bfloat16())


def test_it_stays_where_rows_become_codes_and_with_a_start() -> None:
    module, optimizer = bags(RowWiseAdagrad(lr=0.1, state_dtype="bf16", initial_accumulator_value=0.5))
    assert state_of(optimizer)[0].tolist() == [0.5] * 20
    train(module, batches(2))
    before = state_of(optimizer)[0].clone()
    dlrm_rs.quantize(module, "int8", keep_optimizer=True)
    assert torch.equal(state_of(optimizer)[0], before)
    train(module, batches(1))
    assert not torch.equal(state_of(optimizer)[0], before)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: SGD(lr=0.1, state_dtype="bf8"), TypeError, r"state_dtype: expected one of .* got 'bf8'"),
        (lambda: bags(Adam(state_dtype="fp16")), ValueError, r"state_dtype: expected fp32 or bf16, got fp16"),
        (lambda: bags(FTRL(state_dtype="bf16")), ValueError, r"state_dtype: expected fp32 for ftrl, .*got bf16"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
