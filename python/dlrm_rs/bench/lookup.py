"""Lookups, in inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dlrm_rs.bench.cases import Case, IdBatch
from dlrm_rs.bench.check import check_side
from dlrm_rs.bench.job import Make, SidesJob
from dlrm_rs.bench.measurement import Measurement
from dlrm_rs.bench.rows import Rows
from dlrm_rs.bench.sides import PEERS, Side
from dlrm_rs.bench.sides.ours import Ours
from dlrm_rs.data.synthetic import Shape


@dataclass(frozen=True)
class LookupJob(SidesJob):
    """Lookups of one shape and row format."""

    family = "lookup"

    def makers(self) -> tuple[Callable[[Shape, Rows], Ours], list[Make]]:
        """Ours, and those of `PEERS` that are asked for."""
        peers: list[Make] = [partial(peer.make, self.row_format) for peer in PEERS if peer.name in self.peers]
        return partial(Ours, self.row_format), peers

    def check(self, case: Case, batch: IdBatch, sides: Sequence[Side], rows: Rows) -> None:
        """Check every use on one batch."""
        for side in sides:
            check_side(side, batch, rows, self.row_format)

    def run(self) -> list[Measurement]:
        """Make the tables, check every use, and time it, without gradients."""
        with torch.no_grad():
            return super().run()
