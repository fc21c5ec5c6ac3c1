"""The comparison from beginning to end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import product
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dlrm_rs.bench.arguments import QUICK_END, Arguments
from dlrm_rs.bench.cases import capped, cases, not_there
from dlrm_rs.bench.lookup import LookupJob
from dlrm_rs.bench.measurement import Measurement
from dlrm_rs.bench.memory import available, groups, needed
from dlrm_rs.bench.optimizers import state_bytes
from dlrm_rs.bench.plot import save_plot
from dlrm_rs.bench.process import ProcessEndedError, Worker
from dlrm_rs.bench.quantize import QuantizeJob
from dlrm_rs.bench.record import Record, save_record
from dlrm_rs.bench.report import print_report
from dlrm_rs.bench.sides import PEERS, TRAINING_PEERS, Peer
from dlrm_rs.bench.sides.side import AUTOVEC, ENVIRONMENTS, HUGE_PAGES, PLAIN
from dlrm_rs.bench.step import StepJob
from dlrm_rs.machine import busy_share, describe_machine

# Whose versions the record names; FBGEMM comes in a package for the CPU and one for CUDA.
PACKAGES = ("fbgemm-gpu-cpu", "fbgemm-gpu")

# Seconds that a run which is not quick may take: three years, as a timer does not take infinity.
ENDLESS = 1e8

AnyJob = LookupJob | QuantizeJob | StepJob


class NothingToTimeError(ValueError):
    """Of what is asked for nothing exists, or nothing fits into memory."""


def run(arguments: Arguments, output: Path, console: Console) -> Record:
    """Measure, print the tables, and save the record and a picture.

    Args:
        arguments: Of the run.
        output: Folder for `bench.json` and `bench.png`; made if it is not there.
        console: Where to print.

    Returns:
        What was measured.

    Raises:
        NothingToTimeError: There is nothing of what is asked for.
        WrongOutputError: A side gave a wrong output.
        ModuleNotFoundError: The extra `dlrm_rs[bench]` is not installed.
        OSError: `output` cannot be written.
    """
    end = perf_counter() + (QUICK_END if arguments.quick else ENDLESS)
    output.mkdir(parents=True, exist_ok=True)  # rather now than after minutes of measuring
    record = Record({**describe_machine(PACKAGES), "busy": busy_share()}, arguments)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(closing(Worker(set_))) for name, set_ in ENVIRONMENTS.items()}
        with console.status("Looking for peers"):
            missing = workers[PLAIN].missing_peers()
        record.skipped += not_there(arguments)
        jobs = list(_jobs(arguments, missing, record))
        if not jobs:
            raise NothingToTimeError(f"nothing to time for this choice: {'; '.join(record.skipped)}")
        record.skipped += [f"{name}: {reason}" for name, reason in missing.items()]
        for job in _told(jobs, console):
            try:
                record.measurements += _run(workers[job.environment], job, end - perf_counter())
            except TimeoutError:
                record.skipped.append(f"{job}: no time was left for it in a quick run")
            except (MemoryError, ProcessEndedError) as error:  # the others may still fit
                record.skipped.append(f"{job}: {error}")
            save_record(record, output / "bench.json")  # a long run that is ended leaves what it has
    print_report(record, console)
    save_record(record, output / "bench.json")
    save_plot(record, output / "bench.png")
    console.print(f"Saved {output / 'bench.png'} and {output / 'bench.json'}")
    return record


def _run(worker: Worker, job: AnyJob, seconds: float) -> list[Measurement]:
    if seconds <= 0:
        raise TimeoutError
    return worker.run(job, seconds)


def _told(jobs: Sequence[AnyJob], console: Console) -> Iterator[AnyJob]:
    """Jobs, one after another, with their progress."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:
            progress.update(task, description=str(job))
            yield job
            progress.advance(task)


def _jobs(arguments: Arguments, missing: Mapping[str, str], record: Record) -> Iterator[AnyJob]:
    """What is to be done; what does not fit into memory is put down in the record."""
    if "lookup" in arguments.families:
        for shape, row_format in product(arguments.shapes_of("lookup"), arguments.formats_of("lookup")):
            peers = [peer for peer in PEERS if peer.name not in missing and row_format in peer.formats]
            for environment, group in _groups(arguments, "lookup", shape, row_format, "", peers, record):
                wanted = tuple(cases(shape, arguments))
                yield LookupJob(shape, row_format, group, environment, wanted, arguments.seconds, arguments.rows)
    if "step" in arguments.families:
        of_steps = product(arguments.shapes_of("step"), arguments.optimizers, arguments.formats_of("step"))
        for shape, optimizer, row_format in of_steps:
            peers = [
                peer
                for peer in TRAINING_PEERS
                if peer.name not in missing and row_format in peer.formats and optimizer in peer.optimizers
            ]
            for environment, group in _groups(arguments, "step", shape, row_format, optimizer, peers, record):
                wanted, rows = tuple(cases(shape, arguments, "step")), arguments.rows_of("step")
                yield StepJob(shape, row_format, group, environment, wanted, arguments.seconds, rows, optimizer)
    if "quantize" in arguments.families:
        yield from _quantize_jobs(arguments, tuple(peer.name for peer in PEERS if peer.name not in missing), record)


def _groups(
    arguments: Arguments,
    family: str,
    name: str,
    row_format: str,
    optimizer: str,
    peers: Sequence[Peer],
    record: Record,
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Environments, each with peers that fit into memory together with ours; none where there is no case."""
    if not cases(name, arguments, family):
        return
    shape = capped(name, arguments.rows_of(family))
    # Ours in fp32 is among those that train rows of other formats, and a split row is as large.
    largest = "fp32" if optimizer else row_format
    state = state_bytes(optimizer, shape.embedding_dim) if optimizer else 0
    with_peers = [e for e in _environments(arguments) if any(e in peer.environments for peer in peers)]
    for environment in with_peers or [PLAIN]:
        here = [peer.name for peer in peers if environment in peer.environments]
        free = available()
        together = groups(here, shape, largest, free, state)
        if not together:
            asked = needed(shape, largest, 1 + min(1, len(here)), state)
            what = f"{name} {row_format} {optimizer}".rstrip()
            record.skipped.append(_no_memory(f"{what} ({environment})", asked, free))
        for group in together:
            yield environment, group


def _quantize_jobs(arguments: Arguments, installed: tuple[str, ...], record: Record) -> Iterator[QuantizeJob]:
    threads = tuple(arguments.thread_counts())
    for name, row_format in product(arguments.shapes_of("quantize"), arguments.formats_of("quantize")):
        asked, free = needed(capped(name, arguments.rows), row_format, 2), available()
        if asked > free:
            record.skipped.append(_no_memory(f"quantize {name} to {row_format}", asked, free))
            continue
        for environment in _environments(arguments):
            if environment != AUTOVEC:  # which is of lookups and steps
                yield QuantizeJob(name, row_format, installed, environment, threads, arguments.rows)


def _no_memory(what: str, asked: int, free: int) -> str:
    return f"{what}: expected {asked >> 20:,} MiB of memory, got {free >> 20:,}"


def _environments(arguments: Arguments) -> tuple[str, ...]:
    """All of them; for a quick run that in which peers are fastest."""
    return (HUGE_PAGES,) if arguments.quick else tuple(ENVIRONMENTS)
