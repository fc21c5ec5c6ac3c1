"""What fewer bytes cost the trained model: its quality on the test flights with its tables in every row format."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

import dlrm_rs
from dlrm_rs.data.flights import Flights, Samples
from dlrm_rs.demo.training import EVALUATION_BATCH, Metrics, evaluate
from dlrm_rs.model import DLRM

FP32, MIXTURE = "fp32", "mixture"

# What is compared, most bytes first: its name, the row format, and the method if it is not the default one.
STORAGES = (
    (FP32, "fp32", None),
    ("fp16", "fp16", None),
    ("bf16", "bf16", None),
    ("int8", "int8", None),
    ("int4", "int4", None),
    ("int4 minmax", "int4", "minmax"),
    ("int4 codebook", "int4", "codebook"),
    ("int2", "int2", None),
)

# By how much the mixture's AUC on the validation flights may be lower. Their number leaves a standard error (paired, by
# bootstrap) of 6e-5 in what int4 changes and of 3e-4 in what int2 does. So where the search takes 2 bits it also picks
# what is lucky there, and loses more than this on the test flights: both are told.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Precision:
    """The trained model with its tables stored in some way.

    Attributes:
        storage: The row format, with the method if it is not the default one; "mixture" for one chosen for each table.
        test: Quality on the test flights.
        auc_change: Of the test AUC against fp32's: below 0 if it is worse.
        table_bytes: Of the tables: elements, and scale and bias of rows.
        error_mean: Mean of all rows' relative L2 errors.
    """

    storage: str
    test: Metrics
    auc_change: float
    table_bytes: int
    error_mean: float


@dataclass(frozen=True)
class Search:
    """How the mixture was found, on the validation flights.

    Attributes:
        tolerance: By how much the AUC was allowed to be lower there.
        formats: The row format of each table.
        validation_auc_change: Of the AUC there, against fp32's.
        models: How many were measured.
        seconds: What that took.
    """

    tolerance: float
    formats: Mapping[str, str]
    validation_auc_change: float
    models: int
    seconds: float


@dataclass(frozen=True)
class Precisions:
    """All ways to store the tables, to be had by their names.

    Attributes:
        rows: `STORAGES`, and the mixture last.
        search: Of the mixture.

    Example:
        >>> fp32 = Precision("fp32", Metrics(0.75, 0.5), auc_change=0.0, table_bytes=400, error_mean=0.0)
        >>> search = Search(1e-4, {"t0": "fp32"}, validation_auc_change=0.0, models=4, seconds=0.5)
        >>> Precisions((fp32,), search)["fp32"].table_bytes
        400
    """

    rows: tuple[Precision, ...]
    search: Search

    def __getitem__(self, storage: str) -> Precision:
        return {row.storage: row for row in self.rows}[storage]


def measure_precisions(model: DLRM, flights: Flights) -> Precisions:
    """Quantize copies of a model, and test each.

    Args:
        model: The trained one, with tables of `dlrm_rs` in fp32. It stays as it is.
        flights: The data set: the validation flights choose the mixture, the test flights are for the result alone.

    Raises:
        ValueError: A row is not finite: the training has diverged.
    """
    batches = list(flights.test.batches(EVALUATION_BATCH))  # made once for all
    rows: list[Precision] = []

    def test(storage: str, quantized: DLRM, report: dlrm_rs.QuantizationReport) -> None:
        metrics = evaluate(quantized, batches)
        fp32 = rows[0].test.auc if rows else metrics.auc
        rows.append(Precision(storage, metrics, metrics.auc - fp32, report.total.bytes_after, report.total.error_mean))

    for storage, row_format, method in STORAGES:
        quantized = copy.deepcopy(model)
        test(storage, quantized, dlrm_rs.quantize(quantized, row_format, method=method))
    mixture = copy.deepcopy(model)
    report, search = _search(mixture, flights.validation)
    test(MIXTURE, mixture, report)
    return Precisions(tuple(rows), search)


def _search(model: DLRM, validation: Samples) -> tuple[dlrm_rs.QuantizationReport, Search]:
    """Quantize a model by its AUC on the validation flights."""
    batches = list(validation.batches(EVALUATION_BATCH))  # made once for all
    budget = dlrm_rs.Budget(metric=lambda model: evaluate(model, batches).auc, tolerance=TOLERANCE)
    start = perf_counter()
    report = dlrm_rs.quantize(model, budget=budget)
    seconds = perf_counter() - start
    choice = report.choice
    assert choice is not None, "made with a budget"
    return report, Search(TOLERANCE, choice.formats, -choice.trial.damage, len(choice.trials), seconds)
