"""Fused optimizers: the update of a table's rows happens inside backward, and no gradient tensor exists.

A spec, such as `Adagrad(lr=0.01)`, is given to a module; the module's `fused_optimizer` is then a
`torch.optim.Optimizer` over its tables, for learning-rate schedulers and checkpoints. The engine owns the state.

Since backward *is* the step, what torch does between the two cannot be had for these tables: gradient accumulation
over micro-batches, clipping by the norm of all gradients, and unscaling of a scaled loss. A module without a fused
optimizer does all of these.
"""

from __future__ import annotations

import ctypes
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn

__all__ = ["SGD", "Adagrad", "FusedOptimizer", "OptimizerSpec", "RowWiseAdagrad"]


@dataclass(frozen=True)
class OptimizerSpec:
    """What every spec has.

    Args:
        lr: Learning rate, at least 0.
    """

    # The engine's name of the optimizer.
    algorithm: ClassVar[str]

    lr: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
            if not math.isfinite(_float32(value)) or value < 0:
                raise ValueError(
                    f"{name}: expected a finite number of at least 0 in float32, which the tables are in, got {value}"
                )

    def hyperparameters(self) -> dict[str, float]:
        """What a parameter group holds, and the engine reads at every backward."""
        return {name: float(value) for name, value in asdict(self).items() if name in ("lr", "eps")}

    def fill_state(self, state: Mapping[str, Tensor]) -> None:
        """Write the value that the state of a new table has."""


@dataclass(frozen=True)
class SGD(OptimizerSpec):
    """Stochastic gradient descent: `w -= lr * g`, on the rows that the batch touched.

    Args:
        lr: Learning rate.

    Example:
        >>> import torch, dlrm_rs
        >>> table = dlrm_rs.EmbeddingBag.from_pretrained(
        ...     torch.ones(4, 2), freeze=False, mode="sum", optimizer=dlrm_rs.optim.SGD(lr=0.5)
        ... )
        >>> table(torch.tensor([[1, 1, 3]])).sum().backward()
        >>> table.weight.detach()
        tensor([[1.0000, 1.0000],
                [0.0000, 0.0000],
                [1.0000, 1.0000],
                [0.5000, 0.5000]])
    """

    algorithm = "sgd"


@dataclass(frozen=True)
class Adagrad(OptimizerSpec):
    """Adagrad: `s += g^2; w -= lr * g / (sqrt(s) + eps)`, on the rows that the batch touched. As `torch.optim.Adagrad`.

    Args:
        lr: Learning rate.
        eps: Keeps the quotient finite.
        initial_accumulator_value: What `s` starts from.
    """

    algorithm = "adagrad"

    lr: float = 1e-2
    eps: float = 1e-10
    initial_accumulator_value: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        # An element that never had a gradient moves by lr / eps * 0, which must not be NaN.
        if not _float32(self.eps):
            raise ValueError(f"eps: expected a number above 0 in float32, which the tables are in, got {self.eps}")
        if not math.isfinite(_float32(_float32(self.lr) / _float32(self.eps))):
            raise ValueError(
                f"lr, eps: expected lr / eps to be finite in float32, which the tables are in, got {self.lr} and "
                f"{self.eps}"
            )

    def fill_state(self, state: Mapping[str, Tensor]) -> None:
        """Write `initial_accumulator_value`."""
        if self.initial_accumulator_value:  # the engine's memory is zeroed and untouched: leave it so
            state["sum"].fill_(self.initial_accumulator_value)


@dataclass(frozen=True)
class RowWiseAdagrad(Adagrad):
    """Adagrad with one number of state per row: `s += mean(g^2); w -= lr * g / (sqrt(s) + eps)`.

    Args:
        lr: Learning rate.
        eps: Keeps the quotient finite.
        initial_accumulator_value: What `s` starts from.

    Example:
        >>> import torch, dlrm_rs
        >>> spec = dlrm_rs.optim.RowWiseAdagrad(lr=0.1)
        >>> table = dlrm_rs.EmbeddingBag(3, 2, mode="sum", _weight=torch.zeros(3, 2), optimizer=spec)
        >>> table(torch.tensor([[1]])).sum().backward()
        >>> table.fused_optimizer.state[table.weight]["sum"]
        tensor([0., 1., 0.])
    """

    algorithm = "rowwise_adagrad"

    eps: float = 1e-8


class FusedOptimizer(torch.optim.Optimizer):
    """The optimizer inside a module, in the shape that torch's schedulers and checkpoints know.

    One parameter group, over the weights of all the module's tables in their order. The learning rate (and `eps`) is
    read from the group at every backward. `state[weight]` holds views of the engine's memory: write to them to
    change the state, put nothing in their place. A module makes it; there is no need to.

    Args:
        spec: The optimizer and where it starts.
        weights: The tables' weights, `T` of them.
        states: The engine's state of each, by torch's names.
    """

    # The engine's state; none in a copy that was made without its module, which then holds plain copies.
    _views: Sequence[Mapping[str, Tensor]] = ()

    def __init__(
        self, spec: OptimizerSpec, weights: Sequence[nn.Parameter], states: Sequence[Mapping[str, Tensor]]
    ) -> None:
        # The algorithm goes along into the group, and so into checkpoints, which another algorithm then refuses.
        super().__init__(list(weights), {"algorithm": spec.algorithm, **spec.hyperparameters()})
        for state in states:
            spec.fill_state(state)
        self._views = states
        self.state.update({weight: dict(view) for weight, view in zip(weights, states, strict=True)})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Return the closure's loss, and do nothing else: the rows moved in backward.

        Call it all the same, for then a learning-rate scheduler sees the order of calls that it expects.
        """
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a second group: the tables of a module are trained together.

        Raises:
            ValueError: Always.
        """
        if self.param_groups:
            raise ValueError("param_group: expected none, as a fused optimizer has one group, the tables of its module")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a checkpoint into the engine's memory.

        Raises:
            ValueError: It is of another optimizer or of other tables; nothing has changed then.
        """
        groups, state = self.param_groups, self.state
        try:
            super().load_state_dict(state_dict)
            self._check_group(self.param_groups[0])
            self.attach(self.param_groups[0]["params"], self._views)
        except BaseException:
            self.param_groups, self.state = groups, state
            raise

    def _check_group(self, loaded: Mapping[str, Any]) -> None:
        # Other keys are torch's, such as a scheduler's `initial_lr`.
        needed = [key for key in ("algorithm", "lr", "eps") if key in self.defaults]
        if any(key not in loaded for key in needed) or loaded["algorithm"] != self.defaults["algorithm"]:
            raise ValueError(
                f"state_dict: expected a parameter group of {self.defaults['algorithm']} with {needed}, "
                f"got one of {loaded.get('algorithm')} with {list(loaded)}"
            )

    def attach(self, weights: Sequence[nn.Parameter], views: Sequence[Mapping[str, Tensor]]) -> None:
        """Make `views` the state, holding what the state holds now.

        Args:
            weights: The tables' weights, which replace those that the optimizer had.
            views: The engine's state of each.

        Raises:
            ValueError: The state has other names or shapes than `views`; nothing has changed then.
        """
        states = [self.state.get(weight, {}) for weight in self.param_groups[0]["params"]]
        pairs = list(zip(states, views, strict=False))
        for table, (state, view) in enumerate(pairs):
            _check_same_shapes(table, state, view)
        with torch.no_grad():
            for state, view in pairs:
                for name, tensor in view.items():
                    if state[name].data_ptr() != tensor.data_ptr():
                        tensor.copy_(state[name])
        # The state has what the parameters need at every moment: Ctrl-C may come between any two of these.
        attached: dict[Tensor, Any] = {weight: dict(view) for weight, view in zip(weights, views, strict=False)}
        self.state = defaultdict(dict, {**self.state, **attached})
        self.param_groups[0]["params"] = list(weights)
        if views:
            self._views = views
            self.state = defaultdict(dict, attached)


def _float32(number: float) -> float:
    """The number as the engine gets it; beyond the largest infinity, below the smallest 0."""
    return ctypes.c_float(number).value


def _check_same_shapes(table: int, state: Mapping[str, Any], view: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in view.items()}
    got = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    if got != expected:
        raise ValueError(f"state_dict: expected the state of table {table} to have shapes {expected}, got {got}")
