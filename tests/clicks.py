"""A small model of clicks, its training in a plain loop and in a pipeline, and what training changes."""

from collections.abc import Generator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

import dlrm_rs
from dlrm_rs import Pipeline
from dlrm_rs.data import Batch, ClickLog
from dlrm_rs.devices import Device
from dlrm_rs.optim import OptimizerSpec, RowWiseAdagrad
from dlrm_rs.pipeline.pipeline import click_loss

ROWS = [3000, 40, 3, 800]
POOLINGS = ["sum", "mean", "sum", "max"]
IDS = [4, 1, 1, 2]
DIM = 8
NAMES = [f"t{t}" for t in range(len(ROWS))]

Updates = Literal["exact", "stale"]


def click_log(steps: int, batch_size: int = 48) -> list[Batch]:
    """Ids of Zipf's law: almost every batch touches rows of the one before."""
    log = ClickLog(ROWS, batch_size, steps, IDS, dense_features=5)
    return [log[k] for k in range(steps)]


def click_model(
    optimizer: OptimizerSpec | None = RowWiseAdagrad(lr=0.05),  # noqa: B008
    output_dtype: torch.dtype = torch.float32,
    device: Device | None = None,
    data_type: str = "fp32",
    poolings: Sequence[str] = POOLINGS,
    hot_rows: float = 0.0,
) -> dlrm_rs.DLRM:
    """The same weights every time."""
    torch.manual_seed(1)
    tables = [
        dlrm_rs.EmbeddingBagConfig(
            f"t{t}",
            rows,
            DIM,
            [f"t{t}"],
            pooling,
            data_type,
            scale_grad_by_freq=pooling == "mean",
            hot_rows=hot_rows,
        )
        for t, (rows, pooling) in enumerate(zip(ROWS, poolings, strict=True))
    ]
    embeddings = dlrm_rs.EmbeddingBagCollection(
        tables, optimizer=optimizer, output_dtype=output_dtype, output_device=device
    )
    return dlrm_rs.DLRM(embeddings, dense_in_features=5, bottom_mlp=[DIM], top_mlp=[16, 1])


def dense_adam(model: nn.Module) -> torch.optim.Adam:
    dense = [parameter for name, parameter in model.named_parameters() if "embedding_bags" not in name]
    return torch.optim.Adam(dense, lr=0.01)


def plain_losses(model: nn.Module, log: Any) -> list[float]:
    return trained(model, dense_adam(model), log)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, log: Any) -> list[float]:
    """The losses of a plain loop over batches, wherever these come from."""
    losses = []
    for batch in log:
        optimizer.zero_grad()
        loss = click_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def pipelined(model: nn.Module, log: Any, **options: Any) -> list[float]:
    return [loss.item() for loss in Pipeline(model, dense_adam(model), log, **options)]


def loop(pipeline: Pipeline) -> Generator[Tensor]:
    """The losses, to be asked for one by one and left."""
    return iter(pipeline)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training changes, tables and their optimizer's state among it."""
    embeddings = model.get_submodule("embeddings")
    assert isinstance(embeddings, dlrm_rs.EmbeddingBagCollection)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if embeddings.fused_optimizer is not None:
        for t, sums in embeddings.fused_optimizer.state_dict()["state"].items():
            tensors |= {f"{t}.{name}": tensor.clone() for name, tensor in sums.items() if isinstance(tensor, Tensor)}
    return tensors


def assert_same_state(model: nn.Module, expected: nn.Module, *, but: tuple[str, ...] = ()) -> None:
    got = state(model)
    for name, tensor in state(expected).items():
        if not name.startswith(but):
            assert torch.equal(got[name], tensor), name
