"""Tables on the device of the dense layers: torch's own modules, and ids that are checked before they go there.

A bad id ends a GPU's process with an assertion that tells nothing. So ids and offsets are looked at on the host, where
they are anyway, and go there together; a table is looked up in one call, whose gradient is then one as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dlrm_rs.arguments import check_pooling, float_tensor, index_tensor
from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.named_tables import in_order
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
        F = len(self._features)
        ids, offsets, weights = self._checked(features)
        B = (len(offsets) - 1) // F
        bounds = offsets[torch.arange(F + 1, device="cpu") * B].tolist()  # of the features' ids
        self._check_ids(ids, offsets, bounds)
        device = next(self.parameters()).device
        ids, offsets = ids.to(device, non_blocking=True), offsets.to(device, ids.dtype, non_blocking=True)
        weights = None if weights is None else weights.to(device, non_blocking=True)
        pooled, first = {}, 0
        for table, module in zip(self._configs, self.values(), strict=True):
            end = first + len(table.feature_names)
            own = slice(bounds[first], bounds[end])
            bags = offsets[first * B : end * B + 1] - bounds[first]
            of_ids = None if weights is None else weights[own].to(module.get_parameter("weight").dtype)
            rows = module(ids[own], bags, of_ids)  # ((end - first) * B, D)
            pooled[table.name] = rows.view(end - first, B, table.embedding_dim).unbind(0)
            first = end
        return pooled

    def _checked(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids `(L,)`, offsets `(F * B + 1,)` and weights of the ids, in the order of the tables."""
        if features.variable_stride_per_key():
            raise ValueError(
                "features: expected as many bags of every feature, as tables are on the device, got numbers of their "
                "own; place the tables of such features on the host"
            )
        features = in_order(features, self._features)
        ids = index_tensor("features.values()", features.values())
        offsets = index_tensor("features.offsets()", features.offsets())
        weights = features.weights_or_none()
        if (weights is not None) is not self._is_weighted:
            raise ValueError(
                f"features: expected {'a weight for every id' if self._is_weighted else 'no weights'}, as these tables "
                f"have is_weighted={self._is_weighted}, got {'none' if weights is None else 'some'}"
            )
        if weights is not None:
            weights = float_tensor("features.weights()", weights, ids.shape)
        if offsets[0] != 0 or offsets[-1] > len(ids) or (offsets.diff() < 0).any():
            raise ValueError(
                f"features.offsets(): expected to begin at 0, never to fall, and to end within {len(ids)} ids, got "
                f"{int(offsets[0])} to {int(offsets[-1])}{', falling between' if (offsets.diff() < 0).any() else ''}"
            )
        return ids, offsets, weights

    def _check_ids(self, ids: Tensor, offsets: Tensor, bounds: Sequence[int]) -> None:
        first = 0
        for table in self._configs:
            end = first + len(table.feature_names)
            own = ids[bounds[first] : bounds[end]]
            if len(own) and not 0 <= int(own.min()) <= int(own.max()) < table.num_embeddings:
                bad = int(((own < 0) | (own >= table.num_embeddings)).nonzero()[0])
                bag = int(torch.searchsorted(offsets, bounds[first] + bad, right=True)) - 1
                feature, bag = divmod(bag, (len(offsets) - 1) // len(self._features))
                raise IndexError(
                    f"features[{self._features[feature]!r}]: expected 0 <= id < {table.num_embeddings}, the rows of "
                    f"table {table.name!r}, got {int(own[bad])} (bag {bag})"
                )
            first = end


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
