"""Random batches: bags with duplicates and empty ones among them."""

from typing import NamedTuple

import torch
from torch import Tensor

# Astride every vector width, and a row of one element.
DIMS = [1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 128, 130, 257]


class Batch(NamedTuple):
    """Ids `(L,)`, where their bags begin and the last ends `(bags + 1,)`, and a weight for every id `(L,)`."""

    indices: Tensor
    offsets: Tensor
    weights: Tensor


def batch(rows: int, bags: int, dtype: torch.dtype = torch.int64, longest: int = 6) -> Batch:
    """Bags of 0 to `longest` ids, so few rows in so many bags that rows come again."""
    lengths = torch.randint(0, longest + 1, (bags,))
    lengths[:1] = 0
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    count = int(offsets[-1])
    return Batch(torch.randint(0, rows, (count,)).to(dtype), offsets.to(dtype), torch.rand(count) + 0.5)
