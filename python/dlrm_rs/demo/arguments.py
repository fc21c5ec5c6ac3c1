"""What a run of the demo can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

# The features were chosen on held-out months; the sizes and rates here, among a dozen, on the validation weeks. The
# test weeks were looked at meanwhile, so what they tell is a little too good.
BOTTOM_MLP = (64,)  # before the last layer, whose width is the tables' dim
TOP_MLP = (64, 32, 1)
DENSE_WEIGHT_DECAY = 1.0  # much, as a year has few days of weather to learn from

# What `quick` trains on: the last of the training flights.
QUICK_FLIGHTS = 30_000


@dataclass(frozen=True)
class Arguments:
    """Arguments of the demo.

    Attributes:
        epochs: Passes over the training flights. One is best: embeddings of ids overfit in the second.
        batch_size: Flights in a step.
        embedding_dim: `D` of every table.
        table_lr: Learning rate of the tables' Adagrad, falling to 0 over the run.
        dense_lr: Learning rate of the dense layers' AdamW, falling to 0 over the run.
        seed: Of the initial weights and the order of the flights.
        threads: Threads of torch and of the engine; None for what torch has by itself.
        quick: Train on the last `QUICK_FLIGHTS` training flights alone.
    """

    epochs: int = 1
    batch_size: int = 512
    embedding_dim: int = 32
    table_lr: float = 0.005
    dense_lr: float = 0.004
    seed: int = 0
    threads: int | None = None
    quick: bool = False
