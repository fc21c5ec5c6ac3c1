"""torch's own modules, one per table in a loop, or one for all: looked up, or trained by torch's optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag

from dlrm_rs.bench.cases import IdBatch
from dlrm_rs.bench.optimizers import BETAS, EPS, LR, upstream_gradient
from dlrm_rs.bench.rows import Rows
from dlrm_rs.bench.sides.stacked import first_rows
from dlrm_rs.data.synthetic import Shape
from dlrm_rs.row_formats import TORCH_DTYPES


class TorchBags:
    """What `nn.EmbeddingBag` calls, without the module around it.

    Args:
        row_format: "fp32", "fp16" or "bf16", which are dtypes of the output as well.
        shape: The tables' sizes.
        rows: What they hold.
    """

    name = "nn.EmbeddingBag"

    # Whether gradients are.
    _sparse = False

    def __init__(self, row_format: str, shape: Shape, rows: Rows) -> None:
        self._shape = shape
        self._stacked = torch.empty(sum(shape.num_embeddings), shape.embedding_dim, dtype=TORCH_DTYPES[row_format])
        self._weights: Sequence[Tensor] = self._stacked.split(shape.num_embeddings)
        for table, weight in enumerate(self._weights):
            rows.fill(table, weight)

    def calls(self, batch: IdBatch) -> dict[str, Callable[[], object]]:
        """A lookup in every way: table by table, and of all tables stacked, whose ids are then raised in every call."""
        first, ids, offsets, weight = first_rows(self._shape, batch), batch.indices, batch.offsets, self._stacked

        def stacked() -> Tensor:
            pooled = embedding_bag(ids + first, weight, offsets, mode="sum", include_last_offset=True)
            return pooled.view(-1, batch.batch_size, weight.shape[1])

        return {**self._lookups(batch), "stacked": stacked}

    def _lookups(self, batch: IdBatch) -> dict[str, Callable[[], list[Tensor]]]:
        """With offsets; with ids in two dimensions, as bags are of one length; as `nn.Embedding` where it is 1."""
        sparse = self._sparse
        tables = [
            (weight, ids, ids.view(-1), offsets)
            for weight, (ids, offsets) in zip(self._weights, batch.tables, strict=True)
        ]
        lookups: dict[str, Callable[[], list[Tensor]]] = {
            "offsets": lambda: [
                embedding_bag(flat, weight, offsets, mode="sum", sparse=sparse, include_last_offset=True)
                for weight, _, flat, offsets in tables
            ],
            "2-D": lambda: [embedding_bag(ids, weight, mode="sum", sparse=sparse) for weight, ids, _, _ in tables],
        }
        if all(ids.shape[1] == 1 for ids, _ in batch.tables):
            lookups["nn.Embedding"] = lambda: [embedding(flat, weight, sparse=sparse) for weight, _, flat, _ in tables]
        return lookups

    def pooled(self, output: object) -> Tensor:
        """The tables' outputs side by side."""
        return torch.cat(tuple(cast("Iterable[Tensor]", output)), dim=1).detach()

    def stored_rows(self, table: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rows by indexing."""
        return self._weights[table].detach()[torch.from_numpy(ids)].double().numpy()


class TorchTraining(TorchBags):
    """The same with sparse gradients and an optimizer over all tables: torch's, or a loop where it has none.

    Args:
        row_format: "fp32".
        optimizer: One of `OPTIMIZERS`.
        shape: The tables' sizes.
        rows: What they hold.
    """

    _sparse = True

    def __init__(self, row_format: str, optimizer: str, shape: Shape, rows: Rows) -> None:
        super().__init__(row_format, shape, rows)
        for weight in self._weights:
            weight.requires_grad_()
        self._optimizer = _OPTIMIZERS[optimizer](self._weights)

    def calls(self, batch: IdBatch) -> dict[str, Callable[[], object]]:
        """Forward in every way, then backward and update; every table's gradient lies apart, as torch has it best."""
        gradient = upstream_gradient(batch.batch_size, sum(weight.shape[1] for weight in self._weights))
        gradients = [part.contiguous() for part in gradient.split([w.shape[1] for w in self._weights], dim=1)]
        return {use: partial(self._step, lookup, gradients) for use, lookup in self._lookups(batch).items()}

    def _step(self, lookup: Callable[[], list[Tensor]], gradients: Sequence[Tensor]) -> list[Tensor]:
        outputs = lookup()
        torch.autograd.backward(outputs, gradients)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return outputs


class _RowWiseAdagrad(torch.optim.Optimizer):
    """What one writes without a library for it."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__(weights, {})
        self._sums = [torch.zeros(len(weight)) for weight in weights]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # one that is never called
        """Update the rows that have gradients."""
        for weight, sums in zip(self.param_groups[0]["params"], self._sums, strict=True):
            gradient = weight.grad.coalesce()
            ids, values = gradient.indices()[0], gradient.values()
            sums_of_rows = sums[ids] + values.square().mean(dim=1)
            sums[ids] = sums_of_rows
            weight.index_add_(0, ids, values * (-LR / (sums_of_rows.sqrt() + EPS)).unsqueeze(1))


_OPTIMIZERS: dict[str, Callable[[Sequence[Tensor]], torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=LR),
    "Adagrad": partial(torch.optim.Adagrad, lr=LR, eps=EPS),
    "RowWiseAdagrad": _RowWiseAdagrad,
    "Adam": partial(torch.optim.SparseAdam, lr=LR, betas=BETAS, eps=EPS),
}
