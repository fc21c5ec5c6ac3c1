"""torch's own quantized embeddings (`torch.ao.nn.quantized`) as the engine's tables: rows taken over, not requantized.

Such a module keeps its rows packed and gives them back as a tensor of codes with a scale and a zero point for each row;
its operators read `scale * code + bias` with `bias = -zero_point * scale`, both rounded to float16 for codes of 4 bits
(pytorch, aten/src/ATen/native/quantized/cpu/qembeddingbag_prepack.cpp).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlrm_rs._dlrm_rs import TableRows
from dlrm_rs.row_formats import as_array
from dlrm_rs.tables import EmbeddingTables, FeatureSpec, TableSpec

__all__ = ["is_quantized_embedding", "tables_of", "take_over"]


def is_quantized_embedding(module: nn.Module) -> bool:
    """Whether a module is `torch.ao.nn.quantized.Embedding` or `EmbeddingBag`; their package is not imported for it."""
    kind = type(module)
    return kind.__module__.startswith("torch.ao.nn.quantized.") and kind.__name__ in ("Embedding", "EmbeddingBag")


def tables_of(name: str, module: nn.Module, row_format: str | None) -> EmbeddingTables:
    """The table of such a module, in the engine; the module stays as it is.

    Args:
        name: Of the module in its model.
        module: The module.
        row_format: What the user asks for, which must be the module's own; None for that.

    Raises:
        ValueError: Another row format, pruned rows, a mode that torch's operator ignores, or scales that are not
            finite.
    """
    weight: Tensor = module.weight()  # type: ignore[operator]
    own = "int8" if weight.dtype is torch.quint8 else "int4"
    if row_format not in (None, own):
        raise ValueError(
            f"dtype: expected None or {own!r} for the quantized {name!r}, whose rows are {own}, got {row_format!r}; "
            "dlrm_rs.quantize or dlrm_rs.dequantize changes them afterwards"
        )
    pools = hasattr(module, "mode")
    if pools and (module.mode != "sum" or module.pruned_weights):
        raise ValueError(
            f"model: expected mode 'sum' and no pruned rows at {name!r}, which is what torch's quantized operators "
            f"compute, got mode {module.mode!r} and pruned_weights={module.pruned_weights}"
        )
    num_embeddings, embedding_dim = weight.shape
    codes, scales = _parts(weight)
    rows = TableRows.from_parts(name, embedding_dim, own, as_array(codes), as_array(scales), None)
    table = TableSpec(name, num_embeddings, embedding_dim, own)
    tables = EmbeddingTables([table], [FeatureSpec(0, "sum" if pools else "none", None)], [module], None)
    tables.swap(0, rows, own)
    return tables


def take_over(module: nn.Module) -> None:
    """Give such a module the attributes of torch's module for training, from which the engine's descends."""
    del module._modules["_packed_params"]
    for attribute in ("dtype", "pruned_weights"):
        module.__dict__.pop(attribute, None)
    module.__dict__.update(padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False)


def _parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, `(N, bytes of a row)` uint8, and scale and bias of every row, `(N, 2)`."""
    num_embeddings, embedding_dim = weight.shape
    codes = weight.int_repr()
    scale = weight.q_per_channel_scales().float()
    scales = torch.stack([scale, -(weight.q_per_channel_zero_points().float() * scale)], dim=1)
    if weight.dtype is torch.quint8:
        return codes, scales
    if embedding_dim % 2:
        raise ValueError(
            f"model: expected an even embedding_dim of a 4-bit table, as rows of an odd one share bytes in torch, got "
            f"{embedding_dim}"
        )
    return codes.view(num_embeddings, embedding_dim // 2), scales.half()
