"""FBGEMM's table-batched embeddings for training, on the CPU: the forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from numpy.typing import NDArray
from torch import Tensor

from dlrm_rs.bench.cases import IdBatch
from dlrm_rs.bench.rows import Rows
from dlrm_rs.data.synthetic import Shape


class FbgemmTraining:
    """`SplitTableBatchedEmbeddingBagsCodegen`.

    Args:
        shape: The tables' sizes.
        row_format: "fp32" or "fp16".
        rows: What they hold.
    """

    name = "FBGEMM TBE"

    def __init__(self, shape: Shape, row_format: str, rows: Rows) -> None:
        self._tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(N, shape.embedding_dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for N in shape.num_embeddings],
            weights_precision=SparseType.from_dtype({"fp32": torch.float32, "fp16": torch.float16}[row_format]),
            output_dtype=SparseType.FP32,
            pooling_mode=PoolingMode.SUM,
            bounds_check_mode=BoundsCheckMode.NONE,
            device=torch.device("cpu"),
        )
        self._weights: list[Tensor] = self._tables.split_embedding_weights()
        for table, weight in enumerate(self._weights):
            filled = weight if row_format == "fp32" else torch.empty(weight.shape)
            rows.fill(table, filled)
            if filled is not weight:
                weight.copy_(filled)

    def calls(self, batch: IdBatch) -> dict[str, Callable[[], object]]:
        """The one use: one call."""
        return {"forward": lambda: self._tables(batch.indices, batch.offsets)}

    def pooled(self, output: object) -> Tensor:
        """The output itself."""
        return cast("Tensor", output).detach()

    def stored_rows(self, table: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rows by indexing."""
        return self._weights[table][torch.from_numpy(ids)].double().numpy()
