"""The losses against facebookresearch/dlrm's: torch's losses of the sigmoid."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from dlrm_rs import DLRMLoss


def original(name: str, weights: list[float], threshold: float, logits: Tensor, targets: Tensor) -> Tensor:
    p = logits.sigmoid()
    if 0.0 < threshold < 1.0:
        p = p.clamp(threshold, 1.0 - threshold)
    if name == "mse":
        return functional.mse_loss(p, targets)
    if name == "bce":
        return functional.binary_cross_entropy(p, targets)
    terms = functional.binary_cross_entropy(p, targets, reduction="none")
    return (torch.tensor(weights, dtype=torch.float64)[targets.long()] * terms).mean()


@pytest.mark.parametrize("threshold", [0.0, 0.2])
@pytest.mark.parametrize("name", ["mse", "bce", "wbce"])
def test_value_and_gradient(name: str, threshold: float) -> None:
    weights = [0.25, 1.5] if name == "wbce" else [1.0, 1.0]
    logits = (torch.randn(64, 1) * 3).requires_grad_()
    targets = torch.randint(0, 2, (64, 1)).float()
    loss = DLRMLoss(name, weights, threshold)(logits, targets)
    exact = logits.detach().double().requires_grad_()
    expected = original(name, weights, threshold, exact, targets.double())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    got, wanted = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, exact)[0]
    assert_close(got, wanted.float())
    assert (got == 0).any() == (threshold > 0)


def test_targets_between_and_logits_far_out() -> None:
    targets = torch.rand(64, 1)
    logits = torch.randn(64, 1)
    for name in ("mse", "bce"):
        assert_close(DLRMLoss(name)(logits, targets), original(name, [], 0, logits, targets))
    assert DLRMLoss("bce")(torch.tensor([[-200.0]]), torch.ones(1, 1)).item() == 200


def test_what_it_prints() -> None:
    assert repr(DLRMLoss("wbce", [0.5, 2], 0.1)) == "DLRMLoss('wbce', loss_weights=[0.5, 2.0], loss_threshold=0.1)"
    assert DLRMLoss().state_dict() == {}


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="loss_function: expected one of 'mse', 'bce', 'wbce', got 'hinge'"):
        DLRMLoss("hinge")
    with pytest.raises(ValueError, match=r"loss_weights: expected two finite numbers of at least 0, got \[1.0\]"):
        DLRMLoss("wbce", [1.0])
    with pytest.raises(ValueError, match="loss_weights: expected two finite numbers"):
        DLRMLoss("wbce", [1.0, float("nan")])
    with pytest.raises(ValueError, match=r"expected 1, 1 with 'bce', .*; 'wbce' has weights"):
        DLRMLoss("bce", [1.0, 2.0])
    with pytest.raises(ValueError, match=r"loss_threshold: expected a number from 0 to below 0.5, got 0.5"):
        DLRMLoss("bce", loss_threshold=0.5)
    with pytest.raises(ValueError, match=r"targets: expected the logits' shape, \(2, 1\), got \(2,\)"):
        DLRMLoss()(torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="targets: expected 0 and 1 alone with 'wbce'"):
        DLRMLoss("wbce")(torch.zeros(2, 1), torch.tensor([[0.0], [0.5]]))
