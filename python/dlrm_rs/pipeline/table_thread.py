"""The table thread: ids of batch `i + 1` sorted and looked up, the update of batch `i`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dlrm_rs.pipeline.lane import Visit
from dlrm_rs.pipeline.parting import Parting, Trials
from dlrm_rs.pipeline.shared import Shared
from dlrm_rs.pipeline.step import Step
from dlrm_rs.pipeline.timeline import Timeline

__all__ = ["TableWork"]


class _EndedError(Exception):
    """The failure is kept; the table thread has nothing more to begin."""


class TableWork:
    """What the table thread does.

    Args:
        shared: What the threads share.
        timeline: Where stages are recorded.
        is_stale: Whether a lookup goes before the update of the batch before.
        trials: How much is parted where it does not.
    """

    def __init__(self, shared: Shared, timeline: Timeline, *, is_stale: bool, trials: Trials) -> None:
        self._shared = shared
        self._timeline = timeline
        self._is_stale = is_stale
        self._trials = trials

    def work(self) -> None:
        """Look up and update until the batches end, or the pass."""
        with self._shared.changed:
            if self._shared.is_closing:
                return
            self._shared.has_begun = True
        look_up = self._look_up_stale if self._is_stale else self._look_up_exact
        before: Step | None = None
        try:
            while (step := self._await_loaded(before)) is not None:
                look_up(before, step)
                before = step
            self._finish(before)
        except _EndedError:
            with suppress(_EndedError):  # the first failure is kept
                self._finish(before)
            if before is not None:
                before.drop()
        except BaseException as error:
            self._shared.fail(0 if before is None else before.number, error, "table thread")
            if before is not None:
                before.drop()
        finally:
            with self._shared.changed:
                self._shared.has_ended = True
                self._shared.changed.notify_all()

    def _wait_for(self, is_ready: Callable[[], Any], before: Step | None) -> None:
        """Wait, and meanwhile do what the user's thread waits for."""

        def wanted() -> bool:
            return self._shared.settling > 0 and before is not None and bool(before.waiting)

        while True:
            with self._shared.changed:
                self._shared.changed.wait_for(
                    lambda: self._shared.is_closing or self._shared.outdated or is_ready() or wanted()
                )
                outdated = self._shared.outdated
                if self._shared.is_closing or (outdated is None and is_ready()):
                    return
            if outdated is not None:
                self._renew(*outdated)
                continue
            assert before is not None
            if before.is_complete:
                self._finish(before)
            else:
                self._update(before)

    def _renew(self, step: Step, visit: Visit) -> None:
        with self._stage("lookup again", step):
            visit.renew()
        with self._shared.changed:
            step.is_renewed, self._shared.outdated = True, None
            self._shared.changed.notify_all()

    def _await_loaded(self, before: Step | None) -> Step | None:
        """The next batch; None when there is none."""
        self._wait_for(lambda: self._shared.loaded or self._shared.is_at_end, before)
        with self._shared.changed:
            if self._shared.is_closing or not self._shared.loaded:
                return None
            self._shared.changed.notify_all()
            return self._shared.loaded.popleft()

    def _look_up_stale(self, before: Step | None, step: Step) -> None:
        self._prepare(step)
        self._look_up(step)
        self._finish(before)

    def _look_up_exact(self, before: Step | None, step: Step) -> None:
        self._prepare(step)
        can_be_parted = before is not None and before.can_be_parted(step)
        parting = self._trials.choose() if can_be_parted else Parting.NOTHING
        if before is None or parting is Parting.NOTHING:
            self._finish(before)
            self._look_up(step)
        else:
            self._look_up_parted(before, step, parting)
        self._trials.record(step.sent_at)

    def _look_up(self, step: Step) -> None:
        with self._stage("lookup", step):
            for visit in step.visits:
                visit.lookup()
        self._publish(step)

    def _look_up_parted(self, before: Step, step: Step, parting: Parting) -> None:
        parts_bags = parting is Parting.ROWS_AND_BAGS
        with self._stage("overlap", step):
            overlaps = [old.overlap(new, parts_bags) for old, new in zip(before.visits, step.visits, strict=True)]
        if parts_bags:
            with self._stage("lookup apart", step):
                for visit, overlap in zip(step.visits, overlaps, strict=True):
                    visit.lookup(overlap, "apart")
        self._await_gradient(before)
        if before.is_renewed:
            self._finish(before)
            self._look_up(step)
            return
        before.overlaps = overlaps
        with self._stage("update shared", before):
            for visit, overlap in zip(before.visits, overlaps, strict=True):
                visit.update(overlap, "shared")
        with self._stage("lookup shared", step):
            for visit, overlap in zip(step.visits, overlaps, strict=True):
                visit.lookup(overlap, "shared")
        self._publish(step)
        self._finish(before)

    def _prepare(self, step: Step) -> None:
        with self._stage("sort", step):
            for visit in step.visits:
                visit.prepare()
        with self._shared.changed:
            self._shared.ready.append(step)
            self._shared.changed.notify_all()

    def _publish(self, step: Step) -> None:
        with self._stage("send", step):
            for visit in step.visits:
                visit.send()
        with self._shared.changed:
            step.sent_at = time.perf_counter()
            self._shared.changed.notify_all()

    def _await_gradient(self, step: Step) -> None:
        if step.has_gradient:
            return
        self._wait_for(lambda: step.is_complete, step)
        if step.has_gradient:
            return  # somebody wanted the update meanwhile
        self._fetch(step, step.visits)
        step.has_gradient = True
        spans = [span for visit in step.visits if (span := visit.span()) is not None]
        if spans:
            begins, ends = zip(*spans, strict=True)
            self._timeline.record("device", "dense layers", min(begins), max(ends), step.number)

    def _fetch(self, step: Step, visits: list[Visit]) -> None:
        """Wait until gradients that have been left are on the host."""
        try:
            for visit in visits:
                visit.wait()
        except BaseException as error:
            step.drop()
            self._shared.fail(step.number, error, "gradient")
            raise _EndedError from None

    def _update(self, step: Step) -> None:
        """Update by the gradients that have been left; others of the batch may still come."""
        visits = step.waiting
        self._fetch(step, visits)
        with self._stage("update", step):
            for visit in visits:
                visit.update()
        self._shared.notify()

    def _finish(self, step: Step | None) -> None:
        """Update what of a batch has not been updated yet."""
        if step is None or step.is_done:
            return
        self._await_gradient(step)
        if step.is_done:
            return
        with self._stage("update" if step.overlaps is None else "update apart", step):
            if step.overlaps is None:
                for visit in step.visits:
                    visit.update()
            else:
                for visit, overlap in zip(step.visits, step.overlaps, strict=True):
                    visit.update(overlap, "shared")  # unless it has been done
                    visit.update(overlap, "apart")
        self._timeline.steps += step.is_complete
        if step.number > 0:  # to begin with there is nothing to hide behind
            self._timeline.waited(*step.waits())
        with self._shared.changed:
            step.is_done = True
            self._shared.changed.notify_all()

    @contextmanager
    def _stage(self, stage: str, step: Step) -> Iterator[None]:
        try:
            with self._timeline.stage("tables", stage, step.number):
                yield
        except BaseException as error:
            self._shared.fail(step.number, error, stage)
            raise _EndedError from None
