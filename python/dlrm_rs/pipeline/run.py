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

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch.utils.hooks import RemovableHandle

from dlrm_rs._dlrm_rs import Overlap
from dlrm_rs.collection import EmbeddingBagCollection
from dlrm_rs.devices.device import Mark
from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.pipeline.lane import Lane, Visit
from dlrm_rs.pipeline.parting import Parting, Trials
from dlrm_rs.pipeline.timeline import Timeline

__all__ = ["Run", "Step"]

_END = object()


class _EndedError(Exception):
    """The failure is kept; the table thread has nothing more to begin."""


class Step:
    """A batch on its way.

    Args:
        number: Counted from 0.
        batch: As the loader gave it.
        visits: Of every lane.
    """

    def __init__(self, number: int, batch: Any, visits: list[Visit]) -> None:
        self.number = number
        self.batch = batch
        self.visits = visits
        # The ends of the devices' queues when the user asked for it, and when he had it.
        self.asked: list[Mark] = []
        self.given_at = 0.0
        # Likewise when the model wanted its rows, and when these were on their way; 0 before.
        self.wanted: list[Mark] = []
        self.sent_at = 0.0
        # Whether no gradient can come any more.
        self.is_sealed = False
        # Whether the gradients are on the host.
        self.has_gradient = False
        # With the next batch, once its gradients are to be parted.
        self.overlaps: list[Overlap] | None = None
        # Whether the tables have had its update.
        self.is_done = False

    @property
    def is_complete(self) -> bool:
        """Whether every gradient is there that will be."""
        trained = [visit for visit in self.visits if visit.is_trained]
        return self.is_sealed or (bool(trained) and all(visit.is_left for visit in trained))

    @property
    def exposed(self) -> float:
        """Seconds for which the devices, with nothing else to do, waited for the batch and then for its rows."""
        waits = [(self.asked, self.given_at), (self.wanted, self.sent_at)]
        return sum(max(end - max(mark.time() for mark in begin), 0.0) for begin, end in waits if begin)


class Run:
    """A pass over a loader.

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
            if collection._lane is not None:
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
        self._is_flushing = False
        self._has_ended = False  # the table thread
        self._tables = threading.Thread(target=self._work, name="dlrm-rs-tables", daemon=True)
        self._hooks = [hook for lane in self._lanes for hook in self._attach(lane)]
        # A daemon: it may be inside the user's loader for as long as that likes.
        threading.Thread(target=self._load, name="dlrm-rs-loader", daemon=True).start()
        self._tables.start()

    def _attach(self, lane: Lane) -> list[RemovableHandle]:
        lane.collection._lane = lane
        hook: RemovableHandle = lane.collection.register_state_dict_pre_hook(lambda *_: self.settle())  # type: ignore[no-untyped-call]
        if lane.collection.fused_optimizer is None:
            return [hook]
        return [hook, lane.collection.fused_optimizer.register_state_dict_pre_hook(lambda *_: self.settle())]

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
            steps = [step for step in (self._before, self._current) if step is not None and step.is_complete]
            self._is_flushing = True
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._has_ended or all(step.is_done for step in steps))
            finally:
                self._is_flushing = False

    def close(self) -> None:
        """End the pass: what has begun is finished, nothing more begins.

        Raises:
            BaseException: What kept a gradient that the user has left from the tables, if `next` has not raised it.
        """
        with self._changed:
            self._is_closing = True
            self._seal()
        self._tables.join()
        self._drop(self._before)  # its gradient came after a failure
        for hook in self._hooks:
            hook.remove()
        for lane in self._lanes:
            lane.collection._lane = None
        is_lost = self._before is not None and any(visit.is_lost for visit in self._before.visits)
        if self._failure is not None and is_lost and not self._has_raised:
            self._raise()

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
            batches = iter(self._loader)
            while True:
                with self._timeline.stage("loader", "load", number):
                    batch = next(batches, _END)
                    if batch is _END:
                        break
                    features = self._features(batch)
                    step = Step(number, batch, [Visit(lane, features[lane.name]) for lane in self._lanes])
                with self._changed:
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
        look_up = self._look_up_stale if self._is_stale else self._look_up_exact
        before: Step | None = None
        try:
            while True:
                step = self._await_loaded(before)
                if step is not None:
                    look_up(before, step)
                else:
                    self._finish(before)
                    if self._is_closing or (self._is_at_end and not self._loaded):
                        return
                before = step
        except _EndedError:
            with suppress(_EndedError):  # the first failure is kept
                self._finish(before)
            self._drop(before)
        except BaseException as error:
            self._fail(0 if before is None else before.number, error, "table thread")
            self._drop(before)
        finally:
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()

    def _await_loaded(self, before: Step | None) -> Step | None:
        """The next batch; None when there is none, or when the update of the one before is not to wait for it."""

        def may_flush() -> bool:
            # Never in stale mode: there the lookup goes before that update, however long it takes to come.
            is_left = before is not None and before.is_complete
            return self._is_flushing and is_left and not self._is_stale

        with self._changed:
            self._changed.wait_for(lambda: self._loaded or self._is_at_end or self._is_closing or may_flush())
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
        parting = Parting.NOTHING if before is None else self._trials.choose()
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
        with self._changed:
            self._changed.wait_for(lambda: step.is_complete or self._is_closing)
        try:
            for visit in step.visits:
                visit.wait()
        except BaseException as error:
            self._drop(step)
            self._fail(step.number, error, "gradient")
            raise _EndedError from None
        step.has_gradient = True
        spans = [span for visit in step.visits if (span := visit.span()) is not None]
        if spans:
            begins, ends = zip(*spans, strict=True)
            self._timeline.record("device", "dense layers", min(begins), max(ends), step.number)

    def _finish(self, step: Step | None) -> None:
        """Update what of a batch has not been updated yet."""
        if step is None or step.is_done:
            return
        self._await_gradient(step)
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
            self._timeline.exposed += step.exposed
        with self._changed:
            step.is_done = True
            self._changed.notify_all()

    @staticmethod
    def _drop(step: Step | None) -> None:
        """Leave out an update that cannot be."""
        if step is not None and not step.is_done:
            for visit in step.visits:
                visit.drop()
            step.is_done = True

    @contextmanager
    def _stage(self, stage: str, step: Step) -> Iterator[None]:
        try:
            with self._timeline.stage("tables", stage, step.number):
                yield
        except BaseException as error:
            self._fail(step.number, error, stage)
            raise _EndedError from None
