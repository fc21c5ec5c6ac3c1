"""Tables of one width, one upon another in one tensor, are looked up by a single call of what has one table a call."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from dlrm_rs.bench.cases import IdBatch
from dlrm_rs.data.synthetic import Shape


def first_rows(shape: Shape, batch: IdBatch) -> Tensor:
    """For every id of a batch the row with which its table begins, `(L,)` int64: what the ids are raised by.

    As bags are of one length it is the same for all batches of a size, and a user would keep it as well.

    Example:
        >>> from dlrm_rs.bench.cases import Case, id_batches
        >>> shape = Shape((10, 20), 4, (1, 3), (2,), 0.0)
        >>> first_rows(shape, id_batches(shape, Case(2, 0.0, 1), "fp32")[0])
        tensor([ 0,  0, 10, 10, 10, 10, 10, 10])
    """
    return _first_rows(shape.num_embeddings, tuple(ids.numel() for ids, _ in batch.tables))


@lru_cache(maxsize=1)
def _first_rows(rows: tuple[int, ...], ids: tuple[int, ...]) -> Tensor:
    starts = torch.tensor(list(accumulate(rows[:-1], initial=0)))
    return starts.repeat_interleave(torch.tensor(ids))
