"""How an operator of `torch.ops.dlrm_rs` is defined: by its kernel, and by a fake one that graphs are made with.

Every operator is told of the tables and of the ids by the same arguments, `BATCH` in its schema. torch hands arguments
over one by one; to both kernels these are one, a `Batch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlrm_rs.layout import Layout
from dlrm_rs.operators import calls

__all__ = ["BATCH", "Batch", "define"]

# In a schema, the fields of a `Batch`.
BATCH = "Tensor key, str layout, Tensor indices, Tensor? offsets, SymInt batch_size"


class Batch(NamedTuple):
    """Whose tables are looked up by which ids.

    Attributes:
        key: Of the tables, as of `EmbeddingTables`.
        layout: A `Layout` as a string.
        indices: As of `operators.lookup`.
        offsets: As of `operators.lookup`.
        batch_size: As of `operators.lookup`.
    """

    key: Tensor
    layout: str
    indices: Tensor
    offsets: Tensor | None
    batch_size: int

    def parsed(self) -> Layout:
        """The layout."""
        return Layout.parse(self.layout)

    def bags(self) -> calls.Bags:
        """The ids as the engine takes them."""
        # A compiled graph may hand over tensors in another layout than those that the module has checked.
        offsets = None if self.offsets is None else self.offsets.contiguous()
        return self.indices.contiguous(), offsets, self.batch_size


def define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator.

    Args:
        name: Its name.
        schema: Of arguments and results, with `BATCH` among the arguments.
        kernel: What computes it, called with a `Batch` in the place of that.
        fake: Called likewise, gives tensors without data.
    """
    first = schema[: schema.index(BATCH)].count(",")
    end = first + len(Batch._fields)

    def with_batch(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: function(*given[:first], Batch(*given[first:end]), *given[end:])

    torch.library.define(f"dlrm_rs::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"dlrm_rs::{name}", "cpu", with_batch(kernel))
    torch.library.register_fake(f"dlrm_rs::{name}", with_batch(fake))
