"""Fused training of quantized rows: near that of fp32 rows, repeatable bit for bit, and resumed as if never stopped."""

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from torch import Tensor

import dlrm_rs
from batches import Batch, batch
from dlrm_rs.optim import SGD, Adagrad, Adam, OptimizerSpec, RowWiseAdagrad
from dlrm_rs.row_formats import QUANTIZED
from test_optim import SPECS, each_spec


def bags(spec: OptimizerSpec, dtype: str = "int8", rows: int = 20, dim: int = 16) -> dlrm_rs.EmbeddingBag:
    torch.manual_seed(2)
    return dlrm_rs.EmbeddingBag(rows, dim, mode="sum", include_last_offset=True, dtype=dtype, optimizer=spec)


def seeded(seed: int) -> Batch:
    torch.manual_seed(seed)
    return batch(20, 16)


def rows_of(module: dlrm_rs.EmbeddingBag) -> Tensor:
    return dlrm_rs.dequantize(copy.deepcopy(module)).weight.detach()


def train(module: dlrm_rs.EmbeddingBag, batches: list[Batch]) -> None:
    for ids, offsets, weights in batches:
        module(ids, offsets, weights).square().sum().backward()
        assert module.fused_optimizer is not None
        module.fused_optimizer.step()
        module.fused_optimizer.zero_grad()


def state(module: dlrm_rs.EmbeddingBag) -> dict[str, Any]:
    assert module.fused_optimizer is not None
    optimizer = module.fused_optimizer.state_dict()
    tensors = {f"{table}.{name}": x for table, parts in optimizer["state"].items() for name, x in parts.items()}
    return copy.deepcopy({**module.state_dict(), **tensors})


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@each_spec
def test_a_step_is_that_of_fp32_rows_but_for_a_step_of_the_codes(spec: OptimizerSpec) -> None:
    for dtype in QUANTIZED:
        module = bags(spec, dtype)
        reference = bags(spec, "fp32")
        with torch.no_grad():
            reference.weight.copy_(rows_of(module))
        one_batch = seeded(1)
        for one in (module, reference):
            train(one, [one_batch])
        expected, got = reference.weight.detach(), rows_of(module)
        low, high = expected.aminmax(dim=1, keepdim=True)
        step = (high - low + low.abs() / 128) / (2 ** int(dtype.removeprefix("int")) - 1) * 1.01 + 1e-6
        assert ((got - expected).abs() <= step).all()
        assert not torch.equal(got, expected)


def test_the_mean_of_many_seeds_is_that_of_fp32_rows() -> None:
    means = torch.zeros(20, 16)
    for seed in range(400):
        module = bags(SGD(lr=0.1, seed=seed))
        start = rows_of(module)
        module(torch.arange(20).view(1, 20)).backward(torch.linspace(0, 1, 16).view(1, 16))
        means += rows_of(module) / 400
    expected = start - 0.1 * torch.linspace(0, 1, 16)
    step = (expected.amax(1) - expected.amin(1)) / 255
    assert ((means - expected).abs() <= 5 * 0.5 / 20 * step.unsqueeze(1)).all()


@each_spec
def test_fifty_steps_repeat_and_resume_bit_for_bit(spec: OptimizerSpec) -> None:
    batches = [seeded(seed) for seed in range(50)]
    states = []
    for threads in (1, 2, 3, 7, 8):
        before = dlrm_rs.get_num_threads()
        dlrm_rs.set_num_threads(threads)
        module = bags(spec)
        train(module, batches)
        dlrm_rs.set_num_threads(before)
        states.append(state(module))
    assert all(same(states[0], other) for other in states[1:])

    module = bags(spec)
    train(module, batches[:20])
    file = io.BytesIO()
    assert module.fused_optimizer is not None
    torch.save((module.state_dict(), module.fused_optimizer.state_dict()), file)
    file.seek(0)
    rows, optimizer = torch.load(file, weights_only=True)
    resumed = bags(dataclasses.replace(spec, lr=1.0))
    resumed.load_state_dict(rows)
    assert resumed.fused_optimizer is not None
    resumed.fused_optimizer.load_state_dict(optimizer)
    twin = copy.deepcopy(resumed)
    for one in (module, resumed, twin):
        train(one, batches[20:])
        assert same(state(one), states[0])


@pytest.mark.parametrize("spec", [SGD(lr=0.1), Adam(lr=0.01)], ids=["SGD", "Adam"])
def test_steps_of_their_own_have_the_bits_of_those_in_backward(spec: OptimizerSpec) -> None:
    batches = [seeded(seed) for seed in range(5)]
    modules = [bags(spec), bags(dataclasses.replace(spec, update="step"))]
    for module in modules:
        train(module, batches)
    assert same(*map(state, modules))


def test_a_grad_scaler_skips_a_step_that_is_not_finite() -> None:
    module = bags(SGD(lr=0.1, update="step"))
    optimizer = module.fused_optimizer
    assert optimizer is not None
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = state(module)
    for factor in (torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(module(torch.tensor([[0, 1]])).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same(state(module), before) == (factor == torch.inf)
    (scaled, plain) = (rows_of(module), bags(SGD(lr=0.1)))
    plain(torch.tensor([[0, 1]])).sum().backward()
    assert torch.equal(scaled, rows_of(plain))


def test_gradients_that_are_not_finite_are_refused_or_seen() -> None:
    ids, bad = torch.tensor([[0, 1]]), torch.full((1, 16), torch.nan)
    for scale in (torch.float16, torch.bfloat16, torch.float32):
        module = bags(SGD(lr=0.1, check_finite=True))
        dlrm_rs.quantize(module, scale_dtype=scale)
        before = state(module)
        with pytest.raises(FloatingPointError, match="the tables are as they were"):
            module(ids).backward(bad)
        assert same(state(module), before)
        module = bags(SGD(lr=0.1))
        dlrm_rs.quantize(module, scale_dtype=scale)
        rows = rows_of(module)
        module(ids).backward(bad)
        assert module(torch.tensor([[0], [1]])).isnan().all()
        assert torch.equal(module(torch.arange(2, 20).view(18, 1)), rows[2:])


@pytest.mark.parametrize("clip", [True, False])
def test_what_is_done_to_gradients_by_hand_reaches_none_that_wait(clip: bool) -> None:
    module, plain = bags(SGD(lr=0.1, update="step")), bags(SGD(lr=0.1))
    for one in (module, plain):
        one(torch.tensor([[0, 1]])).sum().backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
    else:
        marks = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        assert len(marks) == 1
        marks[0].mul_(0.5)
    assert module.fused_optimizer is not None
    module.fused_optimizer.step()
    assert torch.equal(rows_of(module), rows_of(plain))


def test_rows_that_are_frozen_stay_and_the_others_are_trained() -> None:
    tables = [
        dlrm_rs.EmbeddingBagConfig(name, 5, 4, [name], data_type=dtype)
        for name, dtype in (("a", "int8"), ("b", "fp32"), ("c", "int8"), ("d", "int4"))
    ]
    collection = dlrm_rs.EmbeddingBagCollection(tables, optimizer=Adagrad(lr=0.1))
    collection.embedding_bags["a"].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in collection.state_dict().items()}
    collection.lookup(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3, 4])).sum().backward()
    changed = {name for name, tensor in collection.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[1] for name in changed} == {"b", "c", "d"}
    collection.requires_grad_(False)
    assert not collection.lookup(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3, 4])).requires_grad


def test_a_compiled_model_trains_quantized_rows_as_an_eager_one() -> None:
    modules = [bags(RowWiseAdagrad(lr=0.1)) for _ in range(2)]
    modules[1].compile(fullgraph=True, backend="aot_eager")
    for module in modules:
        dlrm_rs.quantize(module, scale_dtype=torch.float16)
        for seed in range(3):
            ids, *_ = seeded(seed)
            module(ids[:8].view(4, 2)).square().sum().backward()
    assert same(*map(state, modules))


def test_training_converges_as_with_fp32_rows() -> None:
    losses = {}
    for dtype in ("fp32", "int8"):
        module = bags(RowWiseAdagrad(lr=0.2), dtype, rows=200)
        generator = torch.Generator().manual_seed(3)
        target = torch.randn(200, 16, generator=generator)
        for _ in range(300):
            ids = torch.randint(200, (64, 1), generator=generator)
            loss = (module(ids) - target[ids.view(-1)]).square().mean()
            loss.backward()
        losses[dtype] = (module(torch.arange(200).view(200, 1)) - target).square().mean().item()
    assert losses["fp32"] < 0.01
    assert losses["int8"] < losses["fp32"] + 1e-3


@pytest.mark.parametrize("spec", SPECS[:1])
def test_no_state_dict_has_what_stands_in_for_the_weight(spec: OptimizerSpec) -> None:
    module = bags(spec)
    assert [name for name, _ in module.named_parameters()] == ["weight_stand_in"]
    assert set(module.state_dict()) == {"weight_codes", "weight_scales", "weight_format"}
    missing = module.load_state_dict({}, strict=False).missing_keys
    assert set(missing) == {"weight_codes", "weight_scales", "weight_format"}
