"""`EmbeddingBagCollection`, as users call it and as they train it, and the ceiling of its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import dlrm_rs
from dlrm_rs.bench.cases import IdBatch
from dlrm_rs.bench.optimizers import BETAS, EPS, LR, upstream_gradient
from dlrm_rs.bench.rows import Rows, pooled_dtype
from dlrm_rs.data.synthetic import Shape

NAME = "dlrm_rs"


def _collection(
    shape: Shape,
    rows: Rows,
    data_type: str = "fp32",
    optimizer: dlrm_rs.optim.OptimizerSpec | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> dlrm_rs.EmbeddingBagCollection:
    """Tables of a shape, filled."""

    def fill(table: int) -> Callable[[Tensor], None]:
        return lambda weight: rows.fill(table, weight)

    sizes = enumerate(shape.num_embeddings)
    tables = [
        dlrm_rs.EmbeddingBagConfig(f"t{t}", N, shape.embedding_dim, [f"f{t}"], data_type=data_type, init_fn=fill(t))
        for t, N in sizes
    ]
    return dlrm_rs.EmbeddingBagCollection(tables, optimizer=optimizer, output_dtype=output_dtype)


def quantize(module: nn.Module, row_format: str) -> None:
    """Bring the tables of a module from fp32 into another row format, in place."""
    dlrm_rs.quantize(module, dtype=row_format, method="minmax", progress=False)


class Ours:
    """Our tables.

    Args:
        row_format: How their rows are stored.
        shape: The tables' sizes.
        rows: What they hold.

    Attributes:
        collection: Which has them.
    """

    name = NAME

    def __init__(self, row_format: str, shape: Shape, rows: Rows) -> None:
        self.collection = self._make(row_format, shape, rows)
        self._count = len(shape.num_embeddings)
        self._dim = shape.embedding_dim

    def _make(self, row_format: str, shape: Shape, rows: Rows) -> dlrm_rs.EmbeddingBagCollection:
        collection = _collection(shape, rows, output_dtype=pooled_dtype(row_format))
        if row_format != "fp32":
            quantize(collection, row_format)
        return collection

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


class OursTraining(Ours):
    """Our tables with a fused optimizer.

    Args:
        row_format: How their rows are stored.
        optimizer: One of `OPTIMIZERS`.
        shape: The tables' sizes.
        rows: What they hold.
    """

    def __init__(self, row_format: str, optimizer: str, shape: Shape, rows: Rows) -> None:
        self._optimizer = optimizer
        super().__init__(row_format, shape, rows)

    def _make(self, row_format: str, shape: Shape, rows: Rows) -> dlrm_rs.EmbeddingBagCollection:
        data_type, split = ("bf16", True) if row_format == "bf16-split" else (row_format, False)
        return _collection(shape, rows, data_type, _spec(self._optimizer, split))

    def calls(self, batch: IdBatch) -> dict[str, Callable[[], object]]:
        """The one use: a call, and backward, which updates."""
        gradient = upstream_gradient(batch.batch_size, self._count * self._dim)

        def step() -> Tensor:
            output = self.collection.lookup(batch.indices, batch.offsets)
            output.backward(gradient)
            return output

        return {"fused": step}


class OursInFp32(OursTraining):
    """Our tables in fp32, whatever the row format: what another one costs beside it."""

    name = "dlrm_rs fp32"

    def __init__(self, row_format: str, optimizer: str, shape: Shape, rows: Rows) -> None:
        super().__init__("fp32", optimizer, shape, rows)


def _spec(optimizer: str, split_bf16: bool) -> dlrm_rs.optim.OptimizerSpec:
    match optimizer:
        case "SGD":
            return dlrm_rs.optim.SGD(LR, split_bf16=split_bf16)
        case "Adagrad":
            return dlrm_rs.optim.Adagrad(LR, eps=EPS, split_bf16=split_bf16)
        case "RowWiseAdagrad":
            return dlrm_rs.optim.RowWiseAdagrad(LR, eps=EPS, split_bf16=split_bf16)
        case _:
            return dlrm_rs.optim.Adam(LR, betas=BETAS, eps=EPS, split_bf16=split_bf16)
