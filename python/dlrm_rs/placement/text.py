"""A plan in words: what goes where and why, and what a step costs, part by part."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dlrm_rs.placement.table_plan import TablePlan

if TYPE_CHECKING:
    from dlrm_rs.placement.plan import Plan

__all__ = ["text"]

_UNITS = ("B ", "KB", "MB", "GB", "TB")
_SPEEDS = ("host_bandwidth", "pcie_bandwidth", "gpu_bandwidth", "gpu_flops")


def text(plan: Plan) -> str:
    """The tables, and then the costs."""
    return "\n".join([*_tables(plan.tables), "", *_costs(plan), *_hints(plan)])


def _tables(tables: tuple[TablePlan, ...]) -> list[str]:
    width = max(len("table"), *(len(table.name) for table in tables))
    columns = ("memory", "ids", "id bytes", "read", "updated", "PCIe")
    lines = [f"{'table':<{width}}  place  " + "  ".join(f"{column:>10}" for column in columns)]
    for table in tables:
        sizes = (table.id_bytes, table.read, table.moved - table.read, table.bus)
        lines.append(
            f"{table.name:<{width}}  {table.place:<5}  {_bytes(table.memory)}  {table.ids:>10,.0f}  "
            f"{'  '.join(map(_bytes, sizes))}{f'  ({table.why})' if table.why else ''}"
        )
    return lines


def _costs(plan: Plan) -> list[str]:
    on = {place: [table for table in plan.tables if table.place == place] for place in ("cpu", "gpu")}
    read = {place: sum(table.read for table in tables) for place, tables in on.items()}
    updated = {place: sum(table.moved - table.read for table in tables) for place, tables in on.items()}
    parts = {
        "host memory": f"{_short(read['cpu'])} of rows read, {_short(updated['cpu'])} updated",
        "PCIe": f"{_short(sum(table.bus for table in on['cpu']))} of pooled rows or their gradients, "
        f"{_short(sum(table.bus for table in on['gpu']))} of ids",
        "GPU": f"{_short(read['gpu'])} of rows read, {_short(updated['gpu'])} updated; "
        f"{plan.dense_flops / 1e9:,.1f} GFLOP in the dense layers",
    }
    ids = sum(table.id_bytes for table in plan.tables)
    costs = plan.costs
    return [
        f"a step: {_short(ids)} of ids",
        *(f"  {part:<12} {1e3 * costs[part]:8.3f} ms  {what}" for part, what in parts.items()),
        f"  bottleneck: {plan.bottleneck}, {1e3 * plan.step:.3f} ms side by side, "
        f"{1e3 * sum(costs.values()):.3f} ms in turn",
        f"  GPU memory: {_short(plan.gpu_bytes)} of {_short(plan.gpu_memory)}",
    ]


def _hints(plan: Plan) -> list[str]:
    lines = []
    if all(table.place == "gpu" for table in plan.tables):
        lines.append("  all tables are on the GPU: train in a plain loop, a Pipeline has nothing to do on the CPU")
    assumed = [name for name in _SPEEDS if name not in plan.hardware.measured]
    if assumed:
        lines.append(f"  not measured: {', '.join(assumed)}")
    return lines


def _bytes(size: float) -> str:
    """In at most 10 characters."""
    power = min(int(math.log10(size) // 3), len(_UNITS) - 1) if size >= 1 else 0
    return f"{size / 1000**power:>7.1f} {_UNITS[power]}"


def _short(size: float) -> str:
    return _bytes(size).strip()
