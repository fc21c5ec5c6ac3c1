"""Tables on the device of the dense layers: torch's own modules, and ids that are checked before they go there.

A bad id ends a GPU's process with an assertion that tells nothing. So ids and offsets are looked at on the host, where
they are anyway, all of them before the first goes there. A table is looked up in one call, whose gradient is then one
as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dlrm_rs.arguments import check_pooling, float_tensor, index_tensor
from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.named_tables import in_order, positions
from dlrm_rs.row_formats import QUANTIZED, TORCH_DTYPES, row_format
from dlrm_rs.table_configs import EmbeddingBagConfig, fill

__all__ = ["DeviceBags", "why_not_on_device"]


def why_not_on_device(table: EmbeddingBagConfig, *, is_weighted: bool) -> str | None:
    """What of a table torch's modules cannot do; None if they can do it all.

    Args:
        table: The table.
        is_weighted: Whether every id comes with a weight.

    Raises:
        TypeError: There is no such row format.
        ValueError: There is no such pooling.
    """
    stored = row_format(f"data_type of table {table.name!r}", table.data_type)
    pooling = check_pooling(f"pooling of table {table.name!r}", table.pooling)
    if stored in QUANTIZED:
        return f"rows in {stored}, which torch does not train"
    if getattr(table, "scale_grad_by_freq", False):  # a config of TorchRec's has none
        return "scale_grad_by_freq, for which some versions of torch count other rows"
    if is_weighted and pooling != "sum":
        return f"weights of ids and {pooling} pooling, as torch weights sums alone"
    return None


class DeviceBags(nn.ModuleDict):
    """Tables on the device, an `nn.EmbeddingBag` each, by name.

    Args:
        tables: The tables.
        device: Where they are made; they move as any module does.
        is_weighted: Whether every id comes with a weight that multiplies its row.

    Raises:
        ValueError: A table that torch's modules cannot do.
    """

    def __init__(self, tables: Sequence[EmbeddingBagConfig], device: torch.device, *, is_weighted: bool) -> None:
        for table in tables:
            if why := why_not_on_device(table, is_weighted=is_weighted):
                raise ValueError(
                    f"on_device: expected tables that torch's modules can do, got table {table.name!r} with {why}; "
                    "place it on the host"
                )
        super().__init__({table.name: _bags(table, device) for table in tables})
        self._configs, self._is_weighted = list(tables), is_weighted
        self._features = [feature for table in tables for feature in table.feature_names]

    def forward(self, features: KeyedJaggedTensor) -> Mapping[str, Sequence[Tensor]]:
        """Look up and pool.

        Args:
            features: On the CPU, with at least the features of the tables.

        Returns:
            By table, what its features have pooled, `(B, D)` each.

        Raises:
            IndexError: An id is not a row of its table.
            ValueError: A feature is missing, offsets or weights cannot be, or features have numbers of bags of their
                own.
            TypeError: Ids that are not integers, or weights that are not float32.
        """
        if not self._configs:
            return {}
        self._check(features)
        bags = [_checked_bags(table, features) for table in self._configs]
        return {table.name: self._pooled(table, of_table) for table, of_table in zip(self._configs, bags, strict=True)}

    def _check(self, features: KeyedJaggedTensor) -> None:
        if features.variable_stride_per_key():
            raise ValueError(
                "features: expected as many bags of every feature, as tables are on the device, got numbers of their "
                "own; place the tables of such features on the host"
            )
        positions(features.keys(), self._features)
        is_weighted = features.weights_or_none() is not None
        if is_weighted is not self._is_weighted:
            raise ValueError(
                f"features: expected {'a weight for every id' if self._is_weighted else 'no weights'}, as these tables "
                f"have is_weighted={self._is_weighted}, got {'some' if is_weighted else 'none'}"
            )

    def _pooled(self, table: EmbeddingBagConfig, bags: _Bags) -> Sequence[Tensor]:
        module = self[table.name]
        weight = module.get_parameter("weight")
        ids, offsets, weights = (None if part is None else part.to(weight.device, non_blocking=True) for part in bags)
        rows: Tensor = module(ids, offsets, None if weights is None else weights.to(weight.dtype))  # (features * B, D)
        F = len(table.feature_names)
        return rows.view(F, len(rows) // F, table.embedding_dim).unbind(0)


class _Bags(NamedTuple):
    """Of a table's features, one after another: ids `(L,)`, offsets of their dtype, and weights `(L,)` of the ids."""

    ids: Tensor
    offsets: Tensor
    weights: Tensor | None


def _checked_bags(table: EmbeddingBagConfig, features: KeyedJaggedTensor) -> _Bags:
    names = list(table.feature_names)
    own = features[names[0]] if len(names) == 1 else in_order(features, names)  # the former without a copy of ids
    ids, offsets = index_tensor("features.values()", own.values()), index_tensor("features.offsets()", own.offsets())
    weights = own.weights_or_none()
    weights = None if weights is None else float_tensor("features.weights()", weights, ids.shape)
    if offsets[0] != 0 or offsets[-1] != len(ids) or (offsets.diff() < 0).any():
        raise ValueError(
            f"features.offsets(): expected to begin at 0, never to fall, and to end after the {len(ids)} ids of the "
            f"features {names}, got a first of {int(offsets[0])}, a last of {int(offsets[-1])}, a smallest step of "
            f"{int(offsets.diff().min())}"
        )
    N = table.num_embeddings
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < N:
        bad = int(((ids < 0) | (ids >= N)).nonzero()[0])
        bag = int(torch.searchsorted(offsets, bad, right=True)) - 1
        feature, bag = divmod(bag, (len(offsets) - 1) // len(names))
        raise IndexError(
            f"features[{names[feature]!r}]: expected 0 <= id < {N}, the rows of table {table.name!r}, got "
            f"{int(ids[bad])} (bag {bag})"
        )
    return _Bags(ids, offsets.to(ids.dtype), weights)


def _bags(table: EmbeddingBagConfig, device: torch.device) -> nn.EmbeddingBag:
    rows = torch.empty(table.num_embeddings, table.embedding_dim, device="cpu")
    with torch.no_grad():
        fill(table, rows, 0)
    return nn.EmbeddingBag(
        table.num_embeddings,
        table.embedding_dim,
        mode=check_pooling(f"pooling of table {table.name!r}", table.pooling),
        include_last_offset=True,
        _weight=rows.to(device, TORCH_DTYPES[row_format("data_type", table.data_type)]),
    )
