"""`torch.ops.dlrm_rs`: torch's own checks of operators, and their gradients against numeric ones and float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import dlrm_rs
from batches import batch
from dlrm_rs.operators import traced
from dlrm_rs.tables import EmbeddingTables

# opcheck asks tensors that are no leaves for their gradient.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

OPTIMIZERS: dict[str, dlrm_rs.optim.OptimizerSpec] = {
    "sgd": dlrm_rs.optim.SGD(lr=0.5),
    "adagrad": dlrm_rs.optim.Adagrad(lr=0.5),
    "rowwise_adagrad": dlrm_rs.optim.RowWiseAdagrad(lr=0.5),
    "adam with state in bf16": dlrm_rs.optim.Adam(lr=0.5, state_dtype="bf16"),
}


def tables_of(*poolings: str, data_type: str = "fp32", optimizer: Any = None) -> EmbeddingTables:
    """A table of 9 rows for each pooling, of 3 and more columns."""
    configs = [
        dlrm_rs.EmbeddingBagConfig(f"t{i}", 9, 3 + i, [f"f{i}"], pooling, data_type)
        for i, pooling in enumerate(poolings)
    ]
    return dlrm_rs.EmbeddingBagCollection(configs, optimizer=optimizer)._tables


def bags_of(tables: EmbeddingTables, weighted: bool = False) -> tuple[Any, ...]:
    """`indices, offsets, batch_size, per_sample_weights` of 4 samples."""
    indices, offsets, weights = batch(9, 4 * len(tables.features))
    return indices, offsets, 4, weights.requires_grad_() if weighted else None


def trained(rows: list[Tensor]) -> list[Tensor]:
    return [part.detach().clone().requires_grad_(part.is_floating_point()) for part in rows]


LOOKUPS: dict[str, tuple[tuple[str, ...], str, bool]] = {
    "sum": (("sum", "sum"), "fp32", False),
    "mean and sum": (("mean", "sum"), "fp32", False),
    "max": (("max", "sum"), "fp32", False),
    "weighted": (("sum", "sum"), "fp32", True),
    "half": (("sum",), "fp16", False),
    "bfloat": (("sum", "mean"), "bf16", False),
    "int8": (("sum", "mean"), "int8", False),
    "int4": (("sum",), "int4", False),
    "int2": (("max",), "int2", False),
}


@pytest.mark.parametrize(("poolings", "data_type", "weighted"), LOOKUPS.values(), ids=LOOKUPS)
@pytest.mark.parametrize("own", [True, False], ids=["own memory", "other memory"])
def test_lookup_is_a_well_made_operator(own: bool, poolings: tuple[str, ...], data_type: str, weighted: bool) -> None:
    tables = tables_of(*poolings, data_type=data_type)
    rows = tables.parts() if own else trained(tables.parts())
    with_argmax = "max" in poolings and data_type == "fp32"
    arguments = (rows, tables.key, tables.layout, *bags_of(tables, weighted), with_argmax, [False] * len(poolings))
    torch.library.opcheck(torch.ops.dlrm_rs.lookup, arguments)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("poolings", [("sum", "mean"), ("max", "sum")])
def test_fused_lookup_is_a_well_made_operator(poolings: tuple[str, ...], optimizer: Any) -> None:
    tables = tables_of(*poolings, optimizer=optimizer)
    rows, states = [part for parts in tables.memory.parts for part in parts], tables.memory.states
    flags = ([True, False], "max" in poolings, [False, True])
    before = [part.clone() for part in rows]
    for kept in (lambda tensors: tensors, lambda tensors: [tensor.clone() for tensor in tensors]):
        arguments = (tables.weights()[0], kept(rows), kept(states), tables.key, tables.layout, *bags_of(tables), *flags)
        torch.library.opcheck(torch.ops.dlrm_rs.fused_lookup, arguments)
    assert all(map(torch.equal, rows, before))


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_update_is_a_well_made_operator(optimizer: Any) -> None:
    tables = tables_of("sum", "sum", optimizer=optimizer)
    indices, offsets, batch_size, _ = bags_of(tables)
    tensors = (
        [part.clone() for parts in tables.memory.parts for part in parts],
        [s.clone() for s in tables.memory.states],
    )
    grad = torch.randn(batch_size, tables.width)
    bags = (indices, offsets, batch_size, None, None, grad, [True, False], [True, False])
    torch.library.opcheck(torch.ops.dlrm_rs.update, (*tensors, tables.key, tables.layout, *bags))


def test_gradients_are_well_made_operators() -> None:
    tables = tables_of("sum", "sum")
    indices, offsets, batch_size, _ = bags_of(tables)
    about, bags = (tables.key, tables.layout), (indices, offsets, batch_size)
    grad = torch.randn(batch_size, tables.width)
    for trainable in ([True, True], [False, True], [False, False]):
        flags = (trainable, [False, True])
        torch.library.opcheck(torch.ops.dlrm_rs.dense_gradient, (*about, *bags, None, None, grad, *flags))
    rows = [part.detach() for part in tables.parts()]
    torch.library.opcheck(torch.ops.dlrm_rs.per_sample_weights_gradient, (rows, *about, *bags, grad))


@pytest.mark.parametrize("optimizer", [None, OPTIMIZERS["sgd"]])
def test_modules_take_the_direct_way_where_nothing_is_traced(optimizer: Any) -> None:
    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operators.add(func.namespace)
            return func(*args, **(kwargs or {}))

    bag = dlrm_rs.EmbeddingBag(9, 3, mode="sum", max_norm=1.0, optimizer=optimizer)
    operators: set[str] = set()
    with Recorded():  # type: ignore[no-untyped-call]
        bag(torch.tensor([[1, 2]])).sum().backward()
        assert operators == {"aten"}
        traced.lookup(bag._tables, torch.tensor([1, 2]), None, 1, None, False, [False])
        assert operators == {"aten", "dlrm_rs"}


def test_renorm_is_a_well_made_operator() -> None:
    tables = tables_of("sum", "sum")
    rows = [part.detach().clone() for part in tables.parts()]
    arguments = (rows, tables.key, tables.layout, *bags_of(tables), 0.1, 2.0)
    torch.library.opcheck(torch.ops.dlrm_rs.renorm_, arguments)


@pytest.mark.parametrize("poolings", [("sum", "mean"), ("mean", "max")])
@pytest.mark.parametrize("weighted", [False, True])
# gradcheck asks for double inputs, since most functions are too crooked for large steps. A lookup is linear in its rows
# and in its weights (and where a maximum stays where it is): with numbers and steps that are sums of few powers of two
# the differences have no rounding but that of the mean.
@pytest.mark.filterwarnings("ignore:Input #:UserWarning")
def test_gradients_are_numeric_ones(poolings: tuple[str, ...], weighted: bool) -> None:
    if weighted:
        poolings = ("sum", "sum")
    tables = tables_of(*poolings)
    indices, offsets, batch_size, _ = bags_of(tables)
    # Rows that differ by more than a step, so that no maximum moves.
    rows = [torch.randperm(part.numel()).view_as(part) / 2.0 for part in tables.parts()]
    leaves = [part.requires_grad_() for part in rows]
    if weighted:
        leaves.append((torch.randint(1, 9, indices.shape) / 4).requires_grad_())

    def lookup(*leaves: Tensor) -> Tensor:
        weights = leaves[2] if weighted else None
        given = (tables.key, tables.layout, indices, offsets, batch_size, weights, "max" in poolings, [False, False])
        out: Tensor = torch.ops.dlrm_rs.lookup(list(leaves[:2]), *given)[0]
        return out

    assert gradcheck(lookup, tuple(leaves), eps=2**-4, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.filterwarnings("ignore:Input #:UserWarning")
def test_gradients_of_a_module_are_numeric_ones(mode: str) -> None:
    module = dlrm_rs.EmbeddingBag(9, 5, mode=mode, _weight=torch.randperm(45).view(9, 5) / 2.0)
    indices, offsets, _ = batch(9, 6)
    assert gradcheck(lambda _: module(indices, offsets[:-1]), module.weight, eps=2**-4, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("weighted", [False, True])
def test_operators_and_modules_give_the_gradients_of_float64(mode: str, weighted: bool) -> None:
    if weighted and mode != "sum":
        pytest.skip("weights of ids are for sums")
    indices, offsets, weights = batch(9, 12)
    reference = nn.EmbeddingBag(9, 33, mode=mode, dtype=torch.float64)
    ours = dlrm_rs.EmbeddingBag(9, 33, mode=mode, _weight=reference.weight.detach().float())
    with torch.no_grad():
        reference.weight.copy_(ours.weight)
    tables, grad = ours._tables, torch.randn(12, 33)

    def registered(weights: Tensor | None) -> Tensor:
        bags = (indices, offsets[:-1], 12, weights)
        out: Tensor = torch.ops.dlrm_rs.lookup(
            tables.parts(), tables.key, tables.layout, *bags, mode == "max", [False]
        )[0]
        return out

    def gradients(lookup: Callable[[Any], Tensor], weight: Any, dtype: torch.dtype) -> list[Tensor]:
        leaf = weights.to(dtype).requires_grad_() if weighted else None
        inputs = [weight, *([] if leaf is None else [leaf])]
        return list(torch.autograd.grad(lookup(leaf), inputs, grad.to(dtype)))

    expected = gradients(lambda leaf: reference(indices, offsets[:-1], leaf), reference.weight, torch.float64)
    direct = gradients(lambda leaf: ours(indices, offsets[:-1], leaf), ours.weight, torch.float32)
    through = gradients(registered, ours.weight, torch.float32)
    assert all(map(torch.equal, direct, through))
    for got, wanted in zip(direct, expected, strict=True):
        assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_weight_that_was_replaced_is_adopted() -> None:
    ours = dlrm_rs.EmbeddingBag(4, 2, mode="sum")
    rows = torch.arange(8.0).view(4, 2)
    ours.weight.data = rows
    tables = ours._tables
    bags = (torch.tensor([1, 3]), torch.tensor([0]), 1, None)
    out, _ = torch.ops.dlrm_rs.lookup(tables.parts(), tables.key, tables.layout, *bags, False, [False])
    assert out.tolist() == [[8, 10]]
    assert ours.weight.data_ptr() == tables.memory.parts[0][0].data_ptr()


def test_rows_of_other_memory_are_used_where_they_are() -> None:
    ours = dlrm_rs.EmbeddingBag(4, 2, mode="sum")
    tables = ours._tables
    rows = torch.arange(8.0).view(4, 2)
    bags = (torch.tensor([1, 3]), torch.tensor([0]), 1, None)

    def lookup(rows: Tensor) -> list[list[float]]:
        out, _ = torch.ops.dlrm_rs.lookup([rows], tables.key, tables.layout, *bags, False, [False])
        return list(out.tolist())

    assert lookup(rows) == [[8, 10]]
    rows[3, 0] = 100.0
    assert lookup(rows) == [[102, 10]]  # not a copy
    rows.data = torch.ones(4, 2)
    assert lookup(rows) == [[2, 2]]
    with pytest.raises(ValueError, match=r"rows of table 'embedding_bag': expected 4, got shapes \[\(3, 2\)\]"):
        lookup(torch.ones(3, 2))
    with pytest.raises(ValueError, match="C-contiguous"):
        lookup(torch.ones(2, 4).t())
    with pytest.raises(ValueError, match="rows of table 'embedding_bag': expected 32 bytes, got 48"):
        lookup(torch.ones(4, 3))


def test_a_gradient_of_tables_that_are_gone_is_refused() -> None:
    ours = dlrm_rs.EmbeddingBag(4, 2, mode="sum")
    rows, key, layout = ours.weight.detach().clone().requires_grad_(), ours._tables.key, ours._tables.layout
    bags = (torch.tensor([1, 3]), torch.tensor([0]), 1, None)
    del ours
    out, _ = torch.ops.dlrm_rs.lookup([rows], key, layout, *bags, False, [False])
    assert torch.equal(out[0], (rows[1] + rows[3]).detach())
    with pytest.raises(RuntimeError, match=r"key: expected the module .* a saved program looks up, and is not trained"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("keep_optimizer", "words"),
    [
        (False, "it was given up since: the tables have been quantized"),
        (True, "expected tables whose rows are stored as in the forward, and they have been quantized"),
    ],
)
def test_an_update_of_tables_that_were_quantized_is_refused(keep_optimizer: bool, words: str) -> None:
    ours = dlrm_rs.EmbeddingBag(4, 2, mode="sum", optimizer=dlrm_rs.optim.SGD(lr=0.1))
    tables = ours._tables
    bags = (torch.tensor([1, 3]), torch.tensor([0]), 1, None)
    rows = [part for parts in tables.memory.parts for part in parts]
    about = (tables.key, tables.layout)
    out, _ = torch.ops.dlrm_rs.fused_lookup(ours.weight, rows, [], *about, *bags, [True], False, [False])
    dlrm_rs.quantize(ours, "int8", keep_optimizer=keep_optimizer)
    before = tables.memory.parts[0][0].clone()
    with pytest.raises(RuntimeError, match=words):
        out.sum().backward()
    assert torch.equal(tables.memory.parts[0][0], before)


def test_a_bad_id_is_named_as_by_the_module() -> None:
    tables = dlrm_rs.EmbeddingBag(4, 2, mode="sum")._tables
    bags = (torch.tensor([1, 4]), torch.tensor([0]), 1, None)
    with pytest.raises(IndexError, match=r"indices\[1\]: .* rows of table 'embedding_bag', got 4"):
        torch.ops.dlrm_rs.lookup(tables.parts(), tables.key, tables.layout, *bags, False, [False])
