"""What a checkpoint of a DLRM has, whoever saved it, and the model that is made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dlrm_rs.collection import EmbeddingBagCollection
from dlrm_rs.model import DLRM
from dlrm_rs.optim import OptimizerSpec
from dlrm_rs.table_configs import EmbeddingBagConfig

__all__ = ["Layer", "Options", "Parts", "check_rows", "collection", "configs", "layers", "make_model"]


@dataclass(frozen=True)
class Options:
    """What the user says and a file does not; as of `load_dlrm_checkpoint`."""

    tables: Sequence[Any] | None
    interaction: str | None
    interaction_itself: bool | None
    qr_operation: str | None
    dtype: torch.dtype | str | None
    optimizer: OptimizerSpec | None


class Layer(NamedTuple):
    """A Linear: `weight` is `(out, in)`, `bias` `(out,)`."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Parts:
    """The parts of a DLRM; the top MLP's columns are in our order of the pairs."""

    embeddings: nn.Module
    bottom: Sequence[Layer]
    top: Sequence[Layer]


def layers(name: str, weights: Mapping[int, Tensor], biases: Mapping[int, Tensor]) -> list[Layer]:
    """The layers of an MLP in their order.

    Args:
        name: What they are called in messages.
        weights: By their places.
        biases: By the same.

    Raises:
        ValueError: There are none, one lacks its bias, or they do not follow each other.
    """
    if not weights or set(weights) != set(biases):
        raise ValueError(
            f"path: expected a weight and a bias of every layer of {name}, got weights {sorted(weights)} and biases "
            f"{sorted(biases)}"
        )
    found = [Layer(weights[place], biases[place]) for place in sorted(weights)]
    shapes = [(tuple(layer.weight.shape), tuple(layer.bias.shape)) for layer in found]
    fit = all(len(weight) == 2 and bias == weight[:1] for weight, bias in shapes)
    if not fit or any(after[0][1] != before[0][0] for before, after in pairwise(shapes)):
        raise ValueError(
            f"path: expected layers of {name} that take what the one before gives, got shapes of weights and biases "
            f"{shapes}"
        )
    return found


def check_rows(name: str, rows: Tensor) -> None:
    """Refuse rows of a table that are none.

    Raises:
        ValueError: Another shape than `(N, D)`, or not of a floating dtype.
    """
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(f"path: expected rows (N, D) of floats for {name}, got {tuple(rows.shape)} of {rows.dtype}")


def configs(names: Sequence[str], weights: Sequence[Tensor], options: Options) -> list[EmbeddingBagConfig]:
    """The tables of a checkpoint: what the user says of each, or a feature of its own name.

    Args:
        names: Of the tables, where the user gives none.
        weights: Of the tables, `(N, D)` each.
        options: The user's.

    Raises:
        ValueError: Tables given that are not those of the file.
    """
    given = options.tables
    for name, weight in zip(names, weights, strict=True):
        check_rows(name, weight)
    sizes = [(weight.shape[0], weight.shape[1]) for weight in weights]
    if given is None:
        return [EmbeddingBagConfig(name, N, D, [name]) for name, (N, D) in zip(names, sizes, strict=True)]
    wanted = [(table.num_embeddings, table.embedding_dim) for table in given]
    if wanted != sizes:
        raise ValueError(
            f"tables: expected those of the file, of (num_embeddings, embedding_dim) {sizes}, got {wanted}"
        )
    return [
        EmbeddingBagConfig(table.name, N, D, list(table.feature_names), table.pooling)
        for table, (N, D) in zip(given, sizes, strict=True)
    ]


def collection(
    tables: Sequence[EmbeddingBagConfig], weights: Sequence[Tensor], options: Options
) -> EmbeddingBagCollection:
    """A collection of these tables with these rows, which are copied into the engine one table after another."""

    def filled(table: EmbeddingBagConfig, weight: Tensor) -> EmbeddingBagConfig:
        data_type = options.dtype or weight.dtype
        return dataclasses.replace(table, data_type=data_type, init_fn=lambda rows: rows.copy_(weight))

    start = [filled(table, weight) for table, weight in zip(tables, weights, strict=True)]
    made = EmbeddingBagCollection(start, optimizer=options.optimizer)
    for config in start:
        config.init_fn = None  # which would keep the file
    return made


def make_model(parts: Parts, interaction: str, interaction_itself: bool) -> DLRM:
    """The model, with its weights in place."""
    model = DLRM(
        parts.embeddings,
        parts.bottom[0].weight.shape[1],
        [len(layer.weight) for layer in parts.bottom],
        [len(layer.weight) for layer in parts.top],
        interaction,
        interaction_itself,
    )
    for mlp, saved in ((model.bottom, parts.bottom), (model.top, parts.top)):
        linears = [layer for layer in mlp if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            for linear, layer in zip(linears, saved, strict=True):
                linear.weight.copy_(layer.weight)
                linear.bias.copy_(layer.bias)
    return model
