"""What `torchrec.models.dlrm.DLRM` saves: `sparse_arch`, `dense_arch` and `over_arch`.

Its pairs of features come row by row from the upper triangle, ours from the lower one; so the columns of the first top
layer are permuted.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from dlrm_rs.checkpoints.parts import Layer, Options, Parts, collection, configs, layers, make_model
from dlrm_rs.model import DLRM

__all__ = ["load_torchrec"]

_TABLE = re.compile(r"sparse_arch\.embedding_bag_collection\.embedding_bags\.([^.]+)\.weight")
_LAYER = re.compile(r"(dense_arch\.model|over_arch\.model\.0)\._mlp\.(\d+)\._linear\.(weight|bias)")
_LAST = re.compile(r"over_arch\.model\.1\.(weight|bias)")


def load_torchrec(state: Mapping[str, Tensor], options: Options) -> DLRM:
    """Make a DLRM of a `state_dict` of TorchRec's.

    Args:
        state: The `state_dict`.
        options: The user's.

    Raises:
        ValueError: Keys or shapes that are not such a model's.
    """
    mlps: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
    tables: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if table := _TABLE.fullmatch(key):
            tables[table[1]] = tensor
        elif layer := _LAYER.fullmatch(key):
            mlps[layer[1], layer[3]][int(layer[2])] = tensor
        elif last := _LAST.fullmatch(key):
            mlps["over_arch.model.0", last[1]][sys.maxsize] = tensor  # after the others
        else:
            raise ValueError(
                f"path: expected keys of torchrec.models.dlrm.DLRM, got {key!r}; of DLRM_DCN and DLRM_Projection, load "
                "into TorchRec's model and give that to dlrm_rs.replace_embeddings"
            )
    if options.interaction not in (None, "dot") or options.interaction_itself or options.qr_operation is not None:
        raise ValueError(
            "interaction, interaction_itself, qr_operation: expected None of the three, as TorchRec's DLRM has but one "
            f"form, got {options.interaction!r}, {options.interaction_itself!r} and {options.qr_operation!r}"
        )
    weights = list(tables.values())
    described = configs(list(tables), weights, options)
    bottom = layers("dense_arch", mlps["dense_arch.model", "weight"], mlps["dense_arch.model", "bias"])
    top = layers("over_arch", mlps["over_arch.model.0", "weight"], mlps["over_arch.model.0", "bias"])
    D, F = len(bottom[-1].weight), sum(len(table.feature_names) for table in described)
    columns = top[0].weight.shape[1]
    if columns != D + F * (F + 1) // 2:
        raise ValueError(
            f"path: expected over_arch of {D + F * (F + 1) // 2} columns, for {F} features and a dense_arch of {D}, "
            f"got {columns}; tell by tables=[...] which features each table has"
        )
    top[0] = Layer(lower_triangle(top[0].weight, D, F), top[0].bias)
    return make_model(Parts(collection(described, weights, options), bottom, top), "dot", False)


def lower_triangle(weight: Tensor, D: int, F: int) -> Tensor:
    """Columns for pairs of the lower triangle, from those for pairs of the upper one.

    Args:
        weight: `(out, D + F * (F + 1) / 2)`.
        D: Columns that are no pairs and stay.
        F: Features; with the dense one there are `F + 1` to pair.

    Returns:
        The same columns in another order.

    Example:
        >>> import torch
        >>> lower_triangle(torch.tensor([[9, 10, 20, 30, 21, 31, 32]]), 1, 3)  # 21 is the pair of features 2 and 1
        tensor([[ 9, 10, 20, 21, 30, 31, 32]])
    """
    upper = torch.triu_indices(F + 1, F + 1, offset=1)
    place = torch.zeros(F + 1, F + 1, dtype=torch.int64)
    place[upper[0], upper[1]] = torch.arange(upper.shape[1])
    i, j = torch.tril_indices(F + 1, F + 1, offset=-1)
    return torch.cat([weight[:, :D], weight[:, D:][:, place[j, i]]], dim=1)
