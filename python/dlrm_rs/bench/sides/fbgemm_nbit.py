"""FBGEMM's table-batched embeddings for inference, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from numpy.typing import NDArray
from torch import Tensor

from dlrm_rs.bench.cases import IdBatch
from dlrm_rs.bench.rows import Rows, decode, pooled_dtype
from dlrm_rs.bench.sides.fbgemm_cpu import tell_instructions
from dlrm_rs.bench.sides.torch_quantized import operator
from dlrm_rs.data.synthetic import Shape

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16}
_BITS = {"int8": 8, "int4": 4, "int2": 2}


class FbgemmNbit:
    """`IntNBitTableBatchedEmbeddingBagsCodegen`.

    Args:
        row_format: "fp32", "fp16", "int8", "int4" or "int2".
        shape: The tables' sizes.
        rows: What they hold.
    """

    name = "FBGEMM nbit"

    def __init__(self, row_format: str, shape: Shape, rows: Rows) -> None:
        tell_instructions()
        self._row_format = row_format
        stored = SparseType(row_format)
        self._tables = IntNBitTableBatchedEmbeddingBagsCodegen(
            [
                (f"t{table}", N, shape.embedding_dim, stored, EmbeddingLocation.HOST)
                for table, N in enumerate(shape.num_embeddings)
            ],
            device="cpu",
            output_dtype=SparseType.from_dtype(pooled_dtype(row_format)),
            bounds_check_mode=BoundsCheckMode.NONE,
            indices_dtype=torch.int64,
        )
        self._tables.initialize_weights()
        # Bytes of the elements, `(N, bytes)`, and of scale and bias, `(N, 4)` or None.
        self._weights: list[tuple[Tensor, Tensor | None]] = self._tables.split_embedding_weights()
        for table, N in enumerate(shape.num_embeddings):
            weight = torch.empty(N, shape.embedding_dim)
            rows.fill(table, weight)
            self._store(table, weight)

    def _store(self, table: int, weight: Tensor) -> None:
        elements, scale_bias = self._weights[table]
        if self._row_format in _FLOATS:
            elements.copy_(weight.to(_FLOATS[self._row_format]).view(torch.uint8))
            return
        assert scale_bias is not None, "quantized"
        packed: Tensor = operator(self._row_format, "prepack")(weight)
        codes, beside = packed[:, : elements.shape[1]], packed[:, elements.shape[1] :].contiguous()
        if self._row_format == "int8":  # torch stores scale and bias as fp32, FBGEMM as fp16
            beside = beside.view(torch.float32).half().view(torch.uint8)
        elements.copy_(codes)
        scale_bias.copy_(beside)

    def calls(self, batch: IdBatch) -> dict[str, Callable[[], object]]:
        """The one use: one call."""
        return {"forward": lambda: self._tables(batch.indices, batch.offsets)}

    def pooled(self, output: object) -> Tensor:
        """The output itself."""
        return cast("Tensor", output)

    def stored_rows(self, table: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rows decoded from their bytes."""
        elements, scale_bias = self._weights[table]
        picked = elements[torch.from_numpy(ids)]
        if self._row_format in _FLOATS:
            return picked.view(_FLOATS[self._row_format]).double().numpy()
        assert scale_bias is not None, "quantized"
        scale, bias = scale_bias[torch.from_numpy(ids)].view(torch.float16).double().numpy().T
        return decode(picked.numpy(), scale, bias, _BITS[self._row_format])
