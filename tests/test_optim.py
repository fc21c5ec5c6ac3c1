"""Fused optimizers against their formulas in float64, and as torch optimizers."""

import copy
import io
import warnings
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import dlrm_rs
from batches import DIMS, Batch, batch
from dlrm_rs.optim import SGD, Adagrad, OptimizerSpec, RowWiseAdagrad

SPECS = [SGD(lr=0.1), Adagrad(lr=0.1), RowWiseAdagrad(lr=0.1)]
STEPS = 50

each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.algorithm)


class Reference:
    """The formulas on a table in float64. A row that is not touched has gradient 0 and so does not move."""

    def __init__(self, spec: OptimizerSpec, weight: Tensor) -> None:
        self.spec = spec
        self.weight = weight.detach().double().requires_grad_()
        self.sum = torch.full_like(self.weight, getattr(spec, "initial_accumulator_value", 0.0), requires_grad=False)

    def step(self) -> None:
        """One update from `weight.grad`."""
        grad = self.weight.grad
        assert grad is not None
        with torch.no_grad():
            if isinstance(self.spec, Adagrad):
                square = grad**2
                self.sum += square.mean(1, keepdim=True) if isinstance(self.spec, RowWiseAdagrad) else square
                grad = grad / (self.sum.sqrt() + self.spec.eps)
            self.weight -= self.spec.lr * grad
        self.weight.grad = None


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
        reference.step()
    assert ours.weight.grad is None
    assert_close(ours.weight.double(), reference.weight, rtol=1e-5, atol=1e-6)
    assert (ours.weight - reference.weight).norm() <= 1e-5 * reference.weight.norm()
    if isinstance(spec, Adagrad):
        assert ours.fused_optimizer is not None
        state = ours.fused_optimizer.state[ours.weight]["sum"]
        assert_close(state.double(), reference.sum[:, 0] if state.dim() == 1 else reference.sum, rtol=1e-5, atol=1e-6)


@each_spec
@pytest.mark.parametrize("scale", [False, True])
def test_embedding_follows_the_formula(scale: bool, spec: OptimizerSpec) -> None:
    ours = dlrm_rs.Embedding(20, 17, padding_idx=2, scale_grad_by_freq=scale, optimizer=spec)
    reference = Reference(spec, ours.weight)
    for ids in torch.randint(0, 20, (STEPS, 5, 8)):
        loss(ours(ids)).backward()
        loss(torch.nn.functional.embedding(ids, reference.weight, 2, scale_grad_by_freq=scale)).backward()
        reference.step()
    assert_close(ours.weight.double(), reference.weight, rtol=1e-5, atol=1e-6)


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
        (lambda: SGD(lr=1e39), ValueError, "lr: expected a finite number .* in float32, .* got 1e"),
        (lambda: Adagrad(initial_accumulator_value=1e39), ValueError, "initial_accumulator_value: .* in float32"),
        (lambda: Adagrad(eps=0), ValueError, "eps: expected a number above 0 in float32, .* got 0"),
        (lambda: Adagrad(eps=1e-60), ValueError, "eps: expected a number above 0 in float32, .* got 1e-60"),
        (lambda: RowWiseAdagrad(lr=1.0, eps=1e-39), ValueError, "lr / eps to be finite in float32, .* got 1.0 and 1e"),
        (lambda: SGD(lr=cast(float, "0.1")), TypeError, "lr: expected a number, got str"),
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


def fused(spec: OptimizerSpec) -> tuple[dlrm_rs.EmbeddingBag, dlrm_rs.optim.FusedOptimizer]:
    """A module and its optimizer."""
    torch.manual_seed(2)
    module = dlrm_rs.EmbeddingBag(20, 5, mode="sum", optimizer=spec)
    assert module.fused_optimizer is not None
    return module, module.fused_optimizer


def train(module: dlrm_rs.EmbeddingBag, batches: list[Batch]) -> None:
    """A step per batch."""
    for step in batches:
        loss(module(step.indices, step.offsets[:-1])).backward()


@each_spec
def test_a_checkpoint_resumes_to_the_same_bits(spec: OptimizerSpec) -> None:
    batches = [batch(20, 16) for _ in range(10)]
    straight, _ = fused(spec)
    train(straight, batches)

    first, optimizer = fused(spec)
    train(first, batches[:5])
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    second, optimizer = fused(spec)
    torch.nn.init.zeros_(second.weight)
    second.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    train(second, batches[5:])
    assert torch.equal(second.weight, straight.weight)


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
