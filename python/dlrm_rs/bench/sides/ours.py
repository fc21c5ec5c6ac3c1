"""`EmbeddingBagCollection`, as users call it, and the ceiling of its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import dlrm_rs
from dlrm_rs.bench.cases import IdBatch
from dlrm_rs.bench.rows import Rows
from dlrm_rs.data.synthetic import Shape

NAME = "dlrm_rs"


def _collection(shape: Shape, rows: Rows) -> dlrm_rs.EmbeddingBagCollection:
    """fp32 tables of a shape, filled."""

    def fill(table: int) -> Callable[[Tensor], None]:
        return lambda weight: rows.fill(table, weight)

    sizes = enumerate(shape.num_embeddings)
    return dlrm_rs.EmbeddingBagCollection(
        [dlrm_rs.EmbeddingBagConfig(f"t{t}", N, shape.embedding_dim, [f"f{t}"], init_fn=fill(t)) for t, N in sizes]
    )


def quantize(module: nn.Module, row_format: str) -> None:
    """Bring the tables of a module from fp32 into another row format, in place."""
    dlrm_rs.quantize(module, dtype=row_format, method="minmax", progress=False)


class Ours:
    """Our tables.

    Args:
        shape: The tables' sizes.
        row_format: How their rows are stored.
        rows: What they hold.

    Attributes:
        collection: Which has them.
    """

    name = NAME

    def __init__(self, shape: Shape, row_format: str, rows: Rows) -> None:
        self.collection = _collection(shape, rows)
        if row_format != "fp32":
            quantize(self.collection, row_format)
        self._count = len(shape.num_embeddings)
        self._dim = shape.embedding_dim

    def calls(self, batch: IdBatch) -> dict[str, Callable[[], object]]:
        """The one use: one call."""
        return {"lookup": lambda: self.collection.lookup(batch.indices, batch.offsets)}

    def touch(self, batch: IdBatch) -> Callable[[], object]:
        """A call that touches the same rows and does nothing else."""
        handle = self.collection._tables.handle
        indices, offsets = batch.indices.numpy(), batch.offsets.numpy()
        return lambda: handle.touch(indices, offsets, batch.batch_size)

    def pooled(self, output: object) -> Tensor:
        """The output itself."""
        return cast("Tensor", output).detach()

    def stored_rows(self, table: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rows as a lookup of one id a bag gives them; the other tables get empty bags."""
        lengths = torch.zeros(self._count, len(ids), dtype=torch.int64)
        lengths[table] = 1
        offsets = nn.functional.pad(lengths.view(-1).cumsum(0), (1, 0))
        with torch.no_grad():
            output = self.collection.lookup(torch.from_numpy(ids), offsets)
        return output[:, table * self._dim : (table + 1) * self._dim].double().numpy()
