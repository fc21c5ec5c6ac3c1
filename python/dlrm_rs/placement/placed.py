"""Tables of one model in two places: the host's in the engine, the device's as torch's modules."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dlrm_rs.arguments import check_pooling
from dlrm_rs.collection import EmbeddingBagCollection
from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.keyed_tensor import KeyedTensor
from dlrm_rs.named_tables import beside
from dlrm_rs.row_formats import QUANTIZED, TORCH_DTYPES, row_format
from dlrm_rs.table_configs import EmbeddingBagConfig, check_tables, embedding_names, fill

__all__ = ["PlacedEmbeddingBags"]


class PlacedEmbeddingBags(nn.Module):
    """An `EmbeddingBagCollection` of which some tables are on the device of the dense layers. A `Plan` builds it.

    Args:
        tables: All tables.
        on_device: The names of those that are on the device.
        device: Where the output is wanted.
        optimizer: For the tables of the host; those of the device are Parameters for torch's optimizers.
        output_dtype: Of the output.
        options: For the `EmbeddingBagCollection`.

    Attributes:
        host: The `EmbeddingBagCollection` of the host's tables, or None if there is none.
        device_bags: One `nn.EmbeddingBag` for each table on the device, by its name.

    Raises:
        ValueError: Names that cannot be, or tables on the device whose rows torch cannot store.

    Example:
        >>> import torch, dlrm_rs
        >>> from dlrm_rs.placement import PlacedEmbeddingBags
        >>> tables = [dlrm_rs.EmbeddingBagConfig(name, 10, 2, [name]) for name in ("large", "small")]
        >>> bags = PlacedEmbeddingBags(tables, ["small"], "cpu", optimizer=dlrm_rs.optim.SGD(lr=0.1))
        >>> features = dlrm_rs.KeyedJaggedTensor.from_lengths_sync(
        ...     ["large", "small"], torch.tensor([3, 4, 5]), torch.tensor([1, 2])
        ... )
        >>> bags(features)["small"].shape, [name for name, _ in bags.device_bags.named_parameters()]
        (torch.Size([1, 2]), ['small.weight'])
    """

    host: EmbeddingBagCollection | None

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        on_device: Collection[str],
        device: torch.device | str,
        *,
        output_dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        super().__init__()
        check_tables(tables)
        unknown = sorted(set(on_device) - {table.name for table in tables})
        if unknown:
            raise ValueError(f"on_device: expected names of tables, got {unknown}")
        self._configs = list(tables)
        self._names = embedding_names(tables)
        self._output_dtype = output_dtype
        on_host = [table for table in tables if table.name not in on_device]
        self.host = None
        if on_host:
            self.host = EmbeddingBagCollection(on_host, output_device=device, output_dtype=output_dtype, **options)
        self.device_bags = nn.ModuleDict(
            {table.name: _bags(table, device) for table in tables if table.name in on_device}
        )

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables, in their order."""
        return self._configs

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool every feature.

        Args:
            features: A KeyedJaggedTensor on the CPU.

        Returns:
            A KeyedTensor on the device, its columns in the order of the tables, as of an `EmbeddingBagCollection`.

        Raises:
            IndexError: An id is not a row of its table (on a GPU torch stops the process with an assertion instead).
            ValueError: Weights of ids, or numbers of bags of their own, for features of the device.
        """
        keyed_tensor: type[KeyedTensor] = beside(type(features), "KeyedTensor")
        pooled = None if self.host is None else self.host(features).values()  # (B, sum of the host's D)
        if len(self.device_bags) and (features.weights_or_none() is not None or features.variable_stride_per_key()):
            raise ValueError(
                "features: expected no weights of ids and as many bags of every feature, as tables are on the device; "
                "place the tables of such features on the host"
            )
        columns, at = [], 0
        for table in self._configs:
            for feature in table.feature_names:
                if table.name in self.device_bags:
                    columns.append(self._on_device(table.name, features[feature]))
                elif pooled is not None:
                    columns.append(pooled[:, at : at + table.embedding_dim])
                    at += table.embedding_dim
        names = [name for of_table in self._names for name in of_table]
        dims = [table.embedding_dim for table in self._configs for _ in table.feature_names]
        return keyed_tensor(names, dims, torch.cat(columns, dim=1))

    def _on_device(self, table: str, bags: Any) -> Tensor:
        module = self.device_bags[table]
        device = next(module.parameters()).device
        ids, offsets = (tensor.to(device, non_blocking=True) for tensor in (bags.values(), bags.offsets()))
        pooled: Tensor = module(ids, offsets.to(ids.dtype))
        return pooled.to(self._output_dtype)


def _bags(table: EmbeddingBagConfig, device: torch.device | str) -> nn.EmbeddingBag:
    stored = row_format(f"data_type of table {table.name!r}", table.data_type)
    if stored in QUANTIZED:
        raise ValueError(
            f"on_device: expected tables of rows that torch has a dtype for, got {stored} in table {table.name!r}; "
            "place it on the host"
        )
    if table.scale_grad_by_freq:
        raise ValueError(
            f"on_device: expected tables without scale_grad_by_freq, got it in table {table.name!r}, whose features "
            "torch would count one by one; place it on the host"
        )
    rows = torch.empty(table.num_embeddings, table.embedding_dim, device="cpu")
    with torch.no_grad():
        fill(table, rows, 0)
    return nn.EmbeddingBag(
        table.num_embeddings,
        table.embedding_dim,
        mode=check_pooling(f"pooling of table {table.name!r}", table.pooling),
        include_last_offset=True,
        _weight=rows.to(device, TORCH_DTYPES[stored]),
    )
