"""`FusedOptimizer`: the optimizer inside a module, in the shape that torch's schedulers and checkpoints know."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from dlrm_rs.optim.specs import OptimizerSpec

__all__ = ["FusedOptimizer"]

# A number that bfloat16 has, too, and that stays one when it is divided by the scale of a loss.
_TOKEN = 2.0**-100

# What a checkpoint leaves as it is.
_OF_THE_MODULE = ("update", "check_finite")


class FusedOptimizer(torch.optim.Optimizer):
    """The optimizer inside a module, in the shape that torch's schedulers and checkpoints know.

    One parameter group over the weights of all the module's tables in their order, or one more for each table of the
    spec's `table_lr`; `"tables"` tells which tables it has. Hyperparameters are read from the groups at every step, and
    `"step"` counts these. `state[weight]` holds views of the engine's memory: write to them to change the state, put
    nothing in their place. A module makes it; there is no need to.

    Where rows move in `step()`, backward gives one of the weights a sparse gradient of a single row, the token, that
    stands for the gradients of all tables: without it `step()` has nothing to do, as torch's optimizers; what
    multiplies it, as `torch.amp.GradScaler.unscale_` does, multiplies them; and it is infinite where they are
    not finite, so that a `GradScaler` skips the step. It is so small that another optimizer over that weight would not
    change the row. Quantized rows have no weight, but a Parameter without elements that stands in for it.

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
    # What waits for `step()`, and the weight that has the token.
    _kept: Sequence[Any] = ()
    _holder: Tensor | None = None
    _token_came = False

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
        groups = [{"params": [weights[t] for t in rest], "tables": rest}] if rest else []
        groups += [{"params": [weights[t]], "tables": [t], "lr": float(spec.table_lr[names[t]])} for t in own]
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
        of_table = {t: w for group in self.param_groups for t, w in zip(group["tables"], group["params"], strict=True)}
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
        if self._kept:
            self._take_kept()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients that wait for `step()`."""
        super().zero_grad(set_to_none=True)
        self._kept = ()

    def keep(self, call: Any, weight: Tensor) -> None:
        """Let a call, a `KeptCall`, wait for `step()`; `weight` will have the token."""
        if self._token_came and self._holder is not None and self._holder.grad is None:
            self._kept = ()  # whoever took the token away has dropped the gradients
        if self._kept and self._holder is not weight:
            raise RuntimeError("backward: expected the weights that require gradients to stay the same until step()")
        if self._holder is not weight:
            weight.register_post_accumulate_grad_hook(self._note_token)
        self._kept, self._holder, self._token_came = [*self._kept, call], weight, False

    def _note_token(self, _: Tensor) -> None:
        # Only then can it be missed: in one backward the token comes after all calls have been kept.
        self._token_came = True

    @staticmethod
    def token(weight: Tensor, finite: bool) -> Tensor:
        """The gradient of a weight that stands for those of all tables."""
        value = _TOKEN if finite else math.inf
        return torch.sparse_coo_tensor(
            torch.zeros(1, 1, dtype=torch.int64, device="cpu"),
            torch.full((1, *weight.shape[1:]), value, dtype=weight.dtype, device="cpu"),
            weight.shape,
            check_invariants=False,
        )

    @property
    def update_at(self) -> str:
        """When rows move: "backward" or "step"."""
        return str(self.param_groups[0]["update"])

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
                "gradient: expected finite numbers, got an infinity or a NaN; the tables are as they were"
            )

    def _take_kept(self) -> None:
        token = None if self._holder is None else self._holder.grad
        kept, count = self._kept, len(self._kept)
        if token is None:
            self._kept = ()
            return
        # As many tokens as backwards, each multiplied alike.
        values = token._values() if token.is_sparse else token[:1]
        if not values.numel():
            raise RuntimeError(
                "step: expected gradients scaled as by torch.amp.GradScaler, got some multiplied in place, which takes "
                "those of quantized rows away; clip them by the fused optimizer itself"
            )
        factor = values.view(len(values), -1)[:, 0].double().sum().item() / count / _TOKEN
        groups = self.begin_step()
        try:
            kept[0].run(kept[1:], factor if math.isfinite(factor) else 1.0, groups)
        except BaseException:
            self.take_back_step()
            raise

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a checkpoint into the engine's memory.

        Hyperparameters become those of the checkpoint, but `update` and `check_finite` stay: they say how the module is
        used, not what it has learned.

        Raises:
            ValueError: It is of another optimizer or of other tables, or its `"step"` or `"seed"` is no count; nothing
                has changed then.
        """
        groups, state = self.param_groups, self.state
        loaded: list[dict[str, Any]] = []
        hook = self.register_load_state_dict_pre_hook(lambda _, given: loaded.append(given))
        try:
            super().load_state_dict(state_dict)
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
        for group in self.param_groups:
            group["params"] = [weights[table] for table in group["tables"]]
        if views:
            self._views = views
            self.state = defaultdict(dict, attached)

    def rows_moved(self, weights: Sequence[nn.Parameter], views: Sequence[Mapping[str, Tensor]]) -> None:
        """Take over where the weights and the state are, since other rows have been put into the tables.

        Args:
            weights: The tables' weights, some perhaps in the place of others.
            views: The engine's state of each, which has stayed.
        """
        for group in self.param_groups:
            group["params"] = [weights[table] for table in group["tables"]]
        self.state = defaultdict(dict)
        self.follow(views)


def _check_same_shapes(table: int, state: Mapping[str, Any], view: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in view.items()}
    got = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    if got != expected:
        raise ValueError(f"state_dict: expected the state of table {table} to have shapes {expected}, got {got}")
