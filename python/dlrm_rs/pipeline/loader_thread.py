"""The loader thread: batches from the user's loader, their ids checked by type and put in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.pipeline.lane import Lane, Visit
from dlrm_rs.pipeline.shared import Shared
from dlrm_rs.pipeline.step import Step
from dlrm_rs.pipeline.timeline import Timeline

__all__ = ["Loading"]

_END = object()


class Loading:
    """What the loader thread does.

    Args:
        shared: What the threads share.
        lanes: Of the collections.
        loader: Batches.
        features: What the collections look up of a batch, by their names.
        timeline: Where stages are recorded.
        prefetch: Batches that wait for their lookup, at most.
    """

    def __init__(
        self,
        shared: Shared,
        lanes: list[Lane],
        loader: Iterable[Any],
        features: Callable[[Any], Mapping[str, KeyedJaggedTensor]],
        timeline: Timeline,
        prefetch: int,
    ) -> None:
        self._shared = shared
        self._lanes, self._loader, self._features = lanes, loader, features
        self._timeline = timeline
        self._prefetch = prefetch

    def let_go(self) -> None:
        """Keep nothing of the user's, though the thread may still be inside the loader."""
        self._lanes, self._loader = [], ()

    def load(self) -> None:
        """Load until the loader ends, or the pass."""
        number = 0
        try:
            if self._shared.is_closing:
                return
            batches = iter(self._loader)
            while True:
                with self._timeline.stage("loader", "load", number):
                    batch = next(batches, _END)
                    if batch is _END:
                        break
                    features = self._features(batch)
                    step = Step(number, batch, [Visit(lane, features[lane.name]) for lane in self._lanes])
                with self._shared.changed:
                    if self._shared.is_closing:
                        return
                    step.loaded_at = time.perf_counter()
                    self._shared.loaded.append(step)
                    self._shared.changed.notify_all()
                    self._shared.changed.wait_for(
                        lambda: len(self._shared.loaded) < self._prefetch or self._shared.is_closing
                    )
                    if self._shared.is_closing:
                        return
                number += 1
        except BaseException as error:
            self._shared.fail(number, error, "loading")
        with self._shared.changed:
            self._shared.is_at_end = True
            self._shared.changed.notify_all()
