"""The containers as trees of tensors, which is how `torch.export` takes and gives them.

The tree of a `KeyedJaggedTensor` has `values`, `weights` (or None), `offsets` and the inverse indices (or None); the
offsets tell its lengths, so that two batches are trees of one shape however they were made. A `JaggedTensor`, which an
`EmbeddingCollection` gives, is made of lengths, and has `values`, `weights` and `lengths`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree

from dlrm_rs.jagged import JaggedTensor
from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.keyed_tensor import KeyedTensor

__all__ = ["register"]

_Leaves = list[tuple[Any, Any]]


def register() -> None:
    """Tell torch of the classes, by names that a saved program has too."""
    _register(KeyedJaggedTensor, _keyed_leaves, _keyed)
    _register(JaggedTensor, _jagged_leaves, _jagged)
    _register(KeyedTensor, _pooled_leaves, _pooled)
    # A saved program has an example of its inputs, and torch unpickles no class that it was not told of.
    torch.serialization.add_safe_globals([KeyedJaggedTensor, JaggedTensor, KeyedTensor])


def _register(kind: type[Any], named_leaves: Callable[[Any], tuple[_Leaves, Any]], made_of: Callable[..., Any]) -> None:
    def leaves(tree: Any) -> tuple[list[Any], Any]:
        named, context = named_leaves(tree)
        return [leaf for _, leaf in named], context

    name = f"dlrm_rs.{kind.__name__}"
    _pytree.register_pytree_node(kind, leaves, made_of, serialized_type_name=name, flatten_with_keys_fn=named_leaves)
    # Some versions of torch flatten what a program is given by this one.
    fx_pytree.register_pytree_flatten_spec(kind, lambda tree, _: leaves(tree)[0])


def _named(**leaves: Any) -> _Leaves:
    return [(_pytree.GetAttrKey(name), leaf) for name, leaf in leaves.items()]


def _keyed_leaves(features: KeyedJaggedTensor) -> tuple[_Leaves, list[Any]]:
    names, inverse = features._inverse_indices or (None, None)
    stride = None if features._keys else features._stride  # otherwise the offsets tell it
    leaves = _named(
        values=features._values, weights=features._weights, offsets=features.offsets(), inverse_indices=inverse
    )
    return leaves, [features._keys, features._strides, names, stride]


def _keyed(leaves: Any, context: list[Any]) -> KeyedJaggedTensor:
    # Not by the constructor, which would check: leaves are not always tensors.
    features = KeyedJaggedTensor.__new__(KeyedJaggedTensor)
    features._values, features._weights, features._offsets, inverse = leaves
    features._keys, features._strides, names, stride = context
    features._inverse_indices = None if names is None else (names, inverse)
    features._lengths = features._offset_per_key = None
    if features._strides is not None:
        stride = max(features._strides, default=0) if names is None else inverse.shape[1]
    elif stride is None and isinstance(features._offsets, Tensor):
        stride = (features._offsets.numel() - 1) // len(features._keys)
    features._stride = stride
    return features


def _jagged_leaves(bags: JaggedTensor) -> tuple[_Leaves, None]:
    return _named(values=bags._values, weights=bags._weights, lengths=bags.lengths()), None


def _jagged(leaves: Any, _: None) -> JaggedTensor:
    bags = JaggedTensor.__new__(JaggedTensor)
    bags._values, bags._weights, bags._lengths = leaves
    bags._offsets = None
    return bags


def _pooled_leaves(pooled: KeyedTensor) -> tuple[_Leaves, list[Any]]:
    return _named(values=pooled._values), [pooled._keys, pooled._length_per_key]


def _pooled(leaves: Any, context: list[Any]) -> KeyedTensor:
    pooled = KeyedTensor.__new__(KeyedTensor)
    pooled._keys, pooled._length_per_key = context
    (pooled._values,) = leaves
    return pooled
