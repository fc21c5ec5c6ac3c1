"""Training one of the two models, with the time of its embeddings apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import LambdaLR

from dlrm_rs import optim
from dlrm_rs.collection import EmbeddingBagCollection
from dlrm_rs.data.batch import Batch
from dlrm_rs.data.flights import DENSE, Flights, Samples
from dlrm_rs.demo.arguments import BOTTOM_MLP, DENSE_WEIGHT_DECAY, TOP_MLP, Arguments
from dlrm_rs.demo.torch_bags import TorchEmbeddingBags
from dlrm_rs.model import DLRM
from dlrm_rs.table_configs import EmbeddingBagConfig

# torch's default, as both sides shall have the same.
ADAGRAD_EPS = 1e-10

EVALUATION_BATCH = 8192


@dataclass(frozen=True)
class Metrics:
    """How good predictions are.

    Attributes:
        auc: Area under the ROC curve.
        log_loss: Mean cross entropy, in nats.
    """

    auc: float
    log_loss: float

    @classmethod
    def of(cls, labels: torch.Tensor, probabilities: torch.Tensor) -> Metrics:
        """Compare labels, `(n,)`, with probabilities, `(n,)`."""
        y, p = labels.numpy(), probabilities.double().numpy()
        return cls(float(roc_auc_score(y, p)), float(log_loss(y, p)))


@dataclass
class Backend:
    """A DLRM with one kind of embeddings, its optimizers, and what was measured while it trained.

    Attributes:
        name: Of the embeddings.
        model: The DLRM.
        dense_optimizer: Of the dense layers.
        table_optimizer: Of the tables: torch's, or the fused one, whose step is part of backward.
        schedulers: Of both learning rates.
        samples: Samples seen.
        losses: Training loss of every step.
        step_seconds: Time of every step.
        embedding_seconds: The part of it in the embeddings: forward, backward and update.
    """

    name: str
    model: DLRM
    dense_optimizer: torch.optim.Optimizer
    table_optimizer: torch.optim.Optimizer
    schedulers: Sequence[LambdaLR]
    samples: int = 0
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    embedding_seconds: list[float] = field(default_factory=list)

    def step(self, batch: Batch) -> None:
        """Train on a batch.

        The graph is cut between the pooled embeddings and the dense layers, and its halves run backward one after the
        other: the same computation, with a place to look at the clock.
        """
        start = perf_counter()
        pooled = self.model.embed(batch.sparse)  # (B, F * D)
        looked_up = perf_counter()

        cut = pooled.detach().requires_grad_()
        logits = self.model.score(batch.dense, cut)  # (B, 1)
        loss = binary_cross_entropy_with_logits(logits.squeeze(1), batch.labels)
        loss.backward()
        self.dense_optimizer.step()
        self.dense_optimizer.zero_grad()

        dense_done = perf_counter()
        pooled.backward(cut.grad)
        self.table_optimizer.step()
        self.table_optimizer.zero_grad()
        end = perf_counter()

        for scheduler in self.schedulers:
            scheduler.step()
        self.samples += len(batch.labels)
        self.losses.append(loss.item())
        self.step_seconds.append(end - start)
        self.embedding_seconds.append((looked_up - start) + (end - dense_done))

    def evaluate(self, samples: Samples) -> Metrics:
        """Predict the samples and compare."""
        return evaluate(self.model, samples.batches(EVALUATION_BATCH))

    def table_bytes(self) -> tuple[int, int]:
        """Bytes of the tables' weights, and of their optimizer's state."""
        weights = list(self.model.embeddings.parameters())
        state = [value for weight in weights for value in self.table_optimizer.state[weight].values()]
        return sum(weight.nbytes for weight in weights), sum(t.nbytes for t in state if isinstance(t, torch.Tensor))


def evaluate(model: DLRM, batches: Iterable[Batch]) -> Metrics:
    """Predict the labels of all batches, and compare."""
    labels, logits = [], []
    model.eval()
    with torch.no_grad():
        for batch in batches:
            labels.append(batch.labels)  # (B,)
            logits.append(model(batch.dense, batch.sparse).squeeze(1))  # (B,)
    model.train()
    return Metrics.of(torch.cat(labels), torch.cat(logits).sigmoid())


def make_backends(flights: Flights, arguments: Arguments, steps: int) -> tuple[Backend, Backend]:
    """The two models, torch's embeddings first, with the same initial weights.

    Args:
        flights: The data set.
        arguments: Of the run.
        steps: Steps of the run, over which the learning rates fall to 0.
    """
    tables = [
        EmbeddingBagConfig(feature, rows, arguments.embedding_dim, [feature])
        for feature, rows in flights.num_embeddings.items()
    ]
    torch.manual_seed(arguments.seed)
    theirs = _dlrm(TorchEmbeddingBags(tables), arguments)
    collection = EmbeddingBagCollection(tables, optimizer=optim.Adagrad(arguments.table_lr, eps=ADAGRAD_EPS))
    ours = _dlrm(collection, arguments)
    ours.load_state_dict(theirs.state_dict())

    adagrad = torch.optim.Adagrad(theirs.embeddings.parameters(), lr=arguments.table_lr, eps=ADAGRAD_EPS)
    fused = collection.fused_optimizer
    assert fused is not None, "made with an optimizer"
    return (
        _backend("torch", theirs, adagrad, arguments, steps),
        _backend("dlrm_rs", ours, fused, arguments, steps),
    )


def _dlrm(embeddings: TorchEmbeddingBags | EmbeddingBagCollection, arguments: Arguments) -> DLRM:
    return DLRM(embeddings, len(DENSE), [*BOTTOM_MLP, arguments.embedding_dim], TOP_MLP)


def _backend(
    name: str, model: DLRM, table_optimizer: torch.optim.Optimizer, arguments: Arguments, steps: int
) -> Backend:
    dense = torch.optim.AdamW(
        [*model.bottom.parameters(), *model.top.parameters()], lr=arguments.dense_lr, weight_decay=DENSE_WEIGHT_DECAY
    )
    schedulers = [LambdaLR(optimizer, lambda step: 1 - step / steps) for optimizer in (dense, table_optimizer)]
    return Backend(name, model, dense, table_optimizer, schedulers)
