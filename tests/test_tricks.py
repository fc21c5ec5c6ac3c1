"""Quotient-remainder, mixed dimensions and weighted pooling against what their papers and facebookresearch/dlrm say."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

import dlrm_rs
from batches import batch
from dlrm_rs import PrEmbeddingBag, QREmbeddingBag, WeightedEmbeddingBag


def combined(operation: str, q: Tensor, r: Tensor) -> Tensor:
    if operation == "concat":
        return torch.cat([q, r], dim=1)
    return q * r if operation == "mult" else q + r


def assert_same(module: nn.Module, expected: Callable[..., Tensor], names: list[str], ids: Tensor, *rest: Any) -> None:
    """The output, and the gradient of every parameter; `expected` gets the parameters, then what the module gets."""
    parameters = [module.get_parameter(name) for name in names]
    copies = [parameter.detach().double().requires_grad_() for parameter in parameters]
    out, wanted = module(ids, *rest), expected(*copies, ids, *rest)
    assert_close(out, wanted.float())
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, parameters, grad)
    dense = [part.to_dense() if part.is_sparse else part for part in got]
    assert_close(dense, [part.float() for part in torch.autograd.grad(wanted, copies, grad.double())])


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_quotient_remainder(operation: str, mode: str, dtype: torch.dtype) -> None:
    dims = [7, 5] if operation == "concat" else 7
    module = QREmbeddingBag(50, dims, 8, operation, mode=mode)
    assert (module.weight_q.shape[0], module.weight_r.shape[0]) == (7, 8)
    assert module.embedding_dim == (12 if operation == "concat" else 7)

    def expected(q: Tensor, r: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        pooled = [
            functional.embedding_bag(part, rows, offsets, mode=mode) for part, rows in ((ids // 8, q), (ids % 8, r))
        ]
        return combined(operation, *pooled)

    ids, offsets, _ = batch(50, 9, dtype)
    assert_same(module, expected, ["quotient.weight", "remainder.weight"], ids, offsets[:-1])


def test_quotients_are_exact_above_what_float32_holds() -> None:
    collisions = 3
    ids = torch.arange(2**24 - 5, 2**24 + 2000)
    module = QREmbeddingBag(int(ids[-1]) + 1, 1, collisions, "add", mode="sum")
    with torch.no_grad():
        module.weight_q.copy_(torch.arange(len(module.weight_q))[:, None] % 4096)
        module.weight_r.copy_(torch.tensor([[0.0], [0.25], [0.5]]))
    expected = ids // collisions % 4096 + ids % collisions * 0.25
    assert torch.equal(module(ids[:, None])[:, 0], expected)
    assert not torch.equal((ids / collisions).long(), ids // collisions)  # which would not do


def test_quotient_remainder_with_weights_and_a_fused_optimizer() -> None:
    plain = QREmbeddingBag(50, 6, 8, mode="sum", sparse=True)
    fused = QREmbeddingBag(
        50, 6, 8, mode="sum", _weight=[plain.weight_q, plain.weight_r], optimizer=dlrm_rs.optim.SGD(0.1)
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        ids, offsets, weights = batch(50, 9)
        for module in (plain, fused):
            module(ids, offsets[:-1], weights).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(fused.state_dict(), plain.state_dict())


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_quotient_remainder_has_the_originals_keys(dtype: str) -> None:
    model = nn.ModuleList([nn.Linear(1, 1), QREmbeddingBag(50, 6, 8, dtype=dtype), QREmbeddingBag(9, 2, 4)])
    state = model.state_dict()
    parts = [""] if dtype == "fp32" else ["_format", "_codes", "_scales"]
    first = {f"1.weight_{letter}{part}" for letter in "qr" for part in parts}
    assert set(state) == {"0.weight", "0.bias", "2.weight_q", "2.weight_r"} | first
    again: Any = nn.ModuleList([nn.Linear(1, 1), QREmbeddingBag(50, 6, 8, dtype=dtype), QREmbeddingBag(9, 2, 4)])
    again.load_state_dict(state)
    ids = torch.tensor([[0, 49, 17]])
    assert torch.equal(again[1](ids), model[1](ids))
    assert torch.equal(copy.deepcopy(again)[2](ids % 9), model[2](ids % 9))
    with pytest.raises(RuntimeError, match=r"Missing key.*2\.(quotient\.weight|weight_q)"):
        again.load_state_dict({key: value for key, value in state.items() if not key.startswith("2.")})


def test_quotient_remainder_starts_as_the_original() -> None:
    module = QREmbeddingBag(400, 32, 20)
    for weight in (module.weight_q, module.weight_r):
        assert weight.min() >= 0.05  # sqrt(1 / N)
        assert weight.min() < 0.1
        assert 0.95 < weight.max() <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_collisions": 0}, "num_collisions: expected at least 1, got 0"),
        ({"operation": "sum"}, "operation: expected one of 'mult', 'add', 'concat', got 'sum'"),
        (
            {"embedding_dim": [2, 3]},
            r"embedding_dim: expected equal dims with 'mult', got \[2, 3\]; 'concat' takes any",
        ),
        ({"embedding_dim": [2, 3, 4], "operation": "concat"}, "expected one dim or two"),
        ({"_weight": [torch.ones(4, 2), torch.ones(4, 2)]}, r"_weight: expected shape \(3, 2\)"),
    ],
)
def test_quotient_remainder_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QREmbeddingBag(**{"num_categories": 10, "embedding_dim": 2, "num_collisions": 4, **options})


@pytest.mark.parametrize("bad", [10, -1, 11])  # the last quotient, 2, has room for 11
def test_quotient_remainder_refuses_ids_beyond_its_categories(bad: int) -> None:
    module = QREmbeddingBag(10, 2, 4)
    with pytest.raises(IndexError, match=rf"input\[3\]: expected 0 <= id < 10, num_categories, got {bad}"):
        module(torch.tensor([[1, 9], [0, bad]]))
    assert module(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 2)


@pytest.mark.parametrize("dim", [3, 8])
def test_mixed_dimensions(dim: int) -> None:
    module = PrEmbeddingBag(20, dim, 8)
    ids, offsets, weights = batch(20, 9)

    def pooled(rows: Tensor, *call: Tensor) -> Tensor:
        ids, offsets, weights = call
        return functional.embedding_bag(ids, rows, offsets, mode="sum", per_sample_weights=weights.double())

    def expected(rows: Tensor, projection: Tensor, *call: Tensor) -> Tensor:
        return pooled(rows, *call) @ projection.T

    names = ["embs.weight", "proj.weight"] if dim < 8 else ["embs.weight"]
    assert list(module.state_dict()) == names
    assert module.embs.weight.abs().max() <= (6 / (20 + dim)) ** 0.5
    assert_same(module, expected if dim < 8 else pooled, names, ids, offsets[:-1], weights)


def test_dims_of_tables() -> None:
    sizes = [1000, 10, 100_000]
    rule = [2 * (10 / rows) ** 0.3 * 16 for rows in sizes]
    assert dlrm_rs.md_solver(sizes, 0.3, 32, round_dim=False) == [round(dim) for dim in rule] == [8, 32, 2]
    assert dlrm_rs.md_solver([7, 7], 0.5, 12, round_dim=False) == [12, 12]
    assert dlrm_rs.md_solver([10, 10**9], 1.0, 16) == [16, 1]
    with pytest.raises(ValueError, match="num_embeddings: expected at least one table"):
        dlrm_rs.md_solver([4, 0], 0.3, 8)
    with pytest.raises(ValueError, match="alpha, base_dim: expected at least 0 and 1, got -1 and 8"):
        dlrm_rs.md_solver([4], -1, 8)
    with pytest.raises(ValueError, match="embedding_dim: expected at most base_dim, 4, got 8"):
        PrEmbeddingBag(10, 8, 4)


@pytest.mark.parametrize("sparse", [False, True])
def test_weighted_pooling(sparse: bool) -> None:
    module = WeightedEmbeddingBag(20, 6, sparse=sparse)
    assert torch.equal(module.factors.weight, torch.ones(20, 1))
    assert module.bag.weight.abs().max() <= 20**-0.5
    nn.init.uniform_(module.factors.weight, -1, 1)

    def expected(rows: Tensor, factors: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        return functional.embedding_bag(ids, rows * factors, offsets, mode="sum")

    ids, offsets, _ = batch(20, 9)
    assert_same(module, expected, ["bag.weight", "factors.weight"], ids, offsets[:-1])


def test_weighted_pooling_fused_and_fixed() -> None:
    plain = WeightedEmbeddingBag(20, 6)
    fused = WeightedEmbeddingBag(20, 6, _weight=plain.bag.weight, optimizer=dlrm_rs.optim.SGD(0.1))
    fixed = WeightedEmbeddingBag(
        20, 6, learned=False, _weight=plain.bag.weight, _factors=torch.rand(20, 1), optimizer=dlrm_rs.optim.SGD(0.1)
    )
    before = fixed.factors.weight.clone()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        ids, offsets, _ = batch(20, 9)
        for module in (plain, fused, fixed):
            module(ids, offsets[:-1]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(fused.state_dict(), plain.state_dict())
    assert torch.equal(fixed.factors.weight, before)
    assert not torch.equal(fixed.bag.weight, plain.bag.weight)


def test_sizes_may_be_numpys() -> None:
    five: Any = np.int64(5)
    bags = dlrm_rs.EmbeddingBag(five, five, mode="sum", sparse=True, padding_idx=five - 1)
    assert bags(torch.tensor([[4]])).tolist() == [[0] * 5]
    assert QREmbeddingBag(five * 10, five, five)(torch.tensor([[49]])).shape == (1, 5)


@pytest.mark.parametrize("optimizer", [None, dlrm_rs.optim.SGD(lr=0.1)])
def test_rows_of_half_precision_to_start_from(optimizer: Any) -> None:
    rows, few = torch.randn(10, 4).half(), torch.randn(5, 4).half()
    qr = QREmbeddingBag(10, 4, 5, mode="sum", _weight=[few[:2], few], optimizer=optimizer)
    pr = PrEmbeddingBag(10, 4, 8, _weight=rows, optimizer=optimizer)
    weighted = WeightedEmbeddingBag(10, 4, _weight=rows, _factors=torch.rand(10, 1).half(), optimizer=optimizer)
    tables = [qr.quotient, qr.remainder, pr.embs, weighted.bag]
    assert all(table.weight.dtype is torch.float16 for table in tables)
    assert weighted.factors.weight.dtype is torch.float32
    for bag in (qr, pr, weighted):
        before = [parameter.detach().clone() for parameter in bag.parameters()]
        bag(torch.tensor([[1, 2, 7]])).float().square().sum().backward()
        if optimizer is None:
            assert all(parameter.grad is not None for parameter in bag.parameters())
        else:
            assert not torch.equal(next(bag.parameters()), before[0])
