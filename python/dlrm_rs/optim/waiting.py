"""Gradients that backward keeps until `step()` or `zero_grad()`, and what stands for them where torch looks."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Waiting"]


class Waiting:
    """The calls whose gradients wait, each with the factor that its gradients have been multiplied by since.

    Two things stand for them; an optimizer or clipping that meets either does no harm:

    - The gate, a Parameter of one number in the optimizer's groups, ties lookups into the graph. Every call adds 1 to
      its gradient, or an infinity where the call's is not finite: what `torch.amp.GradScaler` looks at, and unscales.
    - The mark, a sparse gradient of one row of zeros, is put on a weight of the module. Who drops the gradients of a
      module takes it away, or makes it empty, and drops these.

    A call counts once its backward has reached the gate: not if the backward failed, nor in a `torch.autograd.grad` of
    something else.

    Args:
        gate: The gate.
    """

    def __init__(self, gate: nn.Parameter) -> None:
        self.gate = gate
        self._calls: list[tuple[Any, float]] = []
        # Those of backwards that have not reached the gate, with the number of the backward.
        self._on_the_way: list[tuple[int, Any]] = []
        # The gate's gradient when a backward last reached it.
        self._total = 0.0
        self._marked: Tensor = gate
        # Not the method itself: what refers to its Parameter from a hook is never freed.
        arrive = weakref.WeakMethod(self._arrive)
        gate.register_post_accumulate_grad_hook(lambda of: (arrive() or _nothing)(of))

    def keep(self, call: Any, marked: Tensor) -> None:
        """Let a call wait; `marked` is a weight of the module."""
        self._catch_up()
        self._on_the_way.append((_backward(), call))
        self._marked = marked

    def take(self) -> list[tuple[Any, float]]:
        """The calls that wait, and the factor of each."""
        self._catch_up()
        self._on_the_way.clear()
        return self._calls

    def bytes(self) -> int:
        """What the calls take that wait or are on the way."""
        calls = [call for call, _ in self._calls] + [call for _, call in self._on_the_way]
        return sum(tensor.numel() * tensor.element_size() for call in calls for tensor in call.tensors())

    def drop(self) -> None:
        """Let none wait any more."""
        self._calls, self._on_the_way = [], []
        self.gate.grad = None

    def _catch_up(self) -> None:
        """Do to the calls what has been done to what stands for them."""
        if not self._calls:
            return
        if self.gate.grad is None or not _has_mark(self._marked):
            self._calls, self.gate.grad = [], None
            return
        total = float(self.gate.grad)
        factor = total / self._total
        if math.isfinite(factor):
            self._calls = [(call, factor * before) for call, before in self._calls]
        self._total = total

    def _arrive(self, gate: Tensor) -> None:
        backward = _backward()
        self._calls += [(call, 1.0) for number, call in self._on_the_way if number == backward]
        self._on_the_way = [(number, call) for number, call in self._on_the_way if number != backward]
        self._total = float(gate.grad)  # type: ignore[arg-type] # it has one now
        if not _has_mark(self._marked):
            self._marked.grad = _mark(self._marked)


def _nothing(_: Tensor) -> None:
    """What is left to do where the optimizer is gone."""


def _backward() -> int:
    """The number of the backward that runs."""
    return torch._C._current_graph_task_id()


def _has_mark(weight: Tensor) -> bool:
    # Zeroing a sparse gradient leaves it without rows. A dense one is of the weight's own use, and no mark was needed.
    grad = weight.grad
    return grad is not None and (not grad.is_sparse or grad._nnz() > 0)


def _mark(weight: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.zeros(1, 1, dtype=torch.int64, device="cpu"),
        torch.zeros(1, *weight.shape[1:], dtype=weight.dtype, device="cpu"),
        weight.shape,
    )
