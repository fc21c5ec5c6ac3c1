"""What facebookresearch/dlrm's `dlrm_s_pytorch.py` computes, written anew: its model, its random data, its training.

All random numbers come from NumPy's global state in the order in which that script asks for them, so that its printed
losses are those to expect. `embedding_bag` is the one thing to exchange.
"""

# ruff: noqa: NPY002 - NumPy's global state, as the script

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

SEED = 123  # --numpy-rand-seed


class Batch(NamedTuple):
    """Dense features `(B, P)`, for every table offsets `(B,)` and ids, and targets `(B, 1)`."""

    dense: Tensor
    offsets: Tensor
    ids: list[Tensor]
    targets: Tensor


def batches(sizes: list[int], dense: int, batch: int, count: int, longest: int = 10) -> Iterator[Batch]:
    """Random data: bags of 1 to `longest` different ids."""
    np.random.seed(SEED)
    for _ in range(count):
        X = torch.tensor(np.random.rand(batch, dense).astype(np.float32))
        offsets, ids = [], []
        for rows in sizes:
            bags = []
            for _ in range(batch):
                length = int(np.round(max(1.0, float(np.random.random()) * min(rows, longest))))
                bags.append(np.unique(np.round(np.random.random(length) * (rows - 1)).astype(np.int64)))
            offsets.append(torch.tensor([0, *np.cumsum([len(bag) for bag in bags])[:-1].tolist()]))
            ids.append(torch.tensor(np.concatenate(bags)))
        targets = torch.tensor(np.random.rand(batch, 1).astype(np.float32))
        yield Batch(X, torch.stack(offsets), ids, targets)


def mlp(widths: list[int], *, sigmoid: bool) -> nn.Sequential:
    """Linear layers with ReLU after each, or a sigmoid after the last."""
    layers: list[nn.Module] = []
    for n, m in pairwise(widths):
        linear = nn.Linear(n, m)
        weight = np.random.normal(0.0, np.sqrt(2 / (m + n)), size=(m, n))
        bias = np.random.normal(0.0, np.sqrt(1 / m), size=m)
        linear.weight.data = torch.tensor(weight.astype(np.float32))
        linear.bias.data = torch.tensor(bias.astype(np.float32))
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1], nn.Sigmoid()) if sigmoid else nn.Sequential(*layers)


class ReferenceDLRM(nn.Module):
    """The model; `embedding` makes the module of table `k`, by default a plain table filled as in the script."""

    def __init__(
        self,
        sizes: list[int],
        bottom: list[int],
        top: list[int],
        embedding_bag: Any = nn.EmbeddingBag,
        *,
        embedding: Callable[[int], nn.Module] | None = None,
        interaction: str = "dot",
        itself: bool = False,
        learned: bool = False,
    ) -> None:
        super().__init__()
        D, F = bottom[-1], len(sizes)
        self.interaction, self.itself = interaction, itself

        def plain(k: int) -> nn.Module:
            rows = np.int64(sizes[k])  # the script's sizes are NumPy's
            module: nn.Module = embedding_bag(rows, D, mode="sum", sparse=True)
            bound = np.sqrt(1 / rows)
            weight = np.random.uniform(-bound, bound, size=(rows, D))
            module.get_parameter("weight").data = torch.tensor(weight.astype(np.float32), requires_grad=True)
            return module

        self.emb_l = nn.ModuleList((embedding or plain)(k) for k in range(F))
        self.v_W_l = nn.ParameterList(torch.ones(rows) for rows in sizes) if learned else None
        self.bot_l = mlp(bottom, sigmoid=False)
        pairs = (F + 1) * (F + 2) // 2 if itself else F * (F + 1) // 2
        self.top_l = mlp([D + (pairs if interaction == "dot" else F * D), *top], sigmoid=True)

    def forward(self, batch: Batch) -> Tensor:
        """Probabilities, `(B, 1)`."""
        x = self.bot_l(batch.dense)
        y = []
        for k, bag in enumerate(self.emb_l):
            ids, offsets = batch.ids[k], batch.offsets[k]
            factors = None if self.v_W_l is None else self.v_W_l[k].gather(0, ids)
            y.append(bag(ids, offsets, per_sample_weights=factors))
        z = torch.cat([x, *y], dim=1)
        if self.interaction == "dot":
            X = z.view(len(x), -1, x.shape[1])
            i, j = torch.tril_indices(X.shape[1], X.shape[1], offset=0 if self.itself else -1)
            z = torch.cat([x, (X @ X.mT)[:, i, j]], dim=1)
        p: Tensor = self.top_l(z)
        return p


def train(
    model: ReferenceDLRM, data: Iterator[Batch], optimizer: torch.optim.Optimizer, loss: nn.Module
) -> list[float]:
    """The loss of every step."""
    losses = []
    for batch in data:
        value = loss(model(batch), batch.targets)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses
