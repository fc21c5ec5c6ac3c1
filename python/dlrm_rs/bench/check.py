"""Outputs and updates held against float64, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dlrm_rs.bench.cases import IdBatch
from dlrm_rs.bench.optimizers import Reference, upstream_gradient
from dlrm_rs.bench.rows import Rows, pooled_dtype, rounding
from dlrm_rs.bench.sides import Side

# Samples of a batch that are checked, spread over all of it: a whole batch in float64 may not fit.
SAMPLES = 32

# Elements are below 1, so a sum of L of them in float32, in any order and through scale and bias, is as near as this
# times L, and then rounded to the output's dtype. A row that is missing or another moves a sum by a thousand times as
# much.
TOLERANCE = 1e-5


class WrongOutputError(AssertionError):
    """A side's output is not what its rows add up to."""


def check_side(side: Side, batch: IdBatch, rows: Rows, row_format: str) -> None:
    """Check every use of a side on one batch: its rows against the true ones, and its output against its rows.

    Args:
        side: The side.
        batch: Ids.
        rows: What its tables were filled with.
        row_format: How its rows are stored.

    Raises:
        WrongOutputError: An element is too far off, or the output has another shape or dtype.
    """
    samples = np.unique(np.linspace(0, batch.batch_size - 1, SAMPLES).astype(int))
    wanted = []
    for table, (ids, _) in enumerate(batch.tables):
        picked = ids.numpy()[samples]  # (samples, ids per bag)
        stored = side.stored_rows(table, picked.reshape(-1))
        check_rows(side.name, table, picked.reshape(-1), stored, rows, row_format)
        wanted.append(stored.reshape(*picked.shape, -1).sum(axis=1))
    expected = np.concatenate(wanted, axis=1)
    dtypes = {torch.float32, pooled_dtype(row_format)}
    tolerance = _tolerance([ids.shape[1] for ids, _ in batch.tables], wanted)
    for use, call in side.calls(batch).items():
        output = side.pooled(call())
        check_output(f"{side.name} ({use})", output, dtypes, batch.batch_size, samples, expected, tolerance)


def check_training(
    make: Callable[[], Side], batches: Sequence[IdBatch], rows: Rows, row_format: str, optimizer: str
) -> None:
    """Check every use of a side over three steps, two of them on one batch: what is looked up, and all rows after it.

    Args:
        make: Makes the side, anew for every use.
        batches: Ids, two at least.
        rows: What its tables are filled with.
        row_format: How its rows are stored.
        optimizer: What it trains with.

    Raises:
        WrongOutputError: An element is too far off, or the output has another shape or dtype.
    """
    for use in make().calls(batches[0]):
        _check_use(make(), use, batches, rows, row_format, optimizer)


def _check_use(side: Side, use: str, batches: Sequence[IdBatch], rows: Rows, row_format: str, optimizer: str) -> None:
    name = f"{side.name} ({use})"
    B = batches[0].batch_size
    tables = range(len(batches[0].tables))
    counts = [1 + max(int(batch.tables[t][0].max()) for batch in batches[:2]) for t in tables]
    stored = [side.stored_rows(t, np.arange(N)) for t, N in enumerate(counts)]
    for t, before in enumerate(stored):
        check_rows(side.name, t, np.arange(len(before)), before, rows, row_format)
    references = [Reference(optimizer, *before.shape) for before in stored]
    gradients = upstream_gradient(B, sum(before.shape[1] for before in stored)).double()
    gradient_of = gradients.split([before.shape[1] for before in stored], dim=1)
    for batch in (batches[0], batches[0], batches[1]):
        ids = [of_table.numpy() for of_table, _ in batch.tables]  # (B, ids per bag) each
        wanted = [stored[t][ids[t]].sum(axis=1) for t in tables]
        tolerance = _tolerance([np.abs(stored[t]).max() * ids[t].shape[1] for t in tables], wanted)
        output = side.pooled(side.calls(batch)[use]())
        check_output(name, output, {torch.float32}, B, np.arange(B), np.concatenate(wanted, axis=1), tolerance)
        for t in tables:
            touched, moves = _moves(references[t], batch.tables[t][0], gradient_of[t])
            stored[t][touched] += moves
            after = side.stored_rows(t, np.arange(counts[t]))
            # By rounding before and after the step, or stochastically to either neighbour, at most.
            tolerance = (TOLERANCE + 2 * rounding(row_format)) * np.abs(stored[t]).max(axis=1, keepdims=True)
            _compare(f"{name}: rows of table {t} after a step", after, stored[t], tolerance)
            stored[t] = after


def _tolerance(largest: Sequence[float], wanted: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """By how much elements of an output may be off, `(W,)`; of each table its own, so that no long bag hides another.

    Args:
        largest: For each table, what its sums may be.
        wanted: For each table its outputs, `(..., D)`.
    """
    tolerance: NDArray[np.float64] = TOLERANCE * np.repeat(largest, [of_table.shape[1] for of_table in wanted])
    return tolerance


def _moves(reference: Reference, ids: Tensor, gradient: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The rows that bags `ids`, `(B, ids per bag)`, touch, and their moves, from the gradient of the bags, `(B, D)`."""
    ordered, order = ids.view(-1).sort(stable=True)
    touched, counts = ordered.unique_consecutive(return_counts=True)
    of_ids = gradient[order // ids.shape[1]].numpy()  # (B * ids per bag, D)
    sums = np.add.reduceat(of_ids, (counts.cumsum(0) - counts).numpy(), axis=0)
    return touched.numpy(), reference.moves(touched, torch.from_numpy(sums)).numpy()


def check_rows(
    name: str, table: int, ids: NDArray[np.int64], stored: NDArray[np.float64], rows: Rows, row_format: str
) -> None:
    """Check that rows are stored as their row format allows.

    Args:
        name: Whose they are, for messages.
        table: Of which table.
        ids: Which rows, `(n,)`.
        stored: As they are stored, `(n, D)`.
        rows: What the tables were filled with.
        row_format: How they are stored.

    Raises:
        WrongOutputError: An element is further from the true one than the row format explains.
    """
    _compare(f"{name}: rows of table {table}", stored, rows.of(table, ids, stored.shape[1]), rounding(row_format))


def check_output(
    name: str,
    output: Tensor,
    dtypes: Collection[torch.dtype],
    batch_size: int,
    samples: NDArray[np.int64],
    expected: NDArray[np.float64],
    tolerance: NDArray[np.float64],
) -> None:
    """Check some samples of an output.

    Args:
        name: Whose output it is, for messages.
        output: `(B, W)`.
        dtypes: Of which it must have one.
        batch_size: `B`.
        samples: Which are checked.
        expected: `(len(samples), W)`.
        tolerance: By how much an element of a column may be off before it is rounded to its dtype, `(W,)`.

    Raises:
        WrongOutputError: An element is further off, or the output has another shape or dtype.
    """
    shape = (batch_size, expected.shape[1])
    if tuple(output.shape) != shape or output.dtype not in dtypes:
        words = " or ".join(sorted(map(str, dtypes)))
        raise WrongOutputError(f"{name}: expected {shape} of {words}, got {tuple(output.shape)} of {output.dtype}")
    rounded = torch.finfo(output.dtype).eps / 2 * np.abs(expected)
    _compare(name, output[torch.from_numpy(samples)].double().numpy(), expected, tolerance + rounded)


def _compare(
    name: str, got: NDArray[np.float64], expected: NDArray[np.float64], tolerance: float | NDArray[np.float64]
) -> None:
    # Written so that NaN is wrong too.
    wrong = ~(np.abs(got - expected) <= tolerance)
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        within = np.broadcast_to(tolerance, wrong.shape)[row, column]
        raise WrongOutputError(
            f"{name}: expected {expected[row, column]:.7g} within {within:g} at ({row}, {column}), "
            f"got {got[row, column]:.7g}; {wrong.sum()} of {wrong.size} elements are wrong"
        )
