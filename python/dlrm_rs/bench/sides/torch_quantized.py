"""torch's operators for quantized tables, one call per table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dlrm_rs.bench.cases import IdBatch
from dlrm_rs.bench.rows import Rows
from dlrm_rs.data.synthetic import Shape


def operator(row_format: str, action: str) -> Any:
    """One of torch's operators: "prepack", "unpack" or "rowwise_offsets".

    Example:
        >>> operator("int4", "prepack")(torch.rand(10, 8)).shape
        torch.Size([10, 8])
    """
    bits = {"int8": "byte", "int4": "4bit", "int2": "2bit"}[row_format]
    # `default` is the operator itself: the packet around it costs a search at every call.
    return getattr(torch.ops.quantized, f"embedding_bag_{bits}_{action}").default


def packed_tables(shape: Shape, row_format: str, rows: Rows) -> list[Tensor]:
    """Tables with a row's codes, scale and bias together, `(N, bytes)`; only one is in fp32 at a time."""
    prepack = operator(row_format, "prepack")

    def packed(table: int, N: int) -> Tensor:
        weight = torch.empty(N, shape.embedding_dim)
        rows.fill(table, weight)
        return cast("Tensor", prepack(weight))

    return [packed(table, N) for table, N in enumerate(shape.num_embeddings)]


class TorchQuantized:
    """What torch's quantized `EmbeddingBag` calls, without the module around it.

    Args:
        row_format: "int8" or "int4".
        shape: The tables' sizes.
        rows: What they hold.
    """

    name = "torch quantized"

    def __init__(self, row_format: str, shape: Shape, rows: Rows) -> None:
        self._tables = packed_tables(shape, row_format, rows)
        self._lookup = operator(row_format, "rowwise_offsets")
        self._unpack = operator(row_format, "unpack")

    def calls(self, batch: IdBatch) -> dict[str, Callable[[], object]]:
        """With offsets."""
        lookup = self._lookup
        tables = [
            (packed, ids.view(-1), offsets) for packed, (ids, offsets) in zip(self._tables, batch.tables, strict=True)
        ]
        return {"offsets": lambda: [lookup(*table, include_last_offset=True) for table in tables]}

    def pooled(self, output: object) -> Tensor:
        """The tables' outputs side by side."""
        return torch.cat(cast("list[Tensor]", output), dim=1)

    def stored_rows(self, table: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rows as torch unpacks them."""
        rows: Tensor = self._unpack(self._tables[table][torch.from_numpy(ids)])
        return rows.double().numpy()
