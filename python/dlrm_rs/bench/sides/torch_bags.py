"""torch's own modules, one per table, in a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag

from dlrm_rs.bench.cases import IdBatch
from dlrm_rs.bench.rows import Rows
from dlrm_rs.data.synthetic import Shape


class TorchBags:
    """What `nn.EmbeddingBag` calls, without the module around it.

    Args:
        shape: The tables' sizes.
        row_format: "fp32".
        rows: What they hold.
    """

    name = "nn.EmbeddingBag"

    def __init__(self, shape: Shape, row_format: str, rows: Rows) -> None:
        assert row_format == "fp32", row_format
        self._weights = [torch.empty(N, shape.embedding_dim) for N in shape.num_embeddings]
        for table, weight in enumerate(self._weights):
            rows.fill(table, weight)

    def calls(self, batch: IdBatch) -> dict[str, Callable[[], object]]:
        """With offsets; with ids in two dimensions, as bags are of one length; as `nn.Embedding` where it is 1."""
        tables = [
            (weight, ids, ids.view(-1), offsets)
            for weight, (ids, offsets) in zip(self._weights, batch.tables, strict=True)
        ]
        calls: dict[str, Callable[[], object]] = {
            "offsets": lambda: [
                embedding_bag(flat, weight, offsets, mode="sum", include_last_offset=True)
                for weight, _, flat, offsets in tables
            ],
            "2-D": lambda: [embedding_bag(ids, weight, mode="sum") for weight, ids, _, _ in tables],
        }
        if all(ids.shape[1] == 1 for ids, _ in batch.tables):
            calls["nn.Embedding"] = lambda: [embedding(flat, weight) for weight, _, flat, _ in tables]
        return calls

    def pooled(self, output: object) -> Tensor:
        """The tables' outputs side by side."""
        return torch.cat(cast("list[Tensor]", output), dim=1)

    def stored_rows(self, table: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rows by indexing."""
        return self._weights[table][torch.from_numpy(ids)].double().numpy()
