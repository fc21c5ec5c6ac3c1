"""`torch.utils.checkpoint` around lookups: what is computed twice is learned once."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import dlrm_rs

SPECS: dict[str, Any] = {
    "torch": None,
    "sgd": dlrm_rs.optim.SGD(lr=0.1),
    "adagrad": dlrm_rs.optim.Adagrad(lr=0.1),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("mode", ["sum", "max"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_model_learns_as_without(use_reentrant: bool, mode: str, spec: Any) -> None:
    model = nn.Sequential(dlrm_rs.EmbeddingBag(6, 3, mode=mode, optimizer=spec), nn.Linear(3, 4), nn.Tanh())
    copied = copy.deepcopy(model)
    assert isinstance(copied[0], dlrm_rs.EmbeddingBag)
    ids = torch.tensor([[0, 2], [2, 2], [4, 1]])

    def checkpointed(ids: Tensor) -> Tensor:
        # A reentrant checkpoint has gradients only where an input has.
        anchor = torch.zeros((), requires_grad=True)
        out: Tensor = checkpoint(lambda ids, _: copied(ids), ids, anchor, use_reentrant=use_reentrant)
        return out

    for _ in range(3):
        expected, got = model(ids), checkpointed(ids)
        assert_close(got, expected)
        for out in (expected, got):
            out.square().sum().backward()
    for (name, expected), got in zip(model.named_parameters(), copied.parameters(), strict=True):
        assert_close(got, expected, msg=name)
        assert_close(got.grad, expected.grad, msg=name)
