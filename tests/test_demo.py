"""`dlrm-rs`: the demo from beginning to end, its record, and what it says when something is missing."""

import builtins
import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import dlrm_rs
from dlrm_rs import EmbeddingBagCollection, EmbeddingBagConfig
from dlrm_rs.__main__ import main
from dlrm_rs.cli import app
from dlrm_rs.data.flights import Flights, load_flights
from dlrm_rs.demo.arguments import QUICK_FLIGHTS, Arguments
from dlrm_rs.demo.precision import FP32, MIXTURE, STORAGES, TOLERANCE, measure_precisions
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


def precisions_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured of each way to store the tables, by the name of the way."""
    return {row["storage"]: row for row in record["precisions"]["rows"]}


def test_prints_a_row_for_each_way_to_store(finished: tuple[str, Path, dict[str, Any]]) -> None:
    printed, _, record = finished
    rows = precisions_of(record)
    assert list(rows) == [*(storage for storage, *_ in STORAGES), MIXTURE]
    for storage, row in rows.items():
        line = next(line for line in printed.splitlines() if line.startswith(f" {storage}  "))
        assert f"{row['test']['auc']:.4f}" in line
        assert f"{row['table_bytes']:,}" in line
        assert (f"{row['auc_change']:+z.6f}" in line) == (storage != FP32)
    assert "How few bytes?" in printed


def test_bytes_of_rows_are_exact(finished: tuple[str, Path, dict[str, Any]]) -> None:
    record = finished[2]
    D = record["arguments"]["embedding_dim"]
    num_embeddings = load_flights().num_embeddings
    # Of a row: its elements, and where they are codes a scale and a bias of 2 bytes.
    row_bytes = {"fp32": 4 * D, "fp16": 2 * D, "bf16": 2 * D, "int8": D + 4, "int4": D // 2 + 4, "int2": D // 4 + 4}
    for storage, row in precisions_of(record).items():
        formats = record["precisions"]["search"]["formats"] if storage == MIXTURE else {}
        of_table = {f"embeddings.{table}": storage.split()[0] for table in num_embeddings} | formats
        expected = sum(rows * row_bytes[of_table[f"embeddings.{table}"]] for table, rows in num_embeddings.items())
        assert row["table_bytes"] == expected


def test_few_bytes_cost_little(finished: tuple[str, Path, dict[str, Any]]) -> None:
    """The limits are those of full runs; quick ones of five seeds took no more than 0.4 of any."""
    record = finished[2]
    rows = precisions_of(record)
    assert rows[FP32]["test"]["auc"] == pytest.approx(record["dlrm_rs"]["test"]["auc"], abs=1e-6)
    for storage, limit in {"fp16": 1e-4, "bf16": 1e-4, "int8": 2e-4, "int4": 1e-3}.items():
        assert abs(rows[storage]["auc_change"]) < limit
        assert rows[storage]["auc_change"] == rows[storage]["test"]["auc"] - rows[FP32]["test"]["auc"]
    errors = [rows[storage]["error_mean"] for storage in ("fp32", "fp16", "bf16", "int8", "int4", "int2")]
    assert errors[0] == 0
    assert errors == sorted(errors)
    assert rows["int4"]["error_mean"] < rows["int4 minmax"]["error_mean"]


def test_the_mixture_is_within_the_tolerance_where_it_was_chosen(finished: tuple[str, Path, dict[str, Any]]) -> None:
    search = finished[2]["precisions"]["search"]
    assert search["tolerance"] == TOLERANCE
    assert search["validation_auc_change"] >= -TOLERANCE
    assert search["models"] >= 2
    assert search["seconds"] > 0


def test_quantizing_copies_leaves_the_model() -> None:
    flights = load_flights()
    few = Flights(flights.train[:0], flights.validation[:500], flights.test[:500], flights.num_embeddings)
    _, ours = make_backends(flights, Arguments(), steps=10)
    ours.step(flights.train.batch(slice(0, 256)))
    before = copy.deepcopy(ours.model.state_dict())
    precisions = measure_precisions(ours.model, few)
    after = ours.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert isinstance(ours.model.embeddings, EmbeddingBagCollection)
    assert ours.model.embeddings.fused_optimizer is ours.table_optimizer
    assert precisions[FP32].test.auc == pytest.approx(ours.evaluate(few.test).auc, abs=1e-4)


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
