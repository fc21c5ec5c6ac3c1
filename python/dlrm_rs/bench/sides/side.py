"""What every side can do, and which peers there are."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dlrm_rs.bench.cases import IdBatch
from dlrm_rs.bench.optimizers import OPTIMIZERS
from dlrm_rs.bench.rows import Rows
from dlrm_rs.data.synthetic import Shape

# For all sides alike: glibc keeps the memory of outputs. Otherwise it gives it back or not, and the next output costs
# thousands of page faults or none, by what other sides have freed before. (The most that the first may be is 32 MB.)
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}

# Environments of processes. torch asks for 2 MB pages only when told to. FBGEMM has two sets of kernels, assembled at
# run time and vectorised by the compiler; which is the faster depends on the processor.
PLAIN = "plain"
HUGE_PAGES = "huge pages"
AUTOVEC = "huge pages, autovec"
ENVIRONMENTS: Mapping[str, Mapping[str, str]] = {
    PLAIN: _KEEP_MEMORY,
    HUGE_PAGES: {**_KEEP_MEMORY, "THP_MEM_ALLOC_ENABLE": "1"},
    AUTOVEC: {**_KEEP_MEMORY, "THP_MEM_ALLOC_ENABLE": "1", "FBGEMM_FORCE_AUTOVEC": "1"},
}


class Side(Protocol):
    """Tables of one library, filled with the rows of `Rows`: looked up, or trained by one optimizer.

    Attributes:
        name: Of the library, or of its part.
    """

    name: str

    def calls(self, batch: IdBatch) -> dict[str, Callable[[], object]]:
        """A call for every use of the side on a batch: a lookup or a training step; whatever can be prepared is."""

    def pooled(self, output: object) -> Tensor:
        """The rows that a call looked up and pooled, as `(B, T * D)`."""

    def stored_rows(self, table: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rows `ids`, `(n,)`, of a table as they are stored: `(n, D)` float64."""


@dataclass(frozen=True)
class Peer:
    """A side that may be installed or not.

    Attributes:
        name: Of the side.
        formats: Row formats it has.
        environments: What its process may be started with to run faster.
        needs: The module that must be importable.
        module: Where its class is, imported only when it is made.
        cls: The class, made of a row format, for training an optimizer, a shape, and the rows.
        optimizers: Those that it trains with; none where it looks up.
    """

    name: str
    formats: tuple[str, ...]
    environments: tuple[str, ...]
    needs: str
    module: str
    cls: str
    optimizers: tuple[str, ...] = ()

    def make(self, *arguments: str | Shape | Rows) -> Side:
        """The side, its tables filled; its arguments are those of the class."""
        made = getattr(importlib.import_module(f"dlrm_rs.bench.sides.{self.module}"), self.cls)
        return cast("Side", made(*arguments))

    def why_not(self) -> str | None:
        """Why it cannot be used here; None if it can.

        Imported for the answer: FBGEMM is found beside every torch, and fails beside every torch but one.
        """
        if importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        try:
            importlib.import_module(self.needs)
        except Exception as error:  # whatever a library that does not match raises: ImportError, OSError, RuntimeError
            return f"{self.needs} cannot be imported: {error}".splitlines()[0]
        return None


# What lookups are held against.
PEERS = (
    Peer("nn.EmbeddingBag", ("fp32", "fp16", "bf16"), (PLAIN, HUGE_PAGES), "torch", "torch_bags", "TorchBags"),
    Peer(
        "torch quantized", ("int8", "int4", "int2"), (PLAIN, HUGE_PAGES), "torch", "torch_quantized", "TorchQuantized"
    ),
    Peer(
        "FBGEMM TBE", ("fp32", "fp16"), (PLAIN, HUGE_PAGES, AUTOVEC), "fbgemm_gpu", "fbgemm_training", "FbgemmForward"
    ),
    Peer(
        "FBGEMM nbit",
        ("fp32", "fp16", "int8", "int4", "int2"),
        (PLAIN, HUGE_PAGES, AUTOVEC),
        "fbgemm_gpu",
        "fbgemm_nbit",
        "FbgemmNbit",
    ),
    Peer("NumPy", ("fp32",), (PLAIN,), "numpy", "numpy_take", "NumpyTake"),
)

# What training steps are held against. Where peers do not have a row format, or are slow with it, what counts is what
# it costs beside our own fp32.
TRAINING_PEERS = (
    Peer("nn.EmbeddingBag", ("fp32",), (PLAIN, HUGE_PAGES), "torch", "torch_bags", "TorchTraining", OPTIMIZERS),
    Peer(
        "FBGEMM TBE",
        ("fp32", "fp16"),
        (PLAIN, HUGE_PAGES, AUTOVEC),
        "fbgemm_gpu",
        "fbgemm_training",
        "FbgemmTraining",
        ("SGD", "Adagrad", "RowWiseAdagrad"),
    ),
    Peer("dlrm_rs fp32", ("fp16", "bf16", "bf16-split", "int8"), (PLAIN,), "torch", "ours", "OursInFp32", OPTIMIZERS),
)
