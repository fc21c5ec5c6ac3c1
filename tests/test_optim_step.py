"""Updates that wait for `step()`: accumulated, scaled, skipped, and several lookups as one."""

import copy
import gc
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import dlrm_rs
from batches import batch
from dlrm_rs.optim import SGD, Adagrad, Adam, FusedOptimizer, OptimizerSpec


def fused(spec: OptimizerSpec, **kwargs: Any) -> tuple[dlrm_rs.EmbeddingBag, FusedOptimizer]:
    """A module and its optimizer."""
    torch.manual_seed(2)
    module = dlrm_rs.EmbeddingBag(20, 5, **{"mode": "sum", "optimizer": spec, **kwargs})
    assert module.fused_optimizer is not None
    return module, module.fused_optimizer


def collection(spec: OptimizerSpec, pooling: str = "sum", is_weighted: bool = False) -> dlrm_rs.EmbeddingBagCollection:
    """Two tables, one with two features."""
    torch.manual_seed(3)
    tables = [
        dlrm_rs.EmbeddingBagConfig("t", 20, 5, ["a", "b"], pooling=pooling),
        dlrm_rs.EmbeddingBagConfig("u", 30, 3, ["c"], pooling=pooling),
    ]
    return dlrm_rs.EmbeddingBagCollection(tables, is_weighted, optimizer=spec)


def ids_of(samples: range) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, offsets and weights of some samples, feature-major."""
    bags = [[(7 * s + 3 * k + f) % 20 for k in range((s + f) % 4)] for f in range(3) for s in samples]
    flat = [id_ for bag in bags for id_ in bag]
    offsets = torch.tensor([0, *map(len, bags)]).cumsum(0)
    weights = torch.tensor([0.1 * id_ + 0.5 for id_ in flat])
    return torch.tensor(flat, dtype=torch.int64), offsets, weights


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 0.3])
def test_micro_batches_have_the_bits_of_one_batch(clip_norm: float | None, pooling: str, is_weighted: bool) -> None:
    results = []
    for parts in ([range(12)], [range(4), range(4, 5), range(5, 5), range(5, 12)]):
        module = collection(Adagrad(lr=0.1, update="step", clip_norm=clip_norm), pooling, is_weighted)
        before = copy.deepcopy(module.state_dict())
        for samples in parts:
            ids, offsets, weights = ids_of(samples)
            out = module.lookup(ids, offsets, weights if is_weighted else None)
            grad = torch.linspace(-1, 1, 12 * out.shape[1]).view(12, -1)[list(samples)]
            out.backward(grad)
        assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())
        optimizer = module.fused_optimizer
        assert optimizer is not None
        optimizer.step()
        assert [group["step"] for group in optimizer.param_groups] == [1]
        results.append([*module.state_dict().values(), *(s["sum"] for s in optimizer.state.values())])
    assert all(map(torch.equal, *results))


def test_micro_batches_of_maxima_have_the_bits_of_one_batch() -> None:
    results = []
    ids = torch.arange(40).view(10, 4) * 7 % 20
    for parts in ([slice(0, 10)], [slice(0, 3), slice(3, 10)]):
        module, optimizer = fused(Adagrad(lr=0.1, update="step"), mode="max")
        for part in parts:
            module(ids[part]).backward(torch.linspace(-1, 1, 50).view(10, 5)[part])
        optimizer.step()
        results.append(module.weight.detach())
    assert torch.equal(*results)


def test_rows_that_are_not_pooled_accumulate() -> None:
    results = []
    ids = torch.tensor([3, 1, 3, 3, 0, 2])
    for parts in ([slice(0, 6)], [slice(0, 2), slice(2, 6)]):
        torch.manual_seed(1)
        module = dlrm_rs.Embedding(5, 3, optimizer=Adagrad(lr=0.1, update="step"))
        for part in parts:
            module(ids[part]).backward(torch.linspace(-1, 1, 18).view(6, 3)[part])
        assert module.fused_optimizer is not None
        module.fused_optimizer.step()
        results.append(module.weight.detach())
    assert torch.equal(*results)


def test_two_lookups_in_one_graph_are_one_step_as_torchs() -> None:
    spec = Adagrad(lr=0.1, update="step")
    ours, optimizer = fused(spec)
    theirs = torch.nn.EmbeddingBag(20, 5, mode="sum", sparse=True)
    theirs.load_state_dict(ours.state_dict())
    adagrad = torch.optim.Adagrad(theirs.parameters(), lr=0.1)
    for step in [batch(20, 16) for _ in range(5)]:
        for module, optimizer_ in ((ours, optimizer), (theirs, adagrad)):
            optimizer_.zero_grad()
            first = module(step.indices, step.offsets[:-1])
            second = module(step.indices.flip(0)[:7].view(7, 1))
            (first.square().sum() + second.sin().sum()).backward()
            optimizer_.step()
    assert torch.allclose(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)


def test_checkpointed_lookups_train_once() -> None:
    for update in ("backward", "step"):
        module, optimizer = fused(SGD(lr=1.0, update=update))
        torch.nn.init.zeros_(module.weight)
        ids = torch.tensor([[1, 1]])
        out = torch.utils.checkpoint.checkpoint(lambda ids: module(ids) * 1.0, ids, use_reentrant=False)  # noqa: B023
        out.sum().backward()
        optimizer.step()
        assert module.weight[1].tolist() == [-2] * 5


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 0.3])
def test_a_grad_scaler_unscales_and_skips(clip_norm: float | None, unscale: bool) -> None:
    spec = Adam(lr=0.1, update="step", clip_norm=clip_norm)
    (module, optimizer), (plain, plain_optimizer) = fused(spec), fused(spec)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, bad in enumerate([False, True, False]):
        ids = torch.tensor([[step, 3]])
        optimizer.zero_grad()
        plain_optimizer.zero_grad()
        before = module.weight.detach().clone()
        factor = float("inf") if bad else 1.0
        scaler.scale(module(ids).square().sum() * factor).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert torch.equal(module.weight, before)
            assert scaler.get_scale() == 512
        else:
            plain(ids).square().sum().backward()
            plain_optimizer.step()
        assert torch.equal(module.weight, plain.weight)
    assert optimizer.param_groups[0]["step"] == 2


@pytest.mark.parametrize("drop", ["optimizer", "module", "by hand"])
def test_dropped_gradients_move_nothing(drop: str) -> None:
    module, optimizer = fused(SGD(lr=1.0, update="step"))
    before = module.weight.detach().clone()
    module(torch.tensor([[1]])).sum().backward()
    if drop == "optimizer":
        optimizer.zero_grad()
    elif drop == "module":
        module.zero_grad()
    else:
        for parameter in module.parameters():
            parameter.grad = None
    optimizer.step()
    assert torch.equal(module.weight, before)
    module(torch.tensor([[2]])).sum().backward()
    optimizer.step()
    assert (module.weight != before).any(1).nonzero().tolist() == [[2]]


def test_a_step_is_taken_once_more_where_gradients_are_not_dropped() -> None:
    # As torch's optimizers, which apply whatever is in `grad`.
    module, optimizer = fused(SGD(lr=1.0, update="step"))
    torch.nn.init.zeros_(module.weight)
    module(torch.tensor([[1]])).sum().backward()
    optimizer.step()
    optimizer.step()
    assert module.weight[1].tolist() == [-2] * 5


@pytest.mark.parametrize("update", ["backward", "step"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_finite_refuses_and_changes_nothing(update: Any, value: float) -> None:
    module, optimizer = fused(Adam(lr=0.1, update=update, check_finite=True))
    before = copy.deepcopy([module.state_dict(), optimizer.state_dict()])
    with pytest.raises(FloatingPointError, match="gradient: expected finite numbers"):
        (module(torch.tensor([[1]])) * value).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    after = [module.state_dict(), optimizer.state_dict()]
    assert str(after) == str(before)


def test_a_change_in_place_before_the_step_is_refused() -> None:
    module, optimizer = fused(SGD(lr=1.0, update="step"))
    before = module.weight.detach().clone()
    ids = torch.tensor([[1]])
    module(ids).sum().backward()
    ids.fill_(2)
    with pytest.raises(RuntimeError, match=r"step: expected ids, .* changed in place"):
        optimizer.step()
    assert torch.equal(module.weight, before)
    assert optimizer.param_groups[0]["step"] == 0


def test_a_copy_steps_as_the_module_does() -> None:
    module, _ = fused(SGD(lr=1.0, update="step"))
    again = copy.deepcopy(module)
    before = again.weight.detach().clone()
    again(torch.tensor([[1]])).sum().backward()
    assert torch.equal(again.weight, before)
    assert again.fused_optimizer is not None
    again.fused_optimizer.step()
    assert not torch.equal(again.weight, before)
    assert not torch.equal(again.weight, module.weight)


def test_a_closure_is_computed_first() -> None:
    module, optimizer = fused(SGD(lr=1.0, update="step"))
    torch.nn.init.zeros_(module.weight)

    def closure() -> float:
        optimizer.zero_grad()
        out = module(torch.tensor([[0]])).sum()
        out.backward()
        return float(out.detach())

    assert optimizer.step(closure) == 0
    assert optimizer.step(closure) == -5
    assert module.weight[0].tolist() == [-2] * 5


def test_a_grad_scaler_is_refused_where_rows_move_in_backward() -> None:
    module, optimizer = fused(Adam(lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(module(torch.tensor([[1, 3]])).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler: expected a fused optimizer with update='step'"):
        scaler.step(optimizer)
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)


FORMATS = ["fp32", "fp16", "bf16", "bf16-split", "int8"]


def of_zeros(row_format: str = "fp32", **kwargs: Any) -> tuple[dlrm_rs.EmbeddingBag, FusedOptimizer]:
    """A module of zeros whose rows move by their gradient; those of equal elements are exact in every format."""
    spec = SGD(lr=1.0, update="step", split_bf16=row_format == "bf16-split", check_finite=kwargs.pop("check", False))
    return fused(spec, dtype=row_format.removesuffix("-split"), _weight=torch.zeros(20, 5), **kwargs)


def moved(module: dlrm_rs.EmbeddingBag) -> dict[int, float]:
    """The rows that are not zero, and their first elements."""
    with torch.no_grad():
        first = module(torch.arange(20).unsqueeze(1))[:, 0]
    return {row: float(x) for row, x in enumerate(first) if x}


@pytest.mark.parametrize("row_format", FORMATS)
def test_rows_of_every_format_accumulate(row_format: str) -> None:
    module, optimizer = of_zeros(row_format)
    for _ in range(3):
        for ids in ([[1, 1]], [[2]]):
            module(torch.tensor(ids)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert moved(module) == {1: -6, 2: -3}


@pytest.mark.parametrize("formats", [("fp16", "fp32"), ("fp32", "fp16"), ("fp16", "int8"), ("fp16", "fp16")])
def test_tables_of_several_formats_wait_together(formats: tuple[str, str]) -> None:
    tables = [
        dlrm_rs.EmbeddingBagConfig(f"t{i}", 4, 3, [f"f{i}"], data_type=name, init_fn=torch.nn.init.zeros_)
        for i, name in enumerate(formats)
    ]
    module = dlrm_rs.EmbeddingBagCollection(tables, optimizer=SGD(lr=1.0, update="step"))
    assert module.fused_optimizer is not None
    bags = torch.tensor([1, 2]), torch.tensor([0, 1, 2])
    for _ in range(2):
        module.zero_grad()
        module.lookup(*bags).sum().backward()
        module.fused_optimizer.step()
    assert torch.equal(module.lookup(*bags).detach(), torch.full((1, 6), -2.0))
    assert all("stand_in" not in key and "mark" not in key for key in module.state_dict())
    module.load_state_dict(module.state_dict())


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_trains_rows_of_every_format(row_format: str, unscale: bool) -> None:
    module, optimizer = of_zeros(row_format)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, float("inf"), 2.0):
        optimizer.zero_grad()
        for _ in range(2):
            scaler.scale(module(torch.tensor([[1]])).float().sum() * factor).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert moved(module) == {1: -6}
    assert scaler.get_scale() == 512


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("of", ["module", "another optimizer"])
def test_whoever_zeroes_the_gradients_drops_them(row_format: str, of: str, set_to_none: bool) -> None:
    module, optimizer = of_zeros(row_format)
    other = torch.optim.SGD(module.parameters(), lr=0.0)
    for row in (1, 2, 3):
        module(torch.tensor([[row]])).sum().backward()
        optimizer.step()
        (module if of == "module" else other).zero_grad(set_to_none=set_to_none)
    optimizer.step()
    assert moved(module) == {1: -1, 2: -1, 3: -1}


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_gradient_of_something_else_lets_nothing_wait(when: str) -> None:
    module, optimizer = of_zeros()
    weights = torch.ones(1, 1, requires_grad=True)

    def of_weights() -> None:
        torch.autograd.grad(module(torch.tensor([[1]]), per_sample_weights=weights).sum(), weights)

    if when == "before":
        of_weights()
    module(torch.tensor([[2]]), per_sample_weights=torch.ones(1, 1)).sum().backward()
    if when == "after":
        of_weights()
    optimizer.step()
    assert moved(module) == {2: -1}


def test_a_backward_that_failed_lets_nothing_wait() -> None:
    module, optimizer = of_zeros(check=True)
    first, second = module(torch.tensor([[1]])), module(torch.tensor([[2]]))
    with pytest.raises(FloatingPointError):
        (second.sum() + first.sum() * float("nan")).backward()
    module(torch.tensor([[3]])).sum().backward()
    optimizer.step()
    assert moved(module) == {3: -1}


def test_calls_with_and_without_weights_of_ids_wait_together() -> None:
    module, optimizer = of_zeros()
    module(torch.tensor([[1]]), per_sample_weights=torch.full((1, 1), 3.0)).sum().backward()
    module(torch.tensor([[2]])).sum().backward()
    optimizer.step()
    assert moved(module) == {1: -3, 2: -1}


@pytest.mark.parametrize("update", ["backward", "step"])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_that_may_not_be_finite_are_refused(weighted: bool, update: Any) -> None:
    module, optimizer = fused(SGD(lr=1.0, update=update, check_finite=True))
    before = module.weight.detach().clone()
    weights, grad = (torch.full((2, 1), 1e30), 1e30) if weighted else (None, 3e38)
    out = module(torch.tensor([[1], [1]]), per_sample_weights=weights)
    with pytest.raises(FloatingPointError, match="small enough that their sums are finite in float32"):
        out.backward(torch.full((2, 5), grad))
    optimizer.step()
    assert torch.equal(module.weight, before)


def test_sums_of_several_backwards_that_may_not_be_finite_are_refused() -> None:
    module, optimizer = of_zeros(check=True)
    for _ in range(2):
        module(torch.tensor([[1]])).backward(torch.full((1, 5), 3e38))
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert not moved(module)
    assert optimizer.param_groups[0]["step"] == 0


def test_a_grad_scaler_skips_sums_that_may_not_be_finite() -> None:
    module, optimizer = of_zeros()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(module(torch.tensor([[1], [1]]))).backward(torch.full((2, 5), 3e38))
    scaler.step(optimizer)
    assert not moved(module)


@pytest.mark.parametrize("backwards", [1, 3])
def test_clipping_reaches_no_gradients_that_wait(backwards: int) -> None:
    module, optimizer = of_zeros()
    dense = torch.nn.Linear(5, 1)
    for _ in range(backwards):
        dense(module(torch.tensor([[1]]))).sum().backward()
    for parameters in ([*module.parameters(), *dense.parameters()], optimizer.param_groups[0]["params"]):
        torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
        torch.nn.utils.clip_grad_value_(parameters, 1e-3)
    optimizer.step()
    assert moved(module) == {1: pytest.approx(-backwards * float(dense.weight.detach()[0, 0]))}


@pytest.mark.parametrize("other", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD])
@pytest.mark.parametrize("row_format", FORMATS)
def test_another_optimizer_over_all_parameters_does_nothing_to_tables(row_format: str, other: Any) -> None:
    module, optimizer = of_zeros(row_format)
    dense = other(module.parameters(), lr=0.1)
    for _ in range(3):
        dense.zero_grad()
        module(torch.tensor([[1]])).sum().backward()
        dense.step()
        optimizer.step()
    assert moved(module) == {1: -3}


def test_gradients_of_a_weight_of_its_own_do_not_keep_those_that_wait() -> None:
    module, optimizer = of_zeros()
    for _ in range(3):
        module.zero_grad()
        (module(torch.tensor([[1]])).sum() + 0 * module.weight.square().sum()).backward()
        optimizer.step()
    assert moved(module) == {1: -3}


@pytest.mark.parametrize("change", ["assign", "quantize", "freeze"])
def test_gradients_are_dropped_after_parameters_have_changed(change: str) -> None:
    tables = [dlrm_rs.EmbeddingBagConfig(f"t{i}", 4, 3, [f"f{i}"], init_fn=torch.nn.init.zeros_) for i in range(2)]
    module = dlrm_rs.EmbeddingBagCollection(tables, optimizer=SGD(lr=1.0, update="step"))
    dense = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.0)
    bags = torch.tensor([1, 2]), torch.tensor([0, 1, 2])
    if change == "freeze":
        module.embedding_bags["t0"].weight.requires_grad_(False)
        dense = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.0)
    for step in range(4):
        if step == 2 and change == "assign":
            module.load_state_dict({name: rows.clone() for name, rows in module.state_dict().items()}, assign=True)
        if step == 2 and change == "quantize":
            dlrm_rs.quantize(module, "int8")
        dense.zero_grad()
        module.lookup(*bags).sum().backward()
        assert module.fused_optimizer is not None
        module.fused_optimizer.step()
    assert module.lookup(*bags).detach()[0, 3:].tolist() == [-4] * 3


def test_backwards_of_several_threads_wait_together() -> None:
    module, optimizer = of_zeros()

    def backwards() -> None:
        for _ in range(50):
            module(torch.tensor([[1]])).sum().backward()

    threads = [threading.Thread(target=backwards) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    optimizer.step()
    assert moved(module) == {1: -200}


def test_a_grad_scaler_does_not_look_at_what_has_been_dropped() -> None:
    module, optimizer = of_zeros()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(module(torch.tensor([[1]])).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    module.zero_grad()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):  # torch's, as of other optimizers
        scaler.step(optimizer)
    assert scaler.get_scale() == 512


def test_a_step_in_a_hook_of_backward_applies_its_gradients() -> None:
    module, optimizer = of_zeros()

    def step(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    assert optimizer.gate is not None
    optimizer.gate.register_post_accumulate_grad_hook(step)
    for row in (1, 2):
        module(torch.tensor([[row]])).sum().backward()
    assert moved(module) == {1: -1, 2: -1}


def test_a_gate_of_zero_makes_gradients_zero() -> None:
    module, optimizer = of_zeros()
    module(torch.tensor([[1]])).sum().backward()
    optimizer.gate.grad.mul_(0)  # type: ignore[union-attr]
    optimizer.step()
    optimizer.step()
    assert not moved(module)


def test_gates_are_of_single_precision_whatever_the_default() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        _, optimizer = of_zeros()
    finally:
        torch.set_default_dtype(before)
    assert optimizer.gate is not None
    assert optimizer.gate.dtype is torch.float32


def test_what_multiplies_the_gate_multiplies_what_has_come_so_far() -> None:
    module, optimizer = of_zeros()
    assert optimizer.gate is not None
    module(torch.tensor([[1]])).sum().backward()
    optimizer.gate.grad.mul_(0.5)  # type: ignore[union-attr]
    module(torch.tensor([[2]])).sum().backward()
    optimizer.step()
    assert moved(module) == {1: -0.5, 2: -1}


@pytest.mark.parametrize("kind", ["sum", "mean", "weighted", "not pooled"])
def test_occurrences_are_counted_in_every_backward_alone_as_torchs(kind: str) -> None:
    options: dict[str, Any] = {"scale_grad_by_freq": True, "optimizer": SGD(lr=1.0, update="step")}
    ours: dlrm_rs.Embedding | dlrm_rs.EmbeddingBag
    if kind == "not pooled":
        ours = dlrm_rs.Embedding(9, 5, **options)
    else:
        ours = dlrm_rs.EmbeddingBag(9, 5, mode="mean" if kind == "mean" else "sum", **options)
    torchs = ours.weight.detach().clone().requires_grad_()
    for ids in ([[1, 1, 2], [1, 3, 3]], [[1, 4, 4]], [[8, 8, 8]]):
        given = torch.tensor(ids)
        weights = {"per_sample_weights": given / 4} if kind == "weighted" else {}
        ours(given, **weights).sin().sum().backward()
        # Not torch's EmbeddingBag, which counted wrongly up to 2.6.
        rows = torch.nn.functional.embedding(given, torchs, scale_grad_by_freq=True)  # (B, ids, D)
        if kind == "weighted":
            rows = rows * weights["per_sample_weights"].unsqueeze(2)
        pooled = rows if kind == "not pooled" else rows.mean(1) if kind == "mean" else rows.sum(1)
        pooled.sin().sum().backward()
    assert ours.fused_optimizer is not None
    ours.fused_optimizer.step()
    assert torch.allclose(ours.weight, torchs - torchs.grad, rtol=1e-5, atol=1e-6)  # type: ignore[operator]


def test_the_same_tables_are_to_be_trained_in_all_backwards() -> None:
    module = collection(SGD(lr=1.0, update="step"))
    assert module.fused_optimizer is not None
    ids, offsets, _ = ids_of(range(3))
    module.lookup(ids, offsets).sum().backward()
    module.embedding_bags["u"].weight.requires_grad_(False)
    module.lookup(ids, offsets).sum().backward()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=r"same tables to be trained in all backwards .* got table 'u'"):
        module.fused_optimizer.step()
    assert str(module.state_dict()) == str(before)


def test_a_checkpoint_has_the_tables_alone() -> None:
    (module, optimizer), (_, in_backward) = fused(Adam(lr=0.1, update="step")), fused(Adam(lr=0.1))
    for _ in range(2):
        module(torch.tensor([[1]])).sum().backward()
        optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["params"] == [0]
    in_backward.load_state_dict(saved)
    optimizer.load_state_dict(in_backward.state_dict())
    assert str(optimizer.state_dict()["state"]) == str(saved["state"])
    assert optimizer.gate is not None
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 3


def test_what_waits_is_counted() -> None:
    module, optimizer = of_zeros()
    for calls in (1, 2):
        module(torch.tensor([[1, 1]])).sum().backward()
        assert optimizer.waiting_bytes() == calls * (2 * 8 + 5 * 4)
    module.zero_grad()
    assert optimizer.waiting_bytes() == 0


def test_modules_whose_gradients_wait_are_freed() -> None:
    module, _ = of_zeros()
    module(torch.tensor([[1]])).sum().backward()
    alive = weakref.ref(module._tables)
    del module, _
    gc.collect()
    assert alive() is None
