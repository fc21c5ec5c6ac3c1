"""What one writes without a library for it: take rows, and add."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dlrm_rs.bench.cases import IdBatch
from dlrm_rs.bench.rows import Rows
from dlrm_rs.data.synthetic import Shape

_Floats = NDArray[np.float32]


class NumpyTake:
    """Arrays.

    Args:
        row_format: "fp32".
        shape: The tables' sizes.
        rows: What they hold.
    """

    name = "NumPy"

    def __init__(self, row_format: str, shape: Shape, rows: Rows) -> None:
        assert row_format == "fp32", row_format
        self._weights = [np.empty((N, shape.embedding_dim), dtype=np.float32) for N in shape.num_embeddings]
        for table, weight in enumerate(self._weights):
            rows.fill(table, torch.from_numpy(weight))

    def calls(self, batch: IdBatch) -> dict[str, Callable[[], object]]:
        """The rows of every bag's first ids, then those of the second ids added, and so on."""
        columns = [np.ascontiguousarray(ids.numpy().T) for ids, _ in batch.tables]  # (ids per bag, B) each
        tables = list(zip(self._weights, columns, strict=True))
        return {"take": lambda: [_pool(weight, ids) for weight, ids in tables]}

    def pooled(self, output: object) -> Tensor:
        """The tables' outputs side by side."""
        return torch.from_numpy(np.concatenate(cast("list[_Floats]", output), axis=1))

    def stored_rows(self, table: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rows by indexing."""
        return self._weights[table][ids].astype(np.float64)


def _pool(weight: _Floats, columns: NDArray[np.int64]) -> _Floats:
    pooled: _Floats = weight.take(columns[0], axis=0)
    for ids in columns[1:]:
        pooled += weight.take(ids, axis=0)
    return pooled
