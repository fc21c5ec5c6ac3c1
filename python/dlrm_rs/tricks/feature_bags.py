"""A module for each feature, called in turn: for features whose embeddings are not all of one kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.keyed_tensor import KeyedTensor
from dlrm_rs.named_tables import beside

__all__ = ["FeatureBags"]


class _Feature(NamedTuple):
    """What `DLRM` asks of a table."""

    feature_names: list[str]
    embedding_dim: int


class FeatureBags(nn.Module):
    """Embeddings of a `DLRM` with a module for each feature. Where all are plain, a collection needs one call for all.

    Args:
        bags: By the features' names, modules that take ids and offsets, as `EmbeddingBag`, and have an `embedding_dim`.

    Attributes:
        bags: The modules, in the order of the features.

    Example:
        >>> import torch, dlrm_rs
        >>> from dlrm_rs.tricks import FeatureBags
        >>> embeddings = FeatureBags(
        ...     {"user": dlrm_rs.QREmbeddingBag(10_000, 8, 100), "ad": dlrm_rs.EmbeddingBag(50, 8, mode="sum")}
        ... )
        >>> clicks = dlrm_rs.KeyedJaggedTensor.from_lengths_sync(
        ...     keys=["user", "ad"], values=torch.tensor([9_999, 7, 42]), lengths=torch.tensor([1, 2])
        ... )
        >>> embeddings(clicks).values().shape
        torch.Size([1, 16])
    """

    def __init__(self, bags: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._names = list(bags)
        self._dims = [_dim(name, bag) for name, bag in bags.items()]
        self.bags = nn.ModuleList(bags.values())

    def embedding_bag_configs(self) -> list[_Feature]:
        """For every feature its name and its dim."""
        return [_Feature([name], dim) for name, dim in zip(self._names, self._dims, strict=True)]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool every feature.

        Args:
            features: A KeyedJaggedTensor, ours or TorchRec's, with at least these features.

        Returns:
            A KeyedTensor, ours or TorchRec's as came in, `(B, sum of D)`.

        Raises:
            ValueError: A feature is missing; and what the modules raise.
        """
        keyed_tensor: type[KeyedTensor] = beside(type(features), "KeyedTensor")
        missing = [name for name in self._names if name not in features.keys()]  # noqa: SIM118 - no dict
        if missing:
            raise ValueError(f"features: expected the keys {self._names}, got {features.keys()}, which lack {missing}")
        pooled: list[Tensor] = []
        for name, bag in zip(self._names, self.bags, strict=True):
            part: Any = features[name]
            pooled.append(bag(part.values(), part.offsets()[:-1]))
        return keyed_tensor(self._names, self._dims, torch.cat(pooled, dim=1))


def _dim(name: str, bag: nn.Module) -> int:
    dim = getattr(bag, "embedding_dim", None)
    if not isinstance(dim, int):
        raise TypeError(f"bags: expected modules with an embedding_dim, got {type(bag).__name__} for {name!r}")
    return dim
