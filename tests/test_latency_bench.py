"""`benches/latency.py` with few calls: that it times what it says, and judges it."""

from types import ModuleType

import numpy as np
import pytest
import torch

from bench_scripts import load


@pytest.fixture(scope="module")
def latency() -> ModuleType:
    return load("latency")


@pytest.mark.usefixtures("engine_settings")
def test_all_calls_are_timed(latency: ModuleType) -> None:
    results = latency.measure(["fp32", "int8"], [1, 2], rows=50, batch_size=2, calls=latency.TURN + 1)
    kinds = [("fp32", 1), ("fp32", 2), ("int8", 1), ("int8", 2)]
    assert [(result.row_format, result.threads) for result in results[::4]] == kinds
    assert [result.call for result in results] == 4 * ["lookup", "KeyedJaggedTensor", "sum(range)", "clock"]
    for result in results:
        assert 0 < result.p50 <= result.p99
        assert result.calls == 2 * latency.TURN
    lookup, _, _, clock = results[:4]
    assert clock.p50 < lookup.p50 < 1e4


def test_ways_that_differ_are_told(latency: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, batches = latency.make_tables(50, "fp32"), latency.make_batches(50, 2)
    with torch.no_grad():
        latency.check(tables, batches)
        calls = latency.calls_of(tables)
        monkeypatch.setattr(
            latency, "calls_of", lambda _: {**calls, "lookup": lambda batch: tables(batch).values() + 1}
        )
        with pytest.raises(AssertionError, match="lookup and KeyedJaggedTensor: expected the same rows of both"):
            latency.check(tables, batches)


def test_what_is_beyond_its_limit_is_told(latency: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def result(call: str, usual: int, slow: int) -> object:
        return latency.Result.of("fp32", 2, call, np.array([usual] * 95 + [slow] * 5))

    latency.print_results([result("a", 9000, 20_000), result("b", 9000, 30_000), result("c", 11_000, 11_000)], 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["fp32", "2", "a", "9.00", "20.00", "2.22"]
    assert lines[2].split() == ["fp32", "2", "b", "9.00", "30.00", "3.33", "above", "10", "us", "or", "3x"]
    assert lines[3].split()[3:] == ["11.00", "11.00", "1.00", "above", "10", "us", "or", "3x"]
    latency.print_results([result("clock", 20_000, 90_000)], 1)
    latency.print_results([result("a", 20_000, 90_000)], 16)  # which no target is for
    assert "above" not in capsys.readouterr().out
