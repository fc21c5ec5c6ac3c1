"""`benches/hybrid.py` on small tables and a stand-in: its sides do the same, and its figures are what they say."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dlrm_rs
from bench_scripts import load
from dlrm_rs.data import SHAPES
from dlrm_rs.devices import StandIn, output_device

pytestmark = pytest.mark.usefixtures("one_torch_thread")

B = 32


@pytest.fixture(scope="module")
def hybrid() -> ModuleType:
    return load("hybrid")


@pytest.fixture
def case(hybrid: ModuleType) -> Any:
    rows = tuple(min(n, 200) for n in SHAPES["KAGGLE"].num_embeddings)
    return hybrid.Case("KAGGLE", rows, B, 1.05, 6)


def test_every_side_of_a_stand_in_is_measured(
    hybrid: ModuleType, case: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = 0.02
    device = StandIn(dense * 0.7, rest=dense * 0.3, copies=False)
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        cpu, results = hybrid.run(case, device, dense, 1, tmp_path / "trace.json")
    names = ["a nn.EmbeddingBag, CPU", "b dlrm_rs, plain", "c dlrm_rs, exact", "c dlrm_rs, stale"]
    assert [result.side for result in results] == names
    for result in results:
        assert result.step > 0.8 * dense  # the time between two steps is no more exact
        assert result.samples == B / result.step
        assert result.idle == max(1 - dense / result.step, 0)
        if result.side[0] in "bc":
            assert result.hidden == (cpu + dense - result.step) / min(cpu, dense)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert (tmp_path / "trace.json").is_file()


def steps_of(hybrid: ModuleType, **seconds: float) -> list[Any]:
    names = {"a": "a nn.EmbeddingBag, CPU", "exact": "c dlrm_rs, exact", "stale": "c dlrm_rs, stale", "d": "d all"}
    hidden = {"exact": 0.86, "stale": 0.94}
    return [hybrid.Result(names[side], step, 0.0, B / step, None, hidden.get(side)) for side, step in seconds.items()]


def test_what_is_wanted_is_told(hybrid: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    results = steps_of(hybrid, a=12.0, exact=2.0, stale=1.0, d=1.5)
    got = [asdict(goal) | {"holds": goal.holds} for goal in hybrid.goals(results, is_gpu=True)]
    assert got == [
        {"text": "exact over a", "wanted": 5.0, "got": 6.0, "holds": True},
        {"text": "exact over d", "wanted": 0.7, "got": 0.75, "holds": True},
    ]
    assert len(hybrid.goals(steps_of(hybrid, a=9.0, exact=2.0, stale=1.0), is_gpu=True)) == 1  # d did not fit
    on_stand_in = hybrid.goals(results, is_gpu=False)
    assert [goal.holds for goal in on_stand_in] == [True, False]
    hybrid.print_goals(on_stand_in)
    assert capsys.readouterr().out.splitlines() == [
        "  exact hides 0.86, wanted 0.85: reached",
        "  stale hides 0.94, wanted 0.95: NOT reached",
    ]


def test_torchs_tables_and_ours_do_the_same(hybrid: ModuleType, case: Any) -> None:
    device, batches = StandIn(0.0, copies=False), case.batches()
    torchs = hybrid.dense_model(hybrid.TorchBags(case, torch.device("cpu")), case, device)
    ours = hybrid.ours(case, device)
    weights = [bag.weight.detach().clone() for bag in torchs.embeddings.bags]
    names = [f"embedding_bags.t{t}.weight" for t, _ in enumerate(weights)]
    ours.embeddings.load_state_dict(dict(zip(names, weights, strict=True)))
    rows = [model.embeddings(batches[0].sparse).values().detach() for model in (torchs, ours)]
    torch.testing.assert_close(*rows)
    ours._gradients = torchs._gradients
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        for model in (torchs, ours):
            assert len(hybrid.plain_steps(model, case, batches, device)) == case.steps
    moved = ours.embeddings.state_dict()
    for name, bag, before in zip(names, torchs.embeddings.bags, weights, strict=True):
        torch.testing.assert_close(moved[name], bag.weight.detach())
        assert not torch.equal(moved[name], before)


def test_the_share_after_the_gradient_of_rows_is_that_of_the_models_multiplications(
    hybrid: ModuleType, case: Any
) -> None:
    class Rows(torch.nn.Module):
        def embedding_bag_configs(self) -> list[dlrm_rs.EmbeddingBagConfig]:
            return [dlrm_rs.EmbeddingBagConfig(f"t{t}", 1, case.dim, [f"t{t}"]) for t, _ in enumerate(case.rows)]

    def products(run: Any) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return float(counter.get_total_flops() / (2 * B))

    model = dlrm_rs.DLRM(Rows(), hybrid.DENSE_FEATURES, [*hybrid.BOTTOM, case.dim], hybrid.TOP)
    dense = torch.randn(B, hybrid.DENSE_FEATURES)
    rows = torch.randn(B, case.dim * len(case.rows), requires_grad=True)
    vectors = len(case.rows) + 1
    bottom = products(lambda: model.bottom(dense))
    top = products(lambda: model.top(torch.randn(B, case.dim + vectors * (vectors - 1) // 2)))
    whole = products(lambda: model.score(dense, rows).sum().backward())
    first = hybrid.DENSE_FEATURES * hybrid.BOTTOM[0]
    assert hybrid.share_after_rows(case) == pytest.approx((top + 2 * bottom - first) / whole)


@pytest.fixture
def gpu() -> Iterator[Any]:
    yield output_device("cuda")
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("over_the_bus", [False, True])
def test_torchs_tables_on_a_gpu_do_what_those_on_the_cpu_do(
    hybrid: ModuleType, case: Any, gpu: Any, over_the_bus: bool
) -> None:
    torch.manual_seed(0)
    here = hybrid.TorchBags(case, torch.device("cpu"))
    torch.manual_seed(0)
    there = hybrid.TorchBags(case, gpu.torch_device, over_the_bus)
    for batch in case.batches():
        for bags in (here, there):
            optimizer = torch.optim.SGD(bags.parameters(), lr=0.1)
            optimizer.zero_grad()
            bags(batch.sparse).values().square().sum().backward()
            optimizer.step()
    torch.cuda.synchronize()
    for ours, theirs in zip(here.bags, there.bags, strict=True):
        torch.testing.assert_close(theirs.weight.detach().cpu(), ours.weight.detach(), rtol=1e-4, atol=1e-5)
