"""`replace_embeddings`: what stays, what trains on, and what is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing import assert_close

import dlrm_rs
from dlrm_rs import owner, replace


class Model(nn.Module):
    """Two embeddings, one of them in two places, and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 8, mode="sum", padding_idx=3)
        self.rows = nn.Embedding(20, 8)
        self.inner = nn.ModuleDict({"again": self.bag})
        self.top = nn.Linear(16, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids `(B, bag length)` to `(B, 1)`."""
        return self.top(torch.cat([self.inner["again"](ids), self.rows(ids[:, 0])], dim=1))  # type: ignore[no-any-return]


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Tensor) -> list[Tensor]:
    """The loss of every step."""
    result = []
    for ids in steps:
        optimizer.zero_grad()
        loss = (model(ids) - ids.sum(1, keepdim=True) / 50).square().mean()
        loss.backward()
        optimizer.step()
        result.append(loss.detach())
    return result


def test_what_stays() -> None:
    model = Model().eval()
    model.rows.requires_grad_(False)
    before = model.state_dict()
    rows, copies = dict(model.named_parameters()), copy.deepcopy(before)
    modules = dict(model.named_modules())
    assert dlrm_rs.replace_embeddings(model) is model
    assert type(model.bag) is dlrm_rs.EmbeddingBag
    assert type(model.rows) is dlrm_rs.Embedding
    assert model.inner["again"] is model.bag
    assert dict(model.named_modules()) == modules  # the same objects
    assert not model.bag.training
    assert list(model.state_dict()) == list(before)
    for name, weight in model.named_parameters():
        assert weight is rows[name]
        assert torch.equal(weight, copies[name])
    assert not model.rows.weight.requires_grad
    assert model.bag.weight.data_ptr() == model.bag._tables.handle.weight(0).ctypes.data
    assert model.bag.padding_idx == 3


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("before", [True, False])
def test_an_optimizer_made_before_or_after_trains_on(before: bool, sparse: bool) -> None:
    theirs = Model()
    theirs.bag.sparse = theirs.rows.sparse = sparse
    ours = copy.deepcopy(theirs)
    steps = torch.randint(0, 20, (20, 16, 3))
    make = torch.optim.SGD if sparse else torch.optim.Adam
    expected = losses(theirs, make(theirs.parameters(), lr=0.05), steps)
    if before:
        optimizer: torch.optim.Optimizer = make(ours.parameters(), lr=0.05)
        got = losses(ours, optimizer, steps[:5])
        dlrm_rs.replace_embeddings(ours)
        got += losses(ours, optimizer, steps[5:])
    else:
        dlrm_rs.replace_embeddings(ours)
        got = losses(ours, make(ours.parameters(), lr=0.05), steps)
    assert_close(got, expected, rtol=1e-5, atol=0)
    assert_close(ours.state_dict(), theirs.state_dict())


def test_with_a_fused_optimizer() -> None:
    theirs = Model()
    ours = copy.deepcopy(theirs)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05)
    dlrm_rs.replace_embeddings(ours, optimizer=dlrm_rs.optim.SGD(lr=0.05))
    steps = torch.randint(0, 20, (20, 16, 3))
    expected = losses(theirs, torch.optim.SGD(theirs.parameters(), lr=0.05), steps)
    assert_close(losses(ours, optimizer, steps), expected, rtol=1e-5, atol=0)
    assert ours.bag.weight.grad is None


def test_the_model_may_be_the_embedding() -> None:
    module = nn.EmbeddingBag(5, 2)
    assert dlrm_rs.replace_embeddings(module) is module
    assert type(module) is dlrm_rs.EmbeddingBag


def test_hooks_stay() -> None:
    model = Model()
    seen = []
    model.rows.register_forward_hook(lambda *args: seen.append("forward"))
    model.rows.weight.register_hook(lambda grad: grad * 0)
    dlrm_rs.replace_embeddings(model)
    model(torch.tensor([[1, 2]])).sum().backward()
    assert seen == ["forward"]
    assert model.rows.weight.grad is not None
    assert not model.rows.weight.grad.any()


def test_what_is_there_already_is_left() -> None:
    model = nn.Sequential(dlrm_rs.EmbeddingBag(5, 2, optimizer=dlrm_rs.optim.SGD(lr=0.1)), nn.Embedding(5, 2))
    kept = model[0]._tables
    dlrm_rs.replace_embeddings(model)
    dlrm_rs.replace_embeddings(model)
    assert model[0]._tables is kept
    assert type(model[1]) is dlrm_rs.Embedding


def test_a_linear_tied_to_the_weight_stays_tied() -> None:
    def train(*, replaced: bool) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20, bias=False))
        model[1].weight = model[0].weight
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
        if replaced:
            dlrm_rs.replace_embeddings(model)
        for ids in torch.randint(0, 20, (10, 16)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(ids), ids.roll(1)).backward()
            optimizer.step()
        return model

    ours, theirs = train(replaced=True), train(replaced=False)
    assert ours[1].weight is ours[0].weight
    assert_close(ours.state_dict(), theirs.state_dict())


class Scaled(nn.Embedding):
    """A subclass with a behaviour of its own."""


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(5, 2), nn.Embedding(5, 2))
    model[1].weight = model[0].weight
    return model


def tied_by_data() -> nn.Module:
    model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 5))
    model[1].weight.data = model[0].weight.data
    return model


def tied_linear() -> nn.Module:
    model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 5))
    model[1].weight = model[0].weight
    return model


def normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Embedding(5, 2)))


def pruned() -> nn.Module:
    module = nn.Embedding(5, 2)
    prune.l1_unstructured(module, "weight", amount=1)
    return nn.Sequential(module)


def patched() -> nn.Module:
    module = nn.Embedding(5, 2)
    module.forward = lambda input: input  # type: ignore[method-assign] # noqa: A006
    return nn.Sequential(module)


@pytest.mark.parametrize(
    ("make", "kwargs", "error", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}, ValueError, "model: expected at least one .* got none"),
        (lambda: nn.Sequential(Scaled(5, 2)), {}, TypeError, "got Scaled at '0', a subclass"),
        (normed, {}, TypeError, "got ParametrizedEmbedding at '0', a subclass"),
        (pruned, {}, ValueError, "expected a torch.nn.Parameter as weight of '0'"),
        (patched, {}, ValueError, "expected the forward of its class at '0'"),
        (lambda: nn.EmbeddingBag(5, 2).double(), {}, TypeError, "weight of 'embedding': .* got torch.float64"),
        (lambda: nn.EmbeddingBag(5, 2, device="meta"), {}, ValueError, "got device meta"),
        (lambda: nn.Sequential(nn.Embedding(5, 2)).share_memory(), {}, ValueError, "weight of '0': .* shared"),
        (tied, {}, ValueError, "weight of '0': expected no other owner .* got '1.weight' as well"),
        (tied_by_data, {}, ValueError, "weight of '0': .* got memory that '1.weight' views too"),
        (tied_linear, {"optimizer": dlrm_rs.optim.SGD(lr=0.1)}, ValueError, "expected no other owner with a fused"),
        (tied_linear, {"dtype": "int8"}, ValueError, "expected no other owner with .* another row format"),
        (lambda: nn.EmbeddingBag(5, 2), {"dtype": "int3"}, TypeError, "dtype: expected one of .* got 'int3'"),
        (
            lambda: nn.EmbeddingBag.from_pretrained(torch.full((5, 2), torch.inf)),
            {"dtype": "int8"},
            ValueError,
            "row 0 of table .* expected finite numbers, got inf",
        ),
        (lambda: nn.EmbeddingBag(5, 2), {"optimizer": "sgd"}, TypeError, "optimizer: expected None or one of"),
    ],
)
def test_what_is_refused_and_leaves_the_model(
    make: Callable[[], nn.Module], kwargs: dict[str, Any], error: type[Exception], words: str
) -> None:
    # A module that could be replaced comes first, and stays what it was.
    first = nn.Embedding(4, 4)
    model = nn.ModuleList([first, make()]) if "embedding" not in words and "none" not in words else make()
    words = words.replace("'0'", "'1.0'").replace("'1.weight'", "'1.1.weight'")
    classes = [type(module) for module in model.modules()]
    state = dict(model.state_dict())
    with pytest.raises(error, match=words):
        dlrm_rs.replace_embeddings(model, **kwargs)
    assert [type(module) for module in model.modules()] == classes
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == state[name].data_ptr()


def test_every_tensor_of_a_model_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    memory = replace._memory

    def counting(tensor: Tensor) -> int:
        looked.append(tensor)
        return memory(tensor)

    monkeypatch.setattr(replace, "_memory", counting)
    dlrm_rs.replace_embeddings(nn.ModuleList(nn.Embedding(2, 2) for _ in range(50)))
    assert len(looked) == 50 + 50  # one pass over the model, and one question per embedding


def test_when_memory_runs_out_the_model_works_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    ids = torch.tensor([[1, 2]])
    out = model(ids)

    def single_table(embedding: nn.EmbeddingBag | nn.Embedding, *args: Any) -> Any:
        if embedding is model.rows:
            raise MemoryError
        return owner.single_table(embedding, *args)

    monkeypatch.setattr("dlrm_rs.replace.single_table", single_table)
    with pytest.raises(MemoryError):
        dlrm_rs.replace_embeddings(model)
    assert type(model.bag) is nn.EmbeddingBag
    assert torch.equal(model(ids), out)
    model(ids).sum().backward()
