"""What is measured: one use of one side in one case, with the ceiling beside it."""

from __future__ import annotations

from dataclasses import dataclass

from dlrm_rs.bench.timing import Times


@dataclass(frozen=True)
class Measurement:
    """The times of a use.

    Attributes:
        family: "lookup", "quantize" or "step".
        shape: The shape's name.
        row_format: How rows are stored.
        batch_size: `B`; 0 where there is none.
        ids: Their distribution, in words.
        threads: Of all sides.
        side: The library.
        use: How it was called.
        environment: What its process was started with.
        process: What was measured in turn with it: the same words for all of one process.
        rows: Rows read in a call.
        bytes: Bytes of their elements.
        times: What calls took.
        ceiling: Median seconds of touching the same rows, in turn with it; 0 where nothing is touched.
        optimizer: Of a step; empty where there is none.
    """

    family: str
    shape: str
    row_format: str
    batch_size: int
    ids: str
    threads: int
    side: str
    use: str
    environment: str
    process: str
    rows: int
    bytes: int
    times: Times
    ceiling: float
    optimizer: str = ""

    @property
    def work(self) -> tuple[str, str, str, str]:
        """What is done, and to which tables."""
        return (self.family, self.shape, self.optimizer, self.row_format)

    @property
    def case_but_threads(self) -> tuple[tuple[str, str, str, str], int, str]:
        """What it shares with the measurements of other numbers of threads."""
        return (self.work, self.batch_size, self.ids)

    @property
    def case(self) -> tuple[tuple[tuple[str, str, str, str], int, str], int]:
        """What it shares with the measurements that it may be compared with."""
        return (self.case_but_threads, self.threads)

    @property
    def rows_per_second(self) -> float:
        """Rows of the median call."""
        return self.rows / self.times.median

    @property
    def bytes_per_second(self) -> float:
        """Bytes of the median call."""
        return self.bytes / self.times.median

    @property
    def of_ceiling(self) -> float:
        """The ceiling's time over its own: at most 1, but for what is left in a cache."""
        return self.ceiling / self.times.median
