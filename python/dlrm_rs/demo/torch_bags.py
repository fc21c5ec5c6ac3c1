"""Torch's own embeddings behind the interface of `EmbeddingBagCollection`: what the demo compares with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.keyed_tensor import KeyedTensor
from dlrm_rs.table_configs import EmbeddingBagConfig


class TorchEmbeddingBags(nn.Module):
    """One `nn.EmbeddingBag` per table; the names in `state_dict()` are those of `EmbeddingBagCollection`.

    Args:
        tables: The tables, each with one feature, in the order of the batches' keys.
        sparse: Whether gradients are sparse.

    Raises:
        ValueError: A table has not exactly one feature.

    Example:
        >>> import dlrm_rs
        >>> tables = [dlrm_rs.EmbeddingBagConfig("t1", 10, 2, ["a"]), dlrm_rs.EmbeddingBagConfig("t2", 5, 3, ["b"])]
        >>> list(TorchEmbeddingBags(tables).state_dict())
        ['embedding_bags.t1.weight', 'embedding_bags.t2.weight']
    """

    def __init__(self, tables: Sequence[EmbeddingBagConfig], sparse: bool = True) -> None:
        super().__init__()
        for table in tables:
            if len(table.feature_names) != 1:
                raise ValueError(f"tables: expected one feature each, got {table.feature_names} for {table.name!r}")
        self._tables = list(tables)
        self._features = [table.feature_names[0] for table in tables]
        self._dims = [table.embedding_dim for table in tables]
        self.embedding_bags = nn.ModuleDict({table.name: _bag(table, sparse) for table in tables})

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables, in their order."""
        return self._tables

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pool every feature by a call of its table's module.

        Args:
            features: The keys are the tables' features, in their order.

        Raises:
            ValueError: The keys are others.
        """
        if features.keys() != self._features:
            raise ValueError(f"features: expected the keys {self._features}, got {features.keys()}")
        bounds = features.offset_per_key()
        starts = features.offsets()[:-1].view(len(self._features), -1)  # (F, B)
        starts = starts - starts[:, :1]  # each feature's from 0
        pooled = [
            bag(features.values()[bounds[f] : bounds[f + 1]], starts[f])
            for f, bag in enumerate(self.embedding_bags.values())
        ]
        return KeyedTensor(self._features, self._dims, torch.cat(pooled, dim=1))


def _bag(table: EmbeddingBagConfig, sparse: bool) -> nn.EmbeddingBag:
    bag = nn.EmbeddingBag(table.num_embeddings, table.embedding_dim, mode=table.pooling, sparse=sparse)
    bound = table.num_embeddings**-0.5
    nn.init.uniform_(bag.weight, -bound, bound)
    return bag
