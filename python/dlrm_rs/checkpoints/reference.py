"""What facebookresearch/dlrm saves: `emb_l.{k}`, `bot_l.{layer}`, `top_l.{layer}`, and its tricks' parts of a table."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dlrm_rs.checkpoints.parts import Options, Parts, check_rows, collection, configs, layers, make_model
from dlrm_rs.embedding_bag import EmbeddingBag
from dlrm_rs.model import DLRM
from dlrm_rs.table_configs import EmbeddingBagConfig
from dlrm_rs.tricks import FeatureBags, PrEmbeddingBag, QREmbeddingBag, WeightedEmbeddingBag

__all__ = ["load_reference"]

# DistributedDataParallel puts "module." before a layer's number.
_LAYER = re.compile(r"(bot_l|top_l)\.(?:module\.)?(\d+)\.(weight|bias)")
_TABLE = re.compile(r"(?:emb_l\.(\d+)\.(weight|weight_q|weight_r|embs\.weight|proj\.weight))|(?:v_W_l\.(\d+))")


def load_reference(state: Mapping[str, Tensor], options: Options) -> DLRM:
    """Make a DLRM of a `state_dict` of facebookresearch/dlrm's.

    Args:
        state: The `state_dict`.
        options: The user's.

    Raises:
        ValueError: Keys or shapes that are not such a model's, or what the file leaves open and the user does not say.
    """
    mlps: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
    tables: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in state.items():
        if layer := _LAYER.fullmatch(key):
            mlps[layer[1], layer[3]][int(layer[2])] = tensor
        elif table := _TABLE.fullmatch(key):
            tables[int(table[1] or table[3])][table[2] or "v_W_l"] = tensor
        else:
            raise ValueError(f"path: expected keys of facebookresearch/dlrm, got {key!r}")
    if sorted(tables) != list(range(len(tables))):
        raise ValueError(f"path: expected tables emb_l.0 to emb_l.{len(tables) - 1}, got {sorted(tables)}")
    bottom, top = (layers(mlp, mlps[mlp, "weight"], mlps[mlp, "bias"]) for mlp in ("bot_l", "top_l"))
    parts = [tables[k] for k in range(len(tables))]
    embeddings = _embeddings(parts, len(bottom[-1].weight), options)
    dims = [config.embedding_dim for config in embeddings.embedding_bag_configs() for _ in config.feature_names]
    kind = _interaction(len(bottom[-1].weight), dims, top[0].weight.shape[1], options)
    return make_model(Parts(embeddings, bottom, top), *kind)


def _embeddings(parts: Sequence[Mapping[str, Tensor]], D: int, options: Options) -> Any:
    """One collection where all tables are plain, else a module for each."""
    names = [f"cat_{k}" for k in range(len(parts))]
    if all(set(part) == {"weight"} for part in parts):
        weights = [part["weight"] for part in parts]
        return collection(configs(names, weights, options), weights, options)
    features = _feature_names(names, parts, options)
    bags = [_bag(k, part, D, options) for k, part in enumerate(parts)]
    return FeatureBags(dict(zip(features, bags, strict=True)))


def _feature_names(names: Sequence[str], parts: Sequence[object], options: Options) -> list[str]:
    if options.tables is None:
        return list(names)
    given: Sequence[EmbeddingBagConfig] = options.tables
    features = [table.feature_names[0] for table in given if len(table.feature_names) == 1]
    if len(features) != len(parts) or any(str(getattr(t.pooling, "value", t.pooling)).lower() != "sum" for t in given):
        raise ValueError(
            f"tables: expected {len(parts)} tables of one feature and pooling 'sum' each, as the file has tables with "
            f"tricks, got {[(table.feature_names, table.pooling) for table in given]}"
        )
    return features


def _bag(k: int, part: Mapping[str, Tensor], D: int, options: Options) -> nn.Module:
    """The module of one table, by the names of its parts."""
    more: dict[str, Any] = {"dtype": options.dtype, "optimizer": options.optimizer, "sparse": options.optimizer is None}
    for name, tensor in part.items():
        check_rows(f"emb_l.{k}.{name}", tensor[:, None] if name == "v_W_l" else tensor)
    match sorted(part):
        case ["weight"]:
            N, dim = part["weight"].shape
            return EmbeddingBag(N, dim, mode="sum", _weight=part["weight"], **more)
        case ["v_W_l", "weight"]:
            N, dim = part["weight"].shape
            return WeightedEmbeddingBag(N, dim, _weight=part["weight"], _factors=part["v_W_l"][:, None], **more)
        case ["weight_q", "weight_r"]:
            return _quotient_remainder(k, part["weight_q"], part["weight_r"], D, options, more)
        case ["embs.weight"] | ["embs.weight", "proj.weight"]:
            N, dim = part["embs.weight"].shape
            projection = part.get("proj.weight")
            base = dim if projection is None else len(projection)
            bag = PrEmbeddingBag(N, dim, base, _weight=part["embs.weight"], **more)
            if projection is not None:
                bag.load_state_dict({"proj.weight": projection}, strict=False)
            return bag
    raise ValueError(f"path: expected a table, or what a trick makes of one, at emb_l.{k}, got {sorted(part)}")


def _quotient_remainder(
    k: int, q: Tensor, r: Tensor, D: int, options: Options, more: Mapping[str, Any]
) -> QREmbeddingBag:
    operation = options.qr_operation
    possible = [
        name
        for name in ("mult", "add", "concat")
        if operation in (None, name) and (q.shape[1] + r.shape[1] if name == "concat" else q.shape[1]) == D
    ]
    if len(possible) != 1:
        raise ValueError(
            "qr_operation: expected 'mult', 'add' or 'concat', --qr-operation of the run, which no file tells, for "
            f"emb_l.{k} of shapes {tuple(q.shape)} and {tuple(r.shape)} and a bottom MLP of {D}, got {operation!r}"
        )
    # How many categories there are is not saved: all that have a quotient.
    dims = [q.shape[1], r.shape[1]]
    return QREmbeddingBag(len(q) * len(r), dims, len(r), possible[0], mode="sum", _weight=[q, r], **more)


def _interaction(D: int, dims: Sequence[int], columns: int, options: Options) -> tuple[str, bool]:
    """The interaction that gives as many columns as the top MLP takes."""
    F = len(dims)
    widths = {
        ("dot", False): D + F * (F + 1) // 2,
        ("dot", True): D + (F + 1) * (F + 2) // 2,
        ("cat", False): D + sum(dims),
    }
    said = (options.interaction, options.interaction_itself)
    possible = [
        kind
        for kind, width in widths.items()
        if width == columns and all(want in (None, have) for want, have in zip(said, kind, strict=True))
    ]
    if len(possible) == 1:
        return possible[0]
    if not possible:
        raise ValueError(
            f"path: expected a top MLP for {F} tables and a bottom MLP of {D}, of as many columns as {widths} says by "
            f"interaction and interaction_itself, got {columns} with {said}; of a run of several processes all tables "
            "are needed"
        )
    raise ValueError(
        f"interaction, interaction_itself: expected one of {possible}, the run's --arch-interaction-op and -itself, "
        f"as all of them give the {columns} columns of the file's top MLP, got {said}"
    )
