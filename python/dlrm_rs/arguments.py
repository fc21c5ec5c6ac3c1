"""What may be passed to a module: the checks, and the words when something else comes.

Owns the checks of types, devices, dtypes and options, which cost no look at the data. The contents of ids, offsets and
weights are checked by the engine, where they are used.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from dlrm_rs.row_formats import TORCH_DTYPES

__all__ = [
    "check_device",
    "check_no_nan",
    "check_number",
    "check_padding_idx",
    "check_pooling",
    "check_size",
    "check_table_weight",
    "float_tensor",
    "index_tensor",
]

POOLINGS = ("sum", "mean", "max")


def index_tensor(name: str, tensor: Tensor) -> Tensor:
    """Ids or offsets as the engine takes them: a contiguous int32 or int64 tensor on the CPU.

    Args:
        name: The argument's name, for messages.
        tensor: Any shape; a contiguous tensor comes back as it is.

    Raises:
        TypeError: Not a tensor, or not int32 or int64.
        ValueError: Not dense, or not on the CPU.
    """
    _check_cpu_tensor(name, tensor)
    if tensor.dtype is not torch.int64 and tensor.dtype is not torch.int32:
        raise TypeError(f"{name}: expected dtype torch.int64 or torch.int32, got {tensor.dtype}; use {name}.long()")
    return tensor.contiguous()


def float_tensor(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """Weights of ids as the engine takes them: a contiguous float32 tensor on the CPU.

    Args:
        name: The argument's name, for messages.
        tensor: As many elements as there are ids.
        shape: The shape of the ids.

    Raises:
        TypeError: Not a tensor, or not float32.
        ValueError: Not dense, not on the CPU, or not of `shape`.
    """
    _check_cpu_tensor(name, tensor)
    if tensor.dtype is not torch.float32:
        raise TypeError(f"{name}: expected dtype torch.float32, got {tensor.dtype}; use {name}.float()")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, that of the ids, got {tuple(tensor.shape)}")
    return tensor.contiguous()


def _check_cpu_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_cpu:
        raise ValueError(
            f"{name}: expected a tensor on the CPU, where the tables are, got device {tensor.device}; use {name}.cpu()"
        )
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense (strided) tensor, got layout {tensor.layout}")


def check_table_weight(name: str, weight: Tensor, shape: tuple[int, int], dtype: torch.dtype | None = None) -> None:
    """Refuse a tensor that cannot become the rows of a table.

    Args:
        name: What the tensor is, for messages.
        weight: The tensor.
        shape: `(N, D)` of the table.
        dtype: Of the table's rows; None where other rows are made of the tensor.

    Raises:
        TypeError: Not a tensor, or not of `dtype`; or, where that is None, not float32, float16 or bfloat16.
        ValueError: Not dense, not on the CPU, or not of `shape`.
    """
    _check_cpu_tensor(name, weight)
    allowed = list(TORCH_DTYPES.values()) if dtype is None else [dtype]
    if weight.dtype not in allowed:
        raise TypeError(
            f"{name}: expected dtype {' or '.join(map(str, allowed))}, got {weight.dtype}; use .to({allowed[0]})"
        )
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, (num_embeddings, embedding_dim), got {tuple(weight.shape)}")


def check_no_nan(name: str, weight: Tensor) -> None:
    """Refuse rows that hold a NaN.

    Raises:
        ValueError: There is one; the message says where the first is.
    """
    # A NaN survives a sum, so the usual case takes no memory; infinities of both signs make one too, hence the look.
    if torch.isnan(weight.detach().sum()):
        places = torch.isnan(weight.detach()).nonzero()
        if len(places):
            row, column = places[0].tolist()
            raise ValueError(f"{name}: expected numbers, got NaN at row {row}, column {column} ({len(places)} in all)")


def check_size(name: str, size: int) -> int:
    """A number of rows or columns, as an int of Python's.

    Args:
        name: What it counts, for messages.
        size: The number; NumPy's integers are some, too.

    Raises:
        TypeError: Not an integer.
        ValueError: Negative, or beyond 64 bits.
    """
    if not isinstance(size, Integral):
        raise TypeError(f"{name}: expected an integer, got {type(size).__name__}")
    if not 0 <= size < 2**63:
        raise ValueError(f"{name}: expected a number from 0 to 2^63 - 1, got {size}")
    return int(size)


def check_number(name: str, number: object, *, is_positive: bool = False, can_be_infinite: bool = False) -> float:
    """An amount, such as seconds or bytes, as a float.

    Args:
        name: What it is, for messages.
        number: The amount; NumPy's numbers are some, too.
        is_positive: Whether 0 is refused.
        can_be_infinite: Whether infinity is not.

    Raises:
        TypeError: Not a number.
        ValueError: Negative, NaN, or one of what is refused.
    """
    if not isinstance(number, Real) or isinstance(number, bool):
        raise TypeError(f"{name}: expected a number, got {number!r}")
    amount = float(number)
    is_large_enough = amount > 0 if is_positive else amount >= 0
    if not is_large_enough or (amount == math.inf and not can_be_infinite):
        kind, bound = "" if can_be_infinite else "finite ", "above" if is_positive else "of at least"
        raise ValueError(f"{name}: expected a {kind}number {bound} 0, got {number}")
    return amount


def check_device(device: torch.device | str | int | None) -> None:
    """Refuse a device that is not the CPU.

    Raises:
        ValueError: It is another one.
    """
    if device is not None and torch.device(device).type != "cpu":
        raise ValueError(
            f"device: expected None or 'cpu', as the tables live in the memory of the host, got {str(device)!r}"
        )


def check_pooling(name: str, pooling: object) -> str:
    """The engine's name of a pooling.

    Args:
        name: The argument's name, for messages.
        pooling: A name, or an enum member whose value is a name, in any case.

    Raises:
        ValueError: There is no such pooling.
    """
    wanted = str(getattr(pooling, "value", pooling)).lower()
    if wanted not in POOLINGS:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, POOLINGS))}, got {pooling!r}")
    return wanted


def check_padding_idx(padding_idx: int | None, num_embeddings: int) -> int | None:
    """The row that pads, counted from the front.

    Args:
        padding_idx: A row; negative counts from the back.
        num_embeddings: `N`.

    Raises:
        ValueError: It is not a row of the table.
    """
    if padding_idx is None:
        return None
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"padding_idx: expected a row of the table, {-num_embeddings} to {num_embeddings - 1}, got {padding_idx}"
        )
    return int(padding_idx) % int(num_embeddings)
