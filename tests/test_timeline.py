"""What a pipeline tells of its time: the trace and the summary."""

import json
from pathlib import Path

import pytest

from clicks import click_log, click_model, dense_adam
from dlrm_rs import Pipeline
from dlrm_rs.devices import StandIn

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_the_profile_is_a_trace_of_every_stage(tmp_path: Path) -> None:
    model = click_model(device=StandIn(latency=0.001))
    pipeline = Pipeline(model, dense_adam(model), click_log(7), profile=tmp_path / "trace.json")
    list(pipeline)
    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    tracks = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    batches = {
        stage: {event["args"]["batch"] for event in spans if event["name"] == stage}
        for stage in {event["name"] for event in spans}
    }
    every = set(range(7))
    assert batches["dense layers"] == batches["sort"] == every
    assert batches["update shared"] == batches["update apart"] == every - {6}
    assert batches["lookup shared"] == every - {0}
    assert all(event["dur"] >= 0 and {"ts", "pid", "cat"} <= event.keys() for event in spans)
    assert {tracks[event["tid"]] for event in spans} == {"loader", "tables", "device"}
    summary = pipeline.summary()
    on_device = sum(event["dur"] for event in spans if tracks[event["tid"]] == "device")
    assert summary.steps == 7
    assert summary.device == pytest.approx(on_device / 1e6)
    assert summary.device > 7 * 0.0009  # its parts are rounded
    assert 0 <= summary.hidden <= 1
    assert "hidden" in str(summary)
    assert "misses the last update" not in str(summary)


def test_a_stale_summary_says_so() -> None:
    model = click_model()
    pipeline = Pipeline(model, dense_adam(model), click_log(3), updates="stale")
    list(pipeline)
    assert "every lookup misses the last update" in str(pipeline.summary())
