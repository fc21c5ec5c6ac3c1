"""`KeyedJaggedTensor`: a ragged batch of several features, and batches whose features have bags of their own number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor

from dlrm_rs.jagged import Jagged, JaggedTensor, check_bounds
from dlrm_rs.keyed_tensor import position

__all__ = ["KeyedJaggedTensor"]


class KeyedJaggedTensor(Jagged):
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

    Bags that many samples have in common need to be there once: with `stride_per_key_per_rank` every feature has a
    number of bags of its own, and `inverse_indices` tells which of them each of the `B` samples has. Then there are
    `sum of strides` bags in place of `F * B`.

    Args:
        keys: Names of the features, `F` of them. A key may repeat, as after `permute`; `[key]` then gives the first.
        values: `(L,)` ids.
        weights: `(L,)`, or None.
        lengths: `(F * B,)` int32 or int64.
        offsets: `(F * B + 1,)` int32 or int64. Lengths, offsets or both.
        stride: `B`; by default the number of bags divided by `F`. Needed when there are no keys.
        stride_per_key_per_rank: For every feature the numbers of its bags that come from each rank: `[[n], ...]` where
            there is one process. None: `B` bags each.
        inverse_indices: With `stride_per_key_per_rank`, names of features and `(F, B)` int32 or int64: the bag of every
            sample. None: a feature's bags are those of the samples.

    Raises:
        ValueError: Shapes or devices do not fit each other.
        TypeError: lengths, offsets or inverse_indices are not int32 or int64.

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

        Four samples, of two carriers and three origins:

        >>> batch = KeyedJaggedTensor(
        ...     keys=["carrier", "origin"],
        ...     values=torch.tensor([0, 1, 2, 3, 4]),
        ...     lengths=torch.tensor([1, 1, 1, 1, 1]),
        ...     stride_per_key_per_rank=[[2], [3]],
        ...     inverse_indices=(["carrier", "origin"], torch.tensor([[0, 0, 1, 0], [0, 1, 1, 2]])),
        ... )
        >>> batch.stride(), batch.stride_per_key()
        (4, [2, 3])
    """

    def __init__(
        self,
        keys: Sequence[str],
        values: Tensor,
        weights: Tensor | None = None,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        stride: int | None = None,
        stride_per_key_per_rank: Sequence[Sequence[int]] | None = None,
        *,
        inverse_indices: tuple[list[str], Tensor] | None = None,
    ) -> None:
        if values.dim() != 1:
            raise ValueError(f"values: expected shape (L,), got {tuple(values.shape)}")
        super().__init__(values, weights, lengths, offsets)
        self._keys = list(keys)
        self._inverse_indices = inverse_indices
        self._strides: list[int] | None = None  # of every key; None where all are `_stride`
        if stride_per_key_per_rank is None:
            if inverse_indices is not None:
                raise ValueError("inverse_indices: expected None without stride_per_key_per_rank, got some")
            self._stride = _stride(len(self._keys), self._bags(), stride)
        else:
            if stride is not None:
                raise ValueError(f"stride: expected None with stride_per_key_per_rank, got {stride}")
            self._strides = _strides(len(self._keys), self._bags(), stride_per_key_per_rank)
            self._stride = max(self._strides, default=0)
            if inverse_indices is not None:
                _check_inverse(self._keys, inverse_indices)
                self._stride = inverse_indices[1].shape[1]
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
        """`B`, the number of samples: of every feature's bags, or where these vary, of what they expand to."""
        return self._stride

    def variable_stride_per_key(self) -> bool:
        """Whether every feature has a number of bags of its own."""
        return self._strides is not None

    def stride_per_key(self) -> list[int]:
        """The number of bags of every feature."""
        return [self._stride] * len(self._keys) if self._strides is None else self._strides

    def inverse_indices_or_none(self) -> tuple[list[str], Tensor] | None:
        """Names of features, and which of its bags every sample has, `(F, B)`; or None."""
        return self._inverse_indices

    def offset_per_key(self) -> list[int]:
        """Where in `values` every feature begins, and the end of the last: `F + 1` numbers.

        Raises:
            ValueError: The offsets do not run from 0 up to `L`.
        """
        if self._offset_per_key is None:
            # Not `offsets()[::stride]`, which is empty of meaning when the stride is 0.
            bounds: list[int] = self.offsets()[torch.tensor(self._bag_bounds(), device=self.device())].tolist()
            check_bounds(bounds, self._values.numel())
            self._offset_per_key = bounds
        return self._offset_per_key

    def length_per_key(self) -> list[int]:
        """The number of ids of every feature."""
        if torch.compiler.is_compiling():  # as numbers that are not known yet
            lengths: list[int] = self.id_bounds().diff().tolist()
            for length in lengths:
                torch._check_is_size(length)
            torch._check(sum(lengths) == self._values.numel())
            return lengths
        return [end - start for start, end in pairwise(self.offset_per_key())]

    def id_bounds(self) -> Tensor:
        """`offset_per_key` as a tensor, `(F + 1,)`, also while torch.compile or torch.export trace a model."""
        if torch.compiler.is_compiling():
            return self.offsets()[torch.tensor(self._bag_bounds(), device=self.device())]
        return torch.tensor(self.offset_per_key(), device="cpu")

    def cut(self, *of_ids: Tensor) -> list[Sequence[Tensor]]:
        """Of each tensor, `(L, ...)`, the parts that belong to the features."""
        if torch.compiler.is_compiling():
            lengths = self.length_per_key()
            return [tensor.split(lengths) for tensor in of_ids]
        bounds = list(pairwise(self.offset_per_key()))
        return [[tensor[start:end] for start, end in bounds] for tensor in of_ids]

    def permute(self, indices: Sequence[int]) -> KeyedJaggedTensor:
        """The features `indices`, in that order; one may be left out or named more than once.

        Raises:
            IndexError: An index is not one of `0 .. F - 1`.
        """
        F = len(self._keys)
        for index in indices:
            if not 0 <= index < F:
                raise IndexError(f"indices: expected features 0 to {F - 1}, got {index}")
        of_ids = (self._values,) if self._weights is None else (self._values, self._weights)
        picked = [_picked(tensor, parts, indices) for tensor, parts in zip(of_ids, self.cut(*of_ids), strict=True)]
        return self._part(
            [self._keys[index] for index in indices],
            picked[0],
            None if self._weights is None else picked[1],
            _picked(self.lengths(), self.lengths().split(self.stride_per_key()), indices),
            None if self._strides is None else [self._strides[index] for index in indices],
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
        feature = position(self._keys, key)
        part = self._features(feature, feature + 1)
        return JaggedTensor(part.values(), part.weights_or_none(), part.lengths())

    def __iter__(self) -> Iterator[str]:
        # Without it Python would iterate through __getitem__ with 0, 1, ...
        return iter(self._keys)

    def _features(self, first: int, end: int) -> KeyedJaggedTensor:
        bounds, bags = self.offset_per_key(), self._bag_bounds()
        span = slice(bounds[first], bounds[end])
        return self._part(
            self._keys[first:end],
            self._values[span],
            None if self._weights is None else self._weights[span],
            self.lengths()[bags[first] : bags[end]],
            None if self._strides is None else self._strides[first:end],
        )

    def _part(
        self, keys: list[str], values: Tensor, weights: Tensor | None, lengths: Tensor, strides: list[int] | None
    ) -> KeyedJaggedTensor:
        """Some of the features, of the same samples."""
        if strides is None:
            return KeyedJaggedTensor(keys, values, weights, lengths=lengths, stride=self._stride)
        ranks, inverse = [[stride] for stride in strides], self._inverse_indices
        return KeyedJaggedTensor(
            keys, values, weights, lengths=lengths, stride_per_key_per_rank=ranks, inverse_indices=inverse
        )

    def _bag_bounds(self) -> list[int]:
        """The first bag of every feature, and the end of the last's: `F + 1` numbers."""
        return list(accumulate(self.stride_per_key(), initial=0))

    def _bags(self) -> tuple[str, int]:
        """The number of bags, and the argument that tells it."""
        if self._lengths is not None:
            return "lengths", self._lengths.numel()
        return "offsets", self.offsets().numel() - 1

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        result = super()._map(function)
        if self._inverse_indices is not None:
            names, indices = self._inverse_indices
            result._inverse_indices = names, function(indices)
        return result

    def __repr__(self) -> str:
        stride = self._stride if self._strides is None else f"{self._stride} of {self._strides}"
        return (
            f"KeyedJaggedTensor(keys {self._keys}, stride {stride}, values {tuple(self._values.shape)} "
            f"{self._values.dtype}, weighted {self._weights is not None}, device {self.device()})"
        )


def _stride(keys: int, bags: tuple[str, int], stride: int | None) -> int:
    name, count = bags
    if stride is None:
        if keys == 0:
            raise ValueError("stride: expected the batch size, as there are no keys to tell it, got None")
        stride = count // keys  # not divmod, which torch.compile cannot trace
        if count % keys:
            raise ValueError(f"{name}: expected a multiple of {keys} keys in bags, got {count}")
    elif stride < 0 or count != keys * stride:
        raise ValueError(f"{name}: expected {keys} keys times stride {stride} = {keys * stride} bags, got {count}")
    return stride


def _strides(keys: int, bags: tuple[str, int], per_rank: Sequence[Sequence[int]]) -> list[int]:
    strides = [int(sum(numbers)) for numbers in per_rank]
    if len(strides) != keys or any(number < 0 for numbers in per_rank for number in numbers):
        raise ValueError(
            f"stride_per_key_per_rank: expected numbers of at least 0 for each of {keys} keys, got {list(per_rank)}"
        )
    name, count = bags
    if count != sum(strides):
        raise ValueError(f"{name}: expected the sum of the strides {strides}, {sum(strides)} bags, got {count}")
    return strides


def _check_inverse(keys: Sequence[str], inverse_indices: tuple[Sequence[str], Tensor]) -> None:
    names, indices = inverse_indices
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"inverse_indices: expected torch.int32 or torch.int64, got {indices.dtype}")
    if indices.dim() != 2 or len(indices) != len(names):
        raise ValueError(
            f"inverse_indices: expected shape (F, B) with F = {len(names)}, the names, got {tuple(indices.shape)}"
        )
    missing = [key for key in keys if key not in names]
    if missing:
        raise ValueError(f"inverse_indices: expected the keys {list(keys)}, got {list(names)}, which lack {missing}")


def _picked(whole: Tensor, parts: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    return torch.cat([parts[index] for index in indices]) if indices else whole[:0]
