"""Quantization of fp32 tables, all of a shape: ours, torch's prepack, and FBGEMM's operators."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter, process_time

import numpy as np
import torch
from torch import Tensor

from dlrm_rs.bench.cases import capped, set_threads
from dlrm_rs.bench.check import check_rows
from dlrm_rs.bench.measurement import Measurement
from dlrm_rs.bench.rows import Rows
from dlrm_rs.bench.sides.fbgemm_cpu import tell_instructions
from dlrm_rs.bench.sides.ours import NAME, Ours, quantize
from dlrm_rs.bench.sides.torch_quantized import operator
from dlrm_rs.bench.timing import Times
from dlrm_rs.data.synthetic import Shape

Pack = Callable[[Tensor], Tensor]

# How often all tables are quantized: ours are made anew every time, as they are quantized in place.
REPETITIONS = 5

# Rows of every side that are checked, spread over a table as large as the largest.
SAMPLES = 1000


@dataclass(frozen=True)
class QuantizeJob:
    """What one process does at a time.

    Attributes:
        shape: The shape's name.
        row_format: What the tables are brought into.
        peers: Names of `PEERS` that may be used.
        environment: What the process was started with.
        threads: The numbers of threads.
        rows: No table has more; None for the shape's own.
    """

    shape: str
    row_format: str
    peers: tuple[str, ...]
    environment: str
    threads: tuple[int, ...]
    rows: int | None

    def __str__(self) -> str:
        return f"quantize {self.shape} to {self.row_format} ({self.environment})"

    def run(self) -> list[Measurement]:
        """Quantize all tables `REPETITIONS` times, the sides in turn.

        Raises:
            WrongOutputError: Rows are further from the true ones than the row format explains.
            MemoryError: The tables cannot be allocated.
        """
        shape, rows = capped(self.shape, self.rows), Rows()
        weight = torch.empty(max(shape.num_embeddings), shape.embedding_dim)
        rows.fill(0, weight)
        packs = _packs(self.row_format, fbgemm=any(peer.startswith("FBGEMM") for peer in self.peers))
        self._check(packs, weight, rows)
        measured: list[Measurement] = []
        for threads in self.threads:
            set_threads(threads)
            seconds: dict[str, list[float]] = {name: [] for name in (NAME, *packs)}
            cpu = dict.fromkeys(seconds, 0.0)
            for _ in range(REPETITIONS):
                for name in seconds:
                    run = self._ours(shape, rows) if name == NAME else _every_table(packs[name], weight, shape)
                    before, start = process_time(), perf_counter()
                    packed = run()  # kept while the clock runs: whoever quantizes a model has all of its tables then
                    seconds[name].append(perf_counter() - start)
                    cpu[name] += process_time() - before
                    del run, packed
                    gc.collect()  # modules are cycles: the next needs their memory
            for name in seconds:
                times = Times.of(seconds[name], cpu[name])
                measured.append(self._measurement(shape, threads, name, times))
        return measured

    def _ours(self, shape: Shape, rows: Rows) -> Callable[[], object]:
        collection = Ours("fp32", shape, rows).collection
        return lambda: quantize(collection, self.row_format)

    def _check(self, packs: Mapping[str, Pack], weight: Tensor, rows: Rows) -> None:
        ids = np.linspace(0, len(weight) - 1, SAMPLES).astype(np.int64)
        small = Shape((len(weight),), weight.shape[1], (1,), (1,), 0.0)
        stored = {NAME: Ours(self.row_format, small, rows).stored_rows(0, ids)}
        unpack = operator(self.row_format, "unpack")  # the peers have one layout
        for name, pack in packs.items():
            stored[name] = unpack(pack(weight)[torch.from_numpy(ids)]).double().numpy()
        for name, got in stored.items():
            check_rows(name, 0, ids, got, rows, self.row_format)

    def _measurement(self, shape: Shape, threads: int, name: str, times: Times) -> Measurement:
        count = sum(shape.num_embeddings)
        return Measurement(
            "quantize",
            self.shape,
            self.row_format,
            0,
            "",
            threads,
            name,
            "all tables",
            self.environment,
            str(self),
            count,
            count * shape.embedding_dim * 4,
            times,
            0.0,
        )


def _packs(row_format: str, fbgemm: bool) -> dict[str, Pack]:
    packs: dict[str, Pack] = {"torch prepack": operator(row_format, "prepack")}
    if fbgemm:
        packs["FBGEMM"] = _fbgemm_pack(row_format)
    return packs


def _fbgemm_pack(row_format: str) -> Pack:
    import fbgemm_gpu  # noqa: F401 # registers the operators

    tell_instructions()

    if row_format == "int8":
        eight: Pack = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized.default
        return eight
    few = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf.default
    bits = {"int4": 4, "int2": 2}[row_format]
    return lambda weight: few(weight, bits)


def _every_table(pack: Pack, weight: Tensor, shape: Shape) -> Callable[[], object]:
    """Pack every table of a model."""
    # Each in memory of its own, as ours are: where a machine's memory is slow to be had, one table again and again
    # would leave the packed ones memory that was in use just before.
    tables = [weight[:N].clone() for N in shape.num_embeddings]
    return lambda: [pack(table) for table in tables]
