"""`plan`: tables on the GPU or in the memory of the host, by the arithmetic of a training step.

Of each table, a step with `B` samples of `L` ids each needs

```
id bytes      B * L * 8
rows read     B * L * row bytes                                  the lookup
rows updated  B * L * D * 4  +  B * L * 2 * (row + state bytes)  gradients read; rows and state read and written
PCIe          B * D * output bytes there, B * D * 4 back         only for tables of the host
rows swept    B * L * D * 4  +  N * 2 * (D * 4 + row + state bytes)   instead of rows updated, for tables of the GPU
```

The last since torch's gradient of a table there is as large as the table: all of it is cleared and read, and a torch
optimizer then steps all rows, touched or not.

where no row is counted less for coming twice: an upper bound. The host's memory, PCIe and the GPU run side by side, so
a step takes as long as the slowest of them: the bottleneck. Tables go to the GPU in the order of what they take off the
host per byte of the GPU's memory, as long as they fit and no step gets longer by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from dlrm_rs.collection import EmbeddingBagCollection
from dlrm_rs.optim import OptimizerSpec
from dlrm_rs.placement.hardware import Hardware
from dlrm_rs.placement.placed import PlacedEmbeddingBags
from dlrm_rs.row_formats import output_dtype as checked_output_dtype
from dlrm_rs.row_formats import row_format
from dlrm_rs.table_configs import EmbeddingBagConfig, check_tables

__all__ = ["Plan", "TablePlan", "plan"]

Place = Literal["cpu", "gpu"]

_ID_BYTES = 8


@dataclass(frozen=True)
class TablePlan:
    """A table and what a step with it costs.

    Attributes:
        name: The table's.
        place: "cpu" or "gpu".
        memory: Bytes of its rows and their state.
        ids: Ids in a step.
        id_bytes: Of these.
        read: Bytes of rows that a lookup reads.
        updated: Bytes that an update of the host reads and writes.
        swept: Bytes that an update on the GPU reads and writes.
        pcie: Bytes over the bus, the busier way.
        is_chosen: Whether the user has said where it goes.
    """

    name: str
    place: Place
    memory: int
    ids: float
    id_bytes: float
    read: float
    updated: float
    swept: float
    pcie: float
    is_chosen: bool = False

    @property
    def moved(self) -> float:
        """Bytes that lookup and update read and write where the table is."""
        return self.read + (self.updated if self.place == "cpu" else self.swept)


@dataclass(frozen=True)
class Plan:
    """Where tables go, and what a step costs. `print` it.

    Attributes:
        tables: In the order of the configs.
        hardware: What the costs are reckoned with.
        gpu_memory: Bytes that tables may take on the GPU.
        dense_flops: Floating-point operations of the dense layers in a step, backward included.
    """

    tables: tuple[TablePlan, ...]
    hardware: Hardware
    gpu_memory: int
    dense_flops: float
    _configs: tuple[EmbeddingBagConfig, ...] = field(repr=False)
    _output_dtype: torch.dtype = field(repr=False)

    @property
    def costs(self) -> dict[str, float]:
        """Seconds of a step, by what is busy."""
        on = {place: [table for table in self.tables if table.place == place] for place in ("cpu", "gpu")}
        moved = {place: sum(table.moved for table in tables) for place, tables in on.items()}
        there = sum(table.pcie for table in on["cpu"]) + sum(table.id_bytes for table in on["gpu"])
        return {
            "host memory": moved["cpu"] / self.hardware.host_bandwidth,
            "PCIe": there / self.hardware.pcie_bandwidth,
            "GPU": moved["gpu"] / self.hardware.gpu_bandwidth + self.dense_flops / self.hardware.gpu_flops,
        }

    @property
    def step(self) -> float:
        """Seconds of a step in which all parts run side by side."""
        return max(self.costs.values())

    @property
    def bottleneck(self) -> str:
        """The part that a step waits for."""
        costs = self.costs
        return max(costs, key=lambda part: costs[part])

    @property
    def gpu_bytes(self) -> int:
        """Bytes of the tables on the GPU."""
        return sum(table.memory for table in self.tables if table.place == "gpu")

    def place(self, /, **places: Place) -> Plan:
        """The same with some tables where the user wants them.

        Args:
            places: "cpu" or "gpu", by the tables' names.

        Raises:
            ValueError: No such table or place, or tables that the GPU's memory does not hold.
        """
        names = [table.name for table in self.tables]
        for name, place in places.items():
            if name not in names:
                raise ValueError(f"{name}: expected one of the tables {names}")
            if place not in ("cpu", "gpu"):
                raise ValueError(f"{name}: expected 'cpu' or 'gpu', got {place!r}")
        moved = tuple(
            replace(table, place=places[table.name], is_chosen=True) if table.name in places else table
            for table in self.tables
        )
        made = replace(self, tables=moved)
        if made.gpu_bytes > self.gpu_memory:
            raise ValueError(
                f"gpu_memory: expected {made.gpu_bytes:,} bytes for the tables on the GPU, got {self.gpu_memory:,}"
            )
        return made

    def build(
        self, optimizer: OptimizerSpec | None = None, device: torch.device | str = "cuda", **options: Any
    ) -> PlacedEmbeddingBags:
        """Make the tables.

        Args:
            optimizer: One of `dlrm_rs.optim`, for the tables of the host; a torch optimizer trains the others.
            device: Where the dense layers are, and the tables that the plan puts there.
            options: For the `EmbeddingBagCollection` of the host's tables, such as `is_weighted`.
        """
        on_device = [table.name for table in self.tables if table.place == "gpu"]
        return PlacedEmbeddingBags(
            self._configs, on_device, device, optimizer=optimizer, output_dtype=self._output_dtype, **options
        )

    def __str__(self) -> str:
        width = max(len("table"), *(len(table.name) for table in self.tables))
        lines = [f"{'table':<{width}}  place  {'memory':>10}  {'ids':>10}  {'read':>10}  {'updated':>10}  {'PCIe':>10}"]
        bus = {table.name: table.pcie if table.place == "cpu" else table.id_bytes for table in self.tables}
        lines += [
            f"{table.name:<{width}}  {table.place:<5}  {_bytes(table.memory)}  {table.ids:>10,.0f}  "
            f"{_bytes(table.read)}  {_bytes(table.moved - table.read)}  {_bytes(bus[table.name])}"
            f"{'  (as you say)' if table.is_chosen else ''}"
            for table in self.tables
        ]
        ids = sum(table.id_bytes for table in self.tables)
        lines += ["", f"a step: {_bytes(ids).strip()} of ids, {self.dense_flops / 1e9:,.1f} GFLOP in the dense layers"]
        lines += [f"  {part:<12} {1e3 * seconds:8.3f} ms" for part, seconds in self.costs.items()]
        lines += [
            f"  bottleneck: {self.bottleneck}, {1e3 * self.step:.3f} ms side by side, "
            f"{1e3 * sum(self.costs.values()):.3f} ms in turn",
            f"  GPU memory: {_bytes(self.gpu_bytes).strip()} of {_bytes(self.gpu_memory).strip()}",
        ]
        speeds = ("host_bandwidth", "pcie_bandwidth", "gpu_bandwidth", "gpu_flops")
        assumed = [name for name in speeds if name not in self.hardware.measured]
        return "\n".join([*lines, *([f"  not measured: {', '.join(assumed)}"] if assumed else [])])


def plan(
    configs: Sequence[EmbeddingBagConfig],
    gpu_memory: float,
    *,
    batch_size: int,
    ids_per_bag: Mapping[str, float] | float = 1,
    optimizer: OptimizerSpec | None = None,
    output_dtype: torch.dtype = torch.float32,
    dense_flops: float = 0.0,
    hardware: Hardware | None = None,
    places: Mapping[str, Place] | None = None,
) -> Plan:
    """Decide which tables go to the GPU.

    Args:
        configs: The tables.
        gpu_memory: Bytes that tables and the optimizer's state may take on the GPU.
        batch_size: `B`.
        ids_per_bag: Ids in a bag, by feature, or for all of them.
        optimizer: What trains the tables.
        output_dtype: Of the pooled rows that go to the GPU.
        dense_flops: Floating-point operations of the dense layers in a step, backward included.
        hardware: Speeds; by default `Hardware.measure()`.
        places: "cpu" or "gpu" for tables that are not to be decided on, by name.

    Raises:
        ValueError: A size that cannot be, a feature without ids, or places that cannot be.

    Example:
        >>> import dlrm_rs
        >>> from dlrm_rs.placement import Hardware
        >>> tables = [
        ...     dlrm_rs.EmbeddingBagConfig("users", 1_000_000, 64, ["user"]),
        ...     dlrm_rs.EmbeddingBagConfig("countries", 200, 64, ["country"]),
        ... ]
        >>> plan = dlrm_rs.plan(tables, gpu_memory=1e6, batch_size=2048, hardware=Hardware())
        >>> [(table.name, table.place) for table in plan.tables], plan.bottleneck
        ([('users', 'cpu'), ('countries', 'gpu')], 'host memory')
        >>> plan.place(countries="cpu").step > plan.step
        True
    """
    check_tables(configs)
    for name, value in (("batch_size", batch_size), ("gpu_memory", gpu_memory), ("dense_flops", dense_flops)):
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")
    dtype = checked_output_dtype(output_dtype)
    tables = tuple(_table(config, batch_size, ids_per_bag, optimizer, dtype) for config in configs)
    hardware = Hardware.measure() if hardware is None else hardware
    made = Plan(tables, hardware, int(gpu_memory), dense_flops, tuple(configs), dtype)
    if places:
        made = made.place(**places)
    return _filled(made)


def _table(
    config: EmbeddingBagConfig,
    batch_size: int,
    ids_per_bag: Mapping[str, float] | float,
    optimizer: OptimizerSpec | None,
    output_dtype: torch.dtype,
) -> TablePlan:
    features = config.feature_names
    if isinstance(ids_per_bag, Mapping):
        missing = [feature for feature in features if feature not in ids_per_bag]
        if missing:
            raise ValueError(f"ids_per_bag: expected a number for every feature, got none for {missing}")
        ids = batch_size * sum(ids_per_bag[feature] for feature in features)
    else:
        ids = batch_size * ids_per_bag * len(features)
    D = config.embedding_dim
    stored = row_format(f"data_type of table {config.name!r}", config.data_type)
    row = D * _BITS[stored] / 8
    state = 0 if optimizer is None else _state_bytes(config, optimizer)
    return TablePlan(
        config.name,
        "cpu",
        int(config.num_embeddings * (row + state)),
        ids,
        ids * _ID_BYTES,
        ids * row,
        0.0 if optimizer is None else ids * (4 * D + 2 * (row + state)),
        0.0 if optimizer is None else ids * 4 * D + config.num_embeddings * 2 * (4 * D + row + state),
        batch_size * len(features) * D * (max(output_dtype.itemsize, 4) if optimizer else output_dtype.itemsize),
    )


def _state_bytes(config: EmbeddingBagConfig, optimizer: OptimizerSpec) -> int:
    """What the optimizer keeps of a row: of a table of one row, as the engine has it."""
    one_row = replace(config, num_embeddings=1, init_fn=None)
    return EmbeddingBagCollection([one_row], optimizer=optimizer).memory_report()[config.name]["state"]


_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4, "int2": 2}


def _filled(plan: Plan) -> Plan:
    """With tables moved to the GPU while that makes no step longer."""
    hardware = plan.hardware

    def relief(table: TablePlan) -> float:
        host = (table.read + table.updated) / hardware.host_bandwidth
        return (host + (table.pcie - table.id_bytes) / hardware.pcie_bandwidth) / max(table.memory, 1)

    stored = {config.name: row_format("data_type", config.data_type) for config in plan._configs}
    for table in sorted(plan.tables, key=relief, reverse=True):
        # torch has no quantized rows that it can train, or look up on a GPU.
        if table.is_chosen or table.place == "gpu" or stored[table.name].startswith("int"):
            continue
        moved = replace(
            plan,
            tables=tuple(replace(one, place="gpu") if one.name == table.name else one for one in plan.tables),
        )
        if moved.gpu_bytes <= plan.gpu_memory and moved.step <= plan.step:
            plan = moved
    return plan


def _bytes(size: float) -> str:
    """In at most 10 characters."""
    units = ["B ", "KB", "MB", "GB", "TB"]
    power = min(int(math.log10(size) // 3), len(units) - 1) if size >= 1 else 0
    return f"{size / 1000**power:>7.1f} {units[power]}"
