"""`Embedding`: torch's, with its table in the engine."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from dlrm_rs import operators, row_formats
from dlrm_rs.arguments import (
    check_device,
    check_no_nan,
    check_padding_idx,
    check_table_weight,
    index_tensor,
)
from dlrm_rs.optim import OptimizerSpec
from dlrm_rs.owner import OwnsTable, single_table
from dlrm_rs.row_formats import row_format

__all__ = ["Embedding"]


class Embedding(OwnsTable, nn.Embedding):
    """`torch.nn.Embedding` with its table in the engine: the same arguments, defaults, results and state_dict.

    It is a `torch.nn.Embedding`, so code that asks by `isinstance` finds it. The table lives on the CPU and stays there
    when a model moves to another device.

    Args:
        num_embeddings: `N`, rows of the table.
        embedding_dim: `D`, elements of a row.
        padding_idx: A row that is never trained; negative counts from the back.
        max_norm: Scale the looked-up rows down to this norm, in place, before they are read. Only with rows of fp32.
        norm_type: The p of that p-norm.
        scale_grad_by_freq: Divide the gradient of a row by the number of its occurrences.
        sparse: Give `weight` a sparse gradient; without effect with a fused optimizer.
        _weight: `(N, D)` of a floating dtype to start from; its content is copied into the engine's memory.
        _freeze: Do not train the table.
        device: None or the CPU.
        dtype: How a row is stored: a torch dtype (float32, float16, bfloat16) or a row format by name, "fp32", "fp16",
            "bf16", "int8", "int4" or "int2". Quantized rows, the last three, are trained by `optimizer` alone. By
            default as `_weight`, or float32.
        optimizer: One of `dlrm_rs.optim`: backward then updates the rows itself and `weight.grad` stays None.
        output_dtype: Of the output: float32, float16 or bfloat16. By default `dtype` where that is a torch dtype, as in
            torch, else float32.
        hot_rows: The share of the rows, those that training touches most, that are kept in fp32 while the others are in
            codes; 0 for none. For "int8", "int4" and "int2" rows with `optimizer`.
        hot_data_type: How these are stored: "fp32".

    Attributes:
        weight: `(N, D)` Parameter over the engine's memory, from N(0, 1) as torch's. Quantized rows have none.
        fused_optimizer: A `torch.optim.Optimizer` for schedulers and checkpoints, or None without `optimizer`.

    Raises:
        ValueError: A size, option, shape or device that cannot be, or a NaN in `_weight`.
        TypeError: A dtype that cannot be.
        MemoryError: The table cannot be allocated.

    Example:
        >>> import torch, dlrm_rs
        >>> rows = dlrm_rs.Embedding(3, 2, _weight=torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))
        >>> rows(torch.tensor([[2], [0]])).detach()
        tensor([[[4., 5.]],
        <BLANKLINE>
                [[0., 1.]]])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        optimizer: OptimizerSpec | None = None,
        output_dtype: torch.dtype | None = None,
        hot_rows: float = 0.0,
        hot_data_type: torch.dtype | str = "fp32",
    ) -> None:
        nn.Module.__init__(self)  # not torch's Embedding's, which would allocate a table of its own
        check_device(device)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = check_padding_idx(padding_idx, num_embeddings)
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse
        if _weight is not None:
            check_table_weight("_weight", _weight, (num_embeddings, embedding_dim))
            check_no_nan("_weight", _weight)
            dtype = dtype or _weight.dtype
        self._tables = single_table(
            self,
            "embedding",
            row_format("dtype", dtype),
            optimizer,
            row_formats.output_dtype(output_dtype, dtype),
            hot_rows,
            hot_data_type,
        )
        if _weight is None:
            self.reset_parameters()
        else:
            self._tables.load(0, _weight)
        if _freeze and "weight" in self._parameters:
            self.weight.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Look up.

        Args:
            input: Ids of any shape, int32 or int64.

        Returns:
            `(*input.shape, D)` of the output dtype.

        Raises:
            IndexError: An id is not a row of the table.
            ValueError: Ids that are not on the CPU.
            TypeError: Ids that are not integers.
        """
        self._check_feature("none")
        indices = index_tensor("input", input).view(-1)  # (L,)
        batch_size = indices.numel()  # every id is its own bag
        if self.max_norm is not None:
            operators.renorm(self._tables, indices, None, batch_size, None, self.max_norm, self.norm_type)
        rows = operators.lookup(
            self._tables,
            indices,
            None,
            batch_size,
            sparse=self.sparse,
            scale_grad_by_freq=[self.scale_grad_by_freq],
        )  # (L, D)
        return rows.view(*input.shape, self.embedding_dim)

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        optimizer: OptimizerSpec | None = None,
    ) -> Self:
        """Make one from rows, `(N, D)` float32, float16 or bfloat16, which are copied.

        Args:
            embeddings: The rows.
            freeze: Do not train them.
            padding_idx: As of the class, and all the others.
            max_norm: As of the class.
            norm_type: As of the class.
            scale_grad_by_freq: As of the class.
            sparse: As of the class.
            optimizer: As of the class.

        Example:
            >>> import torch, dlrm_rs
            >>> rows = dlrm_rs.Embedding.from_pretrained(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
            >>> rows(torch.tensor(1))
            tensor([3., 4.])
        """
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings: expected two dimensions, got shape {tuple(embeddings.shape)}")
        rows, columns = embeddings.shape
        return cls(
            rows,
            columns,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            embeddings,
            freeze,
            optimizer=optimizer,
        )
