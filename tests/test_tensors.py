"""Tensors that the binding takes as they are: the bits of arrays, refusals in words, weights found at home or not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dlrm_rs
from dlrm_rs import memory
from dlrm_rs._dlrm_rs import Homes, TableSet, take_tensors
from dlrm_rs.memory import Memory
from dlrm_rs.operators import calls
from dlrm_rs.row_formats import TAKES_TENSORS, as_array

taken = pytest.mark.skipif(not TAKES_TENSORS, reason="this torch does not tell where its tensors are")

# Two features of three bags, and their arguments by name.
BAGS = 6
NAMES = ("indices", "offsets", "per_sample_weights", "out", "argmax")


def handle(pooling: str = "sum") -> TableSet:
    """Two tables of 10 rows, 4 and 3 wide."""
    made = TableSet([("a", 10, 4, "fp32"), ("b", 10, 3, "fp32")], [(0, pooling, None), (1, pooling, None)])
    for table in range(2):
        rows = torch.from_numpy(made.weight(table))
        rows.copy_(torch.arange(rows.numel()).view(rows.shape) * 0.37 - 5)
    return made


def arguments(ids: torch.dtype = torch.int64, out: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    """What a lookup is called with: weights of ids, and no argmax."""
    return {
        "indices": torch.tensor([1, 9, 0, 3, 3, 7, 2], dtype=ids),
        "offsets": torch.tensor([0, 2, 2, 3, 5, 6, 7], dtype=ids),
        "per_sample_weights": torch.linspace(-1, 2, 7),
        "out": torch.full((3, 7), 77, dtype=out),
        "argmax": None,
    }


def lookup(table_set: TableSet, given: dict[str, Any]) -> None:
    """The call."""
    table_set.lookup(given["indices"], given["offsets"], 3, given["per_sample_weights"], given["out"], given["argmax"])


def arrays(given: dict[str, Tensor | None]) -> dict[str, Any]:
    """The same memory as arrays."""
    return {name: None if tensor is None else as_array(tensor) for name, tensor in given.items()}


def bits(tensor: Tensor | None) -> bytes:
    """Of all elements."""
    assert tensor is not None
    return as_array(tensor).tobytes()


@taken
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_a_tensor_in_the_place_of_an_array(name: str, ids: torch.dtype) -> None:
    pooling = "max" if name == "argmax" else "sum"
    expected, got = arguments(ids), arguments(ids)
    for given in (expected, got):
        if pooling == "max":
            given.update(per_sample_weights=None, argmax=torch.full((3, 7), 9, dtype=torch.int32))
    table_set = handle(pooling)
    lookup(table_set, arrays(expected))
    lookup(table_set, {**arrays(got), name: got[name]})
    assert bits(got["out"]) == bits(expected["out"])
    assert 77 not in got["out"].flatten()  # type: ignore[union-attr]
    if pooling == "max":
        assert bits(got["argmax"]) == bits(expected["argmax"])


@taken
@pytest.mark.parametrize("out", [torch.float32, torch.float16, torch.bfloat16])
def test_outputs_of_every_dtype(out: torch.dtype) -> None:
    expected, got = arguments(out=out), arguments(out=out)
    lookup(handle(), arrays(expected))
    lookup(handle(), got)
    assert bits(got["out"]) == bits(expected["out"])


@taken
def test_no_ids_at_all() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    out = torch.full((3, 7), 77.0)
    handle().lookup(empty, torch.zeros(BAGS, dtype=torch.int64), 3, torch.empty(0), out, None)
    assert not out.any()
    handle().lookup(empty, torch.zeros(0, dtype=torch.int64), 0, None, torch.empty(0, 7), None)


@taken
def test_a_stride_between_single_elements_is_none() -> None:
    table_set, out = handle(), torch.empty(1, 7)
    ids = torch.tensor([[1, 5], [2, 5]])[:, :1]  # (2, 1), in steps of 2
    with pytest.raises(ValueError, match="indices: expected a C-contiguous array"):
        table_set.lookup(ids, None, 1, None, out, None)
    one = torch.tensor([4, 0, 0])[::2][:1]  # (1,), in steps of 2
    table_set.lookup(torch.tensor([1, 4]), torch.tensor([0, 1]), 1, None, out, None)
    only = TableSet([("a", 10, 4, "fp32")], [(0, "sum", None)])
    only.lookup(one, None, 1, None, torch.empty(1, 4), None)


class Wrapper(Tensor):
    """A tensor that has its elements in another, as results of torch's collectives do."""

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        return NotImplemented


def _wrapped(tensor: Tensor) -> Tensor:
    options: dict[str, Any] = {"strides": tensor.stride(), "storage_offset": 1, "dtype": tensor.dtype}
    return Tensor._make_wrapper_subclass(Wrapper, tensor.shape, **options)


def _fake_part(tensor: Tensor) -> Tensor:
    fake: Tensor = FakeTensorMode().from_tensor(torch.cat([tensor, tensor]))
    return fake[tensor.numel() :]


def _part_of_no_memory(tensor: Tensor) -> Tensor:
    return torch._efficientzerotensor(2 * tensor.numel())[tensor.numel() :]


def _unaligned(tensor: Tensor) -> Tensor:
    raw = np.zeros(tensor.numel() * tensor.element_size() + 1, np.uint8)
    return torch.frombuffer(raw, dtype=tensor.dtype, offset=1)


REFUSED: dict[str, tuple[str, Callable[[Tensor], Any], type[Exception], str]] = {
    "ids of a dtype": ("indices", Tensor.short, TypeError, "an array of int32 or int64, got a tensor of torch.int16"),
    "float ids": ("indices", Tensor.float, TypeError, "an array of int32 or int64, got a tensor of torch.float32"),
    "offsets of a dtype": ("offsets", Tensor.double, TypeError, "of int32 or int64, got a tensor of torch.float64"),
    "weights of a dtype": (
        "per_sample_weights",
        Tensor.double,
        TypeError,
        "an array of f32, got a tensor of torch.float64",
    ),
    "out of a dtype": ("out", Tensor.double, TypeError, "of float32, float16 or int16 .*got a tensor of torch.float64"),
    "argmax of a dtype": ("argmax", Tensor.long, TypeError, "an array of i32, got a tensor of torch.int64"),
    "complex weights": ("per_sample_weights", lambda t: t.to(torch.complex64), TypeError, "got a tensor of torch.comp"),
    "ids in steps": ("indices", lambda t: t.repeat_interleave(2)[::2], ValueError, r"C-contiguous.*strides \(2,\)"),
    "ids of one place": ("indices", lambda t: t[:1].expand(7), ValueError, r"C-contiguous.*strides \(0,\)"),
    "out of columns": ("out", lambda t: t.t().contiguous().t(), ValueError, r"C-contiguous.*strides \(1, 3\), aligned"),
    "unaligned": ("per_sample_weights", _unaligned, ValueError, r"C-contiguous.*strides \(1,\), unaligned"),
    "ids on meta": ("indices", lambda t: t.to("meta"), ValueError, "tensor on the CPU.*got device meta"),
    "out on meta": ("out", lambda t: t.to("meta"), ValueError, "tensor on the CPU.*got device meta"),
    "sparse": ("indices", Tensor.to_sparse, ValueError, "dense tensor.*got device cpu, layout torch.sparse_coo"),
    "fake": ("indices", lambda t: FakeTensorMode().from_tensor(t), ValueError, "with memory of its own.*got device"),
    "part of a fake": ("indices", _fake_part, ValueError, "with memory of its own.*got device"),
    "wrapper": ("indices", _wrapped, ValueError, "with memory of its own.*got device"),
    "class of other operators": (
        "indices",
        lambda t: Tensor._make_subclass(Wrapper, t),
        ValueError,
        "with memory of its own.*got device",
    ),
    "part of known zeros": ("per_sample_weights", _part_of_no_memory, ValueError, "with memory of its own"),
    "no tensor": ("indices", Tensor.tolist, TypeError, "an array of int32 or int64, got <class 'list'>"),
}


@taken
@pytest.mark.parametrize(("name", "made", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_in_words(name: str, made: Callable[[Tensor], Any], error: type[Exception], words: str) -> None:
    given: dict[str, Any] = arguments()
    given["argmax"] = torch.zeros(3, 7, dtype=torch.int32)
    given[name] = made(given[name])
    with pytest.raises(error, match=f"^{name}: expected .*{words}"):
        lookup(handle(), given)
    assert given["out"].is_meta or bool((given["out"] == 77).all())


@taken
def test_the_negative_bit_is_refused() -> None:
    negated = torch.tensor([1 + 2j]).conj().imag  # (1,), of which memory has 2
    assert negated.is_neg()
    assert negated.is_contiguous()
    only = TableSet([("a", 10, 4, "fp32")], [(0, "sum", None)])
    with pytest.raises(ValueError, match=r"per_sample_weights: .*negative bit; use per_sample_weights.resolve_neg\(\)"):
        only.lookup(torch.tensor([1]), None, 1, negated, torch.empty(1, 4), None)
    only.lookup(torch.tensor([1]), None, 1, negated.resolve_neg(), torch.empty(1, 4), None)


class Tagged(Tensor):
    """A tensor of a class of its own."""


def collection() -> dlrm_rs.EmbeddingBagCollection:
    """Two weighted tables, seeded."""
    torch.manual_seed(3)
    tables = [dlrm_rs.EmbeddingBagConfig("a", 10, 4, ["f"]), dlrm_rs.EmbeddingBagConfig("b", 10, 3, ["g"])]
    return dlrm_rs.EmbeddingBagCollection(tables, is_weighted=True)


def output(module: dlrm_rs.EmbeddingBagCollection) -> Tensor:
    """Of the arguments above."""
    given = arguments()
    assert given["indices"] is not None
    assert given["offsets"] is not None
    return module.lookup(given["indices"], given["offsets"], given["per_sample_weights"])


def test_weights_of_ids_that_want_a_gradient_and_tensors_of_other_classes() -> None:
    module, given = collection(), arguments()
    expected = output(module)
    indices, offsets, weights = given["indices"], given["offsets"], given["per_sample_weights"]
    assert indices is not None
    assert offsets is not None
    assert weights is not None
    for wanted in (weights.clone().requires_grad_(), nn.Parameter(weights)):
        out = module.lookup(indices, offsets, wanted)
        assert torch.equal(out, expected)
        out.sum().backward()
        assert wanted.grad is not None
    tagged = [tensor.as_subclass(Tagged) for tensor in (indices, offsets, weights)]
    assert torch.equal(module.lookup(*tagged), expected)


def test_a_torch_that_does_not_tell_gives_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = output(collection())

    class Unknown:
        def __init__(self, *_: Any) -> None:
            pass

        def have(self, _: Any) -> bool:
            return False

    monkeypatch.setattr(calls, "TAKES_TENSORS", False)
    monkeypatch.setattr(memory, "Homes", Unknown)
    seen: list[type] = []
    real = as_array

    def watched(tensor: Tensor) -> Any:
        seen.append(type(tensor))
        return real(tensor)

    module = collection()
    monkeypatch.setattr(calls, "as_array", watched)
    assert torch.equal(output(module), expected)
    assert len(seen) == 4
    rows = torch.ones(10, 4)
    weight = next(module.parameters())
    weight.data = rows
    assert module.lookup(torch.tensor([0, 0]), torch.tensor([0, 1, 2]), torch.ones(2))[0, :4].tolist() == [1] * 4
    assert weight.data_ptr() != rows.data_ptr()


def test_no_tensors_of_a_type_that_does_not_tell() -> None:
    assert take_tensors(int) is TAKES_TENSORS  # a type that tells is kept


@taken
def test_homes_know_every_other_place_shape_and_order() -> None:
    rows = torch.arange(12.0)
    weight = rows[:6].view(2, 3)
    homes = Homes([weight.data_ptr(), 0], [6, 0], [weight.stride(), (1,)])
    none = torch.empty(0)

    def at_home(weight: Any, other: Any = none) -> bool:
        return homes.have([{"weight": weight}, {"weight": other}])

    assert at_home(weight)
    assert at_home(nn.Parameter(weight))
    assert at_home(weight.view(2, 3))
    assert not at_home(rows[6:].view(2, 3))
    assert not at_home(rows.view(4, 3))
    assert not at_home(weight.t())
    assert not at_home(weight.view(3, 2))
    assert not at_home(weight, torch.empty(1))
    assert not at_home(None)
    assert not at_home(weight.numpy())
    assert not at_home(weight.to("meta"))
    assert not homes.have([{}, {}])


@taken
def test_homes_follow_the_tables() -> None:
    module = dlrm_rs.EmbeddingBag(4, 2, mode="sum")

    def at_home() -> bool:
        tables = module._tables
        home: Memory = tables.memory
        return home.homes.have(tables._slots)

    assert at_home()
    module.weight.data = torch.ones(4, 2)
    assert not at_home()
    assert module(torch.tensor([[1]])).tolist() == [[1, 1]]
    assert at_home()
    dlrm_rs.quantize(module, "bf16")
    assert at_home()
    module.weight = nn.Parameter(torch.ones(4, 2, dtype=torch.bfloat16))
    assert not at_home()
