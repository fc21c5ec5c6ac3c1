"""The learning-rate policy against facebookresearch/dlrm's rules, step after step."""

import copy

import pytest
import torch

import dlrm_rs
from dlrm_rs import LRPolicyScheduler

BASE = 0.5


def by_the_rules(warmup: int, start: int, decay: int, steps: int) -> list[float]:
    """Each step by its rule, or what the step before had."""
    rates: list[float] = []
    for step in range(1, steps + 1):
        if step < warmup:
            rates.append(BASE * step / warmup)
        elif start <= step < start + decay:
            rates.append(max(BASE * ((decay - (step - start)) / decay) ** 2, 1e-7))
        elif decay > 0 and rates:
            rates.append(rates[-1])
        else:
            rates.append(BASE)
    return rates


def sgd(lr: float = BASE) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def run(scheduler: LRPolicyScheduler, steps: int) -> list[float]:
    rates: list[float] = []
    for _ in range(steps):
        rates += map(float, scheduler.get_last_lr())
        scheduler.optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    "policy", [(0, 0, 0), (5, 5, 0), (5, 8, 6), (5, 5, 6), (0, 0, 7), (0, 6, 4), (1, 4, 3), (2, 2, 1), (3, 9, 5000)]
)
def test_every_step(policy: tuple[int, int, int]) -> None:
    got = run(LRPolicyScheduler(sgd(), *policy), 25)
    assert got == pytest.approx(by_the_rules(*policy, 25), rel=1e-12)


def test_it_decays_to_the_least_and_stays() -> None:
    assert run(LRPolicyScheduler(sgd(1e-6), 0, 0, 10), 12)[-4:] == pytest.approx([1e-7] * 4)


def test_it_resumes() -> None:
    whole = run(LRPolicyScheduler(sgd(), 5, 8, 6), 20)
    scheduler = LRPolicyScheduler(sgd(), 5, 8, 6)
    for done in (0, 4, 8):
        assert run(scheduler, 4) == pytest.approx(whole[done : done + 4])
        state = copy.deepcopy([scheduler.state_dict(), scheduler.optimizer.state_dict()])
        scheduler = LRPolicyScheduler(sgd(), 1, 1, 1)
        scheduler.load_state_dict(state[0])
        scheduler.optimizer.load_state_dict(state[1])
    assert run(scheduler, 8) == pytest.approx(whole[12:])


def test_of_a_fused_optimizer() -> None:
    bags = dlrm_rs.EmbeddingBag.from_pretrained(
        torch.zeros(2, 1), freeze=False, mode="sum", optimizer=dlrm_rs.optim.SGD(lr=1.0)
    )
    assert bags.fused_optimizer is not None
    scheduler = LRPolicyScheduler(bags.fused_optimizer, 4, 4, 0)
    for _ in range(2):
        bags(torch.tensor([[1]])).sum().backward()
        bags.fused_optimizer.step()
        scheduler.step()
    assert bags.weight.tolist() == [[0], [-0.25 - 0.5]]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"decay_start_step: expected at least num_warmup_steps, 5, .* got 4"):
        LRPolicyScheduler(sgd(), 5, 4, 0)
    with pytest.raises(ValueError, match="num_decay_steps: expected at least 0, got -1"):
        LRPolicyScheduler(sgd(), 0, 0, -1)
