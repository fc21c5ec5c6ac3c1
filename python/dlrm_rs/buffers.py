"""The rows of quantized tables as torch sees them: buffers of the modules that hold them.

torch has no dtype for such rows, so they are no Parameter; but whoever traces, copies or wraps a model finds them as
codes, scales and, where there is one, the codebook. The engine does not ask where they are at every call, as it does
for a `weight`: a module tells of each buffer that it hands out or is given, and from then on the buffers of its table
are looked at. Does not know the engine's tables, nor when rows are exchanged: that is `tables`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dlrm_rs._dlrm_rs import TableRows
from dlrm_rs.layout import TableSpec
from dlrm_rs.row_formats import as_array

__all__ = ["PARTS", "Buffers", "packed_rows"]

# What holds the rows of a quantized table in its owner, and in a state_dict.
PARTS = ("weight_codes", "weight_scales", "weight_codebook")


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
            buffers.update((name, part.detach()) for name, part in zip(PARTS, parts, strict=False))
        self.in_hands.discard(table)

    def bring_home(self, table: int, given: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Make `given`, whose content is in `parts` by now, the buffers of a table, over the memory of `parts`."""
        with torch.inference_mode(False):
            for name, tensor, part in zip(PARTS, given, parts, strict=False):
                tensor.data = part
                self._of_tables[table][name] = tensor

    def parts(self, table: int) -> list[Tensor]:
        """Codes, scales and, where there is one, the codebook."""
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
        for name, _ in zip(PARTS, home, strict=False):
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


def packed_rows(spec: TableSpec, row_format: str, parts: Sequence[Tensor]) -> TableRows:
    """Quantized rows made of codes, scales and, where there is one, the codebook, which are copied.

    Raises:
        TypeError: A tensor of another dtype.
        ValueError: A tensor of another shape, scales that are not finite, or a codebook that cannot be.
    """
    codes, scales, *codebook = parts
    arrays = as_array(codes.contiguous()), as_array(scales.contiguous())
    numbers = codebook[0].tolist() if codebook else None
    return TableRows.from_parts(spec.name, spec.embedding_dim, row_format, *arrays, numbers)


def _is_over(tensor: Tensor, home: Tensor) -> bool:
    return (
        tensor.data_ptr() == home.data_ptr()
        and tensor.dtype is home.dtype
        and tensor.shape == home.shape
        and tensor.stride() == home.stride()
    )
