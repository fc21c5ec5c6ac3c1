"""The arithmetic of one table in a training step.

With `B` samples of `L` ids each, `N` rows of `row` bytes, their scale among them, and the fused optimizer's `state`
bytes per row, it needs

```
id bytes      B * L * 8                                          and 4 more for every id with a weight
rows read     B * L * row                                        the lookup
host memory   N * (row + state)                                  and D * 4 for every hot row
rows updated  B * L * D * 4  +  B * L * 2 * (row + state)        gradients read; rows and state read and written
PCIe          B * D * output bytes there, B * D * 4 back         on the GPU instead id bytes there
GPU memory    N * row * copies
rows swept    B * L * D * 4  +  2 * N * row * copies             on the GPU instead of rows updated
```

where no row is counted less for coming twice: an upper bound.

On the GPU a table is a plain torch module, whose gradient is as large as the table, and a torch optimizer steps all
rows, touched or not. `copies` is how often a table is there at the height of such a step, by what torch's optimizers do
there by default ("foreach"): the rows, the gradient, the state, and what they work with meanwhile.

```
no optimizer            1   the rows
SGD                     2   and the gradient
SGD with momentum       3   and the momentum
  with weight decay    +1   and the gradient with what the rows decay by
Adagrad, Adam, others   5   Adagrad: a sum, its root and the step; Adam: two means and a root
```

A fused optimizer that torch has not, such as row-wise Adagrad, counts as the last: one of torch's will do its work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from dlrm_rs.arguments import check_size
from dlrm_rs.collection import EmbeddingBagCollection
from dlrm_rs.optim import SGD, OptimizerSpec
from dlrm_rs.placement.device_bags import why_not_on_device
from dlrm_rs.row_formats import row_format
from dlrm_rs.table_configs import EmbeddingBagConfig

__all__ = ["Load", "Place", "TablePlan", "table_plan"]

Place = Literal["cpu", "gpu"]

_ID_BYTES, _WEIGHT_BYTES = 8, 4


@dataclass(frozen=True)
class TablePlan:
    """A table and what a step with it costs.

    Attributes:
        name: The table's.
        place: "cpu" or "gpu".
        host_memory: Bytes of its rows and their state, were it on the CPU.
        gpu_memory: Bytes of its rows and of all that trains them, were it on the GPU.
        ids: Ids in a step.
        id_bytes: Of these, and of their weights.
        read: Bytes of rows that a lookup reads.
        updated: Bytes that an update of the host reads and writes.
        swept: Bytes that an update on the GPU reads and writes.
        pcie: Bytes of pooled rows over the bus, the busier way, were it on the CPU.
        never_on_gpu: What of it torch's modules cannot do, so that it stays on the CPU; None if there is nothing.
        why: Why it is where it is.
    """

    name: str
    place: Place
    host_memory: int
    gpu_memory: int
    ids: float
    id_bytes: float
    read: float
    updated: float
    swept: float
    pcie: float
    never_on_gpu: str | None = None
    why: str = ""

    @property
    def memory(self) -> int:
        """Bytes that it takes where it is."""
        return self.host_memory if self.place == "cpu" else self.gpu_memory

    @property
    def moved(self) -> float:
        """Bytes that lookup and update read and write where the table is."""
        return self.read + (self.updated if self.place == "cpu" else self.swept)

    @property
    def bus(self) -> float:
        """Bytes over the bus, the busier way."""
        return self.pcie if self.place == "cpu" else self.id_bytes


@dataclass(frozen=True)
class Load:
    """What a step brings to the tables.

    Attributes:
        batch_size: `B`.
        ids_per_bag: By feature.
        is_weighted: Whether every id has a weight.
        optimizer: What trains the tables, or None.
        output_dtype: Of pooled rows.
    """

    batch_size: int
    ids_per_bag: Mapping[str, float]
    is_weighted: bool
    optimizer: OptimizerSpec | None
    output_dtype: torch.dtype


def table_plan(config: EmbeddingBagConfig, load: Load) -> TablePlan:
    """A table on the CPU.

    Raises:
        ValueError: A size or pooling that cannot be.
        TypeError: A size that is no integer, or a row format that cannot be.
    """
    N = check_size(f"num_embeddings of table {config.name!r}", config.num_embeddings)
    D = check_size(f"embedding_dim of table {config.name!r}", config.embedding_dim)
    is_trained = load.optimizer is not None
    ids = load.batch_size * sum(load.ids_per_bag[feature] for feature in config.feature_names)
    row, state = _row_and_state(config, load.optimizer)
    hot = 4 * D * getattr(config, "hot_rows", 0.0)  # a config of TorchRec's has none
    gpu_memory = N * row * _copies(load.optimizer)
    output = max(load.output_dtype.itemsize, 4) if is_trained else load.output_dtype.itemsize
    never_on_gpu = why_not_on_device(config, is_weighted=load.is_weighted)
    return TablePlan(
        name=config.name,
        place="cpu",
        host_memory=int(N * (row + state + hot)),
        gpu_memory=gpu_memory,
        ids=ids,
        id_bytes=ids * (_ID_BYTES + _WEIGHT_BYTES * load.is_weighted),
        read=ids * row,
        updated=ids * (4 * D + 2 * (row + state)) if is_trained else 0.0,
        swept=ids * 4 * D + 2 * gpu_memory if is_trained else 0.0,
        pcie=load.batch_size * len(config.feature_names) * D * output,
        never_on_gpu=never_on_gpu,
        why="" if never_on_gpu is None else f"stays there: {never_on_gpu}",
    )


def _row_and_state(config: EmbeddingBagConfig, optimizer: OptimizerSpec | None) -> tuple[int, int]:
    """Bytes of a row with its scale, and of what the fused optimizer keeps of it, as the engine has a table of one."""
    stored = row_format(f"data_type of table {config.name!r}", config.data_type)
    if optimizer is not None:  # what concerns other tables, this one alone would refuse
        optimizer = replace(optimizer, table_lr={}, split_bf16=optimizer.split_bf16 and stored == "bf16")
    one_row = EmbeddingBagConfig(config.name, 1, config.embedding_dim, [config.name], data_type=stored)
    report = EmbeddingBagCollection([one_row], optimizer=optimizer).memory_report()[config.name]
    return report["payload"] + report["scales"], report["state"]


def _copies(optimizer: OptimizerSpec | None) -> int:
    if optimizer is None:
        return 1
    if isinstance(optimizer, SGD):
        return 2 + bool(optimizer.momentum) + bool(optimizer.weight_decay)
    return 5
