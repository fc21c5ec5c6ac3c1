"""Mixed dimensions (Ginart et al. 2019, https://arxiv.org/abs/1909.11810): small dims for large tables, projected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dlrm_rs.embedding_bag import EmbeddingBag
from dlrm_rs.optim import OptimizerSpec
from dlrm_rs.tricks.uniform import UniformEmbeddingBag

__all__ = ["PrEmbeddingBag", "md_solver"]


class PrEmbeddingBag(nn.Module):
    """Bags of a small dim, projected to the dim of the others: facebookresearch/dlrm's `PrEmbeddingBag`.

    Args:
        num_embeddings: `N`, rows of the table.
        embedding_dim: Its `D`.
        base_dim: Columns of the output, at least `embedding_dim`.
        sparse: Give the table sparse gradients.
        _weight: The table's rows to start from.
        dtype: How a row is stored, as of `EmbeddingBag`.
        optimizer: One of `dlrm_rs.optim`, for the table; the projection is a torch module in any case.

    Attributes:
        embs: The `EmbeddingBag`, with mode "sum".
        proj: A Linear without bias, `embedding_dim` to `base_dim`; where these are equal, an Identity.

    Raises:
        ValueError: A size that cannot be.

    Example:
        >>> import torch, dlrm_rs
        >>> bags = dlrm_rs.PrEmbeddingBag(1000, 4, base_dim=16)
        >>> bags(torch.tensor([[3, 7], [9, 9]])).shape
        torch.Size([2, 16])
        >>> list(bags.state_dict())
        ['embs.weight', 'proj.weight']
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        base_dim: int,
        *,
        sparse: bool = True,
        _weight: Tensor | None = None,
        dtype: torch.dtype | str | None = None,
        optimizer: OptimizerSpec | None = None,
    ) -> None:
        super().__init__()
        if embedding_dim > base_dim:
            raise ValueError(f"embedding_dim: expected at most base_dim, {base_dim}, got {embedding_dim}")
        bound = (6 / max(num_embeddings + embedding_dim, 1)) ** 0.5  # Xavier's, as the original
        self.embs: EmbeddingBag = UniformEmbeddingBag(
            -bound,
            bound,
            num_embeddings,
            embedding_dim,
            mode="sum",
            sparse=sparse,
            _weight=_weight,
            dtype=dtype,
            optimizer=optimizer,
            output_dtype=torch.float32,  # that of the projection
        )
        self.proj: nn.Module = nn.Identity()
        if embedding_dim < base_dim:
            projection = nn.Linear(embedding_dim, base_dim, bias=False)
            nn.init.xavier_uniform_(projection.weight)
            self.proj = projection
        self.embedding_dim = base_dim

    def forward(
        self,
        input: Tensor,  # noqa: A002 - torch's name
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Look up, pool and project.

        Args:
            input: Ids, as of `EmbeddingBag`.
            offsets: As of `EmbeddingBag`.
            per_sample_weights: As of `EmbeddingBag`.

        Returns:
            `(B, base_dim)`.

        Raises:
            IndexError: An id is not a row of the table.
            ValueError: As of `EmbeddingBag`.
            TypeError: Ids or offsets that are not integers.
        """
        pooled = self.embs(input, offsets, per_sample_weights)  # (B, D)
        projected: Tensor = self.proj(pooled)  # (B, base_dim)
        return projected


def md_solver(num_embeddings: Sequence[int], alpha: float, base_dim: int, *, round_dim: bool = True) -> list[int]:
    """Dims for tables of different sizes: the smallest has `base_dim`, others the less the larger they are.

    The alpha-power rule, `D = base_dim * (N / smallest N) ** -alpha`, at least 1: facebookresearch/dlrm's `md_solver`
    with `d0`.

    Args:
        num_embeddings: `N` of every table.
        alpha: From 0, all dims equal, to 1, all tables of about as many elements.
        base_dim: Of the smallest table.
        round_dim: Round to powers of 2.

    Returns:
        `D` of every table.

    Raises:
        ValueError: There is an `N` below 1, or `alpha` or `base_dim` that cannot be.

    Example:
        >>> import dlrm_rs
        >>> dlrm_rs.md_solver([100, 1_000_000, 10_000], alpha=0.3, base_dim=64)
        [64, 4, 16]
    """
    if min(num_embeddings, default=0) < 1:
        raise ValueError(f"num_embeddings: expected at least one table, of at least 1 row, got {list(num_embeddings)}")
    if alpha < 0 or base_dim < 1:
        raise ValueError(f"alpha, base_dim: expected at least 0 and 1, got {alpha} and {base_dim}")
    rows = torch.tensor(num_embeddings, dtype=torch.float32, device="cpu")
    smallest = int(rows.argmin())
    dims = (base_dim * rows[smallest] ** alpha * rows**-alpha).clamp(min=1)
    dims[smallest] = base_dim
    dims = dims.round()
    if round_dim:
        dims = 2 ** dims.log2().round()
    return [int(dim) for dim in dims.tolist()]
