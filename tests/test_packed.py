"""Rows as torch and FBGEMM pack them: the same bytes, and modules quantized elsewhere taken over as they are."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import dlrm_rs

PREPACK = {
    "int8": torch.ops.quantized.embedding_bag_byte_prepack,
    "int4": torch.ops.quantized.embedding_bag_4bit_prepack,
    "int2": torch.ops.quantized.embedding_bag_2bit_prepack,
}
# Elements in a byte: torch's operators take no row that ends within one.
STEPS = {"int8": 1, "int4": 2, "int2": 4}
# How torch's operators store scale and bias.
SCALES = {"int8": torch.float32, "int4": torch.float16, "int2": torch.float16}


def rows(kind: str, dim: int, largest: float = 1e30) -> Tensor:
    """Rows of a kind, `(12, dim)`."""
    random = torch.randn(12, dim)
    return {
        "random": random,
        "constant": torch.full_like(random, 0.3) * torch.arange(-6, 6)[:, None],
        "denormal": random * 1e-39,
        "huge": random * largest / 8,
    }[kind]


@pytest.mark.parametrize("dtype", PREPACK)
@pytest.mark.parametrize("kind", ["random", "constant", "denormal", "huge"])
def test_encodes_to_the_bytes_of_torchs_prepack(dtype: str, kind: str) -> None:
    for dim in range(STEPS[dtype], 301, STEPS[dtype]):
        # Beyond half precision torch's 4-bit and 2-bit rows have an infinite scale, which is refused here.
        weight = rows(kind, dim, largest=1e30 if dtype == "int8" else 6e4)
        bags = dlrm_rs.EmbeddingBag(12, dim, _weight=weight)
        dlrm_rs.quantize(bags, dtype, method="minmax", scale_dtype=SCALES[dtype])
        assert torch.equal(bags.to_packed(), PREPACK[dtype](weight)), f"dim {dim}"


@pytest.mark.parametrize("dtype", ["int4", "int2"])
def test_rows_that_half_precision_scales_cannot_hold_are_refused_or_have_others(dtype: str) -> None:
    weight = rows("huge", 8)
    bags = dlrm_rs.EmbeddingBag(12, 8, _weight=weight)
    with pytest.raises(ValueError, match=r"row 0 of table .*: expected elements whose scale and bias fp16 holds, got "):
        dlrm_rs.quantize(bags, dtype, method="minmax", scale_dtype=torch.float16)
    report = dlrm_rs.quantize(bags, dtype)
    assert bags.state_dict()["weight_scales"].dtype is torch.bfloat16
    assert report.total.error_worst < 0.6
    with pytest.raises(ValueError, match=r"row 0 of table .*: expected scale and bias that fp16, the layout's, holds"):
        bags.to_packed()


@pytest.mark.parametrize("dtype", PREPACK)
@pytest.mark.parametrize("dim", [4, 8, 64, 132])
def test_loads_what_torch_has_packed_without_requantizing(dtype: str, dim: int) -> None:
    weight = torch.randn(20, dim)
    packed = PREPACK[dtype](weight)
    bags = dlrm_rs.EmbeddingBag(20, dim, mode="sum", dtype=dtype).load_packed(packed)
    assert torch.equal(bags.to_packed(), packed)
    ids, offsets = torch.randint(20, (30,)), torch.arange(0, 30, 3)
    operator = {
        "int8": torch.ops.quantized.embedding_bag_byte_rowwise_offsets,
        "int4": torch.ops.quantized.embedding_bag_4bit_rowwise_offsets,
        "int2": torch.ops.quantized.embedding_bag_2bit_rowwise_offsets,
    }[dtype]
    torch.testing.assert_close(bags(ids, offsets), operator(packed, ids, offsets), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", PREPACK)
def test_the_layout_of_inference_tables_is_the_same_in_another_order(dtype: str) -> None:
    bags = dlrm_rs.EmbeddingBag(7, 5, dtype=dtype)
    dlrm_rs.quantize(dlrm_rs.dequantize(bags), dtype, scale_dtype=torch.float16)
    state = bags.state_dict()
    codes, scales = state["weight_codes"], state["weight_scales"].view(torch.uint8)
    packed = bags.to_packed("tbe", row_alignment=16)
    assert packed.shape == (7, 16)
    assert torch.equal(packed[:, :4], scales)
    assert torch.equal(packed[:, 4 : 4 + codes.shape[1]], codes)
    assert not packed[:, 4 + codes.shape[1] :].any()
    again = dlrm_rs.EmbeddingBag(7, 5, dtype=dtype).load_packed(packed, "tbe")
    assert torch.equal(again.to_packed("tbe", row_alignment=16), packed)


def test_what_cannot_be_packed_or_loaded_is_refused() -> None:
    bags = dlrm_rs.EmbeddingBag(7, 5, dtype="int8")
    packed = PREPACK["int8"](torch.randn(7, 5))
    with pytest.raises(ValueError, match=r"packed: expected 7 rows, \(N, bytes of a row\), got shape \(6, 13\)"):
        bags.load_packed(packed[1:])
    with pytest.raises(ValueError, match=r"expected at least 13 bytes a row \(fused, int8, dim 5\), got 12"):
        bags.load_packed(packed[:, 1:])
    with pytest.raises(ValueError, match="layout: expected one of fused, tbe, got 'torch'"):
        bags.load_packed(packed, "torch")
    with pytest.raises(TypeError, match="packed: expected an array of u8, got an array of float32"):
        bags.load_packed(packed.float())
    packed[3, 5:9] = torch.tensor([torch.nan]).view(torch.uint8)
    with pytest.raises(ValueError, match="row 3 of table 'embedding_bag': expected scale and bias that decode"):
        bags.load_packed(packed)
    with pytest.raises(ValueError, match="table 'embedding_bag': expected int8, int4 or int2 rows, got fp32"):
        dlrm_rs.EmbeddingBag(7, 5).to_packed()
    dlrm_rs.quantize(dlrm_rs.dequantize(bags), "int4", method="codebook")
    with pytest.raises(ValueError, match="expected evenly spaced codes, which the layout has, got a codebook"):
        bags.to_packed()


def quantized(module: nn.Module, bits: int) -> nn.Module:
    """Torch's quantized module of one of its modules for training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is being replaced, and says so
        from torch.ao.nn import quantized as modules
        from torch.ao.quantization import float_qparams_weight_only_qconfig, float_qparams_weight_only_qconfig_4bit

        configs = {8: float_qparams_weight_only_qconfig, 4: float_qparams_weight_only_qconfig_4bit}
        module.__dict__["qconfig"] = configs[bits]
        made: nn.Module = getattr(modules, type(module).__name__).from_float(module)
        return made


@pytest.mark.filterwarnings("ignore")  # of torch's quantized tensors
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("include_last_offset", [False, True])
def test_torchs_quantized_bags_are_taken_over(bits: int, include_last_offset: bool) -> None:
    torch_bags = quantized(nn.EmbeddingBag(50, 32, mode="sum", include_last_offset=include_last_offset), bits)
    ids = torch.randint(50, (40,))
    offsets = torch.arange(0, 41 if include_last_offset else 40, 4)
    expected = torch_bags(ids, offsets)
    model = nn.Sequential(torch_bags)
    assert dlrm_rs.replace_embeddings(model) is model
    ours = model[0]
    assert ours is torch_bags
    assert type(ours) is dlrm_rs.EmbeddingBag
    assert ours.row_formats() == {"0": f"int{bits}"}
    torch.testing.assert_close(ours(ids, offsets), expected, rtol=1e-5, atol=1e-5)
    assert set(model.state_dict()) == {"0.weight_codes", "0.weight_scales", "0.weight_format"}
    assert dlrm_rs.dequantize(model)[0].weight.shape == (50, 32)


@pytest.mark.filterwarnings("ignore")
def test_torchs_quantized_embedding_is_taken_over() -> None:
    table = quantized(nn.Embedding(50, 7), 8)
    ids = torch.randint(50, (6,))
    expected = table(ids)
    ours = dlrm_rs.replace_embeddings(table)
    assert type(ours) is dlrm_rs.Embedding
    torch.testing.assert_close(ours(ids), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_torchs_quantized_modules_that_cannot_be_taken_over_stay() -> None:
    table = quantized(nn.EmbeddingBag(50, 8, mode="sum"), 8)
    with pytest.raises(ValueError, match=r"dtype: expected None or 'int8' for the quantized 'embedding'.* got 'int4'"):
        dlrm_rs.replace_embeddings(table, dtype="int4")
    table.__dict__["mode"] = "mean"
    with pytest.raises(
        ValueError, match=r"model: expected mode 'sum' and no pruned rows at 'embedding'.* got mode 'mean'"
    ):
        dlrm_rs.replace_embeddings(table)
    assert type(table).__module__.startswith("torch.ao")


@pytest.mark.parametrize("dtype", PREPACK)
@pytest.mark.parametrize("kind", ["random", "constant", "denormal", "huge"])
def test_encodes_to_the_bytes_of_fbgemm(dtype: str, kind: str) -> None:
    pytest.importorskip("fbgemm_gpu", reason="FBGEMM is not installed: `make test-fbgemm` has it")
    for dim in range(8, 301, 8):  # FBGEMM takes no row of an odd number of bytes
        weight = rows(kind, dim, largest=1e30 if dtype == "int8" else 6e4)
        bags = dlrm_rs.EmbeddingBag(12, dim, _weight=weight)
        dlrm_rs.quantize(bags, dtype, method="minmax", scale_dtype=SCALES[dtype])
        if dtype == "int8":
            theirs = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(weight)
        else:
            bits = int(dtype.removeprefix("int"))
            theirs = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(weight, bits)
        assert torch.equal(bags.to_packed(), theirs), f"dim {dim}"
