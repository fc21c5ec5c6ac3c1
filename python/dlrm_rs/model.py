"""DLRM, the deep learning recommendation model of Naumov et al. 2019 (https://arxiv.org/abs/1906.00091).

```
dense features (B, P) ── bottom MLP ── x (B, D) ──┐
                                                  ├── interaction ── top MLP ── logits (B, 1)
ids (KeyedJaggedTensor) ── embeddings (B, F, D) ──┘
```

Plain PyTorch: the dense layers may be on any device, and the tables stay where their module keeps them; what crosses
is the pooled output. It asks nothing of the embeddings but their sizes and a call, so torch's own tables, TorchRec's
and ours fit alike.

Letters: `B` batch, `P` dense features, `F` sparse features, `D` dim of the embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from dlrm_rs.distributed import leave_tables_to_each_process

__all__ = ["DLRM", "PooledEmbeddings"]

INTERACTIONS = ("dot", "cat")


class PooledFeatures(Protocol):
    """What pooling gives: a `KeyedTensor`, ours or TorchRec's."""

    def values(self) -> Tensor:
        """All features side by side, `(B, sum of D)`."""

    def length_per_key(self) -> list[int]:
        """`D` of every feature."""


class PooledEmbeddings(Protocol):
    """What DLRM needs of its embeddings: `EmbeddingBagCollection`, ours or TorchRec's, has both."""

    def embedding_bag_configs(self) -> Sequence[Any]:
        """For every table an object with `feature_names` and `embedding_dim`."""

    def __call__(self, features: Any) -> PooledFeatures:
        """Pool a `KeyedJaggedTensor` into a `KeyedTensor`."""


class DLRM(nn.Module):
    """Deep learning recommendation model.

    Args:
        embeddings: A module that pools a `KeyedJaggedTensor` into a `KeyedTensor` and tells its sizes by
            `embedding_bag_configs()`, such as `EmbeddingBagCollection`.
        dense_in_features: `P`.
        bottom_mlp: Widths of the bottom MLP's layers. For the dot interaction the last is `D`.
        top_mlp: Widths of the top MLP's layers; the last is the number of logits, 1 for click prediction.
        interaction: "dot": the dot product of every pair of `x` and the features, beside `x` itself; all `D` equal.
            "cat": `x` and the features side by side; any `D`.
        interaction_itself: With the dot interaction, also the product of `x`, and of every feature, with itself.

    Attributes:
        embeddings: As given.
        bottom: The bottom MLP, ReLU after every layer.
        top: The top MLP, ReLU after every layer but the last.

    Raises:
        TypeError: `embeddings` cannot tell its sizes.
        ValueError: Sizes do not fit each other, `interaction` is neither "dot" nor "cat", or `interaction_itself` with
            "cat".

    Example:
        >>> import torch, dlrm_rs
        >>> tables = [
        ...     dlrm_rs.EmbeddingBagConfig("ads", num_embeddings=100, embedding_dim=8, feature_names=["ad"]),
        ...     dlrm_rs.EmbeddingBagConfig("users", num_embeddings=500, embedding_dim=8, feature_names=["user"]),
        ... ]
        >>> model = dlrm_rs.DLRM(
        ...     dlrm_rs.EmbeddingBagCollection(tables), dense_in_features=3, bottom_mlp=[16, 8], top_mlp=[16, 1]
        ... )
        >>> clicks = dlrm_rs.KeyedJaggedTensor.from_lengths_sync(
        ...     keys=["ad", "user"], values=torch.tensor([7, 42, 123]), lengths=torch.tensor([1, 1, 1, 0])
        ... )
        >>> model(torch.randn(2, 3), clicks).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        embeddings: nn.Module,
        dense_in_features: int,
        bottom_mlp: Sequence[int],
        top_mlp: Sequence[int],
        interaction: str = "dot",
        interaction_itself: bool = False,
    ) -> None:
        super().__init__()
        if interaction not in INTERACTIONS:
            raise ValueError(f"interaction: expected one of {INTERACTIONS}, got {interaction!r}")
        if interaction_itself and interaction != "dot":
            raise ValueError(
                f"interaction_itself: expected False with {interaction!r}, which multiplies nothing, got True"
            )
        _check_widths("dense_in_features", [dense_in_features])
        _check_widths("bottom_mlp", bottom_mlp)
        _check_widths("top_mlp", top_mlp)
        dims = _dims(embeddings)
        F, D = len(dims), bottom_mlp[-1]
        if interaction == "dot" and any(dim != D for dim in dims):
            raise ValueError(
                f"bottom_mlp: expected the last width to equal every embedding_dim for the dot interaction, "
                f"got {D} and embedding dims {sorted(set(dims))}"
            )
        self.embeddings = embeddings
        self.dense_in_features = dense_in_features
        self.interaction = interaction
        self.interaction_itself = interaction_itself
        self.embedding_dims = dims
        self.bottom = _mlp([dense_in_features, *bottom_mlp], last_relu=True)
        # Where the pairs i > j are in a flattened (F + 1, F + 1) matrix, row by row: facebookresearch/dlrm's order.
        i, j = torch.tril_indices(F + 1, F + 1, offset=0 if interaction_itself else -1)
        self.top = _mlp([D + (len(i) if interaction == "dot" else sum(dims)), *top_mlp], last_relu=False)
        if getattr(embeddings, "fused_optimizer", None) is not None:
            leave_tables_to_each_process(self)
        self.pairs: Tensor
        self.register_buffer("pairs", i * (F + 1) + j, persistent=False)

    def forward(self, dense_features: Tensor, sparse_features: Any) -> Tensor:
        """Score a batch.

        Args:
            dense_features: `(B, P)` float, on the device of the dense layers.
            sparse_features: A `KeyedJaggedTensor` of `B` bags a feature.

        Returns:
            Logits, `(B, 1)`: `torch.nn.BCEWithLogitsLoss` takes them.

        Raises:
            ValueError: The shapes are not these.
        """
        return self.score(dense_features, self.embed(sparse_features))

    def embed(self, sparse_features: Any) -> Tensor:
        """Look up and pool the ids: the half of `forward` that is embeddings alone.

        Args:
            sparse_features: A `KeyedJaggedTensor` of `B` bags a feature.

        Returns:
            `(B, sum of D)`, on the device of the embeddings.
        """
        pooled = cast(PooledEmbeddings, self.embeddings)(sparse_features)
        if list(pooled.length_per_key()) != self.embedding_dims:
            raise ValueError(
                f"embeddings: expected output of dims {self.embedding_dims}, got {list(pooled.length_per_key())}"
            )
        return pooled.values()

    def score(self, dense_features: Tensor, pooled: Tensor) -> Tensor:
        """Turn dense features and pooled embeddings into logits: the half of `forward` that is dense layers alone.

        Args:
            dense_features: `(B, P)` float, on the device of the dense layers.
            pooled: `(B, sum of D)` of `embed`, on any device.

        Returns:
            Logits, `(B, 1)`.
        """
        if dense_features.dim() != 2 or dense_features.shape[1] != self.dense_in_features:
            raise ValueError(
                f"dense_features: expected shape (B, {self.dense_in_features}), got {tuple(dense_features.shape)}"
            )
        samples, expected = (
            dense_features.shape[0],
            pooled.shape[0],
        )  # not len(), which torch.export takes for a constant
        if samples != expected:
            raise ValueError(f"dense_features: expected as many samples as sparse_features, {expected}, got {samples}")
        x = self.bottom(dense_features)  # (B, D)
        y = pooled.to(x.device).to(x.dtype)  # (B, sum of D); converted where it is used: fewer bytes to bring there
        interact = self._dot if self.interaction == "dot" else self._cat
        logits: Tensor = self.top(interact(x, y))  # (B, 1)
        return logits

    def _dot(self, x: Tensor, y: Tensor) -> Tensor:
        B, D = x.shape
        X = torch.cat([x, y], dim=1).view(B, -1, D)  # (B, F + 1, D)
        Z = X @ X.transpose(1, 2)  # (B, F + 1, F + 1)
        # index_select and not Z[:, i, j], whose backward costs more on a CPU.
        return torch.cat([x, Z.flatten(1).index_select(1, self.pairs)], dim=1)  # (B, D + pairs)

    def _cat(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, y], dim=1)  # (B, D + sum of D)


def _check_widths(name: str, widths: Sequence[int]) -> None:
    if not widths or any(isinstance(width, bool) or not isinstance(width, int) or width < 1 for width in widths):
        raise ValueError(f"{name}: expected widths of at least 1, got {list(widths)}")


def _dims(embeddings: nn.Module) -> list[int]:
    """`D` of every feature, in the order of the embeddings' output."""
    configs = getattr(embeddings, "embedding_bag_configs", None)
    if configs is None:
        raise TypeError(
            "embeddings: expected a module with embedding_bag_configs(), such as EmbeddingBagCollection, "
            f"got {type(embeddings).__name__}"
        )
    return [config.embedding_dim for config in configs() for _ in config.feature_names]


def _mlp(widths: Sequence[int], last_relu: bool) -> nn.Sequential:
    """Linear layers with ReLU between, initialised as in facebookresearch/dlrm."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        linear = nn.Linear(inputs, outputs)
        nn.init.normal_(linear.weight, 0.0, math.sqrt(2 / (inputs + outputs)))
        nn.init.normal_(linear.bias, 0.0, math.sqrt(1 / outputs))
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers if last_relu else layers[:-1])
