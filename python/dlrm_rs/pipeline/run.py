"""One pass over a loader: the threads, and what they wait for.

```
loader thread   batches from the loader, their ids checked by type and put in order
table thread    ids of batch i + 1 sorted and looked up, the update of batch i
user's thread   the model: takes the pooled rows of a batch, leaves their gradient
```

The user has a batch as soon as its ids are checked, and waits for its rows where the model looks them up: what comes
before in the model is done by then.

All that the threads share changes under one condition. A failure ends the pass: it is kept with the number of the
batch that it belongs to and raised in the user's thread, when that asks for the batch or its rows (or, where an update
fails, for those of the next one). Whatever ends the pass, the table thread first finishes the updates of gradients that
have been left, so the tables are as they were after one batch or another, never in between.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakSet

from dlrm_rs.collection import EmbeddingBagCollection
from dlrm_rs.devices.device import Mark
from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.pipeline.lane import Lane, Visit
from dlrm_rs.pipeline.parting import Parting, Trials
from dlrm_rs.pipeline.step import Step
from dlrm_rs.pipeline.timeline import Timeline

__all__ = ["PATIENCE", "Run"]

_END = object()

# Seconds for which a loop that is left waits for the batch that is being loaded.
PATIENCE = 2.0


class _EndedError(Exception):
    """The failure is kept; the table thread has nothing more to begin."""


class Run:
    """A pass over a loader, from `start` to `close`.

    Args:
        collections: By their names in the model.
        loader: Batches.
        features: What the collections look up of a batch, by their names.
        timeline: Where stages are recorded.
        is_stale: Whether a lookup goes before the update of the batch before.
        trials: How much is parted where it does not.
        prefetch: Batches that wait for their lookup, at most.
        check_finite: Whether a gradient with an infinity or a NaN ends the pass.
    """

    def __init__(
        self,
        collections: Mapping[str, EmbeddingBagCollection],
        loader: Iterable[Any],
        features: Callable[[Any], Mapping[str, KeyedJaggedTensor]],
        timeline: Timeline,
        *,
        is_stale: bool,
        trials: Trials,
        prefetch: int,
        check_finite: bool,
    ) -> None:
        for name, collection in collections.items():
            if collection._tables.lane is not None:
                raise RuntimeError(
                    f"model: expected tables that no other pipeline trains, but collection {name!r} is in another "
                    "pipeline's loop; end or close() that first"
                )
        self._changed = threading.Condition()
        self._lanes = [Lane(name, collection, self, check_finite) for name, collection in collections.items()]
        self._loader, self._features = loader, features
        self._timeline = timeline
        self._is_stale = is_stale
        self._trials = trials
        self._prefetch = prefetch
        self._loaded: deque[Step] = deque()
        self._ready: deque[Step] = deque()
        # The batch that the user has, and the one before.
        self._current: Step | None = None
        self._before: Step | None = None
        self._failure: tuple[int, BaseException] | None = None
        self._has_raised = False
        self._is_at_end = False  # of the loader
        self._is_closing = False
        self._settling = 0  # how many threads wait for updates
        self._outdated: tuple[Step, Visit] | None = None  # which the user's thread wants to be looked up again
        # Of the table thread.
        self._has_begun = self._has_ended = self._is_alone = False
        # Daemons: the one may be inside the user's loader for as long as that likes.
        self._loading = threading.Thread(target=self._load, name="dlrm-rs-loader", daemon=True)
        self._tables = threading.Thread(target=self._work, name="dlrm-rs-tables", daemon=True)

    def start(self) -> None:
        """Have the collections ask this pass, and begin; to be closed even where it raises, as Ctrl-C may come."""
        _open.add(self)
        for lane in self._lanes:
            lane.attach()
        self._loading.start()
        self._tables.start()

    # The user's thread.

    def next(self) -> Step | None:
        """Seal the batch that the user has, and wait for the next one, its ids checked; None after the last.

        Raises:
            BaseException: What ended the pass.
        """
        asked = self._marks()
        with self._changed:
            self._seal()
            self._changed.wait_for(lambda: self._ready or self._has_ended)
            if self._failure is not None and (not self._ready or self._failure[0] < self._ready[0].number):
                self._raise()
            if not self._ready:
                return None
            self._current = self._ready.popleft()
            self._current.asked, self._current.given_at = asked, time.perf_counter()
            for lane, visit in zip(self._lanes, self._current.visits, strict=True):
                lane.visit = visit
            return self._current

    def await_rows(self) -> None:
        """Wait until the rows of the batch that the user has are on their way to the device.

        Raises:
            BaseException: What ended the pass before.
        """
        step = self._current
        assert step is not None
        step.wanted = step.wanted or self._marks()
        with self._changed:
            self._changed.wait_for(lambda: step.sent_at or self._has_ended)
            if not step.sent_at:
                self._raise()

    def renew(self, visit: Visit) -> None:
        """Have the batch that the user has looked up again, by the tables as they are now.

        Raises:
            RuntimeError: The tables are trained by now, but the batch's update has been.
            BaseException: What ended the pass before.
        """
        step = self._current
        assert step is not None
        with self._changed:
            self._outdated = step, visit
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._outdated is None or self._has_ended)
            finally:
                left, self._outdated = self._outdated, None
        if left is not None:
            if self._failure is not None:
                self._raise()
            visit.renew()
        if step.is_done and visit.is_trained:
            raise RuntimeError(
                f"model: expected collection {visit.lane.name!r} to be frozen until the next batch, as it was when the "
                "backward of this one was done, got weights that are to be trained"
            )

    def _marks(self) -> list[Mark]:
        return [lane.mark() for lane in self._lanes]

    def _raise(self) -> None:
        assert self._failure is not None
        number, error = self._failure
        self._has_raised = True
        # What is raised knows the frames it went through, and by them this pass, which else would be kept by itself.
        self._failure = number, RuntimeError("batches: expected no more of a loop that a failure has ended")
        try:
            raise error
        finally:
            del error

    def settle(self) -> None:
        """Wait until the tables have the update of every gradient that has been left."""
        with self._changed:
            steps = [step for step in (self._before, self._current) if step is not None]
            left = [visit for step in steps for visit in step.waiting]
            self._settling += 1
            try:
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._has_ended or not any(visit.is_waiting for visit in left))
            finally:
                self._settling -= 1

    def close(self, patience: float = 0.0) -> None:
        """End the pass: what has begun is finished, nothing more begins.

        After a KeyboardInterrupt in it, call it again.

        Args:
            patience: Seconds to wait for the loader to give the batch that it is at.

        Raises:
            BaseException: What kept a gradient that the user has left from the tables, if `next` has not raised it.
        """
        with self._changed:
            self._is_closing = True
            self._seal()
            if threading.current_thread() is self._tables:  # where the collector came upon the loop
                self._is_alone = True
                return
            # Where it has not begun, as Ctrl-C came first, it will find the pass closed.
            self._changed.wait_for(lambda: self._has_ended or not self._has_begun)
        for thread, seconds in ((self._tables, None), (self._loading, patience)):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(seconds)
        self._let_go()
        if self._before is None:
            return
        self._before.drop()  # its gradient came after a failure
        is_lost = any(visit.is_lost for visit in self._before.visits)
        self._before = None
        if self._failure is not None and is_lost and not self._has_raised:
            self._raise()

    def unlock(self) -> None:
        """Give the lock up if this thread has it by a Ctrl-C, which came after it was taken and before `with`."""
        with suppress(RuntimeError):  # which says that the thread has it not
            while True:
                self._changed.release()

    def _let_go(self) -> None:
        """Leave the collections as they were, and keep nothing of the user's."""
        for lane in self._lanes:
            lane.detach()
        self._lanes, self._loader = [], ()
        self._loaded.clear()
        self._ready.clear()
        _open.discard(self)

    def forget(self) -> None:
        """End in a process that was forked: the threads are those of the other."""
        self._changed = threading.Condition()
        self._has_ended = True
        self._failure = (
            -1,
            RuntimeError("batches: expected a loop in the process that began it, got one in a fork of it"),
        )
        self._let_go()

    def _seal(self) -> None:
        if self._current is not None:
            self._current.is_sealed = True
            self._before, self._current = self._current, None
            for lane in self._lanes:
                lane.visit = None
        self._changed.notify_all()

    # Any thread.

    def notify(self) -> None:
        """Have all threads look at what they wait for."""
        with self._changed:
            self._changed.notify_all()

    def _fail(self, number: int, error: BaseException, stage: str) -> None:
        error.add_note(f"in the pipeline's {stage} of batch {number}")
        with self._changed:
            if self._failure is None or number < self._failure[0]:
                self._failure = number, error

    # The loader thread.

    def _load(self) -> None:
        number = 0
        try:
            if self._is_closing:
                return
            batches = iter(self._loader)
            while True:
                with self._timeline.stage("loader", "load", number):
                    batch = next(batches, _END)
                    if batch is _END:
                        break
                    features = self._features(batch)
                    step = Step(number, batch, [Visit(lane, features[lane.name]) for lane in self._lanes])
                with self._changed:
                    if self._is_closing:
                        return
                    step.loaded_at = time.perf_counter()
                    self._loaded.append(step)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: len(self._loaded) < self._prefetch or self._is_closing)
                    if self._is_closing:
                        return
                number += 1
        except BaseException as error:
            self._fail(number, error, "loading")
        with self._changed:
            self._is_at_end = True
            self._changed.notify_all()

    # The table thread.

    def _work(self) -> None:
        with self._changed:
            if self._is_closing:
                return
            self._has_begun = True
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
            self._fail(0 if before is None else before.number, error, "table thread")
            if before is not None:
                before.drop()
        finally:
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()
            if self._is_alone:
                self._let_go()

    def _wait_for(self, is_ready: Callable[[], Any], before: Step | None) -> None:
        """Wait, and meanwhile do what the user's thread waits for."""

        def wanted() -> bool:
            return self._settling > 0 and before is not None and bool(before.waiting)

        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or self._outdated or is_ready() or wanted())
                outdated = self._outdated
                if self._is_closing or (outdated is None and is_ready()):
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
        with self._changed:
            step.is_renewed, self._outdated = True, None
            self._changed.notify_all()

    def _await_loaded(self, before: Step | None) -> Step | None:
        """The next batch; None when there is none."""
        self._wait_for(lambda: self._loaded or self._is_at_end, before)
        with self._changed:
            if self._is_closing or not self._loaded:
                return None
            self._changed.notify_all()
            return self._loaded.popleft()

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
        with self._changed:
            self._ready.append(step)
            self._changed.notify_all()

    def _publish(self, step: Step) -> None:
        with self._stage("send", step):
            for visit in step.visits:
                visit.send()
        with self._changed:
            step.sent_at = time.perf_counter()
            self._changed.notify_all()

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
            self._fail(step.number, error, "gradient")
            raise _EndedError from None

    def _update(self, step: Step) -> None:
        """Update by the gradients that have been left; others of the batch may still come."""
        visits = step.waiting
        self._fetch(step, visits)
        with self._stage("update", step):
            for visit in visits:
                visit.update()
        self.notify()

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
        with self._changed:
            step.is_done = True
            self._changed.notify_all()

    @contextmanager
    def _stage(self, stage: str, step: Step) -> Iterator[None]:
        try:
            with self._timeline.stage("tables", stage, step.number):
                yield
        except BaseException as error:
            self._fail(step.number, error, stage)
            raise _EndedError from None


# Passes that have begun and not been closed.
_open: WeakSet[Run] = WeakSet()


@atexit.register
def _close_all() -> None:
    """End the threads before the interpreter does, which takes those down that are inside of the engine or of torch."""
    for run in list(_open):
        with suppress(BaseException):
            run.close(PATIENCE)


def _forget_all() -> None:
    for run in list(_open):
        run.forget()


os.register_at_fork(after_in_child=_forget_all)
