"""What the modules with tables share: the fused optimizer, and staying where they are when a model moves.

A mixin for `EmbeddingBagCollection`, and one for the modules of a single table that are torch's by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from dlrm_rs.arguments import check_padding_idx
from dlrm_rs.optim import FusedOptimizer, OptimizerSpec
from dlrm_rs.tables import EmbeddingTables, FeatureSpec, TableSpec

__all__ = ["OwnsTable", "OwnsTables", "single_table"]


class OwnsTables(nn.Module):
    """A module with tables in the engine."""

    _tables: EmbeddingTables

    @property
    def fused_optimizer(self) -> FusedOptimizer | None:
        """The optimizer that runs inside backward, a `torch.optim.Optimizer`; None if the module was made without."""
        return self._tables.optimizer

    def memory_report(self) -> dict[str, dict[str, int]]:
        """Bytes of every table by its name: `"payload"` (rows), `"state"` (of the optimizer), `"overhead"` (the rest).

        Example:
            >>> import dlrm_rs
            >>> dlrm_rs.EmbeddingBag(1000, 16).memory_report()["embedding_bag"]["payload"]
            64000
        """
        report = self._tables.handle.memory_report()
        return {table.name: sizes for table, sizes in zip(self._tables.tables, report, strict=True)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `fn` is what `.to()`, `.cuda()`, `.half()`, `.share_memory()` and the like do to every tensor of a model. The
        # tables stay as they are, on the CPU: that is what they are for. A change that is more than a move is refused.
        _refuse_change(fn(torch.zeros(1, device="cpu")))
        kept = {id(tensor) for weight in self._tables.weights() for tensor in (weight, weight.grad)}
        super()._apply(lambda tensor: tensor if id(tensor) in kept else fn(tensor), recurse)  # type: ignore[no-untyped-call]
        return self


class OwnsTable(OwnsTables):
    """A module with one table, whose attributes are those of torch's module of the same name."""

    padding_idx: int | None

    def _check_feature(self, pooling: str) -> None:
        # torch reads these attributes at every call, so a user may change them; the engine got them with the table.
        feature = self._tables.features[0]
        if feature != (0, pooling, self.padding_idx):
            raise ValueError(
                f"mode, padding_idx: expected {feature.pooling!r} and {feature.padding_idx}, fixed when the module was "
                f"made, got {pooling!r} and {self.padding_idx}; make a new module with _weight=module.weight"
            )

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        text = super().extra_repr()
        if self.fused_optimizer is not None:
            text += f", optimizer={self.fused_optimizer.defaults['algorithm']}"
        return text


def single_table(
    module: nn.Embedding | nn.EmbeddingBag, name: str, row_format: str, optimizer: OptimizerSpec | None
) -> EmbeddingTables:
    """The table of a module that has torch's attributes; a weight that it has already is adopted.

    Args:
        module: The module.
        name: The table's name in messages.
        row_format: How a row is stored.
        optimizer: The fused optimizer, or None.
    """
    table = TableSpec(name, module.num_embeddings, module.embedding_dim, row_format)
    pooling = module.mode if isinstance(module, nn.EmbeddingBag) else "none"
    padding_idx = check_padding_idx(module.padding_idx, module.num_embeddings)
    return EmbeddingTables([table], [FeatureSpec(0, pooling, padding_idx)], [module], optimizer)


# torch changes a model module by module, so it cannot be refused as a whole.
_BEFORE = "modules that come before this one in the model may have changed already"


def _refuse_change(probe: Tensor) -> None:
    if probe.dtype is not torch.float32:
        raise TypeError(
            f"dtype: expected the tables to stay torch.float32, got a change to {probe.dtype}; convert the other "
            f"modules of the model one by one; {_BEFORE}"
        )
    if probe.is_meta:
        raise ValueError(
            "device: expected one that holds data, got 'meta'; the tables live in the memory of the host; " + _BEFORE
        )
    if probe.is_cpu and probe.is_shared():
        raise TypeError(
            "share_memory: expected the tables to stay in the engine's memory, which cannot be shared; processes made "
            f"by fork read them without it; {_BEFORE}"
        )
