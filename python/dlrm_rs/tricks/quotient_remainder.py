"""The quotient-remainder trick of Shi et al. 2019 (https://arxiv.org/abs/1909.02107): two small tables for a large one.

An id is looked up by its quotient in one table and by its remainder in another; the two rows together are its own, as
no other id has both. `N` categories with `C` collisions take `ceil(N / C) + C` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dlrm_rs.arguments import check_size, index_tensor
from dlrm_rs.embedding_bag import EmbeddingBag
from dlrm_rs.optim import OptimizerSpec
from dlrm_rs.tricks.uniform import UniformEmbeddingBag

__all__ = ["OPERATIONS", "QREmbeddingBag"]

OPERATIONS = ("mult", "add", "concat")

# What the parts are called in a state_dict, as in facebookresearch/dlrm: "weight_q" for "quotient.weight".
_KEYS = {"quotient.weight": "weight_q", "remainder.weight": "weight_r"}


class QREmbeddingBag(nn.Module):
    """Bags over a table of quotients and one of remainders: facebookresearch/dlrm's `QREmbeddingBag`.

    Each table pools for itself, as there: with "mult" a bag of several ids gives the product of two sums.

    Quotients are of integers, so every id is exact. (The original divides in float32, which gives other rows for ids
    above 2^24.) A state_dict has the original's keys, `weight_q` and `weight_r`.

    Args:
        num_categories: Ids are 0 to `num_categories - 1`.
        embedding_dim: `D`, of both tables, or a pair of dims, which must be equal unless `operation` is "concat".
        num_collisions: `C`, rows of the table of remainders; the other has `ceil(num_categories / C)`.
        operation: How the two pooled rows are combined: "mult", "add" or "concat".
        max_norm: As of `EmbeddingBag`, and so the next four.
        norm_type: The p of the p-norm.
        scale_grad_by_freq: Divide the gradient of a row by the number of its occurrences.
        mode: "sum", "mean" or "max".
        sparse: Give sparse gradients.
        _weight: The two tables' rows to start from; by default from U(sqrt(1/N), 1), as the original.
        dtype: How a row is stored, as of `EmbeddingBag`.
        optimizer: One of `dlrm_rs.optim`: backward then updates the rows itself.

    Attributes:
        quotient: The `EmbeddingBag` of quotients; its weight is `weight_q` too.
        remainder: The `EmbeddingBag` of remainders; its weight is `weight_r` too.
        embedding_dim: Columns of the output.

    Raises:
        ValueError: A size or option that cannot be, or dims that differ.

    Example:
        >>> import torch, dlrm_rs
        >>> rows = [torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[10.0], [20.0], [30.0], [40.0]])]
        >>> bags = dlrm_rs.QREmbeddingBag(10, 1, num_collisions=4, operation="add", mode="sum", _weight=rows)
        >>> bags(torch.tensor([[0], [5], [9]])).tolist()  # 9 is 2 * 4 + 1: rows 2 and 1
        [[11.0], [22.0], [23.0]]
    """

    def __init__(
        self,
        num_categories: int,
        embedding_dim: int | Sequence[int],
        num_collisions: int,
        operation: str = "mult",
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Sequence[Tensor] | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        optimizer: OptimizerSpec | None = None,
    ) -> None:
        super().__init__()
        check_size("num_categories", num_categories)
        check_size("num_collisions", num_collisions)
        if num_collisions < 1:
            raise ValueError(f"num_collisions: expected at least 1, got {num_collisions}")
        if operation not in OPERATIONS:
            raise ValueError(f"operation: expected one of {', '.join(map(repr, OPERATIONS))}, got {operation!r}")
        dims = _dims(embedding_dim)
        if operation != "concat" and dims[0] != dims[1]:
            raise ValueError(
                f"embedding_dim: expected equal dims with {operation!r}, got {list(dims)}; 'concat' takes any"
            )
        self.num_categories = num_categories
        self.num_collisions = num_collisions
        self.operation = operation
        self.embedding_dim = sum(dims) if operation == "concat" else dims[0]

        def table(rows: int, dim: int, part: int) -> EmbeddingBag:
            return UniformEmbeddingBag(
                max(num_categories, 1) ** -0.5,  # the original's call gives this bound alone, and leaves the other at 1
                1.0,
                rows,
                dim,
                max_norm,
                norm_type,
                scale_grad_by_freq,
                mode,
                sparse,
                None if _weight is None else _weight[part],
                dtype=dtype,
                optimizer=optimizer,
            )

        self.quotient = table(-(-num_categories // num_collisions), dims[0], 0)
        self.remainder = table(num_collisions, dims[1], 1)
        self.register_state_dict_post_hook(_rename_saved)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_rename_loaded)  # type: ignore[no-untyped-call]

    @property
    def weight_q(self) -> Tensor:
        """The rows of quotients, `(ceil(N / C), D)`."""
        return self.quotient.weight

    @property
    def weight_r(self) -> Tensor:
        """The rows of remainders, `(C, D)`."""
        return self.remainder.weight

    def forward(
        self,
        input: Tensor,  # noqa: A002 - torch's name
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Look up, pool and combine.

        Args:
            input: Ids, int32 or int64, as of `EmbeddingBag`.
            offsets: As of `EmbeddingBag`.
            per_sample_weights: As of `EmbeddingBag`; they multiply the rows of both tables.

        Returns:
            `(B, embedding_dim)`.

        Raises:
            IndexError: An id is none of the categories.
            ValueError: As of `EmbeddingBag`.
            TypeError: Ids or offsets that are not integers.
        """
        ids = index_tensor("input", input)
        self._check_ids(ids)
        quotients = torch.div(ids, self.num_collisions, rounding_mode="floor")  # of integers: exact
        q = self.quotient(quotients, offsets, per_sample_weights)  # (B, D)
        r = self.remainder(ids - quotients * self.num_collisions, offsets, per_sample_weights)
        if self.operation == "concat":
            return torch.cat([q, r], dim=1)
        combined: Tensor = q * r if self.operation == "mult" else q + r
        return combined

    def _check_ids(self, ids: Tensor) -> None:
        # The last quotient has room for ids beyond the categories, which the tables would not notice.
        if not ids.numel():
            return
        least, greatest = torch.aminmax(ids)
        if least < 0 or greatest >= self.num_categories:
            flat = ids.flatten()
            position = int(((flat < 0) | (flat >= self.num_categories)).nonzero()[0])
            raise IndexError(
                f"input[{position}]: expected 0 <= id < {self.num_categories}, num_categories, got {flat[position]}"
            )

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        return f"{self.num_categories}, num_collisions={self.num_collisions}, operation={self.operation!r}"


def _dims(embedding_dim: int | Sequence[int]) -> tuple[int, int]:
    dims = list(embedding_dim) if isinstance(embedding_dim, Sequence) else [embedding_dim]
    if len(dims) not in (1, 2):
        raise ValueError(f"embedding_dim: expected one dim or two, got {dims}")
    return dims[0], dims[-1]


def _rename_saved(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    _rename(state, prefix, _KEYS)


def _rename_loaded(_module: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
    _rename(state, prefix, {new: old for old, new in _KEYS.items()})


def _rename(state: dict[str, Any], prefix: str, names: dict[str, str]) -> None:
    """Rename keys that begin with the names (quantized rows have several), and leave the order."""
    renamed = {}
    for key in list(state):
        new = key
        for old, name in names.items():
            if key.startswith(prefix + old):
                new = prefix + name + key[len(prefix) + len(old) :]
        renamed[new] = state.pop(key)
    state.update(renamed)
