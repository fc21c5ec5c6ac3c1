"""How tables come into memory that the processes of a group have in common.

Every step is told to all processes before the next one begins, and what fails in one is raised in all. Does not know
how the tables are trained then: that is `operators.sharing`.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from dlrm_rs.shared_memory import Place, Shape, SharedMemory
from dlrm_rs.tables import EmbeddingTables

__all__ = ["share"]


def share(sets: Sequence[EmbeddingTables], refused: Exception | None, meeting: dist.ProcessGroup) -> None:
    """Move the tables of the first process into memory of all, and have the others use it in place of their own.

    Args:
        sets: The tables, made alike in all processes.
        refused: Why this process's cannot be shared, or None.
        meeting: The processes.

    Raises:
        ValueError: Tables differ between processes, or there is no memory that all can have.
        MemoryError: The system has not enough.
        Exception: `refused`, of any process.
    """
    _check_alike(_tell_all(meeting, refused, [] if refused else _described(sets)))
    memories = _mapped(meeting, [_shapes(tables) for tables in sets])
    is_first = dist.get_rank(meeting) == 0
    _tell_all(meeting, _fill(sets, memories) if is_first else None, None)
    for tables, memory in zip(sets, memories, strict=True):
        for table, arrays in enumerate(_of_tables(tables, memory)):
            if not is_first:
                tables.move(table, arrays)
    _tell_all(meeting, None, None)  # that all are there


def _tell_all(meeting: dist.ProcessGroup, error: Exception | None, value: Any) -> list[Any]:
    """What every process tells, in the order of the ranks; the first error, if there is one, is raised in all."""
    told: list[Any] = [None] * dist.get_world_size(meeting)
    dist.all_gather_object(told, (error, value), meeting)
    for rank, (failed, _) in enumerate(told):
        if failed is not None:
            raise type(failed)(f"{failed} (in the process of rank {dist.get_global_rank(meeting, rank)})")
    return [value for _, value in told]


def _described(sets: Sequence[EmbeddingTables]) -> list[str]:
    """All that must be the same in every process."""
    lines: list[str] = []
    for tables in sets:
        groups = [] if tables.optimizer is None else tables.optimizer.param_groups
        hyperparameters = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        lines += map(str, (*tables.tables, *tables.features, tables.output_dtype, *hyperparameters, *_shapes(tables)))
    return lines


def _check_alike(described: Sequence[Sequence[str]]) -> None:
    for rank, lines in enumerate(described):
        for first, own in zip_longest(described[0], lines, fillvalue="nothing"):
            if own != first:
                raise ValueError(
                    "model: expected the same tables and optimizers in every process, got "
                    f"{first} in the first and {own} in number {rank} of the group"
                )


def _shapes(tables: EmbeddingTables) -> list[Shape]:
    every = (array for table in range(len(tables.tables)) for array in tables.arrays(table))
    return [(array.shape, array.dtype.str) for array in every]


def _of_tables(tables: EmbeddingTables, memory: SharedMemory) -> Iterator[list[NDArray[Any]]]:
    """The arrays of every table."""
    arrays = iter(memory.arrays)
    for table in range(len(tables.tables)):
        yield list(islice(arrays, len(tables.arrays(table))))


def _mapped(meeting: dist.ProcessGroup, shapes: Sequence[Sequence[Shape]]) -> list[SharedMemory]:
    """Memory of the first process for every set of tables, in all processes."""
    is_first = dist.get_rank(meeting) == 0
    error, memories, places = None, list[SharedMemory](), list[Place]()
    try:
        for of_set in shapes if is_first else ():
            memory, place = SharedMemory.create(of_set)
            memories.append(memory)
            places.append(place)
    except OSError as failed:
        error = ValueError(f"share_tables: {failed}")
    places = _tell_all(meeting, error, places)[0]
    try:
        if not is_first:
            memories = list(map(SharedMemory.open, shapes, places))
    except OSError as failed:
        error = ValueError(
            "group: expected processes of one host, that find each other in /proc, got one on "
            f"{socket.gethostname()!r} that does not find the first: {failed}"
        )
    _tell_all(meeting, error, None)
    return memories


def _fill(sets: Sequence[EmbeddingTables], memories: Sequence[SharedMemory]) -> Exception | None:
    """Move tables one by one, so that no more than one is there twice; why not, if that cannot be."""
    try:
        for tables, memory in zip(sets, memories, strict=True):
            number = 0
            for table, arrays in enumerate(_of_tables(tables, memory)):
                for source, target in zip(tables.arrays(table), arrays, strict=True):
                    memory.reserve(number)
                    np.copyto(target, source)
                    number += 1
                tables.move(table, arrays)
    except OSError as failed:
        return MemoryError(f"share_tables: {failed}")
    return None
