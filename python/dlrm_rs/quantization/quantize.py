"""`quantize` and `dequantize`: the tables of a model brought into another row format, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from dlrm_rs._dlrm_rs import Spare, TableRows
from dlrm_rs.hot_rows import check_hot_rows
from dlrm_rs.owner import HoldsWeight, OwnsTables
from dlrm_rs.quantization.budget import Budget, Choice, TableSizes
from dlrm_rs.quantization.progress import Progress, progress_bar
from dlrm_rs.quantization.report import QuantizationReport, ReportBuilder, TableChange
from dlrm_rs.quantization.row_errors import row_weights
from dlrm_rs.quantization.search import choose_formats
from dlrm_rs.row_formats import METHODS, QUANTIZED, TORCH_DTYPES, row_format
from dlrm_rs.tables import Displaced, EmbeddingTables

__all__ = ["dequantize", "quantize"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class _Table(NamedTuple):
    """A table of the model, by the name that it has there."""

    name: str
    tables: EmbeddingTables
    place: int

    @property
    def row_format(self) -> str:
        return self.tables.row_formats[self.place]

    @property
    def shape(self) -> tuple[int, int]:
        _, num_embeddings, embedding_dim, _ = self.tables.tables[self.place]
        return num_embeddings, embedding_dim

    @property
    def hot_share(self) -> float:
        """The share of the rows that are kept in fp32 while the others are in codes."""
        return self.tables.hot_rows[self.place] if self.tables.keeps_hot_rows(self.place) else 0.0

    def bytes_in(self, row_format: str, scale_format: str | None) -> int:
        """What rows take in a format that they are quantized to, with scales in another, but for hot rows."""
        num_embeddings, embedding_dim = self.shape
        if row_format in TORCH_DTYPES:
            return num_embeddings * embedding_dim * TORCH_DTYPES[row_format].itemsize
        bits = int(row_format.removeprefix("int"))
        pair_bytes = 8 if scale_format == "fp32" else 4  # of scale and bias
        return num_embeddings * (-(-embedding_dim * bits // 8) + pair_bytes)

    def bytes_now(self) -> int:
        sizes = self.tables.handle.memory_report()[self.place]
        return sizes["payload"] + sizes["scales"] + sizes["hot"]


class _Encoded(NamedTuple):
    """Rows in their new format, and what they lost."""

    rows: TableRows
    errors: NDArray[np.float32]
    largest_error: float


class _Encoding(NamedTuple):
    """How rows are encoded, beside their format."""

    method: str | None
    scale_format: str | None
    zero_nonfinite: bool

    def encode(self, table: _Table, row_format: str, hot_share: float, spare: Spare | None = None) -> _Encoded:
        """Rows in another format; hot rows come along, without a loss, where a table keeps as many of them."""
        handle = table.tables.handle
        with _named(table):
            encoded = _Encoded(*handle.encode(*self._of(table, row_format), spare))
            hot = handle.hot_rows(table.place)
            if hot is not None and hot_share == table.hot_share and row_format in QUANTIZED:
                encoded.rows.put_hot_rows(table.name, *hot)
                ids = hot[1]
                encoded.errors[ids[ids >= 0]] = 0
            return encoded

    def check(self, table: _Table, row_format: str) -> None:
        """Refuse what `encode` refuses."""
        with _named(table):
            table.tables.handle.check_encoding(*self._of(table, row_format))

    def _of(self, table: _Table, row_format: str) -> tuple[int, str, str, str | None, bool]:
        table.tables.weights()  # what the user has put into a weight is to be in the engine
        method = self.method or METHODS.get(row_format, "minmax")
        return table.place, row_format, method, self.scale_format, self.zero_nonfinite


@contextmanager
def _named(table: _Table) -> Iterator[None]:
    """Have errors name the table as the model does, which the engine does not know."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{table.name}: {error}") from error


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
    tables = _tables_of(module)
    name = row_format("dtype", dtype)
    formats = dict.fromkeys((table.name for table in tables), name)
    if budget is not None:
        names = tuple(row_format("formats of the budget", candidate) for candidate in budget.formats)
        budget = replace(budget, formats=names)
    for candidate in budget.formats if budget is not None else (name,):
        _check_method(method, candidate)
        _check_changeable(module, tables, candidate)
    no_hot_rows = "a budget" if budget is not None else "'codebook'" if method == "codebook" else None
    shares = _hot_shares(tables, hot_rows, hot_data_type, name, no_hot_rows, keep_optimizer)
    encoding = _Encoding(method, _scale_format(scale_dtype), _zero_nonfinite(nonfinite))
    used = _check_weights(weights, tables)
    choice = None
    with progress_bar(progress, sum(table.bytes_now() for table in tables)) as bar:
        if budget is not None:
            choice = _choose(module, tables, budget, encoding, bar)
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
    tables = _tables_of(module)
    formats = dict.fromkeys((table.name for table in tables), name)
    _check_changeable(module, tables, name)
    with progress_bar(None, sum(table.bytes_now() for table in tables)) as bar:
        _apply(tables, formats, dict.fromkeys(formats, 0.0), _Encoding(None, None, False), {}, None, True, bar)
    return module


def _tables_of(module: nn.Module) -> list[_Table]:
    """Every table of a model, once, by its name there: the module's, and in a collection the table's after it."""
    found: dict[int, list[_Table]] = {}
    for name, owner in module.named_modules():
        if isinstance(owner, OwnsTables):
            tables = owner._tables
            single = len(tables.tables) == 1 and isinstance(owner, nn.Embedding | nn.EmbeddingBag)
            names = [name or spec.name if single else f"{name}.{spec.name}".lstrip(".") for spec in tables.tables]
            of_owner = [_Table(table_name, tables, place) for place, table_name in enumerate(names)]
            found.setdefault(id(tables), of_owner)
    if not found:
        raise ValueError(
            "module: expected a model with tables of dlrm_rs, got none; dlrm_rs.replace_embeddings brings those of "
            "torch into the engine"
        )
    return [table for tables in found.values() for table in tables]


def _check_method(method: str | None, row_format: str) -> None:
    """Refuse a method that has nothing to search for in a row format, or is none."""
    fitting = {"minmax": (*TORCH_DTYPES, *QUANTIZED), "lsq": QUANTIZED, "codebook": ("int4",)}
    if method is not None and method not in fitting:
        raise ValueError(f"method: expected one of {', '.join(fitting)}, got {method!r}")
    if method is not None and row_format not in fitting[method]:
        formats = " or ".join(", ".join(fitting[method]).rsplit(", ", 1))
        raise ValueError(f"method: expected {formats} rows with {method!r}, got {row_format}")


def _hot_shares(
    tables: Sequence[_Table],
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


def _check_changeable(module: nn.Module, tables: Sequence[_Table], row_format: str) -> None:
    """Refuse what would not work any more with rows of another format."""
    for table in tables:
        table.tables.check_unshared(f"module: cannot change the rows of {table.name!r}; do so before they are shared")
    weights = {id(weight) for table in tables for weight in table.tables.weights() if weight.numel()}
    for name, owner in module.named_modules():
        if getattr(owner, "max_norm", None) is not None and isinstance(owner, OwnsTables) and row_format != "fp32":
            raise ValueError(f"max_norm: expected None of {name!r} for rows of {row_format}, got {owner.max_norm}")
        shared = [key for key, value in owner._parameters.items() if id(value) in weights]
        if shared and not isinstance(owner, HoldsWeight):
            raise ValueError(
                f"weight: expected tables that share their Parameter with no other module, got {name!r}, whose "
                f"{shared[0]!r} is one's weight and would stay behind"
            )


def _scale_format(scale_dtype: torch.dtype | None) -> str | None:
    for name, dtype in TORCH_DTYPES.items():
        if scale_dtype is dtype:
            return name
    if scale_dtype is not None:
        raise TypeError(f"scale_dtype: expected None or one of {list(TORCH_DTYPES.values())}, got {scale_dtype}")
    return None


def _zero_nonfinite(nonfinite: str) -> bool:
    if nonfinite not in ("error", "zero"):
        raise ValueError(f"nonfinite: expected 'error' or 'zero', got {nonfinite!r}")
    return nonfinite == "zero"


def _check_weights(weights: Mapping[str, ArrayLike] | None, tables: Sequence[_Table]) -> dict[str, NDArray[np.float32]]:
    if weights is None:
        return {}
    names = {table.name for table in tables}
    if set(weights) != names:
        raise ValueError(f"weights: expected one array for each table, {sorted(names)}, got {sorted(weights)}")
    return {table.name: row_weights(table.name, weights[table.name], table.shape[0]) for table in tables}


def _apply(
    tables: Sequence[_Table],
    formats: Mapping[str, str],
    hot_shares: Mapping[str, float],
    encoding: _Encoding,
    weights: Mapping[str, NDArray[np.float32]],
    choice: Choice | None,
    keep_optimizer: bool,
    bar: Progress,
) -> QuantizationReport:
    """Bring every table into its format, or none at all where rows are refused."""
    # Rows that are in their format already are encoded again only where the user says how rows are to be encoded.
    again = QUANTIZED if choice is None and encoding != _PLAIN else ()
    changing = [
        t
        for t in tables
        if t.row_format != formats[t.name]
        or t.row_format in again
        or (t.hot_share and t.hot_share != hot_shares[t.name])
    ]
    if len(changing) > 1:  # one alone is refused before it is replaced
        for table in bar.of("Checking", changing, _bytes_of):
            encoding.check(table, formats[table.name])
    builder, spare = ReportBuilder(), Spare()
    for table in bar.of("Replacing", tables, _bytes_of):
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


# What the user gets who says nothing.
_PLAIN = _Encoding(None, None, False)


def _bytes_of(table: _Table) -> int:
    return table.bytes_now()


def _choose(module: nn.Module, tables: Sequence[_Table], budget: Budget, encoding: _Encoding, bar: Progress) -> Choice:
    """Search for the formats; every table is as it was afterwards."""
    sizes = []
    for table in tables:
        bytes_of = {name: table.bytes_in(name, encoding.scale_format) for name in budget.formats}
        bytes_of[table.row_format] = table.bytes_now()
        sizes.append(TableSizes(table.name, table.row_format, bytes_of))
    with _trying(tables, encoding) as switch, bar.steps("Measuring") as progress:

        def evaluate(formats: Mapping[str, str]) -> float:
            switch(formats)
            return float(budget.metric(module))

        return choose_formats(budget, sizes, evaluate, progress)


@contextmanager
def _trying(tables: Sequence[_Table], encoding: _Encoding) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """A function that brings tables into formats, always from their original rows; these come back at the end."""
    originals: dict[str, Displaced] = {}

    def switch(table: _Table, row_format: str) -> None:
        if table.row_format == row_format:
            return
        if table.name in originals:
            table.tables.restore(table.place, originals.pop(table.name))
        if table.row_format != row_format:
            encoded = encoding.encode(table, row_format, 0.0)
            originals[table.name] = table.tables.swap(table.place, encoded.rows, row_format)

    def switch_all(formats: Mapping[str, str]) -> None:
        for table in tables:
            switch(table, formats[table.name])

    try:
        yield switch_all
    finally:
        for table in tables:
            if table.name in originals:
                table.tables.restore(table.place, originals.pop(table.name))
