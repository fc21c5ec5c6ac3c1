"""Gradients that backward keeps until `step()` or `zero_grad()`, and what stands for them where torch looks."""

from __future__ import annotations

import math
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Waiting", "new_gate", "new_mark"]

# So small that a norm over it is none, and a number still when it is divided by the scale of a loss.
_TOKEN = 2.0**-60


def new_gate() -> nn.Parameter:
    """A gate."""
    return nn.Parameter(torch.zeros((), dtype=torch.float32, device="cpu"))


def new_mark() -> nn.Parameter:
    """A mark."""
    return nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))


class Waiting:
    """The calls whose gradients wait, each with the factor that its gradients have been multiplied by since.

    Two Parameters of one number stand for them by their gradients, too small to count where gradients are clipped:

    - The gate, in the optimizer's groups, ties lookups into the graph. Every call adds a token to its gradient, or an
      infinity where the call's is not finite: what `torch.amp.GradScaler` looks at, and unscales.
    - The mark, in the module, has a gradient as long as calls wait. Who drops the gradients of a module takes it away,
      or makes it zero, and drops these. What multiplies it, as clipping by the norm of a model's gradients does,
      multiplies nothing.

    A call counts once its backward has reached the gate: not if the backward failed, nor in a `torch.autograd.grad` of
    something else.

    Args:
        gate: The gate.
        mark: The mark.
    """

    def __init__(self, gate: nn.Parameter, mark: nn.Parameter) -> None:
        self.gate = gate
        self._mark = mark
        self._calls: list[tuple[Any, float]] = []
        # Those of backwards that have not reached the gate, with the number of the backward.
        self._on_the_way: list[tuple[int, Any]] = []
        # The gate's gradient when a backward last reached it.
        self._total = 0.0
        # Several threads may run backwards.
        self._lock = threading.RLock()
        # Not the method itself: what refers to its Parameter from a hook is never freed.
        arrive = weakref.WeakMethod(self._arrive)
        gate.register_post_accumulate_grad_hook(lambda _: (arrive() or _nothing)())

    @staticmethod
    def token(finite: bool) -> Tensor:
        """What a call adds to the gate's gradient."""
        return torch.tensor(_TOKEN if finite else math.inf, dtype=torch.float32, device="cpu")

    def keep(self, call: Any) -> None:
        """Let a call wait."""
        with self._lock:
            number = _backward()
            # While another backward is between gate and hook, its token would be taken for a factor.
            if all(other == number for other, _ in self._on_the_way):
                self.catch_up()
            self._on_the_way.append((number, call))

    def take(self) -> list[tuple[Any, float]]:
        """The calls that wait, and the factor of each."""
        with self._lock:
            if _backward() >= 0:  # in a hook, which may come before that of this
                self._arrive()
            else:
                self._on_the_way.clear()
            self.catch_up()
            return self._calls

    def bytes(self) -> int:
        """What the calls take that wait or are on the way."""
        with self._lock:
            self.catch_up()
            calls = [call for call, _ in self._calls] + [call for _, call in self._on_the_way]
            return sum(tensor.numel() * tensor.element_size() for call in calls for tensor in call.tensors())

    def drop(self) -> None:
        """Let none wait any more."""
        with self._lock:
            self._calls, self._on_the_way = [], []
            self.gate.grad = self._mark.grad = None

    def catch_up(self) -> None:
        """Do to the calls what has been done to what stands for them."""
        with self._lock:
            if not self._calls:
                return
            if self.gate.grad is None or not _is_set(self._mark):
                self._calls, self.gate.grad = [], None
                return
            total = float(self.gate.grad)
            factor = total / self._total if self._total else 1.0
            if math.isfinite(factor):
                self._calls = [(call, factor * before) for call, before in self._calls]
            self._total = total

    def _arrive(self) -> None:
        with self._lock:
            number = _backward()
            arrived = [call for other, call in self._on_the_way if other == number]
            if not arrived or self.gate.grad is None:
                return
            self._calls += [(call, 1.0) for call in arrived]
            self._on_the_way = [(other, call) for other, call in self._on_the_way if other != number]
            self._total = float(self.gate.grad)
            if not _is_set(self._mark):
                self._mark.grad = torch.full_like(self._mark, _TOKEN)


def _nothing() -> None:
    """What is left to do where the optimizer is gone."""


def _backward() -> int:
    """The number of the backward that runs here; -1 where none does."""
    return torch._C._current_graph_task_id()


def _is_set(mark: Tensor) -> bool:
    return mark.grad is not None and bool(mark.grad.any())
