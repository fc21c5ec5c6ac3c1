"""The training steps of `dlrm-rs bench`: what is asked for, checked, measured, and told."""

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dlrm_rs.bench import run
from dlrm_rs.bench.arguments import FORMATS, STEP_ROWS, Arguments
from dlrm_rs.bench.cases import Case, IdBatch, cases, id_batches
from dlrm_rs.bench.check import WrongOutputError, check_training
from dlrm_rs.bench.job import CEILING
from dlrm_rs.bench.measurement import Measurement
from dlrm_rs.bench.optimizers import LR, OPTIMIZERS, Reference
from dlrm_rs.bench.plot import save_plot
from dlrm_rs.bench.record import Record, comparisons, save_record
from dlrm_rs.bench.report import print_report
from dlrm_rs.bench.rows import Rows
from dlrm_rs.bench.sides import TRAINING_PEERS, Peer
from dlrm_rs.bench.sides.ours import NAME, OursTraining
from dlrm_rs.bench.step import StepJob
from dlrm_rs.bench.timing import Times
from dlrm_rs.data.synthetic import Shape
from test_bench import readme

SMALL = Shape((50, 7, 300), 8, (1, 3, 2), (9,), 1.05)
EVEN = Shape((50, 7), 8, (1, 1), (9,), 0.0)
SIDES = [
    (peer, row_format, optimizer)
    for peer in TRAINING_PEERS
    for row_format in peer.formats
    for optimizer in peer.optimizers
]
# Whose steps differ from an optimizer's.
ANOTHER = {"SGD": "Adagrad", "Adagrad": "Adam", "RowWiseAdagrad": "Adagrad", "Adam": "SGD"}


@pytest.fixture
def settings_stay(engine_settings: None) -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        yield
    torch.set_num_threads(threads)


def check(side: Peer | type[OursTraining], row_format: str, optimizer: str, checked_as: str) -> None:
    make = side.make if isinstance(side, Peer) else side
    for shape in (SMALL, EVEN):
        rows = Rows()
        batches = id_batches(shape, Case(9, shape.zipf, 1), row_format)
        check_training(partial(make, row_format, optimizer, shape, rows), batches, rows, row_format, checked_as)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:fbgemm_gpu")  # it lacks a module of its own for training
@pytest.mark.parametrize(
    ("peer", "row_format", "optimizer"), SIDES, ids=[f"{p.name} {fmt} {optimizer}" for p, fmt, optimizer in SIDES]
)
def test_every_peer_trains_right_and_is_found_out_when_not(
    peer: Peer, row_format: str, optimizer: str, settings_stay: None
) -> None:
    if peer.why_not() is not None:
        pytest.skip(str(peer.why_not()))
    check(peer, row_format, optimizer, optimizer)
    with pytest.raises(WrongOutputError, match=rf"{peer.name} \(.*\): rows of table 0 after a step: expected"):
        check(peer, row_format, optimizer, ANOTHER[optimizer])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("row_format", FORMATS["step"])
def test_ours_trains_right_and_is_found_out_when_not(row_format: str, optimizer: str) -> None:
    check(OursTraining, row_format, optimizer, optimizer)
    with pytest.raises(WrongOutputError, match=r"dlrm_rs \(fused\): rows of table 0 after a step: expected"):
        check(OursTraining, row_format, optimizer, ANOTHER[optimizer])


def test_rows_that_a_step_does_not_touch_must_stay() -> None:
    class Moved(OursTraining):
        def calls(self, batch: IdBatch) -> dict[str, Callable[[], object]]:
            with torch.no_grad():
                self.collection.get_parameter("embedding_bags.t2.weight")[100] += 1e-3
            return super().calls(batch)

    with pytest.raises(WrongOutputError, match=r"rows of table 2: expected|rows of table 2 after a step: expected"):
        check(Moved, "fp32", "SGD", "SGD")


@pytest.mark.parametrize(
    ("optimizer", "made"),
    [
        ("SGD", partial(torch.optim.SGD, lr=LR)),
        ("Adagrad", partial(torch.optim.Adagrad, lr=LR, eps=1e-12)),
        ("Adam", partial(torch.optim.Adam, lr=LR, eps=1e-12)),
    ],
)
def test_the_reference_is_torchs_optimizer_in_float64(
    optimizer: str, made: Callable[[list[torch.Tensor]], torch.optim.Optimizer]
) -> None:
    weight = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    torchs, reference, moved = made([weight]), Reference(optimizer, 4, 3), torch.zeros(4, 3, dtype=torch.float64)
    for step in range(5):
        weight.grad = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        torchs.step()
        moved += reference.moves(torch.arange(4), weight.grad)
    torch.testing.assert_close(weight.detach(), moved, rtol=1e-9, atol=0)


@pytest.mark.parametrize("row_format", ["fp32", "bf16-split"])
def test_a_job_measures_all_sides(row_format: str, settings_stay: None) -> None:
    beside = ("nn.EmbeddingBag",) if row_format == "fp32" else ("dlrm_rs fp32",)
    job = StepJob("SINGLE", row_format, beside, "plain", (Case(2, 1.05, 1),), 0.01, 50, "Adagrad")
    measured = job.run()
    assert {m.side for m in measured} == {CEILING, NAME, *beside}
    for m in measured:
        assert (m.family, m.optimizer, m.rows) == ("step", "Adagrad", 26 * 2)
        assert m.bytes == 26 * 2 * (256 if row_format == "fp32" else 128)
        assert m.times.calls >= 3
        assert "Adagrad" in m.process


def test_what_steps_are_asked_for() -> None:
    arguments = Arguments(threads=("1",))
    assert arguments.shapes_of("step") == ("SINGLE", "MULTI")
    assert arguments.formats_of("step") == FORMATS["step"]
    assert [case.batch_size for case in cases("SINGLE", arguments, "step")] == [2048, 2048]
    assert arguments.rows_of("step") == STEP_ROWS
    assert arguments.rows_of("lookup") is None
    assert Arguments(rows=10).rows_of("step") == 10
    quick = Arguments.chosen(True, {})
    assert (quick.formats_of("step"), quick.optimizers) == (("fp32",), ("RowWiseAdagrad",))
    with pytest.raises(ValueError, match=r"optimizers: expected some of SGD, .*, got 'LION'"):
        Arguments(optimizers=("LION",))


def test_jobs_have_the_peers_of_their_optimizer_and_row_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "available", lambda: 1 << 40)
    record = Record({}, Arguments(families=("step",), shapes=("SINGLE",)))
    jobs = {str(job): job.peers for job in run._jobs(record.arguments, {}, record)}
    assert len(jobs) == 3 * (3 + 3 + 1 + 1 + 1) + (2 + 1 + 1 + 1 + 1)  # environments by row format; FBGEMM has no Adam
    assert jobs["SINGLE fp32 SGD (nn.EmbeddingBag, FBGEMM TBE; plain)"] == ("nn.EmbeddingBag", "FBGEMM TBE")
    assert jobs["SINGLE fp32 Adam (nn.EmbeddingBag; huge pages)"] == ("nn.EmbeddingBag",)
    assert jobs["SINGLE bf16-split Adam (dlrm_rs fp32; plain)"] == ("dlrm_rs fp32",)
    quick = Arguments.chosen(True, {"families": ("step",), "shapes": ("SINGLE",)})
    assert [str(job) for job in run._jobs(quick, {}, record)] == [
        "SINGLE fp32 RowWiseAdagrad (nn.EmbeddingBag, FBGEMM TBE; huge pages)"
    ]
    (job,) = run._jobs(replace(quick, formats=("bf16",)), {}, record)  # its peer is in no other environment
    assert str(job) == "SINGLE bf16 RowWiseAdagrad (dlrm_rs fp32; plain)"
    # 26 x 250,000 x 64 elements with three numbers each are 5 GB a side.
    monkeypatch.setattr(run, "available", lambda: 8 << 30)
    assert list(run._jobs(replace(record.arguments, optimizers=("Adam",)), {}, record)) == []
    assert record.skipped[0].startswith("SINGLE fp32 Adam (plain): expected 10,")


def measurement(side: str, median: float, row_format: str = "fp32") -> Measurement:
    times = Times(median, median * 0.9, median * 1.2, median * 2, 24, 1.9)
    case = ("step", "SINGLE", row_format, 2048, "uniform", 2)
    return Measurement(*case, side, "call", "plain", "plain", 53248, 53248 * 256, times, 1e-3, "Adam")


def test_steps_are_told(tmp_path: Path) -> None:
    measured = [measurement(NAME, 1e-2), measurement("fast", 5e-2), measurement(NAME, 2e-2, "bf16")]
    machine = dict.fromkeys(["commit", "fbgemm-gpu", "fbgemm-gpu-cpu"]) | dict.fromkeys(
        ["processor", "cores", "torch", "dlrm_rs", "simd", "time"], "?"
    )
    record = Record(machine | {"busy": 0.0, "memory_bytes": 0}, Arguments(families=("step",), threads=("2",)), measured)
    assert [c.ours.row_format for c in comparisons(measured)] == ["fp32", "bf16"]
    printed = io.StringIO()
    print_report(record, Console(width=80, file=printed))
    assert "SINGLE fp32, step with Adam: 26 tables, 6,500,000 rows of 64" in printed.getvalue()
    save_plot(record, tmp_path / "bench.png")
    begin, end = "<!-- comparison: written by benches/readme_table.py -->", "<!-- comparison ends -->"
    result, written = readme(record, f"{begin}\n{end}\n", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "| shape | batch | ids | optimizer | fp32 | bf16 |" in written
    assert "| SINGLE | 2,048 | uniform | Adam | 5.00 (fast) | no peer |" in written
    assert "no table of a step of more than 250,000 rows" in written
    steps, lookups = tmp_path / "steps.json", [replace(m, family="lookup", optimizer="") for m in measured]
    save_record(record, steps)
    record = replace(record, arguments=Arguments(threads=("2",)), measurements=[*lookups, *measured])
    result, written = readme(record, f"{begin}\n{end}\n", tmp_path, "--steps", steps)
    assert result.returncode == 0, result.stderr
    assert written.count("| shape | batch | ids |") == 2
    assert "| SINGLE | 2,048 | uniform | 5.00 (fast) | no peer |" in written
    assert written.count("| SINGLE | 2,048 | uniform | Adam | 5.00 (fast) | no peer |") == 1
    assert "record.json` has the rest" in written
    assert "steps.json` has the rest" in written
