"""The demo from beginning to end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import dlrm_rs
from dlrm_rs.data.flights import Samples, load_flights
from dlrm_rs.demo.arguments import QUICK_FLIGHTS, Arguments
from dlrm_rs.demo.baseline import fit_baseline
from dlrm_rs.demo.plot import save_plot
from dlrm_rs.demo.precision import measure_precisions
from dlrm_rs.demo.report import BackendResult, Record, print_report, save_record
from dlrm_rs.demo.training import Backend, make_backends

# Recent steps whose mean loss the progress bar shows.
RECENT = 50


def run(arguments: Arguments, output: Path, console: Console) -> Record:
    """Train both models and the baseline, print the comparison, and save it.

    Args:
        arguments: Of the run.
        output: Folder for `demo.png` and `demo.json`; made if it is not there.
        console: Where to print.

    Returns:
        What was measured.

    Raises:
        ModuleNotFoundError: The extra `dlrm_rs[demo]` is not installed.
        OSError: `output` cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)  # rather now than after minutes of training
    threads = _set_threads(arguments.threads)
    with console.status("Reading the flights"):
        flights = load_flights()
        train = flights.train[-QUICK_FLIGHTS:] if arguments.quick else flights.train
    console.print(
        f"{len(train):,} flights train, {len(flights.validation):,} validate, {len(flights.test):,} test; "
        f"{len(flights.num_embeddings)} tables of {sum(flights.num_embeddings.values()):,} rows; {threads} threads"
    )
    with console.status("Fitting the logistic regression"):
        baseline = fit_baseline(flights, train)

    steps = arguments.epochs * math.ceil(len(train) / arguments.batch_size)
    backends = _, ours = make_backends(flights, arguments, steps)
    # torch warns, once, that it does not check its sparse tensors unless told whether it should.
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        _train(backends, train, arguments, steps, console)
    with console.status("Testing"):
        results = [
            BackendResult.of(backend, backend.evaluate(flights.validation), backend.evaluate(flights.test))
            for backend in backends
        ]
    with console.status("Quantizing"):
        precisions = measure_precisions(ours.model, flights)
    record = Record.of(arguments, threads, results, baseline, precisions)
    print_report(record, console)
    save_record(record, output / "demo.json")
    save_plot(record, output / "demo.png")
    console.print(f"Saved {output / 'demo.png'} and {output / 'demo.json'}")
    return record


def _set_threads(threads: int | None) -> int:
    """Give torch and the engine the same number of threads."""
    if threads is not None:
        torch.set_num_threads(threads)
    dlrm_rs.set_num_threads(torch.get_num_threads())
    return torch.get_num_threads()


def _train(backends: Sequence[Backend], train: Samples, arguments: Arguments, steps: int, console: Console) -> None:
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    ]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Training both", total=steps, losses="")
        for epoch in range(arguments.epochs):
            for step, batch in enumerate(train.batches(arguments.batch_size, seed=arguments.seed + epoch)):
                # In turn, and first in turn: the second finds the batch in the cache.
                for backend in backends if step % 2 else reversed(backends):
                    backend.step(batch)
                progress.update(task, advance=1, losses=_recent_losses(backends))


def _recent_losses(backends: Sequence[Backend]) -> str:
    means = ((backend.name, sum(backend.losses[-RECENT:]) / len(backend.losses[-RECENT:])) for backend in backends)
    return "loss: " + ", ".join(f"{name} {mean:.4f}" for name, mean in means)
