"""Where the engine's tables are, as torch sees them: tensors over the rows and over the optimizer's state.

Does not know the modules that hold the weights, nor whether these are still over that memory: that is `tables`.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dlrm_rs._dlrm_rs import Homes, TableSet
from dlrm_rs.row_formats import QUANTIZED, as_tensor

__all__ = ["NO_WEIGHT", "Layouts", "Memory", "layouts_of", "tensors"]

# Stands in for the weight of a table of quantized rows: empty, and never trained.
NO_WEIGHT = nn.Parameter(torch.empty(0, device="cpu"), requires_grad=False)


class Layouts(NamedTuple):
    """Where every weight is and how: with two dimensions this tells every other place, shape or order apart."""

    addresses: list[int]
    elements: list[int]
    strides: list[tuple[int, ...]]


class Memory:
    """The engine's handle, and where its tables are.

    Attributes:
        handle: The engine's tables.
        layouts: Those of the weights while they are over the engine's memory.
        homes: The same, as the binding compares with them.
        parts: The rows of every table as tensors: `(N, D)`, or codes, scales and, where there are, the codebook or hot
            rows, their numbers and their counts.
        states: The optimizer's state of all tables.

    Args:
        handle: The same.
        count: `T`, the number of tables.
    """

    def __init__(self, handle: TableSet, count: int) -> None:
        self.handle = handle
        self.parts = [self._find_parts(table) for table in range(count)]
        self.layouts = layouts_of([self._home(table) for table in range(count)])
        self.homes = Homes(*self.layouts)
        self._rows: list[weakref.ref[NDArray[Any]] | None] = [None] * count
        self.find_states()

    def _find_parts(self, table: int) -> list[Tensor]:
        if self.handle.row_format(table) not in QUANTIZED:
            return tensors([self.handle.weight(table)])
        codebook, hot = self.handle.codebook(table), self.handle.hot_rows(table)
        rest = hot or ([] if codebook is None else [codebook])
        return tensors([self.handle.codes(table), self.handle.scales(table), *rest])

    def _home(self, table: int) -> Tensor:
        """The rows of a table, `(N, D)`; of a quantized one, what stands in for its weight."""
        return NO_WEIGHT if self.handle.row_format(table) in QUANTIZED else self.parts[table][0]

    def find_states(self) -> None:
        """Look where the optimizer's state is, since it has been made or given up."""
        tables = range(len(self.parts))
        states = [self.handle.optimizer_state(table).values() for table in tables]
        self.states = tensors(chain.from_iterable(states))
        weights = [self._home(table) for table in tables]
        spans = sorted(_span(tensor) for tensor in (*weights, *self.states) if tensor.numel())
        self._starts, self._ends = [span[0] for span in spans], [span[1] for span in spans]

    def moved(self, table: int) -> None:
        """Look where the rows of a table are now, since others have been put in their place."""
        self.parts[table] = self._find_parts(table)
        home = self._home(table)
        self.layouts.addresses[table] = home.data_ptr()
        self.layouts.elements[table] = home.numel()
        self.layouts.strides[table] = home.stride()
        self.homes = Homes(*self.layouts)
        self._rows[table] = None
        self.find_states()

    def view(self, table: int) -> Tensor:
        """The rows of a table, `(N, D)`, as the data of its weight; it keeps the memory alive."""
        rows = self.handle.weight(table)
        self._rows[table] = weakref.ref(rows)
        return as_tensor(rows)

    def is_viewed(self, table: int) -> bool:
        """Whether the last `view` of a table, or a tensor made of it, still exists."""
        rows = self._rows[table]
        return rows is not None and rows() is not None

    def is_at(self, parts: Sequence[Tensor]) -> bool:
        """Whether tensors are the rows of all tables, in order."""
        addresses = [tensor.data_ptr() for tensor in chain.from_iterable(self.parts)]
        return list(map(Tensor.data_ptr, parts)) == addresses and all(map(Tensor.is_contiguous, parts))

    def overlaps(self, tensor: Tensor) -> bool:
        """Whether a contiguous tensor shares memory with a table or its state."""
        start, end = _span(tensor)
        before_end = bisect_left(self._starts, end)  # the tables do not overlap: only the last that starts before can
        return before_end > 0 and self._ends[before_end - 1] > start


def layouts_of(weights: Sequence[Tensor]) -> Layouts:
    """Where tensors are and how."""
    # At every forward, for every table, where `Homes` cannot tell: torch's fastest questions, asked the fastest way.
    return Layouts(
        list(map(Tensor.data_ptr, weights)), list(map(Tensor.numel, weights)), list(map(Tensor.stride, weights))
    )


def tensors(arrays: Iterable[NDArray[Any]]) -> list[Tensor]:
    """Arrays as tensors over the same memory."""
    # Those made in inference mode could not be changed, nor saved for a backward, outside of it.
    with torch.inference_mode(False):
        return list(map(as_tensor, arrays))


def _span(tensor: Tensor) -> tuple[int, int]:
    """Where a contiguous tensor begins and ends."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
