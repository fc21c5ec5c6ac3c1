"""Modules whose rows are fp16, bf16, int8, int4 or int2."""

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dlrm_rs
from batches import DIMS, batch
from dlrm_rs import _dlrm_rs
from dlrm_rs.row_formats import QUANTIZED, ROW_FORMATS, TORCH_DTYPES

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Bits of an element, and bytes of a row's scale and bias.
BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4, "int2": 2}


def rows_of(module: nn.Module) -> Tensor:
    """What the rows of a module decode to, `(N, D)` float64."""
    return dlrm_rs.dequantize(copy.deepcopy(module)).weight.detach().double()  # type: ignore[operator]


def pooled(rows: Tensor, indices: Tensor, offsets: Tensor, mode: str, weights: Tensor | None) -> Tensor:
    """Bags pooled in float64 by torch."""
    factors = None if weights is None else weights.double()
    return nn.functional.embedding_bag(
        indices, rows, offsets, mode=mode, include_last_offset=True, per_sample_weights=factors
    )


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", ROW_FORMATS)
def test_pools_what_its_rows_decode_to(dtype: str, dim: int) -> None:
    indices, offsets, weights = batch(50, 40)
    for mode in ("sum", "mean", "max"):
        bags = dlrm_rs.EmbeddingBag(50, dim, mode=mode, dtype=dtype, include_last_offset=True)
        out = bags(indices, offsets).detach().double()
        expected = pooled(rows_of(bags), indices, offsets, mode, None)
        assert (out - expected).norm() <= 1e-6 * expected.norm()
    bags = dlrm_rs.EmbeddingBag(50, dim, mode="sum", dtype=dtype, include_last_offset=True)
    out = bags(indices, offsets, weights).detach().double()
    expected = pooled(rows_of(bags), indices, offsets, "sum", weights)
    assert (out - expected).norm() <= 1e-6 * expected.norm()
    table = dlrm_rs.Embedding(50, dim, dtype=dtype)
    assert torch.equal(table(indices).detach().double(), rows_of(table)[indices])


@pytest.mark.parametrize("dtype", ROW_FORMATS)
@pytest.mark.parametrize("output", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("engine_settings")
def test_bits_are_the_same_at_every_level_and_the_output_is_rounded_to_the_nearest(
    dtype: str, output: torch.dtype
) -> None:
    indices, offsets, _ = batch(300, 2000)
    bags = dlrm_rs.EmbeddingBag(300, 33, mode="sum", dtype=dtype, include_last_offset=True, output_dtype=output)
    wide = copy.deepcopy(bags)
    wide._tables.output_dtype = torch.float32
    outs = []
    for level in dlrm_rs.info()["simd_available"]:
        _dlrm_rs.set_simd(level)
        for threads in (1, 3):
            dlrm_rs.set_num_threads(threads)
            out = bags(indices, offsets).detach()
            assert out.dtype is output
            assert torch.equal(out, wide(indices, offsets).detach().to(output))
            outs.append(out)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_a_collection_mixes_formats() -> None:
    tables = [dlrm_rs.EmbeddingBagConfig(name, 40, 9, [f"f_{name}"], data_type=name) for name in ROW_FORMATS]
    collection = dlrm_rs.EmbeddingBagCollection(tables, output_dtype=torch.bfloat16)
    assert collection.row_formats() == {name: name for name in ROW_FORMATS}
    indices, offsets, _ = batch(40, 6 * 5)
    out = collection.lookup(indices, offsets)
    assert out.dtype is torch.bfloat16
    floats = copy.deepcopy(collection)
    dlrm_rs.dequantize(floats)
    assert torch.equal(floats.lookup(indices, offsets), out)
    assert {name for name, _ in collection.named_parameters()} == {
        f"embedding_bags.{name}.weight" for name in TORCH_DTYPES
    }


@pytest.mark.parametrize("dtype", ROW_FORMATS)
@pytest.mark.parametrize("dim", [1, 7, 64])
def test_memory_is_as_the_format_says(dtype: str, dim: int) -> None:
    sizes = dlrm_rs.EmbeddingBag(20_000, dim, dtype=dtype).memory_report()["embedding_bag"]
    assert sizes["payload"] == 20_000 * -(-dim * BITS[dtype] // 8)
    assert sizes["scales"] == (20_000 * 4 if dtype in QUANTIZED else 0)
    assert sizes["state"] == 0


def test_all_told_int8_takes_at_most_70_bytes_a_row_and_int4_37() -> None:
    for dtype, limit in (("int8", 70), ("int4", 37)):
        bags = dlrm_rs.EmbeddingBag(100_000, 64)
        dlrm_rs.quantize(bags, dtype)
        assert sum(bags.memory_report()["embedding_bag"].values()) <= limit * 100_000


@pytest.mark.parametrize("dtype", ["int8", "int4", "int2"])
def test_new_tables_are_from_the_distribution_of_torchs(dtype: str) -> None:
    rows = rows_of(dlrm_rs.EmbeddingBag(3000, 64, dtype=dtype, padding_idx=7))
    assert abs(rows.mean()) < 0.02
    assert abs(rows.std() - 1) < (0.01 if dtype != "int2" else 0.2)
    assert not rows[7].any()
    config = dlrm_rs.EmbeddingBagConfig("t", 10_000, 16, ["f"], data_type=dtype)
    collection = dlrm_rs.dequantize(dlrm_rs.EmbeddingBagCollection([config]))
    weight = collection.embedding_bags["t"].weight
    assert isinstance(weight, Tensor)
    assert 0.0095 < weight.abs().max() < 0.0101  # U(-0.01, 0.01)


def test_an_init_fn_sees_all_rows_at_once() -> None:
    seen = []

    def fill(rows: Tensor) -> None:
        seen.append(tuple(rows.shape))
        rows.copy_(torch.arange(10.0)[:, None].expand(10, 3))

    config = dlrm_rs.EmbeddingBagConfig("t", 10, 3, ["f"], data_type="int8", init_fn=fill)
    collection = dlrm_rs.EmbeddingBagCollection([config])
    assert seen == [(10, 3)]
    assert collection.lookup(torch.tensor([4]), torch.tensor([0, 1])).tolist() == [[4.0] * 3]


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_rows_are_a_parameter_that_torch_trains(dtype: str) -> None:
    bags = dlrm_rs.EmbeddingBag(30, 5, mode="sum", dtype=HALVES[dtype])
    reference = nn.EmbeddingBag(30, 5, mode="sum", dtype=HALVES[dtype])
    reference.load_state_dict(bags.state_dict())
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.5) for module in (bags, reference)]
    for _ in range(3):
        ids = torch.randint(30, (8, 3))
        for module, optimizer in zip((bags, reference), optimizers, strict=True):
            out = module(ids)
            assert out.dtype is HALVES[dtype]
            optimizer.zero_grad()
            out.float().square().sum().backward()
            assert module.weight.grad is not None
            assert module.weight.grad.dtype is HALVES[dtype]
            optimizer.step()
    torch.testing.assert_close(bags.weight, reference.weight, atol=0.05, rtol=0.02)


def test_a_half_precision_module_takes_weights_of_its_precision() -> None:
    bags = dlrm_rs.EmbeddingBag(4, 2, mode="sum", dtype=torch.float16)
    weights = torch.tensor([[0.5, 2.0]], dtype=torch.float16, requires_grad=True)
    bags(torch.tensor([[1, 2]]), per_sample_weights=weights).float().sum().backward()
    assert weights.grad is not None
    torch.testing.assert_close(weights.grad[0], bags.weight[1:3].sum(1).half(), atol=1e-2, rtol=1e-2)


def test_a_format_by_name_leaves_the_output_float32() -> None:
    assert dlrm_rs.EmbeddingBag(4, 2, dtype="fp16")(torch.tensor([[1]])).dtype is torch.float32
    model = dlrm_rs.replace_embeddings(nn.EmbeddingBag(4, 2), dtype="bf16")
    assert (model.weight.dtype, model(torch.tensor([[1]])).dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_the_gradient_of_weights_of_ids_reads_quantized_rows(dtype: str) -> None:
    bags = dlrm_rs.EmbeddingBag(20, 9, mode="sum", dtype=dtype)
    weights = torch.rand(4, 3, requires_grad=True)
    ids = torch.randint(20, (4, 3))
    out = bags(ids, per_sample_weights=weights)
    out.sum().backward()
    expected = rows_of(bags).sum(1)[ids]
    torch.testing.assert_close(weights.grad, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("method", ["minmax", "codebook"])
def test_a_state_dict_of_tensors_brings_everything_back(dtype: str, method: str) -> None:
    if method == "codebook" and dtype != "int4":
        pytest.skip("a codebook is for int4")
    config = dlrm_rs.EmbeddingBagConfig("t", 40, 7, ["f"])
    collection = dlrm_rs.EmbeddingBagCollection([config])
    with torch.no_grad():
        collection.embedding_bags["t"].weight.pow_(3)  # type: ignore[operator]
    dlrm_rs.quantize(collection, dtype, method=method)
    state = collection.state_dict()
    keys = {"weight_codes", "weight_scales", "weight_format", *(["weight_codebook"] if method == "codebook" else [])}
    assert set(state) == {f"embedding_bags.t.{key}" for key in keys}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = dlrm_rs.EmbeddingBagCollection([dlrm_rs.EmbeddingBagConfig("t", 40, 7, ["f"], data_type=dtype)])
    other.load_state_dict(loaded)
    for copied in (other, copy.deepcopy(collection), pickle.loads(pickle.dumps(collection))):
        assert copied.row_formats() == {"t": dtype}
        for key, tensor in copied.state_dict().items():
            assert torch.equal(tensor, state[key])
        ids, offsets = torch.arange(40), torch.arange(41)
        assert torch.equal(copied.lookup(ids, offsets), collection.lookup(ids, offsets))


def quantized_state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return dict(dlrm_rs.EmbeddingBag(6, 5, dtype="int4").state_dict())


BAD_STATES: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"weight_format": torch.tensor([1, 8, 5])}, "expected int4 rows of dim 5 .* got int8 rows of dim 5"),
    "dim": ({"weight_format": torch.tensor([1, 4, 6])}, "got int4 rows of dim 6"),
    "version": ({"weight_format": torch.tensor([2, 4, 5])}, "in version 2 of their layout"),
    "shape of format": ({"weight_format": torch.tensor(4)}, "got a weight_format of 4"),
    "rows": (
        {"weight_codes": torch.zeros(5, 3, dtype=torch.uint8)},
        "rows of table .*: expected 6 x 5|scales of table",
    ),
    "bytes": ({"weight_codes": torch.zeros(6, 4, dtype=torch.uint8)}, "codes of table .*: expected 18 bytes, got 24"),
    "dtype": ({"weight_codes": torch.zeros(6, 3)}, "codes: expected an array of u8"),
    "scales": ({"weight_scales": torch.zeros(6, 2, dtype=torch.float64)}, "scales: expected a C-contiguous array of"),
    "nan": ({"weight_scales": torch.full((6, 2), torch.nan)}, "row 0 of table .*: expected scale and bias that decode"),
    "codebook": ({"weight_codebook": torch.arange(16.0).flip(0)}, "codebook of table .* ascending from 0 to 15"),
    "long codebook": ({"weight_codebook": torch.arange(17.0)}, "codebook: expected 16 numbers, got 17"),
    "no codebook": ({"weight_codebook": [1, 2]}, "expected tensors weight_format, weight_codes and weight_scales, got"),
    "floats": ({"weight_format": torch.tensor([1.0, 4.0, 5.0])}, "expected int4 rows of dim 5 in version 1"),
    "no tensor": ({"weight_codes": [1, 2]}, "expected tensors weight_format, weight_codes and weight_scales, got"),
}


@pytest.mark.parametrize(("change", "words"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_state_dict_that_does_not_fit_is_refused_in_words(change: dict[str, Any], words: str) -> None:
    bags = dlrm_rs.EmbeddingBag(6, 5, dtype="int4")
    before = bags.state_dict()
    with pytest.raises(RuntimeError, match=words):
        bags.load_state_dict({**quantized_state(), **change})
    assert all(torch.equal(tensor, before[key]) for key, tensor in bags.state_dict().items())


# What is put in the place of a buffer of quantized rows, which then holds codes of nothing but zeros.
REPLACEMENTS: dict[str, Callable[[nn.Module, str, Tensor], Any]] = {
    "attribute": setattr,
    "data": lambda module, name, part: setattr(getattr(module, name), "data", part),
    "copy": lambda module, name, part: getattr(module, name).copy_(part),
}


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
@pytest.mark.parametrize("optimizer", [None, dlrm_rs.optim.Adagrad(lr=0.1)])
def test_a_replaced_buffer_is_copied_in(replace: Callable[[nn.Module, str, Tensor], Any], optimizer: Any) -> None:
    tables = [dlrm_rs.EmbeddingBagConfig(name, 6, 5, [name], data_type="int4") for name in ("a", "b")]
    collection = dlrm_rs.EmbeddingBagCollection(tables, optimizer=optimizer)
    holder = collection.embedding_bags["b"]
    ids, offsets = torch.arange(6).repeat(2), torch.arange(13)
    before = collection.lookup(ids, offsets).detach()
    scales = holder.get_buffer("weight_scales").clone()
    for name, part in (("weight_codes", torch.zeros(6, 3, dtype=torch.uint8)), ("weight_scales", scales * 2)):
        replace(holder, name, part)
        after = collection.lookup(ids, offsets).detach()
        factor = 2 if name == "weight_scales" else 1
        assert torch.equal(after[:, 5:], factor * scales[:, 1:].float().expand(6, 5))  # nothing but the bias
        assert torch.equal(after[:, :5], before[:, :5])
        assert torch.equal(collection.state_dict()[f"embedding_bags.b.{name}"], part)
        assert holder.get_buffer(name).data_ptr() != part.data_ptr()
    assert torch.equal(copy.deepcopy(collection).lookup(ids, offsets), after)
    if optimizer:
        collection.lookup(ids, offsets).sum().backward()
        assert (collection.lookup(ids, offsets) < after).all()
        assert torch.equal(holder.get_buffer("weight_codes"), collection.state_dict()["embedding_bags.b.weight_codes"])


def test_a_buffer_in_the_hands_of_a_user_can_be_replaced_more_than_once() -> None:
    bags = dlrm_rs.EmbeddingBag(6, 4, dtype="int4", _weight=torch.rand(6, 4))
    dlrm_rs.quantize(bags, "int4", method="codebook")
    codes, codebook = bags.weight_codes, bags.weight_codebook
    rows = [torch.full((6, 2), 17 * code, dtype=torch.uint8) for code in (0, 15, 3)]
    ids = torch.arange(6).view(-1, 1)
    scale, bias = bags.weight_scales.float().split(1, dim=1)
    for part, code in zip(rows, (0, 15, 3), strict=True):
        codes.data = part
        assert torch.equal(bags(ids), (scale * codebook[code] + bias).expand(6, 4))
    codes.zero_()  # over the engine's memory again
    assert torch.equal(bags(ids), (scale * codebook[0] + bias).expand(6, 4))
    codebook.data = torch.arange(16.0).square() / 15
    codes.fill_(17)
    assert torch.allclose(bags(ids), (scale / 15 + bias).expand(6, 4))
    twin = dlrm_rs.EmbeddingBag(6, 4, dtype="int4")
    twin.weight_codes = rows[1]
    twin(ids)
    rows[1].zero_()
    assert (twin.weight_codes == 255).all()  # a copy


BAD_BUFFERS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "shape": (lambda m: setattr(m, "weight_codes", torch.zeros(6, 4, dtype=torch.uint8)), ValueError, "got 24"),
    "data": (
        lambda m: setattr(m.weight_codes, "data", m.weight_codes.data[:5]),
        ValueError,
        "expected 6 x 5|scales of",
    ),
    "dtype": (lambda m: setattr(m, "weight_codes", torch.zeros(6, 3)), TypeError, "codes: expected an array of u8"),
    "nan": (lambda m: setattr(m, "weight_scales", torch.full((6, 2), torch.nan)), ValueError, "row 0 of table"),
    "none": (lambda m: setattr(m, "weight_codes", None), RuntimeError, "weight_codes: expected the buffer of a quant"),
    "gone": (lambda m: delattr(m, "weight_scales"), RuntimeError, "weight_scales: expected the buffer of a quant"),
    "meta": (
        lambda m: setattr(m, "weight_codes", torch.zeros(6, 3, dtype=torch.uint8, device="meta")),
        ValueError,
        "weight_codes: expected a tensor on the CPU, got device meta",
    ),
}


@pytest.mark.parametrize(("replace", "error", "words"), BAD_BUFFERS.values(), ids=BAD_BUFFERS)
def test_a_buffer_that_cannot_be_is_refused(replace: Callable[[Any], Any], error: type[Exception], words: str) -> None:
    bags = dlrm_rs.EmbeddingBag(6, 5, mode="sum", dtype="int4")
    state, before = bags.state_dict(), bags(torch.arange(6).view(2, 3))
    replace(bags)
    for use in (lambda: bags(torch.tensor([[1]])), lambda: bags.to_packed(), lambda: bags.state_dict()):
        with pytest.raises(error, match=words):
            use()
    bags.load_state_dict(state)
    assert torch.equal(bags(torch.arange(6).view(2, 3)), before)


def test_buffers_that_nobody_has_asked_for_are_not_looked_at() -> None:
    bags = dlrm_rs.EmbeddingBag(6, 5, dtype="int8")
    nn.Sequential(bags).cpu().load_state_dict(nn.Sequential(copy.deepcopy(bags)).state_dict())
    bags(torch.tensor([[1]]))
    assert not bags._tables.buffers.in_hands
    assert bags.weight_codes.shape == (6, 5)
    assert bags._tables.buffers.in_hands == {0}
    dlrm_rs.dequantize(bags)
    bags.weight_codes = 1  # a name as any other, now
    assert not bags._tables.buffers.in_hands


def test_keys_that_mean_nothing_are_unexpected() -> None:
    bags = dlrm_rs.EmbeddingBag(6, 5, dtype="int4")
    state = {**quantized_state(), "weight_other": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight_other"'):
        bags.load_state_dict(state)
    assert bags.load_state_dict(state, strict=False).unexpected_keys == ["weight_other"]


def test_rows_of_another_kind_are_refused_in_words() -> None:
    floats, codes = dlrm_rs.EmbeddingBag(6, 5), dlrm_rs.EmbeddingBag(6, 5, dtype="int4")
    with pytest.raises(RuntimeError, match="weight: expected int4 rows of dim 5, got rows that are numbers; load into"):
        codes.load_state_dict(floats.state_dict())
    with pytest.raises(RuntimeError, match="weight: expected fp32 rows of dim 5, got int4 rows of dim 5 in version 1"):
        floats.load_state_dict(codes.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_codes", "weight_scales", "weight_format"'):
        codes.load_state_dict({})


@settings(max_examples=150, deadline=None)
@given(
    form=st.lists(st.integers(-(2**40), 2**40), max_size=4),
    codes=st.binary(max_size=40),
    columns=st.integers(1, 6),
    scales=st.lists(st.floats(width=16), max_size=16),
    codebook=st.none() | st.lists(st.floats(width=32), max_size=17),
    right_format=st.booleans(),
)
def test_any_tensors_in_a_state_dict_load_or_are_refused(
    form: list[int], codes: bytes, columns: int, scales: list[float], codebook: list[float] | None, right_format: bool
) -> None:
    bags = dlrm_rs.EmbeddingBag(3, 5, dtype="int2")
    rows = len(codes) // columns
    state = {
        "weight_format": torch.tensor([1, 2, 5] if right_format else form, dtype=torch.int64),
        "weight_codes": torch.tensor(list(codes[: rows * columns]), dtype=torch.uint8).view(rows, columns),
        "weight_scales": torch.tensor(scales[: len(scales) // 2 * 2], dtype=torch.float16).view(-1, 2),
    }
    if codebook is not None:
        state["weight_codebook"] = torch.tensor(codebook)
    refused = ""
    try:
        bags.load_state_dict(state)
    except RuntimeError as error:
        refused = str(error)
    assert not refused or re.search("weight: .*expected.*got", refused)
    assert bags(torch.tensor([[0, 1, 2]])).isfinite().all()


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_quantized_rows_are_no_parameter(dtype: str) -> None:
    bags = dlrm_rs.EmbeddingBag(6, 4, dtype=dtype)
    assert list(bags.parameters()) == []
    with pytest.raises(AttributeError, match=f"weight: expected rows that are numbers, got {dtype}.*dequantize"):
        bags.weight  # noqa: B018 - it raises
    assert not hasattr(bags, "weight")
    assert repr(bags) == f"EmbeddingBag(6, 4, mode='mean', dtype={dtype})"
    out = bags(torch.tensor([[1]]))
    assert not out.requires_grad
    bags.to("cpu").eval()
    assert torch.equal(bags(torch.tensor([[1]])), out)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "max_norm": (
        lambda: dlrm_rs.EmbeddingBag(4, 2, max_norm=1.0, dtype="int8"),
        ValueError,
        "max_norm: expected None for rows of int8, got 1",
    ),
    "weight": (
        lambda: dlrm_rs.Embedding(2, 2, dtype="int4", _weight=torch.tensor([[0.0, 1.0], [torch.inf, 2.0]])),
        ValueError,
        "row 1 of table 'embedding': expected finite numbers, got inf",
    ),
    "too large": (
        lambda: dlrm_rs.Embedding(2, 2, dtype="fp16", _weight=torch.full((2, 2), 1e6)),
        ValueError,
        "row 0 of table 'embedding': expected numbers of at most 6.5504e4 in size, which fp16 holds, got 1e6",
    ),
    "output": (
        lambda: dlrm_rs.EmbeddingBag(4, 2, output_dtype=torch.float64),
        TypeError,
        "output_dtype: expected one of torch.float32, torch.float16, torch.bfloat16, got torch.float64",
    ),
}


@pytest.mark.parametrize(("make", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_weight_moves_while_others_are_quantized() -> None:
    # The engine's tables move to other memory when a weight that is viewed is replaced; quantized ones go along.
    tables = [
        dlrm_rs.EmbeddingBagConfig("a", 5, 2, ["a"]),
        dlrm_rs.EmbeddingBagConfig("b", 5, 2, ["b"], data_type="int4"),
    ]
    collection = dlrm_rs.EmbeddingBagCollection(tables)
    ids, offsets = torch.arange(5).repeat(2), torch.arange(11)
    before = collection.lookup(ids, offsets).detach().clone()
    kept = collection.embedding_bags["a"].weight
    collection.embedding_bags["a"].weight = nn.Parameter(torch.ones(5, 2))
    after = collection.lookup(ids, offsets).detach()
    assert torch.equal(after[:, :2], torch.ones(5, 2))
    assert torch.equal(after[:, 2:], before[:, 2:])
    assert isinstance(kept, Tensor)
    assert torch.equal(kept, before[:, :2])
