"""Tables that start from a uniform distribution, as facebookresearch/dlrm's do, and not from torch's normal one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dlrm_rs.embedding_bag import EmbeddingBag

__all__ = ["UniformEmbeddingBag"]


class UniformEmbeddingBag(EmbeddingBag):
    """An `EmbeddingBag` that starts from U(low, high).

    Args:
        low: The lower bound.
        high: The upper bound.
        *args: As of `EmbeddingBag`.
        **kwargs: As of `EmbeddingBag`.
    """

    def __init__(self, low: float, high: float, *args: Any, **kwargs: Any) -> None:
        self._bounds = low, high  # before the rows are filled
        super().__init__(*args, **kwargs)

    def _fill(self, rows: Tensor, first: int) -> None:
        rows.uniform_(*self._bounds)

    def _get_name(self) -> str:
        return "EmbeddingBag"
