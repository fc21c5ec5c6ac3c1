"""torch's operators for quantized tables, one call per table, or one for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dlrm_rs.bench.cases import IdBatch
from dlrm_rs.bench.rows import Rows
from dlrm_rs.bench.sides.stacked import first_rows
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


def packed_tables(shape: Shape, row_format: str, rows: Rows) -> Tensor:
    """All tables stacked, a row's codes, scale and bias together, `(N, bytes)`; only one is in fp32 at a time."""
    prepack, width = operator(row_format, "prepack"), shape.embedding_dim
    bytes_of_row = prepack(torch.zeros(1, width)).shape[1]
    stacked = torch.empty(sum(shape.num_embeddings), bytes_of_row, dtype=torch.uint8)
    for table, packed in enumerate(stacked.split(shape.num_embeddings)):
        weight = torch.empty(len(packed), width)
        rows.fill(table, weight)
        packed.copy_(prepack(weight))
    return stacked


class TorchQuantized:
    """What torch's quantized `EmbeddingBag` calls, without the module around it.

    Args:
        row_format: "int8", "int4" or "int2".
        shape: The tables' sizes.
        rows: What they hold.
    """

    name = "torch quantized"

    def __init__(self, row_format: str, shape: Shape, rows: Rows) -> None:
        self._shape = shape
        self._stacked = packed_tables(shape, row_format, rows)
        self._tables: Sequence[Tensor] = self._stacked.split(shape.num_embeddings)
        self._lookup = operator(row_format, "rowwise_offsets")
        self._unpack = operator(row_format, "unpack")

    def calls(self, batch: IdBatch) -> dict[str, Callable[[], object]]:
        """With offsets: table by table, and of all tables stacked, whose ids are then raised in every call."""
        lookup, packed, dim = self._lookup, self._stacked, self._shape.embedding_dim
        first, ids, offsets = first_rows(self._shape, batch), batch.indices, batch.offsets
        tables = [
            (table, ids.view(-1), offsets) for table, (ids, offsets) in zip(self._tables, batch.tables, strict=True)
        ]

        def stacked() -> Tensor:
            pooled: Tensor = lookup(packed, ids + first, offsets, include_last_offset=True)
            return pooled.view(-1, batch.batch_size, dim)

        return {
            "offsets": lambda: [lookup(*table, include_last_offset=True) for table in tables],
            "stacked": stacked,
        }

    def pooled(self, output: object) -> Tensor:
        """The tables' outputs side by side."""
        return torch.cat(tuple(cast("Iterable[Tensor]", output)), dim=1)

    def stored_rows(self, table: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rows as torch unpacks them."""
        rows: Tensor = self._unpack(self._tables[table][torch.from_numpy(ids)])
        return rows.double().numpy()
