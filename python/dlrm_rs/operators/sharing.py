"""Updates of tables that several processes have in common: one process makes one update of the calls of all.

Every process looks up in the same memory. In backward each hands its call to the first of the group, which puts the
bags of all side by side in the order of the ranks, updates the rows once, and tells the others, which wait. Nobody
writes but then: what a lookup reads is whole, and the same batches give the same bits in every run.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dlrm_rs.memory import Memory
from dlrm_rs.operators import calls
from dlrm_rs.operators.kept import KeptCall, merged

if TYPE_CHECKING:
    from dlrm_rs.tables import EmbeddingTables

__all__ = ["Sharing"]

# What every process tells of its call at first. The same in all must be these,
_ALIKE = ("set of tables", "step", "set of trainable weights", "set of scale_grad_by_freq", "kind of batch")

# and by their own sizes and dtypes come ids, offsets, weights of ids, argmax and gradient.
_DTYPES = (torch.int32, torch.int64, torch.float32)


class Sharing:
    """One process's part in the updates of tables that others have, too.

    Args:
        group: The processes, of a backend that moves tensors of the CPU.
        number: Which of the sets of tables that the group shares.
    """

    def __init__(self, group: dist.ProcessGroup, number: int) -> None:
        self._group, self._number = group, number
        self._rank, self._world = dist.get_rank(group), dist.get_world_size(group)
        self._first = dist.get_global_rank(group, 0)

    def agree(self, flag: bool) -> bool:
        """Whether all processes say so."""
        said = torch.tensor([flag], dtype=torch.int32, device="cpu")
        dist.all_reduce(said, dist.ReduceOp.MIN, self._group)
        return bool(said)

    def update(
        self, tables: EmbeddingTables, memory: Memory, terms: calls.Terms, factor: float, groups: list[dict[str, Any]]
    ) -> None:
        """Update the tables by the mean of the processes' gradients; it is done when this returns.

        Args:
            tables: The tables.
            memory: Theirs.
            terms: This process's call.
            factor: By what the gradients are multiplied.
            groups: As of `TableSet.update`.

        Raises:
            RuntimeError: The processes do not train the same, or one is gone.
        """
        indices, offsets, batch_size, weights, argmax, grad, trainable, scale = terms
        arrays = (indices, offsets, weights, argmax, grad)
        mine = [None if array is None else torch.from_numpy(array) for array in arrays]
        kind = sum(1 << place for place, tensor in enumerate(mine[2:4]) if tensor is not None)
        alike = (self._number, groups[0]["step"], zlib.crc32(bytes(trainable)), zlib.crc32(bytes(scale)), kind)
        told = self._tell(alike, batch_size, mine)
        if self._rank:
            self._hand_over(mine)
            return
        done = torch.zeros(1, dtype=torch.int64, device="cpu")
        try:
            every = [mine, *(self._receive(rank, told[rank][1:]) for rank in range(1, self._world))]
            whole, _ = merged(
                [
                    (_call(tables, batch_size, tensors, trainable, scale), 1.0)
                    for (batch_size, *_), tensors in zip(told, every, strict=True)
                ]
            )
            given = (whole.per_sample_weights, whole.argmax, whole.grad, trainable, whole.scale_grad_by_freq)
            memory.handle.update(*calls.gradient_terms(whole.bags, *given), factor / self._world, groups)
            done += 1
        finally:
            dist.broadcast(done, self._first, self._group)  # also when it failed, so that nobody waits

    def _tell(self, alike: Sequence[int], batch_size: int, mine: Sequence[Tensor | None]) -> list[list[int]]:
        """Batch size, and elements and dtype of every tensor, of all processes."""
        sizes = [(-1, 0) if tensor is None else (tensor.numel(), _DTYPES.index(tensor.dtype)) for tensor in mine]
        own = torch.tensor([*alike, batch_size, *(number for size in sizes for number in size)], device="cpu")
        gathered = [torch.empty_like(own) for _ in range(self._world)]
        try:
            dist.all_gather(gathered, own, self._group)
        except RuntimeError as error:
            raise RuntimeError(
                "update: expected every process that shares the tables to take this step, and one did not; the tables "
                "are as they were"
            ) from error
        told = [tensor.tolist() for tensor in gathered]
        for name, values in zip(_ALIKE, zip(*told, strict=True), strict=False):
            if len(set(values)) > 1:
                raise RuntimeError(
                    f"update: expected the processes that share the tables to train them alike, got a {name} of "
                    f"{list(values)} in the order of their ranks; the tables are as they were"
                )
        return [numbers[len(alike) :] for numbers in told]

    def _hand_over(self, mine: Sequence[Tensor | None]) -> None:
        done = torch.zeros(1, dtype=torch.int64, device="cpu")
        try:
            for tensor in mine:
                if tensor is not None and tensor.numel():
                    dist.send(tensor, self._first, self._group)
            dist.broadcast(done, self._first, self._group)
        except RuntimeError as error:
            raise RuntimeError(
                f"update: lost the process of rank {self._first}, which updates the shared tables and may have written "
                "to some of the rows; start again from a checkpoint"
            ) from error
        if not done:
            raise RuntimeError(
                f"update: the process of rank {self._first}, which updates the shared tables, could not; it says why"
            )

    def _receive(self, rank: int, sizes: Sequence[int]) -> list[Tensor | None]:
        tensors: list[Tensor | None] = []
        for elements, dtype in zip(sizes[::2], sizes[1::2], strict=True):
            tensor = None if elements < 0 else torch.empty(elements, dtype=_DTYPES[dtype], device="cpu")
            if tensor is not None and elements:
                dist.recv(tensor, dist.get_global_rank(self._group, rank), self._group)
            tensors.append(tensor)
        return tensors


def _call(
    tables: EmbeddingTables, batch_size: int, tensors: Sequence[Any], trainable: Sequence[bool], scale: Sequence[bool]
) -> KeptCall:
    indices, offsets, weights, argmax, grad = tensors
    argmax = None if argmax is None else argmax.view(-1, tables.width)
    return KeptCall(
        tables, (indices, offsets, batch_size), weights, argmax, grad.view(-1, tables.width), trainable, scale, []
    )
