"""Batches whose features have a number of bags of their own (TorchRec's variable batch per key).

The engine looks up as many bags of every feature. So the shorter features are filled up with empty bags, which costs
offsets and no ids; afterwards every feature's columns are spread over the samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlrm_rs.arguments import index_tensor

__all__ = ["expand", "fill_up"]


def fill_up(offsets: Tensor, strides: Sequence[int]) -> Tensor:
    """Offsets of as many bags for every feature, those of the longest; the new ones are empty, and come last.

    Args:
        offsets: `(sum of strides + 1,)`.
        strides: The number of bags of every feature.

    Returns:
        `(F * max of strides + 1,)`.

    Raises:
        ValueError: Offsets of another length.

    Example:
        >>> import torch
        >>> fill_up(torch.tensor([0, 2, 5, 6]), [1, 2])  # [2 ids], [3 ids, 1 id]
        tensor([0, 2, 2, 5, 6])
    """
    if offsets.numel() != sum(strides) + 1:
        raise ValueError(
            f"features.offsets(): expected {sum(strides) + 1} elements, one more than the bags of strides "
            f"{list(strides)}, got {offsets.numel()}"
        )
    counts = torch.tensor(strides, device="cpu")[:, None]  # (F, 1)
    firsts = counts.cumsum(0) - counts  # (F, 1)
    bags = torch.arange(max(strides), device="cpu").minimum(counts) + firsts  # (F, B): a feature's end for the new ones
    return torch.cat([offsets[bags.flatten()], offsets[-1:]])


def expand(
    pooled: Tensor,
    names: Sequence[str],
    dims: Sequence[int],
    strides: Sequence[int],
    inverse_indices: tuple[Sequence[str], Tensor] | None,
) -> Tensor:
    """Give every sample the pooled rows of its bags.

    Args:
        pooled: `(max of strides, sum of D)`.
        names: Of the features.
        dims: `D` of every feature.
        strides: The number of bags of every feature.
        inverse_indices: Names of features, and the bag of every sample, `(F, B)`. None if the bags are the samples'.

    Returns:
        `(B, sum of D)`, differentiable in `pooled`.

    Raises:
        ValueError: There are no inverse indices, and strides that differ; or names or shapes that do not fit.
        IndexError: An inverse index is not a bag of its feature.
    """
    if inverse_indices is None:
        if len(set(strides)) > 1:
            raise ValueError(
                f"features: expected inverse_indices where features differ in their numbers of bags, {list(strides)}, "
                "got None; give the KeyedJaggedTensor inverse_indices=(keys, bag of every sample, shape (F, B))"
            )
        return pooled
    keys, indices = inverse_indices
    indices = index_tensor("inverse_indices", indices)  # (F, B)
    if indices.dim() != 2 or len(indices) != len(keys) or not set(names) <= set(keys):
        raise ValueError(
            f"inverse_indices: expected shape (F, B) and the features {list(names)}, got {tuple(indices.shape)} and "
            f"{list(keys)}"
        )
    rows = [indices[list(keys).index(name)] for name in names]
    for name, row, stride in zip(names, rows, strides, strict=True):
        if row.numel() and not (row.min() >= 0 and row.max() < stride):
            raise IndexError(
                f"inverse_indices: expected bags of feature {name!r}, 0 to {stride - 1}, got {row.min()} to {row.max()}"
            )
    parts = [part.index_select(0, row) for part, row in zip(pooled.split(list(dims), dim=1), rows, strict=True)]
    return torch.cat(parts, dim=1)
