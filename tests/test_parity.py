"""`replace_embeddings` on real data: training goes as with torch's own modules, step for step."""

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import dlrm_rs
from dlrm_rs.data.flights import DENSE, Flights, load_flights
from dlrm_rs.demo.torch_bags import TorchEmbeddingBags

STEPS = 200
BATCH = 128

MakeOptimizer = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


@pytest.fixture(scope="module")
def flights() -> Flights:
    return load_flights()


def make_model(flights: Flights, sparse: bool) -> dlrm_rs.DLRM:
    tables = [dlrm_rs.EmbeddingBagConfig(name, rows, 8, [name]) for name, rows in flights.num_embeddings.items()]
    return dlrm_rs.DLRM(TorchEmbeddingBags(tables, sparse=sparse), len(DENSE), [32, 8], [32, 1])


def losses(model: dlrm_rs.DLRM, make_optimizer: MakeOptimizer, flights: Flights) -> list[float]:
    """Train `STEPS` steps, the tables by the optimizer under test and the dense layers by SGD."""
    tables = make_optimizer(model.embeddings.parameters())
    dense = torch.optim.SGD([*model.bottom.parameters(), *model.top.parameters()], lr=0.01)
    history = []
    for batch in flights.train[: STEPS * BATCH].batches(BATCH, seed=0):
        loss = binary_cross_entropy_with_logits(model(batch.dense, batch.sparse).squeeze(1), batch.labels)
        tables.zero_grad()
        dense.zero_grad()
        loss.backward()
        tables.step()
        dense.step()
        history.append(loss.item())
    return history


@pytest.mark.parametrize(
    ("sparse", "make_optimizer"),
    [
        pytest.param(False, lambda weights: torch.optim.SGD(weights, lr=0.1), id="SGD, dense gradients"),
        pytest.param(True, lambda weights: torch.optim.SGD(weights, lr=0.1), id="SGD, sparse gradients"),
        pytest.param(False, lambda weights: torch.optim.Adagrad(weights, lr=0.01), id="Adagrad, dense gradients"),
        pytest.param(True, lambda weights: torch.optim.Adagrad(weights, lr=0.01), id="Adagrad, sparse gradients"),
        pytest.param(True, lambda weights: torch.optim.SparseAdam(list(weights), lr=0.001), id="SparseAdam"),
    ],
)
def test_the_loss_follows_torchs(sparse: bool, make_optimizer: MakeOptimizer, flights: Flights) -> None:
    theirs = make_model(flights, sparse)
    ours = dlrm_rs.replace_embeddings(copy.deepcopy(theirs))
    assert sum(isinstance(module, dlrm_rs.EmbeddingBag) for module in ours.modules()) == len(flights.num_embeddings)
    assert list(ours.state_dict()) == list(theirs.state_dict())

    expected = torch.tensor(losses(theirs, make_optimizer, flights), dtype=torch.float64)
    got = torch.tensor(losses(ours, make_optimizer, flights), dtype=torch.float64)
    assert len(expected) == STEPS
    assert expected[-50:].mean() < expected[:50].mean()  # it learns, so there is something to follow
    relative = ((got - expected).abs() / expected).max().item()
    assert relative < 1e-5
