"""Ragged batches: the values of every bag one after another, and where each bag begins.

This container, `KeyedJaggedTensor` and `KeyedTensor` are the part of TorchRec's that a model needs. The names, the
argument order and the layouts are TorchRec's, so code moves between the two by changing an import. Letters: `F`
features (keys), `B` batch (`stride`), `L` ids in all, `D` dim of a feature's embedding.

These classes check shapes, which costs nothing. The contents of `values` and `offsets` are checked where they are
used: by the lookup.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

__all__ = ["Jagged", "JaggedTensor", "check_bounds", "check_vector"]

_INTEGERS = (torch.int32, torch.int64)


class Jagged:
    """Values cut into bags: bag `i` is `values[offsets[i]:offsets[i + 1]]`; lengths and offsets give each other."""

    def __init__(self, values: Tensor, weights: Tensor | None, lengths: Tensor | None, offsets: Tensor | None) -> None:
        if weights is not None and weights.shape != values.shape[:1]:
            raise ValueError(
                f"weights: expected one per value, shape {tuple(values.shape[:1])}, got {tuple(weights.shape)}"
            )
        if lengths is None and offsets is None:
            raise ValueError("lengths, offsets: expected at least one of the two, got None for both")
        if lengths is not None:
            check_vector("lengths", lengths)
        if offsets is not None:
            check_vector("offsets", offsets)
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


class JaggedTensor(Jagged):
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
        check_bounds(bounds, self._values.shape[0])
        return [self._values[start:end] for start, end in pairwise(bounds)]

    def __repr__(self) -> str:
        bags = (self._offsets.numel() - 1) if self._offsets is not None else self.lengths().numel()
        return (
            f"JaggedTensor(values {tuple(self._values.shape)} {self._values.dtype}, bags {bags}, "
            f"weighted {self._weights is not None}, device {self.device()})"
        )


def check_vector(name: str, tensor: Tensor) -> None:
    """Refuse lengths or offsets that are no vector of int32 or int64."""
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected torch.int32 or torch.int64, got {tensor.dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {tuple(tensor.shape)}")


def check_bounds(bounds: list[int], ids: int) -> None:
    """Refuse offsets that do not cut all ids into bags."""
    if bounds[0] != 0 or bounds[-1] != ids or any(end < start for start, end in pairwise(bounds)):
        raise ValueError(f"offsets: expected to rise from 0 to the {ids} values, got {bounds}")
