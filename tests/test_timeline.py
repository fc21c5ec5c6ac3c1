"""What a pipeline tells of its time: the trace and the summary."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clicks import click_log, click_model, dense_adam
from dlrm_rs import Pipeline
from dlrm_rs.data import Batch
from dlrm_rs.devices import StandIn
from dlrm_rs.pipeline import Summary
from dlrm_rs.pipeline.timeline import Timeline

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


@pytest.mark.parametrize(("exposed", "hidden"), [(0.0, 1.0), (0.5, 0.75), (1.5, 0.25), (2.0, 0.0), (7.0, 0.0)])
def test_hidden_is_the_share_of_the_cpu_time_that_the_device_did_not_wait_for(exposed: float, hidden: float) -> None:
    summary = Summary(10, 9.0, {"lookup": 2.0}, cpu=2.0, device=4.0, loading=3.0, exposed=exposed, updates="exact")
    assert summary.hidden == pytest.approx(hidden)
    assert f"hidden: {hidden:.1%} of the CPU time" in str(summary)
    assert Timeline(None).summary("exact").hidden == 0.0


def test_what_the_loader_takes_is_not_counted_against_the_tables() -> None:
    log, seconds = click_log(6), 0.2

    def loader() -> Iterator[Batch]:
        for batch in log:
            time.sleep(seconds)
            yield batch

    model = click_model()
    pipeline = Pipeline(model, dense_adam(model), loader())
    list(pipeline)
    summary = pipeline.summary()
    # The first step has nothing to hide behind; the dense layers of the others, which wait for none, take little of it.
    assert summary.loading > 5 * seconds / 2
    assert summary.exposed < summary.loading / 2
    assert "wait for loader" in str(summary)


def test_a_profile_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    model = click_model()
    for path in (tmp_path / "none" / "trace.json", tmp_path, str(tmp_path / "none" / "trace.json")):
        with pytest.raises(ValueError, match="profile: expected a file that can be written"):
            Pipeline(model, None, [], profile=path)
    with pytest.raises(TypeError, match="profile: expected a path or None, got int"):
        Pipeline(model, None, [], profile=3)  # type: ignore[arg-type]


def test_a_profile_that_cannot_be_written_any_more_costs_neither_the_training_nor_its_error(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()

    def loader() -> Iterator[Batch]:
        yield from click_log(2)
        (tmp_path / "there").rmdir()
        raise OSError("the disk is gone")

    model = click_model()
    pipeline = Pipeline(model, dense_adam(model), loader(), profile=tmp_path / "there" / "trace.json")
    with pytest.warns(RuntimeWarning, match="could not write"), pytest.raises(OSError, match="the disk is gone"):
        list(pipeline)
