"""One pass over a loader: its threads, begun and ended, and what the user's thread waits for.

```
loader thread   batches from the loader, their ids checked by type and put in order     (`loader_thread`)
table thread    ids of batch i + 1 sorted and looked up, the update of batch i          (`table_thread`)
user's thread   the model: takes the pooled rows of a batch, leaves their gradient      (here)
```

The user has a batch as soon as its ids are checked, and waits for its rows where the model looks them up: what comes
before in the model is done by then.

All that the threads share changes under one condition (`shared`). A failure ends the pass: it is kept with the number
of the batch that it belongs to and raised in the user's thread, when that asks for the batch or its rows (or, where an
update fails, for those of the next one). Whatever ends the pass, the table thread first finishes the updates of
gradients that have been left, so the tables are as they were after one batch or another, never in between.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakSet

from dlrm_rs.collection import EmbeddingBagCollection
from dlrm_rs.devices.device import Mark
from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.pipeline.lane import Lane, Visit
from dlrm_rs.pipeline.loader_thread import Loading
from dlrm_rs.pipeline.parting import Trials
from dlrm_rs.pipeline.shared import Shared
from dlrm_rs.pipeline.step import Step
from dlrm_rs.pipeline.table_thread import TableWork
from dlrm_rs.pipeline.timeline import Timeline

__all__ = ["PATIENCE", "Run"]

# Seconds for which a loop that is left waits for the batch that is being loaded.
PATIENCE = 2.0


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
        self._shared = Shared()
        self._lanes = [Lane(name, collection, self, check_finite) for name, collection in collections.items()]
        # The batch that the user has, and the one before.
        self._current: Step | None = None
        self._before: Step | None = None
        self._has_raised = False
        self._loading = Loading(self._shared, self._lanes, loader, features, timeline, prefetch)
        self._table_work = TableWork(self._shared, timeline, is_stale=is_stale, trials=trials)
        self._is_alone = False  # the table thread, once the loop is gone
        # Daemons: the one may be inside the user's loader for as long as that likes.
        self._loader_thread = threading.Thread(target=self._loading.load, name="dlrm-rs-loader", daemon=True)
        self._table_thread = threading.Thread(target=self._work, name="dlrm-rs-tables", daemon=True)

    def start(self) -> None:
        """Have the collections ask this pass, and begin; to be closed even where it raises, as Ctrl-C may come."""
        _open.add(self)
        for lane in self._lanes:
            lane.attach()
        self._loader_thread.start()
        self._table_thread.start()

    # The user's thread.

    def next(self) -> Step | None:
        """Seal the batch that the user has, and wait for the next one, its ids checked; None after the last.

        Raises:
            BaseException: What ended the pass.
        """
        asked, shared = self._marks(), self._shared
        with shared.changed:
            self._seal()
            shared.changed.wait_for(lambda: shared.ready or shared.has_ended)
            if shared.failure is not None and (not shared.ready or shared.failure[0] < shared.ready[0].number):
                self._raise()
            if not shared.ready:
                return None
            self._current = shared.ready.popleft()
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
        with self._shared.changed:
            self._shared.changed.wait_for(lambda: step.sent_at or self._shared.has_ended)
            if not step.sent_at:
                self._raise()

    def renew(self, visit: Visit) -> None:
        """Have the batch that the user has looked up again, by the tables as they are now.

        Raises:
            RuntimeError: The tables are trained by now, but the batch's update has been.
            BaseException: What ended the pass before.
        """
        step, shared = self._current, self._shared
        assert step is not None
        with shared.changed:
            shared.outdated = step, visit
            shared.changed.notify_all()
            try:
                shared.changed.wait_for(lambda: shared.outdated is None or shared.has_ended)
            finally:
                left, shared.outdated = shared.outdated, None
        if left is not None:
            if shared.failure is not None:
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
        assert self._shared.failure is not None
        number, error = self._shared.failure
        self._has_raised = True
        # What is raised knows the frames it went through, and by them this pass, which else would be kept by itself.
        self._shared.failure = number, RuntimeError("batches: expected no more of a loop that a failure has ended")
        try:
            raise error
        finally:
            del error

    def settle(self) -> None:
        """Wait until the tables have the update of every gradient that has been left."""
        shared = self._shared
        with shared.changed:
            steps = [step for step in (self._before, self._current) if step is not None]
            left = [visit for step in steps for visit in step.waiting]
            shared.settling += 1
            try:
                shared.changed.notify_all()
                shared.changed.wait_for(lambda: shared.has_ended or not any(visit.is_waiting for visit in left))
            finally:
                shared.settling -= 1

    def close(self, patience: float = 0.0) -> None:
        """End the pass: what has begun is finished, nothing more begins.

        After a KeyboardInterrupt in it, call it again.

        Args:
            patience: Seconds to wait for the loader to give the batch that it is at.

        Raises:
            BaseException: What kept a gradient that the user has left from the tables, if `next` has not raised it.
        """
        with self._shared.changed:
            self._shared.is_closing = True
            self._seal()
            if threading.current_thread() is self._table_thread:  # where the collector came upon the loop
                self._is_alone = True
                return
            # Where it has not begun, as Ctrl-C came first, it will find the pass closed.
            self._shared.changed.wait_for(lambda: self._shared.has_ended or not self._shared.has_begun)
        for thread, seconds in ((self._table_thread, None), (self._loader_thread, patience)):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(seconds)
        self._let_go()
        if self._before is None:
            return
        self._before.drop()  # its gradient came after a failure
        is_lost = any(visit.is_lost for visit in self._before.visits)
        self._before = None
        if self._shared.failure is not None and is_lost and not self._has_raised:
            self._raise()

    def unlock(self) -> None:
        """Give the lock up if this thread has it by a Ctrl-C, which came after it was taken and before `with`."""
        with suppress(RuntimeError):  # which says that the thread has it not
            while True:
                self._shared.changed.release()

    def _let_go(self) -> None:
        """Leave the collections as they were, and keep nothing of the user's."""
        for lane in self._lanes:
            lane.detach()
        self._lanes = []
        self._loading.let_go()
        self._shared.loaded.clear()
        self._shared.ready.clear()
        _open.discard(self)

    def forget(self) -> None:
        """End in a process that was forked: the threads are those of the other."""
        self._shared.changed = threading.Condition()
        self._shared.has_ended = True
        self._shared.failure = (
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
        self._shared.changed.notify_all()

    # Any thread.

    def notify(self) -> None:
        """Have all threads look at what they wait for."""
        self._shared.notify()

    # The table thread.

    def _work(self) -> None:
        try:
            self._table_work.work()
        finally:
            if self._is_alone:
                self._let_go()


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
