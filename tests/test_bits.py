"""The same bytes for every number of threads and at every level, in forward and in training."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import dlrm_rs
from batches import batch
from dlrm_rs import EmbeddingBagCollection, EmbeddingBagConfig, _dlrm_rs
from dlrm_rs.optim import SGD, Adagrad, OptimizerSpec, RowWiseAdagrad

THREADS = [1, 2, 3, 8]
LEVELS: list[str] = dlrm_rs.info()["simd_available"]
BATCH = 1024
STEPS = 20

# Dims astride the vectors, poolings of every kind, a table of few rows (many duplicates) and one of many.
TABLES = [
    EmbeddingBagConfig("a", 5000, 64, ["a"], pooling="sum"),
    EmbeddingBagConfig("b", 7, 33, ["b", "c"], pooling="mean"),
    EmbeddingBagConfig("d", 300, 17, ["d"], pooling="max"),
    EmbeddingBagConfig("e", 2000, 1, ["e"], pooling="sum"),
    EmbeddingBagConfig("f", 900, 130, ["f"], pooling="mean"),
]
ROWS = [5000, 7, 7, 300, 2000, 900]

pytestmark = pytest.mark.usefixtures("engine_settings")


def calls() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same batches every time: ids, offsets, and the gradient of the output."""
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(4)
    width = 64 + 2 * 33 + 17 + 1 + 130
    for _ in range(STEPS):
        parts = [batch(rows, BATCH) for rows in ROWS]
        lengths = torch.cat([part.offsets.diff() for part in parts])
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        yield torch.cat([part.indices for part in parts]), offsets, torch.randn(BATCH, width, generator=generator)


def train(threads: int, level: str, spec: OptimizerSpec | None) -> list[bytes]:
    """The output of every step, and weights and state (or gradients) after the last."""
    dlrm_rs.set_num_threads(threads)
    _dlrm_rs.set_simd(level)
    torch.manual_seed(3)
    collection = EmbeddingBagCollection(TABLES, optimizer=spec)
    result = []
    for indices, offsets, grad in calls():
        out = collection.lookup(indices, offsets)
        result.append(out.detach())
        out.backward(grad)
    result += [weight.detach() for weight in collection.parameters()]
    if spec is None:
        result += [weight.grad for weight in collection.parameters() if weight.grad is not None]
    else:
        assert collection.fused_optimizer is not None
        result += [tensor for state in collection.fused_optimizer.state.values() for tensor in state.values()]
    return [tensor.numpy().tobytes() for tensor in result]


@pytest.mark.parametrize(
    "spec", [None, SGD(lr=0.1), Adagrad(lr=0.1), RowWiseAdagrad(lr=0.1)], ids=lambda s: s.algorithm if s else "dense"
)
def test_training_gives_the_same_bytes(spec: OptimizerSpec | None) -> None:
    expected = train(1, LEVELS[0], spec)
    others = [(threads, LEVELS[0]) for threads in THREADS[1:]] + [(1, level) for level in LEVELS[1:]]
    for threads, level in [*others, (max(THREADS), LEVELS[-1])]:
        assert train(threads, level, spec) == expected, f"{threads} threads at level {level}"


@pytest.mark.parametrize("kind", ["sparse", "weights", "max_norm", "rows"])
def test_the_other_calls_give_the_same_bytes(kind: str) -> None:
    results = set()
    for threads in THREADS:
        for level in LEVELS:
            dlrm_rs.set_num_threads(threads)
            _dlrm_rs.set_simd(level)
            results.add(call(kind))
    assert len(results) == 1


def call(kind: str) -> bytes:
    """One forward and backward, as bytes."""
    torch.manual_seed(6)
    indices, offsets, weights = batch(3000, 4096)
    weights.requires_grad_(kind == "weights")
    module: dlrm_rs.Embedding | dlrm_rs.EmbeddingBag
    if kind == "rows":
        module = dlrm_rs.Embedding(3000, 33)
        out = module(indices)
    else:
        max_norm = 1.5 if kind == "max_norm" else None
        module = dlrm_rs.EmbeddingBag(3000, 33, max_norm, mode="sum", sparse=kind == "sparse")
        out = module(indices, offsets[:-1], weights)
    out.backward(torch.randn(out.shape))
    grad = module.weight.grad
    assert grad is not None
    result = [module.weight.detach(), out.detach(), grad.to_dense(), weights.grad]
    return b"".join(tensor.numpy().tobytes() for tensor in result if tensor is not None)
