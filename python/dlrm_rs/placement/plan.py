"""`plan`: tables on the GPU or in the memory of the host, by the arithmetic of a training step.

`table_plan` has that of a table. The host's memory, PCIe and the GPU run side by side, so a step takes as long as the
slowest of them: the bottleneck. Tables go to the GPU in the order of what they take off the host per byte of the GPU's
memory, as long as they fit and no step gets longer by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from dlrm_rs.arguments import check_number, check_size
from dlrm_rs.devices import Device
from dlrm_rs.optim import OptimizerSpec
from dlrm_rs.placement.hardware import Hardware
from dlrm_rs.placement.placed import PlacedEmbeddingBags
from dlrm_rs.placement.table_plan import Load, Place, TablePlan, table_plan
from dlrm_rs.placement.text import text
from dlrm_rs.row_formats import output_dtype as checked_output_dtype
from dlrm_rs.table_configs import EmbeddingBagConfig, check_tables

__all__ = ["Plan", "TablePlan", "plan"]

_CHOSEN = "as you say"


@dataclass(frozen=True)
class Plan:
    """Where tables go, and what a step costs. `print` it.

    Attributes:
        tables: In the order of the configs.
        hardware: What the costs are reckoned with.
        gpu_memory: Bytes that tables, their gradients and their optimizer's state may take on the GPU.
        dense_flops: Floating-point operations of the dense layers in a step, backward included.
    """

    tables: tuple[TablePlan, ...]
    hardware: Hardware
    gpu_memory: int
    dense_flops: float
    _configs: tuple[EmbeddingBagConfig, ...] = field(repr=False)
    _load: Load = field(repr=False)

    @property
    def costs(self) -> dict[str, float]:
        """Seconds of a step, by what is busy."""
        on = {place: [table for table in self.tables if table.place == place] for place in ("cpu", "gpu")}
        moved = {place: sum(table.moved for table in tables) for place, tables in on.items()}
        there = sum(table.bus for table in self.tables)
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
        """Bytes of the tables on the GPU, at the height of a step."""
        return sum(table.gpu_memory for table in self.tables if table.place == "gpu")

    def place(self, /, **places: Place) -> Plan:
        """The same with some tables where the user wants them.

        Args:
            places: "cpu" or "gpu", by the tables' names.

        Raises:
            ValueError: No such table or place, or tables that the GPU's memory does not hold.
        """
        by_name = {table.name: table for table in self.tables}
        for name, place in places.items():
            if name not in by_name:
                raise ValueError(f"places: expected tables {list(by_name)}, got {name!r}")
            if place not in ("cpu", "gpu"):
                raise ValueError(f"places: expected 'cpu' or 'gpu' for table {name!r}, got {place!r}")
            never = by_name[name].never_on_gpu
            if place == "gpu" and never is not None:
                raise ValueError(f"places: expected 'cpu' for table {name!r}, got 'gpu'; it has {never}")
        moved = tuple(
            replace(table, place=places[table.name], why=_CHOSEN) if table.name in places else table
            for table in self.tables
        )
        made = replace(self, tables=moved)
        if made.gpu_bytes > self.gpu_memory:
            raise ValueError(
                f"gpu_memory: expected {made.gpu_bytes:,} bytes for the tables on the GPU, got {self.gpu_memory:,}"
            )
        return made

    def build(
        self, optimizer: OptimizerSpec | None = None, device: Device | torch.device | str = "cuda"
    ) -> PlacedEmbeddingBags:
        """Make the tables.

        Args:
            optimizer: One of `dlrm_rs.optim`, for the tables of the host; a torch optimizer trains the others. It is a
                `Pipeline` that trains a model with tables of the host fastest; where there are none, a plain loop does.
            device: Where the dense layers are, and the tables that the plan puts there.

        Raises:
            ValueError: A device that cannot be, or an optimizer of no use for the tables.
            TypeError: `optimizer` is not one of `dlrm_rs.optim`.
            RuntimeError: A GPU, where there is none.
            MemoryError: The tables cannot be allocated.
        """
        return PlacedEmbeddingBags(
            self._configs,
            [table.name for table in self.tables if table.place == "gpu"],
            device,
            is_weighted=self._load.is_weighted,
            optimizer=optimizer,
            output_dtype=self._load.output_dtype,
        )

    def __str__(self) -> str:
        return text(self)


def plan(
    configs: Sequence[EmbeddingBagConfig],
    gpu_memory: float,
    *,
    batch_size: int,
    ids_per_bag: Mapping[str, float] | float = 1,
    is_weighted: bool = False,
    optimizer: OptimizerSpec | None = None,
    output_dtype: torch.dtype = torch.float32,
    dense_flops: float = 0.0,
    hardware: Hardware | None = None,
    places: Mapping[str, Place] | None = None,
) -> Plan:
    """Decide which tables go to the GPU.

    Args:
        configs: The tables.
        gpu_memory: Bytes that tables may take on the GPU, with their gradients, as large as they are, and what torch's
            optimizers keep of them and work with: two to five times the tables themselves.
        batch_size: `B`.
        ids_per_bag: Ids in a bag, by feature, or for all of them.
        is_weighted: Whether every id comes with a weight that multiplies its row.
        optimizer: What trains the tables; for those on the GPU, one of torch's that is like it.
        output_dtype: Of the pooled rows that go to the GPU.
        dense_flops: Floating-point operations of the dense layers in a step, backward included.
        hardware: Speeds; by default `Hardware.measure()`.
        places: "cpu" or "gpu" for tables that are not to be decided on, by name.

    Raises:
        ValueError: An amount that is negative, NaN or infinite, `ids_per_bag` without a feature of the tables or with
            another, places that cannot be, or tables that the GPU's memory does not hold where `places` puts them.
        TypeError: Something else than a number, one of `dlrm_rs.optim`, a `Hardware` or a mapping where one is wanted.

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
    if not isinstance(optimizer, OptimizerSpec | None):
        raise TypeError(f"optimizer: expected None or one of dlrm_rs.optim, got {optimizer!r}")
    if not isinstance(hardware, Hardware | None):
        raise TypeError(f"hardware: expected None or a dlrm_rs.placement.Hardware, got {hardware!r}")
    if not isinstance(places, Mapping | None):
        raise TypeError(f"places: expected None or 'cpu' and 'gpu' by the tables' names, got {places!r}")
    load = Load(
        check_size("batch_size", batch_size),
        _ids_by_feature(ids_per_bag, [feature for config in configs for feature in config.feature_names]),
        is_weighted,
        optimizer,
        checked_output_dtype(output_dtype),
    )
    memory, flops = int(check_number("gpu_memory", gpu_memory)), check_number("dense_flops", dense_flops)
    tables = tuple(table_plan(config, load) for config in configs)
    made = Plan(tables, hardware or Hardware.measure(), memory, flops, tuple(configs), load)
    return _filled(made.place(**places) if places else made)


def _ids_by_feature(ids_per_bag: Mapping[str, float] | float, features: Sequence[str]) -> dict[str, float]:
    if not isinstance(ids_per_bag, Mapping):
        return dict.fromkeys(features, check_number("ids_per_bag", ids_per_bag))
    missing = [feature for feature in features if feature not in ids_per_bag]
    if missing:
        raise ValueError(f"ids_per_bag: expected a number for every feature, got none for {missing}")
    unknown = [feature for feature in ids_per_bag if feature not in features]
    if unknown:
        raise ValueError(f"ids_per_bag: expected features of the tables, got {unknown}")
    return {feature: check_number(f"ids_per_bag[{feature!r}]", ids) for feature, ids in ids_per_bag.items()}


def _filled(plan: Plan) -> Plan:
    """With tables moved to the GPU while that makes no step longer."""
    hardware = plan.hardware

    def relief(table: TablePlan) -> float:
        host = (table.read + table.updated) / hardware.host_bandwidth
        return (host + (table.pcie - table.id_bytes) / hardware.pcie_bandwidth) / max(table.gpu_memory, 1)

    for table in sorted(plan.tables, key=relief, reverse=True):
        if table.why:
            continue
        moved = _with(plan, replace(table, place="gpu"))
        if moved.gpu_bytes > plan.gpu_memory:
            plan = _with(plan, replace(table, why="no room on the GPU"))
        elif moved.step > plan.step:
            plan = _with(plan, replace(table, why="on the GPU a step would be longer"))
        else:
            plan = moved
    return plan


def _with(plan: Plan, table: TablePlan) -> Plan:
    return replace(plan, tables=tuple(table if one.name == table.name else one for one in plan.tables))
