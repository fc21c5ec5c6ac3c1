"""Backward in two parts: the order of gradients, and that they have autograd's bits."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clicks import click_log, click_model
from dlrm_rs import Pipeline
from dlrm_rs.pipeline.pipeline import click_loss
from dlrm_rs.pipeline.split_backward import SplitBackward, linear_layers


@contextmanager
def split(model: nn.Module) -> Iterator[SplitBackward]:
    backward = SplitBackward(linear_layers(model))
    backward.begin()
    yield backward
    backward.remove()


def is_split(out: Tensor) -> bool:
    assert out.grad_fn is not None
    return type(out.grad_fn).__name__ == "_InputGradientBackward"


def is_same(ours: Tensor | None, autograds: Tensor | None) -> bool:
    if ours is None or autograds is None:
        return ours is autograds
    return ours.dtype == autograds.dtype and torch.equal(ours, autograds)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(13, 33), nn.ReLU(), nn.Linear(33, 17, bias=False), nn.ReLU(inplace=True), nn.Linear(17, 1)
    )


class Twice(nn.Module):
    """One layer three times over."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(13, 13)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.layer(self.layer(x).relu()).relu()).sum(1)
        return out


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(13, 13), nn.Linear(13, 13)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).relu()).sum(1)
        return out


class Checkpointed(nn.Module):
    """Layers that run again in backward."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.layers = mlp()
        self._use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.layers, x, use_reentrant=self._use_reentrant)
        return out


class Frozen(nn.Module):
    """Some parameters that are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()
        self.layers.get_submodule("0").requires_grad_(False)
        self.layers.get_parameter("4.bias").requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class ThreeDimensions(nn.Module):
    """Input that is no matrix, or one by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(13, 5), nn.Linear(5, 9)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x.view(-1, 2, 13)).flatten(0, 1)
        out: Tensor = self.second(y.t().contiguous().t())
        return out


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "one layer three times": Twice,
    "tied": Tied,
    "checkpoint": lambda: Checkpointed(False),
    "reentrant checkpoint": lambda: Checkpointed(True),
    "frozen": Frozen,
    "three dimensions": ThreeDimensions,
}


def gradients(model: nn.Module, x: Tensor, autocast: bool) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        out = model(x)
    out.float().square().mean().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [2, 64, 1000])
def test_gradients_have_autograds_bits(name: str, batch: int, autocast: bool) -> None:
    torch.manual_seed(1)
    model = MODELS[name]()
    other, x = copy.deepcopy(model), torch.randn(batch, 13)
    expected = gradients(other, x, autocast)
    with split(model):
        got = gradients(model, x, autocast)
    for ours, autograds in zip(got, expected, strict=True):
        assert is_same(ours, autograds)


def test_weights_come_after_every_gradient_of_an_input() -> None:
    def order(is_on: bool) -> list[str]:
        model = mlp()
        seen: list[str] = []
        x = torch.randn(8, 13, requires_grad=True)
        x.register_post_accumulate_grad_hook(lambda _: seen.append("input"))
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
        with split(model) if is_on else nullcontext():
            model(x).sum().backward()
        assert len(seen) == 6
        return seen

    assert order(True)[0] == "input"
    assert order(False).index("input") > 2


def test_in_a_pipeline_the_tables_have_their_gradient_first() -> None:
    def order(split_backward: bool) -> list[str]:
        model, log = click_model(), click_log(3)
        seen: list[str] = []
        for name, parameter in model.named_parameters():
            if "embedding" not in name:
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
        model.embeddings.register_forward_hook(
            lambda _, args, rows: rows.values().register_hook(lambda _: seen.append("rows")) and None
        )
        for batch in Pipeline(model, None, log, split_backward=split_backward).batches():
            seen.clear()
            click_loss(model, batch).backward()
        return seen

    assert order(True)[0] == "rows"
    assert order(False).index("rows") > 2


def test_gradients_of_an_input_alone_leave_nothing_to_later_passes() -> None:
    model = mlp()
    x = torch.randn(8, 13, requires_grad=True)
    with split(model):
        out = model(x).sum()
        (of_input,) = torch.autograd.grad(out, x, retain_graph=True)
        out.backward(retain_graph=True)
        once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        out.backward()
    assert torch.equal(x.grad, 2 * of_input)  # type: ignore[arg-type]
    assert all(torch.equal(p.grad, 2 * grad) for p, grad in zip(model.parameters(), once, strict=True))  # type: ignore[arg-type]


def test_a_second_backward_says_what_autograd_says() -> None:
    model = mlp()
    with split(model):
        out = model(torch.randn(8, 13)).sum()
        out.backward()
        with pytest.raises(RuntimeError, match="a second time"):
            out.backward()


@pytest.mark.parametrize("of", ["input", "weights"])
def test_create_graph_is_refused(of: str) -> None:
    model, x = mlp(), torch.randn(8, 13, requires_grad=True)
    with split(model), pytest.raises(RuntimeError, match="split_backward=False"):
        torch.autograd.grad(model(x).sum(), [x] if of == "input" else list(model.parameters()), create_graph=True)


def test_what_is_changed_in_place_meanwhile_is_refused() -> None:
    layer, x = nn.Linear(13, 13), torch.randn(8, 13, requires_grad=True)
    with split(layer):
        beside = x * 2
        beside.register_hook(lambda grad: grad.mul_(2))
        out = layer(x) + beside  # of one gradient
        with pytest.raises(RuntimeError, match="changed in place"):
            out.backward(torch.ones(8, 13))


def scaled(model: nn.Module, x: Tensor) -> Tensor:
    layer = model.get_submodule("0")
    layer.forward = lambda x: 3 * nn.functional.linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    return cast(Tensor, model(x))


def of_other_parameters(model: nn.Module, x: Tensor) -> Tensor:
    return cast(Tensor, torch.func.functional_call(model, {n: 2 * p for n, p in model.named_parameters()}, (x,)))


def of_new_parameter(model: nn.Module, x: Tensor) -> Tensor:
    layer = cast(nn.Linear, model.get_submodule("0"))
    layer.weight = nn.Parameter(2 * layer.weight.detach())
    return cast(Tensor, model(x))


def of_another_precision(model: nn.Module, x: Tensor) -> Tensor:
    return cast(Tensor, model.double()(x.double()))


def frozen_in_forward(model: nn.Module, x: Tensor) -> Tensor:
    model.requires_grad_(False)
    out = model(x)
    model.requires_grad_(True)
    return cast(Tensor, out)


def of_normed_weight(model: nn.Module, x: Tensor) -> Tensor:
    nn.utils.parametrizations.weight_norm(model.get_submodule("2"))
    return cast(Tensor, model(x))


def without_gradient(model: nn.Module, x: Tensor) -> Tensor:
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    return cast(Tensor, Cut.apply(model(x)) + x.sum())


def with_keyword(model: nn.Module, x: Tensor) -> Tensor:
    return cast(Tensor, model.get_submodule("0")(input=x))


def in_several_autocasts(model: nn.Module, x: Tensor) -> Tensor:
    total = torch.zeros(())
    for enabled in (True, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            total = total + model(x + 1).float().square().mean()
    return total


@pytest.mark.parametrize(
    "forward",
    [
        scaled,
        of_other_parameters,
        of_new_parameter,
        of_another_precision,
        frozen_in_forward,
        of_normed_weight,
        without_gradient,
        with_keyword,
        in_several_autocasts,
    ],
)
def test_calls_of_other_kinds_have_autograds_gradients(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    def run(model: nn.Module) -> dict[str, Tensor | None]:
        x = values.clone().requires_grad_()
        forward(model, x).square().mean().backward()
        return {"x": x.grad} | {name: p.grad for name, p in model.named_parameters()}

    torch.manual_seed(2)
    model, values = mlp(), torch.randn(64, 13)
    expected = run(copy.deepcopy(model))
    with split(model):
        got = run(model)
    assert got.keys() == expected.keys()
    for name, autograds in expected.items():
        ours = got[name]
        assert (ours is None) == (autograds is None), name
        assert ours is None or autograds is None or (ours.dtype == autograds.dtype and torch.equal(ours, autograds)), (
            name
        )


def test_layers_run_as_ever_without_gradients_in_copies_and_afterwards() -> None:
    model, x = mlp(), torch.randn(8, 13, requires_grad=True)
    with split(model):
        assert is_split(model(x))
        assert not is_split(copy.deepcopy(model)(x))
        with torch.no_grad():
            assert model(x).grad_fn is None
        assert torch.compile(model, backend="eager")(x).shape == (8, 1)
    assert not is_split(model(x))


def test_memory_goes_with_the_loss_and_not_when_python_collects() -> None:
    model, x = mlp(), torch.randn(8, 13)
    input_of_first = weakref.ref(x)
    gc.disable()
    try:
        with split(model):
            loss = model(x).sum()
            loss.backward(retain_graph=True)
            del x
            assert input_of_first() is not None
            del loss
            assert input_of_first() is None
    finally:
        gc.enable()


def test_a_model_can_be_pickled_inside_of_the_loop() -> None:
    model, x = mlp(), torch.randn(8, 13)
    with split(model):
        loaded = pickle.loads(pickle.dumps(model))
        assert torch.equal(loaded(x), model(x))
        assert not is_split(loaded(x))
