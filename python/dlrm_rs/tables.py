"""The tables of a module: the engine's handle, and the Parameters over its memory.

Owns the agreement of torch and engine on where a table's rows are. The engine owns the memory; `weight` is a zero-copy
Parameter over it. torch lets anyone put other memory behind a Parameter, or another Parameter in its place
(`m.weight.data = x`, `m.weight = nn.Parameter(x)`, `load_state_dict(assign=True)`, `deepcopy`, `pickle`). So every
forward compares where the weights are, and memory that is not the engine's is adopted: its content is copied into the
engine's, and the Parameter pointed back at that. A table of quantized rows has no Parameter, since torch has no dtype
for them, but `buffers`; where a fused optimizer trains them, a Parameter without elements stands in for the weight.
Does not know autograd, bags, or features beyond passing them to the engine.
"""

from __future__ import annotations

import os
import secrets
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from dlrm_rs._dlrm_rs import TableRows, TableSet
from dlrm_rs.arguments import check_size, check_table_weight
from dlrm_rs.buffers import Buffers, packed_rows, part_names
from dlrm_rs.devices import CPU, Device
from dlrm_rs.hot_rows import HOT_PARTS, hot_ways, without_marks
from dlrm_rs.layout import FeatureSpec, Layout, TableSpec
from dlrm_rs.memory import NO_WEIGHT, Layouts, Memory, layouts_of, tensors
from dlrm_rs.optim import FusedOptimizer, OptimizerSpec
from dlrm_rs.optim.waiting import new_mark
from dlrm_rs.row_formats import METHODS, QUANTIZED, TORCH_DTYPES, as_array, as_tensor

if TYPE_CHECKING:
    from dlrm_rs.operators.sharing import Sharing
    from dlrm_rs.pipeline.lane import Lane

__all__ = ["MARK", "STAND_IN", "Displaced", "EmbeddingTables", "FeatureSpec", "TableSpec"]


class Displaced(NamedTuple):
    """What was in a table before other rows took its place: with it they can be put back."""

    rows: TableRows
    row_format: str
    weight: nn.Parameter | None
    # The share of them that are kept in fp32.
    hot_rows: float


# Whose the engine's memory at an address is, or was: a table's rows must not be the weight of another table too.
_OWNERS: weakref.WeakValueDictionary[int, EmbeddingTables] = weakref.WeakValueDictionary()

# The Parameter of an owner that stands in for the weight of a quantized table with a fused optimizer: empty as well, it
# tells whether the rows are trained, ties a lookup to its backward, and is what the optimizer has its state under.
STAND_IN = "weight_stand_in"

# The Parameter of the first owner that tells whether gradients that wait have been dropped.
MARK = "weight_mark"

# Every set of tables by its key.
_TABLES: weakref.WeakValueDictionary[int, EmbeddingTables] = weakref.WeakValueDictionary()

# Rows are made a few MB at a time where a table has no weight to make them in.
_CHUNK_ELEMENTS = 1 << 20

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
            stays the same object, its content moves into the engine's memory, in the table's row format. (Where that is
            a quantized one, the owner keeps its Parameter until `release`.) Otherwise one of zeros is registered.
        optimizer: The fused optimizer, or None.
        output_dtype: Of what lookups give.
        hot_rows: For each table the share of its rows that are kept in fp32; by default none.

    Attributes:
        memory: The engine's tables and where they are.
        buffers: The rows of quantized tables as their owners have them.
        key: `(1,)` int64, by which an operator finds these tables: of all tables of all processes these alone have it.
        layout: What an operator is told of the tables beside their tensors.
        algorithm: The engine's name of the fused optimizer, or None.
        row_formats: How the rows of every table are stored.
        optimizer: The fused optimizer, or None.
        hot_rows: For each table the share of its rows that are kept in fp32 if the others are in codes; 0 for none.
        output_dtype: Of what lookups give.
        output_device: Where pooled rows go.
        width: As of `Layout`, and so are `pooled` and `pools_by_max`.
        sharing: How processes that have the same tables update them; None where they are this process's own.
        lane: That of a pipeline, which looks up ahead and updates late; None outside of its loop.
        changes: How often rows have been exchanged, or written to where torch counts no version of them.

    Raises:
        TypeError: A weight is not of a floating dtype, or `optimizer` is not one of `dlrm_rs.optim`.
        ValueError: A weight is not of the table's shape, or has numbers that the row format cannot hold, or a table or
            feature makes no sense, or `optimizer` is of no use for their row formats.
        MemoryError: The tables cannot be allocated.
    """

    memory: Memory
    layout: str
    sharing: Sharing | None = None
    lane: Lane | None = None
    changes: int = 0

    def __init__(
        self,
        tables: Sequence[TableSpec],
        features: Sequence[FeatureSpec],
        owners: Sequence[nn.Module],
        optimizer: OptimizerSpec | None,
        output_dtype: torch.dtype = torch.float32,
        hot_rows: Sequence[float] | None = None,
    ) -> None:
        if optimizer is not None:
            if not isinstance(optimizer, OptimizerSpec):
                raise TypeError(
                    f"optimizer: expected None or one of dlrm_rs.optim, as dlrm_rs.optim.SGD(lr=0.1), got {optimizer!r}"
                )
            optimizer.check_row_formats({table.row_format for table in tables})
        self.tables = tuple(map(_checked, tables))
        self.features = tuple(features)
        self.row_formats = [table.row_format for table in tables]
        self.hot_rows = [0.0] * len(tables) if hot_rows is None else list(hot_rows)
        self.output_dtype = output_dtype
        self.output_device: Device = CPU
        layout = Layout(self.tables, (), self.features, output_dtype)
        self.width, self.pooled, self.pools_by_max = layout.width, layout.pooled, layout.pools_by_max
        self.optimizer: FusedOptimizer | None = None
        # The dictionaries in which the owners keep `weight`: a tenth of the cost of asking the modules.
        self._parameters = [owner._parameters for owner in owners]
        self.buffers = Buffers(owners)
        present = [parameters.get("weight") for parameters in self._parameters]
        for table, weight in enumerate(present):
            if weight is not None:
                self._check_weight(table, weight, any_dtype=True)
        self.algorithm = optimizer.algorithm if optimizer else None
        # Whether a Parameter is to be trained that comes back after its rows were quantized.
        self._trainable = [weight is None or weight.requires_grad for weight in present]
        self._slots: list[dict[str, nn.Parameter | None]] = [{}] * len(tables)
        self._find_slots(range(len(tables)))
        self._split_bf16 = optimizer is not None and optimizer.split_bf16
        self._state_format = "fp32" if optimizer is None else optimizer.state_format
        self.key = self._new_key()
        handle = self._new_handle()
        for table, weight in enumerate(present):
            if weight is not None and weight.dtype is not TORCH_DTYPES.get(self.row_formats[table]):
                handle.swap_rows(table, self._encoded(table, weight))
                self._keep_hot(handle, table)
        self.memory = self._memory_of(handle)
        # Lest the weights are made in inference mode, in which they could not be trained.
        with torch.inference_mode(False):
            for table, weight in enumerate(present):
                if self.row_formats[table] in QUANTIZED:
                    continue
                if weight is None:
                    owners[table].register_parameter("weight", nn.Parameter(self.memory.view(table)))
                elif weight.dtype is not TORCH_DTYPES[self.row_formats[table]]:
                    weight.data = self.memory.view(table)
        for table, weight in enumerate(present):
            if weight is None:
                self._show(table)
        weights = self.weights()
        if optimizer:
            names = [table.name for table in tables]
            self.optimizer = FusedOptimizer(optimizer, names, weights, self._states(self.memory))
            if self.optimizer.gate is not None:
                self.mark()  # an optimizer that is made of the module's Parameters is to have it

    @classmethod
    def find(cls, key: Tensor) -> EmbeddingTables | None:
        """The tables of this process that have `key`, or None."""
        return _TABLES.get(int(key))

    def parts(self) -> list[Tensor]:
        """The rows of all tables as their owners have them: Parameters, and buffers where they are quantized."""
        found: list[Tensor] = []
        for table, (parameters, row_format) in enumerate(zip(self._parameters, self.row_formats, strict=True)):
            if row_format in QUANTIZED:
                found += self.buffers.parts(table)
            else:
                found.append(parameters["weight"])  # type: ignore[arg-type] # none is None
        return found

    def keeps_hot_rows(self, table: int) -> bool:
        """Whether a table keeps some of its rows in fp32 and the others in codes."""
        return len(self.memory.parts[table]) > len(HOT_PARTS)

    def any_hot_rows(self) -> bool:
        """Whether any table does."""
        return any(map(self.keeps_hot_rows, range(len(self.tables))))

    @property
    def handle(self) -> TableSet:
        """The engine's tables."""
        return self.memory.handle

    def weights(self) -> list[nn.Parameter]:
        """The weight of every table, over the engine's memory; called before every use of the engine, as `adopt` is.

        Raises:
            RuntimeError, TypeError, ValueError: As `adopt`.
        """
        self.adopt()
        return self.tied() if self._fixed is None else self._fixed

    def adopt(self) -> None:
        """Have every weight over the engine's memory, whatever has been put in its place.

        Raises:
            RuntimeError: A module has no `weight` any more, or no buffer of quantized rows.
            TypeError: A weight or buffer was replaced by one of another dtype.
            ValueError: A weight was replaced by one of another shape, on another device, or of another table; a buffer
                by what cannot be one of the row format.
        """
        if self.buffers.in_hands:
            self._take_in()
        if self._fixed is not None or self.memory.homes.have(self._slots):
            return
        _, layouts = self._present()
        if layouts != self.memory.layouts:
            with _ADOPTING:
                weights, layouts = self._present()
                if layouts != self.memory.layouts:  # no other thread was here first
                    self._take_home(weights, layouts)

    def settle(self) -> None:
        """Wait for the update that a pipeline may still be at, as rows are to be read or changed but by a lookup."""
        if self.lane is not None:
            self.lane.settle()

    def tied(self) -> list[nn.Parameter]:
        """What ties lookups of every table into a graph of autograd: `weights()`, wherever they are."""
        return [slot["weight"] for slot in self._slots]  # type: ignore[misc] # none is None

    def mark(self) -> nn.Parameter:
        """The Parameter that tells whether gradients that wait have been dropped (see `FusedOptimizer`)."""
        parameters = self._parameters[0]
        if MARK not in parameters:
            parameters[MARK] = new_mark()
        return parameters[MARK]  # type: ignore[return-value] # it is there

    def _present(self) -> tuple[list[nn.Parameter], Layouts]:
        try:
            weights: list[nn.Parameter] = [slot["weight"] for slot in self._slots]  # type: ignore[misc]
            return weights, layouts_of(weights)
        except (TypeError, KeyError):  # None, or taken away
            raise RuntimeError(
                "weight: expected a Parameter of the module, and there is none; torch.nn.utils.parametrize and pruning "
                "put a computed tensor in its place, which a table in the engine's memory cannot be"
            ) from None

    def _find_slots(self, tables: Iterable[int]) -> None:
        """Find the weights of some tables, whose rows have been exchanged."""
        for table in tables:
            self._slots[table] = self._slot(table)
        # Where all rows are codes, no weight is over the engine's memory, and none is to be looked at before each use.
        self._fixed = self.tied() if all(name in QUANTIZED for name in self.row_formats) else None

    def _slot(self, table: int) -> dict[str, nn.Parameter | None]:
        """Where to find the weight of a table; of a quantized one, what stands in for it, made where it is needed."""
        parameters = self._parameters[table]
        if self.row_formats[table] in QUANTIZED and self.algorithm is not None:
            if STAND_IN not in parameters:
                parameters[STAND_IN] = nn.Parameter(torch.empty(0, device="cpu"), self._trainable[table])
            return {"weight": parameters[STAND_IN]}
        parameters.pop(STAND_IN, None)
        return {"weight": NO_WEIGHT} if self.row_formats[table] in QUANTIZED else parameters

    def _new_handle(self) -> TableSet:
        """Tables and state of zeros."""
        tables = zip(self.tables, self.row_formats, strict=True)
        handle = TableSet([(*table[:3], row_format) for table, row_format in tables], self.features)
        if self.algorithm is not None:
            handle.set_optimizer(self.algorithm, self._split_bf16, self._state_format)
        for table in range(len(self.tables)):
            self._keep_hot(handle, table)
        return handle

    def _keep_hot(self, handle: TableSet, table: int) -> None:
        """Have a table whose rows are new keep the hot ones, if it is to."""
        ways = hot_ways(self.hot_rows[table], self.tables[table].num_embeddings)
        if ways and self.row_formats[table] in QUANTIZED and handle.hot_rows(table) is None:
            handle.add_hot_rows(table, ways)

    def new_memory(self) -> Memory:
        """Tables and state such as these, of zeros or any content."""
        return Memory(self._copy_of_quantized(), len(self.tables))

    def _memory_of(self, handle: TableSet) -> Memory:
        """Make the tables of `handle` those that the weights are compared with."""
        memory = Memory(handle, len(self.tables))
        self._own(memory)
        return memory

    def _show(self, table: int) -> None:
        """Make the rows of a table, if quantized, buffers of its owner."""
        self.buffers.show(table, self.memory.parts[table] if self.row_formats[table] in QUANTIZED else ())

    def _own(self, memory: Memory) -> None:
        specs = zip(self.tables, self.row_formats, strict=True)
        tables = tuple(spec._replace(row_format=row_format) for spec, row_format in specs)
        self.layout = str(Layout(tables, tuple(map(len, memory.parts)), self.features, self.output_dtype))
        # An address may come again after its table is gone, so `_check_weight` asks the owner if it is still there.
        _OWNERS.update({address: self for address in memory.layouts.addresses if address})

    def _states(self, memory: Memory) -> list[dict[str, Tensor]]:
        def tensor(name: str, array: NDArray[Any]) -> Tensor:
            # The lower halves of rows are integers; else int16 holds the bits of bfloat16.
            return torch.from_numpy(array) if name == "low_bits" else as_tensor(array)

        states = (memory.handle.optimizer_state(table) for table in range(len(self.tables)))
        return [{name: tensor(name, array) for name, array in state.items()} for state in states]

    def _encoded(self, table: int, source: Tensor) -> TableRows:
        """Rows in the table's format, made of a tensor `(N, D)`."""
        row_format = self.row_formats[table]
        method = METHODS.get(row_format, "minmax")
        array = source.detach().float().contiguous().numpy()
        return TableRows.encode(self.tables[table].name, array, row_format, method, None, False)[0]

    def _check_weight(self, table: int, weight: Tensor, any_dtype: bool = False) -> None:
        name, *shape, _ = self.tables[table]
        dtype = None if any_dtype else TORCH_DTYPES[self.row_formats[table]]
        check_table_weight(f"weight of table {name!r}", weight, (shape[0], shape[1]), dtype)
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

    def _take_home(self, weights: Sequence[nn.Parameter], layouts: Layouts) -> None:
        memory = self.memory
        pairs = zip(zip(*layouts, strict=True), zip(*memory.layouts, strict=True), strict=True)
        moved = [table for table, (here, home) in enumerate(pairs) if here != home]
        for table in moved:
            self._check_weight(table, weights[table])
        self.check_unshared("weight: cannot be put in other memory; copy into it, as by load_state_dict")
        # Something else may still look at the memory that a weight has left: the Parameter that was there before (in an
        # optimizer, or put aside by `torch.func.functional_call`), a tensor of its data, or the weight itself in
        # another order. What it sees must not change, so the tables move to new memory and it keeps the old.
        if any(memory.is_viewed(table) for table in moved):
            memory = self._memory_of(self._copy_of_quantized())
            moved = [table for table in range(len(self.tables)) if self.row_formats[table] not in QUANTIZED]
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
        self.changes += 1

    def _take_in(self) -> None:
        """Have the engine use the quantized rows that a user has put in the place of its own."""
        with _ADOPTING:
            for table in sorted(self.buffers.in_hands):
                given = self.buffers.displaced(table, self.memory.parts[table])
                if given is not None:
                    self.check_unshared("weight_codes: cannot be replaced; copy into it")
                    row_format = self.row_formats[table]
                    rows = packed_rows(self.tables[table], row_format, given)
                    self._place(table, Displaced(rows, row_format, None, self.hot_rows[table]))
                    self.buffers.bring_home(table, given, self.memory.parts[table])
                    self.buffers.in_hands.add(table)  # whoever has put them there has them still

    def _copy_of_quantized(self) -> TableSet:
        """A new handle, with those tables that have no weight."""
        copy = self._new_handle()
        for table, row_format in enumerate(self.row_formats):
            if row_format in QUANTIZED:
                copy.swap_rows(table, packed_rows(self.tables[table], row_format, self.memory.parts[table]))
        return copy

    def release(self) -> None:
        """Take the Parameters of tables of quantized rows away from their owners, which no longer read them."""
        for table, row_format in enumerate(self.row_formats):
            if row_format in QUANTIZED:
                self._parameters[table].pop("weight", None)
                self._show(table)

    def swap(self, table: int, rows: TableRows, row_format: str, hot_rows: float | None = None) -> Displaced:
        """Put other rows in the place of a table's.

        The Parameter stays the same object as long as the rows are numbers; quantized ones have none.

        Args:
            table: The table.
            rows: `(N, D)`, which are gone from there then.
            row_format: Of the rows.
            hot_rows: The share of them that are kept in fp32 from now on, if the others are in codes; None for that of
                before.

        Returns:
            What was there, to be dropped or put back by `restore`.

        Raises:
            RuntimeError: The tables are shared.
            ValueError: Rows of another shape.
        """
        self.check_unshared("rows: cannot be replaced; do so before the tables are shared")
        weight = self._parameters[table].get("weight")
        share = self.hot_rows[table] if hot_rows is None else hot_rows
        return self._put(table, Displaced(rows, row_format, weight, share))

    def restore(self, table: int, displaced: Displaced) -> None:
        """Put back what `swap` has displaced."""
        self._put(table, displaced)

    def _put(self, table: int, new: Displaced) -> Displaced:
        self.settle()
        self._show(table)  # what the user has put in the place of a buffer is of no use any more
        self.weights()  # what the user has put into a weight is to be in the engine, for it leaves with the rows
        return self._place(table, new)

    def _place(self, table: int, new: Displaced) -> Displaced:
        with _ADOPTING, torch.inference_mode(False), torch.no_grad():
            parameters, memory = self._parameters[table], self.memory
            weight = parameters.get("weight")
            present = weight if weight is not None else parameters.get(STAND_IN)
            if present is not None:
                increment_version([present])  # a backward that still needs these rows is to notice
                self._trainable[table] = present.requires_grad
            present_format, share = self.row_formats[table], self.hot_rows[table]
            displaced = Displaced(memory.handle.swap_rows(table, new.rows), present_format, weight, share)
            self.row_formats[table], self.hot_rows[table] = new.row_format, new.hot_rows
            self._keep_hot(memory.handle, table)
            memory.moved(table)
            self._own(memory)
            if new.row_format in QUANTIZED:
                parameters.pop("weight", None)
            else:
                view = memory.view(table)
                if new.weight is None:
                    parameters["weight"] = nn.Parameter(view, requires_grad=self._trainable[table])
                else:
                    new.weight.grad = None
                    new.weight.data = view
                    parameters["weight"] = new.weight
            self._find_slots([table])
            self._show(table)
            if self.optimizer is not None:
                self.optimizer.rows_moved(self.tied(), self._states(memory))
            self.changes += 1
            return displaced

    def add_hot_rows(self, table: int, share: float) -> None:
        """Have a table of codes keep a share of its rows in fp32 from now on: none of them yet, and none before."""
        self.settle()
        self.weights()  # what the user has put into a buffer is to be in the engine
        self.hot_rows[table] = share
        self._keep_hot(self.handle, table)
        self.memory.moved(table)
        self._own(self.memory)
        self._show(table)
        self.changes += 1

    def load(self, table: int, source: Tensor) -> None:
        """Copy rows, `(N, D)` of a floating dtype, into a table.

        Raises:
            ValueError: They have numbers that the row format cannot hold.
        """
        self.settle()
        if source.dtype is TORCH_DTYPES.get(self.row_formats[table]):
            self.weights()[table].detach().copy_(source.detach())
        else:
            self.swap(table, self._encoded(table, source), self.row_formats[table])

    def initialize(self, table: int, fill: Callable[[Tensor, int], Any], *, whole: bool = False) -> None:
        """Fill a table.

        Args:
            table: The table.
            fill: Called with some rows, `(n, D)`, and the number of the first: writes them in place.
            whole: Whether `fill` wants all rows at once.
        """
        self.check_unshared("reset_parameters: cannot fill; do so before the tables are shared")
        self.settle()
        _, num_embeddings, embedding_dim, _ = self.tables[table]
        with torch.no_grad():
            if self.row_formats[table] not in QUANTIZED:
                fill(self.weights()[table], 0)  # which torch counts
                return
            chunk = num_embeddings if whole else max(_CHUNK_ELEMENTS // embedding_dim, 1)
            for first in range(0, num_embeddings, max(chunk, 1)):
                rows = torch.empty(min(chunk, num_embeddings - first), embedding_dim, device="cpu")
                fill(rows, first)
                self.handle.write_rows(table, first, rows.numpy())
        self.changes += 1

    def drop_optimizer(self) -> None:
        """Give the fused optimizer and its state up."""
        self.settle()
        if self.optimizer is not None:
            self.handle.clear_optimizer()
            self.memory.find_states()
            self.optimizer = self.algorithm = None
            self._find_slots(range(len(self.tables)))
            self.changes += 1

    def check_unshared(self, refused: str) -> None:
        """Refuse what must not be done to rows that other processes have, too.

        Raises:
            RuntimeError: They have them.
        """
        if self.sharing is not None:
            raise RuntimeError(f"{refused} (dlrm_rs.distributed.share_tables has given these to several processes)")

    def arrays(self, table: int) -> list[NDArray[Any]]:
        """The rows of a table and the state of its optimizer, where they are."""
        state = self.handle.optimizer_state(table).values()
        return [*map(as_array, self.memory.parts[table]), *state]

    def move(self, table: int, arrays: Sequence[NDArray[Any]]) -> None:
        """Have a table use other memory, with what that holds: arrays like those of `arrays`."""
        name, _, embedding_dim, _ = self.tables[table]
        row_format, parts = self.row_formats[table], len(self.memory.parts[table])
        elements, *rest = arrays[:parts]  # and of quantized rows scales and codebook
        scales, codebook = (*rest, None, None)[:2]
        rows = TableRows.borrow(name, embedding_dim, row_format, elements, scales, codebook)
        self._put(table, Displaced(rows, row_format, self._parameters[table].get("weight"), 0.0))
        for part, array in zip(self.handle.optimizer_state(table), arrays[parts:], strict=True):
            self.handle.put_optimizer_state(table, part, array)
        self.memory.find_states()
        if self.optimizer is not None:
            self.optimizer.follow(self._states(self.memory))

    def __getstate__(self) -> dict[str, Any]:
        # The memory stays behind: weights, buffers and the optimizer's state are copied by the modules that hold them.
        # A copy is its process's own.
        left = ("memory", "key", "sharing", "lane")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.key = self._new_key()
        handle = self._new_handle()
        for table, row_format in enumerate(self.row_formats):
            if row_format in QUANTIZED:
                handle.swap_rows(table, packed_rows(self.tables[table], row_format, self.buffers.parts(table)))
        self.memory = self._memory_of(handle)
        for table in range(len(self.tables)):
            self._show(table)
        weights = self.weights()
        if self.optimizer is not None:  # which is with the weights by now if there are any
            self.optimizer.attach(weights, self._states(self.memory))

    def _new_key(self) -> Tensor:
        number = np.array([secrets.randbits(63)], dtype=np.int64)
        _TABLES[int(number[0])] = self
        return tensors([number])[0]

    def packed_state(self, table: int) -> dict[str, Tensor]:
        """A table of quantized rows as tensors of its own.

        Returns:
            `"codes"`, `(N, bytes of a row)` uint8; `"scales"`, `(N, 2)` float16, bfloat16 or float32: scale and bias of
            every row; `"codebook"`, `(16,)` float32, where codes of 4 bits mean other numbers than their own; and where
            rows are kept in fp32, `W` at most, `"hot_rows"`, `(W, D)` float32, `"hot_ids"`, `(W,)` int64, their numbers
            or -1, and `"hot_counts"`, `(W,)` uint8, how often each was touched lately.
        """
        self.settle()
        self.weights()  # what the user has put into a buffer is to be in the engine
        parts = self.memory.parts[table]
        names = (name.removeprefix("weight_") for name in part_names(parts))
        state = {name: part.clone() for name, part in zip(names, parts, strict=True)}
        if "hot_ids" in state:
            state["scales"] = without_marks(state["scales"], state["hot_ids"])
        return state

    def load_packed_state(self, table: int, state: dict[str, Tensor]) -> None:
        """Copy what `packed_state` gave into a table of the same row format.

        Raises:
            TypeError: A tensor of another dtype.
            ValueError: A tensor of another shape, scales that are not finite, a codebook that cannot be, or another
                number of hot rows.
        """
        hot = self.memory.parts[table][2:] if self.keeps_hot_rows(table) else []
        expected, got = len(hot[0]) if hot else 0, len(state.get("hot_rows", ()))
        if expected != got:
            raise ValueError(
                f"expected {expected} ways of hot rows, which this table keeps in fp32, got {got}; load into a module "
                "made with the checkpoint's hot_rows, then dlrm_rs.quantize it with the hot_rows that you want"
            )
        parts = [state[part] for part in ("codes", "scales", "codebook", *HOT_PARTS) if part in state]
        self.swap(table, packed_rows(self.tables[table], self.row_formats[table], parts), self.row_formats[table])

    def __repr__(self) -> str:
        return f"EmbeddingTables({len(self.tables)} tables, {len(self.features)} features)"


def _checked(table: TableSpec) -> TableSpec:
    name, num_embeddings, embedding_dim, row_format = table
    rows = check_size(f"num_embeddings of table {name!r}", num_embeddings)
    return TableSpec(name, rows, check_size(f"embedding_dim of table {name!r}", embedding_dim), row_format)
