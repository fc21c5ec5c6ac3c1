"""The rows of quantized tables as torch sees them: buffers of the modules that hold them.

torch has no dtype for such rows, so they are no Parameter; but whoever traces, copies or wraps a model finds them as
codes, scales and, where there are, the codebook or hot rows. The engine does not ask where they are at every call, as
it does for a `weight`: a module tells of each buffer that it hands out or is given, and from then on the buffers of its
table are looked at. Does not know the engine's tables, nor when rows are exchanged: that is `tables`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dlrm_rs._dlrm_rs import TableRows
from dlrm_rs.hot_rows import HOT_PARTS, without_marks
from dlrm_rs.layout import TableSpec
from dlrm_rs.row_formats import as_array

__all__ = ["PARTS", "Buffers", "packed_rows", "part_names"]

# What holds the rows of a quantized table in its owner, and in a state_dict.
PARTS = ("weight_codes", "weight_scales", "weight_codebook", *(f"weight_{part}" for part in HOT_PARTS))

# The same of a table with so many: hot rows, if any, come after codes and scales, and there is no codebook then.
_NAMES = {0: (), 2: PARTS[:2], 3: PARTS[:3], 2 + len(HOT_PARTS): (*PARTS[:2], *PARTS[3:])}


class Buffers:
    """The buffers of all tables; a table whose rows are numbers has none.

    Args:
        owners: For each table the module that holds it.

    Attributes:
        in_hands: The tables whose buffers a user may have put other memory behind, or other tensors in the place of.
    """

    def __init__(self, owners: Sequence[nn.Module]) -> None:
        self._of_tables = [owner._buffers for owner in owners]
        for owner in owners:
            owner._non_persistent_buffers_set.update(PARTS)  # a state_dict gets them otherwise
        self.in_hands: set[int] = set()

    def show(self, table: int, parts: Sequence[Tensor]) -> None:
        """Make the rows of a table buffers, in the place of those that are there; without `parts` there are none."""
        buffers = self._of_tables[table]
        for name in PARTS:
            buffers.pop(name, None)
        # Tensors of their own, whose data can change without that of `parts`.
        with torch.inference_mode(False):
            buffers.update((name, part.detach()) for name, part in zip(part_names(parts), parts, strict=True))
        self.in_hands.discard(table)

    def bring_home(self, table: int, given: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Make `given`, whose content is in `parts` by now, the buffers of a table, over the memory of `parts`."""
        with torch.inference_mode(False):
            for name, tensor, part in zip(part_names(parts), given, parts, strict=True):
                tensor.data = part
                self._of_tables[table][name] = tensor

    def parts(self, table: int) -> list[Tensor]:
        """Codes, scales and, where there are, the codebook or hot rows."""
        buffers = self._of_tables[table]
        return [buffers[name] for name in PARTS if name in buffers]  # type: ignore[misc] # none is None

    def displaced(self, table: int, home: Sequence[Tensor]) -> list[Tensor] | None:
        """The buffers of a table if one of them is not over the memory of `home`, else None.

        Raises:
            RuntimeError: One is gone.
            ValueError: One is not on the CPU.
        """
        buffers = self._of_tables[table]
        given: list[Tensor] = []
        for name in part_names(home):
            tensor = buffers.get(name)
            if tensor is None:
                raise RuntimeError(
                    f"{name}: expected the buffer of a quantized table, and it is gone; "
                    "load_state_dict or load_packed puts other rows there"
                )
            if not tensor.is_cpu:
                raise ValueError(f"{name}: expected a tensor on the CPU, got device {tensor.device}")
            given.append(tensor)
        return None if all(map(_is_over, given, home)) else given


def part_names(parts: Sequence[Tensor]) -> tuple[str, ...]:
    """What the rows of a quantized table are called in a module and its state_dict."""
    return _NAMES[len(parts)]


def packed_rows(spec: TableSpec, row_format: str, parts: Sequence[Tensor]) -> TableRows:
    """Quantized rows made of codes, scales and, where there are, the codebook or hot rows, which are copied.

    Raises:
        TypeError: A tensor of another dtype.
        ValueError: A tensor of another shape, scales that are not finite, a codebook or hot rows that cannot be.
    """
    codes, scales, *rest = parts
    hot = rest if len(rest) == len(HOT_PARTS) else []
    if hot:
        scales = without_marks(scales, hot[1])
    arrays = as_array(codes.contiguous()), as_array(scales.contiguous())
    numbers = rest[0].tolist() if rest and not hot else None
    rows = TableRows.from_parts(spec.name, spec.embedding_dim, row_format, *arrays, numbers)
    if hot:
        hot_rows, hot_ids, hot_counts = (as_array(part.contiguous()) for part in hot)
        rows.put_hot_rows(spec.name, hot_rows, hot_ids, hot_counts)
    return rows


def _is_over(tensor: Tensor, home: Tensor) -> bool:
    return (
        tensor.data_ptr() == home.data_ptr()
        and tensor.dtype is home.dtype
        and tensor.shape == home.shape
        and tensor.stride() == home.stride()
    )
