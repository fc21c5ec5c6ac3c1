"""`torch.compile(fullgraph=True)`: the same results as without, in one graph, whatever the batch."""

import contextlib
import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

import dlrm_rs
from batches import batch
from dlrm_rs.operators import registered, whose

FEATURES = ["f0", "f1", "f2", "f3"]

OPTIMIZERS: dict[str, dlrm_rs.optim.OptimizerSpec | None] = {
    "torch": None,
    "sgd": dlrm_rs.optim.SGD(lr=0.1),
    "adagrad": dlrm_rs.optim.Adagrad(lr=0.1),
    "rowwise_adagrad": dlrm_rs.optim.RowWiseAdagrad(lr=0.1),
    "adam": dlrm_rs.optim.Adam(lr=0.1),
}

# torch's own, while it compiles.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.backends.cuda:UserWarning"),
]


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many have been made since the test began."""
    return int(counters["stats"]["unique_graphs"])


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every call of an operator, whether it got the memory of the tables and no copy."""
    found: list[bool] = []
    at_home = whose.at_home

    def ask(*arguments: Any) -> bool:
        found.append(at_home(*arguments))
        return found[-1]

    monkeypatch.setattr(registered, "at_home", ask)
    monkeypatch.setattr(whose, "at_home", ask)
    return found


def dlrm(optimizer: Any = None, pooling: str = "sum", data_types: Any = ("fp32",) * 4) -> dlrm_rs.DLRM:
    tables = [
        dlrm_rs.EmbeddingBagConfig(f"t{i}", 50, 8, [name], pooling if i else "mean", data_types[i])
        for i, name in enumerate(FEATURES)
    ]
    embeddings = dlrm_rs.EmbeddingBagCollection(tables, optimizer=optimizer)
    return dlrm_rs.DLRM(embeddings, dense_in_features=3, bottom_mlp=[16, 8], top_mlp=[16, 1])


def samples(batch_size: int) -> tuple[Tensor, dlrm_rs.KeyedJaggedTensor]:
    indices, offsets, _ = batch(50, 4 * batch_size)
    return torch.randn(batch_size, 3), dlrm_rs.KeyedJaggedTensor.from_lengths_sync(FEATURES, indices, offsets.diff())


def train(model: nn.Module, call: Callable[..., Tensor], batches: list[Any]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs in batches:
        optimizer.zero_grad()
        (call(*inputs) - 1).square().mean().backward()
        optimizer.step()


def assert_trains_alike(model: nn.Module, batches: list[Any], **options: Any) -> Any:
    """Train a model and a copy of it, which is compiled and returned."""
    copied = copy.deepcopy(model)
    compiled = torch.compile(copied, fullgraph=True, **options)
    train(model, model, batches)
    train(copied, compiled, batches)
    for (name, expected), got in zip(model.named_parameters(), copied.parameters(), strict=True):
        assert_close(got, expected, msg=name)
    return compiled


@pytest.mark.parametrize("optimizer", [None, OPTIMIZERS["rowwise_adagrad"]], ids=["torch", "fused"])
def test_a_dlrm_trains_and_infers_in_one_graph_each(optimizer: Any, places: list[bool]) -> None:
    model = dlrm(optimizer)
    sizes = (37, 25, 25, 42, 33)  # for the few elements of smaller ones Inductor has code of its own
    compiled = assert_trains_alike(model, [samples(size) for size in sizes])
    assert graphs() == 2  # one for the first batch alone, as torch does, and one for batches and bags of any length
    with torch.no_grad():
        for size in (36, 29, 40):
            inputs = samples(size)
            assert_close(compiled(*inputs), model(*inputs))
    assert graphs() == 4
    assert all(places)  # Inductor updates tables where they are
    assert len(places) == 5 + 3 + 5 * (optimizer is not None)


@pytest.mark.parametrize("pooling", ["sum", "max"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_optimizer_and_pooling_by_a_backend_that_copies(optimizer: Any, pooling: str) -> None:
    # `aot_eager` gives an operator copies of whatever it is to change, and copies them back.
    model = dlrm(optimizer, pooling)
    assert_trains_alike(model, [samples(size) for size in (7, 5, 5, 12, 3)], backend="aot_eager")
    assert graphs() == 2  # the first for one size alone, as torch does unless told that sizes vary


@pytest.mark.parametrize("data_types", [("int8",) * 4, ("fp32", "bf16", "int4", "int2"), ("fp16",) * 4])
def test_rows_of_other_formats(data_types: tuple[str, ...], places: list[bool]) -> None:
    model = dlrm(None, "sum", data_types)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for size in (6, 9):
            inputs = samples(size)
            assert_close(compiled(*inputs), model(*inputs))
    assert graphs() == 1
    assert places == [True, True]


def test_a_model_can_be_quantized_after_it_was_compiled() -> None:
    model = dlrm()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        compiled(*samples(6))
        dlrm_rs.quantize(model, "int4", method="codebook")
        inputs = samples(9)
        assert_close(compiled(*inputs), model(*inputs))


MODULES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "sum": (dlrm_rs.EmbeddingBag, {"mode": "sum"}),
    "mean": (dlrm_rs.EmbeddingBag, {"mode": "mean", "include_last_offset": True}),
    "max": (dlrm_rs.EmbeddingBag, {"mode": "max", "padding_idx": 3}),
    "scaled": (dlrm_rs.EmbeddingBag, {"mode": "sum", "scale_grad_by_freq": True}),
    "max_norm": (dlrm_rs.EmbeddingBag, {"mode": "sum", "max_norm": 1.0}),
    "fused": (dlrm_rs.EmbeddingBag, {"mode": "sum", "optimizer": OPTIMIZERS["adagrad"]}),
    "half": (dlrm_rs.EmbeddingBag, {"mode": "sum", "dtype": torch.bfloat16}),
    "rows": (dlrm_rs.Embedding, {"padding_idx": 1}),
    "rows, fused": (dlrm_rs.Embedding, {"optimizer": OPTIMIZERS["adagrad"]}),
}


@pytest.mark.parametrize(("kind", "options"), MODULES.values(), ids=MODULES)
def test_every_module(kind: Any, options: dict[str, Any]) -> None:
    module = kind(50, 5, **options)
    batches: list[tuple[Tensor, ...]]
    if kind is dlrm_rs.Embedding:
        batches = [(torch.randint(0, 50, (size, 3)),) for size in (7, 5, 12)]
    else:
        made = [batch(50, size) for size in (7, 5, 12)]
        batches = [(ids, bounds if "include_last_offset" in options else bounds[:-1]) for ids, bounds, _ in made]
        batches += [(torch.randint(0, 50, (size, 3)),) for size in (7, 5)]
    assert_trains_alike(module, batches, backend="aot_eager", dynamic=True)
    assert graphs() == len({len(inputs) for inputs in batches})  # with offsets and without


@pytest.mark.parametrize("optimizer", [None, OPTIMIZERS["sgd"]], ids=["torch", "fused"])
def test_weights_of_ids(optimizer: Any) -> None:
    module = dlrm_rs.EmbeddingBag(50, 5, mode="sum", optimizer=optimizer)
    copied = copy.deepcopy(module)
    compiled: Any = torch.compile(copied, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (7, 5):
        indices, offsets, weights = batch(50, size)
        leaves = [weights.clone().requires_grad_() for _ in range(2)]
        for call, leaf in zip((module, compiled), leaves, strict=True):
            call(indices, offsets[:-1], leaf).square().sum().backward()
        assert_close(leaves[1].grad, leaves[0].grad)
    assert_close(copied.weight, module.weight)
    assert_close(copied.weight.grad, module.weight.grad)


def test_a_learning_rate_that_changes_makes_no_new_graph() -> None:
    model = dlrm_rs.EmbeddingBag(4, 2, mode="sum", optimizer=OPTIMIZERS["sgd"], _weight=torch.zeros(4, 2))
    assert model.fused_optimizer is not None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rate in (0.5, 0.25, 0.125):
        model.fused_optimizer.param_groups[0]["lr"] = rate
        compiled(torch.tensor([[1]])).sum().backward()
    assert model.weight.tolist() == [[0, 0], [-0.875, -0.875], [0, 0], [0, 0]]
    assert graphs() == 1


def test_forwards_of_several_batches_before_their_backwards() -> None:
    # With Inductor: what backends that copy write back, torch takes for a change by the user.
    model = dlrm_rs.EmbeddingBag(4, 2, mode="sum", optimizer=OPTIMIZERS["sgd"], _weight=torch.zeros(4, 2))
    compiled = torch.compile(model, fullgraph=True)
    first, second = compiled(torch.tensor([[1]])), compiled(torch.tensor([[2]]))
    second.sum().backward()
    first.sum().backward()
    assert_close(model.weight.detach()[:, 0], torch.tensor([0, -0.1, -0.1, 0]))


def test_what_the_user_changes_in_a_weight_is_seen() -> None:
    for optimizer in (None, OPTIMIZERS["sgd"]):
        model = dlrm_rs.EmbeddingBag(4, 2, mode="sum", optimizer=optimizer)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        ids = torch.tensor([[1, 2]])
        compiled(ids).sum().backward()
        model.weight.data = torch.ones(4, 2)
        out = compiled(ids)
        assert out.tolist() == [[2, 2]]
        out.sum().backward()
        model.requires_grad_(False)
        assert not compiled(ids).requires_grad
        model.load_state_dict({"weight": torch.full((4, 2), 3.0)})
        assert compiled(ids).tolist() == [[6, 6]]


def test_what_the_user_puts_in_the_place_of_codes_is_seen(places: list[bool]) -> None:
    bag = dlrm_rs.EmbeddingBag(20, 4, mode="sum", dtype="int8").requires_grad_(False)
    compiled = torch.compile(bag, fullgraph=True, backend="aot_eager")
    ids = torch.tensor([[1, 2], [3, 3]])
    codes = bag.weight_codes
    changes: list[Callable[[Tensor], Any]] = [
        lambda new: setattr(bag, "weight_codes", new),
        lambda new: setattr(bag.weight_codes, "data", new),
        lambda new: bag._buffers.update(weight_codes=new),
        codes.copy_,  # no part of the module any more
    ]
    seen = [compiled(ids)]
    for number, change in enumerate(changes):
        change(torch.full((20, 4), number, dtype=torch.uint8))
        seen.append(compiled(ids))
        assert torch.equal(seen[-1], bag(ids))
    assert [torch.equal(*pair) for pair in pairwise(seen)] == [False, False, False, True]
    assert all(places)


def test_functional_call_uses_the_given_weight() -> None:
    model = dlrm_rs.EmbeddingBag(4, 2, mode="sum")
    before = model.weight.detach().clone()
    call = torch.compile(
        lambda weight, ids: torch.func.functional_call(model, {"weight": weight}, (ids,)),
        fullgraph=True,
        backend="aot_eager",
    )
    weight = torch.ones(4, 2, requires_grad=True)
    out = call(weight, torch.tensor([[1, 2]]))
    assert out.tolist() == [[2, 2]]
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.sum(1).tolist() == [0, 2, 2, 0]
    assert torch.equal(model.weight, before)


def test_a_bad_id_is_named() -> None:
    module = dlrm_rs.EmbeddingBag(4, 2, mode="sum")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=r"indices\[1\]: .* rows of table 'embedding_bag', got 4"):
        compiled(torch.tensor([[1, 4]]))


def test_sparse_gradients_are_refused_in_words() -> None:
    module = dlrm_rs.EmbeddingBag(4, 2, mode="sum", sparse=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"sparse: expected False .*a fused optimizer, optimizer=dlrm_rs.optim"):
        compiled(torch.tensor([[1, 2]]))
    with torch.no_grad():
        assert_close(compiled(torch.tensor([[1, 2]])), module(torch.tensor([[1, 2]])))


def test_importing_the_package_does_not_import_the_compiler() -> None:
    code = "import sys, dlrm_rs; assert not {'torch._dynamo', 'torch._inductor'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def _sizes_of_the_data() -> Iterator[None]:
    """Have graphs read numbers out of tensors, as newer versions of torch do with `fullgraph=True`."""
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)
    with torch._dynamo.config.patch(capture_scalar_outputs=True) if old else contextlib.nullcontext():
        yield


# Features in another order than the tables', one that none looks up, and one that two tables do.
KEYS = ["other", "f2", "f0", "f1"]


def unordered(batch_size: int, is_weighted: bool) -> dlrm_rs.KeyedJaggedTensor:
    indices, offsets, weights = batch(9, 4 * batch_size)
    given = weights.requires_grad_() if is_weighted else None
    return dlrm_rs.KeyedJaggedTensor(KEYS, indices, given, lengths=offsets.diff())


@pytest.mark.usefixtures("_sizes_of_the_data")
@pytest.mark.parametrize("optimizer", [None, OPTIMIZERS["adagrad"]], ids=["torch", "fused"])
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_features_in_another_order_are_in_the_graph(backend: str, optimizer: Any) -> None:
    tables = [dlrm_rs.EmbeddingBagConfig(f"t{i}", 9, 3 + i, [f"f{i}"], "sum") for i in range(3)]
    tables.append(dlrm_rs.EmbeddingBagConfig("again", 9, 2, ["f1"], "sum"))
    model = dlrm_rs.EmbeddingBagCollection(tables, is_weighted=True, optimizer=optimizer)
    copied = copy.deepcopy(model)
    compiled = torch.compile(copied, fullgraph=True, backend=backend, dynamic=True)
    for size in (7, 5, 12):
        features = unordered(size, True)
        pooled = [call(features).values() for call in (model, compiled)]
        assert_close(pooled[1], pooled[0])
        weights = [torch.autograd.grad(out.square().sum(), features.weights())[0] for out in pooled]
        assert_close(weights[1], weights[0])
    assert_close(copied.state_dict(), model.state_dict())
    assert graphs() <= 2


@pytest.mark.usefixtures("_sizes_of_the_data")
@pytest.mark.parametrize("optimizer", [None, OPTIMIZERS["adagrad"]], ids=["torch", "fused"])
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_an_embedding_collection_is_one_graph(backend: str, optimizer: Any) -> None:
    tables = [dlrm_rs.EmbeddingConfig("t0", 9, 3, ["f0", "f1"]), dlrm_rs.EmbeddingConfig("t1", 9, 3, ["f2"])]
    model = dlrm_rs.EmbeddingCollection(tables, need_indices=True, optimizer=optimizer)
    copied = copy.deepcopy(model)
    compiled = torch.compile(copied, fullgraph=True, backend=backend, dynamic=True)
    for size in (7, 5, 12):
        features = unordered(size, False)
        found, expected = compiled(features), model(features)
        assert found.keys() == expected.keys()
        for name, rows in expected.items():
            assert_close(found[name].values(), rows.values())
            assert torch.equal(found[name].weights(), rows.weights())
            assert torch.equal(found[name].lengths(), rows.lengths())
        for rows in (found, expected):
            sum(part.values().square().sum() for part in rows.values()).backward()
    assert_close(copied.state_dict(), model.state_dict())
    for got, wanted in zip(copied.parameters(), model.parameters(), strict=True):
        assert_close(got.grad, wanted.grad)
    assert graphs() <= 2
