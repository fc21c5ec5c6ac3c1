"""`benches/quality.py` and `benches/dlrm_step.py` on little data: that they compare what they say."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bench_scripts import load
from dlrm_rs.data import Batch, ClickLog
from dlrm_rs.demo.training import Metrics

ROWS = (50, 300)


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    return load("quality")


@pytest.fixture(scope="module")
def dlrm_step() -> ModuleType:
    return load("dlrm_step")


@pytest.fixture
def log(quality: ModuleType) -> Any:
    clicks = ClickLog(ROWS, 64, 6)

    def batches(first: int, last: int) -> Iterator[Batch]:
        return (clicks[k] for k in range(first, last))

    sizes = dict(zip(clicks.keys(), ROWS, strict=True))
    parts = partial(batches, 0, 4), partial(batches, 4, 6)
    return quality.Log("tiny", sizes, 13, 8, (16, 8), (16, 1), 0.05, 0.01, 0.0, 4, *parts)


def test_variants_begin_alike_and_are_trained(quality: ModuleType, log: Any) -> None:
    models = {variant.name: quality.Model(log, variant, 0) for variant in quality.VARIANTS}
    weight = "embedding_bags.t1.weight"  # of codes there is none
    of_numbers = {name: model for name, model in models.items() if not name.startswith("int")}
    rows = {name: model.collection.get_parameter(weight).float() for name, model in of_numbers.items()}
    for name, of_model in rows.items():
        if name in ("fp32, other seed", "fp32, one ulp"):
            assert not torch.equal(of_model, rows["fp32"])
    assert torch.equal(rows["bf16 split"], rows["fp32"])
    torch.testing.assert_close(rows["fp32, one ulp"], rows["fp32"], rtol=2.0**-22, atol=0)
    trained = quality.train(log, quality.VARIANTS, 0)
    for name, (metrics, sizes) in trained.items():
        assert 0 < metrics.log_loss < 2
        assert sizes["t1"]["payload"] == 300 * 8 * {"fp32": 4, "int8": 1, "int4": 0.5}.get(name.split(",")[0], 2)
        assert (sizes["t1"]["hot"] > 0) == name.endswith("hot")
    assert trained == quality.train(log, quality.VARIANTS, 0)


def test_what_is_beyond_its_limit_is_told(quality: ModuleType, log: Any, capsys: pytest.CaptureFixture[str]) -> None:
    variants = [v for v in quality.VARIANTS if v.name in ("fp32", "bf16 split", "bf16", "fp16")]
    auc = {"fp32": 0.7, "bf16 split": 0.8, "bf16": 0.7004, "fp16": 0.7006}
    losses = {"fp32": 0.5, "bf16 split": 0.500009, "bf16": 0.6, "fp16": 0.5}
    trained = {name: (Metrics(auc[name], losses[name]), {"t0": {"payload": 7, "state": 5}}) for name in auc}
    results = quality.compare(variants, trained)
    assert [result.holds for result in results] == [None, True, True, False]
    trained["bf16 split"] = (replace(trained["bf16 split"][0], log_loss=0.50002), trained["bf16 split"][1])
    assert quality.compare(variants, trained)[1].holds is False
    quality.print_results(log, results)
    printed = capsys.readouterr().out
    assert "fp16                    0.500000  +0.000000  0.700600  +0.000600            12  NO" in printed


def test_the_parts_of_a_step(dlrm_step: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = ClickLog((50, 7, 300), 32, 6)
    batches = [log[k] for k in range(6)]
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        sides = dlrm_step.make_sides(log.num_embeddings, 16, "Adagrad")
        dlrm_step.check(sides, batches)
        results = dlrm_step.measure(sides, batches, 1, "Adagrad")
        for side in sides:
            side.tables.param_groups[0]["lr"] *= 1 + (side.name == "dlrm_rs")
        with pytest.raises(AssertionError, match="losses: expected the same of both sides, got"):
            dlrm_step.check(sides, batches)
    assert [result.side for result in results] == ["dlrm_rs", "nn.EmbeddingBag"]
    for result in results:
        assert list(result.parts) == list(dlrm_step.PARTS)
        assert 0 < result.low <= result.step <= result.high
    one = dlrm_step.Result.of("SGD", "x", [[4, 1, 1, 1, 1, 5, 2, 1]])
    assert (one.embeddings, one.step, one.largest) == (6000, 16000, "embeddings")
    dlrm_step.print_results(results)
    assert "largest part" in capsys.readouterr().out
    dlrm_step.save_plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
