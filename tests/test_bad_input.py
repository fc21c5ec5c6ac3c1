"""Input that cannot be: the right exception, words that name what and where, nothing changed, the next call right."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import dlrm_rs
from dlrm_rs import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, _dlrm_rs

ROWS = 10

SPECS = [None, dlrm_rs.optim.SGD(lr=0.1), dlrm_rs.optim.Adagrad(lr=0.1), dlrm_rs.optim.RowWiseAdagrad(lr=0.1)]

each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.algorithm if spec else "torch")


def ids(*numbers: int) -> Tensor:
    """Int64."""
    return torch.tensor(numbers, dtype=torch.int64)


def collection(spec: Any = None, *, is_weighted: bool = False) -> EmbeddingBagCollection:
    """Two tables, the second with two features, trained by one step so that there is state."""
    tables = [EmbeddingBagConfig("users", ROWS, 4, ["u"]), EmbeddingBagConfig("goods", 3, 5, ["i", "j"])]
    module = EmbeddingBagCollection(tables, is_weighted, optimizer=spec)
    check_right(module)
    return module


def check_right(module: EmbeddingBagCollection) -> None:
    """A call that is right gives what it should, and trains."""
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0]) if module.is_weighted() else None
    users, goods = (weight.detach().clone() for weight in module.parameters())
    out = module.lookup(ids(9, 1, 2, 0), ids(0, 2, 3, 4), weights)
    one, two, three, four = [1, 2, 3, 4] if module.is_weighted() else [1, 1, 1, 1]
    expected = torch.cat([users[9] * one + users[1] * two, goods[2] * three, goods[0] * four])
    torch.testing.assert_close(out[0], expected)
    out.sum().backward()


def content(module: nn.Module) -> list[bytes]:
    """Weights, gradients and optimizer state, byte for byte."""

    def tensors() -> Iterator[Tensor | None]:
        for weight in module.parameters():
            yield weight.detach()
            yield weight.grad
        optimizer = module.fused_optimizer
        if isinstance(optimizer, dlrm_rs.optim.FusedOptimizer):
            for state in optimizer.state_dict()["state"].values():
                yield from state.values()

    return [b"" if tensor is None else tensor.numpy().tobytes() for tensor in tensors()]


# What a collection with features u (10 rows), i and j (3 rows) is asked for, in lookup(ids, offsets); B is 1 or 2.
BAD_LOOKUPS: dict[str, tuple[tuple[Any, ...], type[Exception], list[str]]] = {
    "id -1": ((ids(9, -1, 2), ids(0, 2, 2, 3)), IndexError, ["indices[1]", "users", "10", "got -1", "bag 0"]),
    "id N": ((ids(9, 1, 3), ids(0, 2, 2, 3)), IndexError, ["indices[2]", "goods", "id < 3", "got 3", "bag 0"]),
    "id 2^40": (
        (ids(9, 2**40), ids(0, 1, 1, 1, 1, 1, 2)),
        IndexError,
        ["indices[1]", "goods", f"got {2**40}", "bag 1"],
    ),
    "id int32": ((ids(9, 11).int(), ids(0, 2, 2, 2)), IndexError, ["indices[1]", "users", "got 11"]),
    "offsets fall": ((ids(1, 1, 1), ids(0, 2, 1, 3)), ValueError, ["offsets", "2", "1"]),
    "offsets start above 0": ((ids(1, 1, 1), ids(1, 2, 2, 3)), ValueError, ["offsets", "0", "got 1"]),
    "offsets below 0": ((ids(1, 1, 1), ids(-1, 2, 2, 3)), ValueError, ["offsets", "-1"]),
    "offsets end beyond": ((ids(1, 1, 1), ids(0, 2, 2, 4)), ValueError, ["offsets", "3", "4"]),
    "offsets int32 end beyond": ((ids(1, 1, 1), ids(0, 2, 2, 4).int()), ValueError, ["offsets", "3", "4"]),
    "offsets 2^62": ((ids(1, 1, 1), ids(0, 2, 2**62, 2**62)), ValueError, ["offsets", str(2**62)]),
    "too few tables": ((ids(1, 1), ids(0, 1, 2)), ValueError, ["offsets: expected F * B + 1", "F = 3", "got 3"]),
    "too many tables": ((ids(1, 1), ids(0, 1, 2, 2, 2)), ValueError, ["offsets: expected F * B + 1", "F = 3", "got 5"]),
    "no offsets": ((ids(1, 1), ids()), ValueError, ["offsets: expected F * B + 1", "got 0"]),
    "2-D ids": ((ids(1, 1).view(1, 2), ids(0, 1, 2, 2)), ValueError, ["one dimension each", "(1, 2)", "(4,)"]),
    "float ids": ((torch.ones(2), ids(0, 1, 2, 2)), TypeError, ["indices", "int64", "got torch.float32"]),
    "float offsets": ((ids(1, 1), torch.ones(4)), TypeError, ["offsets", "int64", "got torch.float32"]),
    "int16 ids": ((ids(1, 1).short(), ids(0, 1, 2, 2)), TypeError, ["indices", "got torch.int16"]),
    "list of ids": (([1, 1], ids(0, 1, 2, 2)), TypeError, ["indices: expected a torch.Tensor, got list"]),
    "ids on another device": ((ids(1).to("meta"), ids(0, 1, 1, 1)), ValueError, ["indices", "CPU", "meta", ".cpu()"]),
    "offsets on another device": ((ids(1), ids(0, 1, 1, 1).to("meta")), ValueError, ["offsets", "CPU", "meta"]),
    "sparse ids": ((ids(1).to_sparse(), ids(0, 1, 1, 1)), ValueError, ["indices", "strided", "torch.sparse_coo"]),
    "weights not wanted": (
        (ids(1), ids(0, 1, 1, 1), torch.ones(1)),
        ValueError,
        ["expected None", "is_weighted=False"],
    ),
}


@pytest.mark.parametrize(("arguments", "error", "words"), BAD_LOOKUPS.values(), ids=BAD_LOOKUPS)
@pytest.mark.parametrize("training", [True, False])
@each_spec
def test_bad_lookups(
    spec: Any, training: bool, arguments: tuple[Any, ...], error: type[Exception], words: list[str]
) -> None:
    module = collection(spec)
    before = content(module)
    with torch.set_grad_enabled(training), pytest.raises(error) as raised:
        module.lookup(*arguments)
    assert type(raised.value) is error
    for word in words:
        assert word in str(raised.value)
    assert content(module) == before
    check_right(module)


BAD_WEIGHTS: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "NaN": (torch.tensor([1.0, float("nan")]), ValueError, ["per_sample_weights[1]", "NaN"]),
    "too few": (torch.ones(1), ValueError, ["per_sample_weights: expected shape (2,)", "got (1,)"]),
    "float64": (torch.ones(2).double(), TypeError, ["per_sample_weights", "torch.float32, got torch.float64"]),
    "integers": (ids(1, 1), TypeError, ["per_sample_weights", "torch.float32, got torch.int64"]),
    "on another device": (torch.ones(2, device="meta"), ValueError, ["per_sample_weights", "CPU", "meta"]),
    "none": (None, ValueError, ["per_sample_weights: expected one per id", "is_weighted=True", "got none"]),
}


@pytest.mark.parametrize(("weights", "error", "words"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
@each_spec
def test_bad_weights_of_ids(spec: Any, weights: Any, error: type[Exception], words: list[str]) -> None:
    module = collection(spec, is_weighted=True)
    before = content(module)
    with pytest.raises(error) as raised:
        module.lookup(ids(1, 2), ids(0, 1, 2, 2), weights)
    for word in words:
        assert word in str(raised.value)
    assert content(module) == before
    check_right(module)


# Memory that changes behind torch's back between forward and backward, where its version counters cannot see it.
BEHIND: dict[str, tuple[str, int, int, type[Exception], str]] = {
    "id": ("indices", 3, 2**40, IndexError, f"indices.3.: .*goods.* got {2**40}"),
    "negative id": ("indices", 0, -1, IndexError, "indices.0.: .*users.* got -1"),
    "offsets end beyond": ("offsets", 3, 5, ValueError, "offsets"),
    "offsets fall": ("offsets", 2, 9, ValueError, "offsets"),
    "NaN": ("weights", 2, 0, ValueError, "per_sample_weights.2.: .*NaN"),
}


@pytest.mark.parametrize(("what", "place", "value", "error", "words"), BEHIND.values(), ids=BEHIND)
@each_spec
def test_bad_input_in_backward(
    spec: Any, what: str, place: int, value: int, error: type[Exception], words: str
) -> None:
    module = collection(spec, is_weighted=True)
    tensors = {"indices": ids(9, 1, 2, 0), "offsets": ids(0, 2, 3, 4), "weights": torch.ones(4)}
    out = module.lookup(*tensors.values())
    before = content(module)
    tensors[what].numpy()[place] = float("nan") if what == "weights" else value
    with pytest.raises(error, match=words):
        out.sum().backward()
    assert content(module) == before
    check_right(module)


def test_a_gradient_of_another_shape_is_torchs_to_refuse() -> None:
    module = collection(SPECS[1])
    before = content(module)
    out = module.lookup(ids(1), ids(0, 1, 1, 1))
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        out.backward(torch.ones(1, 3))
    assert content(module) == before


FEATURES = KeyedJaggedTensor.from_lengths_sync(["u", "i"], ids(1, 2), ids(1, 1))

BAD_FEATURES: dict[str, tuple[Any, type[Exception], str]] = {
    "missing": (FEATURES, ValueError, r"features: expected the keys \['u', 'i', 'j'\].* which lack \['j'\]"),
    "a tensor": (ids(1, 2), TypeError, "features: expected a KeyedJaggedTensor, got Tensor"),
    "weighted": (
        KeyedJaggedTensor.from_lengths_sync(["u", "i", "j"], ids(1, 2, 2), ids(1, 1, 1), torch.ones(3)),
        ValueError,
        "per_sample_weights: expected None, as this collection has is_weighted=False, got some",
    ),
    "float ids": (
        KeyedJaggedTensor.from_lengths_sync(["u", "i", "j"], torch.ones(3), ids(1, 1, 1)),
        TypeError,
        r"features.values\(\): expected dtype torch.int64 or torch.int32, got torch.float32",
    ),
    "bad id": (
        KeyedJaggedTensor.from_lengths_sync(["u", "i", "j"], ids(1, 2, 7), ids(1, 1, 1)),
        IndexError,
        "got 7",
    ),
}


@pytest.mark.parametrize(("features", "error", "words"), BAD_FEATURES.values(), ids=BAD_FEATURES)
def test_bad_features(features: Any, error: type[Exception], words: str) -> None:
    module = collection(SPECS[2])
    before = content(module)
    with pytest.raises(error, match=words):
        module(features)
    assert content(module) == before
    check_right(module)


BAD_TABLES: dict[str, tuple[list[EmbeddingBagConfig], dict[str, Any], type[Exception], str]] = {
    "none": ([], {}, ValueError, "tables: expected at least one, got none"),
    "same name": (
        [EmbeddingBagConfig("a", 2, 2, ["x"]), EmbeddingBagConfig("a", 2, 2, ["y"])],
        {},
        ValueError,
        "tables: expected names that differ, got 'a' 2 times",
    ),
    "dotted name": ([EmbeddingBagConfig("a.b", 2, 2, ["x"])], {}, ValueError, "names without '.'.* got 'a.b'"),
    "name of an attribute": ([EmbeddingBagConfig("keys", 2, 2, ["x"])], {}, ValueError, "attribute.* got 'keys'"),
    "no feature": ([EmbeddingBagConfig("a", 2, 2, [])], {}, ValueError, "feature_names of table 'a'.* got \\[\\]"),
    "same feature": ([EmbeddingBagConfig("a", 2, 2, ["x", "x"])], {}, ValueError, "feature_names of table 'a'"),
    "a string": ([EmbeddingBagConfig("a", 2, 2, cast(Any, "xy"))], {}, ValueError, "feature_names of table 'a'.* 'xy'"),
    "maxima by frequency": (
        [EmbeddingBagConfig("a", 2, 2, ["x"], "max", scale_grad_by_freq=True)],
        {},
        ValueError,
        "pooling of table 'a': expected 'sum' or 'mean' with scale_grad_by_freq, got 'max'",
    ),
    "pooling": ([EmbeddingBagConfig("a", 2, 2, ["x"], "avg")], {}, ValueError, "pooling of table 'a'.* got 'avg'"),
    "data_type": ([EmbeddingBagConfig("a", 2, 2, ["x"], "sum", "int3")], {}, TypeError, "data_type of table 'a'.*int3"),
    "device": ([EmbeddingBagConfig("a", 2, 2, ["x"])], {"device": "meta"}, ValueError, "device: .* got 'meta'"),
    "output": (
        [EmbeddingBagConfig("a", 2, 2, ["x"])],
        {"output_dtype": torch.float64},
        TypeError,
        "output_dtype: expected one of .*, got torch.float64",
    ),
    "negative rows": ([EmbeddingBagConfig("a", -1, 2, ["x"])], {}, ValueError, "num_embeddings of table 'a'.* -1"),
    "2^45 rows": ([EmbeddingBagConfig("huge", 2**45, 64, ["x"])], {}, MemoryError, "huge"),
}


@pytest.mark.parametrize(("tables", "kwargs", "error", "words"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_tables(
    tables: list[EmbeddingBagConfig], kwargs: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        EmbeddingBagCollection(tables, **kwargs)


NAN = torch.zeros(4, 2)
NAN[2, 1] = float("nan")

BAD_MODULES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "NaN weight": (
        lambda: dlrm_rs.EmbeddingBag(4, 2, _weight=NAN),
        ValueError,
        "_weight: expected numbers, got NaN at row 2, column 1",
    ),
    "NaN rows": (lambda: dlrm_rs.Embedding.from_pretrained(NAN), ValueError, "_weight: .* row 2, column 1"),
    "shape": (lambda: dlrm_rs.EmbeddingBag(3, 2, _weight=NAN), ValueError, r"_weight: .* \(3, 2\).* got \(4, 2\)"),
    "float64": (lambda: dlrm_rs.Embedding(4, 2, _weight=NAN.double()), TypeError, "_weight: .* got torch.float64"),
    "array": (lambda: dlrm_rs.Embedding(4, 2, _weight=cast(Any, NAN.numpy())), TypeError, "_weight: .* got ndarray"),
    "1-D": (lambda: dlrm_rs.Embedding.from_pretrained(NAN[0]), ValueError, r"embeddings: .* got shape \(2,\)"),
    "1-D bags": (lambda: dlrm_rs.EmbeddingBag.from_pretrained(NAN[0]), ValueError, r"embeddings: .* got shape \(2,\)"),
    "2^45 rows": (lambda: dlrm_rs.EmbeddingBag(2**45, 16), MemoryError, "embedding_bag"),
    "2^45 rows and a dim": (lambda: dlrm_rs.Embedding(2**45, 2**30), MemoryError, "embedding"),
    "2^62 rows": (lambda: dlrm_rs.Embedding(2**62, 2**20), MemoryError, "embedding"),
    "negative rows": (lambda: dlrm_rs.Embedding(-1, 4), ValueError, "num_embeddings of table 'embedding'.* got -1"),
    "float rows": (lambda: dlrm_rs.Embedding(cast(int, 1.5), 4), TypeError, "num_embeddings.* got float"),
    "2^64 columns": (lambda: dlrm_rs.Embedding(4, 2**64), ValueError, "embedding_dim of table 'embedding'"),
    "no columns": (lambda: dlrm_rs.EmbeddingBag(4, 0), ValueError, "embedding"),
    "padding": (lambda: dlrm_rs.EmbeddingBag(4, 2, padding_idx=4), ValueError, "padding_idx: .* -4 to 3, got 4"),
    "padding from the back": (lambda: dlrm_rs.Embedding(4, 2, padding_idx=-5), ValueError, "padding_idx: .* got -5"),
    "mode": (lambda: dlrm_rs.EmbeddingBag(4, 2, mode="none"), ValueError, "mode: .* got 'none'"),
    "sparse max": (lambda: dlrm_rs.EmbeddingBag(4, 2, mode="max", sparse=True), ValueError, "mode: .* got 'max'"),
    "device": (lambda: dlrm_rs.Embedding(4, 2, device="cuda:1"), ValueError, "device: .* got 'cuda:1'"),
    "dtype": (
        lambda: dlrm_rs.Embedding(4, 2, dtype=torch.float64),
        TypeError,
        "dtype: expected one of 'fp32', .* got torch.float64",
    ),
}


@pytest.mark.parametrize(("make", "error", "words"), BAD_MODULES.values(), ids=BAD_MODULES)
def test_bad_modules(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_infinities_are_numbers() -> None:
    rows = torch.tensor([[float("inf"), float("-inf")]])
    assert torch.equal(dlrm_rs.EmbeddingBag(1, 2, _weight=rows).weight, rows)


BAD_CALLS: dict[str, tuple[dict[str, Any], tuple[Any, ...], type[Exception], str]] = {
    "id": ({}, (ids(1, 4), ids(0)), IndexError, r"indices\[1\].*embedding_bag.* got 4"),
    "id with max_norm": ({"max_norm": 0.1}, (ids(1, 4), ids(0)), IndexError, r"indices\[1\].* got 4"),
    "id 2-D": ({}, (ids(1, -4).view(2, 1),), IndexError, r"indices\[1\].* got -4 .*bag 1"),
    "no offsets": ({}, (ids(1),), ValueError, "offsets: expected a 1-D tensor with a 1-D input, got None"),
    "offsets of 2-D": ({}, (ids(1).view(1, 1), ids(0)), ValueError, "offsets: expected None, as a 2-D input"),
    "2-D offsets": (
        {},
        (ids(1), ids(0).view(1, 1)),
        ValueError,
        r"offsets: expected one dimension, got shape \(1, 1\)",
    ),
    "3-D": ({}, (ids(1).view(1, 1, 1),), ValueError, r"input: expected one or two dimensions, got shape \(1, 1, 1\)"),
    "no last offset": ({"include_last_offset": True}, (ids(), ids()), ValueError, "offsets: expected at least one"),
    # torch leaves these ids out of the sum, but counts them in the mean and takes their maximum.
    "ids after the last offset": (
        {"include_last_offset": True},
        (ids(1, 2, 3), ids(0, 1, 2)),
        ValueError,
        r"offsets\[2\]: expected 3, the number of ids, got 2",
    ),
    "offsets start": ({}, (ids(1, 1), ids(1)), ValueError, "offsets.* got 1"),
    "float": ({}, (torch.ones(1, 1),), TypeError, "input: .* got torch.float32"),
    "device": ({}, (ids(1).to("meta"), ids(0)), ValueError, "input: expected a tensor on the CPU"),
    "weights, mean": (
        {"mode": "mean"},
        (ids(1), ids(0), torch.ones(1)),
        ValueError,
        "per_sample_weights: .* 'mean'",
    ),
    "weights of a shape": ({}, (ids(1), ids(0), torch.ones(2)), ValueError, r"per_sample_weights: .* \(1,\).* \(2,\)"),
    "weights NaN": ({}, (ids(1), ids(0), NAN[2, 1:]), ValueError, r"per_sample_weights\[0\].* NaN"),
    "weights NaN with max_norm": (
        {"max_norm": 0.1},
        (ids(1), ids(0), NAN[2, 1:]),
        ValueError,
        r"per_sample_weights\[0\].* NaN",
    ),
}


@pytest.mark.parametrize(("kwargs", "arguments", "error", "words"), BAD_CALLS.values(), ids=BAD_CALLS)
@each_spec
def test_bad_calls_of_embedding_bag(
    spec: Any, kwargs: dict[str, Any], arguments: tuple[Any, ...], error: type[Exception], words: str
) -> None:
    module = dlrm_rs.EmbeddingBag(4, 2, optimizer=spec, **{"mode": "sum", **kwargs})
    before = content(module)
    with pytest.raises(error, match=words):
        module(*arguments)
    assert content(module) == before
    assert module(ids(0, 1).view(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_bad_ids_of_embedding(bad: int, max_norm: float | None) -> None:
    module = dlrm_rs.Embedding(4, 2, max_norm=max_norm)
    before = content(module)
    with pytest.raises(IndexError, match=rf"indices\[2\].* rows of table 'embedding', got {bad}"):
        module(ids(0, 1, bad, 2).view(2, 2))
    assert content(module) == before


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_bad_settings(threads: int) -> None:
    with pytest.raises(ValueError, match="n: expected"):
        dlrm_rs.set_num_threads(threads)
    with pytest.raises(ValueError, match="mmx"):
        _dlrm_rs.set_simd("mmx")
