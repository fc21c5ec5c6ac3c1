"""A batch of samples, as the data sets give and a training loop takes it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dlrm_rs.keyed_jagged import KeyedJaggedTensor


class Batch(NamedTuple):
    """`B` samples.

    Attributes:
        dense: Dense features, `(B, P)` float32.
        sparse: Ids of the sparse features, int64.
        labels: 1 where the event happened and 0 where not, `(B,)` float32.
    """

    dense: Tensor
    sparse: KeyedJaggedTensor
    labels: Tensor
