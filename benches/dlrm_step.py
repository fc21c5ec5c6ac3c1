"""A training step of a DLRM on the CPU, part by part: our tables beside `nn.EmbeddingBag` and torch's optimizers.

    python benches/dlrm_step.py                          # Kaggle's sizes, 10 GB; a minute or two
    python benches/dlrm_step.py --rows 1000000 --quick   # tables cut to a million rows, few steps
    python benches/dlrm_step.py --optimizer SGD --output dlrm.json --plot dlrm.png

The model is that of the DLRM paper (arXiv 1906.00091) on Criteo's Kaggle log: 26 tables of D 16, bottom MLP
13-512-256-64-16, dot interaction, top MLP 512-256-1. Both sides begin with the same weights, see the same batches, and
take turns; before they are timed, their losses over some steps must agree. Times are medians over the steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import dlrm_rs
from dlrm_rs.data import SHAPES, Batch, ClickLog
from dlrm_rs.demo.torch_bags import TorchEmbeddingBags
from dlrm_rs.machine import describe_machine

LR = 0.01
DENSE_FEATURES = 13
BOTTOM_MLP, TOP_MLP = (512, 256, 64, 16), (512, 256, 1)

EMBEDDING_FORWARD, EMBEDDING_BACKWARD = "embedding forward", "embedding backward, update"
PARTS = (
    EMBEDDING_FORWARD,
    "bottom MLP",
    "interaction",
    "top MLP",
    "loss",
    "dense backward",
    EMBEDDING_BACKWARD,
    "dense optimizer",
)

# Ours by the name, and torch's: for Adam that of sparse gradients.
OPTIMIZERS = {"SGD": torch.optim.SGD, "Adagrad": torch.optim.Adagrad, "Adam": torch.optim.SparseAdam}

# Batches in rotation, steps of a turn, and steps that are checked.
BATCHES = 16
TURN = 8
CHECKED = 5
TOLERANCE = 1e-4


@dataclass
class Side:
    """A DLRM with its optimizers.

    Attributes:
        name: Of the embeddings.
        model: The DLRM.
        tables: The optimizer of its tables; the fused one has run in backward.
        dense: That of its dense layers.
    """

    name: str
    model: dlrm_rs.DLRM
    tables: torch.optim.Optimizer
    dense: torch.optim.Optimizer

    def step(self, batch: Batch) -> tuple[float, list[float]]:
        """Train on a batch; returns the loss, and the seconds of `PARTS`.

        The graph is cut between the pooled embeddings and the dense layers, so that there is a place to look at the
        clock; it is the same computation.
        """
        model, clock = self.model, [perf_counter()]
        pooled = model.embed(batch.sparse)
        clock.append(perf_counter())
        x = model.bottom(batch.dense)
        clock.append(perf_counter())
        cut = pooled.detach().requires_grad_()
        interacted = model._dot(x, cut)
        clock.append(perf_counter())
        logits = model.top(interacted)
        clock.append(perf_counter())
        loss = binary_cross_entropy_with_logits(logits.squeeze(1), batch.labels)
        clock.append(perf_counter())
        loss.backward()
        clock.append(perf_counter())
        pooled.backward(cut.grad)
        self.tables.step()
        self.tables.zero_grad()
        clock.append(perf_counter())
        self.dense.step()
        self.dense.zero_grad()
        clock.append(perf_counter())
        return loss.item(), np.diff(clock).tolist()


@dataclass(frozen=True)
class Result:
    """What a side took.

    Attributes:
        optimizer: Of its tables.
        side: Its name.
        parts: Median milliseconds of every part.
        step: Median milliseconds of a step.
        low: The 10th percentile of a step.
        high: The 90th.
    """

    optimizer: str
    side: str
    parts: dict[str, float]
    step: float
    low: float
    high: float

    @classmethod
    def of(cls, optimizer: str, side: str, steps: Sequence[Sequence[float]]) -> Result:
        """Sum up steps."""
        milliseconds = 1e3 * np.array(steps)  # (steps, parts)
        low, median, high = np.percentile(milliseconds.sum(axis=1), [10, 50, 90]).tolist()
        parts = dict(zip(PARTS, np.median(milliseconds, axis=0).tolist(), strict=True))
        return cls(optimizer, side, parts, median, low, high)

    @property
    def embeddings(self) -> float:
        """Milliseconds of the embeddings, forward, backward and update."""
        return self.parts[EMBEDDING_FORWARD] + self.parts[EMBEDDING_BACKWARD]

    @property
    def largest(self) -> str:
        """The largest part, that of the embeddings being one."""
        dense = {part: time for part, time in self.parts.items() if not part.startswith("embedding")}
        return max({"embeddings": self.embeddings, **dense}.items(), key=lambda item: item[1])[0]


def make_sides(rows: Sequence[int], dim: int, optimizer: str) -> list[Side]:
    """Ours and torch's, with the same weights."""
    tables = [dlrm_rs.EmbeddingBagConfig(f"t{t}", N, dim, [f"t{t}"]) for t, N in enumerate(rows)]
    torch.manual_seed(0)
    theirs = dlrm_rs.DLRM(TorchEmbeddingBags(tables), DENSE_FEATURES, BOTTOM_MLP, TOP_MLP)
    spec = {"SGD": dlrm_rs.optim.SGD, "Adagrad": dlrm_rs.optim.Adagrad, "Adam": dlrm_rs.optim.Adam}[optimizer](lr=LR)
    collection = dlrm_rs.EmbeddingBagCollection(tables, optimizer=spec)
    ours = dlrm_rs.DLRM(collection, DENSE_FEATURES, BOTTOM_MLP, TOP_MLP)
    ours.load_state_dict(theirs.state_dict())
    fused = collection.fused_optimizer
    assert fused is not None, "made with an optimizer"
    of_torch = OPTIMIZERS[optimizer](list(theirs.embeddings.parameters()), lr=LR)
    return [
        Side("dlrm_rs", ours, fused, _dense_optimizer(ours)),
        Side("nn.EmbeddingBag", theirs, of_torch, _dense_optimizer(theirs)),
    ]


def _dense_optimizer(model: dlrm_rs.DLRM) -> torch.optim.Optimizer:
    return torch.optim.SGD([*model.bottom.parameters(), *model.top.parameters()], lr=LR)


def check(sides: Sequence[Side], batches: Sequence[Batch]) -> None:
    """Let all take some steps.

    Raises:
        AssertionError: Their losses differ.
    """
    losses = [[side.step(batch)[0] for batch in batches[:CHECKED]] for side in sides]
    if not np.allclose(losses[0], losses[1], rtol=TOLERANCE, atol=0):
        raise AssertionError(f"losses: expected the same of both sides, got {losses[0]} and {losses[1]}")


def measure(sides: Sequence[Side], batches: Sequence[Batch], turns: int, optimizer: str) -> list[Result]:
    """Time the sides in turn; the first step of a turn is not timed."""
    times: dict[str, list[list[float]]] = {side.name: [] for side in sides}
    for turn in range(turns):
        for side in sides if turn % 2 else reversed(sides):
            for k in range(turn * TURN, (turn + 1) * TURN + 1):
                _, parts = side.step(batches[k % len(batches)])
                if k > turn * TURN:
                    times[side.name].append(parts)
    return [Result.of(optimizer, side.name, times[side.name]) for side in sides]


def print_results(results: Sequence[Result]) -> None:
    """A column for every side."""
    print(f"\n{results[0].optimizer}, milliseconds")
    print(f"{'':<28}" + "".join(f"{result.side:>22}" for result in results))
    for part in PARTS:
        times = (result.parts[part] for result in results)
        print(f"{part:<28}" + "".join(f"{t:>14.3f} {t / r.step:>6.1%}" for t, r in zip(times, results, strict=True)))
    print(f"{'step':<28}" + "".join(f"{r.step:>14.3f}       " for r in results))
    print(f"{'p10-p90':<28}" + "".join(f"{f'{r.low:.3f}-{r.high:.3f}':>21}" for r in results))
    print(f"{'embeddings':<28}" + "".join(f"{r.embeddings:>14.3f} {r.embeddings / r.step:>6.1%}" for r in results))
    print(f"{'largest part':<28}" + "".join(f"{r.largest:>21}" for r in results))


def save_plot(results: Sequence[Result], path: Path) -> None:
    """A stacked bar for every side and optimizer, embeddings first."""
    from matplotlib.figure import Figure

    order = [EMBEDDING_FORWARD, EMBEDDING_BACKWARD, *(p for p in PARTS if not p.startswith("embedding"))]
    # Colours that the colour-blind can tell apart (Okabe and Ito).
    colours = ("#D55E00", "#E69F00", "#56B4E9", "#F0E442", "#0072B2", "#999999", "#009E73", "#CC79A7")
    figure = Figure(figsize=(9, 1.5 + 0.5 * len(results)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{result.side}, {result.optimizer}" for result in results]
    left = np.zeros(len(results))
    for part, colour in zip(order, colours, strict=True):
        widths = np.array([result.parts[part] for result in results])
        axes.barh(labels, widths, left=left, color=colour, label=part)
        left += widths
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds of a training step, median of every part")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Time the optimizers that the options say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", nargs="+", default=["SGD", "Adagrad"], choices=list(OPTIMIZERS))
    parser.add_argument("--rows", type=int, help="tables are cut to so many")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=12, help=f"of {TURN} steps, for each side")
    parser.add_argument("--quick", action="store_true", help="3 turns")
    parser.add_argument("--output", type=Path, help="a JSON file for the record")
    parser.add_argument("--plot", type=Path, help="a PNG for the chart")
    options = parser.parse_args()
    dlrm_rs.set_num_threads(torch.get_num_threads())
    shape = SHAPES["KAGGLE"]
    rows = [min(N, options.rows or N) for N in shape.num_embeddings]
    log = ClickLog(rows, options.batch_size, BATCHES, zipf=shape.zipf)
    batches = [log[k] for k in range(BATCHES)]
    print(f"{sum(rows):,} rows of {shape.embedding_dim}, B {options.batch_size}, {torch.get_num_threads()} threads")
    results: list[Result] = []
    with torch.sparse.check_sparse_tensor_invariants(enable=False):  # else torch warns that it does not check
        for optimizer in options.optimizer:
            sides = make_sides(rows, shape.embedding_dim, optimizer)
            check(sides, batches)
            results += measure(sides, batches, 3 if options.quick else options.turns, optimizer)
            print_results(results[-len(sides) :])
            del sides
    if options.output is not None:
        record: dict[str, Any] = {"machine": describe_machine(), "rows": sum(rows), "batch_size": options.batch_size}
        record |= {"threads": torch.get_num_threads(), "results": [vars(result) for result in results]}
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        save_plot(results, options.plot)


if __name__ == "__main__":
    main()
