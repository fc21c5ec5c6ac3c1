"""Processes that are started with an environment, and do jobs one after another."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Protocol

from dlrm_rs.bench.measurement import Measurement
from dlrm_rs.bench.sides import PEERS, TRAINING_PEERS


class Job(Protocol):
    """What a process can be given; sent to it by pickle."""

    def run(self) -> list[Measurement]:
        """Measure."""


class ProcessEndedError(RuntimeError):
    """The process ended before its job did, as when the system ran out of memory."""


class Worker:
    """A process with some environment variables set before torch is imported; one that ends is started anew.

    Args:
        environment: The variables.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._executor: ProcessPoolExecutor | None = None

    def run(self, job: Job, seconds: float) -> list[Measurement]:
        """Let the process do a job.

        Args:
            job: The job.
            seconds: After which it is ended.

        Raises:
            TimeoutError: It was not done in time.
            ProcessEndedError: The process ended.
        """
        try:
            return self._started().submit(_run_within, job, seconds).result()
        except BrokenProcessPool as error:
            self.close()
            raise ProcessEndedError(
                f"{job}: expected measurements, and the process ended; is there enough memory?"
            ) from error

    def missing_peers(self) -> dict[str, str]:
        """The peers that cannot be used, and why: asked there, as the answer imports them."""
        return self._started().submit(_missing_peers).result()

    def close(self) -> None:
        """End the process."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def _started(self) -> ProcessPoolExecutor:
        if self._executor is None:
            # Spawned, not forked: this process has threads, and has imported torch.
            self._executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
            with _variables(self._environment):
                self._executor.submit(int).result()  # the process starts with the first job
        return self._executor


def _run_within(job: Job, seconds: float) -> list[Measurement]:
    """Run a job in the main thread, where a timer's signal ends it between two calls."""
    signal.signal(signal.SIGALRM, _end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return job.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _end(_number: int, _frame: object) -> None:
    raise TimeoutError


def _missing_peers() -> dict[str, str]:
    reasons = {peer.name: peer.why_not() for peer in (*PEERS, *TRAINING_PEERS)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


@contextmanager
def _variables(environment: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
