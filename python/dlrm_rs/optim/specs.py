"""The optimizers by their hyperparameters; the formulas are those of the engine's files of the same names."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dlrm_rs.row_formats import row_format

__all__ = [
    "FTRL",
    "LAMB",
    "LARSSGD",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "OptimizerSpec",
    "PartialRowWiseAdam",
    "PartialRowWiseLAMB",
    "RowWiseAdagrad",
    "RowWiseRMSprop",
]

# Of how a spec is used, not of its formula: not in parameter groups.
_USES = ("table_lr", "split_bf16", "state_dtype", "initial_accumulator_value")
_FLAGS = ("check_finite", "split_bf16", "nesterov", "decoupled_weight_decay")
# None for no bound.
_BOUNDS = ("clip_norm", "clip_value", "max_norm")
# Decay by this much leaves less than nothing.
_BELOW_ONE = ("betas", "momentum", "alpha")


@dataclass(frozen=True)
class OptimizerSpec:
    """What every spec has.

    A tensor of one number, as torch's optimizers take for `lr`, is taken as that number.

    Args:
        lr: Learning rate, at least 0.
        clip_norm: Gradients are scaled down to at most this 2-norm, that over all rows of all tables of a step, by
            `min(1, clip_norm / (norm + 1e-6))` (`torch.nn.utils.clip_grad_norm_`); before `clip_value`. A norm that is
            infinite or NaN is refused by a `FloatingPointError`; the tables stay as they are.
        clip_value: Elements of a row's gradient are clamped to at most this size (`torch.nn.utils.clip_grad_value_`).
        max_norm: A row that is longer (2-norm) after its update is scaled down to this.
        table_lr: Learning rates of some tables by name, each then a parameter group; the others have `lr`.
        update: "backward" or "step": when rows move (see `dlrm_rs.optim`).
        check_finite: Refuse a gradient with an infinity or a NaN, or with numbers so large that a row's sum of as many
            as the batch has ids might be one, by a `FloatingPointError`; the tables stay as they are.
        split_bf16: Keep the lower 16 bits of bf16 rows beside them, in the optimizer's state: updates are then those of
            fp32 rows, and lookups read the bfloat16 nearest to each element. Else bf16 rows, and always fp16 rows and
            the codes of quantized ones, are rounded stochastically, unbiased, after every update. A module without a
            table of bf16 rows refuses it, `replace_embeddings` a model.
        state_dtype: How sums, means and momentum are kept: "fp32", or "bf16" (or the torch dtypes), which takes half
            the bytes. Arithmetic is in fp32, and the result rounded stochastically: by rounding to the nearest a sum
            would stop to grow, and a mean would not follow. So a sum or mean of squares is unbiased, and off by some
            6 % of itself however many steps it has; its root, by which steps are divided, by half of that. Not for
            FTRL, whose weights are computed anew from the state.
        seed: Of stochastic rounding, which depends on it, the step, and the place of an element, and on nothing else.
    """

    # The engine's name of the optimizer.
    algorithm: ClassVar[str]

    lr: float
    _: KW_ONLY
    clip_norm: float | None = None
    clip_value: float | None = None
    max_norm: float | None = None
    table_lr: Mapping[str, float] = field(default_factory=dict)
    update: Literal["backward", "step"] = "backward"
    check_finite: bool = False
    split_bf16: bool = False
    state_dtype: torch.dtype | str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _checked(item.name, getattr(self, item.name)))  # as it is frozen

    @property
    def state_format(self) -> str:
        """The engine's name of `state_dtype`.

        Raises:
            TypeError: There is no such format.
        """
        return row_format("state_dtype", self.state_dtype)

    def hyperparameters(self) -> dict[str, Any]:
        """What a parameter group holds, and the engine reads at every step."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _USES}
        keep = (bool, int, str, type(None), tuple)
        return {
            name: value if isinstance(value, keep) and name != "lr" else float(value) for name, value in values.items()
        }

    def fill_state(self, state: Mapping[str, Tensor]) -> None:
        """Write the value that the state of a new table has."""

    def check_row_formats(self, row_formats: Collection[str]) -> None:
        """Refuse what none of some tables can use.

        Args:
            row_formats: How the rows of the tables are stored.

        Raises:
            ValueError: `split_bf16` without bf16 rows.
        """
        if self.split_bf16 and "bf16" not in row_formats:
            raise ValueError(
                "split_bf16: expected a table of bf16 rows, whose lower halves are to be kept, got only rows of "
                f"{', '.join(sorted(row_formats))}"
            )

    def _check_eps(self) -> None:
        lr, eps = self.lr, getattr(self, "eps")  # noqa: B009 # of those that have one
        # An element that never had a gradient moves by lr / eps * 0, which must not be NaN.
        if not _float32(eps):
            raise ValueError(f"eps: expected a number above 0 in float32, which the tables are in, got {eps}")
        if not math.isfinite(_float32(_float32(lr) / _float32(eps))):
            raise ValueError(
                f"lr, eps: expected lr / eps to be finite in float32, which the tables are in, got {lr} and {eps}"
            )


@dataclass(frozen=True)
class _Decayed(OptimizerSpec):
    """What has weight decay of either kind.

    Args:
        weight_decay: L2: `g += weight_decay * w` (after clipping).
        decoupled_weight_decay: Instead `w *= 1 - lr * weight_decay`, as AdamW does.
    """

    _: KW_ONLY
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False


@dataclass(frozen=True)
class SGD(_Decayed):
    """Stochastic gradient descent: `w -= lr * g`, on the rows that the batch touched.

    With momentum `b = momentum * b + g; w -= lr * b`, or with Nesterov's `w -= lr * (g + momentum * b)`, as
    `torch.optim.SGD`.

    Args:
        lr: Learning rate.
        momentum: From 0 to below 1; 0 needs no state.
        nesterov: Whether momentum is Nesterov's.

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

    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not self.momentum:
            raise ValueError(f"nesterov: expected False where momentum is 0, got {self.nesterov}")

    @property
    def algorithm(self) -> str:  # type: ignore[override] # by the momentum
        """The engine's name of the optimizer."""
        return "momentum_sgd" if self.momentum else "sgd"


@dataclass(frozen=True)
class Adagrad(_Decayed):
    """Adagrad: `s += g^2; w -= lr * g / (sqrt(s) + eps)`, as `torch.optim.Adagrad` (Duchi et al. 2011).

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
        self._check_eps()

    def fill_state(self, state: Mapping[str, Tensor]) -> None:
        """Write `initial_accumulator_value`."""
        if self.initial_accumulator_value:  # the engine's memory is zeroed and untouched: leave it so
            state["sum"].fill_(self.initial_accumulator_value)


@dataclass(frozen=True)
class RowWiseAdagrad(Adagrad):
    """Adagrad with one number of state per row: `s += mean(g^2); w -= lr * g / (sqrt(s) + eps)`.

    The default of DLRM, and FBGEMM's `EXACT_ROWWISE_ADAGRAD`.

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


@dataclass(frozen=True)
class Adam(_Decayed):
    """Adam (Kingma and Ba 2015), lazily as `torch.optim.SparseAdam`: `t` counts steps, and untouched rows stay.

    `m = b1 * m + (1 - b1) * g; v = b2 * v + (1 - b2) * g^2;
    w -= lr * m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)`, with `eps` where `torch.optim.Adam` has it.

    Args:
        lr: Learning rate.
        betas: `b1` and `b2`.
        eps: Keeps the quotient finite.

    Example:
        >>> import torch, dlrm_rs
        >>> table = dlrm_rs.EmbeddingBag(3, 1, mode="sum", _weight=torch.zeros(3, 1), optimizer=dlrm_rs.optim.Adam(0.5))
        >>> table(torch.tensor([[1]])).sum().backward()
        >>> table.weight.detach().flatten()
        tensor([ 0.0000, -0.5000,  0.0000])
    """

    algorithm = "adam"

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_eps()


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), as `torch.optim.AdamW`, lazily."""

    _: KW_ONLY
    weight_decay: float = 1e-2
    decoupled_weight_decay: bool = True


@dataclass(frozen=True)
class PartialRowWiseAdam(Adam):
    """Adam whose second moment is one number per row, of `mean(g^2)`: FBGEMM's `PARTIAL_ROWWISE_ADAM`.

    FBGEMM's weight decay, here and in its Adam, is decoupled: `w -= lr * (u + weight_decay * w)`, with `u` Adam's
    direction. Ours is L2 unless `decoupled_weight_decay=True`, which is the same.
    """

    algorithm = "partial_rowwise_adam"


@dataclass(frozen=True)
class LAMB(OptimizerSpec):
    """LAMB (You et al. 2020), with a row for a layer: FBGEMM's `LAMB`, but for rows of zeros.

    With `u` Adam's direction: `u += weight_decay * w; w -= lr * |w| / |u| * u`, 2-norms of the row; the ratio is
    1 where either is 0. (FBGEMM's is 0 where the row is: there such a row never moves.)

    Args:
        lr: Learning rate.
        betas: As of Adam.
        eps: As of Adam.
        weight_decay: In the formula.
    """

    algorithm = "lamb"

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_eps()


@dataclass(frozen=True)
class PartialRowWiseLAMB(LAMB):
    """LAMB whose second moment is one number per row, of `mean(g^2)`: FBGEMM's `PARTIAL_ROWWISE_LAMB`, as `LAMB` is."""

    algorithm = "partial_rowwise_lamb"


@dataclass(frozen=True)
class LARSSGD(OptimizerSpec):
    """LARS (You, Gitman and Ginsburg 2017), with a row for a layer: FBGEMM's `LARS_SGD`, but for rows of zeros.

    `r = eta * |w| / (|g| + weight_decay * |w|)`, 2-norms of the row, 1 where `|w|` or the divisor is 0 (FBGEMM's is 0
    where the row is: there such a row never moves); `b = momentum * b + lr * r * (g + weight_decay * w); w -= b`.

    Args:
        lr: Learning rate.
        momentum: From 0 to below 1.
        eta: The trust coefficient.
        weight_decay: In the formula.
    """

    algorithm = "lars_sgd"

    momentum: float = 0.9
    eta: float = 1e-3
    weight_decay: float = 0.0


@dataclass(frozen=True)
class RowWiseRMSprop(_Decayed):
    """RMSprop with one number of state per row.

    `v = alpha * v + (1 - alpha) * mean(g^2); w -= lr * g / (sqrt(v) + eps)`: `torch.optim.RMSprop` on the mean of a
    row's squares.

    Args:
        lr: Learning rate.
        alpha: By what the mean decays.
        eps: Keeps the quotient finite.
    """

    algorithm = "rowwise_rmsprop"

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_eps()


@dataclass(frozen=True)
class FTRL(OptimizerSpec):
    """FTRL-Proximal (McMahan et al., "Ad click prediction: a view from the trenches", KDD 2013, algorithm 1).

    `sigma = (sqrt(n + g^2) - sqrt(n)) / lr; z += g - sigma * w; n += g^2`; then `w = 0` where `|z| <= l1`, else
    `w = -(z - sign(z) * l1) / ((beta + sqrt(n)) / lr + l2)`. An element that never had a gradient keeps what it began
    with.

    A schedule has to keep the learning rate above 0: a step at 0, as the first of a warm-up may be, is refused.

    Args:
        lr: The paper's alpha, above 0, by which is divided.
        beta: Slows the first steps.
        l1: Makes weights 0.
        l2: Makes weights small.
    """

    algorithm = "ftrl"

    lr: float = 0.1
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _float32(self.lr):
            raise ValueError(f"lr: expected a number above 0 in float32 for FTRL, which divides by it, got {self.lr}")


def _checked(name: str, value: Any) -> Any:
    """The value of a field, numbers as Python has them.

    Raises:
        TypeError: It is not of the field's type.
        ValueError: It is out of the field's range.
    """
    if name == "update":
        if value not in ("backward", "step"):
            raise ValueError(f"update: expected 'backward' or 'step', got {value!r}")
    elif name == "state_dtype":
        row_format(name, value)
    elif name in _FLAGS:
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
    elif name == "table_lr":
        if not isinstance(value, Mapping):
            raise TypeError(f"table_lr: expected learning rates by names of tables, as a dict, got {value!r}")
        return {table: _number(f"table_lr[{table!r}]", lr) for table, lr in value.items()}
    elif name == "betas":
        if not isinstance(value, Sequence) or len(value) != 2:
            raise TypeError(f"betas: expected a pair of numbers, got {value!r}")
        return tuple(_number(name, beta) for beta in value)
    elif not (value is None and name in _BOUNDS):
        return _number(name, value)
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"{name}: expected a number, got a tensor of shape {tuple(value.shape)}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(_float32(value)) or value < 0:
        raise ValueError(
            f"{name}: expected a finite number of at least 0 in float32, which the tables are in, got {value}"
        )
    if name in _BELOW_ONE and _float32(value) >= 1:
        raise ValueError(f"{name}: expected a number from 0 to below 1, got {value}")
    if name in _BOUNDS and not _float32(value):
        raise ValueError(f"{name}: expected None or a number above 0, got {value}")
    if name == "seed" and (not isinstance(value, int) or value >= 2**64):
        raise ValueError(f"seed: expected an int below 2**64, got {value}")
    return value


def _float32(number: float) -> float:
    """The number as the engine gets it; beyond the largest infinity, below the smallest 0."""
    return ctypes.c_float(number).value
