"""Ragged batches and pooled features by name: the part of TorchRec's containers that a model needs.

The names, the argument order and the layouts are TorchRec's, so code moves between the two by changing an import.
Letters: `F` features (keys), `B` batch (`stride`), `L` ids in all, `D` dim of a feature's embedding.

These classes check shapes, which costs nothing. The contents of `values` and `offsets` are checked where they are
used: by the lookup.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor

_INTEGERS = (torch.int32, torch.int64)


class _Jagged:
    """Values cut into bags: bag `i` is `values[offsets[i]:offsets[i + 1]]`; lengths and offsets give each other."""

    def __init__(self, values: Tensor, weights: Tensor | None, lengths: Tensor | None, offsets: Tensor | None) -> None:
        if weights is not None and weights.shape != values.shape[:1]:
            raise ValueError(
                f"weights: expected one per value, shape {tuple(values.shape[:1])}, got {tuple(weights.shape)}"
            )
        if lengths is None and offsets is None:
            raise ValueError("lengths, offsets: expected at least one of the two, got None for both")
        if lengths is not None:
            _check_vector("lengths", lengths)
        if offsets is not None:
            _check_vector("offsets", offsets)
            if offsets.numel() == 0:
                raise ValueError("offsets: expected one element more than bags, so at least 1, got 0")
        if lengths is not None and offsets is not None and offsets.numel() != lengths.numel() + 1:
            raise ValueError(
                f"offsets: expected {lengths.numel() + 1} elements for {lengths.numel()} lengths, got {offsets.numel()}"
            )
        for name, tensor in (("weights", weights), ("lengths", lengths), ("offsets", offsets)):
            if tensor is not None and tensor.device != values.device:
                raise ValueError(f"{name}: expected on the device of values, {values.device}, got {tensor.device}")
        self._values = values
        self._weights = weights
        self._lengths = lengths
        self._offsets = offsets

    def values(self) -> Tensor:
        """The ids (or rows) of all bags, one after another, `(L,)` or `(L, D)`."""
        return self._values

    def weights(self) -> Tensor:
        """The weight of every value, `(L,)`.

        Raises:
            ValueError: There are no weights; `weights_or_none` answers without raising.
        """
        if self._weights is None:
            raise ValueError(f"weights: this {type(self).__name__} was made without weights")
        return self._weights

    def weights_or_none(self) -> Tensor | None:
        """The weight of every value, `(L,)`, or None."""
        return self._weights

    def lengths(self) -> Tensor:
        """The number of values in every bag, `(bags,)`; computed from the offsets on first use."""
        if self._lengths is None:
            self._lengths = torch.diff(self.offsets())
        return self._lengths

    def lengths_or_none(self) -> Tensor | None:
        """The lengths if they were given or computed already, else None."""
        return self._lengths

    def offsets(self) -> Tensor:
        """Where every bag begins, and the end of the last, `(bags + 1,)`; computed from the lengths on first use.

        The dtype is that of what was given, int64 or int32.
        """
        if self._offsets is None:
            lengths = self.lengths()
            self._offsets = torch.zeros(lengths.numel() + 1, dtype=lengths.dtype, device=lengths.device)
            torch.cumsum(lengths, dim=0, dtype=lengths.dtype, out=self._offsets[1:])
        return self._offsets

    def offsets_or_none(self) -> Tensor | None:
        """The offsets if they were given or computed already, else None."""
        return self._offsets

    def device(self) -> torch.device:
        """The device of the values."""
        return self._values.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on another device; tensors that are there already are shared, not copied."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in page-locked memory, from where copies to a GPU run asynchronously."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        result = copy.copy(self)
        result._values = function(self._values)
        result._weights = None if self._weights is None else function(self._weights)
        result._lengths = None if self._lengths is None else function(self._lengths)
        result._offsets = None if self._offsets is None else function(self._offsets)
        return result


class JaggedTensor(_Jagged):
    """A batch of bags of one feature.

    Args:
        values: `(L,)` ids, or `(L, D)` rows.
        weights: `(L,)`, or None.
        lengths: `(B,)` int32 or int64, the number of values in every bag.
        offsets: `(B + 1,)` int32 or int64, where every bag begins and the last one ends. Lengths, offsets or both.

    Raises:
        ValueError: Shapes or devices do not fit each other.
        TypeError: lengths or offsets are not int32 or int64.

    Example:
        >>> bags = JaggedTensor(torch.tensor([7, 8, 9]), lengths=torch.tensor([2, 0, 1]))
        >>> bags.to_dense()
        [tensor([7, 8]), tensor([], dtype=torch.int64), tensor([9])]
        >>> bags
        JaggedTensor(values (3,) torch.int64, bags 3, weighted False, device cpu)
    """

    def __init__(
        self,
        values: Tensor,
        weights: Tensor | None = None,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> None:
        if values.dim() == 0:
            raise ValueError("values: expected shape (L,) or (L, D), got ()")
        super().__init__(values, weights, lengths, offsets)

    def to_dense(self) -> list[Tensor]:
        """Every bag as a tensor of its own.

        Raises:
            ValueError: The offsets do not run from 0 up to `L`.
        """
        bounds = self.offsets().tolist()
        _check_bounds(bounds, self._values.shape[0])
        return [self._values[start:end] for start, end in pairwise(bounds)]

    def __repr__(self) -> str:
        bags = (self._offsets.numel() - 1) if self._offsets is not None else self.lengths().numel()
        return (
            f"JaggedTensor(values {tuple(self._values.shape)} {self._values.dtype}, bags {bags}, "
            f"weighted {self._weights is not None}, device {self.device()})"
        )


class KeyedJaggedTensor(_Jagged):
    """A batch of bags of several features: the ids of the first feature's `B` bags, then the second's, and so on.

    ```
    #              bag 0    bag 1   bag 2
    # "carrier"    [0, 1]   []      [2]
    # "origin"     [3]      [4]     [5, 6, 7]
    keys     ["carrier", "origin"]
    values   [0, 1, 2, 3, 4, 5, 6, 7]      # (L,) feature-major
    lengths  [2, 0, 1, 1, 1, 3]            # (F * B,)
    offsets  [0, 2, 2, 3, 4, 5, 8]         # (F * B + 1,)
    stride   3                             # B
    ```

    Args:
        keys: Names of the features, `F` of them. A key may repeat, as after `permute`; `[key]` then gives the first.
        values: `(L,)` ids.
        weights: `(L,)`, or None.
        lengths: `(F * B,)` int32 or int64.
        offsets: `(F * B + 1,)` int32 or int64. Lengths, offsets or both.
        stride: `B`; by default the number of bags divided by `F`. Needed when there are no keys.

    Raises:
        ValueError: Shapes or devices do not fit each other.
        TypeError: lengths or offsets are not int32 or int64.

    Example:
        >>> batch = KeyedJaggedTensor.from_lengths_sync(
        ...     keys=["carrier", "origin"],
        ...     values=torch.tensor([0, 1, 2, 3, 4, 5, 6, 7]),
        ...     lengths=torch.tensor([2, 0, 1, 1, 1, 3]),
        ... )
        >>> batch.stride(), batch.offsets().tolist()
        (3, [0, 2, 2, 3, 4, 5, 8])
        >>> batch["origin"].to_dense()
        [tensor([3]), tensor([4]), tensor([5, 6, 7])]
        >>> batch.permute([1, 0]).values()
        tensor([3, 4, 5, 6, 7, 0, 1, 2])
        >>> batch
        KeyedJaggedTensor(keys ['carrier', 'origin'], stride 3, values (8,) torch.int64, weighted False, device cpu)
    """

    def __init__(
        self,
        keys: Sequence[str],
        values: Tensor,
        weights: Tensor | None = None,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        stride: int | None = None,
    ) -> None:
        if values.dim() != 1:
            raise ValueError(f"values: expected shape (L,), got {tuple(values.shape)}")
        super().__init__(values, weights, lengths, offsets)
        self._keys = list(keys)
        self._stride = _stride(len(self._keys), self._bags(), stride)
        self._offset_per_key: list[int] | None = None

    @classmethod
    def from_lengths_sync(
        cls, keys: Sequence[str], values: Tensor, lengths: Tensor, weights: Tensor | None = None
    ) -> KeyedJaggedTensor:
        """Make one from the number of ids in every bag, `(F * B,)`."""
        return cls(keys, values, weights, lengths=lengths)

    @classmethod
    def from_offsets_sync(
        cls, keys: Sequence[str], values: Tensor, offsets: Tensor, weights: Tensor | None = None
    ) -> KeyedJaggedTensor:
        """Make one from where every bag begins and the last one ends, `(F * B + 1,)`."""
        return cls(keys, values, weights, offsets=offsets)

    def keys(self) -> list[str]:
        """The names of the features."""
        return self._keys

    def stride(self) -> int:
        """`B`, the number of bags of every feature."""
        return self._stride

    def offset_per_key(self) -> list[int]:
        """Where in `values` every feature begins, and the end of the last: `F + 1` numbers.

        Raises:
            ValueError: The offsets do not run from 0 up to `L`.
        """
        if self._offset_per_key is None:
            # Not `offsets()[::stride]`, which is empty of meaning when the stride is 0.
            starts = torch.arange(len(self._keys) + 1, device=self.device()) * self._stride
            bounds: list[int] = self.offsets()[starts].tolist()
            _check_bounds(bounds, self._values.numel())
            self._offset_per_key = bounds
        return self._offset_per_key

    def length_per_key(self) -> list[int]:
        """The number of ids of every feature."""
        return [end - start for start, end in pairwise(self.offset_per_key())]

    def permute(self, indices: Sequence[int]) -> KeyedJaggedTensor:
        """The features `indices`, in that order; one may be left out or named more than once.

        Raises:
            IndexError: An index is not one of `0 .. F - 1`.
        """
        F = len(self._keys)
        for index in indices:
            if not 0 <= index < F:
                raise IndexError(f"indices: expected features 0 to {F - 1}, got {index}")
        bounds = self.offset_per_key()
        spans = [slice(bounds[index], bounds[index + 1]) for index in indices]
        lengths = self.lengths().view(F, self._stride)[list(indices)].flatten()
        return KeyedJaggedTensor(
            [self._keys[index] for index in indices],
            _gather(self._values, spans),
            None if self._weights is None else _gather(self._weights, spans),
            lengths=lengths,
            stride=self._stride,
        )

    def split(self, segments: Sequence[int]) -> list[KeyedJaggedTensor]:
        """Cut into runs of `segments[0]`, `segments[1]`, ... features; the values are views, not copies.

        Raises:
            ValueError: A segment is negative, or together they are not the `F` features.
        """
        if min(segments, default=0) < 0 or sum(segments) != len(self._keys):
            raise ValueError(f"segments: expected sizes that add up to {len(self._keys)} keys, got {list(segments)}")
        ends = list(accumulate(segments))
        return [self._features(end - size, end) for size, end in zip(segments, ends, strict=True)]

    def to_dict(self) -> dict[str, JaggedTensor]:
        """Every feature by its name."""
        return {key: self[key] for key in self._keys}

    def __getitem__(self, key: str) -> JaggedTensor:
        feature = _position(self._keys, key)
        part = self._features(feature, feature + 1)
        return JaggedTensor(part.values(), part.weights_or_none(), part.lengths())

    def __iter__(self) -> Iterator[str]:
        # Without it Python would iterate through __getitem__ with 0, 1, ...
        return iter(self._keys)

    def _features(self, first: int, end: int) -> KeyedJaggedTensor:
        bounds = self.offset_per_key()
        span = slice(bounds[first], bounds[end])
        return KeyedJaggedTensor(
            self._keys[first:end],
            self._values[span],
            None if self._weights is None else self._weights[span],
            lengths=self.lengths()[first * self._stride : end * self._stride],
            stride=self._stride,
        )

    def _bags(self) -> tuple[str, int]:
        """The number of bags, and the argument that tells it."""
        if self._lengths is not None:
            return "lengths", self._lengths.numel()
        return "offsets", self.offsets().numel() - 1

    def __repr__(self) -> str:
        return (
            f"KeyedJaggedTensor(keys {self._keys}, stride {self._stride}, values {tuple(self._values.shape)} "
            f"{self._values.dtype}, weighted {self._weights is not None}, device {self.device()})"
        )


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
        feature = _position(self._keys, key)
        start = sum(self._length_per_key[:feature])
        return self._values[:, start : start + self._length_per_key[feature]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __repr__(self) -> str:
        return (
            f"KeyedTensor(keys {self._keys}, length_per_key {self._length_per_key}, "
            f"values {tuple(self._values.shape)} {self._values.dtype}, device {self.device()})"
        )


def _check_vector(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected torch.int32 or torch.int64, got {tensor.dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {tuple(tensor.shape)}")


def _check_bounds(bounds: list[int], ids: int) -> None:
    if bounds[0] != 0 or bounds[-1] != ids or any(end < start for start, end in pairwise(bounds)):
        raise ValueError(f"offsets: expected to rise from 0 to the {ids} values, got {bounds}")


def _stride(keys: int, bags: tuple[str, int], stride: int | None) -> int:
    name, count = bags
    if stride is None:
        if keys == 0:
            raise ValueError("stride: expected the batch size, as there are no keys to tell it, got None")
        stride, rest = divmod(count, keys)
        if rest:
            raise ValueError(f"{name}: expected a multiple of {keys} keys in bags, got {count}")
    elif stride < 0 or count != keys * stride:
        raise ValueError(f"{name}: expected {keys} keys times stride {stride} = {keys * stride} bags, got {count}")
    return stride


def _position(keys: list[str], key: str) -> int:
    try:
        return keys.index(key)
    except ValueError:
        raise KeyError(f"key: expected one of {keys}, got {key!r}") from None


def _gather(values: Tensor, spans: list[slice]) -> Tensor:
    return torch.cat([values[span] for span in spans]) if spans else values[:0]
