"""`EmbeddingBag`: torch's, with its table in the engine."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from dlrm_rs import operators, row_formats
from dlrm_rs.arguments import (
    check_device,
    check_no_nan,
    check_padding_idx,
    check_pooling,
    check_table_weight,
    float_tensor,
    index_tensor,
)
from dlrm_rs.optim import OptimizerSpec
from dlrm_rs.owner import OwnsTable, single_table
from dlrm_rs.row_formats import row_format

__all__ = ["EmbeddingBag"]


class EmbeddingBag(OwnsTable, nn.EmbeddingBag):
    """`torch.nn.EmbeddingBag` with its table in the engine: the same arguments, defaults, results and state_dict.

    It is a `torch.nn.EmbeddingBag`, so code that asks by `isinstance` finds it. The table lives on the CPU and stays
    there when a model moves to another device.

    Args:
        num_embeddings: `N`, rows of the table.
        embedding_dim: `D`, elements of a row.
        max_norm: Scale the looked-up rows down to this norm, in place, before pooling. Only with rows of fp32.
        norm_type: The p of that p-norm.
        scale_grad_by_freq: Divide the gradient of a row by the number of its occurrences. Not with "max".
        mode: "sum", "mean" or "max".
        sparse: Give `weight` a sparse gradient. Not with "max"; without effect with a fused optimizer.
        _weight: `(N, D)` of a floating dtype to start from; its content is copied into the engine's memory.
        include_last_offset: `offsets` has `B + 1` elements, the last being where the last bag ends.
        padding_idx: A row that is left out of the bags and never trained; negative counts from the back.
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
        >>> rows = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
        >>> bags = dlrm_rs.EmbeddingBag(3, 2, mode="sum", _weight=rows)
        >>> out = bags(torch.tensor([0, 2, 1]), torch.tensor([0, 2]))  # two bags: rows 0 and 2, row 1
        >>> out.detach()
        tensor([[4., 6.],
                [2., 3.]])
        >>> out.sum().backward()
        >>> bags.weight.grad
        tensor([[1., 1.],
                [1., 1.],
                [1., 1.]])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        optimizer: OptimizerSpec | None = None,
        output_dtype: torch.dtype | None = None,
        hot_rows: float = 0.0,
        hot_data_type: torch.dtype | str = "fp32",
    ) -> None:
        nn.Module.__init__(self)  # not torch's EmbeddingBag's, which would allocate a table of its own
        check_device(device)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self.mode = check_pooling("mode", mode)
        self.sparse = sparse
        self.include_last_offset = include_last_offset
        self.padding_idx = check_padding_idx(padding_idx, num_embeddings)
        self._check_options()
        if _weight is not None:
            check_table_weight("_weight", _weight, (num_embeddings, embedding_dim))
            check_no_nan("_weight", _weight)
            dtype = dtype or _weight.dtype
        self._tables = single_table(
            self,
            "embedding_bag",
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

    def forward(
        self,
        input: Tensor,  # noqa: A002 - torch's name
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Look up and pool.

        Args:
            input: Ids, int32 or int64: `(L,)` cut into bags by `offsets`, or `(B, bag length)` without.
            offsets: `(B,)`, where every bag of a 1-D `input` begins; `(B + 1,)` with `include_last_offset`.
            per_sample_weights: Float32, or of the output dtype, of `input`'s shape: multiply the rows. Only with mode
                "sum".

        Returns:
            `(B, D)` of the output dtype; zeros for an empty bag.

        Raises:
            IndexError: An id is not a row of the table.
            ValueError: Shapes, devices or options that cannot be; offsets that fall, begin above 0 or end beyond the
                ids; a NaN in `per_sample_weights`.
            TypeError: Ids or offsets that are not integers, weights that are not float32.
        """
        self._check_options()
        self._check_feature(self.mode)
        indices = index_tensor("input", input)
        weights = self._per_sample_weights(per_sample_weights, indices.shape)
        if indices.dim() == 2:
            if offsets is not None:
                raise ValueError("offsets: expected None, as a 2-D input has bags of one length, got a tensor")
            batch_size = indices.shape[0]
            indices = indices.view(-1)  # (B, bag length) -> (L,)
        elif indices.dim() == 1:
            offsets = self._offsets(offsets)
            batch_size = offsets.numel() - 1 if self.include_last_offset else offsets.numel()
        else:
            raise ValueError(f"input: expected one or two dimensions, got shape {tuple(indices.shape)}")
        if self.max_norm is not None:
            operators.renorm(self._tables, indices, offsets, batch_size, weights, self.max_norm, self.norm_type)
        return operators.lookup(
            self._tables,
            indices,
            offsets,
            batch_size,
            weights,
            sparse=self.sparse,
            scale_grad_by_freq=[self.scale_grad_by_freq],
        )

    def _check_options(self) -> None:
        if self.mode == "max" and (self.sparse or self.scale_grad_by_freq):
            raise ValueError(
                "mode: expected 'sum' or 'mean' with sparse or scale_grad_by_freq, got 'max', which supports neither"
            )

    def _per_sample_weights(self, weights: Tensor | None, shape: torch.Size) -> Tensor | None:
        if weights is None:
            return None
        if self.mode != "sum":
            raise ValueError(f"per_sample_weights: expected None with mode {self.mode!r}, only 'sum' supports them")
        if weights.dtype is self._tables.output_dtype:  # as torch's, which are of the precision of the rows
            weights = weights.float()
        return float_tensor("per_sample_weights", weights, shape).view(-1)  # (L,)

    def _offsets(self, offsets: Tensor | None) -> Tensor:
        if offsets is None:
            raise ValueError("offsets: expected a 1-D tensor with a 1-D input, got None")
        offsets = index_tensor("offsets", offsets)
        if offsets.dim() != 1:
            raise ValueError(f"offsets: expected one dimension, got shape {tuple(offsets.shape)}")
        if self.include_last_offset and offsets.numel() == 0:
            raise ValueError("offsets: expected at least one element with include_last_offset=True, got none")
        return offsets

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        optimizer: OptimizerSpec | None = None,
    ) -> Self:
        """Make one from rows, `(N, D)` float32, float16 or bfloat16, which are copied.

        Args:
            embeddings: The rows.
            freeze: Do not train them.
            max_norm: As of the class, and all the others.
            norm_type: As of the class.
            scale_grad_by_freq: As of the class.
            mode: As of the class.
            sparse: As of the class.
            include_last_offset: As of the class.
            padding_idx: As of the class.
            optimizer: As of the class.

        Example:
            >>> import torch, dlrm_rs
            >>> bags = dlrm_rs.EmbeddingBag.from_pretrained(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
            >>> bags(torch.tensor([[0, 1]]))
            tensor([[2., 3.]])
        """
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings: expected two dimensions, got shape {tuple(embeddings.shape)}")
        rows, columns = embeddings.shape
        module = cls(
            rows,
            columns,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            embeddings,
            include_last_offset,
            padding_idx,
            optimizer=optimizer,
        )
        if freeze and "weight" in module._parameters:
            module.weight.requires_grad_(False)
        return module
