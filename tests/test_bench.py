"""`dlrm-rs bench`: its cases, its checks, its record and its tables. Nothing here asks how fast anything is."""

import builtins
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

import dlrm_rs
from dlrm_rs import machine
from dlrm_rs.__main__ import main
from dlrm_rs.bench import cases as bench_cases
from dlrm_rs.bench import quantize, run
from dlrm_rs.bench.arguments import Arguments
from dlrm_rs.bench.cases import Case, IdBatch, batches_in_rotation, capped, cases, id_batches
from dlrm_rs.bench.check import SAMPLES, WrongOutputError, check_side
from dlrm_rs.bench.job import CEILING
from dlrm_rs.bench.lookup import LookupJob
from dlrm_rs.bench.measurement import Measurement
from dlrm_rs.bench.memory import groups
from dlrm_rs.bench.optimizers import OPTIMIZERS
from dlrm_rs.bench.process import ProcessEndedError, Worker
from dlrm_rs.bench.quantize import REPETITIONS, QuantizeJob
from dlrm_rs.bench.record import Record, comparisons, load_record, save_record
from dlrm_rs.bench.report import print_report
from dlrm_rs.bench.rows import Rows, rounding
from dlrm_rs.bench.sides import PEERS, Peer
from dlrm_rs.bench.sides.ours import NAME, Ours
from dlrm_rs.bench.timing import Times, time_in_turn
from dlrm_rs.cli import app
from dlrm_rs.data.synthetic import SHAPES, Shape
from dlrm_rs.machine import busy_share
from dlrm_rs.row_formats import ROW_FORMATS

SMALL = Shape((50, 7, 300), 8, (1, 3, 2), (9,), 1.05)
EVEN = Shape((50, 7), 8, (1, 1), (9,), 0.0)
SIDES = [(peer, row_format) for peer in PEERS for row_format in peer.formats]


@pytest.fixture
def threads_stay(engine_settings: None) -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def batch(shape: Shape = SMALL) -> IdBatch:
    return id_batches(shape, Case(shape.batch_sizes[0], shape.zipf, 1), "fp32")[0]


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_its_ids(name: str) -> None:
    shape = capped(name, 1000)
    case = cases(name, Arguments(threads=("1",)))[0]
    batches = id_batches(shape, case, "fp32")
    assert len(batches) >= 8
    assert len({tuple(batch.indices[:50].tolist()) for batch in batches}) == len(batches)
    for made in batches[:2]:
        assert len(made.indices) == case.batch_size * sum(shape.ids_per_bag)
        assert made.offsets[-1] == len(made.indices)
        assert torch.equal(torch.cat([ids.view(-1) for ids, _ in made.tables]), made.indices)
        for (ids, offsets), rows, count in zip(made.tables, shape.num_embeddings, shape.ids_per_bag, strict=True):
            assert ids.shape == (case.batch_size, count)
            assert offsets.tolist() == list(range(0, case.batch_size * count + 1, count))
            assert 0 <= ids.min() <= ids.max() < rows


def test_cases() -> None:
    single = cases("SINGLE", Arguments(threads=("1", "2")))
    assert {(case.batch_size, case.zipf, case.threads) for case in single} == {
        (batch_size, zipf, threads) for batch_size in (16, 2048) for zipf in (0.0, 1.05) for threads in (1, 2)
    }
    assert [case.ids for case in cases("MLPERF", Arguments(batches=(3,), threads=("1",)))] == ["Zipf 1.15"]
    assert cases("MANY", Arguments(distributions=("uniform",))) == []


def test_zipf_is_skewed_and_uniform_is_not() -> None:
    shape = Shape((100_000,), 8, (100,), (100,), 1.05)
    skewed, uniform = (
        id_batches(shape, Case(100, zipf, 1), "fp32")[0].indices.unique().numel() for zipf in (1.05, 0.0)
    )
    assert skewed < uniform * 0.7


@pytest.mark.parametrize("value", ["0", "two", "-1"])
def test_threads_are_checked(value: str) -> None:
    with pytest.raises(ValueError, match=f"threads: expected 'all' or a number of at least 1, got '{value}'"):
        Arguments(threads=(value,))


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match=r"shapes: expected some of KAGGLE, .*, got 'BIG'"):
        Arguments(shapes=("BIG",))
    with pytest.raises(ValueError, match=r"formats: expected some of fp32, .*, got 'int5'"):
        Arguments(formats=("int5",))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:fbgemm_gpu")  # it lacks a module of its own for training
@pytest.mark.parametrize(("peer", "row_format"), SIDES, ids=[f"{peer.name} {fmt}" for peer, fmt in SIDES])
def test_every_peer_is_right_and_found_out_when_wrong(peer: Peer, row_format: str) -> None:
    if peer.why_not() is not None:
        pytest.skip(str(peer.why_not()))
    for shape in (SMALL, EVEN):
        ids, rows = batch(shape), Rows()
        side = peer.make(row_format, shape, rows)
        with torch.no_grad():
            check_side(side, ids, rows, row_format)
            calls = side.calls(ids)
            for use in calls:
                with pytest.raises(WrongOutputError, match=f"{peer.name}.*{use}.*expected"):
                    check_side(Changed(side, use), ids, rows, row_format)


def one_element(output: Tensor) -> Tensor:
    """By little, but more than the dtype rounds."""
    changed = output.clone()
    changed[-1, -1] += max(1e-3, 8 * torch.finfo(output.dtype).eps)
    return changed


class Changed:
    """A side that is right but for the output of one use."""

    def __init__(self, side: Any, use: str, change: Callable[[Tensor], Tensor] = one_element) -> None:
        self.name, self._side, self._use, self._change = side.name, side, use, change
        self._changed: object = None

    def calls(self, ids: IdBatch) -> dict[str, Callable[[], object]]:
        calls: dict[str, Callable[[], object]] = self._side.calls(ids)
        right = calls[self._use]

        def wrong() -> object:
            self._changed = right()
            return self._changed

        return {**calls, self._use: wrong}

    def pooled(self, output: object) -> Tensor:
        pooled: Tensor = self._side.pooled(output)
        return self._change(pooled) if output is self._changed else pooled

    def stored_rows(self, table: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        stored: NDArray[np.float64] = self._side.stored_rows(table, ids)
        return stored


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_ours_is_right_and_found_out_when_wrong(row_format: str) -> None:
    ids, rows = batch(), Rows()
    ours = Ours(row_format, SMALL, rows)
    check_side(ours, ids, rows, row_format)
    with pytest.raises(WrongOutputError, match=r"dlrm_rs \(lookup\): expected .* elements are wrong"):
        check_side(Changed(ours, "lookup"), ids, rows, row_format)


@pytest.mark.parametrize("place", [0, SAMPLES // 2, SAMPLES - 1])
def test_a_long_bag_of_one_table_hides_no_error_in_another(place: int) -> None:
    """Of a table with bags of one id, in the first, a middle, and the last sample of those that are looked at."""
    shape = Shape((50, 300), 8, (1, 200), (1000,), 0.0)
    ids, rows, sample = batch(shape), Rows(), int(np.linspace(0, 999, SAMPLES)[place])
    ours = Ours("fp32", shape, rows)

    def in_one_sample(output: Tensor) -> Tensor:
        changed = output.clone()
        changed[sample, 0] += 1e-4
        return changed

    with pytest.raises(WrongOutputError, match=r"dlrm_rs \(lookup\): expected .* 1 of 512 elements are wrong"):
        check_side(Changed(ours, "lookup", in_one_sample), ids, rows, "fp32")


def test_rows_that_were_changed_are_found() -> None:
    ids, rows = batch(), Rows()
    ours = Ours("fp32", SMALL, rows)
    with torch.no_grad():
        ours.collection.get_parameter("embedding_bags.t1.weight")[3] += 1e-6
    with pytest.raises(WrongOutputError, match="dlrm_rs: rows of table 1: expected"):
        check_side(ours, ids, rows, "fp32")


def test_a_shape_or_dtype_that_is_another_is_wrong() -> None:
    ids, rows = batch(), Rows()
    ours = Ours("fp32", SMALL, rows)
    for change in (Tensor.double, lambda t: t[1:]):
        with pytest.raises(WrongOutputError, match=r"expected \(9, 24\) of torch.float32, got"):
            check_side(Changed(ours, "lookup", change), ids, rows, "fp32")


def test_the_ceiling_touches_what_it_is_given() -> None:
    ids, rows = batch(), Rows()
    touched = Ours("fp32", SMALL, rows).touch(ids)()
    # A row of 8 floats is half a line: the byte is that at the beginning of the line.
    first = [rows.of(t, table_ids.numpy().reshape(-1) // 2 * 2, 8)[:, 0] for t, (table_ids, _) in enumerate(ids.tables)]
    assert touched == int(np.concatenate(first).astype(np.float32).view(np.uint8)[::4].sum())


@pytest.mark.parametrize("row_format", ["fp16", "int8", "int4", "int2"])
def test_rounding_is_the_row_formats(row_format: str) -> None:
    """Not so wide that rows of another format would pass."""
    finer = {"fp16": "fp32", "int8": "fp16", "int4": "int8", "int2": "int4"}
    assert rounding(finer[row_format]) < rounding(row_format) / 3


def test_a_job_measures_all_sides(threads_stay: None) -> None:
    job = LookupJob("MANY", "fp32", ("nn.EmbeddingBag", "NumPy"), "plain", (Case(2, 1.05, 1),), 0.01, 50)
    measured = job.run()
    assert {(m.side, m.use) for m in measured} == {
        (CEILING, "touch"),
        (NAME, "lookup"),
        ("nn.EmbeddingBag", "offsets"),
        ("nn.EmbeddingBag", "2-D"),
        ("nn.EmbeddingBag", "stacked"),
        ("NumPy", "take"),
    }
    for m in measured:
        assert (m.rows, m.bytes) == (400 * 14 * 2, 400 * 14 * 2 * 256)
        assert 0 < m.times.low <= m.times.median <= m.times.high
        assert m.times.calls >= 3
        assert m.process == str(job)
        assert m.ceiling > 0


@pytest.mark.parametrize("row_format", ["int8", "int4"])
def test_quantization_is_measured(row_format: str, threads_stay: None, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = QuantizeJob("SINGLE", row_format, (), "plain", (1,), 1000).run()
    assert [m.side for m in measured] == [NAME, "torch prepack"]
    for m in measured:
        assert (m.rows, m.bytes, m.times.calls) == (26_000, 26_000 * 256, REPETITIONS)
    monkeypatch.setattr(quantize, "operator", lambda _, action: lambda x: x[:, :64] + 0.5)
    with pytest.raises(WrongOutputError, match="torch prepack: rows of table 0: expected"):
        QuantizeJob("SINGLE", row_format, (), "plain", (1,), 1000).run()


def recorded(batches: int, seen: list[tuple[str, int]]) -> dict[str, list[Callable[[], None]]]:
    """Calls of two sides that write down whose they are, and of which batch."""

    def call(name: str, k: int) -> Callable[[], None]:
        return lambda: seen.append((name, k))

    return {name: [call(name, k) for k in range(batches)] for name in "ab"}


def test_times_are_in_turn() -> None:
    seen: list[tuple[str, int]] = []
    times = time_in_turn(recorded(8, seen), seconds=0)
    assert seen == [*[("a", k) for k in (0, 1, 2, 3)], *[("b", k) for k in (4, 5, 6, 7)]]
    assert times["a"].calls == times["b"].calls == 3  # the first is not timed


@pytest.mark.parametrize("batches", [8, 9, 50])
def test_no_side_gets_a_batch_before_all_others_have_come(batches: int) -> None:
    seen: list[tuple[str, int]] = []
    time_in_turn(recorded(batches, seen), seconds=0.2)
    assert all(k == i % batches for i, (_, k) in enumerate(seen))
    assert {("a", k) for k in range(batches)} <= set(seen)
    assert {name for name, _ in seen} == {"a", "b"}


@pytest.mark.parametrize("row_format", ["fp32", "int8", "int4"])
def test_a_rotation_reads_twice_what_the_cache_holds(row_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {"fp32": 4, "int8": 1, "int4": 1}[row_format]
    for cache, rotation in ((0, 64 << 20), (48 << 20, 96 << 20)):
        monkeypatch.setattr(bench_cases, "cache_bytes", lambda cache=cache: cache)
        count = batches_in_rotation(SHAPES["SINGLE"], 16, row_format)
        assert 0 <= count * 16 * 26 * lines * 64 - rotation < 16 * 26 * lines * 64
    assert batches_in_rotation(SHAPES["GIANT"], 4096, row_format) == (8 if row_format == "fp32" else 12)


def test_tables_that_do_not_fit_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "available", lambda: 2 << 30)
    record = Record({}, Arguments(families=("lookup",), shapes=("GIANT", "MANY"), formats=("fp32",)))
    missing = {"FBGEMM TBE": "not installed", "FBGEMM nbit": "not installed"}
    jobs = list(run._jobs(record.arguments, missing, record))
    assert [job.shape for job in jobs] == []
    assert len(record.skipped) == 4  # two shapes in two environments
    assert record.skipped[0].startswith("GIANT fp32 (plain): expected 16,665 MiB")
    assert record.skipped[0].endswith(" of memory, got 2,048")


def test_peers_that_do_not_fit_together_are_timed_one_by_one() -> None:
    gigabytes = Shape((1 << 22,) * 4, 64, (1,), (16,), 0.0)  # 4 GiB in fp32
    fitting = {free: groups(["a", "b", "c"], gigabytes, "fp32", free << 30) for free in (32, 16, 8)}
    assert fitting == {32: [("a", "b", "c")], 16: [("a",), ("b",), ("c",)], 8: []}
    assert groups([], gigabytes, "fp32", 8 << 30) == [()]  # ours alone


def measurement(side: str, median: float, environment: str = "plain", use: str = "call") -> Measurement:
    times = Times(median, median * 0.9, median * 1.2, median * 2, 24, 1.9)
    case = ("lookup", "SINGLE", "fp32", 16, "uniform", 2)
    return Measurement(*case, side, use, environment, environment, 416, 416 * 256, times, 4e-5)


@pytest.fixture
def record() -> Record:
    """Ours wins against one peer, and loses to another that is at its best with huge pages."""
    measured = [
        measurement(CEILING, 4e-5),
        measurement(NAME, 1e-4),
        measurement("slow", 3e-4),
        measurement("fast", 1.5e-4),
        measurement(CEILING, 4e-5, "huge pages"),
        measurement(NAME, 1.1e-4, "huge pages"),
        measurement("fast", 0.5e-4, "huge pages"),
        measurement("fast", 0.9e-4, "huge pages", "other"),
        measurement(NAME, 0.7e-4, "autovec"),
        measurement("third", 4e-4, "autovec"),
    ]
    on = {
        "processor": "a processor",
        "load": 3.0,  # of what went before
        "busy": 0.01,
        "memory_bytes": 3 << 30,
        "cores": 2,
        "torch": "2",
        "fbgemm-gpu-cpu": None,
        "fbgemm-gpu": None,
        "dlrm_rs": "0",
        "simd": "scalar",
        "time": "2000-01-02T03:04:05+00:00",
        "commit": None,
    }
    return Record(on, Arguments(shapes=("SINGLE",), formats=("fp32",), rows=9), measured, ["x: no memory"])


def test_sides_are_compared_at_their_best(record: Record) -> None:
    (comparison,) = comparisons(record.measurements)
    best = [(versus.peer.side, versus.peer.environment, versus.ours.environment) for versus in comparison.peers]
    # Ours only of the processes that the peer was in.
    assert best == [("fast", "huge pages", "plain"), ("slow", "plain", "plain"), ("third", "autovec", "autovec")]
    assert [versus.ratio for versus in comparison.peers] == pytest.approx([0.5, 3.0, 4 / 0.7])
    assert comparison.ours.times.median == 1e-4
    assert comparison.ceiling is not None
    assert comparison.ceiling.environment == "plain"


def test_the_table_has_the_lost_rows(record: Record) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    print_report(record, console)
    printed = console.export_text()
    fields = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    assert fields["fast"] == ["fast", "50", "45-60", "8.3", "2.13", "80%", "0.50"]
    assert fields["slow"] == ["slow", "300", "270-360", "1.4", "0.35", "13%", "3.00"]
    assert ["dlrm_rs", "100", "90-120", "4.2", "1.06", "40%", "0.50"] in [line.split() for line in printed.splitlines()]
    assert "Skipped: x: no memory" in printed
    assert "234 rows of 64" in printed
    assert "Other work" not in printed
    assert "By threads" not in printed


def test_a_busy_machine_is_told(record: Record) -> None:
    record.machine["busy"] = 0.3
    printed = io.StringIO()
    print_report(record, Console(width=80, file=printed))
    assert "Other work took 30% of the CPUs" in printed.getvalue()


def test_cases_with_several_numbers_of_threads_are_put_side_by_side(record: Record) -> None:
    faster = {CEILING: 4.0, NAME: 2.0, "fast": 1.25, "slow": 1.0, "third": 8.0}
    record.measurements += [
        replace(m, threads=8, times=replace(m.times, median=m.times.median / faster[m.side]))
        for m in record.measurements
    ]
    printed = io.StringIO()
    print_report(record, Console(width=80, file=printed))
    _, _, table = printed.getvalue().partition("By threads")
    lines = [line.split() for line in table.splitlines()]
    assert ["B", "16,", "uniform", "2", "100", "1.00", "1.00", "fast", "50", "1.00"] in lines
    assert ["8", "50", "2.00", "4.00", "fast", "40", "1.25"] in lines


def test_other_work_is_what_other_processes_do() -> None:
    endless = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        assert busy_share(0.5) > 0.8
    finally:
        for process in endless:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\nstepping\t: 2\n\nprocessor\t: 1",
            "AMD EPYC (family 25, model 1, stepping 2)",
        ),
        ("processor\t: 0\nBogoMIPS\t: 50.00", platform.machine()),
        (None, platform.machine()),
    ],
)
def test_a_processor_has_its_numbers(cpuinfo: str | None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_content", lambda path: cpuinfo if path == "/proc/cpuinfo" else None)
    assert machine.describe_machine()["processor"] == name


def test_a_record_is_read_as_it_was_written(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    save_record(record, path)
    assert load_record(path) == record
    without = json.loads(path.read_text())
    del without["measurements"][0]["times"]
    path.write_text(json.dumps(without))
    with pytest.raises(ValueError, match=r"record.json: expected a record written by `dlrm-rs bench`, .*'times'"):
        load_record(path)


def readme(
    record: Record, content: str, folder: Path, *options: str | Path
) -> tuple[subprocess.CompletedProcess[str], str]:
    """What the script says and makes of a README."""
    save_record(record, folder / "record.json")
    (folder / "README.md").write_text(content)
    script = Path(__file__).parents[1] / "benches" / "readme_table.py"
    command = [sys.executable, script, folder / "record.json", "--readme", folder / "README.md", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result, (folder / "README.md").read_text()


def test_the_readme_gets_its_table_from_a_record(record: Record, tmp_path: Path) -> None:
    begin, end = "<!-- comparison: written by benches/readme_table.py -->", "<!-- comparison ends -->"
    result, written = readme(record, f"before\n{begin}\nold\n{end}\nafter\n", tmp_path)
    assert result.returncode == 0, result.stderr
    lines = written.splitlines()
    assert "| SINGLE | 16 | uniform | 0.50 (fast) |" in lines
    assert (lines[0], lines[1], lines[-2], lines[-1]) == ("before", begin, end, "after")
    assert "old" not in lines
    assert "2000-01-02, a processor, scalar, 2 cores (1% busy with other work), 3 GiB; torch 2, " in written
    assert "FBGEMM not installed, commit unknown" in written
    assert readme(record, written, tmp_path)[1] == written
    ours = (Path(__file__).parents[1] / "README.md").read_text()
    assert readme(record, ours, tmp_path)[0].returncode == 0

    result, written = readme(record, "no markers", tmp_path)
    assert "ValueError: README: expected '<!-- comparison:" in result.stderr
    assert written == "no markers"


class Named:
    """A job that tells an environment variable instead of measurements, or ends its process."""

    def __init__(self, variable: str | None) -> None:
        self._variable = variable

    def run(self) -> Any:
        if self._variable is None:
            os._exit(1)
        return os.environ.get(self._variable)


def test_a_process_has_its_environment_and_may_end() -> None:
    worker = Worker({"DLRM_RS_TEST": "7"})
    try:
        assert str(worker.run(Named("DLRM_RS_TEST"), 1e8)) == "7"
        assert "DLRM_RS_TEST" not in os.environ
        with pytest.raises(ProcessEndedError, match="the process ended; is there enough memory"):
            worker.run(Named(None), 1e8)
        assert str(worker.run(Named("DLRM_RS_TEST"), 1e8)) == "7"  # started anew
    finally:
        worker.close()


class Endless:
    """A job that looks up small tables for ever."""

    def run(self) -> Any:
        ours, ids = Ours("fp32", EVEN, Rows()), batch(EVEN)
        while True:
            ours.calls(ids)["lookup"]()


def test_a_job_is_ended_in_time() -> None:
    worker = Worker({"DLRM_RS_TEST": "7"})
    try:
        with pytest.raises(TimeoutError):
            worker.run(Endless(), 0.2)
        assert str(worker.run(Named("DLRM_RS_TEST"), 1e8)) == "7"
    finally:
        worker.close()


def test_the_command_from_beginning_to_end(tmp_path: Path) -> None:
    options = "--family lookup --shape SINGLE --batch-size 4 --row-format fp32 --ids zipf --threads 1 --seconds 0.01"
    arguments = ["bench", *options.split(), "--rows", "200", "--output", str(tmp_path / "made")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"}, catch_exceptions=False)
    assert result.exit_code == 0
    record = load_record(tmp_path / "made" / "bench.json")
    assert {"nn.EmbeddingBag", "NumPy", NAME, CEILING} <= {m.side for m in record.measurements}
    assert {"plain", "huge pages"} <= {m.environment for m in record.measurements}
    assert record.machine["dlrm_rs"] == dlrm_rs.__version__
    assert "nn.EmbeddingBag" in result.output
    assert (tmp_path / "made" / "bench.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_quick_run_tells_what_it_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "QUICK_END", -1.0)
    arguments = Arguments.chosen(True, {"formats": ("fp32",), "rows": 100})
    printed = io.StringIO()
    record = run.run(arguments, tmp_path, Console(file=printed, width=300))
    left_out = [line for line in record.skipped if line.endswith(": no time was left for it in a quick run")]
    assert [line.split(" (")[0] for line in left_out] == [
        "SINGLE fp32",
        "MULTI fp32",
        "SINGLE fp32 RowWiseAdagrad",
        "MULTI fp32 RowWiseAdagrad",
    ]
    assert all(f"Skipped: {line}" in printed.getvalue() for line in left_out)
    assert load_record(tmp_path / "bench.json") == record


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--shape GIANT --ids zipf --family lookup", "lookup GIANT: there are no zipf ids"),
        ("--family quantize --row-format fp32", "quantize: expected row formats of int8, int4, int2, got fp32"),
    ],
)
def test_a_choice_of_nothing_is_an_error(options: str, reason: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", *options.split(), "--output", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert f"nothing to time for this choice: {reason}" in result.output
    assert not list(tmp_path.iterdir())


def test_tables_of_any_shape_are_quantized() -> None:
    arguments = Arguments(
        families=("quantize",), shapes=("MULTI", "KAGGLE"), formats=("int4",), threads=("1",), rows=100
    )
    jobs = list(run._jobs(arguments, {}, Record({}, arguments)))
    assert [str(job) for job in jobs] == [
        f"quantize {shape} to int4 ({environment})"
        for shape in ("MULTI", "KAGGLE")
        for environment in ("plain", "huge pages")
    ]
    assert isinstance(jobs[2], QuantizeJob)
    measured = replace(jobs[2], peers=()).run()
    assert {(m.shape, m.rows) for m in measured} == {("KAGGLE", sum(capped("KAGGLE", 100).num_embeddings))}


def test_the_help_tells_what_there_is_and_how_long_it_takes() -> None:
    result = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for word in (*SHAPES, *OPTIMIZERS, *ROW_FORMATS, "half an hour", "two minutes"):
        assert word in result.output


def test_a_wrong_option_is_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "--shape", "BIG", "--output", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "shapes: expected some of KAGGLE" in result.output


def test_the_missing_extra_is_that_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "dlrm_rs.cli"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "typer":
            raise ModuleNotFoundError("No module named 'typer'", name="typer")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr(sys, "argv", ["dlrm-rs", "bench", "--quick"])
    with pytest.raises(SystemExit, match=r'typer is not installed; pip install "dlrm_rs\[bench\]"'):
        main()


def test_measurements_are_plain_data() -> None:
    m = measurement(NAME, 1e-4)
    assert replace(m, times=Times(**asdict(m)["times"])) == m
    assert CEILING != NAME
