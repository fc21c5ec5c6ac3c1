"""`FusedOptimizer`: the optimizer inside a module, in the shape that torch's schedulers and checkpoints know."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from dlrm_rs.optim.specs import OptimizerSpec
from dlrm_rs.optim.waiting import Waiting, new_gate

if TYPE_CHECKING:
    from dlrm_rs.pipeline.lane import Lane

__all__ = ["FusedOptimizer"]

# What a checkpoint leaves as it is.
_OF_THE_MODULE = ("update", "check_finite")


class FusedOptimizer(torch.optim.Optimizer):
    """The optimizer inside a module, in the shape that torch's schedulers and checkpoints know.

    One parameter group over the weights of all the module's tables in their order, or one more for each table of the
    spec's `table_lr`; `"tables"` tells which tables it has. Hyperparameters are read from the groups at every step, and
    `"step"` counts these. `state[weight]` holds views of the engine's memory: write to them to change the state, put
    nothing in their place. A module makes it; there is no need to.

    Where rows move in `step()`, the gate, one more Parameter at the end of the last group, stands for the gradients
    that wait: `torch.amp.GradScaler` unscales them by it, and skips the step where they are not finite. A Parameter of
    the module, `weight_mark`, has a gradient then, the mark: without it `step()` has nothing to do, as torch's
    optimizers, so that `zero_grad()` of the model or of another optimizer drops the gradients, too. Nothing else that
    is done to gradients reaches them, `torch.nn.utils.clip_grad_norm_` included. A checkpoint has neither, nor has a
    copy of the module any of the gradients that wait.

    Args:
        spec: The optimizer and where it starts.
        names: Of the tables, `T` of them.
        weights: The tables' weights.
        states: The engine's state of each, by torch's names.

    Raises:
        ValueError: `table_lr` names a table that is not there.
    """

    # The engine's state; none in a copy that was made without its module, which then holds plain copies.
    _views: Sequence[Mapping[str, Tensor]] = ()
    _waiting: Waiting | None = None
    # That of a pipeline, which updates late; None outside of its loop.
    lane: Lane | None = None

    def __init__(
        self,
        spec: OptimizerSpec,
        names: Sequence[str],
        weights: Sequence[nn.Parameter],
        states: Sequence[Mapping[str, Tensor]],
    ) -> None:
        unknown = [name for name in spec.table_lr if name not in names]
        if unknown:
            raise ValueError(f"table_lr: expected names of tables, some of {list(names)}, got {unknown}")
        self._groups_are_made = False
        own = [table for table, name in enumerate(names) if name in spec.table_lr]
        rest = [table for table in range(len(names)) if table not in own]
        groups: list[dict[str, Any]] = [{"params": [weights[t] for t in rest], "tables": rest}] if rest else []
        groups += [{"params": [weights[t]], "tables": [t], "lr": float(spec.table_lr[names[t]])} for t in own]
        if spec.update == "step":
            groups[-1]["params"].append(new_gate())
        # The algorithm goes along into the groups, and so into checkpoints, which another algorithm then refuses.
        super().__init__(groups, {"algorithm": spec.algorithm, **spec.hyperparameters(), "step": 0})
        self._groups_are_made = True
        for state in states:
            spec.fill_state(state)
        self.follow(states)

    def begin_step(self) -> list[dict[str, Any]]:
        """Count a step.

        Returns:
            The parameter group of every table in the tables' order, as it is now.
        """
        for group in self.param_groups:
            group["step"] += 1
        copies = [dict(group) for group in self.param_groups]
        of_table = {table: copied for copied in copies for table in copied["tables"]}
        return [of_table[table] for table in range(len(of_table))]

    def take_back_step(self) -> None:
        """Count a step less, as the one that was begun could not be taken."""
        for group in self.param_groups:
            group["step"] -= 1

    def _weights(self) -> list[nn.Parameter]:
        """The weights in the tables' order."""
        of_table = {t: w for group in self.param_groups for t, w in zip(group["tables"], group["params"], strict=False)}
        return [of_table[table] for table in range(len(of_table))]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move the rows, if that is not done in backward; call it in either case, as schedulers expect it.

        Args:
            closure: Computes the loss anew, and its gradients.

        Returns:
            What the closure returned.

        Raises:
            FloatingPointError: A gradient is not finite, and the spec's `check_finite` refuses that.
            RuntimeError: Something that backward has kept was changed in place since.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        waiting = self._waiting.take() if self._waiting is not None else []
        if waiting:
            groups = self.begin_step()
            try:
                waiting[0][0].run(waiting, groups)
            except BaseException:
                self.take_back_step()
                raise
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients that wait for `step()`."""
        super().zero_grad(set_to_none=True)
        if self._waiting is not None:
            self._waiting.drop()

    @property
    def gate(self) -> nn.Parameter | None:
        """The Parameter that stands for the gradients that wait; None where rows move in backward."""
        group = self.param_groups[-1]
        gate: nn.Parameter | None = next(iter(group["params"][len(group["tables"]) :]), None)
        return gate

    def waiting_bytes(self) -> int:
        """Bytes of what waits for `step()`: ids, weights of ids and gradients of every backward since `zero_grad()`."""
        return 0 if self._waiting is None else self._waiting.bytes()

    def keep(self, call: Any, mark: nn.Parameter) -> None:
        """Let a call, a `KeptCall`, wait for `step()`.

        Args:
            call: The call.
            mark: The Parameter of the module that tells whether its gradients have been dropped.
        """
        gate = self.gate
        assert gate is not None  # by which the call came here
        if self._waiting is None or self._waiting.gate is not gate:
            self._waiting = Waiting(gate, mark)
        self._waiting.keep(call)

    @property
    def update_at(self) -> str:
        """When rows move: "backward" or "step".

        Raises:
            ValueError: The parameter group says otherwise than the spec did.
        """
        made, got = "backward" if self.gate is None else "step", self.param_groups[0]["update"]
        if got != made:
            raise ValueError(
                f"update: expected {made!r} in the parameter group, as the optimizer was made, got {got!r}"
            )
        return made

    @property
    def check_finite(self) -> bool:
        """Whether gradients that are not finite are refused."""
        return bool(self.param_groups[0]["check_finite"])

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What `torch.amp.GradScaler.step` asks first: whether `step` unscales by itself, which it does not.

        Raises:
            RuntimeError: Rows have moved in backward already, by the gradients of the scaled loss.
        """
        if self._waiting is not None:
            self._waiting.catch_up()  # lest the scaler looks at what has been dropped
        if self.update_at == "backward":
            raise RuntimeError(
                "GradScaler: expected a fused optimizer with update='step', got update='backward', where rows move in "
                "backward by the gradient of the loss that is differentiated: here of the scaled one, so the tables "
                "are not what they should be"
            )
        return False

    def refuse(self, finite: bool) -> None:
        """Refuse gradients that are not finite, if that is to be.

        Raises:
            FloatingPointError: They are not.
        """
        if self.check_finite and not finite:
            raise FloatingPointError(
                "gradient: expected finite numbers, and small enough that their sums are finite in float32, got an "
                "infinity, a NaN or larger ones; the tables are as they were"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse another group: the tables of a module are trained together.

        Raises:
            ValueError: Always.
        """
        if self._groups_are_made:
            raise ValueError(
                "param_group: expected none, as the groups of a fused optimizer are the tables of its module"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The state and the hyperparameters, of the tables alone."""
        self._settle()
        state_dict = super().state_dict()
        if self.gate is not None:
            state_dict["param_groups"][-1]["params"].pop()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a checkpoint into the engine's memory.

        Hyperparameters become those of the checkpoint, but `update` and `check_finite` stay: they say how the module is
        used, not what it has learned.

        Raises:
            ValueError: It is of another optimizer or of other tables, or its `"step"` or `"seed"` is no count; nothing
                has changed then.
        """
        self._settle()
        groups, state = self.param_groups, self.state
        loaded: list[dict[str, Any]] = []
        hook = self.register_load_state_dict_pre_hook(lambda _, given: loaded.append(given))
        try:
            super().load_state_dict(state_dict if self.gate is None else _with_gate(state_dict))
            for group, present in zip(self.param_groups, groups, strict=True):
                self._check_group(group, present)
                group.update({key: present[key] for key in _OF_THE_MODULE})
            self._take_exactly(loaded[0])
            self.attach(self._weights(), self._views)
        except BaseException:
            self.param_groups, self.state = groups, state
            raise
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return super().__getstate__()

    def _settle(self) -> None:
        """Wait for the update that a pipeline may still be at."""
        if self.lane is not None:
            self.lane.settle()

    def _take_exactly(self, state_dict: Mapping[str, Any]) -> None:
        """Make the state that of a checkpoint once more: torch has brought it to the dtype of the rows."""
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        present = [weight for group in self.param_groups for weight in group["params"]]
        states = state_dict["state"]
        self.state.update(
            {w: dict(states[number]) for number, w in zip(saved, present, strict=True) if number in states}
        )

    def _check_group(self, loaded: Mapping[str, Any], present: Mapping[str, Any]) -> None:
        # Other keys are torch's, such as a scheduler's `initial_lr`.
        needed = [*(key for key in self.defaults if key != "differentiable"), "tables"]  # the one is torch's
        same = all(loaded.get(key) == present[key] for key in ("algorithm", "tables"))
        if not same or any(key not in loaded for key in needed):
            raise ValueError(
                f"state_dict: expected a parameter group of {present['algorithm']} over tables {present['tables']} "
                f"with {needed}, got one of {loaded.get('algorithm')} over {loaded.get('tables')} with {list(loaded)}"
            )
        for key in ("step", "seed"):
            count = loaded[key]
            if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 2**64:
                raise ValueError(
                    f"state_dict: expected {key!r} of a parameter group to be an int from 0, got {count!r}"
                )

    def follow(self, views: Sequence[Mapping[str, Tensor]]) -> None:
        """Make `views`, one of each weight, the state, with what they hold."""
        self._views = views
        self.state.update({weight: dict(view) for weight, view in zip(self._weights(), views, strict=True)})

    def attach(self, weights: Sequence[nn.Parameter], views: Sequence[Mapping[str, Tensor]]) -> None:
        """Make `views` the state, holding what the state holds now.

        Args:
            weights: The tables' weights, which replace those that the optimizer had.
            views: The engine's state of each.

        Raises:
            ValueError: The state has other names or shapes than `views`; nothing has changed then.
        """
        states = [self.state.get(weight, {}) for weight in self._weights()]
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
        self._put(weights)
        if views:
            self._views = views
            self.state = defaultdict(dict, attached)

    def _put(self, weights: Sequence[nn.Parameter]) -> None:
        """Make these the weights of the groups."""
        for group in self.param_groups:
            tables = group["tables"]
            group["params"] = [weights[table] for table in tables] + group["params"][len(tables) :]

    def rows_moved(self, weights: Sequence[nn.Parameter], views: Sequence[Mapping[str, Tensor]]) -> None:
        """Take over where the weights and the state are, since other rows have been put into the tables.

        Args:
            weights: The tables' weights, some perhaps in the place of others.
            views: The engine's state of each, which has stayed.
        """
        self._put(weights)
        self.state = defaultdict(dict)
        self.follow(views)


def _with_gate(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint with one more Parameter, at the end of the last group."""
    *groups, last = state_dict["param_groups"]
    count = sum(len(group["params"]) for group in groups) + len(last["params"])
    return {**state_dict, "param_groups": [*groups, {**last, "params": [*last["params"], count]}]}


def _check_same_shapes(table: int, state: Mapping[str, Any], view: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in view.items()}
    got = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    if got != expected:
        raise ValueError(f"state_dict: expected the state of table {table} to have shapes {expected}, got {got}")
