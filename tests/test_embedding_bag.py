"""`EmbeddingBag` against torch's, argument by argument."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import dlrm_rs
from batches import DIMS, batch

MODES = ["sum", "mean", "max"]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "include_last_offset": {"include_last_offset": True},
    "padding_idx": {"padding_idx": 2},
    "padding_idx_from_the_back": {"padding_idx": -1},
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
    "max_norm": {"max_norm": 1.5},
    "max_norm_1": {"max_norm": 2.0, "norm_type": 1.0},
    "max_norm_inf": {"max_norm": 0.5, "norm_type": float("inf"), "padding_idx": 0},
    "sparse": {"sparse": True},
    "sparse_padding": {"sparse": True, "padding_idx": 0},
}


def pair(*args: Any, **kwargs: Any) -> tuple[nn.EmbeddingBag, dlrm_rs.EmbeddingBag]:
    """Torch's module and ours, from the same seed."""
    torch.manual_seed(1)
    theirs = nn.EmbeddingBag(*args, **kwargs)
    torch.manual_seed(1)
    return theirs, dlrm_rs.EmbeddingBag(*args, **kwargs)


def assert_same(theirs: nn.Module, ours: nn.Module, *inputs: Tensor, **kwargs: Tensor) -> None:
    """The same output, the same gradient of the weight, and the same weight afterwards."""
    expected, got = theirs(*inputs, **kwargs), ours(*inputs, **kwargs)
    assert_close(got, expected)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    got.backward(grad)
    assert isinstance(ours.weight, Tensor)
    assert isinstance(theirs.weight, Tensor)
    assert ours.weight.grad is not None
    assert theirs.weight.grad is not None
    assert ours.weight.grad.is_sparse == theirs.weight.grad.is_sparse
    assert_close(ours.weight.grad.to_dense(), theirs.weight.grad.to_dense())
    assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", DIMS)
def test_every_dim(dim: int, mode: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(9, dim, mode=mode)
    indices, offsets, _ = batch(9, 12, dtype)
    assert_same(theirs, ours, indices, offsets[:-1])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_every_option(mode: str, options: dict[str, Any]) -> None:
    if mode == "max" and ("sparse" in options or "scale_grad_by_freq" in options):
        pytest.skip("torch refuses it too")
    if "scale_grad_by_freq" in options and not torch_counts_right():
        pytest.skip("this version of torch divides by the count of another row")
    theirs, ours = pair(9, 33, mode=mode, **options)
    indices, offsets, _ = batch(9, 12)
    assert_same(theirs, ours, indices, offsets if "include_last_offset" in options else offsets[:-1])


def torch_counts_right() -> bool:
    """Whether torch's EmbeddingBag scales by frequency as it says; it did not in 2.6."""
    theirs = nn.EmbeddingBag(4, 1, mode="sum", scale_grad_by_freq=True)
    theirs(torch.tensor([[1, 1, 2]])).sum().backward()
    return theirs.weight.grad is not None and theirs.weight.grad.flatten().tolist() == [0, 1, 1, 0]


def test_scale_grad_by_freq() -> None:
    ours = dlrm_rs.EmbeddingBag(9, 5, mode="sum", scale_grad_by_freq=True)
    theirs = nn.Embedding(9, 5, scale_grad_by_freq=True, _weight=ours.weight.detach().clone())
    ids, grad = torch.randint(0, 9, (6, 4)), torch.randn(6, 5)
    ours(ids).backward(grad)
    theirs(ids).sum(1).backward(grad)
    assert_close(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (3, 7), (0, 4)])
def test_bags_of_one_length(shape: tuple[int, int], mode: str) -> None:
    theirs, ours = pair(9, 16, mode=mode, padding_idx=0)
    assert_same(theirs, ours, torch.randint(0, 9, shape))


def test_bags_of_length_zero() -> None:
    # torch fails on this one, in arange.
    assert_close(dlrm_rs.EmbeddingBag(9, 16)(torch.empty(4, 0, dtype=torch.int64)), torch.zeros(4, 16))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("offsets", [[], [0], [0, 0, 0]])
def test_no_ids(mode: str, offsets: list[int]) -> None:
    theirs, ours = pair(9, 16, mode=mode)
    assert_same(theirs, ours, torch.empty(0, dtype=torch.int64), torch.tensor(offsets, dtype=torch.int64))


def test_one_row() -> None:
    theirs, ours = pair(1, 5, mode="sum")
    assert_same(theirs, ours, torch.zeros(7, dtype=torch.int64), torch.tensor([0, 3, 3]))


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("bounds", [torch.int32, torch.int64])
def test_ids_and_offsets_of_different_dtypes(ids: torch.dtype, bounds: torch.dtype) -> None:
    theirs, ours = pair(9, 5)
    indices, offsets, _ = batch(9, 6)
    assert_same(theirs, ours, indices.to(ids), offsets[:-1].to(bounds))


def test_strided_inputs() -> None:
    theirs, ours = pair(9, 5, mode="sum")
    indices = torch.randint(0, 9, (4, 6)).t()
    assert not indices.is_contiguous()
    assert_same(theirs, ours, indices, per_sample_weights=torch.rand(4, 6).t())
    assert_same(theirs, ours, indices.reshape(-1)[::2], torch.tensor([0, 9, 4, 9])[::2])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_per_sample_weights(padding_idx: int | None, sparse: bool) -> None:
    theirs, ours = pair(9, 17, mode="sum", padding_idx=padding_idx, sparse=sparse)
    indices, offsets, weights = batch(9, 12)
    grads = []
    for module in (theirs, ours):
        leaf = weights.clone().requires_grad_()
        out = module(indices, offsets[:-1], leaf)
        (out * torch.arange(out.numel()).view_as(out) / 100).sum().backward()
        assert module.weight.grad is not None
        grads.append((out, leaf.grad, module.weight.grad.to_dense()))
    assert_close(grads[1], grads[0])


def test_per_sample_weights_alone_can_be_trained() -> None:
    theirs, ours = pair(9, 17, mode="sum")
    indices, offsets, weights = batch(9, 12)
    grads = []
    for module in (theirs, ours):
        module.requires_grad_(False)
        leaf = weights.clone().requires_grad_()
        module(indices, offsets[:-1], leaf).square().sum().backward()
        assert module.weight.grad is None
        grads.append(leaf.grad)
    assert_close(grads[1], grads[0])


OPTIMIZERS: dict[str, tuple[bool, Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": (False, lambda params: torch.optim.SGD(params, lr=0.1)),
    "sgd_momentum": (False, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)),
    "sgd_sparse": (True, lambda params: torch.optim.SGD(params, lr=0.1)),
    "adagrad": (False, lambda params: torch.optim.Adagrad(params, lr=0.1)),
    "adagrad_sparse": (True, lambda params: torch.optim.Adagrad(params, lr=0.1)),
    "sparse_adam": (True, lambda params: torch.optim.SparseAdam(params, lr=0.1)),
    "adam": (False, lambda params: torch.optim.Adam(params, lr=0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_optimizers(name: str) -> None:
    sparse, make = OPTIMIZERS[name]
    theirs, ours = pair(9, 33, mode="sum", sparse=sparse)
    batches = [batch(9, 12) for _ in range(10)]
    for module in (theirs, ours):
        optimizer = make(list(module.parameters()))
        for indices, offsets, _ in batches:
            optimizer.zero_grad()
            (module(indices, offsets[:-1]) - 1).square().mean().backward()
            optimizer.step()
    assert_close(ours.weight, theirs.weight)


def test_gradients_of_several_calls_add_up() -> None:
    for sparse in (False, True):
        theirs, ours = pair(9, 5, mode="mean", sparse=sparse)
        for indices, offsets, _ in [batch(9, 12) for _ in range(3)]:
            assert_same(theirs, ours, indices, offsets[:-1])


def test_sparse_gradient_is_coalesced() -> None:
    ours = dlrm_rs.EmbeddingBag(9, 2, mode="sum", sparse=True)
    # `weight.grad` would not say so: torch drops the flag when it accumulates.
    (grad,) = torch.autograd.grad(ours(torch.tensor([[7, 1, 7]])).sum(), ours.weight)
    assert grad.is_coalesced()
    assert grad.indices().tolist() == [[1, 7]]
    assert grad.values().tolist() == [[1, 1], [2, 2]]


def test_arguments_are_torchs() -> None:
    for ours, theirs in (
        (dlrm_rs.EmbeddingBag, nn.EmbeddingBag),
        (dlrm_rs.Embedding, nn.Embedding),
        (dlrm_rs.EmbeddingBag.forward, nn.EmbeddingBag.forward),
        (dlrm_rs.Embedding.forward, nn.Embedding.forward),
        (dlrm_rs.EmbeddingBag.from_pretrained, nn.EmbeddingBag.from_pretrained),
        (dlrm_rs.Embedding.from_pretrained, nn.Embedding.from_pretrained),
    ):
        signature = [
            [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.kind != p.KEYWORD_ONLY]
            for function in (ours, theirs)
        ]
        assert signature[0] == signature[1]


def test_prints_as_torchs() -> None:
    for kwargs in ({}, {"max_norm": 1.0, "norm_type": 1.0, "padding_idx": 1, "scale_grad_by_freq": True}):
        theirs, ours = pair(10, 3, **kwargs)
        assert repr(ours) == repr(theirs)
    fused = dlrm_rs.EmbeddingBag(10, 3, optimizer=dlrm_rs.optim.SGD(lr=0.1))
    assert repr(fused) == "EmbeddingBag(10, 3, mode='mean', optimizer=sgd)"


def test_starts_as_torchs() -> None:
    theirs, ours = pair(50, 7, padding_idx=-2)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.weight[48], torch.zeros(7))
    torch.manual_seed(3)
    theirs.reset_parameters()
    torch.manual_seed(3)
    ours.reset_parameters()
    assert torch.equal(ours.weight, theirs.weight)


def test_from_pretrained() -> None:
    rows = torch.randn(6, 3)
    ours = dlrm_rs.EmbeddingBag.from_pretrained(rows, mode="sum", padding_idx=1, optimizer=dlrm_rs.optim.SGD(lr=0.1))
    assert torch.equal(ours.weight, rows)
    assert not ours.weight.requires_grad
    assert (ours.mode, ours.padding_idx) == ("sum", 1)
    assert not ours(torch.tensor([[0, 2]])).requires_grad
    rows.zero_()
    assert ours.weight.any()  # a copy


def test_weight_is_the_engines_memory() -> None:
    ours = dlrm_rs.EmbeddingBag(6, 3, mode="sum")
    rows = ours._tables.handle.weight(0)
    assert rows.ctypes.data == ours.weight.data_ptr()
    with torch.no_grad():
        ours.weight[4] = torch.tensor([1.0, 2.0, 3.0])
    assert rows[4].tolist() == [1, 2, 3]
    assert ours(torch.tensor([[4, 4]])).tolist() == [[2, 4, 6]]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient(mode: Callable[[], Any]) -> None:
    theirs, ours = pair(9, 5, max_norm=1.0)
    indices, offsets, _ = batch(9, 12)
    with mode():
        out = ours(indices, offsets[:-1])
        assert_close(out, theirs(indices, offsets[:-1]))
    assert not out.requires_grad
    assert_same(theirs, ours, indices, offsets[:-1])


def test_default_device_of_the_user_is_not_taken() -> None:
    with torch.device("meta"):
        ours = dlrm_rs.EmbeddingBag(9, 5, mode="max")
        assert ours.weight.is_cpu
        indices = torch.tensor([[1, 2]], device="cpu")
        ours(indices).sum().backward()
    assert ours.weight.grad is not None
    assert ours.weight.grad.is_cpu


def test_change_of_ids_before_backward_is_reported() -> None:
    ours = dlrm_rs.EmbeddingBag(9, 5)
    ids = torch.tensor([[1, 2]])
    out = ours(ids)
    ids.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("optimizer", [None, dlrm_rs.optim.SGD(lr=0.1)])
def test_change_of_rows_before_the_gradient_of_weights_is_reported(optimizer: dlrm_rs.optim.SGD | None) -> None:
    ours = dlrm_rs.EmbeddingBag(9, 5, mode="sum", optimizer=optimizer)
    weights = torch.ones(1, 2, requires_grad=True)
    out = ours(torch.tensor([[1, 2]]), per_sample_weights=weights)
    with torch.no_grad():
        ours.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_second_derivative_is_refused() -> None:
    ours = dlrm_rs.EmbeddingBag(9, 5)
    out = ours(torch.tensor([[1, 2]]))
    (grad,) = torch.autograd.grad(out.square().sum(), ours.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_options_can_change_as_torchs_and_others_are_refused() -> None:
    theirs, ours = pair(9, 5, mode="sum")
    indices, offsets, _ = batch(9, 12)
    for module in (theirs, ours):
        module.include_last_offset = True
        module.sparse = True
        module.max_norm = 1.0
    assert_same(theirs, ours, indices, offsets)
    ours.mode = "mean"
    with pytest.raises(ValueError, match="mode, padding_idx: expected 'sum' and None, fixed when"):
        ours(indices, offsets)
