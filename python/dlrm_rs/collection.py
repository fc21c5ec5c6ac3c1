"""`EmbeddingBagCollection`: many tables and one call, by TorchRec's names."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dlrm_rs import operators
from dlrm_rs.arguments import check_device, check_pooling, float_tensor, index_tensor
from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.keyed_tensor import KeyedTensor
from dlrm_rs.optim import OptimizerSpec
from dlrm_rs.owner import HoldsWeight, OwnsTables
from dlrm_rs.row_formats import output_dtype as checked_output_dtype
from dlrm_rs.row_formats import row_format
from dlrm_rs.tables import EmbeddingTables, FeatureSpec, TableSpec
from dlrm_rs.variable_batch import expand, fill_up

__all__ = ["EmbeddingBagCollection", "EmbeddingBagConfig"]


@dataclass
class EmbeddingBagConfig:
    """A table of an `EmbeddingBagCollection`.

    Args:
        name: The table's name; its weight is `embedding_bags.{name}.weight` in a state_dict.
        num_embeddings: `N`, rows of the table.
        embedding_dim: `D`, elements of a row.
        feature_names: The features that look up in this table.
        pooling: "sum", "mean" or "max".
        data_type: How a row is stored: "fp32", "fp16", "bf16", "int8", "int4" or "int2", or a torch dtype.
        init_fn: Fills the weight in place; by default from U(-sqrt(1/N), sqrt(1/N)). Quantized rows are made of what it
            fills, a float32 tensor `(N, D)` that is there for that time.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    feature_names: list[str]
    pooling: str = "sum"
    data_type: torch.dtype | str = "fp32"
    init_fn: Callable[[Tensor], Any] | None = None


class EmbeddingBagCollection(OwnsTables):
    """Many embedding tables, looked up and pooled in one call.

    Letters: `F` features, `B` batch, `D` dim of a feature's table. The output has a feature's columns side by side:
    tables in their order, and of each table its `feature_names` in theirs.

    ```
    #              bag 0    bag 1     tables:  "t1"  N 10, D 2, features "a"
    # "a"          [0, 1]   [2]                "t2"  N 5,  D 3, features "b"
    # "b"          [4]      []
    values   [0, 1, 2, 4]             # feature-major ids
    offsets  [0, 2, 3, 4, 4]          # (F * B + 1,)
    output   [[a a b b b],            # (B, 2 + 3)
              [a a 0 0 0]]
    ```

    Args:
        tables: The tables. A feature that several tables name is called "feature@table" in the output.
        is_weighted: Whether every id comes with a weight that multiplies its row.
        device: None or the CPU, where the tables live and stay.
        optimizer: One of `dlrm_rs.optim`: backward then updates the rows itself and no gradient tensor exists.
        output_dtype: Of the output: `torch.float32`, or `torch.float16` or `torch.bfloat16`, to which sums in float32
            are rounded: half the bytes to bring to another device.

    Attributes:
        embedding_bags: One module per table, which holds its `weight`, `(N, D)`; quantized tables have none.
        fused_optimizer: A `torch.optim.Optimizer` for schedulers and checkpoints, or None without `optimizer`.

    Raises:
        ValueError: A name, size, pooling or device that cannot be.
        TypeError: A row format or output dtype that cannot be.
        MemoryError: The tables cannot be allocated.

    Example:
        >>> import torch, dlrm_rs
        >>> collection = dlrm_rs.EmbeddingBagCollection(
        ...     tables=[
        ...         dlrm_rs.EmbeddingBagConfig("t1", 10, 2, ["a"], init_fn=torch.nn.init.ones_),
        ...         dlrm_rs.EmbeddingBagConfig("t2", 5, 3, ["b"], init_fn=torch.nn.init.ones_),
        ...     ],
        ...     optimizer=dlrm_rs.optim.RowWiseAdagrad(lr=0.01),
        ... )
        >>> features = dlrm_rs.KeyedJaggedTensor.from_lengths_sync(
        ...     keys=["a", "b"], values=torch.tensor([0, 1, 2, 4]), lengths=torch.tensor([2, 1, 1, 0])
        ... )
        >>> pooled = collection(features)
        >>> pooled.values().detach()
        tensor([[2., 2., 1., 1., 1.],
                [1., 1., 0., 0., 0.]])
        >>> pooled.values().sum().backward()  # and the rows have moved
        >>> pooled["b"].shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | str | int | None = None,
        *,
        optimizer: OptimizerSpec | None = None,
        output_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_device(device)
        _check_names(tables)
        self._configs = list(tables)
        self._is_weighted = is_weighted
        self._features = [feature for table in tables for feature in table.feature_names]
        self._embedding_names = _embedding_names(tables)
        self._lengths = [table.embedding_dim for table in tables for _ in table.feature_names]
        specs = [
            TableSpec(
                config.name,
                config.num_embeddings,
                config.embedding_dim,
                row_format(f"data_type of table {config.name!r}", config.data_type),
            )
            for config in tables
        ]
        features = [
            FeatureSpec(table, check_pooling(f"pooling of table {config.name!r}", config.pooling), None)
            for table, config in enumerate(tables)
            for _ in config.feature_names
        ]
        self.embedding_bags = nn.ModuleDict({table.name: _Table() for table in tables})
        holders = cast(list[_Table], list(self.embedding_bags.values()))
        self._tables = EmbeddingTables(specs, features, holders, optimizer, checked_output_dtype(output_dtype))
        for table, holder in enumerate(holders):
            holder._tables, holder._table = self._tables, table
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill every table by its `init_fn`, or from U(-sqrt(1/N), sqrt(1/N))."""
        for table, config in enumerate(self._configs):
            self._tables.initialize(table, functools.partial(_fill, config), whole=config.init_fn is not None)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool every feature.

        Args:
            features: A KeyedJaggedTensor, ours or TorchRec's, on the CPU, with at least the features of the tables.
                Best in the order of the tables; other orders and other features cost a copy of the ids. Where features
                have numbers of bags of their own, with inverse indices.

        Returns:
            A KeyedTensor, ours or TorchRec's as came in, with a feature's columns under its name.

        Raises:
            IndexError: An id is not a row of its table, or an inverse index not a bag of its feature.
            ValueError: A feature is missing, or ids, offsets, weights or inverse indices cannot be.
            TypeError: `features` is no KeyedJaggedTensor, or ids that are not integers.
        """
        keyed_tensor = _keyed_tensor_class(type(features))  # type: ignore[arg-type] # mypy takes a class for its instance
        keys, inverse = features.keys(), features.inverse_indices_or_none()
        if keys != self._features:
            features = features.permute(_positions(keys, self._features))  # in which TorchRec's loses the inverse
        ids, offsets, weights = features.values(), features.offsets(), features.weights_or_none()
        if inverse is None and not features.variable_stride_per_key():
            values = self._lookup("features.values()", ids, "features.offsets()", offsets, weights)
        else:
            strides = features.stride_per_key()
            offsets = fill_up(offsets, strides)
            values = self._lookup("features.values()", ids, "features.offsets()", offsets, weights)
            values = expand(values, self._features, self._lengths, strides, inverse)
        return keyed_tensor(self._embedding_names, self._lengths, values)

    def lookup(self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        """Look up and pool ids that are in the order of the features already.

        Args:
            indices: `(L,)` ids, feature-major, int32 or int64.
            offsets: `(F * B + 1,)`: bag `b` of feature `f` is `indices[offsets[f * B + b] : offsets[f * B + b + 1]]`.
            per_sample_weights: `(L,)` float32, exactly if `is_weighted`.

        Returns:
            `(B, sum of D)` of the output dtype.

        Raises:
            IndexError: An id is not a row of its table.
            ValueError: Offsets of a wrong length, or that fall, begin above 0 or end beyond the ids; weights missing,
                not wanted, or NaN; tensors on another device.
            TypeError: Ids or offsets that are not integers, weights that are not float32.

        Example:
            >>> import torch, dlrm_rs
            >>> table = dlrm_rs.EmbeddingBagConfig("t", 4, 1, ["a", "b"], init_fn=torch.nn.init.ones_)
            >>> collection = dlrm_rs.EmbeddingBagCollection([table])
            >>> collection.lookup(torch.tensor([0, 1, 3]), torch.tensor([0, 2, 3])).detach()
            tensor([[2., 1.]])
        """
        return self._lookup("indices", indices, "offsets", offsets, per_sample_weights)

    def _lookup(self, ids_name: str, ids: Tensor, offsets_name: str, offsets: Tensor, weights: Tensor | None) -> Tensor:
        ids = index_tensor(ids_name, ids)  # (L,)
        offsets = index_tensor(offsets_name, offsets)  # (F * B + 1,)
        F = len(self._features)
        batch_size, rest = divmod(offsets.numel() - 1, F)
        if ids.dim() != 1 or offsets.dim() != 1:
            raise ValueError(
                f"{ids_name}, {offsets_name}: expected one dimension each, "
                f"got shapes {tuple(ids.shape)} and {tuple(offsets.shape)}"
            )
        if rest or batch_size < 0:
            raise ValueError(
                f"{offsets_name}: expected F * B + 1 elements with F = {F}, the features of this collection, "
                f"got {offsets.numel()}"
            )
        if (weights is not None) != self._is_weighted:
            raise ValueError(
                f"per_sample_weights: expected {'one per id' if self._is_weighted else 'None'}, as this collection has "
                f"is_weighted={self._is_weighted}, got {'none' if weights is None else 'some'}"
            )
        if weights is not None:
            weights = float_tensor("per_sample_weights", weights, ids.shape)
        return operators.lookup(self._tables, ids, offsets, batch_size, weights)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables, in their order."""
        return self._configs

    def embedding_names(self) -> list[str]:
        """The features by the names they have in the output, in its order."""
        return self._embedding_names

    def lengths_per_embedding(self) -> list[int]:
        """`D` of every feature, in the output's order."""
        return self._lengths

    def is_weighted(self) -> bool:
        """Whether every id comes with a weight."""
        return self._is_weighted

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        algorithm = self.fused_optimizer.defaults["algorithm"] if self.fused_optimizer else None
        return f"features={self._embedding_names}, is_weighted={self._is_weighted}, optimizer={algorithm}"


class _Table(HoldsWeight):
    """Holds the weight of one table under its name."""

    def extra_repr(self) -> str:
        _, num_embeddings, embedding_dim, _ = self._tables.tables[self._table]
        return f"{num_embeddings}, {embedding_dim}, dtype={self._tables.row_formats[self._table]}"


def _fill(config: EmbeddingBagConfig, rows: Tensor, _first: int) -> None:
    if config.init_fn is not None:
        config.init_fn(rows)
    else:
        bound = max(config.num_embeddings, 1) ** -0.5
        rows.uniform_(-bound, bound)


def _check_names(tables: Sequence[EmbeddingBagConfig]) -> None:
    if not tables:
        raise ValueError("tables: expected at least one, got none")
    for name, count in Counter(table.name for table in tables).items():
        if count > 1:
            raise ValueError(f"tables: expected names that differ, got {name!r} {count} times")
        # What torch.nn.ModuleDict cannot take as a key.
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ValueError(f"tables: expected names without '.' that are no attribute of a module, got {name!r}")
    for table in tables:
        names = table.feature_names
        if isinstance(names, str) or not names or len(set(names)) != len(names):
            raise ValueError(
                f"feature_names of table {table.name!r}: expected one or more names that differ, got {names!r}"
            )


def _embedding_names(tables: Sequence[EmbeddingBagConfig]) -> list[str]:
    tables_of = Counter(feature for table in tables for feature in table.feature_names)

    def names() -> Iterator[str]:
        for table in tables:
            for feature in table.feature_names:
                yield feature if tables_of[feature] == 1 else f"{feature}@{table.name}"

    return list(names())


def _positions(keys: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where every wanted feature is among the keys."""
    position = {key: index for index, key in enumerate(keys)}
    missing = [feature for feature in wanted if feature not in position]
    if missing:
        raise ValueError(f"features: expected the keys {list(wanted)}, got {list(keys)}, which lack {missing}")
    return [position[feature] for feature in wanted]


@functools.cache
def _keyed_tensor_class(features: type) -> Callable[[list[str], list[int], Tensor], KeyedTensor]:
    """The KeyedTensor that lives beside a KeyedJaggedTensor class: ours beside ours, TorchRec's beside TorchRec's."""
    for base in features.__mro__:
        if base is KeyedJaggedTensor:
            return KeyedTensor
        if base.__name__ == "KeyedJaggedTensor":
            found: type[KeyedTensor] = sys.modules[base.__module__].KeyedTensor
            return found
    raise TypeError(
        f"features: expected a KeyedJaggedTensor, got {features.__name__}; `lookup` takes ids and offsets, and "
        "torchrec.sparse.tensor_dict.maybe_td_to_kjt makes one of a TensorDict"
    )
