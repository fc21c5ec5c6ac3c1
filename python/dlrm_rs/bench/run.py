"""The comparison from beginning to end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dlrm_rs.bench.arguments import QUICK_LAST_START, Arguments
from dlrm_rs.bench.cases import capped, cases
from dlrm_rs.bench.lookup import LookupJob
from dlrm_rs.bench.memory import available, groups, needed
from dlrm_rs.bench.plot import save_plot
from dlrm_rs.bench.process import ProcessEndedError, Worker
from dlrm_rs.bench.quantize import QuantizeJob
from dlrm_rs.bench.record import Record, save_record
from dlrm_rs.bench.report import print_report
from dlrm_rs.bench.sides import PEERS
from dlrm_rs.bench.sides.side import AUTOVEC, ENVIRONMENTS, HUGE_PAGES, PLAIN
from dlrm_rs.machine import describe_machine

# Whose versions the record names; FBGEMM comes in a package for the CPU and one for CUDA.
PACKAGES = ("fbgemm-gpu-cpu", "fbgemm-gpu")

# What tables are quantized of.
QUANTIZED_SHAPE = "SINGLE"

AnyJob = LookupJob | QuantizeJob


def run(arguments: Arguments, output: Path, console: Console) -> Record:
    """Measure, print the tables, and save the record and a picture.

    Args:
        arguments: Of the run.
        output: Folder for `bench.json` and `bench.png`; made if it is not there.
        console: Where to print.

    Returns:
        What was measured.

    Raises:
        WrongOutputError: A side gave a wrong output.
        ModuleNotFoundError: The extra `dlrm_rs[bench]` is not installed.
        OSError: `output` cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)  # rather now than after minutes of measuring
    record = Record(describe_machine(PACKAGES), arguments)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(closing(Worker(set_))) for name, set_ in ENVIRONMENTS.items()}
        with console.status("Looking for peers"):
            missing = workers[PLAIN].missing_peers()
        record.skipped += [f"{name}: {reason}" for name, reason in missing.items()]
        jobs = list(_jobs(arguments, tuple(peer.name for peer in PEERS if peer.name not in missing), record))
        if arguments.quick:  # what there may be no time for comes last
            jobs.sort(key=lambda job: list(ENVIRONMENTS).index(job.environment))
        last_start = perf_counter() + (QUICK_LAST_START if arguments.quick else math.inf)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(jobs))
            for job in jobs:
                progress.update(task, description=str(job))
                if perf_counter() > last_start:
                    record.skipped.append(f"{job}: no time was left for it in a quick run")
                    continue
                try:
                    record.measurements += workers[job.environment].run(job)
                except (MemoryError, ProcessEndedError) as error:  # the others may still fit
                    record.skipped.append(f"{job}: {error}")
                save_record(record, output / "bench.json")  # a long run that is ended leaves what it has
                progress.advance(task)
    print_report(record, console)
    save_record(record, output / "bench.json")
    save_plot(record, output / "bench.png")
    console.print(f"Saved {output / 'bench.png'} and {output / 'bench.json'}")
    return record


def _jobs(arguments: Arguments, installed: tuple[str, ...], record: Record) -> Iterator[AnyJob]:
    """What is to be done; what does not fit into memory is put down in the record."""
    if "lookup" in arguments.families:
        for shape in arguments.shapes:
            for row_format in arguments.formats:
                yield from _lookup_jobs(arguments, shape, row_format, installed, record)
    if "quantize" in arguments.families:
        yield from _quantize_jobs(arguments, installed, record)


def _lookup_jobs(
    arguments: Arguments, name: str, row_format: str, installed: tuple[str, ...], record: Record
) -> Iterator[LookupJob]:
    shape, wanted = capped(name, arguments.rows), tuple(cases(name, arguments))
    if not wanted:
        return
    for environment in _environments(arguments):
        peers = [
            peer.name
            for peer in PEERS
            if peer.name in installed and row_format in peer.formats and environment in peer.environments
        ]
        if not peers and environment != PLAIN:
            continue
        free = available()
        together = groups(peers, shape, row_format, free)
        if not together:
            asked = needed(shape, row_format, 1 + min(1, len(peers)))
            record.skipped.append(_no_memory(f"{name} {row_format} ({environment})", asked, free))
        for group in together:
            yield LookupJob(name, row_format, group, environment, wanted, arguments.seconds, arguments.rows)


def _quantize_jobs(arguments: Arguments, installed: tuple[str, ...], record: Record) -> Iterator[QuantizeJob]:
    shape, threads = capped(QUANTIZED_SHAPE, arguments.rows), tuple(arguments.thread_counts())
    for row_format in arguments.formats:
        if row_format not in ("int8", "int4", "int2"):
            continue
        asked, free = needed(shape, row_format, 2), available()
        if asked > free:
            record.skipped.append(_no_memory(f"quantize {QUANTIZED_SHAPE} to {row_format}", asked, free))
            continue
        for environment in (PLAIN,) if arguments.quick else (PLAIN, HUGE_PAGES):
            yield QuantizeJob(QUANTIZED_SHAPE, row_format, installed, environment, threads, arguments.rows)


def _no_memory(what: str, asked: int, free: int) -> str:
    return f"{what}: expected {asked >> 20:,} MiB of memory, got {free >> 20:,}"


def _environments(arguments: Arguments) -> list[str]:
    """All of them, but for a quick run that has no time for the last."""
    return [name for name in ENVIRONMENTS if name != AUTOVEC or not arguments.quick]
