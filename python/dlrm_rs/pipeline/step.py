"""A batch on its way through the pipeline: how far it has come."""

from __future__ import annotations

from typing import Any

from dlrm_rs._dlrm_rs import Overlap
from dlrm_rs.devices.device import Mark
from dlrm_rs.pipeline.lane import Visit

__all__ = ["Step"]


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
        # When the loader had given it.
        self.loaded_at = 0.0
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
        # Whether it has been prepared again, so that overlaps from before are none.
        self.is_renewed = False
        # Whether the tables have had its update.
        self.is_done = False

    @property
    def is_complete(self) -> bool:
        """Whether every gradient is there that will be."""
        trained = [visit for visit in self.visits if visit.is_trained]
        return self.is_sealed or (bool(trained) and all(visit.is_left for visit in trained))

    def can_be_parted(self, following: Step) -> bool:
        """Whether its update and the lookup of the next batch, which is prepared, can be done in parts."""
        pairs = zip(self.visits, following.visits, strict=True)
        return not self.is_done and all(visit.can_be_parted(other) for visit, other in pairs)

    @property
    def waiting(self) -> list[Visit]:
        """Those whose gradient has been left and whose tables have not had it."""
        return [visit for visit in self.visits if visit.is_waiting]

    def waits(self) -> tuple[float, float]:
        """Seconds for which the devices had nothing else to do.

        Returns:
            While the batch was being loaded, and while it was prepared and its rows were made.
        """
        loading = exposed = 0.0
        if self.asked:
            idle_at = max(mark.time() for mark in self.asked)
            loading = max(min(self.loaded_at, self.given_at) - idle_at, 0.0)
            exposed = max(self.given_at - max(idle_at, self.loaded_at), 0.0)
        if self.wanted:
            exposed += max(self.sent_at - max(mark.time() for mark in self.wanted), 0.0)
        return loading, exposed

    def drop(self) -> None:
        """Leave out what of its update has not begun, since it cannot be."""
        if not self.is_done:
            for visit in self.visits:
                visit.drop()
            self.is_done = True
