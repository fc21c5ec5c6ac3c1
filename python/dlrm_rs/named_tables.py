"""Tables by their names, and the features that look them up: what the collections share.

A collection's weights are held by one module per table, whose name is the table's, as in TorchRec: that makes the keys
of a state_dict. Does not know how rows are looked up.
"""

from __future__ import annotations

import abc
import functools
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from dlrm_rs.jagged import JaggedTensor
from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.keyed_tensor import KeyedTensor
from dlrm_rs.optim import OptimizerSpec
from dlrm_rs.owner import HoldsWeight, OwnsTables
from dlrm_rs.row_formats import output_dtype as checked_output_dtype
from dlrm_rs.table_configs import (
    EmbeddingBagConfig,
    EmbeddingConfig,
    check_tables,
    embedding_names,
    fill,
    hot_share,
    table_spec,
)
from dlrm_rs.tables import EmbeddingTables, FeatureSpec

__all__ = ["NamedTables", "Table", "as_ours", "beside", "feature_specs", "in_order", "positions"]


class NamedTables(abc.ABC, OwnsTables):
    """What a collection is, whether it pools or not.

    `abc.ABC` comes first as it does in TorchRec's collections: CPython then lays the instances out alike, and one of
    theirs can become one of ours in its place.

    Args:
        tables: The tables.

    Raises:
        ValueError: Names that cannot be.
    """

    # The submodule that has those modules.
    _holders: ClassVar[str]

    def __init__(self, tables: Sequence[EmbeddingConfig | EmbeddingBagConfig]) -> None:
        super().__init__()
        check_tables(tables)
        self._describe(tables)

    def _describe(self, tables: Sequence[Any]) -> None:
        self._configs = list(tables)
        self._features = [feature for table in tables for feature in table.feature_names]
        self._embedding_names = [name for names in embedding_names(tables) for name in names]
        # TorchRec's tables have none.
        self._scale_grad_by_freq = [bool(getattr(table, "scale_grad_by_freq", False)) for table in tables]
        self._lengths: list[int] = [table.embedding_dim for table in tables for _ in table.feature_names]

    def _make_tables(self, poolings: Sequence[str], optimizer: OptimizerSpec | None, output_dtype: torch.dtype) -> None:
        specs = [table_spec(config) for config in self._configs]
        holders = [Table() for _ in specs]
        self.add_module(
            self._holders, nn.ModuleDict({spec.name: holder for spec, holder in zip(specs, holders, strict=True)})
        )
        features = feature_specs(self._configs, [(pooling, None) for pooling in poolings])
        hot_rows = [hot_share(config, optimizer) for config in self._configs]
        dtype = checked_output_dtype(output_dtype)
        self._tables = EmbeddingTables(specs, features, holders, optimizer, dtype, hot_rows)
        for table, holder in enumerate(holders):
            holder._tables, holder._table = self._tables, table
        self.reset_parameters()

    @property
    def device(self) -> torch.device:
        """The CPU, where the tables live."""
        return torch.device("cpu")

    def reset_parameters(self) -> None:
        """Fill every table by its `init_fn`, or from U(-sqrt(1/N), sqrt(1/N))."""
        for table, config in enumerate(self._configs):
            self._tables.initialize(table, functools.partial(fill, config), whole=config.init_fn is not None)

    def _in_order(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The features of the tables, in the order of these."""
        return in_order(features, self._features)


class Table(HoldsWeight):
    """Holds the weight of one table under its name."""

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        _, num_embeddings, embedding_dim, _ = self._tables.tables[self._table]
        text = f"{num_embeddings}, {embedding_dim}, dtype={self._tables.row_formats[self._table]}"
        hot = f", hot_rows={self._tables.hot_rows[self._table]}" if self._tables.keeps_hot_rows(self._table) else ""
        return text + hot


def as_ours(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """A batch of TorchRec's as one of ours: FBGEMM's permute, which theirs runs, has no gradient of dropped weights."""
    if isinstance(features, KeyedJaggedTensor):
        return features
    variable = features.variable_stride_per_key()
    return KeyedJaggedTensor(
        features.keys(),
        features.values(),
        features.weights_or_none(),
        features.lengths(),
        features.offsets_or_none(),
        stride_per_key_per_rank=[[stride] for stride in features.stride_per_key()] if variable else None,
        inverse_indices=features.inverse_indices_or_none() if variable else None,
    )


def in_order(features: KeyedJaggedTensor, wanted: list[str]) -> KeyedJaggedTensor:
    """The wanted features of a batch, in the order of the names.

    Raises:
        ValueError: A feature is missing.
    """
    keys = features.keys()
    return features if keys == wanted else as_ours(features).permute(positions(keys, wanted))


def positions(keys: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where every wanted feature is among the keys.

    Raises:
        ValueError: One is missing.
    """
    position = {key: index for index, key in enumerate(keys)}
    missing = [feature for feature in wanted if feature not in position]
    if missing:
        raise ValueError(f"features: expected the keys {list(wanted)}, got {list(keys)}, which lack {missing}")
    return [position[feature] for feature in wanted]


_OURS = {"KeyedTensor": KeyedTensor, "JaggedTensor": JaggedTensor}


def beside(features: type, name: str) -> Any:  # not cached: torch.compile warns of caches that it looks through
    """The class of that name that lives beside a KeyedJaggedTensor class: ours beside ours, TorchRec's beside theirs.

    Raises:
        TypeError: `features` is no KeyedJaggedTensor.
    """
    if features is KeyedJaggedTensor:
        return _OURS[name]
    for base in features.__mro__:
        if base is KeyedJaggedTensor:
            return _OURS[name]
        if base.__name__ == "KeyedJaggedTensor":
            return getattr(sys.modules[base.__module__], name)
    raise TypeError(
        f"features: expected a KeyedJaggedTensor, got {features.__name__}; `lookup` takes ids and offsets, and "
        "torchrec.sparse.tensor_dict.maybe_td_to_kjt makes one of a TensorDict"
    )


def feature_specs(
    tables: Sequence[EmbeddingConfig | EmbeddingBagConfig], options: Sequence[tuple[str, int | None]]
) -> list[FeatureSpec]:
    """What looks up in each table, whose features pool and pad alike: by `options`, its pooling and `padding_idx`."""
    return [
        FeatureSpec(table, pooling, padding_idx)
        for table, (config, (pooling, padding_idx)) in enumerate(zip(tables, options, strict=True))
        for _ in config.feature_names
    ]
