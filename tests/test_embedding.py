"""`Embedding` against torch's, argument by argument."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import dlrm_rs
from batches import DIMS
from test_embedding_bag import assert_same

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding_idx": {"padding_idx": 2},
    "padding_idx_from_the_back": {"padding_idx": -9},
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
    "scale_grad_by_freq_padding": {"scale_grad_by_freq": True, "padding_idx": 4},
    "max_norm": {"max_norm": 1.5},
    "max_norm_padding": {"max_norm": 1.5, "norm_type": 1.0, "padding_idx": 0},
    "sparse": {"sparse": True},
    "sparse_padding": {"sparse": True, "padding_idx": 0},
}


def pair(*args: Any, **kwargs: Any) -> tuple[nn.Embedding, dlrm_rs.Embedding]:
    """Torch's module and ours, from the same seed."""
    torch.manual_seed(1)
    theirs = nn.Embedding(*args, **kwargs)
    torch.manual_seed(1)
    return theirs, dlrm_rs.Embedding(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dim", DIMS)
def test_every_dim(dim: int, dtype: torch.dtype) -> None:
    theirs, ours = pair(9, dim)
    assert_same(theirs, ours, torch.randint(0, 9, (40,), dtype=dtype))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(options: dict[str, Any]) -> None:
    theirs, ours = pair(9, 33, **options)
    with torch.no_grad():
        for module in (theirs, ours):
            module.weight[0] = 7.0  # a padding row is read as it is
    assert_same(theirs, ours, torch.randint(0, 9, (40,)))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (4, 5), (2, 3, 4), (2, 0, 4)])
def test_every_shape(shape: tuple[int, ...]) -> None:
    theirs, ours = pair(9, 16)
    assert_same(theirs, ours, torch.randint(0, 9, shape))


def test_strided_ids() -> None:
    theirs, ours = pair(9, 5)
    ids = torch.randint(0, 9, (4, 6)).t()
    assert not ids.is_contiguous()
    assert_same(theirs, ours, ids)


@pytest.mark.parametrize("sparse", [False, True])
def test_torch_optimizers(sparse: bool) -> None:
    theirs, ours = pair(9, 17, sparse=sparse)
    ids = torch.randint(0, 9, (10, 20))
    for module in (theirs, ours):
        kind = torch.optim.SparseAdam if sparse else torch.optim.Adam
        optimizer: torch.optim.Optimizer = kind(list(module.parameters()), lr=0.1)
        for step in ids:
            optimizer.zero_grad()
            (module(step) - 1).square().mean().backward()
            optimizer.step()
    assert_close(ours.weight, theirs.weight)


def test_prints_and_starts_as_torchs() -> None:
    for kwargs in OPTIONS.values():
        theirs, ours = pair(50, 7, **kwargs)
        assert repr(ours) == repr(theirs)
        assert torch.equal(ours.weight, theirs.weight)


def test_from_pretrained() -> None:
    rows = torch.randn(6, 3)
    ours = dlrm_rs.Embedding.from_pretrained(rows, padding_idx=1)
    assert torch.equal(ours.weight, rows)
    assert not ours.weight.requires_grad
    assert dlrm_rs.Embedding.from_pretrained(rows, freeze=False).weight.requires_grad
    assert not dlrm_rs.Embedding(6, 3, _freeze=True).weight.requires_grad
