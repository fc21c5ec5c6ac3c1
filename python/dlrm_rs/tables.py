"""The tables of a module: the engine's handle, and the Parameters over its memory.

Owns the agreement of torch and engine on where a table's rows are. The engine owns the memory; `weight` is a zero-copy
Parameter over it. torch lets anyone put other memory behind a Parameter, or another Parameter in its place
(`m.weight.data = x`, `m.weight = nn.Parameter(x)`, `load_state_dict(assign=True)`, `deepcopy`, `pickle`). So every
forward compares where the weights are, and memory that is not the engine's is adopted: its content is copied into the
engine's, and the Parameter pointed back at that. Does not know autograd, bags, or features beyond passing them to the
engine.
"""

from __future__ import annotations

import os
import threading
import weakref
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dlrm_rs._dlrm_rs import TableSet
from dlrm_rs.arguments import check_size, check_table_weight
from dlrm_rs.optim import FusedOptimizer, OptimizerSpec

__all__ = ["EmbeddingTables", "FeatureSpec", "Memory", "TableSpec"]


class TableSpec(NamedTuple):
    """A table, as the engine takes it."""

    name: str
    num_embeddings: int
    embedding_dim: int
    row_format: str


class FeatureSpec(NamedTuple):
    """What looks up in a table, as the engine takes it: `pooling` is "sum", "mean", "max" or "none"."""

    table: int
    pooling: str
    padding_idx: int | None


class _Layouts(NamedTuple):
    """Where every weight is and how: with two dimensions this tells every other place, shape or order apart."""

    addresses: list[int]
    elements: list[int]
    strides: list[tuple[int, ...]]


class Memory:
    """The engine's handle, and where its tables are.

    Attributes:
        handle: The engine's tables.
        layouts: Those of the weights while they are over the engine's memory.

    Args:
        handle: The same.
        count: `T`, the number of tables.
    """

    def __init__(self, handle: TableSet, count: int) -> None:
        weights = [torch.from_numpy(handle.weight(table)) for table in range(count)]
        states = [torch.from_numpy(state) for table in range(count) for state in handle.optimizer_state(table).values()]
        self.handle = handle
        self.layouts = _layouts(weights)
        spans = sorted(_span(tensor) for tensor in (*weights, *states) if tensor.numel())
        self._starts, self._ends = [span[0] for span in spans], [span[1] for span in spans]
        self._rows: list[weakref.ref[NDArray[np.float32]] | None] = [None] * count

    def view(self, table: int) -> Tensor:
        """The rows of a table, `(N, D)`, as the data of its weight; it keeps the memory alive."""
        rows = self.handle.weight(table)
        self._rows[table] = weakref.ref(rows)
        return torch.from_numpy(rows)

    def is_viewed(self, table: int) -> bool:
        """Whether the last `view` of a table, or a tensor made of it, still exists."""
        rows = self._rows[table]
        return rows is not None and rows() is not None

    def overlaps(self, tensor: Tensor) -> bool:
        """Whether a contiguous tensor shares memory with a table or its state."""
        start, end = _span(tensor)
        before_end = bisect_left(self._starts, end)  # the tables do not overlap: only the last that starts before can
        return before_end > 0 and self._ends[before_end - 1] > start


# Whose the engine's memory at an address is, or was: a table's rows must not be the weight of another table too.
_OWNERS: weakref.WeakValueDictionary[int, EmbeddingTables] = weakref.WeakValueDictionary()

# Held while weights are adopted: the first forward after a change may come from several threads at once. Re-entrant, as
# a signal handler may look up, and never held by another thread at a fork, whose child could not release it.
_ADOPTING = threading.RLock()
os.register_at_fork(before=_ADOPTING.acquire, after_in_parent=_ADOPTING.release, after_in_child=_ADOPTING.release)


class EmbeddingTables:
    """The engine's handle to a set of tables, and the Parameters over its memory.

    Args:
        tables: The tables, `T` of them.
        features: What looks them up, in the order of the output.
        owners: For each table the module that holds its `weight`. A weight that is there is adopted: the Parameter
            stays the same object, its content moves into the engine's memory. Otherwise one of zeros is registered.
        optimizer: The fused optimizer, or None.

    Attributes:
        memory: The engine's tables and where they are.
        optimizer: The fused optimizer, or None.
        width: Columns of the pooled output: the sum of the features' `D`.
        pooled: Whether there is one output row per bag, rather than one per id.
        pools_by_max: Whether any feature does.

    Raises:
        TypeError: A weight is not float32, or `optimizer` is not one of `dlrm_rs.optim`.
        ValueError: A weight is not of the table's shape, or a table or feature makes no sense.
        MemoryError: The tables cannot be allocated.
    """

    memory: Memory

    def __init__(
        self,
        tables: Sequence[TableSpec],
        features: Sequence[FeatureSpec],
        owners: Sequence[nn.Module],
        optimizer: OptimizerSpec | None,
    ) -> None:
        if optimizer is not None and not isinstance(optimizer, OptimizerSpec):
            raise TypeError(
                f"optimizer: expected None or one of dlrm_rs.optim, as dlrm_rs.optim.SGD(lr=0.1), got {optimizer!r}"
            )
        for name, num_embeddings, embedding_dim, _ in tables:
            check_size(f"num_embeddings of table {name!r}", num_embeddings)
            check_size(f"embedding_dim of table {name!r}", embedding_dim)
        self.tables = tuple(tables)
        self.features = tuple(features)
        self.width = sum(tables[feature.table].embedding_dim for feature in features)
        self.pooled = all(feature.pooling != "none" for feature in features)
        self.pools_by_max = any(feature.pooling == "max" for feature in features)
        self.optimizer: FusedOptimizer | None = None
        # The dictionaries in which the owners keep `weight`: a tenth of the cost of asking the modules.
        self._slots = [owner._parameters for owner in owners]
        for table, owner in enumerate(owners):
            weight = owner._parameters.get("weight")
            if weight is not None:
                self._check_weight(table, weight)
        self._algorithm = optimizer.algorithm if optimizer else None
        self.memory = self._allocate()
        # Lest the weights are made in inference mode, in which they could not be trained.
        with torch.inference_mode(False):
            for table, owner in enumerate(owners):
                if owner._parameters.get("weight") is None:
                    owner.register_parameter("weight", nn.Parameter(self.memory.view(table)))
        weights = self.weights()
        if optimizer:
            self.optimizer = FusedOptimizer(optimizer, weights, self._states(self.memory))

    @property
    def handle(self) -> TableSet:
        """The engine's tables."""
        return self.memory.handle

    def weights(self) -> list[nn.Parameter]:
        """The weight of every table, over the engine's memory; called before every use of the engine.

        Raises:
            RuntimeError: A module has no `weight` any more.
            TypeError: A weight was replaced by one of another dtype.
            ValueError: A weight was replaced by one of another shape, on another device, or of another table.
        """
        weights, layouts = self._present()
        if layouts != self.memory.layouts:
            with _ADOPTING:
                weights, layouts = self._present()
                if layouts != self.memory.layouts:  # no other thread was here first
                    self._adopt(weights, layouts)
        return weights

    def _present(self) -> tuple[list[nn.Parameter], _Layouts]:
        try:
            weights: list[nn.Parameter] = [slot["weight"] for slot in self._slots]  # type: ignore[misc]
            return weights, _layouts(weights)
        except (TypeError, KeyError):  # None, or taken away
            raise RuntimeError(
                "weight: expected a Parameter of the module, and there is none; torch.nn.utils.parametrize and pruning "
                "put a computed tensor in its place, which a table in the engine's memory cannot be"
            ) from None

    def _allocate(self) -> Memory:
        """Tables and state of zeros."""
        handle = TableSet(self.tables, self.features)
        if self._algorithm is not None:
            handle.set_optimizer(self._algorithm)
        memory = Memory(handle, len(self.tables))
        # An address may come again after its table is gone, so `_check_weight` asks the owner if it is still there.
        _OWNERS.update({address: self for address in memory.layouts.addresses if address})
        return memory

    def _states(self, memory: Memory) -> list[dict[str, Tensor]]:
        states = (memory.handle.optimizer_state(table) for table in range(len(self.tables)))
        return [{name: torch.from_numpy(array) for name, array in state.items()} for state in states]

    def _check_weight(self, table: int, weight: Tensor) -> None:
        name, *shape, _ = self.tables[table]
        check_table_weight(f"weight of table {name!r}", weight, (shape[0], shape[1]))
        owner = _OWNERS.get(weight.data_ptr())
        addresses = owner.memory.layouts.addresses if owner else []
        if owner and weight.data_ptr() in addresses:
            other = addresses.index(weight.data_ptr())
            if owner is self and other == table:
                return  # its own memory in another order, as a transpose
            # Two tables would move the one Parameter to and fro, and fused updates of one be lost to the other.
            raise ValueError(
                f"weight of table {name!r}: expected memory of its own, got that of another table, "
                f"{owner.tables[other].name!r}; give it a clone, or let one module be used in both places"
            )

    def _adopt(self, weights: Sequence[nn.Parameter], layouts: _Layouts) -> None:
        memory = self.memory
        pairs = zip(zip(*layouts, strict=True), zip(*memory.layouts, strict=True), strict=True)
        moved = [table for table, (here, home) in enumerate(pairs) if here != home]
        for table in moved:
            self._check_weight(table, weights[table])
        # Something else may still look at the memory that a weight has left: the Parameter that was there before (in an
        # optimizer, or put aside by `torch.func.functional_call`), a tensor of its data, or the weight itself in
        # another order. What it sees must not change, so the tables move to new memory and it keeps the old.
        if any(memory.is_viewed(table) for table in moved):
            memory = self._allocate()
            moved = list(range(len(self.tables)))
        # A view made in inference mode could not be trained, and a graph of this copy would be of no use.
        with torch.inference_mode(False), torch.no_grad():
            views = [memory.view(table).copy_(weights[table]) for table in moved]
            # From here on in this order: a thread that looks meanwhile, or a forward after Ctrl-C, finds weights that
            # are not where `self.memory` says until all is done, and so waits or does it again.
            if self.optimizer:
                self.optimizer.attach(weights, self._states(memory))
            for table, view in zip(moved, views, strict=True):
                weights[table].data = view
        self.memory = memory

    def __getstate__(self) -> dict[str, Any]:
        # The memory stays behind: the weights and the optimizer's state are copied by the modules that hold them.
        return {name: value for name, value in self.__dict__.items() if name != "memory"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.memory = self._allocate()
        self.weights()

    def __repr__(self) -> str:
        return f"EmbeddingTables({len(self.tables)} tables, {len(self.features)} features)"


def _layouts(weights: Sequence[Tensor]) -> _Layouts:
    # At every forward, for every table: the fastest questions that torch answers, asked the fastest way.
    return _Layouts(
        list(map(Tensor.data_ptr, weights)), list(map(Tensor.numel, weights)), list(map(Tensor.stride, weights))
    )


def _span(tensor: Tensor) -> tuple[int, int]:
    """Where a contiguous tensor begins and ends."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
