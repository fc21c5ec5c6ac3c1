"""TorchRec's collections as the engine's: recognised and taken over without importing TorchRec.

Their plain, unsharded collections hold one `nn.EmbeddingBag` or `nn.Embedding` per table. Those keep their Parameters,
whose data moves into the engine's memory, and hold nothing but them from then on; the collection looks them all up in
one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from dlrm_rs.collection import EmbeddingBagCollection
from dlrm_rs.embedding_collection import EmbeddingCollection
from dlrm_rs.named_tables import NamedTables, Table, feature_specs
from dlrm_rs.optim import OptimizerSpec
from dlrm_rs.tables import EmbeddingTables, TableSpec

__all__ = ["collection_class", "embeddings_of", "tables_of", "take_over"]

# Where TorchRec has collections without torch modules inside: their rows are in FBGEMM's tables or other processes.
_BUILT = ("torchrec.quant.", "torchrec.distributed.", "torchrec.modules.fused_embedding_modules")


def collection_class(name: str, module: nn.Module) -> type[EmbeddingBagCollection | EmbeddingCollection] | None:
    """What a module of TorchRec's becomes, or None if it is no collection of its.

    Args:
        name: Of the module in its model.
        module: Any module.

    Raises:
        TypeError: A collection that has been sharded, fused or quantized, or a subclass, whose behaviour is its own.
    """
    kind = type(module)
    if kind.__module__.startswith(_BUILT) and kind.__name__.endswith("Collection"):
        raise TypeError(
            f"model: expected TorchRec's plain collections, got {kind.__module__}.{kind.__name__} at {name!r}; replace "
            "the embeddings before the model is sharded, fused or quantized, and use dlrm_rs.quantize or optimizer= in "
            "place of those"
        )
    for base in kind.__mro__:
        for ours in (EmbeddingBagCollection, EmbeddingCollection):
            if (base.__module__, base.__name__) == ("torchrec.modules.embedding_modules", ours.__name__):
                if base is not kind:
                    raise TypeError(
                        f"model: expected TorchRec's own {ours.__name__}, got {kind.__name__} at {name!r}, a subclass, "
                        f"whose behaviour a replacement would lose; give it a dlrm_rs.{ours.__name__} to call instead"
                    )
                _check_layout(kind, ours)
                return ours
    return None


def _check_layout(kind: type[nn.Module], ours: type[NamedTables]) -> None:
    """Refuse a version of TorchRec whose instances Python cannot make ours, before anything has changed."""
    try:
        object.__setattr__(kind.__new__(kind), "__class__", ours)
    except TypeError as error:
        raise TypeError(
            f"model: expected {kind.__name__} as in TorchRec 1.9, got one of another layout ({error}); make a "
            f"dlrm_rs.{ours.__name__} of the same configs and load its state_dict"
        ) from None


def embeddings_of(
    name: str, module: nn.Module, kind: type[NamedTables]
) -> list[tuple[str, nn.EmbeddingBag | nn.Embedding]]:
    """The embeddings in a collection of TorchRec's, by their names in the model.

    Args:
        name: Of the collection in its model.
        module: The collection.
        kind: What it becomes.

    Raises:
        TypeError: Something else has been put in the place of an embedding.
        ValueError: An embedding with hooks, or options that a collection's tables do not have.
    """
    holders: nn.ModuleDict = getattr(module, kind._holders)
    prefix = f"{name}.{kind._holders}".lstrip(".")
    found = [(f"{prefix}.{config.name}", holders[config.name]) for config in _configs(module, kind)]
    for place, embedding in found:
        wanted = nn.EmbeddingBag if kind is EmbeddingBagCollection else nn.Embedding
        if type(embedding) is not wanted:
            raise TypeError(
                f"model: expected a torch.nn.{wanted.__name__} at {place!r}, as TorchRec puts there, got "
                f"{type(embedding).__name__}; replace the embeddings before others take their place"
            )
        _check_embedding(place, embedding)
    return cast("list[tuple[str, nn.EmbeddingBag | nn.Embedding]]", found)


def _check_embedding(place: str, embedding: Any) -> None:
    """Refuse what the collection's one call would pass over: it does not call the embedding."""
    if "forward" in embedding.__dict__:
        raise ValueError(f"model: expected torch's forward at {place!r}, got one that was put in its place")
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        if getattr(embedding, hooks):
            raise ValueError(
                f"model: expected no hooks on {place!r}, which its collection will not call any more; hook the "
                "collection instead"
            )
    for option, default in (("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
        if getattr(embedding, option) != default:
            raise ValueError(
                f"{option} of {place!r}: expected {default}, which TorchRec makes it with, got "
                f"{getattr(embedding, option)}; set it back, or use optimizer= for updates of the touched rows alone"
            )


def tables_of(
    module: nn.Module,
    kind: type[NamedTables],
    format_of: Callable[[torch.dtype], str],
    optimizer: OptimizerSpec | None,
    hot_rows: float = 0.0,
) -> EmbeddingTables:
    """The tables of a collection, in the engine; the embeddings keep their Parameters.

    Args:
        module: The collection.
        kind: What it becomes.
        format_of: The row format for weights of a dtype.
        optimizer: The fused optimizer, or None.
        hot_rows: The share of each table's rows that are kept in fp32 while the others are in codes.
    """
    configs = _configs(module, kind)
    holders: Any = getattr(module, kind._holders)
    embeddings = [holders[config.name] for config in configs]
    specs = [
        TableSpec(config.name, bag.num_embeddings, bag.embedding_dim, format_of(bag.weight.dtype))
        for config, bag in zip(configs, embeddings, strict=True)
    ]
    features = feature_specs(configs, [(getattr(bag, "mode", "none"), bag.padding_idx) for bag in embeddings])
    shares = [hot_rows] * len(specs)
    return EmbeddingTables(specs, features, embeddings, optimizer, torch.float32, shares)  # to which theirs convert too


def take_over(module: nn.Module, kind: type[NamedTables], tables: EmbeddingTables) -> None:
    """Make a collection of TorchRec's one of the engine's, in its place.

    Args:
        module: The collection.
        kind: What it becomes.
        tables: Of `tables_of`.
    """
    collection: Any = module
    names = [config.name for config in _configs(module, kind)]
    kind._describe(collection, _configs(module, kind))
    collection.__dict__["_tables"] = tables
    collection.__class__ = kind
    for table, name in enumerate(names):
        holder = getattr(collection, kind._holders)[name]
        holder.__dict__.update(_tables=tables, _table=table)
        holder.__class__ = Table


def _configs(module: nn.Module, kind: type[NamedTables]) -> list[Any]:
    theirs: Any = module
    configs = theirs.embedding_bag_configs() if kind is EmbeddingBagCollection else theirs.embedding_configs()
    return list(configs)
