"""`KeyedTensor`: pooled features side by side, found by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

__all__ = ["KeyedTensor", "position"]


class KeyedTensor:
    """Features side by side in one matrix, found by name: what pooling a `KeyedJaggedTensor` gives.

    Args:
        keys: Names of the features, all different.
        length_per_key: The number of columns, `D`, of every feature.
        values: `(B, sum of D)`.

    Raises:
        ValueError: The columns are not the sum of `length_per_key`, or keys repeat or do not match the lengths.

    Example:
        >>> pooled = KeyedTensor(["carrier", "origin"], [1, 2], torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        >>> pooled["origin"]
        tensor([[2., 3.],
                [5., 6.]])
        >>> pooled.offset_per_key()
        [0, 1, 3]
        >>> pooled
        KeyedTensor(keys ['carrier', 'origin'], length_per_key [1, 2], values (2, 3) torch.float32, device cpu)
    """

    def __init__(self, keys: Sequence[str], length_per_key: Sequence[int], values: Tensor) -> None:
        self._keys = list(keys)
        self._length_per_key = list(length_per_key)
        self._values = values
        if len(set(self._keys)) != len(self._keys):
            raise ValueError(f"keys: expected names that differ, got {self._keys}")
        if len(self._length_per_key) != len(self._keys):
            raise ValueError(
                f"length_per_key: expected {len(self._keys)} lengths, one per key, got {len(self._length_per_key)}"
            )
        if values.dim() != 2 or values.shape[1] != sum(self._length_per_key):
            raise ValueError(f"values: expected shape (B, {sum(self._length_per_key)}), got {tuple(values.shape)}")

    @classmethod
    def _of_checked(cls, keys: list[str], length_per_key: list[int], values: Tensor) -> Self:
        """One of names that differ and columns of their lengths, as a lookup's are: nothing is looked at again."""
        made = cls.__new__(cls)
        made._keys, made._length_per_key, made._values = keys.copy(), length_per_key.copy(), values
        return made

    def values(self) -> Tensor:
        """All features, `(B, sum of D)`."""
        return self._values

    def keys(self) -> list[str]:
        """The names of the features."""
        return self._keys

    def length_per_key(self) -> list[int]:
        """The number of columns, `D`, of every feature."""
        return self._length_per_key

    def offset_per_key(self) -> list[int]:
        """The first column of every feature, and the end of the last: `F + 1` numbers."""
        return list(accumulate(self._length_per_key, initial=0))

    def to_dict(self) -> dict[str, Tensor]:
        """Every feature by its name, `(B, D)` each, as views."""
        return dict(zip(self._keys, torch.split(self._values, self._length_per_key, dim=1), strict=True))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> KeyedTensor:
        """The same on another device."""
        return KeyedTensor(self._keys, self._length_per_key, self._values.to(device, non_blocking=non_blocking))

    def device(self) -> torch.device:
        """The device of the values."""
        return self._values.device

    def __getitem__(self, key: str) -> Tensor:
        feature = position(self._keys, key)
        start = sum(self._length_per_key[:feature])
        return self._values[:, start : start + self._length_per_key[feature]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __repr__(self) -> str:
        return (
            f"KeyedTensor(keys {self._keys}, length_per_key {self._length_per_key}, "
            f"values {tuple(self._values.shape)} {self._values.dtype}, device {self.device()})"
        )


def position(keys: list[str], key: str) -> int:
    """Where a key is.

    Raises:
        KeyError: It is none of them.
    """
    try:
        return keys.index(key)
    except ValueError:
        raise KeyError(f"key: expected one of {keys}, got {key!r}") from None
