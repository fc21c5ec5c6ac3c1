"""The Rust engine behind `dlrm_rs`: private, typed by hand, checked against the built module by `mypy.stubtest`.

Letters: `F` features, `T` tables, `B` batch, `L` ids in a call, `N` rows and `D` dim of a table, `W` the sum of the
features' `D`. Every array is a C-contiguous NumPy array; nothing is converted or copied silently. The arrays of a call
(ids, offsets, weights of ids, `out`, argmax, gradient) may be torch tensors as well, once `take_tensors` was told what
these are: strided ones on the CPU, with torch.bfloat16 where an array has int16. What autograd knows of them is not
looked at, and nobody may put other memory behind them during a call.

Ids are feature-major: bag `b` of feature `f` is `indices[offsets[f * B + b] : offsets[f * B + b + 1]]`. `offsets` has
`F * B` or `F * B + 1` elements; with `offsets=None` every bag has `L / (F * B)` ids.

Errors, the same for every method: `IndexError` (an id outside its table), `ValueError` (shapes, offsets, options, NaN),
`TypeError` (dtypes), `MemoryError` (memory that cannot be had), `OSError` (threads that cannot be started),
`RuntimeError` (a signal handler that uses tables which its own thread is in a call on, or arrays that another thread
changes during a call). When one is raised, no table and no optimizer state has changed.

Ctrl-C ends a long call with what Python's signal handler raises, usually `KeyboardInterrupt`, and leaves the tables as
they were; an update that has begun to write is finished first.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Homes",
    "Overlap",
    "Prepared",
    "Spare",
    "TableRows",
    "TableSet",
    "__version__",
    "get_num_threads",
    "info",
    "set_num_threads",
    "set_simd",
    "take_tensors",
]

__version__: str

_Ids: TypeAlias = NDArray[np.int32] | NDArray[np.int64] | Tensor
_F32: TypeAlias = NDArray[np.float32]
# Numbers of float32 or float16, or with int16 the bits of bfloat16, which NumPy has not.
_Floats: TypeAlias = _F32 | NDArray[np.float16] | NDArray[np.int16]
# Of a call.
_Weights: TypeAlias = _F32 | Tensor
_Argmax: TypeAlias = NDArray[np.int32] | Tensor

@final
class Spare:
    """Memory of a table that has been replaced, for the rows of the next: pages from the system would be cleared first."""

    def __new__(cls) -> Spare: ...
    def retire(self, rows: TableRows) -> None:
        """Take the memory of rows, if nobody looks at it any more and it is more than is here."""

@final
class TableRows:
    """The rows of one table outside a set, `(N, D)` in a row format: to be put into a set, once."""

    @staticmethod
    def encode(
        name: str,
        source: _F32,
        row_format: str,
        method: str,
        scale_format: str | None,
        zero_not_finite: bool,
    ) -> tuple[TableRows, _F32, float]:
        """Bring rows into a row format.

        Args:
            name: the table's, for messages.
            source: `(N, D)`.
            row_format: `"fp32"`, `"fp16"`, `"bf16"`, `"int8"`, `"int4"` or `"int2"`.
            method: `"minmax"`; for the last three `"lsq"`, too; for int4 `"codebook"`.
            scale_format: `"fp32"`, `"fp16"`, `"bf16"`, or `None` for fp16, or bf16 where that does not hold every scale.
            zero_not_finite: take NaN and infinities for zero; else they are a `ValueError` that names the row.

        Returns:
            The rows; the relative L2 error of each, `(N,)`; the largest absolute error of an element.
        """

    @staticmethod
    def unpack(name: str, packed: NDArray[np.uint8], embedding_dim: int, row_format: str, layout: str) -> TableRows:
        """Rows of packed ones, `(N, bytes of a row)`; layout is `"fused"` or `"tbe"`, as of `TableSet.pack`.

        `ValueError`: a scale or bias that is not finite; the message names its row.
        """

    @staticmethod
    def from_parts(
        name: str,
        embedding_dim: int,
        row_format: str,
        codes: NDArray[np.uint8],
        scales: _Floats,
        codebook: Sequence[float] | _F32 | None,
    ) -> TableRows:
        """Rows of what `TableSet.codes`, `scales` and `codebook` gave.

        `ValueError`: shapes that do not fit, a scale or bias that is not finite, or a codebook that does not ascend from
        0 to 15.
        """

    def put_hot_rows(self, name: str, rows: _F32, ids: NDArray[np.int64], counts: NDArray[np.uint8]) -> None:
        """Keep rows of codes in fp32: what `TableSet.hot_rows` gave; `name` is the table's.

        `ValueError`: shapes that do not fit, rows that are no codes or have a codebook, or a row where it cannot be.
        """

    @staticmethod
    def borrow(
        name: str,
        embedding_dim: int,
        row_format: str,
        elements: NDArray[Any],
        scales: _Floats | None,
        codebook: Sequence[float] | _F32 | None,
    ) -> TableRows:
        """Rows that are in arrays already, `(N, D)` or codes, and stay there: nothing is copied, nor looked at.

        The rows keep the arrays' memory alive. `ValueError`: arrays of other sizes, read-only or not contiguous.
        """

@final
class TableSet:
    """Embedding tables, their optimizer state, and the features that look them up: a handle made once."""

    def __new__(
        cls,
        tables: Sequence[tuple[str, int, int, str]],
        features: Sequence[tuple[int, str, int | None]],
    ) -> TableSet:
        """Allocate zeroed tables.

        Args:
            tables: `(name, num_embeddings, embedding_dim, row format)` of each table; row formats as of
                `TableRows.encode`.
            features: `(table, pooling, padding_idx)` of each feature; pooling is `"sum"`, `"mean"`, `"max"` or
                `"none"` (one output row per id), the same kind of output for all: pooled or not.
        """

    @staticmethod
    def of_rows(tables: Sequence[tuple[str, TableRows]], features: Sequence[tuple[int, str, int | None]]) -> TableSet:
        """A set of tables, `(name, rows)` of each, of rows that are there already; features as of the class."""

    def row_format(self, table: int) -> str:
        """How the rows of a table are stored."""

    def weight(self, table: int) -> _Floats:
        """The rows of a table, `(N, D)`: a writable view that keeps the memory alive. `ValueError` for quantized rows."""

    def codes(self, table: int) -> NDArray[np.uint8]:
        """The codes of a table of quantized rows, `(N, bytes of D codes)`: a view likewise, element 0 in the low bits."""

    def scales(self, table: int) -> _Floats:
        """Scale and bias of every row of such a table, `(N, 2)`: a view likewise."""

    def codebook(self, table: int) -> _F32 | None:
        """What the codes of int4 rows mean, `(16,)`; `None` where that is their own numbers."""

    def add_hot_rows(self, table: int, rows: int) -> None:
        """Keep as many rows of a table of codes in fp32 from now on, rounded up to a multiple of 16: none of them yet.

        Which these are follows from what `update` touches. `ValueError` where a table has some already, or other rows.
        """

    def hot_rows(self, table: int) -> tuple[_F32, NDArray[np.int64], NDArray[np.uint8]] | None:
        """The rows that a table keeps in fp32, as views likewise; `None` where it keeps none.

        `(W, D)`, their numbers `(W,)`, -1 where there is none, and how often each was touched lately `(W,)`. The scale of
        such a row is a NaN.
        """

    def encode(
        self,
        table: int,
        row_format: str,
        method: str,
        scale_format: str | None,
        zero_not_finite: bool,
        spare: Spare | None,
    ) -> tuple[TableRows, _F32, float]:
        """As `TableRows.encode`, of the rows of a table, which stay as they are; in spare memory where that is enough."""

    def check_encoding(
        self, table: int, row_format: str, method: str, scale_format: str | None, zero_not_finite: bool
    ) -> None:
        """Refuse rows that `encode` refuses, and make none."""

    def swap_rows(self, table: int, rows: TableRows) -> TableRows:
        """Put rows of the same shape in the place of those of a table, and return these.

        Views of the old rows keep their memory. An optimizer's state stays, but rows that are not fp32 are not updated.
        """

    def write_rows(self, table: int, first: int, rows: _F32) -> None:
        """Encode rows, `(n, D)`, by minmax in the table's format over those from `first` on."""

    def pack(self, table: int, layout: str, row_alignment: int) -> NDArray[np.uint8]:
        """Quantized rows as others store them, `(N, bytes of a row)`, these a multiple of `row_alignment`.

        Args:
            table: the table.
            layout: `"fused"`, `[codes][scale][bias]`, scale and bias fp32 for int8 and fp16 for int4 and int2: torch's
                prepack operators, FBGEMM's fused rows. `"tbe"`, `[scale][bias][codes]`, both fp16: FBGEMM's
                table-batched embeddings for inference.
            row_alignment: bytes of 0 follow where a row is shorter.
        """

    def clear_optimizer(self) -> None:
        """Give the fused optimizer and its state up."""

    def set_optimizer(self, name: str, split_bf16: bool, state_format: str) -> None:
        """Choose the fused optimizer, and allocate its zeroed state.

        Args:
            name: `"sgd"`, `"momentum_sgd"`, `"adagrad"`, `"rowwise_adagrad"`, `"adam"`, `"partial_rowwise_adam"`,
                `"lamb"`, `"partial_rowwise_lamb"`, `"lars_sgd"`, `"rowwise_rmsprop"` or `"ftrl"`.
            split_bf16: keep the lower 16 bits of bf16 rows beside them, so that updates are of fp32 numbers; else they
                are rounded stochastically, as those of fp16 are.
            state_format: how the state is kept, `"fp32"`, or `"bf16"`, rounded stochastically; `ValueError` for `"ftrl"`.
        """

    def optimizer_state(self, table: int) -> dict[str, _F32 | NDArray[np.int16]]:
        """The state of the fused optimizer: writable views, `(N, D)` or `(N,)`, by torch's names where torch has it.

        `{"sum": (N, D)}` for adagrad, `{"sum": (N,)}` for rowwise_adagrad, `{}` for sgd; and `"low_bits"`, `(N, D)` int16,
        where the lower bits of bf16 rows are kept. Of state in bf16, int16 with its bits.
        """

    def put_optimizer_state(self, table: int, name: str, array: NDArray[Any]) -> None:
        """Put an array in the place of a part of the state: of the same size, and what it holds is the state then.

        The table keeps the array's memory alive. `ValueError`: no such part, or an array of another size, read-only or not
        contiguous.
        """

    def batch_size(self, indices: object, offsets: object, per_sample_weights: object) -> int | None:
        """`B` of arguments that `lookup` takes as they are: tensors, offsets among them and `(F * B + 1,)`.

        None where any is something else, or of another dtype, shape or device, or not contiguous, or where torch does
        not describe its tensors. The numbers in them are for `lookup` to check.
        """

    def lookup(
        self,
        indices: _Ids,
        offsets: _Ids | None,
        batch_size: int,
        per_sample_weights: _Weights | None,
        out: _Floats | Tensor,
        argmax: _Argmax | None,
    ) -> None:
        """Look up and pool every feature.

        Args:
            indices: `(L,)`.
            offsets: `(F * B,)`, `(F * B + 1,)` or `None`.
            batch_size: `B`.
            per_sample_weights: `(L,)` or `None`; refused for max and none, and when it holds a NaN.
            out: `(B, W)`, features side by side in their order; for pooling none flat: feature after feature
                `(ids of the feature, D)`, so `(L, D)` when all dims are equal. Every element is written: as float32, or
                rounded to float16 or (int16) bfloat16, to the nearest, ties to even.
            argmax: `(B, W)` or `None`: for max pooling, the place within the bag of the id whose element was largest
                (the first of equals), -1 where the bag is empty; columns of features pooled otherwise are not written.
        """

    def touch(self, indices: _Ids, offsets: _Ids | None, batch_size: int) -> int:
        """Read a byte of every cache line of the rows that `lookup` would read, and do nothing with them.

        In the same order, and with the same threads, prefetches and checks: the time of it is what the memory takes,
        which benches hold `lookup` against.

        Args:
            indices: as for `lookup`.
            offsets: as for `lookup`.
            batch_size: as for `lookup`.

        Returns:
            The sum of the bytes, which tells nothing but that they were read.
        """

    def renorm(
        self,
        indices: _Ids,
        offsets: _Ids | None,
        batch_size: int,
        per_sample_weights: _Weights | None,
        max_norm: float,
        norm_type: float,
    ) -> None:
        """Scale every row that `indices` name and whose `norm_type`-norm exceeds `max_norm` down to it.

        As `torch.embedding_renorm_`: the factor is `max_norm / (norm + 1e-7)`.

        Args:
            indices: as for `lookup`.
            offsets: as for `lookup`.
            batch_size: as for `lookup`.
            per_sample_weights: as for the `lookup` that follows: checked, so that no row changes when it would fail.
            max_norm: the norm that no row exceeds afterwards.
            norm_type: the p of the p-norm.
        """

    def update(
        self,
        indices: _Ids,
        offsets: _Ids | None,
        batch_size: int,
        per_sample_weights: _Weights | None,
        argmax: _Argmax | None,
        grad: _Weights,
        trainable: Sequence[bool],
        scale_grad_by_freq: Sequence[bool],
        factor: float,
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        """Sum the gradients of every touched row, then run the fused optimizer once on the row.

        Args:
            indices: as for `lookup`.
            offsets: as for `lookup`.
            batch_size: as for `lookup`.
            per_sample_weights: as for `lookup`.
            grad: gradient of `lookup`'s `out`, of the same shape.
            argmax: what `lookup` wrote; needed when a feature pools by max.
            trainable: `(T,)`; a table whose flag is false stays as it is.
            scale_grad_by_freq: `(T,)`; whether the gradient of a row is divided by the number of its occurrences in the
                call.
            factor: by what the gradient of a row is multiplied; 1 for nothing. After that, all are scaled down to the norm
                that is the groups' `"clip_norm"`; `FloatingPointError` if they have none that is finite.
            groups: for each table its `torch.optim` parameter group, in which the optimizer's hyperparameters are read
                by torch's names; `None` is no bound. `"step"` counts updates from 1, this one included; with `"seed"` and
                the place of an element it decides how fp16 and bf16 rows are rounded.
        """

    def dense_gradient(
        self,
        indices: _Ids,
        offsets: _Ids | None,
        batch_size: int,
        per_sample_weights: _Weights | None,
        argmax: _Argmax | None,
        grad: _Weights,
        trainable: Sequence[bool],
        scale_grad_by_freq: Sequence[bool],
    ) -> list[_F32 | None]:
        """The gradient of every table as an `(N, D)` array; `None` for a table that is not trainable."""

    def sparse_gradient(
        self,
        indices: _Ids,
        offsets: _Ids | None,
        batch_size: int,
        per_sample_weights: _Weights | None,
        argmax: _Argmax | None,
        grad: _Weights,
        trainable: Sequence[bool],
        scale_grad_by_freq: Sequence[bool],
    ) -> list[tuple[NDArray[np.int64], _F32] | None]:
        """The gradient of every table as its touched rows, ascending and unique `(U,)`, and their sums `(U, D)`."""

    def per_sample_weights_gradient(self, indices: _Ids, offsets: _Ids | None, batch_size: int, grad: _Weights) -> _F32:
        """The gradient of `per_sample_weights`, `(L,)`: the dot product of an id's row and its bag's gradient.

        Divided by the ids of the bag for mean pooling; zero for the padding id.
        """

    def memory_report(self) -> list[dict[str, int]]:
        """Bytes of every table.

        `"payload"` (elements of the rows), `"scales"`, `"hot"` (rows kept in fp32), `"state"` (of the optimizer) and
        `"overhead"`.
        """

@final
class Homes:
    """Where the weights of tables are to be: address, elements and strides of each."""

    def __new__(cls, addresses: Sequence[int], elements: Sequence[int], strides: Sequence[Sequence[int]]) -> Homes: ...
    def have(self, holders: Sequence[Mapping[str, Any]]) -> bool:
        """Whether what each holder, a dictionary, has as `"weight"` is a tensor and at its home.

        Not where `take_tensors` was not told of tensors, or torch cannot describe one.
        """

def take_tensors(tensor: type) -> bool:
    """Take torch tensors from now on: `tensor` is `torch.Tensor`. False if that torch is too old to say where they are."""

def info() -> dict[str, Any]:
    """What the engine runs on.

    `"version"`, `"simd"`, `"simd_available"`, `"num_threads"` and `"threads_of"`: `"torch"` where torch lends its threads, on
    which a large call runs while torch has no fewer than `"num_threads"`; else, as in a child of `fork`, `"dlrm_rs"`.
    """

def get_num_threads() -> int:
    """Threads that a large call uses: by default as many as `torch.get_num_threads()`."""

def set_num_threads(n: int) -> None:
    """Use `n` threads for large calls from now on; `ValueError` unless `1 <= n <= 1024`."""

def set_simd(level: str) -> None:
    """Use this level from now on, one of `info()["simd_available"]`; every level gives the same bits."""

@final
class Prepared:
    """A call made ready before its gradient is there: checked, every id of it, and its ids sorted by row.

    It does not look at the call's arrays again.
    """

    def __new__(
        cls,
        tables: TableSet,
        indices: _Ids,
        offsets: _Ids | None,
        batch_size: int,
        per_sample_weights: _Weights | None,
        trainable: Sequence[bool],
        scale_grad_by_freq: Sequence[bool],
    ) -> Prepared:
        """Prepare a call: arguments as for `TableSet.update`."""

    def overlap(
        self,
        second: Prepared,
        indices: _Ids,
        offsets: _Ids | None,
        batch_size: int,
        per_sample_weights: _Weights | None,
        parts_bags: bool,
    ) -> Overlap:
        """Part this call's rows and another's bags by the rows of trainable tables that both touch.

        Args:
            second: the other call.
            indices: of the other call, as it was prepared with, likewise the rest.
            offsets: as above.
            batch_size: as above.
            per_sample_weights: as above.
            parts_bags: False to have all bags count as with such rows, and only this call's rows parted.
        """

    def clipped_factor(
        self, argmax: _Argmax | None, grad: _Weights, factor: float, groups: Sequence[Mapping[str, Any]]
    ) -> float:
        """The factor for `update` by which the norm of all gradients is at most the groups' `"clip_norm"`.

        `FloatingPointError`: the norm is infinite or NaN. Arguments as there.
        """

    def update(
        self,
        argmax: _Argmax | None,
        grad: _Weights,
        factor: float,
        groups: Sequence[Mapping[str, Any]],
        overlap: Overlap | None = None,
        part: str | None = None,
    ) -> None:
        """As `TableSet.update`, of all rows of the call, or of some; by gradients that are not clipped by norm any more.

        Args:
            argmax: as there.
            grad: as there.
            factor: as there.
            groups: as there.
            overlap: of this call with another.
            part: `"shared"`, the rows that the other call touches too, or `"apart"`, the others.
        """

@final
class Overlap:
    """The rows that two calls touch."""

    def lookup(
        self,
        part: str,
        indices: _Ids,
        offsets: _Ids | None,
        batch_size: int,
        per_sample_weights: _Weights | None,
        out: _Floats | Tensor,
        argmax: _Argmax | None,
    ) -> None:
        """As `TableSet.lookup` of the second call, but into the output rows of some bags alone: the others stay.

        Args:
            part: `"shared"`, the bags with rows that both calls touch, or `"apart"`, the others. All bags of a feature
                that has few of the latter count as the former.
            indices: the second call's, likewise the rest.
            offsets: as above.
            batch_size: as above.
            per_sample_weights: as above.
            out: as there.
            argmax: as there.
        """
