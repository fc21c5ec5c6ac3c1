"""Whether tables fit, asked before they are made: a system without swap ends the process that takes too much."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dlrm_rs.bench.cases import FEWEST_BATCHES
from dlrm_rs.bench.rows import row_bytes
from dlrm_rs.data.synthetic import Shape

# For the interpreter, libraries, outputs, and what others may take meanwhile.
MARGIN = 1 << 30

# Bytes of a row's scale and bias, at most.
_SCALES = 8


def available() -> int:
    """Bytes that processes may still take.

    Example:
        >>> available() > 0
        True
    """
    meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
    line = next(line for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) << 10


def needed(shape: Shape, row_format: str, sides: int, state: int = 0) -> int:
    """Bytes at most in use while sides are made, one after another, and looked up.

    Args:
        shape: The tables' sizes.
        row_format: How rows are stored. Ours, which are made first, are quantized from all tables in fp32; those of
            peers from a table at a time.
        sides: How many, ours included.
        state: Bytes that an optimizer has for a row.

    Example:
        >>> shape = Shape((1 << 20,) * 16, 64, (1,), (16,), 0.0)  # 4 GiB in fp32
        >>> [round(needed(shape, row_format, sides=2) / 2**30, 1) for row_format in ("fp32", "int8")]
        [9.5, 6.1]
    """
    rows, dim = sum(shape.num_embeddings), shape.embedding_dim
    fp32, largest = rows * dim * 4, max(shape.num_embeddings) * dim * 4
    stored = fp32 if row_format == "fp32" else rows * (row_bytes(row_format, dim) + _SCALES)
    stored += rows * state
    while_ours_are_made = fp32 if row_format == "fp32" else fp32 + stored
    while_the_last_are_made = sides * stored + 2 * largest
    ids = 2 * 8 * FEWEST_BATCHES * max(shape.batch_sizes) * sum(shape.ids_per_bag)
    return max(while_ours_are_made, while_the_last_are_made) + ids + MARGIN


def groups(peers: Sequence[str], shape: Shape, row_format: str, free: int, state: int = 0) -> list[tuple[str, ...]]:
    """Peers that are timed in one process with ours: all, if all fit, else each alone; none if not even one does.

    Args:
        peers: Their names.
        shape: The tables' sizes.
        row_format: How rows are stored.
        free: Bytes that may be taken.
        state: Bytes that an optimizer has for a row.

    Example:
        >>> shape = Shape((1 << 20,) * 16, 64, (1,), (16,), 0.0)  # 4 GiB
        >>> groups(["a", "b"], shape, "fp32", free=14 << 30), groups(["a", "b"], shape, "fp32", free=10 << 30)
        ([('a', 'b')], [('a',), ('b',)])
        >>> groups(["a", "b"], shape, "fp32", free=1 << 30)
        []
    """
    if needed(shape, row_format, 1 + len(peers), state) <= free:
        return [tuple(peers)]
    if needed(shape, row_format, 2, state) <= free:
        return [(peer,) for peer in peers]
    return []
