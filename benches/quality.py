"""What training in fewer bytes costs: one model for every way to store its rows, all trained on the same batches.

    python benches/quality.py                  # the flights, and a synthetic log of 5 M samples
    python benches/quality.py --log flights --output quality.json
    python benches/quality.py --quick          # a twentieth of both, a minute

All models of a log begin with the same weights and see the same batches in the same order, in turn. They are compared
with fp32's by how well they predict samples that come later, log loss in nats and AUC, and by the bytes of every table
with its scales and its optimizer's state. bf16 with its lower bits kept apart ("split") shall have fp32's log loss to
1e-5, the others its AUC to 5e-4; the last column says whether that holds.

Two more models in fp32 tell what such differences mean. "fp32, other seed" begins with other weights: what is below its
difference is noise to whoever chooses a model. "fp32, one ulp" begins with weights that are all larger by one unit in
the last place: what is below its difference, no arithmetic but fp32's own can promise.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import LambdaLR

import dlrm_rs
from dlrm_rs.data import Batch, ClickLog
from dlrm_rs.data.flights import DENSE, load_flights
from dlrm_rs.demo.training import Metrics, evaluate
from dlrm_rs.machine import describe_machine

LOG_LOSS_LIMIT = 1e-5
AUC_LIMIT = 5e-4

# Of the synthetic log. Tables of every size; with Zipf ids most rows of the large ones are met a few times.
ROWS = (1_000_000, 500_000, 200_000, 100_000, 20_000, 5_000, 1_000, 100)
SAMPLES = 5_000_000
TEST_BATCHES = 200
BATCH_SIZE = 2048
DIM = 16


@dataclass(frozen=True)
class Variant:
    """A way to store rows.

    Attributes:
        name: In words.
        table: Further arguments of every `EmbeddingBagConfig`.
        optimizer: Further arguments of the optimizer.
        seed: Added to that of the initial weights.
        scale: Multiplies the initial weights of the tables.
    """

    name: str
    table: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    scale: float = 1.0

    @property
    def limit(self) -> float | None:
        """How far log loss (split) or AUC (the others) may be from fp32's; None for fp32 itself."""
        if not self.table:
            return None
        return LOG_LOSS_LIMIT if self.optimizer else AUC_LIMIT


FP32 = Variant("fp32")
VARIANTS = (
    FP32,
    Variant("fp32, other seed", seed=1),
    Variant("fp32, one ulp", scale=1 + 2.0**-23),
    Variant("bf16 split", {"data_type": "bf16"}, {"split_bf16": True}),
    Variant("bf16", {"data_type": "bf16"}),
    Variant("fp16", {"data_type": "fp16"}),
    Variant("int8", {"data_type": "int8"}),
    Variant("int8, 5 % hot", {"data_type": "int8", "hot_rows": 0.05}),
    Variant("int4", {"data_type": "int4"}),
    Variant("int4, 5 % hot", {"data_type": "int4", "hot_rows": 0.05}),
)


@dataclass(frozen=True)
class Log:
    """What is trained on, and tested.

    Attributes:
        name: For the record.
        tables: Rows by feature.
        dense_features: `P`.
        dim: `D`.
        bottom_mlp: Of the DLRM.
        top_mlp: Of the DLRM.
        table_lr: Of the tables' row-wise Adagrad, falling to 0.
        dense_lr: Of the dense layers' AdamW, falling to 0.
        weight_decay: Of the dense layers.
        steps: Batches to train on.
        train: Makes them.
        test: Makes those to predict.
    """

    name: str
    tables: Mapping[str, int]
    dense_features: int
    dim: int
    bottom_mlp: tuple[int, ...]
    top_mlp: tuple[int, ...]
    table_lr: float
    dense_lr: float
    weight_decay: float
    steps: int
    train: Callable[[], Iterator[Batch]]
    test: Callable[[], Iterator[Batch]]


@dataclass(frozen=True)
class Result:
    """What came of a variant.

    Attributes:
        variant: Its name.
        log_loss: On the test samples.
        auc: On the test samples.
        log_loss_change: From fp32's.
        auc_change: From fp32's.
        bytes: Of every table by name: its elements, scales, and state.
        holds: Whether it is within its limit; None where there is none.
    """

    variant: str
    log_loss: float
    auc: float
    log_loss_change: float
    auc_change: float
    bytes: Mapping[str, Mapping[str, int]]
    holds: bool | None

    @property
    def total(self) -> int:
        """Bytes of all tables."""
        return sum(sum(of_table.values()) for of_table in self.bytes.values())


def flights(seed: int, share: float) -> Log:
    """The flights of the demo, with its sizes and rates."""
    data, batch_size = load_flights(), 512
    train = data.train[-int(share * len(data.train)) :]
    steps = math.ceil(len(train) / batch_size)
    batches = partial(train.batches, batch_size, seed=seed)
    test = partial(data.test.batches, 8192)
    sizes = ((64, 32), (64, 32, 1))
    return Log("flights", data.num_embeddings, len(DENSE), 32, *sizes, 0.005, 0.004, 1.0, steps, batches, test)


def synthetic(seed: int, share: float) -> Log:
    """Clicks of a teacher, Zipf 1.05, one id a bag."""
    steps, tests = math.ceil(share * SAMPLES / BATCH_SIZE), math.ceil(share * TEST_BATCHES)
    log = ClickLog(ROWS, BATCH_SIZE, steps + tests, seed=seed)

    def batches(first: int, last: int) -> Iterator[Batch]:
        return (log[k] for k in range(first, last))

    train, test = partial(batches, 0, steps), partial(batches, steps, steps + tests)
    tables = dict(zip(log.keys(), ROWS, strict=True))
    sizes = ((32, DIM), (64, 1))
    return Log("synthetic", tables, log.dense_features, DIM, *sizes, 0.05, 0.001, 0.0, steps, train, test)


LOGS: Mapping[str, Callable[[int, float], Log]] = {"flights": flights, "synthetic": synthetic}


class Model:
    """A DLRM with its optimizers.

    Args:
        log: What it is for.
        variant: How its rows are stored.
        seed: Of the initial weights.
    """

    def __init__(self, log: Log, variant: Variant, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed + variant.seed)
        self.collection = dlrm_rs.EmbeddingBagCollection(
            [
                dlrm_rs.EmbeddingBagConfig(
                    name, rows, log.dim, [name], init_fn=partial(_fill, generator, variant.scale), **variant.table
                )
                for name, rows in log.tables.items()
            ],
            optimizer=dlrm_rs.optim.RowWiseAdagrad(log.table_lr, **variant.optimizer),
        )
        torch.manual_seed(seed + variant.seed)
        self.dlrm = dlrm_rs.DLRM(self.collection, log.dense_features, log.bottom_mlp, log.top_mlp)
        layers = [*self.dlrm.bottom.parameters(), *self.dlrm.top.parameters()]
        self._dense = torch.optim.AdamW(layers, lr=log.dense_lr, weight_decay=log.weight_decay)
        fused = self.collection.fused_optimizer
        assert fused is not None, "made with an optimizer"
        self._optimizers: tuple[torch.optim.Optimizer, ...] = (self._dense, fused)
        self._schedulers = [LambdaLR(optimizer, lambda step: 1 - step / log.steps) for optimizer in self._optimizers]

    def step(self, batch: Batch) -> None:
        """Train on a batch."""
        self._dense.zero_grad()
        logits = self.dlrm(batch.dense, batch.sparse).squeeze(1)
        binary_cross_entropy_with_logits(logits, batch.labels).backward()
        for optimizer in self._optimizers:
            optimizer.step()
        for scheduler in self._schedulers:
            scheduler.step()

    def bytes(self) -> dict[str, dict[str, int]]:
        """Of every table, but for what memory's pages add."""
        report = self.collection.memory_report()
        return {name: {part: n for part, n in of.items() if part != "overhead"} for name, of in report.items()}


def _fill(generator: torch.Generator, scale: float, weight: Tensor) -> None:
    """The same numbers for every row format: those of bf16, so that it begins where fp32 does."""
    bound = len(weight) ** -0.5
    numbers = torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
    weight.copy_(numbers.bfloat16().float() * scale)


def train(log: Log, variants: tuple[Variant, ...], seed: int) -> dict[str, tuple[Metrics, dict[str, Any]]]:
    """Train every variant on every batch; returns how well each predicts, and its bytes."""
    models = {variant.name: Model(log, variant, seed) for variant in variants}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        for batch in progress.track(log.train(), total=log.steps, description=f"Training on {log.name}"):
            for model in models.values():
                model.step(batch)
        return {
            name: (evaluate(model.dlrm, log.test()), model.bytes())
            for name, model in progress.track(models.items(), description="Testing")
        }


def compare(variants: tuple[Variant, ...], trained: Mapping[str, tuple[Metrics, dict[str, Any]]]) -> list[Result]:
    """Hold every variant against fp32."""
    reference = trained[FP32.name][0]
    results = []
    for variant in variants:
        metrics, sizes = trained[variant.name]
        changes = (metrics.log_loss - reference.log_loss, metrics.auc - reference.auc)
        of_limit = changes[0] if variant.limit == LOG_LOSS_LIMIT else changes[1]
        holds = None if variant.limit is None else abs(of_limit) <= variant.limit
        results.append(Result(variant.name, metrics.log_loss, metrics.auc, *changes, sizes, holds))
    return results


def print_results(log: Log, results: list[Result]) -> None:
    print(f"\n{log.name}: {sum(log.tables.values()):,} rows of {log.dim} in {len(log.tables)} tables")
    print(f"{'':<22} {'log loss':>9} {'change':>10} {'AUC':>9} {'change':>10} {'bytes':>13}  within the limit")
    for result in results:
        holds = {None: "", True: "yes", False: "NO"}[result.holds]
        print(
            f"{result.variant:<22} {result.log_loss:9.6f} {result.log_loss_change:+10.6f} {result.auc:9.6f} "
            f"{result.auc_change:+10.6f} {result.total:13,}  {holds}"
        )
    print("bytes of every table: " + ", ".join(results[0].bytes))
    for result in results:
        print(f"{result.variant:<22} " + " ".join(f"{sum(of.values()):,}" for of in result.bytes.values()))


def main() -> None:
    """Train on the logs that the options say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", nargs="+", default=list(LOGS), choices=list(LOGS))
    parser.add_argument("--variant", nargs="+", default=[v.name for v in VARIANTS], choices=[v.name for v in VARIANTS])
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="of the weights, and of what a log draws")
    parser.add_argument("--threads", type=int, default=1, help="of torch and of the engine")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the samples")
    parser.add_argument("--output", type=Path, help="a JSON file for the record")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dlrm_rs.set_num_threads(options.threads)
    variants = tuple(v for v in VARIANTS if v is FP32 or v.name in options.variant)
    share = 0.05 if options.quick else 1.0
    record: dict[str, Any] = {"machine": describe_machine(), "quick": options.quick, "logs": []}
    for name in options.log:
        for seed in options.seed:
            log = LOGS[name](seed, share)
            results = compare(variants, train(log, variants, seed))
            print_results(log, results)
            record["logs"].append({"log": name, "seed": seed, "results": [asdict(result) for result in results]})
            if options.output is not None:  # after every log, as a long run may be ended
                options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
