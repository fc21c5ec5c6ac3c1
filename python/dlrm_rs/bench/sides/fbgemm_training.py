"""FBGEMM's table-batched embeddings for training, on the CPU: the forward alone, or whole steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from numpy.typing import NDArray
from torch import Tensor

from dlrm_rs.bench.cases import IdBatch
from dlrm_rs.bench.optimizers import EPS, LR, upstream_gradient
from dlrm_rs.bench.rows import Rows
from dlrm_rs.bench.sides.fbgemm_cpu import tell_instructions
from dlrm_rs.data.synthetic import Shape
from dlrm_rs.row_formats import TORCH_DTYPES

_OPTIMIZERS = {
    "SGD": EmbOptimType.EXACT_SGD,
    "Adagrad": EmbOptimType.EXACT_ADAGRAD,
    "RowWiseAdagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}


class FbgemmForward:
    """`SplitTableBatchedEmbeddingBagsCodegen`, looked up.

    Args:
        row_format: "fp32" or "fp16".
        shape: The tables' sizes.
        rows: What they hold.
        settings: Further ones.
    """

    name = "FBGEMM TBE"

    def __init__(self, row_format: str, shape: Shape, rows: Rows, **settings: Any) -> None:
        tell_instructions()
        self._tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(N, shape.embedding_dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for N in shape.num_embeddings],
            weights_precision=SparseType.from_dtype(TORCH_DTYPES[row_format]),
            output_dtype=SparseType.FP32,  # with fp16 rows and an output of their dtype it takes several times as long
            pooling_mode=PoolingMode.SUM,
            bounds_check_mode=BoundsCheckMode.NONE,
            device=torch.device("cpu"),
            **settings,
        )
        self._weights: list[Tensor] = self._tables.split_embedding_weights()
        for table, weight in enumerate(self._weights):
            rows.fill(table, weight)

    def calls(self, batch: IdBatch) -> dict[str, Callable[[], object]]:
        """The one use: one call."""
        return {"forward": lambda: self._tables(batch.indices, batch.offsets)}

    def pooled(self, output: object) -> Tensor:
        """The output itself."""
        return cast("Tensor", output).detach()

    def stored_rows(self, table: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rows by indexing."""
        return self._weights[table].detach()[torch.from_numpy(ids)].double().numpy()


class FbgemmTraining(FbgemmForward):
    """The same with a fused optimizer.

    Args:
        row_format: "fp32" or "fp16".
        optimizer: One of those that FBGEMM has on the CPU.
        shape: The tables' sizes.
        rows: What they hold.
    """

    def __init__(self, row_format: str, optimizer: str, shape: Shape, rows: Rows) -> None:
        super().__init__(row_format, shape, rows, optimizer=_OPTIMIZERS[optimizer], learning_rate=LR, eps=EPS)
        self._width = len(shape.num_embeddings) * shape.embedding_dim

    def calls(self, batch: IdBatch) -> dict[str, Callable[[], object]]:
        """The one use: a call, and backward, which updates."""
        gradient = upstream_gradient(batch.batch_size, self._width)

        def step() -> Tensor:
            output = cast("Tensor", self._tables(batch.indices, batch.offsets))
            output.backward(gradient)
            return output

        return {"fused": step}
