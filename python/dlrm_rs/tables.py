"""The tables of a module: the engine's handle, and the Parameters over its memory.

Owns the agreement of torch and engine on where a table's rows are. The engine owns the memory; `weight` is a zero-copy
Parameter over it. torch lets anyone put other memory behind a Parameter, or another Parameter in its place
(`m.weight.data = x`, `m.weight = nn.Parameter(x)`, `load_state_dict(assign=True)`, `deepcopy`, `pickle`). So every
forward compares addresses, and memory that is not the engine's is adopted: its content is copied into the engine's, and
the Parameter pointed back at that. Does not know autograd, bags, or features beyond passing them to the engine.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dlrm_rs._dlrm_rs import TableSet
from dlrm_rs.arguments import check_size, check_table_weight
from dlrm_rs.optim import FusedOptimizer, OptimizerSpec

__all__ = ["EmbeddingTables", "FeatureSpec", "TableSpec"]


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


# Whose the engine's memory at an address is, or was: a table's rows must not be the weight of another table too.
_OWNERS: weakref.WeakValueDictionary[int, EmbeddingTables] = weakref.WeakValueDictionary()


class EmbeddingTables:
    """The engine's handle to a set of tables, and the Parameters over its memory.

    Args:
        tables: The tables, `T` of them.
        features: What looks them up, in the order of the output.
        owners: For each table the module that holds its `weight`. A weight that is there is adopted: the Parameter
            stays the same object, its content moves into the engine's memory. Otherwise one of zeros is registered.
        optimizer: The fused optimizer, or None.

    Attributes:
        handle: The engine's tables.
        optimizer: The fused optimizer, or None.
        width: Columns of the pooled output: the sum of the features' `D`.
        pooled: Whether there is one output row per bag, rather than one per id.
        pools_by_max: Whether any feature does.

    Raises:
        TypeError: A weight is not float32, or `optimizer` is not one of `dlrm_rs.optim`.
        ValueError: A weight is not of the table's shape, or a table or feature makes no sense.
        MemoryError: The tables cannot be allocated.
    """

    handle: TableSet

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
        self._allocate(optimizer.algorithm if optimizer else None)
        for table, owner in enumerate(owners):
            if owner._parameters.get("weight") is None:
                owner.register_parameter("weight", self._new_weight(table))
        weights = self.weights()
        if optimizer:
            self.optimizer = FusedOptimizer(optimizer, weights, self._states())

    def weights(self) -> list[nn.Parameter]:
        """The weight of every table, over the engine's memory; called before every use of the engine.

        Raises:
            RuntimeError: A module has no `weight` any more.
            TypeError: A weight was replaced by one of another dtype.
            ValueError: A weight was replaced by one of another shape, on another device, or of another table.
        """
        try:
            weights: list[nn.Parameter] = [slot["weight"] for slot in self._slots]  # type: ignore[misc]
            addresses = [weight.data_ptr() for weight in weights]
        except (AttributeError, KeyError):  # None, or taken away
            raise RuntimeError(
                "weight: expected a Parameter of the module, and there is none; torch.nn.utils.parametrize and pruning "
                "put a computed tensor in its place, which a table in the engine's memory cannot be"
            ) from None
        if addresses != self._addresses:
            self._adopt(weights)
        return weights

    def _allocate(self, algorithm: str | None) -> None:
        """Make tables and state of zeros. Every weight is somewhere else from then on, and to be adopted."""
        self.handle = TableSet(self.tables, self.features)
        if algorithm is not None:
            self.handle.set_optimizer(algorithm)
        self._addresses = [-1] * len(self.tables)
        self._memory: list[weakref.ref[NDArray[np.float32]] | None] = [None] * len(self.tables)

    def _states(self) -> list[dict[str, Tensor]]:
        states = (self.handle.optimizer_state(table) for table in range(len(self.tables)))
        return [{name: torch.from_numpy(array) for name, array in state.items()} for state in states]

    def _view(self, table: int) -> Tensor:
        rows = self.handle.weight(table)
        view = torch.from_numpy(rows)  # (N, D), shares `rows` and keeps it alive
        self._addresses[table] = view.data_ptr()
        if rows.size:  # a table without rows has no memory, and address 0
            _OWNERS[view.data_ptr()] = self
        self._memory[table] = weakref.ref(rows)
        return view

    def _new_weight(self, table: int) -> nn.Parameter:
        with torch.inference_mode(False):
            return nn.Parameter(self._view(table))

    def _check_weight(self, table: int, weight: Tensor) -> None:
        name, *shape, _ = self.tables[table]
        check_table_weight(f"weight of table {name!r}", weight, (shape[0], shape[1]))
        owner = _OWNERS.get(weight.data_ptr())
        if owner is not None and weight.data_ptr() in owner._addresses:
            # Two tables would move the one Parameter to and fro, and fused updates of one be lost to the other.
            raise ValueError(
                f"weight of table {name!r}: expected memory of its own, got that of another table, "
                f"{owner.tables[owner._addresses.index(weight.data_ptr())].name!r}; give it a clone, or let one module "
                "be used in both places"
            )

    def _adopt(self, weights: Sequence[nn.Parameter]) -> None:
        moved = [table for table, weight in enumerate(weights) if weight.data_ptr() != self._addresses[table]]
        for table in moved:
            self._check_weight(table, weights[table])
        if self.optimizer:
            self.optimizer.attach(weights, self._states())
        # Something else may still look at the memory that a weight has left: the Parameter that was there before (in an
        # optimizer, or put aside by `torch.func.functional_call`), or a tensor of its data. What it sees must not
        # change, so the tables move to new memory and it keeps the old.
        if any(self._is_viewed(table) for table in moved):
            self._allocate(self.optimizer.defaults["algorithm"] if self.optimizer else None)
            moved = list(range(len(self.tables)))
            if self.optimizer:
                self.optimizer.attach(weights, self._states())
        # A view made in inference mode could not be trained, and a graph of this copy would be of no use.
        with torch.inference_mode(False), torch.no_grad():
            for table in moved:
                view = self._view(table)
                weights[table].data = view.copy_(weights[table])

    def _is_viewed(self, table: int) -> bool:
        memory = self._memory[table]
        return memory is not None and memory() is not None

    def __getstate__(self) -> dict[str, Any]:
        # The memory stays behind: the weights and the optimizer's state are copied by the modules that hold them.
        return {name: value for name, value in self.__dict__.items() if name not in ("handle", "_addresses", "_memory")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._allocate(self.optimizer.defaults["algorithm"] if self.optimizer else None)
        self.weights()

    def __repr__(self) -> str:
        return f"EmbeddingTables({len(self.tables)} tables, {len(self.features)} features)"
