"""The way to the engine of small requests: a lookup that no backward follows, at the least cost.

With a few ids a table the calls before the engine cost more than its work. So nothing is asked here that such a lookup
does not need, and whatever is unusual is left to the other ways, which also say what is wrong with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlrm_rs.devices import CPU
from dlrm_rs.devices.ring import LARGE
from dlrm_rs.tables import EmbeddingTables

__all__ = ["lookup"]

# Its name would be looked up at every call.
_CPU_DEVICE = torch.device("cpu")


def lookup(
    tables: EmbeddingTables, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None
) -> Tensor | None:
    """Look up and pool every feature, if the arguments are tensors as the engine takes them, and nothing is recorded.

    Args:
        tables: The tables, which pool.
        indices: Ids, feature-major; anything.
        offsets: The bags, and where the last ends; anything.
        per_sample_weights: Weights of ids; None or anything.

    Returns:
        `(B, W)` of the tables' `output_dtype`, or None where `operators.lookup` is to be asked, after checks.

    Raises:
        IndexError: An id is outside its table.
        ValueError: The numbers in offsets or weights cannot be.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return None
    if tables.output_device is not CPU:
        return None
    tables.adopt()
    handle = tables.memory.handle
    batch_size = handle.batch_size(indices, offsets, per_sample_weights)
    if batch_size is None:
        return None
    width, dtype = tables.width, tables.output_dtype
    if batch_size * width * dtype.itemsize < LARGE and not CPU.outputs:  # as that would, at less cost
        out = torch.empty(batch_size, width, dtype=dtype, device=_CPU_DEVICE)
    else:
        out = CPU.outputs.take((batch_size, width), dtype)
    handle.lookup(indices, offsets, batch_size, per_sample_weights, out, None)
    return out
