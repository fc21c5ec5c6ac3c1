"""What the threads of a pass share: batches on their way, and how far each thread is; all under one condition."""

from __future__ import annotations

import threading
from collections import deque

from dlrm_rs.pipeline.lane import Visit
from dlrm_rs.pipeline.step import Step

__all__ = ["Shared"]


class Shared:
    """What the threads of a pass wait for and tell each other, under the condition `changed`."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        # Batches that wait for the table thread, and then for the user's.
        self.loaded: deque[Step] = deque()
        self.ready: deque[Step] = deque()
        # What ended the pass, and the number of the batch that it belongs to.
        self.failure: tuple[int, BaseException] | None = None
        self.is_at_end = False  # of the loader
        self.is_closing = False
        self.settling = 0  # how many threads wait for updates
        self.outdated: tuple[Step, Visit] | None = None  # which the user's thread wants to be looked up again
        # Of the table thread.
        self.has_begun = self.has_ended = False

    def notify(self) -> None:
        """Have all threads look at what they wait for."""
        with self.changed:
            self.changed.notify_all()

    def fail(self, number: int, error: BaseException, stage: str) -> None:
        """Keep what ends the pass, unless a batch before has failed.

        Args:
            number: Of the batch that it belongs to.
            error: The failure.
            stage: What failed, for the note.
        """
        error.add_note(f"in the pipeline's {stage} of batch {number}")
        with self.changed:
            if self.failure is None or number < self.failure[0]:
                self.failure = number, error
