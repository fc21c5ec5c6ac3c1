"""Tables on the CPU, dense layers on a GPU: what of the two runs beside the other, and against what else one would use.

    python benches/hybrid.py                # on a machine with a GPU
    python benches/hybrid.py --stand-in     # without: a device that takes as long as it is told
    python benches/hybrid.py --quick        # small tables, a minute

Sides, all with SGD on the tables, on the same batches in turn:

    a  nn.EmbeddingBag on the CPU, sparse gradients, plain loop
    b  dlrm_rs, plain loop
    c  dlrm_rs in a Pipeline, exact and stale
    d  nn.EmbeddingBag on the GPU: the ceiling, if the tables fit
    e  nn.EmbeddingBag by the GPU on page-locked memory of the host, which it reads and writes over the bus

Of every side: samples per second, and how much of the time the device is idle, by the time that the dense layers take
alone. Steps are medians over all rounds; in a round every side has its turn. Of (b) and (c) also what is hidden:

    hidden = (CPU + device - step) / min(CPU, device)

CPU is what of a step runs on the host (ids, lookup, update): the step of (b) on a device that takes no time, with as
many threads. Device is what the dense layers take alone. 100 % is a step as long as the longer of the two, 0 % one as
long as both in turn.

On a stand-in the dense layers are a queued kernel (`Queued`), which costs the host what a launch does and computes
nothing; d and e need a GPU. The device takes 0.5, 1 and 2 times what the CPU does, or `--latency`. A share of that time
delays no gradient of rows: backward of the bottom layers and the gradients of the top layers' weights, which a Pipeline
has computed last. It is `--rest`; by default the share of multiplications in the model that a GPU would have.
The summary of the exact pipeline is printed with `--profile`.

Every case ends with what is wanted of it: on a GPU that (c) is five times as fast as (a), and seven tenths as fast as
(d) where bags have many ids; on a stand-in that stale mode hides 95 % and exact mode 85 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dlrm_rs
from dlrm_rs.data import SHAPES, Batch, ClickLog
from dlrm_rs.devices import Device, StandIn, output_device
from dlrm_rs.machine import describe_machine
from dlrm_rs.pipeline.pipeline import click_loss

LR = 0.01
# Dense layers, those of MLPerf: the bottom ones end with `D`.
DENSE_FEATURES = 13
BOTTOM = [512, 256]
TOP = [1024, 1024, 512, 256, 1]
WARM_UP = 12
# Batches in rotation: their rows leave the caches before a batch comes again.
BATCHES = 16
GRADIENTS = 4


@dataclass(frozen=True)
class Case:
    """Tables and batches.

    Attributes:
        shape: One of `SHAPES`.
        rows: `N` of every table.
        batch_size: `B`.
        zipf: Exponent of the ids' frequencies.
        steps: Timed steps.
    """

    shape: str
    rows: tuple[int, ...]
    batch_size: int
    zipf: float
    steps: int

    @property
    def dim(self) -> int:
        """`D`."""
        return SHAPES[self.shape].embedding_dim

    def batches(self) -> list[Batch]:
        """Those in rotation."""
        log = ClickLog(self.rows, self.batch_size, BATCHES, SHAPES[self.shape].ids_per_bag, zipf=self.zipf)
        return [log[k] for k in range(BATCHES)]


@dataclass(frozen=True)
class Result:
    """What a side took.

    Attributes:
        side: Its letter and name.
        step: Seconds per step, a median.
        spread: The median of the slowest round less that of the fastest.
        samples: Per second.
        idle: Share of the time in which the device has nothing to do; None where tables are its work too.
        hidden: Share of the shorter of CPU and device time; None where tables are other work than ours.
    """

    side: str
    step: float
    spread: float
    samples: float
    idle: float | None
    hidden: float | None = None


@dataclass(frozen=True)
class Goal:
    """What is wanted of a case, and what came.

    Attributes:
        text: What it is a share or a multiple of.
        wanted: At least this.
        got: This.
    """

    text: str
    wanted: float
    got: float

    @property
    def holds(self) -> bool:
        """Whether it is reached."""
        return self.got >= self.wanted


def goals(results: Iterable[Result], is_gpu: bool) -> list[Goal]:
    """What is wanted of a case, as far as its sides tell."""
    of = {result.side[0] if result.side[0] != "c" else result.side: result for result in results}
    exact, stale = of["c dlrm_rs, exact"], of["c dlrm_rs, stale"]
    if not is_gpu:
        hidden = [("exact hides", 0.85, exact.hidden), ("stale hides", 0.95, stale.hidden)]
        return [Goal(text, wanted, got) for text, wanted, got in hidden if got is not None]
    speeds = [("exact over a", 5.0, "a"), ("exact over d", 0.7, "d")]
    return [Goal(text, wanted, exact.samples / of[side].samples) for text, wanted, side in speeds if side in of]


class Queued(nn.Module):
    """Embeddings, and dense layers that are somewhere else: their gradient comes as it is, and costs nothing.

    Args:
        embeddings: The tables.
        batch_size: `B`.
        width: Columns of the pooled rows.
    """

    def __init__(self, embeddings: nn.Module, batch_size: int, width: int) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.bias = nn.Parameter(torch.zeros(1))
        # Several, so that one comes from memory and not from a cache, as what a device has written does.
        self._gradients = [1e-4 * torch.randn(batch_size, width) for _ in range(GRADIENTS)]
        self._number = 0

    def forward(self, dense: Tensor, sparse: Any) -> Tensor:
        """The loss: a scalar."""
        self._number += 1
        gradient = self._gradients[self._number % GRADIENTS]
        loss: Tensor = _Kernel.apply(self.embeddings(sparse).values(), gradient)
        return loss + self.bias.sum()


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return rows.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.detach(), None


class TorchBags(nn.Module):
    """One `nn.EmbeddingBag` per table, as an `EmbeddingBagCollection`.

    Args:
        case: Tables.
        device: Where they are.
        over_the_bus: Whether they stay in page-locked memory of the host, under the GPU's addresses.
    """

    def __init__(self, case: Case, device: torch.device, over_the_bus: bool = False) -> None:
        super().__init__()
        self._dim = case.dim
        self.bags = nn.ModuleList()
        for rows in case.rows:
            weight = torch.empty(rows, case.dim, pin_memory=over_the_bus).uniform_(-(rows**-0.5), rows**-0.5)
            weight = on_bus(weight, device) if over_the_bus else weight.to(device)
            self.bags.append(nn.EmbeddingBag(rows, case.dim, mode="sum", sparse=True, _weight=weight))

    def embedding_bag_configs(self) -> list[dlrm_rs.EmbeddingBagConfig]:
        """For `DLRM`."""
        return [dlrm_rs.EmbeddingBagConfig(f"t{t}", 1, self._dim, [f"t{t}"]) for t, _ in enumerate(self.bags)]

    def forward(self, features: dlrm_rs.KeyedJaggedTensor) -> dlrm_rs.KeyedTensor:
        """Pool, on the device of the tables."""
        device = next(self.parameters()).device
        keys, B = features.keys(), features.stride()
        values = features.values().to(device, non_blocking=True)
        offsets = features.offsets()
        starts = offsets[::B].tolist()
        offsets = offsets.to(device, non_blocking=True)
        rows = [
            bag(values[starts[f] : starts[f + 1]], offsets[f * B : (f + 1) * B] - starts[f])
            for f, bag in enumerate(self.bags)
        ]
        return dlrm_rs.KeyedTensor(keys, [self._dim] * len(keys), torch.cat(rows, 1))


def on_bus(weight: Tensor, device: torch.device) -> Tensor:
    """Page-locked memory as the GPU addresses it: the same memory, as a tensor of the GPU."""

    class Memory:
        __cuda_array_interface__ = {  # noqa: RUF012
            "shape": tuple(weight.shape),
            "typestr": "<f4",
            "data": (weight.data_ptr(), False),
            "version": 3,
        }
        keeper = weight

    return torch.as_tensor(Memory(), device=device)


def dense_model(embeddings: nn.Module, case: Case, device: Device) -> nn.Module:
    """The embeddings with dense layers: MLPerf's on a GPU, a queued kernel on a stand-in."""
    if device.torch_device.type == "cpu":
        return Queued(embeddings, case.batch_size, case.dim * len(case.rows))
    model = dlrm_rs.DLRM(embeddings, DENSE_FEATURES, [*BOTTOM, case.dim], TOP)
    # The tables stay where they are: those of side a on the host.
    model.bottom.to(device.torch_device)
    model.top.to(device.torch_device)
    model.pairs = model.pairs.to(device.torch_device)
    return model


def share_after_rows(case: Case) -> float:
    """Share of the dense layers' multiplications that come after the gradient of the rows."""
    vectors = len(case.rows) + 1
    pairs = vectors * (vectors - 1) // 2

    def products(*widths: int) -> int:
        return sum(inputs * outputs for inputs, outputs in pairwise(widths))

    bottom, top = products(DENSE_FEATURES, *BOTTOM, case.dim), products(case.dim + pairs, *TOP)
    first = DENSE_FEATURES * BOTTOM[0]  # whose input wants no gradient
    after = top + 2 * bottom - first
    return after / (3 * (top + bottom + vectors**2 * case.dim) - first)


def ours(case: Case, device: Device) -> nn.Module:
    tables = [dlrm_rs.EmbeddingBagConfig(f"t{t}", rows, case.dim, [f"t{t}"]) for t, rows in enumerate(case.rows)]
    optimizer = dlrm_rs.optim.SGD(lr=LR)
    collection = dlrm_rs.EmbeddingBagCollection(tables, optimizer=optimizer, output_device=device)
    return dense_model(collection, case, device)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """That of clicks; a queued kernel has it already, as its host would spend on it what a GPU's does not."""
    queued: Tensor = model(batch.dense, batch.sparse) if isinstance(model, Queued) else click_loss(model, batch)
    return queued


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """SGD on the dense layers, and on tables of torch's."""
    dense = [p for name, p in model.named_parameters() if "bags" not in name]
    tables = [p for name, p in model.named_parameters() if ".bags." in name]
    made: list[torch.optim.Optimizer] = [torch.optim.SGD(dense, lr=LR)]
    return [*made, torch.optim.SGD(tables, lr=LR)] if tables else made


def pinned(batch: Batch) -> Batch:
    """Its dense features and labels in memory from which a GPU copies without anybody waiting."""
    return batch._replace(dense=batch.dense.pin_memory(), labels=batch.labels.pin_memory())


def rotation(batches: list[Batch], steps: int) -> Iterator[Batch]:
    return (batches[k % len(batches)] for k in range(steps))


def plain_steps(model: nn.Module, case: Case, batches: list[Batch], device: Device) -> list[float]:
    """Seconds of the steps of a plain loop."""
    steps = optimizers(model)

    def step(batch: Batch) -> None:
        for optimizer in steps:
            optimizer.zero_grad()
        loss(model, batch).backward()
        for optimizer in steps:
            optimizer.step()

    return seconds(map(step, rotation(batches, WARM_UP + case.steps)), device)


def pipeline_steps(
    model: nn.Module, case: Case, batches: list[Batch], device: Device, updates: Any, profile: Path | None = None
) -> list[float]:
    """Seconds of the steps of a pipeline."""
    loader = rotation(batches, WARM_UP + case.steps)
    pipeline = dlrm_rs.Pipeline(model, optimizers(model)[0], loader, loss, updates=updates, profile=profile)
    times = seconds(pipeline, device)
    if profile is not None:
        print(pipeline.summary())
    return times


def seconds(steps: Iterable[object], device: Device) -> list[float]:
    """Of each step after the warm-up: on a GPU their mean, as one queues while the other runs."""
    times = []
    for number, _ in enumerate(steps, 1):
        if number == WARM_UP and device.torch_device.type == "cuda":
            device.synchronize()
        times.append(time.perf_counter())
    if device.torch_device.type == "cuda":
        device.synchronize()
        return [(time.perf_counter() - times[WARM_UP - 1]) / (len(times) - WARM_UP)]
    return [end - begin for begin, end in pairwise(times[WARM_UP - 1 :])]


def dense_step(case: Case, batches: list[Batch], device: Device) -> float:
    """Seconds per step of the dense layers alone, on rows that are on the device already."""
    width = case.dim * len(case.rows)
    rows = torch.zeros(case.batch_size, width, device=device.torch_device, requires_grad=True)

    class Rows(nn.Module):
        def embedding_bag_configs(self) -> list[dlrm_rs.EmbeddingBagConfig]:
            return [dlrm_rs.EmbeddingBagConfig(f"t{t}", 1, case.dim, [f"t{t}"]) for t, _ in enumerate(case.rows)]

        def forward(self, features: dlrm_rs.KeyedJaggedTensor) -> dlrm_rs.KeyedTensor:
            rows.grad = None
            return dlrm_rs.KeyedTensor(features.keys(), [case.dim] * len(case.rows), rows)

    return statistics.median(plain_steps(dense_model(Rows(), case, device), case, batches, device))


def run(case: Case, device: Device, dense: float, repeats: int, profile: Path | None) -> tuple[float, list[Result]]:
    """Seconds of a step on the host, and every side that this device has.

    Args:
        case: Tables and batches.
        device: Where the dense layers are.
        dense: What the dense layers take alone.
        repeats: Rounds.
        profile: A file for the trace of the exact pipeline.
    """
    is_gpu = device.torch_device.type == "cuda"
    batches = [pinned(batch) for batch in case.batches()] if is_gpu else case.batches()
    torch.manual_seed(0)
    bags, model = dense_model(TorchBags(case, torch.device("cpu")), case, device), ours(case, device)
    free = StandIn(0.0, copies=False)
    sides: dict[str, Callable[[], list[float]]] = {
        "CPU": partial(plain_steps, ours(case, free), case, batches, free),
        "a nn.EmbeddingBag, CPU": partial(plain_steps, bags, case, batches, device),
        "b dlrm_rs, plain": partial(plain_steps, model, case, batches, device),
        "c dlrm_rs, exact": partial(pipeline_steps, model, case, batches, device, "exact", profile),
        "c dlrm_rs, stale": partial(pipeline_steps, model, case, batches, device, "stale"),
    }
    for side, over_the_bus in (("d all on the GPU", False), ("e GPU over the bus", True)) if is_gpu else ():
        try:
            there = dense_model(TorchBags(case, device.torch_device, over_the_bus), case, device)
        except torch.OutOfMemoryError:
            print(f"  {side}: the tables do not fit")
            continue
        sides[side] = partial(plain_steps, there, case, batches, device)
    rounds = [{side: times() for side, times in sides.items()} for _ in range(repeats)]
    medians = {side: [statistics.median(times[side]) for times in rounds] for side in sides}
    steps = {side: statistics.median(chain.from_iterable(times[side] for times in rounds)) for side in sides}
    if not is_gpu:
        steps["a nn.EmbeddingBag, CPU"] += dense  # its rows go to no stand-in by themselves
    cpu = steps.pop("CPU")
    print(f"  CPU {1e3 * cpu:.3f} ms, device {1e3 * dense:.3f} ms")
    results = []
    for side, step in steps.items():
        spread, samples = max(medians[side]) - min(medians[side]), case.batch_size / step
        hidden = (cpu + dense - step) / min(cpu, dense) if side[0] in "bc" else None
        idle = max(1 - dense / step, 0.0) if side[0] in "abc" else None
        results.append(Result(side, step, spread, samples, idle, hidden))
        print_result(results[-1])
    return cpu, results


def print_result(result: Result) -> None:
    idle = "" if result.idle is None else f"  idle {result.idle:5.1%}"
    hidden = "" if result.hidden is None else f"  hidden {result.hidden:6.1%}"
    print(
        f"  {result.side:<24} {1e3 * result.step:9.3f} ms/step (spread {1e3 * result.spread:.3f})  "
        f"{result.samples:11,.0f} samples/s{idle}{hidden}",
        flush=True,
    )


def print_goals(of_case: Iterable[Goal]) -> None:
    for goal in of_case:
        print(f"  {goal.text} {goal.got:.2f}, wanted {goal.wanted:g}: {'reached' if goal.holds else 'NOT reached'}")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for shape in options.shape:
        rows = tuple(min(n, options.rows) for n in SHAPES[shape].num_embeddings)
        for batch_size in options.batch_size:
            yield Case(shape, rows, batch_size, options.zipf, options.steps)


def rest_share(case: Case, options: argparse.Namespace) -> float:
    """`--rest`."""
    return share_after_rows(case) if options.rest is None else float(options.rest)


def devices(case: Case, options: argparse.Namespace) -> Iterator[tuple[Device, float]]:
    """Devices, each with the seconds that the dense layers take on it."""
    batches = case.batches()
    if not options.stand_in:
        device = output_device("cuda")
        yield device, dense_step(case, batches, device)
        return
    times = [options.latency]
    if options.latency is None:
        free = StandIn(0.0, copies=False)
        cpu = statistics.median(plain_steps(ours(case, free), case, batches, free))
        times = [factor * cpu for factor in (0.5, 1.0, 2.0)]
    for dense in times:
        rest = dense * rest_share(case, options)
        yield StandIn(dense - rest, options.bandwidth, rest, copies=False), dense


def main() -> None:
    """Run the cases that the options say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["MLPERF", "KAGGLE"], choices=list(SHAPES))
    parser.add_argument("--batch-size", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--rows", type=int, default=2_000_000, help="tables are cut to so many")
    parser.add_argument("--zipf", type=float, default=1.05)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stand-in", action="store_true", help="no GPU; the default where there is none")
    parser.add_argument("--latency", type=float, help="seconds that the stand-in takes for a step")
    parser.add_argument("--bandwidth", type=float, default=float("inf"), help="bytes per second to and from it")
    parser.add_argument("--rest", type=float, help="share of the stand-in's step after the gradient of rows")
    parser.add_argument("--profile", type=Path, help="a file for the trace of the exact pipeline")
    parser.add_argument("--output", type=Path, help="a JSON file for the record")
    parser.add_argument("--quick", action="store_true", help="small tables and few steps")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.batch_size, options.steps, options.repeats = 50_000, [2048], 20, 1
    options.stand_in = options.stand_in or not torch.cuda.is_available()
    record: dict[str, Any] = {"machine": describe_machine(), "device": "stand-in", "cases": []}
    if not options.stand_in:
        record["device"] = torch.cuda.get_device_name()
    for case in cases(options):
        print(f"{case.shape}, B {case.batch_size}, Zipf {case.zipf}, {sum(case.rows):,} rows of {case.dim}")
        for device, dense in devices(case, options):
            cpu, results = run(case, device, dense, options.repeats, options.profile)
            print_goals(goals(results, is_gpu=not options.stand_in))
            described = {"shape": case.shape, "rows": sum(case.rows), "batch_size": case.batch_size, "zipf": case.zipf}
            times = {"cpu": cpu, "device": dense, "rest": rest_share(case, options) if options.stand_in else None}
            record["cases"].append(described | times | {"results": [asdict(result) for result in results]})
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
