"""`dlrm-rs`: the demo from beginning to end, its record, and what it says when something is missing."""

import builtins
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import dlrm_rs
from dlrm_rs import EmbeddingBagConfig
from dlrm_rs.__main__ import main
from dlrm_rs.cli import app
from dlrm_rs.data.flights import load_flights
from dlrm_rs.demo.arguments import QUICK_FLIGHTS, Arguments
from dlrm_rs.demo.torch_bags import TorchEmbeddingBags
from dlrm_rs.demo.training import make_backends


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """What `dlrm-rs demo --quick` printed, where it wrote, and its record."""
    threads = torch.get_num_threads(), dlrm_rs.get_num_threads()
    output = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    arguments = ["demo", "--quick", "--threads", "2", "--seed", "3", "--output", str(output)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"}, catch_exceptions=False)
    torch.set_num_threads(threads[0])
    dlrm_rs.set_num_threads(threads[1])
    assert result.exit_code == 0
    return result.output, output, json.loads((output / "demo.json").read_text())


def test_prints_a_row_for_each(finished: tuple[str, Path, dict[str, Any]]) -> None:
    printed, _, record = finished
    for name in ("torch", "dlrm_rs"):
        row = next(line for line in printed.splitlines() if line.startswith(f" {name} "))
        assert f"{record[name]['test']['auc']:.4f}" in row
        assert f"{record[name]['table_bytes']:,}" in row
    assert f"{record['logistic_regression']['test']['auc']:.4f}" in printed
    assert "Same model?" in printed


def test_the_models_are_the_same(finished: tuple[str, Path, dict[str, Any]]) -> None:
    record = finished[2]
    assert abs(record["auc_difference"]) < 1e-3
    assert record["auc_difference"] == record["dlrm_rs"]["test"]["auc"] - record["torch"]["test"]["auc"]
    assert record["dlrm_rs"]["table_bytes"] == record["torch"]["table_bytes"]
    assert record["dlrm_rs"]["losses"][0] == pytest.approx(record["torch"]["losses"][0], rel=1e-6)


def test_the_record_is_whole(finished: tuple[str, Path, dict[str, Any]]) -> None:
    record = finished[2]
    assert record["threads"] == 2
    assert record["arguments"] == {**vars(Arguments()), "quick": True, "threads": 2, "seed": 3}
    assert {"processor", "cores", "system", "python", "torch", "dlrm_rs", "simd", "commit", "time"} <= set(
        record["machine"]
    )
    steps = math.ceil(QUICK_FLIGHTS / record["arguments"]["batch_size"])
    for name in ("torch", "dlrm_rs"):
        result = record[name]
        assert len(result["losses"]) == steps
        assert sum(result["losses"][-20:]) < sum(result["losses"][:20])
        assert 0.6 < result["test"]["auc"] < 0.8
        assert 0 < result["embedding_ms"][0] < result["step_ms"][0]
        low, high = result["embedding_ms"][1:]
        assert low <= result["embedding_ms"][0] <= high
        assert result["samples_per_second"] > 0
        assert result["state_bytes"] >= result["table_bytes"]  # Adagrad has a number per weight


def test_the_picture_is_a_png(finished: tuple[str, Path, dict[str, Any]]) -> None:
    picture = (finished[1] / "demo.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 10_000


def test_a_step_in_two_halves_is_a_step() -> None:
    """Cutting the graph to time the embeddings leaves weights as a plain step does, but for rounding."""
    flights = load_flights()
    batch = flights.train.batch(slice(0, 256))
    cut, _ = make_backends(flights, Arguments(), steps=10)
    plain, _ = make_backends(flights, Arguments(), steps=10)
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        cut.step(batch)
        logits = plain.model(batch.dense, batch.sparse).squeeze(1)
        torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels).backward()
        plain.dense_optimizer.step()
        plain.table_optimizer.step()
    for a, b in zip(cut.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_torchs_tables_want_one_feature_each() -> None:
    with pytest.raises(ValueError, match=r"tables: expected one feature each, got \['a', 'b'\] for 't'"):
        TorchEmbeddingBags([EmbeddingBagConfig("t", 4, 2, ["a", "b"])])


def test_info() -> None:
    result = CliRunner().invoke(app, ["info"], catch_exceptions=False)
    assert result.exit_code == 0
    assert dlrm_rs.__version__ in result.output
    assert dlrm_rs.info()["simd"] in result.output


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Imports of the command's modules begin anew, so that what is taken away is missed."""
    for name in [name for name in sys.modules if name == "dlrm_rs.cli" or name.startswith("dlrm_rs.demo")]:
        monkeypatch.delitem(sys.modules, name)
    return monkeypatch


@pytest.mark.parametrize("extra", ["typer", "rich"])
def test_a_missing_extra_is_named(extra: str, without: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == extra:
            raise ModuleNotFoundError(f"No module named {extra!r}", name=extra)
        return real(name, *args, **kwargs)

    without.setattr(builtins, "__import__", missing)
    with pytest.raises(SystemExit, match=rf'{extra} is not installed; pip install "dlrm_rs\[demo\]"'):
        main()
