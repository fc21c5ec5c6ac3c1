"""`quantize` and `dequantize`: the tables of a model brought into another row format, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from dlrm_rs._dlrm_rs import Spare
from dlrm_rs.hot_rows import check_hot_rows
from dlrm_rs.quantization.budget import Budget, Choice
from dlrm_rs.quantization.encoding import PLAIN, Encoding, check_method, scale_format_of, zeroes_nonfinite
from dlrm_rs.quantization.model_tables import ModelTable, check_changeable, tables_of
from dlrm_rs.quantization.progress import Progress, progress_bar
from dlrm_rs.quantization.report import QuantizationReport, ReportBuilder, TableChange
from dlrm_rs.quantization.row_errors import row_weights
from dlrm_rs.quantization.trial import choose
from dlrm_rs.row_formats import QUANTIZED, TORCH_DTYPES, row_format

__all__ = ["dequantize", "quantize"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def quantize(
    module: nn.Module,
    dtype: torch.dtype | str = "int8",
    *,
    method: str | None = None,
    scale_dtype: torch.dtype | None = None,
    nonfinite: str = "error",
    weights: Mapping[str, ArrayLike] | None = None,
    budget: Budget | None = None,
    keep_optimizer: bool = True,
    hot_rows: float | None = None,
    hot_data_type: torch.dtype | str = "fp32",
    progress: bool | None = None,
) -> QuantizationReport:
    """Bring the tables of a model into another row format, in place and on all threads.

    The rows are those that the tables have now; each is encoded by itself. `weight` is no Parameter of the model any
    more where rows are quantized. A fused optimizer trains on, with its state; with "codebook", whose rows it cannot
    train, it is given up.

    Rows whose largest element is below about 1e-36 decode to their smallest one: their scale is too small to divide by.

    Whoever holds the old `weight`, such as a torch optimizer, keeps it and its memory: let go of it first.

    Memory: the new rows of one table, and 4 bytes for each row of all. All rows are looked at first, and refused if one
    cannot be encoded; then table by table is replaced, the next one's rows made where those of the last were.

    Args:
        module: A model with tables of `dlrm_rs` in it.
        dtype: The row format: "int8", "int4", "int2", "fp16" or "bf16"; or `torch.float16` or `torch.bfloat16`.
        method: How scale and bias of a row are found. "minmax": from its smallest and largest element. "lsq": least
            squares, from several starts, never worse than "minmax"; slower. "codebook", for int4: likewise, with 16
            numbers of the table's own in place of evenly spaced ones, the best for heavy-tailed rows. None for "minmax"
            with int8 and "lsq" with int4 and int2.
        scale_dtype: How scale and bias are stored. None for float16, or bfloat16 where that does not hold those of
            every row of the table with its usual precision. `torch.float32` gives int8 rows the bytes of torch's
            prepack.
        nonfinite: What a NaN or an infinity is: an "error", or "zero".
        weights: For every table by its name in the model, how often each row is used, `(N,)`: weighs the errors of the
            report.
        budget: Has the row format of each table chosen, by what it does to the user's metric. Then `dtype` counts for
            nothing.
        keep_optimizer: Whether to keep a fused optimizer; False gives it up with its state, as for a model that is only
            to serve from now on.
        hot_rows: The share of each table's rows, those that training touches most from now on, that are kept in fp32
            while the others are in codes; 0 for none, which brings those that there are into codes. None leaves it as
            it is: rows that are hot stay so, and lose nothing. For quantized rows with a fused optimizer; not with
            "codebook" or a `budget`.
        hot_data_type: How these are stored: "fp32".
        progress: Whether to show a progress bar (with rich, of the extra `dlrm_rs[demo]`); None for one on a terminal,
            when it takes long.

    Returns:
        Bytes and errors, per table and in all.

    Raises:
        ValueError: No tables of `dlrm_rs` in the model; a NaN or an infinity in a row, or a number that the row format
            cannot hold, by table and row; options that do not go together; weights that do not fit the tables.
        TypeError: There is no such row format.
        MemoryError: Not enough for the new rows of a table. Tables before that one are quantized then, each whole; so
            they are after a KeyboardInterrupt. In all other cases the model is as it was.

    Example:
        >>> import torch, dlrm_rs
        >>> bags = dlrm_rs.EmbeddingBag(1000, 64, mode="sum")
        >>> report = dlrm_rs.quantize(bags, "int8")
        >>> report.total.bytes_before, report.total.bytes_after
        (256000, 68000)
        >>> report.total.error_mean < 0.006
        True
        >>> bags(torch.tensor([[1, 2]])).shape
        torch.Size([1, 64])
    """
    tables = tables_of(module)
    name = row_format("dtype", dtype)
    formats = dict.fromkeys((table.name for table in tables), name)
    if budget is not None:
        names = tuple(row_format("formats of the budget", candidate) for candidate in budget.formats)
        budget = replace(budget, formats=names)
    for candidate in budget.formats if budget is not None else (name,):
        check_method(method, candidate)
        check_changeable(module, tables, candidate)
    no_hot_rows = "a budget" if budget is not None else "'codebook'" if method == "codebook" else None
    shares = _hot_shares(tables, hot_rows, hot_data_type, name, no_hot_rows, keep_optimizer)
    encoding = Encoding(method, scale_format_of(scale_dtype), zeroes_nonfinite(nonfinite))
    used = _check_weights(weights, tables)
    choice = None
    with progress_bar(progress, sum(table.bytes_now() for table in tables)) as bar:
        if budget is not None:
            choice = choose(module, tables, budget, encoding, bar)
            formats = dict(choice.formats)
        keep_optimizer = keep_optimizer and method != "codebook"
        return _apply(tables, formats, shares, encoding, used, choice, keep_optimizer, bar)


def dequantize(module: ModuleT, dtype: torch.dtype | str = "fp32") -> ModuleT:
    """Give the tables of a model rows that are numbers again, in place: `weight` is a Parameter then.

    What quantization has lost does not come back. A fused optimizer trains on, with its state.

    Args:
        module: A model with tables of `dlrm_rs` in it.
        dtype: The row format: "fp32", "fp16", "bf16" or their torch dtype.

    Returns:
        `module`.

    Raises:
        ValueError: No tables of `dlrm_rs` in the model, or numbers that the row format cannot hold.
        TypeError: There is no such row format, or it is a quantized one.
        MemoryError: As of `quantize`.

    Example:
        >>> import dlrm_rs
        >>> bags = dlrm_rs.EmbeddingBag(10, 4, dtype="int8")
        >>> dlrm_rs.dequantize(bags).weight.dtype
        torch.float32
    """
    name = row_format("dtype", dtype)
    if name in QUANTIZED:
        raise TypeError(f"dtype: expected one of {', '.join(map(repr, TORCH_DTYPES))}, got {dtype!r}")
    tables = tables_of(module)
    formats = dict.fromkeys((table.name for table in tables), name)
    check_changeable(module, tables, name)
    with progress_bar(None, sum(table.bytes_now() for table in tables)) as bar:
        _apply(tables, formats, dict.fromkeys(formats, 0.0), Encoding(None, None, False), {}, None, True, bar)
    return module


def _hot_shares(
    tables: Sequence[ModelTable],
    hot_rows: float | None,
    hot_data_type: object,
    row_format: str,
    excluded_by: str | None,
    keep_optimizer: bool,
) -> dict[str, float]:
    """The share of rows that every table is to keep in fp32; refuses what cannot be."""
    shares = {table.name: table.hot_share if hot_rows is None else hot_rows for table in tables}
    if excluded_by is not None and any(shares.values()):
        got = "tables that have some" if hot_rows is None else hot_rows
        raise ValueError(f"hot_rows: expected 0 with {excluded_by}, got {got}; give hot_rows=0")
    if hot_rows is None:
        return shares if row_format in QUANTIZED else dict.fromkeys(shares, 0.0)
    for table in tables:
        trained = keep_optimizer and table.tables.optimizer is not None
        check_hot_rows(f" of {table.name!r}", hot_rows, hot_data_type, row_format, trained=trained)
    return shares


def _check_weights(
    weights: Mapping[str, ArrayLike] | None, tables: Sequence[ModelTable]
) -> dict[str, NDArray[np.float32]]:
    if weights is None:
        return {}
    names = {table.name for table in tables}
    if set(weights) != names:
        raise ValueError(f"weights: expected one array for each table, {sorted(names)}, got {sorted(weights)}")
    return {table.name: row_weights(table.name, weights[table.name], table.shape[0]) for table in tables}


def _apply(
    tables: Sequence[ModelTable],
    formats: Mapping[str, str],
    hot_shares: Mapping[str, float],
    encoding: Encoding,
    weights: Mapping[str, NDArray[np.float32]],
    choice: Choice | None,
    keep_optimizer: bool,
    bar: Progress,
) -> QuantizationReport:
    """Bring every table into its format, or none at all where rows are refused."""
    # Rows that are in their format already are encoded again only where the user says how rows are to be encoded.
    again = QUANTIZED if choice is None and encoding != PLAIN else ()
    changing = [
        t
        for t in tables
        if t.row_format != formats[t.name]
        or t.row_format in again
        or (t.hot_share and t.hot_share != hot_shares[t.name])
    ]
    if len(changing) > 1:  # one alone is refused before it is replaced
        for table in bar.of("Checking", changing, ModelTable.bytes_now):
            encoding.check(table, formats[table.name])
    builder, spare = ReportBuilder(), Spare()
    for table in bar.of("Replacing", tables, ModelTable.bytes_now):
        row_format, before, bytes_before = formats[table.name], table.row_format, table.bytes_now()
        share = hot_shares[table.name]
        encoded = encoding.encode(table, row_format, share, spare) if table in changing else None
        if not keep_optimizer:
            table.tables.drop_optimizer()
        if encoded is not None:
            spare.retire(table.tables.swap(table.place, encoded.rows, row_format, share).rows)
        elif share != table.hot_share:
            table.tables.add_hot_rows(table.place, share)
        change = TableChange(table.name, *table.shape, before, row_format, bytes_before, table.bytes_now())
        errors = np.zeros(table.shape[0], np.float32) if encoded is None else encoded.errors
        builder.add(change, errors, 0.0 if encoded is None else encoded.largest_error, weights.get(table.name))
    return builder.build(choice)
