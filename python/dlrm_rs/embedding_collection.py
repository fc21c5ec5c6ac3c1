"""`EmbeddingCollection`: many tables and one call, a row for every id, by TorchRec's names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dlrm_rs import operators
from dlrm_rs.arguments import check_device, index_tensor
from dlrm_rs.jagged import JaggedTensor
from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.named_tables import NamedTables, as_ours, beside
from dlrm_rs.optim import OptimizerSpec
from dlrm_rs.table_configs import EmbeddingConfig, embedding_names

__all__ = ["EmbeddingCollection"]


class EmbeddingCollection(NamedTables):
    """Many embedding tables, looked up in one call without pooling: a row for every id.

    Args:
        tables: The tables, all of one `embedding_dim`. A feature that several tables name is called "feature@table" in
            the output.
        device: None or the CPU, where the tables live and stay.
        need_indices: Give the ids along, as the `weights` of the output.
        optimizer: One of `dlrm_rs.optim`: backward then updates the rows itself and no gradient tensor exists.
        output_dtype: Of the output: `torch.float32`, `torch.float16` or `torch.bfloat16`.

    Attributes:
        embeddings: One module per table, which holds its `weight`, `(N, D)`; quantized tables have none.
        fused_optimizer: A `torch.optim.Optimizer` for schedulers and checkpoints, or None without `optimizer`.

    Raises:
        ValueError: A name, size or device that cannot be, or dims that differ.
        TypeError: A row format or output dtype that cannot be.
        MemoryError: The tables cannot be allocated.

    Example:
        >>> import torch, dlrm_rs
        >>> rows = torch.arange(20.0).view(10, 2)
        >>> collection = dlrm_rs.EmbeddingCollection(
        ...     [dlrm_rs.EmbeddingConfig("t1", 10, 2, ["a", "b"], init_fn=lambda weight: weight.copy_(rows))]
        ... )
        >>> features = dlrm_rs.KeyedJaggedTensor.from_lengths_sync(
        ...     keys=["a", "b"], values=torch.tensor([0, 9, 4]), lengths=torch.tensor([2, 0, 0, 1])
        ... )
        >>> out = collection(features)
        >>> [bag.detach().tolist() for bag in out["a"].to_dense()]
        [[[0.0, 1.0], [18.0, 19.0]], []]
        >>> out["b"].lengths()
        tensor([0, 1])
    """

    embeddings: nn.ModuleDict
    _holders = "embeddings"

    def __init__(
        self,
        tables: Sequence[EmbeddingConfig],
        device: torch.device | str | int | None = None,
        need_indices: bool = False,
        *,
        optimizer: OptimizerSpec | None = None,
        output_dtype: torch.dtype = torch.float32,
    ) -> None:
        check_device(device)
        super().__init__(tables)
        if len(set(self._lengths)) > 1:
            raise ValueError(
                f"tables: expected one embedding_dim, got {sorted(set(self._lengths))}; make a collection for each"
            )
        self._need_indices = need_indices
        self._make_tables(["none"] * len(tables), optimizer, output_dtype)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Look up every id of every feature.

        Args:
            features: A KeyedJaggedTensor, ours or TorchRec's, on the CPU, with at least the features of the tables.
                Best in the order of the tables; other orders and other features cost a copy of the ids. Features may
                have numbers of bags of their own. Weights of ids are not looked at.

        Returns:
            For every feature a JaggedTensor, ours or TorchRec's as came in, with the feature's lengths and the rows of
            its ids, `(ids of the feature, D)`.

        Raises:
            IndexError: An id is not a row of its table.
            ValueError: A feature is missing, or ids or offsets cannot be.
            TypeError: `features` is no KeyedJaggedTensor, or ids that are not integers.
        """
        jagged_tensor = beside(type(features), "JaggedTensor")
        features = as_ours(self._in_order(features))
        ids = index_tensor("features.values()", features.values())  # (L,)
        # A feature's ids are one bag to the engine, as their order is all that counts.
        scale = self._scale_grad_by_freq
        rows = operators.lookup(self._tables, ids, features.id_bounds(), 1, scale_grad_by_freq=scale)  # (L, D)
        lengths = features.lengths().split(features.stride_per_key())
        values, *indices = features.cut(rows, ids) if self._need_indices else features.cut(rows)
        weights = indices[0] if indices else [None] * len(lengths)
        parts = zip(self._embedding_names, values, lengths, weights, strict=True)
        return {name: jagged_tensor(values=rows, lengths=bags, weights=ids) for name, rows, bags, ids in parts}

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The tables, in their order."""
        return self._configs

    def embedding_names_by_table(self) -> list[list[str]]:
        """The features of every table by the names they have in the output."""
        return embedding_names(self._configs)

    def embedding_dim(self) -> int:
        """`D`, of every table."""
        return self._lengths[0]

    def need_indices(self) -> bool:
        """Whether the output has the ids."""
        return self._need_indices

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        algorithm = self.fused_optimizer.defaults["algorithm"] if self.fused_optimizer else None
        return f"features={self._embedding_names}, optimizer={algorithm}"
