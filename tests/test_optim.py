"""Fused optimizers against their formulas in float64, and as torch optimizers."""

import copy
import dataclasses
import io
import warnings
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import dlrm_rs
from batches import DIMS, Batch, batch
from dlrm_rs.optim import (
    FTRL,
    LAMB,
    LARSSGD,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    OptimizerSpec,
    PartialRowWiseAdam,
    PartialRowWiseLAMB,
    RowWiseAdagrad,
    RowWiseRMSprop,
)

SPECS: list[OptimizerSpec] = [
    SGD(lr=0.1),
    SGD(lr=0.001, momentum=0.9),
    Adagrad(lr=0.1),
    RowWiseAdagrad(lr=0.1),
    Adam(lr=0.01),
    AdamW(lr=0.01, weight_decay=0.1),
    PartialRowWiseAdam(lr=0.01),
    LAMB(lr=0.01, weight_decay=0.1),
    PartialRowWiseLAMB(lr=0.01),
    LARSSGD(lr=1.0, eta=0.01, weight_decay=0.1),
    RowWiseRMSprop(lr=0.01),
    FTRL(lr=0.1, l1=0.01, l2=0.01),
]
STEPS = 50

each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__ + str(spec.algorithm)[:8])


class Reference:
    """The formulas on a table in float64; rows that are not touched stay."""

    def __init__(self, spec: OptimizerSpec, weight: Tensor) -> None:
        self.spec = spec
        self.weight = weight.detach().double().requires_grad_()
        start = getattr(spec, "initial_accumulator_value", 0.0)
        self.first = torch.full_like(self.weight, start, requires_grad=False)
        self.second = torch.zeros_like(self.weight, requires_grad=False)
        self.steps = 0

    def step(self, touched: Tensor) -> None:
        """One update from `weight.grad` of the rows that are touched, `(N,)` bool."""
        grad = self.weight.grad
        assert grad is not None
        self.steps += 1
        with torch.no_grad():
            first, second, weight = (x[touched] for x in (self.first, self.second, self.weight))
            spec = cast(Any, self.spec)
            grad = grad[touched]
            if getattr(spec, "decoupled_weight_decay", False):
                weight *= 1 - spec.lr * spec.weight_decay
            elif not isinstance(spec, LAMB | LARSSGD | FTRL):
                grad = grad + spec.weight_decay * weight
            weight -= self._step(spec, grad, weight, first, second)
            self.first[touched], self.second[touched], self.weight[touched] = first, second, weight
        self.weight.grad = None

    def _step(self, spec: Any, grad: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
        mean = (grad**2).mean(1, keepdim=True)
        norm = partial(torch.linalg.vector_norm, dim=1, keepdim=True)
        match spec:
            case SGD():
                first.mul_(spec.momentum).add_(grad)
                return Tensor(spec.lr * first)
            case RowWiseAdagrad() | Adagrad():
                first += mean if isinstance(spec, RowWiseAdagrad) else grad**2
                return Tensor(spec.lr * grad / (first.sqrt() + spec.eps))
            case RowWiseRMSprop():
                first.mul_(spec.alpha).add_((1 - spec.alpha) * mean)
                return Tensor(spec.lr * grad / (first.sqrt() + spec.eps))
            case LARSSGD():
                ratio = spec.eta * norm(weight) / (norm(grad) + spec.weight_decay * norm(weight))
                first.mul_(spec.momentum).add_(spec.lr * ratio.nan_to_num(1) * (grad + spec.weight_decay * weight))
                return first
            case FTRL():
                sigma = ((second + grad**2).sqrt() - second.sqrt()) / spec.lr
                first += grad - sigma * weight
                second += grad**2
                shrunk = first.sign() * (first.abs() - spec.l1).clamp(min=0)
                moved = -shrunk / ((spec.beta + second.sqrt()) / spec.lr + spec.l2)
                return weight - torch.where(second > 0, moved, weight)
        b1, b2 = spec.betas
        row_wise = isinstance(spec, PartialRowWiseAdam | PartialRowWiseLAMB)
        first.mul_(b1).add_((1 - b1) * grad)
        second.mul_(b2).add_((1 - b2) * (mean if row_wise else grad**2))
        direction = first / (1 - b1**self.steps) / ((second / (1 - b2**self.steps)).sqrt() + spec.eps)
        if isinstance(spec, LAMB):
            direction += spec.weight_decay * weight
            ratio = norm(weight) / norm(direction)
            direction = direction * torch.where((norm(weight) > 0) & (norm(direction) > 0), ratio, 1.0)
        return Tensor(spec.lr * direction)


def loss(out: Tensor) -> Tensor:
    """Any that makes the gradient depend on the rows and differ by element."""
    targets = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    return (out.double() - targets).square().sum() / 2


@each_spec
@pytest.mark.parametrize("dim", DIMS)
def test_follows_the_formula_at_every_dim(dim: int, spec: OptimizerSpec) -> None:
    check_against_formula(dim, spec, {"mode": "sum"}, weighted=False)


@each_spec
@pytest.mark.parametrize(
    ("kwargs", "weighted"),
    [
        ({"mode": "sum"}, True),
        ({"mode": "mean"}, False),
        ({"mode": "max"}, False),
        ({"mode": "mean", "padding_idx": 3}, False),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else f"weighted={value}",
)
def test_follows_the_formula_with_every_option(kwargs: dict[str, Any], weighted: bool, spec: OptimizerSpec) -> None:
    check_against_formula(33, spec, kwargs, weighted)


def check_against_formula(dim: int, spec: OptimizerSpec, kwargs: dict[str, Any], weighted: bool) -> None:
    """Train both for 50 steps on bags with duplicates and empty ones."""
    ours = dlrm_rs.EmbeddingBag(20, dim, optimizer=spec, **kwargs)
    reference = Reference(spec, ours.weight)
    for step in [batch(20, 16) for _ in range(STEPS)]:
        weights = step.weights if weighted else None
        loss(ours(step.indices, step.offsets[:-1], weights)).backward()
        out = torch.nn.functional.embedding_bag(
            step.indices,
            reference.weight,
            step.offsets[:-1],
            per_sample_weights=None if weights is None else weights.double(),
            **kwargs,
        )
        loss(out).backward()
        reference.step(touched(20, step.indices, kwargs.get("padding_idx")))
    assert ours.weight.grad is None
    check(ours, reference)


def touched(rows: int, ids: Tensor, padding_idx: int | None = None) -> Tensor:
    """Which rows are looked up, the padding row apart, `(N,)` bool."""
    flags = torch.zeros(rows, dtype=torch.bool)
    flags[ids.flatten()] = True
    if padding_idx is not None:
        flags[padding_idx] = False
    return flags


def check(ours: dlrm_rs.EmbeddingBag | dlrm_rs.Embedding, reference: Reference) -> None:
    """Compare weights and state."""
    assert ours.fused_optimizer is not None
    state = ours.fused_optimizer.state[ours.weight].values()
    for got, expected in zip(
        (ours.weight, *state), (reference.weight, reference.first, reference.second), strict=False
    ):
        expected = expected.detach()[:, 0] if got.dim() == 1 else expected.detach()
        assert (got - expected).norm() <= 1e-5 * expected.norm()
        assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@each_spec
@pytest.mark.parametrize("scale", [False, True])
def test_embedding_follows_the_formula(scale: bool, spec: OptimizerSpec) -> None:
    ours = dlrm_rs.Embedding(20, 17, padding_idx=2, scale_grad_by_freq=scale, optimizer=spec)
    reference = Reference(spec, ours.weight)
    for ids in torch.randint(0, 20, (STEPS, 5, 8)):
        loss(ours(ids)).backward()
        loss(torch.nn.functional.embedding(ids, reference.weight, 2, scale_grad_by_freq=scale)).backward()
        reference.step(touched(20, ids, 2))
    check(ours, reference)


def test_a_table_with_two_features_moves_once() -> None:
    # Both features look up row 0: its gradients are summed, and Adagrad runs once on the sum of 2, not twice on 1.
    table = dlrm_rs.EmbeddingBagConfig("t", 3, 1, ["a", "b"], init_fn=torch.nn.init.zeros_)
    collection = dlrm_rs.EmbeddingBagCollection([table], optimizer=Adagrad(lr=1.0))
    collection.lookup(torch.tensor([0, 0]), torch.tensor([0, 1, 2])).sum().backward()
    assert collection.fused_optimizer is not None
    weight = collection.embedding_bags["t"].weight
    assert isinstance(weight, Tensor)
    assert weight.tolist() == [[-1], [0], [0]]
    assert collection.fused_optimizer.state[weight]["sum"].tolist() == [[4], [0], [0]]


@pytest.mark.parametrize("kind", [Adagrad, RowWiseAdagrad])
def test_initial_accumulator_value(kind: type[Adagrad]) -> None:
    check_against_formula(8, kind(initial_accumulator_value=0.5), {"mode": "sum"}, weighted=False)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: SGD(lr=-1.0), ValueError, "lr: expected a finite number of at least 0 .* got -1"),
        (lambda: SGD(lr=float("nan")), ValueError, "lr: .* got nan"),
        (lambda: Adagrad(eps=float("inf")), ValueError, "eps: .* got inf"),
        (lambda: Adagrad(initial_accumulator_value=-1), ValueError, "initial_accumulator_value: .* got -1"),
        (lambda: SGD(lr=1.0, clip_norm=0.0), ValueError, "clip_norm: expected None or a number above 0, got 0"),
        (lambda: SGD(lr=1e39), ValueError, "lr: expected a finite number .* in float32, .* got 1e"),
        (lambda: Adagrad(initial_accumulator_value=1e39), ValueError, "initial_accumulator_value: .* in float32"),
        (lambda: Adagrad(eps=0), ValueError, "eps: expected a number above 0 in float32, .* got 0"),
        (lambda: Adagrad(eps=1e-60), ValueError, "eps: expected a number above 0 in float32, .* got 1e-60"),
        (lambda: RowWiseAdagrad(lr=1.0, eps=1e-39), ValueError, "lr / eps to be finite in float32, .* got 1.0 and 1e"),
        (lambda: SGD(lr=cast(float, "0.1")), TypeError, "lr: expected a number, got str"),
        (lambda: SGD(lr=cast(float, torch.ones(2))), TypeError, r"lr: expected a number, got a tensor of shape \(2,\)"),
        (lambda: SGD(lr=cast(float, torch.tensor(-1.0))), ValueError, "lr: .* got -1.0"),
        (lambda: Adam(betas=cast(Any, 0.9)), TypeError, "betas: expected a pair of numbers, got 0.9"),
        (lambda: Adam(betas=cast(Any, (0.9,))), TypeError, r"betas: expected a pair of numbers, got \(0.9,\)"),
        (lambda: Adam(betas=cast(Any, "ab")), TypeError, "betas: expected a number, got str"),
        (lambda: Adam(betas=(0.9, 1.0)), ValueError, "betas: expected a number from 0 to below 1, got 1.0"),
        (lambda: SGD(0.1, table_lr=cast(Any, [1])), TypeError, r"table_lr: expected .* as a dict, got \[1\]"),
        (lambda: SGD(0.1, table_lr=cast(Any, None)), TypeError, "table_lr: expected .* as a dict, got None"),
        (lambda: SGD(0.1, table_lr={"t": -1.0}), ValueError, r"table_lr\['t'\]: expected a finite number .* got -1.0"),
        (lambda: SGD(0.1, check_finite=cast(Any, "no")), TypeError, "check_finite: expected True or False, got 'no'"),
        (lambda: SGD(0.1, split_bf16=cast(Any, "x")), TypeError, "split_bf16: expected True or False, got 'x'"),
        (lambda: SGD(0.1, 0.9, cast(Any, "yes")), TypeError, "nesterov: expected True or False, got 'yes'"),
        (
            lambda: SGD(0.1, decoupled_weight_decay=cast(Any, "x")),
            TypeError,
            "decoupled_weight_decay: expected True or False, got 'x'",
        ),
        (lambda: SGD(0.1, nesterov=True), ValueError, "nesterov: expected False where momentum is 0, got True"),
        (lambda: SGD(0.1, update=cast(Any, "foo")), ValueError, "update: expected 'backward' or 'step', got 'foo'"),
        (lambda: SGD(0.1, seed=-1), ValueError, "seed: .* got -1"),
        (
            lambda: dlrm_rs.EmbeddingBag(3, 2, dtype="fp16", optimizer=SGD(0.1, split_bf16=True)),
            ValueError,
            "split_bf16: expected a table of bf16 rows, .* got only rows of fp16",
        ),
        (
            lambda: dlrm_rs.EmbeddingBag(3, 2, optimizer=cast(OptimizerSpec, torch.optim.SGD)),
            TypeError,
            "optimizer: expected None or one of",
        ),
    ],
)
def test_bad_specs(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_specs_take_what_torchs_optimizers_take() -> None:
    spec = Adam(lr=cast(Any, torch.tensor(0.1)), betas=cast(Any, [0.8, 0.9]), table_lr={"t": cast(Any, torch.ones(1))})
    assert spec == Adam(lr=torch.tensor(0.1).item(), betas=(0.8, 0.9), table_lr={"t": 1.0})
    assert type(spec.lr) is float
    module, optimizer = fused(SGD(lr=1.0))
    before = module.weight[0, 0].item()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    module(torch.tensor([[0]])).sum().backward()
    assert module.weight[0, 0].item() == before - 0.5


@pytest.mark.parametrize(
    ("spec", "values", "error", "words"),
    [
        (SGD(0.1), {"seed": -1}, ValueError, r"seed: expected an int from 0 to below 2\*\*64 in the .* group, got -1$"),
        (SGD(0.1), {"seed": 2**64}, ValueError, r"seed: expected an int .*, got 18446744073709551616$"),
        (SGD(0.1), {"seed": None}, TypeError, r"seed: expected an int .*, got None$"),
        (SGD(0.1), {"step": -1}, ValueError, r"step: expected an int .*, got -1$"),
        (SGD(0.1), {"step": -7}, ValueError, r"step: expected an int .*, got -7$"),
        (SGD(0.1), {"step": 3.0}, TypeError, r"step: expected an int .*, got 3.0$"),
        (SGD(0.1), {"lr": None}, TypeError, r"lr: expected a number in the parameter group, got None$"),
        (SGD(0.1), {"weight_decay": None}, TypeError, r"weight_decay: expected a number .*, got None$"),
        (SGD(0.1), {"update": "foo"}, ValueError, r"update: expected 'backward' in the .* was made, got 'foo'$"),
        (SGD(0.1), {"update": "step"}, ValueError, r"update: expected 'backward' in the .* was made, got 'step'$"),
        (SGD(0.1), {"momentum": 0.9}, ValueError, r"momentum: expected 0 in the .* got 0.9; make it with one above 0"),
        (Adam(0.1), {"betas": None}, TypeError, r"beta1: expected a number in the parameter group"),
        (Adam(0.1), {"betas": (0.9, 1.0)}, ValueError, r"beta2: expected a number from 0 to below 1"),
    ],
)
def test_bad_values_in_a_parameter_group(
    spec: OptimizerSpec, values: dict[str, Any], error: type[Exception], words: str
) -> None:
    module, optimizer = fused(spec)
    optimizer.param_groups[0].update(values)
    given, before = dict(optimizer.param_groups[0]), copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=words):
        module(torch.tensor([[0]])).sum().backward()
    assert optimizer.param_groups[0] == given
    assert torch.equal(module.weight, before["weight"])


def test_a_scheduler_of_momentum_needs_an_optimizer_with_it() -> None:
    schedule = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=5)
    for spec, cycle_momentum in ((SGD(0.1, momentum=0.9), True), (SGD(0.1), False)):
        module, optimizer = fused(spec)
        schedule(optimizer, cycle_momentum=cycle_momentum)
        before = module.weight[0].detach().clone()
        module(torch.tensor([[0]])).sum().backward()
        assert not torch.equal(module.weight[0], before)
    module, optimizer = fused(SGD(0.1))
    schedule(optimizer)
    with pytest.raises(ValueError, match=r"momentum: expected 0 .* cycle_momentum=False"):
        module(torch.tensor([[0]])).sum().backward()


def test_split_bf16_is_for_a_set_of_tables_with_some_in_bf16() -> None:
    spec = SGD(lr=0.1, split_bf16=True)
    tables = [dlrm_rs.EmbeddingBagConfig(name, 3, 2, [name], data_type=name) for name in ("fp32", "bf16", "int8")]
    collection = dlrm_rs.EmbeddingBagCollection(tables, optimizer=spec)
    assert collection.fused_optimizer is not None
    states = collection.fused_optimizer.state_dict()["state"]
    assert [list(states.get(table, ())) for table in range(3)] == [[], ["low_bits"], []]
    with pytest.raises(ValueError, match=r"split_bf16: expected .* got only rows of fp32, int8"):
        dlrm_rs.EmbeddingBagCollection([tables[0], tables[2]], optimizer=spec)


def test_split_bf16_is_for_a_model_with_some_tables_in_bf16() -> None:
    spec = SGD(lr=0.1, split_bf16=True)
    model = torch.nn.ModuleList([torch.nn.EmbeddingBag(3, 2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)])
    with pytest.raises(ValueError, match=r"split_bf16: expected .* got only rows of fp32"):
        dlrm_rs.replace_embeddings(model[0], optimizer=spec)
    assert type(model[0]) is torch.nn.EmbeddingBag
    dlrm_rs.replace_embeddings(model, optimizer=spec)
    optimizers = [cast(dlrm_rs.EmbeddingBag, module).fused_optimizer for module in model]
    states = [optimizer.state_dict()["state"] for optimizer in optimizers if optimizer is not None]
    assert [list(state.get(0, ())) for state in states] == [[], ["low_bits"]]


def fused(spec: OptimizerSpec, dtype: str = "fp32") -> tuple[dlrm_rs.EmbeddingBag, dlrm_rs.optim.FusedOptimizer]:
    """A module and its optimizer."""
    torch.manual_seed(2)
    module = dlrm_rs.EmbeddingBag(20, 5, mode="sum", dtype=dtype, optimizer=spec)
    assert module.fused_optimizer is not None
    return module, module.fused_optimizer


def train(module: dlrm_rs.EmbeddingBag, batches: list[Batch]) -> None:
    """A step per batch."""
    for step in batches:
        loss(module(step.indices, step.offsets[:-1])).backward()


@each_spec
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "split"])
def test_a_checkpoint_resumes_to_the_same_bits(dtype: str, spec: OptimizerSpec) -> None:
    if dtype == "split":
        dtype, spec = "bf16", dataclasses.replace(spec, split_bf16=True)
    batches = [batch(20, 16) for _ in range(10)]
    straight, expected = fused(spec, dtype)
    train(straight, batches)

    first, optimizer = fused(spec, dtype)
    train(first, batches[:5])
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    second, optimizer = fused(spec, dtype)
    torch.nn.init.zeros_(second.weight)
    second.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    train(second, batches[5:])
    assert torch.equal(second.weight, straight.weight)
    states = zip(optimizer.state[second.weight].values(), expected.state[straight.weight].values(), strict=True)
    assert all(got.dtype is wanted.dtype and torch.equal(got, wanted) for got, wanted in states)


@each_spec
def test_tables_of_codes_with_rates_of_their_own_and_a_scheduler_resume_to_the_same_bits(spec: OptimizerSpec) -> None:
    spec = dataclasses.replace(spec, table_lr={"int4": spec.lr / 2}, seed=3)
    tables = [dlrm_rs.EmbeddingBagConfig(name, 20, 9, [name], data_type=name) for name in ("int8", "int4", "int2")]

    def made() -> tuple[dlrm_rs.EmbeddingBagCollection, dlrm_rs.optim.FusedOptimizer, Any]:
        torch.manual_seed(1)
        module = dlrm_rs.EmbeddingBagCollection(tables, optimizer=spec)
        optimizer = module.fused_optimizer
        assert optimizer is not None
        return module, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)

    steps = torch.randint(0, 20, (10, 3 * 8 * 2))

    def trained(module: dlrm_rs.EmbeddingBagCollection, scheduler: Any, steps: Tensor) -> None:
        for ids in steps:
            loss(module.lookup(ids, torch.arange(0, 49, 2))).backward()
            scheduler.optimizer.step()
            scheduler.step()

    straight, expected, scheduler = made()
    start = copy.deepcopy(straight.state_dict())
    trained(straight, scheduler, steps)
    first, optimizer, scheduler = made()
    trained(first, scheduler, steps[:5])
    file = io.BytesIO()
    torch.save([thing.state_dict() for thing in (first, optimizer, scheduler)], file)
    file.seek(0)
    resumed = made()
    for thing, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        thing.load_state_dict(state)
    trained(resumed[0], resumed[2], steps[5:])

    rows, wanted = resumed[0].state_dict(), straight.state_dict()
    assert all(torch.equal(rows[name], wanted[name]) for name in wanted)
    assert not any(torch.equal(start[name], wanted[name]) for name in wanted if name.endswith(("codes", "scales")))
    assert [group["lr"] for group in expected.param_groups] == [spec.lr / 8, spec.lr / 16]
    assert resumed[1].state_dict()["param_groups"] == expected.state_dict()["param_groups"]
    states = [optimizer.state_dict()["state"] for optimizer in (resumed[1], expected)]
    assert states[0].keys() == states[1].keys()
    for got, state in zip(*(each.values() for each in states), strict=True):
        assert got.keys() == state.keys()
        assert all(torch.equal(got[name], state[name]) for name in state)


def test_state_is_the_engines_memory_before_and_after_a_load() -> None:
    module, optimizer = fused(Adagrad())
    state = module._tables.handle.optimizer_state(0)["sum"]
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["state"][0]["sum"].fill_(3.0)
    assert not state.any()
    optimizer.load_state_dict(checkpoint)
    assert (state == 3).all()
    assert optimizer.state[module.weight]["sum"].data_ptr() == state.ctypes.data
    optimizer.state[module.weight]["sum"].zero_()
    assert not state.any()


def test_a_checkpoint_of_another_optimizer_or_table_is_refused_and_nothing_changes() -> None:
    module, optimizer = fused(Adagrad())
    train(module, [batch(20, 16)])
    before = copy.deepcopy(optimizer.state_dict())
    _, other = fused(RowWiseAdagrad())
    with pytest.raises(ValueError, match=r"state_dict: expected .* group of adagrad .* got one of rowwise"):
        optimizer.load_state_dict(other.state_dict())
    larger = dlrm_rs.EmbeddingBag(21, 5, optimizer=Adagrad(lr=0.7)).fused_optimizer
    assert larger is not None
    with pytest.raises(ValueError, match=r"state of table 0 .* \(20, 5\).*got .*\(21, 5\)"):
        optimizer.load_state_dict(larger.state_dict())
    with pytest.raises(ValueError, match="expected a parameter group of adagrad"):
        optimizer.load_state_dict(torch.optim.SGD(module.parameters(), lr=0.1).state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["sum"], before["state"][0]["sum"])
    assert torch.equal(torch.from_numpy(module._tables.handle.optimizer_state(0)["sum"]), before["state"][0]["sum"])


@pytest.mark.parametrize("key", ["step", "seed"])
@pytest.mark.parametrize("value", [3.0, -1, True, None])
def test_a_checkpoint_with_a_count_that_is_none_is_refused(key: str, value: Any) -> None:
    module, optimizer = fused(Adagrad())
    train(module, [batch(20, 16)])
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["param_groups"][0].update({key: value, "lr": 0.7})
    checkpoint["state"][0]["sum"].zero_()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=rf"state_dict: expected '{key}' of a parameter group .* got {value}"):
        optimizer.load_state_dict(checkpoint)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["sum"], before["state"][0]["sum"])


def test_a_checkpoint_leaves_how_a_module_is_used() -> None:
    module, optimizer = fused(SGD(lr=1.0))
    train(module, [batch(20, 16)])
    other, of_other = fused(SGD(lr=0.5, update="step", check_finite=True))
    of_other.load_state_dict(optimizer.state_dict())
    (group,) = of_other.param_groups
    assert (group["update"], group["check_finite"]) == ("step", True)
    assert (group["lr"], group["step"]) == (1.0, 1)
    before = other.weight.detach().clone()
    other(torch.tensor([[0]])).sum().backward()
    assert torch.equal(other.weight, before)
    of_other.step()
    assert torch.equal(other.weight[0], before[0] - 1)


def test_a_scheduler_sets_the_learning_rate_of_the_next_backward() -> None:
    module, optimizer = fused(SGD(lr=1.0))
    torch.nn.init.zeros_(module.weight)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    moved = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            before = module.weight[0, 0].item()
            optimizer.zero_grad()
            module(torch.tensor([[0]])).sum().backward()
            optimizer.step()
            scheduler.step()
            moved.append(before - module.weight[0, 0].item())
    assert moved == [1, 0.5, 0.25]


def test_step_returns_the_loss_of_a_closure() -> None:
    module, optimizer = fused(SGD(lr=1.0))
    torch.nn.init.zeros_(module.weight)

    def closure() -> float:
        out = module(torch.tensor([[0]])).sum()
        out.backward()
        return float(out.detach())

    with torch.no_grad():
        assert optimizer.step(closure) == 0
    assert optimizer.step(closure) == -5
    assert optimizer.step() is None


def test_follows_torchs_own_optimizers() -> None:
    # Every row is touched at every step, so that torch's dense ones are lazy too.
    sparse_adam = partial(torch.optim.SparseAdam, lr=0.01)
    pairs: list[tuple[OptimizerSpec, Any]] = [
        (
            SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
            partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        ),
        (Adagrad(lr=0.1, weight_decay=0.01), partial(torch.optim.Adagrad, lr=0.1, weight_decay=0.01)),
        (Adam(lr=0.01, weight_decay=0.01), partial(torch.optim.Adam, lr=0.01, weight_decay=0.01)),
        (AdamW(lr=0.01), partial(torch.optim.AdamW, lr=0.01)),
        (Adam(lr=0.01), sparse_adam),
    ]
    for spec, make in pairs:
        ours, _ = fused(spec)
        theirs = torch.nn.EmbeddingBag(20, 5, mode="sum", sparse=make is sparse_adam, dtype=torch.float64)
        theirs.load_state_dict({"weight": ours.weight.detach().double()})
        optimizer = make(theirs.parameters())
        for _ in range(STEPS):
            ids = torch.cat([torch.arange(20), torch.randint(0, 20, (20,))]).view(8, 5)
            loss(ours(ids)).backward()
            optimizer.zero_grad()
            loss(theirs(ids)).backward()
            optimizer.step()
        assert (ours.weight - theirs.weight).norm() <= 1e-5 * theirs.weight.norm(), spec


@each_spec
def test_adjustments_follow_the_formula(spec: OptimizerSpec) -> None:
    spec = dataclasses.replace(spec, clip_value=0.3, max_norm=1.5)
    ours = dlrm_rs.EmbeddingBag(20, 17, mode="sum", optimizer=spec)
    reference = Reference(spec, ours.weight)
    for step in [batch(20, 16) for _ in range(STEPS)]:
        loss(ours(step.indices, step.offsets[:-1])).backward()
        loss(
            torch.nn.functional.embedding_bag(step.indices, reference.weight, step.offsets[:-1], mode="sum")
        ).backward()
        assert reference.weight.grad is not None
        reference.weight.grad.clamp_(-0.3, 0.3)
        rows = touched(20, step.indices)
        reference.step(rows)
        with torch.no_grad():
            reference.weight[rows] = torch.renorm(reference.weight[rows], 2, 0, 1.5)
    check(ours, reference)


@each_spec
@pytest.mark.parametrize("update", ["backward", "step"])
def test_gradients_are_clipped_by_the_norm_of_all_tables(update: Any, spec: OptimizerSpec) -> None:
    spec = dataclasses.replace(spec, clip_norm=4.0, clip_value=1.5, update=update)
    tables = [
        dlrm_rs.EmbeddingBagConfig("t", 20, 17, ["a", "b"]),
        dlrm_rs.EmbeddingBagConfig("u", 30, 16, ["c"], pooling="mean", scale_grad_by_freq=True),
    ]
    ours = dlrm_rs.EmbeddingBagCollection(tables, optimizer=spec)
    assert ours.fused_optimizer is not None
    weights = [ours.get_parameter(f"embedding_bags.{table.name}.weight") for table in tables]
    references = [Reference(spec, weight) for weight in weights]
    norms = []
    for step in range(STEPS):
        ids = torch.cat([torch.randint(0, rows, (8, 3)) for rows in (20, 20, 30)])
        loss(ours.lookup(ids.flatten(), torch.arange(0, 73, 3)) * (step % 5)).backward()
        t, u = ids[:16], ids[16:]
        rows_of_u = torch.nn.functional.embedding(u, references[1].weight, scale_grad_by_freq=True)
        pooled = [torch.nn.functional.embedding(part, references[0].weight).sum(1) for part in t.split(8)]
        loss(torch.cat([*pooled, rows_of_u.mean(1)], 1) * (step % 5)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_([reference.weight for reference in references], 4.0))
        for reference, touched_ids in zip(references, (t, u), strict=True):
            assert reference.weight.grad is not None
            reference.weight.grad.clamp_(-1.5, 1.5)
            reference.step(touched(len(reference.weight), touched_ids))
        ours.fused_optimizer.step()
        ours.fused_optimizer.zero_grad()
    assert min(norms) < 4 < max(norms)
    for weight, reference in zip(weights, references, strict=True):
        assert (weight - reference.weight).norm() <= 1e-5 * reference.weight.norm()


@pytest.mark.parametrize("row_format", ["fp16", "bf16", "int8"])
def test_rows_of_low_precision_are_clipped_by_norm(row_format: str) -> None:
    start = torch.randn(20, 16)
    grad = torch.randn(10, 16)
    ids = torch.arange(20).view(10, 2)
    moved = []
    for clip_norm, factor in ((2.0, 1.0), (None, 2 / ((2 * grad**2).sum().sqrt().item() + 1e-6))):
        ours = dlrm_rs.EmbeddingBag(20, 16, mode="sum", _weight=start, optimizer=SGD(lr=1.0, clip_norm=clip_norm))
        dlrm_rs.quantize(ours, row_format, keep_optimizer=True)
        ours(ids).backward(grad * factor)
        moved.append(ours(torch.arange(20).view(20, 1)).detach() - start)
    # The random bits are the same: few elements are on another side of what they are rounded to.
    assert_close(*moved, atol=2**-5, rtol=0)
    assert (moved[0] == moved[1]).double().mean() > 0.95
    assert 1.8 < moved[0].norm() < 2.2


def test_a_gradient_without_a_norm_is_refused_and_changes_nothing() -> None:
    tables = [dlrm_rs.EmbeddingBagConfig(name, 3, 2, [name]) for name in "ab"]
    for update in ("backward", "step"):
        ours = dlrm_rs.EmbeddingBagCollection(tables, optimizer=Adam(clip_norm=1.0, update=update))
        optimizer = ours.fused_optimizer
        assert optimizer is not None
        before = copy.deepcopy(ours.state_dict())
        bad = torch.tensor([[1.0, 1.0, 1.0, float("nan")]])

        def train(grad: Tensor) -> None:
            ours.lookup(torch.tensor([0, 1]), torch.tensor([0, 1, 2])).backward(grad)  # noqa: B023
            optimizer.step()  # noqa: B023

        with pytest.raises(
            FloatingPointError, match=r"gradient: expected finite numbers.* norm of NaN; the tables are"
        ):
            train(bad)
        assert [group["step"] for group in optimizer.param_groups] == [0]
        assert all(torch.equal(weight, before[name]) for name, weight in ours.state_dict().items())
        optimizer.zero_grad()
        train(torch.ones(1, 4))
        assert all(not torch.equal(weight, before[name]) for name, weight in ours.state_dict().items())


def test_tables_have_one_bound_of_the_norm() -> None:
    tables = [dlrm_rs.EmbeddingBagConfig(name, 3, 2, [name]) for name in "ab"]
    ours = dlrm_rs.EmbeddingBagCollection(tables, optimizer=SGD(lr=1.0, clip_norm=1.0, table_lr={"b": 0.5}))
    assert ours.fused_optimizer is not None
    ours.fused_optimizer.param_groups[1]["clip_norm"] = 2.0
    with pytest.raises(ValueError, match=r"clip_norm: expected one bound for all tables.* got 1 and 2"):
        ours.lookup(torch.tensor([0, 1]), torch.tensor([0, 1, 2])).sum().backward()


def test_tables_with_learning_rates_of_their_own() -> None:
    tables = [dlrm_rs.EmbeddingBagConfig(name, 3, 1, [name], init_fn=torch.nn.init.zeros_) for name in "abc"]
    collection = dlrm_rs.EmbeddingBagCollection(tables, optimizer=SGD(lr=1.0, table_lr={"b": 0.5}))
    optimizer = collection.fused_optimizer
    assert optimizer is not None
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(2):
        collection.lookup(torch.tensor([0, 0, 0]), torch.arange(4)).sum().backward()
        optimizer.step()
        scheduler.step()
    assert [weight[0].item() for weight in collection.state_dict().values()] == [-1.5, -0.75, -1.5]
    assert [(group["lr"], group["tables"], group["step"]) for group in optimizer.param_groups] == [
        (0.25, [0, 2], 2),
        (0.125, [1], 2),
    ]
    again = dlrm_rs.EmbeddingBagCollection(tables, optimizer=SGD(lr=1.0, table_lr={"c": 0.5})).fused_optimizer
    assert again is not None
    with pytest.raises(ValueError, match=r"expected a parameter group of sgd over tables \[0, 1\] .* over \[0, 2\]"):
        again.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"table_lr: expected names of tables, .* got \['d'\]"):
        dlrm_rs.EmbeddingBagCollection(tables, optimizer=SGD(lr=1.0, table_lr={"d": 0.5}))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_stochastic_rounding_moves_rows_by_less_than_they_can_hold(dtype: str) -> None:
    # A thousand steps of a sixteenth of what separates two neighbours: each rounded to the nearest would be lost.
    ulp = 2.0**-10 if dtype == "fp16" else 2.0**-7
    ours = dlrm_rs.EmbeddingBag(
        100, 64, mode="sum", _weight=torch.ones(100, 64), dtype=dtype, optimizer=SGD(lr=ulp / 16)
    )
    for _ in range(1000):
        ours(torch.arange(100).view(1, 100)).sum().neg().backward()
    moved = (ours.weight.double() - 1).mean().item() / (1000 * ulp / 16)
    assert abs(moved - 1) < 0.01  # in bf16 steps become larger above 2; the mean is the same


def test_split_bf16_is_fp32_training() -> None:
    weight = torch.randn(20, 33).bfloat16()
    for spec in SPECS:
        split = dataclasses.replace(spec, split_bf16=True)
        ours = dlrm_rs.EmbeddingBag(20, 33, mode="sum", _weight=weight.clone(), dtype="bf16", optimizer=split)
        fp32 = dlrm_rs.EmbeddingBag(20, 33, mode="sum", _weight=weight.float(), optimizer=spec)
        for step in [batch(20, 16) for _ in range(10)]:
            grad = torch.randn(len(step.offsets) - 1, 33)
            ours(step.indices, step.offsets[:-1]).backward(grad)
            fp32(step.indices, step.offsets[:-1]).backward(grad)
        assert ours.fused_optimizer is not None
        low = ours.fused_optimizer.state[ours.weight]["low_bits"]
        high = ours.weight.detach().view(torch.int16)
        joined = (high.to(torch.int32) << 16) + low.to(torch.int32)
        assert torch.equal(joined.view(torch.float32), fp32.weight.detach())
        assert torch.all((ours.weight.float() - fp32.weight).abs() <= fp32.weight.abs() * 2**-8)


def test_weight_decay_of_partial_row_wise_adam_can_be_decoupled() -> None:
    # FBGEMM's formula: `w -= lr * (u + weight_decay * w)`.
    check_against_formula(
        9, PartialRowWiseAdam(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True), {"mode": "sum"}, weighted=False
    )


@pytest.mark.parametrize("spec", [LAMB(lr=0.5), PartialRowWiseLAMB(lr=0.5), LARSSGD(lr=0.5)], ids=lambda s: s.algorithm)
def test_rows_of_zeros_are_trained_where_steps_are_by_the_size_of_the_row(spec: OptimizerSpec) -> None:
    module = dlrm_rs.EmbeddingBag(3, 2, mode="sum", _weight=torch.zeros(3, 2), optimizer=spec)
    module(torch.tensor([[1]])).sum().backward()
    assert_close(module.weight.detach(), torch.tensor([[0.0, 0.0], [-0.5, -0.5], [0.0, 0.0]]))


def test_a_backward_for_another_gradient_is_a_step_unless_the_table_is_frozen() -> None:
    module, optimizer = fused(SGD(lr=1.0))
    weights = torch.ones(1, 1, requires_grad=True)
    for frozen, moved in ((True, 0.0), (False, -1.0)):
        module.requires_grad_(not frozen)
        before = module.weight.detach().clone()
        (grad,) = torch.autograd.grad(module(torch.tensor([[0]]), per_sample_weights=weights).sum(), weights)
        assert_close(grad, before[0].sum().view(1, 1))
        assert torch.equal(module.weight[0], before[0] + moved)
    assert optimizer.param_groups[0]["step"] == 1


def test_ftrl_refuses_a_learning_rate_of_0() -> None:
    module, optimizer = fused(FTRL(lr=0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: epoch / 10)
    before = module.weight.detach().clone()
    with pytest.raises(ValueError, match="lr: expected a finite number above 0"):
        module(torch.tensor([[0]])).sum().backward()
    assert torch.equal(module.weight, before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no step was taken before the scheduler's
        scheduler.step()
    module(torch.tensor([[0]])).sum().backward()
    assert not torch.equal(module.weight, before)


def test_a_second_group_is_refused() -> None:
    _, optimizer = fused(SGD(lr=1.0))
    with pytest.raises(ValueError, match="param_group: expected none"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})


def test_the_update_counts_as_a_change_in_place() -> None:
    module, _ = fused(SGD(lr=1.0))
    square = (module.weight * module.weight).sum()
    module(torch.tensor([[0]])).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_another_optimizer_over_the_model_leaves_the_table_alone() -> None:
    module, _ = fused(SGD(lr=0.1))
    model = torch.nn.Sequential(module, torch.nn.Linear(5, 1))
    dense = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        dense.zero_grad()
        model(torch.tensor([[0]])).sum().backward()
        before = module.weight.detach().clone()
        dense.step()
        assert torch.equal(module.weight, before)
        assert module.weight.grad is None


def test_extreme_numbers_that_float32_has() -> None:
    for spec in (SGD(lr=3e38), Adagrad(lr=0, eps=1e-45), RowWiseAdagrad(lr=0.1, eps=1e-38)):
        module, _ = fused(spec)
        before = module.weight.detach().clone()
        module(torch.tensor([[0]])).backward(torch.zeros(1, 5))
        assert torch.equal(module.weight, before)


@each_spec
@pytest.mark.parametrize("of", ["weight", "rows", "state", "numpy"])
def test_a_gradient_in_the_memory_of_the_table(of: str, spec: OptimizerSpec) -> None:
    results = []
    for clone in (True, False):
        module, optimizer = fused(spec)
        ids = torch.arange(19, -1, -1).view(20, 1)  # what is written first is read last
        train(module, [batch(20, 16)])
        grad = module.weight.detach()
        if of == "rows":
            ids, grad = ids[1:], grad[:-1]
        elif of == "numpy":  # torch does not know that this is memory of the same storage
            ids, grad = ids[1:], torch.from_numpy(module.weight.detach().numpy()[1:])
        elif of == "state":
            grad = optimizer.state[module.weight].get("sum", grad)
            if grad.dim() == 1:
                ids, grad = ids[:4], grad.view(4, 5)
        module(ids).backward(grad.clone() if clone else grad)
        results.append((module.weight.detach(), *optimizer.state[module.weight].values()))
    assert all(map(torch.equal, *results))


def test_weights_of_ids_in_the_memory_of_the_table() -> None:
    results = []
    for clone in (True, False):
        module, _ = fused(SGD(lr=0.1))
        weights = module.weight.detach().view(25, 4)
        ids = torch.arange(100).view(25, 4) % 20
        module(ids, per_sample_weights=weights.clone() if clone else weights).sum().backward()
        results.append(module.weight.detach())
    assert torch.equal(*results)


@each_spec
def test_a_frozen_table_stays(spec: OptimizerSpec) -> None:
    tables = [dlrm_rs.EmbeddingBagConfig(name, 5, 4, [name]) for name in ("a", "b", "c")]
    collection = dlrm_rs.EmbeddingBagCollection(tables, optimizer=spec)
    frozen = collection.embedding_bags["a"].requires_grad_(False)
    before = {name: weight.clone() for name, weight in collection.state_dict().items()}
    collection.lookup(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2, 3])).sum().backward()
    changed = {name for name, weight in collection.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"embedding_bags.b.weight", "embedding_bags.c.weight"}
    collection.requires_grad_(False)
    assert not collection.lookup(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2, 3])).requires_grad
    frozen.requires_grad_(True)
    collection.lookup(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2, 3])).sum().backward()
    assert not torch.equal(collection.state_dict()["embedding_bags.a.weight"], before["embedding_bags.a.weight"])
