"""Training steps: forward, backward from a given gradient, and update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dlrm_rs.bench.cases import Case, IdBatch, capped, id_batches
from dlrm_rs.bench.check import check_training
from dlrm_rs.bench.job import Make, SidesJob
from dlrm_rs.bench.measurement import Measurement
from dlrm_rs.bench.rows import Rows
from dlrm_rs.bench.sides import TRAINING_PEERS, Side
from dlrm_rs.bench.sides.ours import OursTraining
from dlrm_rs.data.synthetic import Shape

# Rows of a table where updates are checked. Tables of their own: whoever checks must know the optimizer's state, so it
# must be a new one, and few rows are met again and again.
CHECKED_ROWS = 1000


@dataclass(frozen=True)
class StepJob(SidesJob):
    """Training steps of one shape, row format and optimizer."""

    family = "step"

    def makers(self) -> tuple[Callable[[Shape, Rows], OursTraining], list[Make]]:
        """Ours, and those of `TRAINING_PEERS` that are asked for."""
        peers: list[Make] = [
            partial(peer.make, self.row_format, self.optimizer) for peer in TRAINING_PEERS if peer.name in self.peers
        ]
        return partial(OursTraining, self.row_format, self.optimizer), peers

    def check(self, case: Case, batch: IdBatch, sides: Sequence[Side], rows: Rows) -> None:
        """Check some steps of every use, on small tables."""
        shape = capped(self.shape, CHECKED_ROWS)
        batches = id_batches(shape, case, self.row_format)
        make_ours, make_peers = self.makers()
        for make in (make_ours, *make_peers):
            check_training(partial(make, shape, rows), batches, rows, self.row_format, self.optimizer)

    def run(self) -> list[Measurement]:
        """Make the tables, check every use, and time it."""
        # torch warns, once, that it does not check its sparse tensors unless told whether it should.
        with torch.sparse.check_sparse_tensor_invariants(enable=False):
            return super().run()
