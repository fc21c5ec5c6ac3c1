"""Tables of one model in two places: the host's in the engine, the device's as torch's modules."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from dlrm_rs.collection import EmbeddingBagCollection
from dlrm_rs.devices import Device
from dlrm_rs.devices import output_device as checked_output_device
from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.keyed_tensor import KeyedTensor
from dlrm_rs.named_tables import beside
from dlrm_rs.optim import OptimizerSpec
from dlrm_rs.placement.device_bags import DeviceBags
from dlrm_rs.row_formats import output_dtype as checked_output_dtype
from dlrm_rs.table_configs import EmbeddingBagConfig, check_tables, embedding_names

__all__ = ["PlacedEmbeddingBags"]


class PlacedEmbeddingBags(nn.Module):
    """An `EmbeddingBagCollection` of which some tables are on the device of the dense layers. A `Plan` builds it.

    Args:
        tables: All tables.
        on_device: The names of those that are on the device.
        device: Where the output is wanted.
        is_weighted: Whether every id comes with a weight that multiplies its row.
        optimizer: For the tables of the host; those of the device are Parameters for torch's optimizers.
        output_dtype: Of the output.

    Attributes:
        host: The `EmbeddingBagCollection` of the host's tables, or None if there is none; a `Pipeline` is for a model
            that has one.
        device_bags: One `nn.EmbeddingBag` for each table on the device, by its name.

    Raises:
        ValueError: Names or a device that cannot be, or tables on the device that torch's modules cannot do: quantized
            ones, with `scale_grad_by_freq`, or weighted ones that are not summed.
        TypeError: A row format or output dtype that cannot be.
        RuntimeError: A GPU, where there is none.

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
        device: Device | torch.device | str,
        *,
        is_weighted: bool = False,
        optimizer: OptimizerSpec | None = None,
        output_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_tables(tables)
        unknown = sorted(set(on_device) - {table.name for table in tables})
        if unknown:
            raise ValueError(f"on_device: expected names of tables, got {unknown}")
        self._configs = list(tables)
        self._names = [name for of_table in embedding_names(tables) for name in of_table]
        self._output_dtype = checked_output_dtype(output_dtype)
        place = checked_output_device(device)
        # First, as it may refuse tables, and those of the host may take a minute to make.
        self.device_bags = DeviceBags(
            [table for table in tables if table.name in on_device], place.torch_device, is_weighted=is_weighted
        )
        on_host = [table for table in tables if table.name not in on_device]
        self.host = None
        if on_host:
            self.host = EmbeddingBagCollection(
                on_host, is_weighted, optimizer=optimizer, output_dtype=output_dtype, output_device=place
            )

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables, in their order."""
        return self._configs

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool every feature.

        Args:
            features: A KeyedJaggedTensor on the CPU, with at least the features of the tables.

        Returns:
            A KeyedTensor on the device, its columns in the order of the tables, as of an `EmbeddingBagCollection`.

        Raises:
            IndexError: An id is not a row of its table.
            ValueError: A feature is missing, ids, offsets or weights cannot be, or features of the device have numbers
                of bags of their own.
            TypeError: `features` is no KeyedJaggedTensor, or ids that are not integers.
        """
        keyed_tensor: type[KeyedTensor] = beside(type(features), "KeyedTensor")
        there = self.device_bags(features)
        pooled = None if self.host is None else self.host(features).values()  # (B, sum of the host's D)
        columns, at = [], 0
        for table in self._configs:
            if table.name in there:
                columns += [rows.to(self._output_dtype) for rows in there[table.name]]
            elif pooled is not None:
                width = table.embedding_dim * len(table.feature_names)
                columns.append(pooled[:, at : at + width])
                at += width
        dims = [table.embedding_dim for table in self._configs for _ in table.feature_names]
        return keyed_tensor(self._names, dims, torch.cat(columns, dim=1))
