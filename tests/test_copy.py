"""Copies, pickles, state_dicts, replaced weights and moves: torch and the engine stay on the same memory."""

import copy
import io
import itertools
import pickle
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune

import dlrm_rs
from dlrm_rs import tables

SPEC = dlrm_rs.optim.Adagrad(lr=0.1)
BAG = torch.tensor([[1, 2, 2]])


def bag(**kwargs: Any) -> dlrm_rs.EmbeddingBag:
    """A small table."""
    return dlrm_rs.EmbeddingBag(6, 3, mode="sum", **kwargs)


def step(module: nn.Module) -> None:
    """One step of a fused optimizer."""
    module(BAG).square().sum().backward()


def assert_shares_memory(module: dlrm_rs.EmbeddingBag) -> None:
    """The weight is the engine's rows, and what is looked up is the weight."""
    out = module(BAG).detach()
    assert module.weight.data_ptr() == module._tables.handle.weight(0).ctypes.data
    assert torch.equal(out, module.weight.detach()[BAG].sum(1))


def by_pickle(module: Any) -> Any:
    """Through bytes."""
    return pickle.loads(pickle.dumps(module))


def by_torch_save(module: Any) -> Any:
    """Through a file."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("optimizer", [None, SPEC])
def test_a_copy_is_equal_and_independent(duplicate: Callable[[Any], Any], optimizer: Any) -> None:
    module = bag(optimizer=optimizer)
    if optimizer:
        step(module)
    module.eval()
    model = nn.ModuleDict({"a": module, "same": module, "b": nn.Linear(3, 1)})
    twin = duplicate(model)
    assert twin["a"] is twin["same"]
    assert not twin["a"].training
    assert_shares_memory(twin["a"])
    assert_shares_memory(module)
    assert torch.equal(twin["a"].weight, module.weight)
    assert twin["a"].weight.data_ptr() != module.weight.data_ptr()
    if optimizer:
        for one in (module, twin["a"]):
            step(one)
            rows = one._tables.handle.optimizer_state(0)["sum"]
            assert one.fused_optimizer is not None
            assert one.fused_optimizer.state[one.weight]["sum"].data_ptr() == rows.ctypes.data
        assert torch.equal(twin["a"].weight, module.weight)
        twin["a"].fused_optimizer.param_groups[0]["lr"] = 5.0
        assert module.fused_optimizer is not None
        assert module.fused_optimizer.param_groups[0]["lr"] == 0.1
        step(twin["a"])
    else:
        nn.init.zeros_(twin["a"].weight)
    assert not torch.equal(twin["a"].weight, module.weight)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_a_copy_of_a_collection(duplicate: Callable[[Any], Any]) -> None:
    tables = [dlrm_rs.EmbeddingBagConfig(name, 5, dim, [name]) for name, dim in (("a", 2), ("b", 3))]
    collection = dlrm_rs.EmbeddingBagCollection(tables, optimizer=SPEC)
    call = (torch.tensor([0, 1]), torch.tensor([0, 1, 2]))
    collection.lookup(*call).sum().backward()
    twin = duplicate(collection)
    for _ in range(2):
        out = [one.lookup(*call) for one in (collection, twin)]
        assert torch.equal(out[0], out[1])
        for one in out:
            one.sum().backward()
    assert all(map(torch.equal, collection.state_dict().values(), twin.state_dict().values()))
    nn.init.zeros_(twin.embedding_bags["b"].weight)
    assert collection.lookup(*call)[0, 2:].detach().abs().sum() > 0
    assert twin.lookup(*call)[0, 2:].tolist() == [0, 0, 0]


def test_a_copy_of_a_table_without_rows() -> None:
    module = dlrm_rs.Embedding(0, 3)
    assert copy.deepcopy(module)(torch.empty(0, dtype=torch.int64)).shape == (0, 3)


def test_a_shallow_copy_shares_the_table() -> None:
    module = bag()
    assert copy.copy(module).weight is module.weight
    assert_shares_memory(copy.copy(module))


REPLACEMENTS: dict[str, Callable[[dlrm_rs.EmbeddingBag, Tensor], Any]] = {
    "data": lambda module, rows: setattr(module.weight, "data", rows),
    "parameter": lambda module, rows: setattr(module, "weight", nn.Parameter(rows)),
    "assign": lambda module, rows: module.load_state_dict({"weight": rows}, assign=True),
    "load": lambda module, rows: module.load_state_dict({"weight": rows}),
    "copy": lambda module, rows: module.weight.data.copy_(rows),
    "strided": lambda module, rows: setattr(module.weight, "data", rows.t().contiguous().t()),
}


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
@pytest.mark.parametrize("optimizer", [None, SPEC])
@pytest.mark.parametrize("viewed", [False, True])
def test_a_replaced_weight_is_adopted(replace: Callable[..., Any], optimizer: Any, viewed: bool) -> None:
    module = bag(optimizer=optimizer)
    old = module.weight.detach() if viewed else None
    before = module.weight.detach().clone()
    if optimizer:
        step(module)
        assert not torch.equal(module.weight, before)
    rows = torch.arange(18.0).view(6, 3)
    replace(module, rows.clone())
    assert_shares_memory(module)
    assert torch.equal(module.weight, rows)
    assert module.weight.requires_grad
    step(module)
    if optimizer is None:
        assert module.weight.grad is not None
    else:
        # The state went along, and the optimizer knows the Parameter there is now.
        assert module.fused_optimizer is not None
        assert module.fused_optimizer.param_groups[0]["params"] == [module.weight]
        assert (module.fused_optimizer.state[module.weight]["sum"][1] > 2).all()
        assert_shares_memory(module)
        assert not torch.equal(module.weight, rows)
    if old is not None and replace not in (REPLACEMENTS["load"], REPLACEMENTS["copy"]):
        assert not torch.equal(old, module.weight)  # whoever looks at the old rows still sees them
        assert torch.equal(old[[0, 3, 4, 5]], before[[0, 3, 4, 5]])


# The engine's own memory under another shape or in another order, of a table of 4 rows and 4 columns.
RESHAPED: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "transposed": (lambda rows: rows.t(), None),
    "fewer rows": (lambda rows: rows[:2], r"expected shape \(4, 4\).* got \(2, 4\)"),
    "fewer columns": (lambda rows: rows[:, :3], r"expected shape \(4, 4\).* got \(4, 3\)"),
    "other shape": (lambda rows: rows.view(2, 8), r"expected shape \(4, 4\).* got \(2, 8\)"),
    "flat": (lambda rows: rows.view(16), r"expected shape \(4, 4\).* got \(16,\)"),
    "one row for all": (lambda rows: rows[:1].expand(4, 4), None),
}


@pytest.mark.parametrize(("reshape", "words"), RESHAPED.values(), ids=RESHAPED)
@pytest.mark.parametrize("optimizer", [None, SPEC])
def test_the_same_memory_seen_otherwise_is_adopted_or_refused(
    reshape: Callable[[Tensor], Tensor], words: str | None, optimizer: Any
) -> None:
    module = dlrm_rs.EmbeddingBag(4, 4, mode="sum", optimizer=optimizer)
    rows = module.weight.detach().clone()
    module.weight.data = reshape(module.weight.data)
    if words is not None:
        with pytest.raises(ValueError, match=words):
            module(BAG)
        module.weight.data = torch.as_strided(module.weight.data, (4, 4), (4, 1))
    assert_shares_memory(module)
    assert torch.equal(module.weight, rows if words else reshape(rows))
    step(module)
    assert_shares_memory(module)


def interrupted(line: int, call: Callable[[], Any]) -> bool:
    """Whether Ctrl-C before the n-th line of this package that a call runs came before the call's end."""
    ran = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal ran
        if not frame.f_globals.get("__name__", "").startswith("dlrm_rs."):
            return None
        ran += event == "line"
        if event == "line" and ran == line:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("viewed", [False, True])
@pytest.mark.parametrize("change", ["data", "parameter"])
def test_an_adoption_that_is_interrupted_anywhere_is_done_again(change: str, viewed: bool) -> None:
    configs = [dlrm_rs.EmbeddingBagConfig(name, 5, 2, [name]) for name in ("a", "b", "c")]
    collection = dlrm_rs.EmbeddingBagCollection(configs, optimizer=SPEC)
    optimizer = collection.fused_optimizer
    assert optimizer is not None
    collection.lookup(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2, 3])).sum().backward()
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for line in itertools.count(1):
        new = torch.rand(5, 2)
        expected = {name: rows.clone() for name, rows in collection.state_dict().items()}
        expected["embedding_bags.b.weight"] = new
        weight = collection.get_parameter("embedding_bags.b.weight")
        old, looked = (weight.detach(), weight.detach().clone()) if viewed else (None, None)
        if change == "data":
            weight.data = new.clone()
        else:
            collection.embedding_bags["b"].weight = nn.Parameter(new.clone())
        del weight
        again = interrupted(line, collection._tables.weights)
        # A trace also raises where Python raises no Ctrl-C: back on the line of `with`, before the lock is let go. Kept
        # by this thread, it would keep every other from forking.
        while tables._ADOPTING._is_owned():  # type: ignore[attr-defined]
            tables._ADOPTING.release()
        weights = collection._tables.weights()
        assert all(map(torch.equal, weights, expected.values()))
        assert optimizer.param_groups[0]["params"] == weights
        for table, now in enumerate(weights):
            sums = torch.from_numpy(collection._tables.handle.optimizer_state(table)["sum"])
            assert now.data_ptr() == collection._tables.handle.weight(table).ctypes.data
            assert optimizer.state[now]["sum"].data_ptr() == sums.data_ptr()
            assert torch.equal(sums, state[table]["sum"])
        assert old is None or torch.equal(old, cast(Tensor, looked))
        if not again:
            break
    assert line > 30


def test_an_allocation_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = bag(optimizer=SPEC)
    step(module)
    old, weight = module.weight.detach(), module.weight  # a view, so that the tables must move

    class Full:
        def __init__(self, *args: Any) -> None:
            pass

        def set_optimizer(self, name: str, split_bf16: bool, state_format: str) -> None:
            raise MemoryError

    module.weight = nn.Parameter(torch.rand(6, 3))
    with monkeypatch.context() as patch:
        patch.setattr(tables, "TableSet", Full)
        with pytest.raises(MemoryError):
            module(BAG)
    module.weight = weight
    assert_shares_memory(module)
    assert module.weight.data_ptr() == old.data_ptr()
    step(module)


def test_a_replaced_weight_of_one_of_several_tables() -> None:
    tables = [dlrm_rs.EmbeddingBagConfig(name, 5, 2, [name]) for name in ("a", "b")]
    collection = dlrm_rs.EmbeddingBagCollection(tables, optimizer=SPEC)
    first = collection.get_parameter("embedding_bags.a.weight")
    old = collection.get_parameter("embedding_bags.b.weight")
    collection.embedding_bags["b"].weight = nn.Parameter(torch.ones(5, 2))
    for _ in range(2):
        assert collection.lookup(torch.tensor([0, 1]), torch.tensor([0, 1, 2]))[0, 2:].tolist() == [1, 1]
    assert collection.get_parameter("embedding_bags.a.weight") is first
    assert first.data_ptr() == collection._tables.handle.weight(0).ctypes.data
    assert not torch.equal(old, torch.ones(5, 2))


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        (torch.ones(6, 4), ValueError, r"weight of table 'embedding_bag': expected shape \(6, 3\).* got \(6, 4\)"),
        (torch.ones(6, 3, dtype=torch.float64), TypeError, "expected dtype torch.float32, got torch.float64"),
        (torch.ones(6, 3, device="meta"), ValueError, "expected a tensor on the CPU.* got device meta"),
    ],
)
def test_a_weight_that_cannot_be_adopted_is_refused(rows: Tensor, error: type[Exception], words: str) -> None:
    module = bag()
    good = module.weight
    module.weight = nn.Parameter(rows)
    for _ in range(2):
        with pytest.raises(error, match=words):
            module(BAG)
    module.weight = good
    assert_shares_memory(module)


TIES: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "parameter": lambda one, two: setattr(one, "weight", two.weight),
    "data": lambda one, two: setattr(one.weight, "data", two.weight.data),
    "assign": lambda one, two: one.load_state_dict(two.state_dict(), assign=True),
}


@pytest.mark.parametrize("tie", TIES.values(), ids=TIES)
@pytest.mark.parametrize("collection", [False, True])
def test_tables_that_are_tied_are_refused(tie: Callable[[nn.Module, nn.Module], Any], collection: bool) -> None:
    tables = [dlrm_rs.EmbeddingBagConfig(name, 6, 3, [name]) for name in ("one", "two")]
    both = dlrm_rs.EmbeddingBagCollection(tables)
    one, two = both.embedding_bags.values() if collection else (bag(), bag())
    rows = two.state_dict()["weight"].clone()
    tie(one, two)
    with pytest.raises(ValueError, match=r"memory of its own, got that of another table, '(two|embedding_bag)'"):
        both.lookup(torch.tensor([0]), torch.tensor([0, 1, 1])) if collection else one(BAG)
    one.weight = nn.Parameter(two.state_dict()["weight"].clone())
    assert torch.equal(two.state_dict()["weight"], rows)
    both.lookup(torch.tensor([0]), torch.tensor([0, 1, 1])) if collection else one(BAG)
    assert one.weight.data_ptr() != two.state_dict()["weight"].data_ptr()


def test_memory_of_a_table_that_is_gone_can_be_used() -> None:
    rows = bag().weight.data
    module = bag()
    module.weight.data = rows
    assert_shares_memory(module)
    assert torch.equal(module.weight, rows)


def test_functional_call_uses_the_given_weight_and_leaves_the_module_as_it_was() -> None:
    module = bag()
    before = module.weight.detach().clone()
    leaf = torch.ones(6, 3, requires_grad=True)
    for _ in range(2):
        out = functional_call(module, {"weight": leaf * 2}, (BAG,))
        assert out.tolist() == [[6, 6, 6]]
        out.sum().backward()
        assert torch.equal(module.weight, before)
        assert_shares_memory(module)
    assert leaf.grad is not None
    assert leaf.grad[:3].tolist() == [[0, 0, 0], [4, 4, 4], [8, 8, 8]]
    assert module.weight.grad is None


@pytest.mark.parametrize(
    "take_away",
    [
        lambda module: parametrize.register_parametrization(module, "weight", nn.Identity()),
        lambda module: prune.l1_unstructured(module, "weight", amount=1),
        lambda module: setattr(module, "weight", None),
    ],
)
def test_a_computed_weight_is_refused(take_away: Callable[[nn.Module], Any]) -> None:
    module = bag()
    take_away(module)
    with pytest.raises(RuntimeError, match="weight: expected a Parameter of the module, and there is none"):
        module(BAG)


MOVES: dict[str, Callable[[nn.Module], Any]] = {
    "cpu": lambda module: module.cpu(),
    "float": lambda module: module.float(),
    "to": lambda module: module.to("cpu", torch.float32),
    "train": lambda module: module.train(),
    "to_empty": lambda module: module.to_empty(device="cpu"),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_moves_that_leave_the_table(move: Callable[[nn.Module], Any]) -> None:
    module = bag(optimizer=SPEC)
    weight, rows = module.weight, module.weight.detach().clone()
    assert move(nn.Sequential(module))[0] is module
    assert module.weight is weight
    assert torch.equal(weight, rows)
    assert_shares_memory(module)


def test_a_model_that_moves_to_another_device_leaves_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    # There may be no other device here: a device that holds data is stood in for by double the numbers on the CPU.
    module, linear = bag(sparse=True), nn.Linear(3, 1)
    module(BAG).sum().backward()
    rows, grad = module.weight.detach().clone(), module.weight.grad
    before = linear.weight.detach().clone()
    nn.Sequential(module, linear)._apply(lambda tensor: tensor * 2)
    assert torch.equal(linear.weight, before * 2)
    assert torch.equal(module.weight, rows)
    assert module.weight.grad is grad
    assert_shares_memory(module)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_dense_layers_on_a_gpu_train_a_table_on_the_cpu() -> None:
    module, linear = bag(optimizer=SPEC), nn.Linear(3, 1)
    before = module.weight.detach().clone()
    nn.Sequential(module, linear).cuda()
    assert linear.weight.is_cuda
    assert_shares_memory(module)
    linear(module(BAG).cuda()).sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.is_cuda
    assert not torch.equal(module.weight, before)
    with pytest.raises(ValueError, match=r"input: expected a tensor on the CPU.* got device cuda:0; use input.cpu\(\)"):
        module(BAG.cuda())


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "half": (lambda module: module.half(), TypeError, "got a change to torch.float16"),
    "double": (lambda module: module.double(), TypeError, "got a change to torch.float64"),
    "bfloat16": (lambda module: module.to(torch.bfloat16), TypeError, "got a change to torch.bfloat16"),
    "meta": (lambda module: module.to("meta"), ValueError, "device: expected one that holds data, got 'meta'"),
    "share_memory": (lambda module: module.share_memory(), TypeError, "share_memory: expected the tables to stay"),
}


@pytest.mark.parametrize(("change", "error", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("collection", [False, True])
def test_changes_that_are_refused(
    change: Callable[[nn.Module], Any], error: type[Exception], words: str, collection: bool
) -> None:
    module: nn.Module = bag()
    if collection:
        module = dlrm_rs.EmbeddingBagCollection([dlrm_rs.EmbeddingBagConfig("a", 6, 3, ["a"])])
    before = {name: (tensor, tensor.clone()) for name, tensor in module.named_parameters()}
    with pytest.raises(error, match=words + ".* modules that come before this one in the model may have changed"):
        change(nn.Sequential(module))
    for name, tensor in module.named_parameters():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_state_dicts_of_torchs_and_ours_load_into_each_other() -> None:
    for ours, theirs in ((bag(), nn.EmbeddingBag(6, 3)), (dlrm_rs.Embedding(6, 3), nn.Embedding(6, 3))):
        assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight"]
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours.weight, theirs.weight)
        nn.init.zeros_(ours.weight)
        theirs.load_state_dict(ours.state_dict())
        assert not theirs.weight.any()
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            ours.load_state_dict({"weight": torch.zeros(7, 3)})


def test_memory_report() -> None:
    report = bag(optimizer=SPEC).memory_report()["embedding_bag"]
    assert (report["payload"], report["state"]) == (6 * 3 * 4, 6 * 3 * 4)
    assert report["overhead"] >= 0


def test_requires_grad() -> None:
    module = bag()
    assert module.requires_grad_(False)(BAG).requires_grad is False
    assert module.requires_grad_(True)(BAG).requires_grad is True
