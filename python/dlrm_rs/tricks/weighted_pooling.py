"""Weighted pooling: every row of a table has a factor of its own in the sum of a bag (facebookresearch/dlrm)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlrm_rs.arguments import index_tensor
from dlrm_rs.embedding import Embedding
from dlrm_rs.embedding_bag import EmbeddingBag
from dlrm_rs.optim import OptimizerSpec
from dlrm_rs.tricks.uniform import UniformEmbeddingBag

__all__ = ["WeightedEmbeddingBag"]


class WeightedEmbeddingBag(nn.Module):
    """Bags in which every row has a factor, learned or fixed: `--weighted-pooling` of facebookresearch/dlrm.

    Args:
        num_embeddings: `N`, rows of the table.
        embedding_dim: `D`.
        learned: Train the factors. If not, they stay as they are.
        sparse: Give rows and factors sparse gradients.
        _weight: The rows to start from.
        _factors: The factors to start from, `(N, 1)`.
        dtype: How a row is stored, as of `EmbeddingBag`. Factors are float32.
        optimizer: One of `dlrm_rs.optim`, for rows and factors: backward then updates both itself.

    Attributes:
        bag: The `EmbeddingBag`, with mode "sum", from U(-sqrt(1/N), sqrt(1/N)).
        factors: The `Embedding` of the factors, `(N, 1)`, all 1 at the start.

    Raises:
        ValueError: A size that cannot be.

    Example:
        >>> import torch, dlrm_rs
        >>> bags = dlrm_rs.WeightedEmbeddingBag(3, 2)
        >>> with torch.no_grad():
        ...     _ = bags.bag.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        ...     _ = bags.factors.weight.copy_(torch.tensor([[1.0], [0.5], [2.0]]))
        >>> bags(torch.tensor([[0, 1], [2, 2]])).detach()
        tensor([[ 2.5000,  4.0000],
                [20.0000, 24.0000]])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        learned: bool = True,
        *,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _factors: Tensor | None = None,
        dtype: torch.dtype | str | None = None,
        optimizer: OptimizerSpec | None = None,
    ) -> None:
        super().__init__()
        bound = max(num_embeddings, 1) ** -0.5
        self.bag: EmbeddingBag = UniformEmbeddingBag(
            -bound,
            bound,
            num_embeddings,
            embedding_dim,
            mode="sum",
            sparse=sparse,
            _weight=_weight,
            dtype=dtype,
            optimizer=optimizer,
        )
        self.factors = Embedding(
            num_embeddings,
            1,
            sparse=sparse,
            _weight=torch.ones(num_embeddings, 1, device="cpu") if _factors is None else _factors,
            _freeze=not learned,
            dtype=torch.float32,
            optimizer=optimizer if learned else None,
        )
        self.embedding_dim = embedding_dim

    def forward(self, input: Tensor, offsets: Tensor | None = None) -> Tensor:  # noqa: A002 - torch's name
        """Look up and pool.

        Args:
            input: Ids, as of `EmbeddingBag`.
            offsets: As of `EmbeddingBag`.

        Returns:
            `(B, D)`.

        Raises:
            IndexError: An id is not a row of the table.
            ValueError: As of `EmbeddingBag`.
            TypeError: Ids or offsets that are not integers.
        """
        ids = index_tensor("input", input)
        factors = self.factors(ids).squeeze(-1)  # of the shape of the ids
        pooled: Tensor = self.bag(ids, offsets, factors)
        return pooled
