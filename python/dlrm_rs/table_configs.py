"""What a table of a collection is: the user's description, its checks, and the names of its features in the output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlrm_rs.hot_rows import check_hot_rows
from dlrm_rs.optim import OptimizerSpec
from dlrm_rs.row_formats import row_format
from dlrm_rs.tables import TableSpec

__all__ = [
    "EmbeddingBagConfig",
    "EmbeddingConfig",
    "check_tables",
    "embedding_names",
    "fill",
    "hot_share",
    "table_spec",
]


@dataclass
class EmbeddingConfig:
    """A table of an `EmbeddingCollection`.

    Args:
        name: The table's name; its weight is `embeddings.{name}.weight` in a state_dict.
        num_embeddings: `N`, rows of the table.
        embedding_dim: `D`, elements of a row.
        feature_names: The features that look up in this table.
        data_type: How a row is stored: "fp32", "fp16", "bf16", "int8", "int4" or "int2", or a torch dtype.
        init_fn: Fills the weight in place; by default from U(-sqrt(1/N), sqrt(1/N)). Quantized rows are made of what it
            fills, a float32 tensor `(N, D)` that is there for that time.
        scale_grad_by_freq: Divide the gradient of a row by the number of its occurrences in the call, those of all
            features of the table together, as `torch.nn.Embedding` does.
        hot_rows: The share of the rows, those that training touches most, that are kept in fp32 while the others are in
            codes; 0 for none. For "int8", "int4" and "int2" rows with a fused optimizer.
        hot_data_type: How these are stored: "fp32".
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    feature_names: list[str]
    data_type: torch.dtype | str = "fp32"
    init_fn: Callable[[Tensor], Any] | None = None
    scale_grad_by_freq: bool = False
    hot_rows: float = 0.0
    hot_data_type: torch.dtype | str = "fp32"


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
        scale_grad_by_freq: Divide the gradient of a row by the number of its occurrences in the call, those of all
            features of the table together, as `torch.nn.EmbeddingBag` does. Not with "max".
        hot_rows: The share of the rows, those that training touches most, that are kept in fp32 while the others are in
            codes; 0 for none. For "int8", "int4" and "int2" rows with a fused optimizer.
        hot_data_type: How these are stored: "fp32".
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    feature_names: list[str]
    pooling: str = "sum"
    data_type: torch.dtype | str = "fp32"
    init_fn: Callable[[Tensor], Any] | None = None
    scale_grad_by_freq: bool = False
    hot_rows: float = 0.0
    hot_data_type: torch.dtype | str = "fp32"


def check_tables(tables: Sequence[EmbeddingConfig | EmbeddingBagConfig]) -> None:
    """Refuse tables that could not be told apart, or have no features.

    Raises:
        ValueError: No table, a name that is another's or cannot be a module's, or feature names that cannot be.
    """
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
        if getattr(table, "scale_grad_by_freq", False) and getattr(table, "pooling", None) == "max":
            raise ValueError(
                f"pooling of table {table.name!r}: expected 'sum' or 'mean' with scale_grad_by_freq, got 'max', which "
                "does not support it"
            )


def embedding_names(tables: Sequence[EmbeddingConfig | EmbeddingBagConfig]) -> list[list[str]]:
    """What the features of every table are called in the output: one that several tables name has its table's too."""
    tables_of = Counter(feature for table in tables for feature in table.feature_names)
    return [
        [name if tables_of[name] == 1 else f"{name}@{table.name}" for name in table.feature_names] for table in tables
    ]


def table_spec(config: EmbeddingConfig | EmbeddingBagConfig) -> TableSpec:
    """A table as the engine takes it.

    Raises:
        TypeError: There is no such row format.
    """
    stored = row_format(f"data_type of table {config.name!r}", config.data_type)
    return TableSpec(config.name, config.num_embeddings, config.embedding_dim, stored)


def hot_share(config: EmbeddingConfig | EmbeddingBagConfig, optimizer: OptimizerSpec | None) -> float:
    """The share of a table's rows that are to be kept in fp32.

    Raises:
        ValueError: As of `check_hot_rows`.
    """
    of = f" of table {config.name!r}"
    # A config of TorchRec's has neither.
    share, data_type = getattr(config, "hot_rows", 0.0), getattr(config, "hot_data_type", "fp32")
    return check_hot_rows(of, share, data_type, table_spec(config).row_format, trained=optimizer is not None)


def fill(config: EmbeddingConfig | EmbeddingBagConfig, rows: Tensor, _first: int) -> None:
    """Fill rows as the table's user says, or from U(-sqrt(1/N), sqrt(1/N)) as facebookresearch/dlrm."""
    if config.init_fn is not None:
        config.init_fn(rows)
    else:
        bound = max(config.num_embeddings, 1) ** -0.5
        rows.uniform_(-bound, bound)
