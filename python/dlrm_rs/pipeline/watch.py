"""Whether tables are as a batch's lookup has found them, but for the pipeline's own updates.

A user may write to tables inside of the loop, exchange their rows, freeze them or train them again. The rows of the
next batch have been looked up by then. So when the model takes them, what the tables tell of themselves is compared.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from torch import nn
from torch.autograd.graph import increment_version

from dlrm_rs.row_formats import QUANTIZED
from dlrm_rs.tables import EmbeddingTables

__all__ = ["Watch"]


class Watch:
    """Looks at tables.

    Args:
        tables: The tables.

    Example:
        >>> import torch, dlrm_rs
        >>> bags = dlrm_rs.EmbeddingBag(10, 4)
        >>> watch = Watch(bags._tables)
        >>> seen = watch.state()
        >>> watch.count([bags.weight])
        >>> watch.state() == seen
        True
        >>> _ = torch.nn.init.zeros_(bags.weight)
        >>> watch.state() == seen
        False
    """

    def __init__(self, tables: EmbeddingTables) -> None:
        self._tables = tables
        # How often each weight's version was counted up here, by its id: torch's own count has others' writes as well.
        self._own: dict[int, int] = {}
        self._lock = threading.Lock()

    def count(self, weights: Sequence[nn.Parameter]) -> None:
        """Have torch know that weights have been updated, as by every write of its own."""
        with self._lock:
            increment_version(weights)
            for weight in weights:
                self._own[id(weight)] = self._own.get(id(weight), 0) + 1

    def state(self) -> tuple[object, ...]:
        """What is another one when anybody else has changed the tables."""
        tables = self._tables
        weights = tables.weights()
        codes = [
            part._version
            for parts, row_format in zip(tables.memory.parts, tables.row_formats, strict=True)
            if row_format in QUANTIZED
            for part in parts
        ]
        with self._lock:
            versions = [weight._version - self._own.get(id(weight), 0) for weight in weights]
        return tables.changes, versions, [weight.requires_grad for weight in weights], codes
