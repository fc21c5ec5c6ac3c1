"""What the modules with tables share: the fused optimizer, and staying where they are when a model moves.

A mixin for `EmbeddingBagCollection`, and one for the modules of a single table that are torch's by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from dlrm_rs._dlrm_rs import TableRows
from dlrm_rs.arguments import check_padding_idx
from dlrm_rs.buffers import PARTS
from dlrm_rs.hot_rows import HOT_PARTS, check_hot_rows
from dlrm_rs.optim import FusedOptimizer, OptimizerSpec
from dlrm_rs.row_formats import QUANTIZED
from dlrm_rs.tables import MARK, STAND_IN, EmbeddingTables, FeatureSpec, TableSpec

__all__ = ["HoldsWeight", "OwnsTable", "OwnsTables", "single_table"]


class OwnsTables(nn.Module):
    """A module with tables in the engine."""

    _tables: EmbeddingTables

    @property
    def fused_optimizer(self) -> FusedOptimizer | None:
        """The optimizer that runs inside backward, a `torch.optim.Optimizer`; None if the module was made without."""
        return self._tables.optimizer

    def memory_report(self) -> dict[str, dict[str, int]]:
        """Bytes of every table by its name.

        `"payload"` (elements of its rows), `"scales"` (scale and bias of quantized rows), `"hot"` (those of quantized
        rows that are kept in fp32, and what is known of them), `"state"` (of the optimizer), `"overhead"` (the rest).
        A call takes scratch beside these, which its batch bounds and which is free after it; gradients that wait for a
        step are `fused_optimizer.waiting_bytes()`.

        Example:
            >>> import dlrm_rs
            >>> dlrm_rs.EmbeddingBag(1000, 16).memory_report()["embedding_bag"]["payload"]
            64000
        """
        report = self._tables.handle.memory_report()
        return {table.name: sizes for table, sizes in zip(self._tables.tables, report, strict=True)}

    def row_formats(self) -> dict[str, str]:
        """How the rows of every table are stored, by its name.

        Example:
            >>> import dlrm_rs
            >>> dlrm_rs.EmbeddingBag(1000, 16, dtype="int8").row_formats()
            {'embedding_bag': 'int8'}
        """
        return {table.name: name for table, name in zip(self._tables.tables, self._tables.row_formats, strict=True)}

    def __getstate__(self) -> dict[str, Any]:
        self._tables.settle()  # the rows go along
        return self.__dict__

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            f"torch.jit.script: expected modules that TorchScript can compile, got {type(self).__name__}, whose rows "
            "the engine looks up; torch.export saves a model with its tables, torch.compile makes it fast"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `fn` is what `.to()`, `.cuda()`, `.half()`, `.share_memory()` and the like do to every tensor of a model. The
        # tables stay as they are, on the CPU: that is what they are for. A change that is more than a move is refused.
        _refuse_change(fn(torch.zeros(1, device="cpu")))
        kept = {id(tensor) for weight in self._tables.weights() for tensor in (weight, weight.grad)}
        kept.update(map(id, self._tables.parts()))
        super()._apply(lambda tensor: tensor if id(tensor) in kept else fn(tensor), recurse)  # type: ignore[no-untyped-call]
        return self


class HoldsWeight(nn.Module):
    """A module that holds the weight of one table, and its place in a state_dict.

    Rows that are numbers are the Parameter `weight`. Quantized rows are the buffers `weight_codes`, `weight_scales` and
    for some `weight_codebook`; where some are kept in fp32, these are `weight_hot_rows`, `weight_hot_ids` and
    `weight_hot_counts`. A state_dict has `weight_format` as well, `(3,)` int64: the version of this layout, the bits of
    a code, and `D`. Where a fused optimizer trains them, an empty Parameter `weight_stand_in` tells by its
    `requires_grad` whether it does; no state_dict has it.

    A tensor put in the place of such a buffer (`module.weight_codes = x`, `module.weight_codes.data = x`), of the same
    shape and dtype, is copied into the engine before the next lookup, as one in the place of a `weight` is. What does
    not ask the module for its buffer, as `torch.func.functional_call`, is noticed in compiled models alone.
    """

    _tables: EmbeddingTables
    # Which of them.
    _table: int = 0

    def __getattr__(self, name: str) -> Any:
        """What is found nowhere else: of a quantized table's weight, why."""
        if name in PARTS:
            self._in_hands()
        if name == "weight" and "_tables" in self.__dict__ and name not in self._parameters:
            row_format = self._tables.row_formats[self._table]
            raise AttributeError(
                f"weight: expected rows that are numbers, got {row_format}, which torch has no dtype for; look rows "
                "up, or dlrm_rs.dequantize the module"
            )
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PARTS and name in self._buffers and type(value) is Tensor:
            value = value.detach()  # the tensor that is given stays where it is
        super().__setattr__(name, value)
        if name in PARTS:
            self._in_hands()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name in PARTS:
            self._in_hands()

    def _in_hands(self) -> None:
        """From now on look whether the buffers of quantized rows are still over the engine's memory."""
        if "_tables" in self.__dict__ and self._tables.row_formats[self._table] in QUANTIZED:
            self._tables.buffers.in_hands.add(self._table)

    def to_packed(self, layout: str = "fused", row_alignment: int = 1) -> Tensor:
        """Quantized rows as torch and FBGEMM store them, byte for byte.

        Args:
            layout: "fused": codes, then scale and bias (float32 for int8, float16 for int4 and int2), as
                `torch.ops.quantized.embedding_bag_byte_prepack` and its 4-bit and 2-bit kin; "tbe": scale and bias
                (float16), then codes, as FBGEMM's table-batched embeddings for inference.
            row_alignment: Rows are filled with zeros up to a multiple of this.

        Returns:
            `(N, bytes of a row)` uint8.

        Raises:
            ValueError: Rows that are not quantized, or whose scales or codebook the layout cannot hold as they are.

        Example:
            >>> import torch, dlrm_rs
            >>> rows = torch.tensor([[0.0, 1.0, 9.0, 15.0], [2.0, 2.0, 8.0, 32.0]])
            >>> bags = dlrm_rs.EmbeddingBag(2, 4, dtype="int4", _weight=rows)
            >>> packed = bags.to_packed()
            >>> torch.equal(packed, torch.ops.quantized.embedding_bag_4bit_prepack(rows))
            True
            >>> again = dlrm_rs.EmbeddingBag(2, 4, dtype="int4").load_packed(packed)
            >>> again(torch.tensor([[1]]))
            tensor([[ 2.,  2.,  8., 32.]])
        """
        self._tables.settle()
        self._tables.weights()  # what the user has put into a buffer is to be in the engine
        return torch.from_numpy(self._tables.handle.pack(self._table, layout, row_alignment))

    def load_packed(self, packed: Tensor, layout: str = "fused") -> Self:
        """Take over rows that torch or FBGEMM has quantized, without requantizing them.

        Args:
            packed: `(N, bytes of a row)` uint8, as of `to_packed`, in the row format of this table.
            layout: As of `to_packed`.

        Returns:
            This module.

        Raises:
            TypeError: Another dtype.
            ValueError: Another shape, or a scale or bias that is not finite; the table is as it was then.
        """
        name, num_embeddings, embedding_dim, _ = self._tables.tables[self._table]
        row_format = self._tables.row_formats[self._table]
        if packed.dim() != 2 or len(packed) != num_embeddings:
            raise ValueError(
                f"packed: expected {num_embeddings} rows, (N, bytes of a row), got shape {tuple(packed.shape)}"
            )
        array = packed.detach().cpu().contiguous().numpy()
        rows = TableRows.unpack(name, array, embedding_dim, row_format, layout)
        self._tables.swap(self._table, rows, row_format)
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._tables.settle()  # the rows go along
        return self.__dict__

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._tables.settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in (STAND_IN, MARK):
            destination.pop(f"{prefix}{name}", None)
        if self._tables.row_formats[self._table] in QUANTIZED:
            parts = self._tables.packed_state(self._table)
            destination.update({f"{prefix}weight_{part}": tensor for part, tensor in parts.items()})
            destination[f"{prefix}weight_format"] = torch.tensor(self._format(), device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._tables.settle()
        here = {key[len(prefix) :]: key for key in state_dict if key.startswith(f"{prefix}weight")}
        parts = {key.removeprefix("weight_"): state_dict[name] for key, name in here.items() if key != "weight"}
        row_format = self._tables.row_formats[self._table]
        if row_format in QUANTIZED and "weight" not in here and "format" in parts:
            known = {"format", "codes", "scales", "codebook", *HOT_PARTS}
            unexpected_keys.extend(f"{prefix}weight_{part}" for part in parts.keys() - known)
            self._load_parts(prefix, {part: parts[part] for part in parts.keys() & known}, error_msgs)
        elif (row_format in QUANTIZED and "weight" in here) or (row_format not in QUANTIZED and "format" in parts):
            got = "rows that are numbers" if "weight" in here else _described(parts["format"])
            error_msgs.append(
                f"{prefix}weight: expected {row_format} rows of dim {self._dim()}, got {got}; load into a module made "
                "with the checkpoint's row format, then dlrm_rs.quantize or dlrm_rs.dequantize it"
            )
        else:  # also where there is nothing, which is then missing
            if row_format in QUANTIZED:
                missing_keys.extend(f"{prefix}weight_{part}" for part in ("codes", "scales", "format"))
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            added = [f"{prefix}{name}" for name in (STAND_IN, MARK)]
            missing_keys[:] = [key for key in missing_keys if key not in added]

    def _load_parts(self, prefix: str, parts: dict[str, Any], error_msgs: list[str]) -> None:
        wanted = ["format", "codes", "scales", *(HOT_PARTS if parts.keys() & set(HOT_PARTS) else ())]
        if not set(wanted) <= set(parts) or not all(isinstance(part, Tensor) for part in parts.values()):
            *names, last = (f"weight_{part}" for part in wanted)
            error_msgs.append(
                f"{prefix}weight: expected tensors {', '.join(names)} and {last}, got "
                f"{ {part: type(value).__name__ for part, value in parts.items()} }"
            )
        elif parts["format"].dtype is not torch.int64 or parts["format"].tolist() != self._format():
            expected = _described(torch.tensor(self._format()))
            error_msgs.append(f"{prefix}weight: expected {expected}, got {_described(parts['format'])}")
        else:
            try:
                self._tables.load_packed_state(self._table, parts)
            except (TypeError, ValueError, RuntimeError) as error:  # the last is torch's, of tensors without data
                error_msgs.append(f"{prefix}weight: {error}")

    def _format(self) -> list[int]:
        bits = int(self._tables.row_formats[self._table].removeprefix("int"))
        return [_STATE_VERSION, bits, self._dim()]

    def _dim(self) -> int:
        return self._tables.tables[self._table].embedding_dim


# Of the layout of quantized rows in a state_dict.
_STATE_VERSION = 1


def _described(row_format: Any) -> str:
    """What `weight_format` says, in words."""
    values = row_format.tolist() if isinstance(row_format, Tensor) else row_format
    if not isinstance(values, list) or len(values) != 3:
        return f"a weight_format of {values}"
    version, bits, dim = values
    return f"int{bits} rows of dim {dim} in version {version} of their layout"


class OwnsTable(HoldsWeight, OwnsTables):
    """A module with one table, whose attributes are those of torch's module of the same name."""

    padding_idx: int | None
    embedding_dim: int

    def reset_parameters(self) -> None:
        """Fill the table from N(0, 1), the padding row with zeros."""
        self._tables.initialize(0, self._fill)

    def _fill(self, rows: Tensor, first: int) -> None:
        nn.init.normal_(rows)
        if self.padding_idx is not None and first <= self.padding_idx < first + len(rows):
            rows[self.padding_idx - first].zero_()

    def _check_feature(self, pooling: str) -> None:
        # torch reads these attributes at every call, so a user may change them; the engine got them with the table.
        feature = self._tables.features[0]
        if feature.pooling != pooling or feature.padding_idx != self.padding_idx:
            raise ValueError(
                f"mode, padding_idx: expected {feature.pooling!r} and {feature.padding_idx}, fixed when the module was "
                f"made, got {pooling!r} and {self.padding_idx}; make a new module with _weight=module.weight"
            )

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        text = super().extra_repr()
        row_format = self._tables.row_formats[0]
        if row_format != "fp32":
            text += f", dtype={row_format}"
        if self._tables.keeps_hot_rows(0):
            text += f", hot_rows={self._tables.hot_rows[0]}"
        if self.fused_optimizer is not None:
            text += f", optimizer={self.fused_optimizer.defaults['algorithm']}"
        return text


def single_table(
    module: nn.Embedding | nn.EmbeddingBag,
    name: str,
    row_format: str,
    optimizer: OptimizerSpec | None,
    output_dtype: torch.dtype,
    hot_rows: float = 0.0,
    hot_data_type: torch.dtype | str = "fp32",
) -> EmbeddingTables:
    """The table of a module that has torch's attributes; a weight that it has already is adopted.

    Args:
        module: The module.
        name: The table's name in messages.
        row_format: How a row is stored.
        optimizer: The fused optimizer, or None.
        output_dtype: Of what lookups give.
        hot_rows: The share of the rows that are kept in fp32 while the others are in codes.
        hot_data_type: How these are stored.
    """
    if module.max_norm is not None and row_format != "fp32":
        raise ValueError(f"max_norm: expected None for rows of {row_format}, got {module.max_norm}")
    table = TableSpec(name, module.num_embeddings, module.embedding_dim, row_format)
    pooling = module.mode if isinstance(module, nn.EmbeddingBag) else "none"
    padding_idx = check_padding_idx(module.padding_idx, module.num_embeddings)
    share = check_hot_rows("", hot_rows, hot_data_type, row_format, trained=optimizer is not None)
    return EmbeddingTables([table], [FeatureSpec(0, pooling, padding_idx)], [module], optimizer, output_dtype, [share])


# torch changes a model module by module, so it cannot be refused as a whole.
_BEFORE = "modules that come before this one in the model may have changed already"


def _refuse_change(probe: Tensor) -> None:
    if probe.dtype is not torch.float32:
        raise TypeError(
            f"dtype: expected the tables to keep their row format, got a change to {probe.dtype}; dlrm_rs.quantize "
            f"changes it, and other modules of the model can be converted one by one; {_BEFORE}"
        )
    if probe.is_meta:
        raise ValueError(
            "device: expected one that holds data, got 'meta'; the tables live in the memory of the host; " + _BEFORE
        )
    if probe.is_cpu and probe.is_shared():
        raise TypeError(
            "share_memory: expected the tables to stay in the engine's memory; processes made by fork read them "
            f"without it, and dlrm_rs.distributed.share_tables has several train them; {_BEFORE}"
        )
