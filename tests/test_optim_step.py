"""Updates that wait for `step()`: accumulated, scaled, skipped, and several lookups as one."""

import copy
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
        module.weight.grad = None
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
