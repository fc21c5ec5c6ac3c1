"""The report of a quantization: its numbers against plain definitions, and how it reads and looks."""

import dataclasses
import gc
import sys
import tracemalloc
import weakref
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dlrm_rs.quantization.budget import Budget, Choice, TableSizes
from dlrm_rs.quantization.plot import MOST_TABLES
from dlrm_rs.quantization.readable import readable_bytes, readable_count, readable_error
from dlrm_rs.quantization.report import QuantizationReport, ReportBuilder, TableChange, TableReport
from dlrm_rs.quantization.row_errors import RowErrors, mean_error, p99_error, row_weights
from dlrm_rs.quantization.search import choose_formats

Errors = NDArray[np.float32]


def change(name: str, rows: int, **kwargs: Any) -> TableChange:
    before = TableChange(name, rows, 64, "fp32", "int8", bytes_before=256 * rows, bytes_after=70 * rows)
    return dataclasses.replace(before, **kwargs)


def random_errors(rows: int, seed: int = 0, scale: float = 0.0055) -> Errors:
    return np.random.default_rng(seed).normal(scale, scale / 10, rows).astype(np.float32)


def p99_by_sorting(errors: list[float], weights: list[float]) -> float:
    """The definition, without rounding."""
    total, reached = sum(map(Fraction, weights)), Fraction(0)
    for error, weight in sorted(zip(errors, weights, strict=True)):
        reached += Fraction(weight)
        if weight and reached * 100 >= total * 99:
            return error
    return 0.0


def choice_of(names: list[str]) -> Choice:
    """A search in which the first table matters and the others do not."""
    sizes = {"fp32": 256_000, "int8": 70_000, "int4": 37_000, "int2": 21_000}
    harm = {"fp32": 0.0, "int8": 0.0004, "int4": 0.01, "int2": 0.1}
    return choose_formats(
        Budget(metric=lambda model: 0.0, tolerance=1e-3),
        [TableSizes(name, "fp32", sizes) for name in names],
        lambda formats: 0.7461 - harm[formats[names[0]]],
    )


def report_of(names: list[str], choice: Choice | None = None) -> QuantizationReport:
    builder = ReportBuilder()
    for seed, name in enumerate(names):
        rows = 10 + 40 * seed
        builder.add(change(name, rows), random_errors(rows, seed), max_abs_error=0.001 * seed)
    return builder.build(choice)


def test_a_table() -> None:
    table = TableReport.of(change("t0", 4), np.array([0.25, 0.5, 0.5, 0.75], np.float32), max_abs_error=0.125)
    assert dataclasses.asdict(table) == {
        "name": "t0",
        "num_embeddings": 4,
        "embedding_dim": 64,
        "format_before": "fp32",
        "format_after": "int8",
        "bytes_before": 1024,
        "bytes_after": 280,
        "error_mean": 0.5,
        "error_p99": 0.75,
        "error_worst": 0.75,
        "worst_row": 3,
        "max_abs_error": 0.125,
    }


def test_weights_weigh_mean_and_p99_and_not_the_worst() -> None:
    errors = np.array([0.25, 0.75, 0.5], np.float32)
    table = TableReport.of(change("t0", 3), errors, 0.125, weights=np.array([3, 0, 1]))
    assert (table.error_mean, table.error_p99) == (0.3125, 0.5)
    assert (table.error_worst, table.worst_row) == (0.75, 1)
    # 99 % of the weight is on the first row.
    assert TableReport.of(change("t0", 3), errors, 0.125, weights=[99, 0.5, 0.5]).error_p99 == 0.25
    assert TableReport.of(change("t0", 3), errors, 0.125, weights=[98, 1, 1]).error_p99 == 0.5


positive = st.floats(0, 2.0**100, width=32)


@given(st.lists(st.lists(st.tuples(positive, st.integers(0, 9)), max_size=40), max_size=4), st.booleans())
def test_p99_and_mean_are_those_of_the_definition(drawn: list[list[tuple[float, int]]], weighted: bool) -> None:
    tables = []
    for rows in drawn:
        errors = np.array([error for error, _ in rows], np.float32)
        tables.append(RowErrors(errors, np.array([weight for _, weight in rows], np.float32) if weighted else None))
    flat = [(error, weight if weighted else 1) for rows in drawn for error, weight in rows]
    expected = p99_by_sorting([error for error, _ in flat], [weight for _, weight in flat])
    assert p99_error(tables) == expected
    total = sum(weight for _, weight in flat)
    mean = sum(error * weight for error, weight in flat) / total if total else 0.0
    assert mean_error(tables) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("rows", [1, 99, 100, 101, 700, 65_536, 65_537, 300_000])
def test_p99_of_many_rows(rows: int) -> None:
    errors = random_errors(rows)
    expected = np.sort(errors)[-(-99 * rows // 100) - 1]
    assert p99_error([RowErrors(errors)]) == expected
    assert p99_error([RowErrors(errors, np.full(rows, 2, np.float32))]) == expected
    assert p99_error([RowErrors(errors[: rows // 3]), RowErrors(errors[rows // 3 :])]) == expected


def test_p99_where_float_sums_are_rounded() -> None:
    """Weights whose sums depend on the order: a row with weight is found all the same."""
    weights = np.random.default_rng(0).random(100_000).astype(np.float32) * np.float32(1e-3)
    weights[0] = 1e9
    errors = random_errors(100_000)
    assert p99_error([RowErrors(errors, weights)]) == errors[0]
    assert p99_error([RowErrors(np.full(100_000, 0.5, np.float32), weights)]) == 0.5


def test_the_total_is_over_rows_and_not_over_tables() -> None:
    builder = ReportBuilder()
    good, bad = np.full(990, 0.25, np.float32), np.full(10, 0.75, np.float32)
    bad[7] = 1.0
    builder.add(change("large", 990), good, max_abs_error=0.5)
    builder.add(change("none", 0), good[:0], max_abs_error=0.0)
    builder.add(change("small", 10), bad, max_abs_error=0.25)
    total = builder.build().total
    assert total.num_embeddings == 1000
    assert (total.bytes_before, total.bytes_after) == (256_000, 70_000)
    assert total.error_mean == pytest.approx((990 * 0.25 + 9 * 0.75 + 1) / 1000)
    assert total.error_p99 == 0.25  # the mean of the tables' own is above 0.5
    assert (total.error_worst, total.worst_table, total.worst_row) == (1.0, "small", 7)
    assert total.max_abs_error == 0.5


def test_the_total_weighs_tables_by_their_use() -> None:
    builder = ReportBuilder()
    builder.add(change("used", 2), np.array([0.25, 0.5], np.float32), 0.0, weights=[100, 800])
    builder.add(change("seldom", 1), np.array([0.75], np.float32), 0.0, weights=[100])
    total = builder.build().total
    assert total.error_mean == (0.25 * 100 + 0.5 * 800 + 0.75 * 100) / 1000
    assert total.error_p99 == 0.75


def test_of_one_table_the_total_says_the_same() -> None:
    builder = ReportBuilder()
    table = builder.add(change("t0", 1000), random_errors(1000), 0.5)
    total = builder.build().total
    assert (total.error_mean, total.error_p99, total.error_worst) == (
        table.error_mean,
        table.error_p99,
        table.error_worst,
    )
    assert total.worst_row == table.worst_row


def test_no_rows_and_no_tables() -> None:
    table = TableReport.of(change("none", 0), np.empty(0, np.float32), 0.0, weights=[])
    assert (table.error_mean, table.error_p99, table.error_worst, table.worst_row) == (0.0, 0.0, 0.0, -1)
    builder = ReportBuilder()
    total = builder.build().total
    assert (total.num_embeddings, total.error_p99, total.worst_table, total.worst_row) == (0, 0.0, "", -1)
    builder.add(change("none", 0), np.empty(0, np.float32), 0.0)
    total = builder.build().total
    assert (total.num_embeddings, total.error_mean, total.worst_table, total.worst_row) == (0, 0.0, "", -1)


def test_nan_is_the_worst() -> None:
    """Of rows that are not numbers, where the user lets them be quantized."""
    errors = np.full(1000, 0.25, np.float32)
    errors[[5, 6]] = -np.nan
    builder = ReportBuilder()
    builder.add(change("first", 1000), np.ones(1000, np.float32), 1.0)
    table = builder.add(change("nan", 1000), errors, float("nan"))
    assert np.isnan([table.error_mean, table.error_worst]).all()
    assert (table.error_p99, table.worst_row) == (0.25, 5)
    total = builder.build().total
    assert np.isnan([total.error_worst, total.max_abs_error]).all()
    assert (total.worst_table, total.worst_row, total.error_p99) == ("nan", 5, 1.0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2], r"weights of 't0': expected shape \(3,\), one per row, got \(2,\)"),
        ([[1, 2, 3]], r"weights of 't0': expected shape \(3,\), one per row, got \(1, 3\)"),
        ([1, -2, 3], r"weights of 't0': expected finite float32 numbers of at least 0, got -2.0 at row 1"),
        ([1, 2, float("nan")], "of at least 0, got nan at row 2"),
        ([1, float("inf"), 3], "of at least 0, got inf at row 1"),
        ([1, 2, 1e300], "of at least 0, got inf at row 2"),
    ],
)
def test_weights_that_cannot_be(weights: Any, message: str) -> None:
    for check in (
        lambda: row_weights("t0", weights, 3),
        lambda: TableReport.of(change("t0", 3), np.zeros(3, np.float32), 0.0, weights),
        lambda: ReportBuilder().add(change("t0", 3), np.zeros(3, np.float32), 0.0, weights),
    ):
        with pytest.raises(ValueError, match=message):
            check()


@pytest.mark.parametrize("first_weighted", [True, False])
def test_weights_for_some_tables_alone(first_weighted: bool) -> None:
    builder = ReportBuilder()
    builder.add(change("a", 1), np.ones(1, np.float32), 0.0, [1] if first_weighted else None)
    with pytest.raises(
        ValueError, match=r"for every table or for none, got them for '(a|b)' and not for '(a|b)'"
    ) as info:
        builder.add(change("b", 1), np.ones(1, np.float32), 0.0, None if first_weighted else [1])
    assert ("for 'a' and not for 'b'" in str(info.value)) is first_weighted
    assert [table.name for table in builder.build().tables] == ["a"]


def test_errors_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"errors of 't0': expected shape \(3,\), one per row, got \(4,\)"):
        TableReport.of(change("t0", 3), np.zeros(4, np.float32), 0.0)


def test_keeps_the_errors_until_the_report_is_made() -> None:
    builder = ReportBuilder()
    errors = random_errors(1000)
    kept = weakref.ref(errors)
    builder.add(change("t0", 1000), errors, 0.0)
    del errors
    assert kept() is not None
    report = builder.build()
    gc.collect()
    assert kept() is None
    assert report.total.num_embeddings == 1000
    assert builder.build().tables == ()


def test_needs_no_more_memory_than_the_errors() -> None:
    rows = 4_000_000
    errors, weights = random_errors(rows), np.ones(rows, np.float32)
    builder = ReportBuilder()
    tracemalloc.start()
    try:
        builder.add(change("t0", rows), errors, 0.0, weights)
        builder.build()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.0 * rows  # a byte a row: nothing of the size of a table


def test_prints_a_line_per_table_and_a_total() -> None:
    report = report_of(["t0", "t1"])
    lines = str(report).splitlines()
    assert lines[0] == "2 tables of fp32: 15.4 kB -> 4.20 kB, 3.7 times smaller"
    assert " ".join(lines[2].split()) == "table rows dim format before after mean p99 worst at row max abs"
    for line, table in zip(lines[4:6], report.tables, strict=True):
        cells = line.split()
        assert cells[:4] == [table.name, str(table.num_embeddings), "64", "int8"]
        errors = (table.error_mean, table.error_p99, table.error_worst)
        assert cells[8:] == [*map(readable_error, errors), str(table.worst_row), f"{table.max_abs_error:.3g}"]
    total = lines[7].split()
    assert total[:6] == ["total", "60", "15.4", "kB", "4.20", "kB"]
    assert total[6:9] == [
        f"{e:.3g}" for e in (report.total.error_mean, report.total.error_p99, report.total.error_worst)
    ]
    assert lines[-1] == f"The worst row is row {report.total.worst_row} of {report.total.worst_table!r}."


def test_prints_formats_that_differ() -> None:
    builder = ReportBuilder()
    builder.add(change("t0", 3), random_errors(3), 0.0)
    builder.add(change("t1", 3, format_before="fp16", format_after="int4"), random_errors(3), 0.0)
    text = str(builder.build())
    assert text.startswith("2 tables of fp32/fp16: ")
    assert "fp32>int8" in text
    assert "fp16>int4" in text


def test_prints_without_tables() -> None:
    assert str(ReportBuilder().build()) == "0 tables: 0 B -> 0 B"


def test_fits_into_100_columns() -> None:
    names = [f"{name}_{index}" for name in ("carrier", "tail_number") for index in range(13)]
    builder = ReportBuilder()
    for seed, name in enumerate(names):
        rows = 3**seed % 300_000
        table = builder.add(change(name, rows), random_errors(rows, seed, 0.000211), max_abs_error=0.000123)
        # As large as they come, without their memory.
        builder._tables[-1] = dataclasses.replace(
            table,
            num_embeddings=40_000_000,
            bytes_before=10_240_000_000,
            bytes_after=2_760_000_000,
            worst_row=39_999_999,
        )
    lines = str(builder.build(choice_of(names))).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("40.0M" in line and "10.2 GB" in line for line in lines) == 26


def test_prints_what_was_tried_and_why() -> None:
    choice = choice_of(["often", "never"])
    report = report_of(["often", "never"], choice)
    assert report.trials == choice.trials
    text = str(report)
    assert f"Chosen: {choice.reason}" in text.replace("\n", " ")
    assert "\noften  4e-4 *  0.01    0.1\nnever     0       0      0 *\n" in text
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("What else was measured"))
    assert lines[start + 2].split() == ["512", "kB", "0.7461", "0", "unquantized"]
    assert [line for line in lines[start:] if line.startswith("*")] == [
        "*  91.0 kB  0.7457      4e-4  best mixture of its size; alone, its tables cost 4e-4 in all"
    ]


def test_prints_a_search_that_changed_nothing() -> None:
    choice = choose_formats(
        Budget(metric=lambda model: 0.0, tolerance=0.0),
        [TableSizes("t0", "fp32", {"fp32": 4, "int8": 3, "int4": 2, "int2": 1})],
        lambda formats: float(formats["t0"] == "fp32"),
    )
    text = str(ReportBuilder().build(choice))
    assert "Left as it was: of 4 models measured, no smaller one is within 0." in text
    assert "\nt0      1     1     1        *\n" in text


def test_without_a_search_there_are_no_trials() -> None:
    report = report_of(["t0"])
    assert report.trials == ()
    assert "Chosen" not in str(report)


def test_dataframe() -> None:
    report = report_of(["t0", "t1"])
    frame = report.to_dataframe()
    assert list(frame.columns) == [field.name for field in dataclasses.fields(TableReport)]
    assert frame.to_dict("records") == [dataclasses.asdict(table) for table in report.tables]
    empty = ReportBuilder().build().to_dataframe()
    assert list(empty.columns) == list(frame.columns)
    assert len(empty) == 0


@pytest.mark.parametrize(("module", "method"), [("pandas", "to_dataframe"), ("matplotlib", "plot")])
def test_a_missing_extra_is_named(module: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)  # to import it fails
    monkeypatch.delitem(sys.modules, "dlrm_rs.quantization.plot")
    with pytest.raises(ModuleNotFoundError, match=rf'{module} is missing: pip install "dlrm_rs\[report\]"') as info:
        getattr(report_of(["t0"]), method)()
    assert info.value.name == module


def panel_titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def test_plot_shows_every_table(tmp_path: Path) -> None:
    names = [f"t{index}" for index in range(26)]
    figure = report_of(names, choice_of(names)).plot(tmp_path / "report.png")
    assert panel_titles(figure) == ["Bytes of a table", "Errors of rows", "Models measured"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"{name}  int8" for name in reversed(names)]  # the largest first
    picture = (tmp_path / "report.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 20_000


def test_plot_draws_the_numbers_of_the_report() -> None:
    report = report_of(["t0", "t1"])
    figure = report.plot()
    assert panel_titles(figure) == ["Bytes of a table", "Errors of rows"]
    largest_first = report.tables[::-1]
    for axes, attributes in (
        (figure.axes[0], ("bytes_before", "bytes_after")),
        (figure.axes[1], ("error_mean", "error_p99", "error_worst")),
    ):
        dots = [np.asarray(dots.get_offsets()) for dots in axes.collections[1:]]  # the first are the lines between
        for drawn, attribute in zip(dots, attributes, strict=True):
            assert drawn[:, 0].tolist() == [getattr(table, attribute) for table in largest_first]
            assert drawn[:, 1].tolist() == [0, 1]


def test_plot_of_very_many_tables_shows_the_largest(tmp_path: Path) -> None:
    figure = report_of([f"t{index}" for index in range(200)]).plot(tmp_path / "report.svg")
    assert len(figure.axes[0].get_yticklabels()) == MOST_TABLES
    assert figure.axes[0].get_yticklabels()[0].get_text() == "t199  int8"
    assert "200 tables, the 60 largest shown" in figure.get_suptitle()


def test_plot_without_errors_rows_or_tables(tmp_path: Path) -> None:
    builder = ReportBuilder()
    assert len(builder.build().plot(tmp_path / "none.png").axes) == 2
    builder.add(change("as it was", 3, format_after="fp32"), np.zeros(3, np.float32), 0.0)
    builder.add(change("no rows", 0), np.zeros(0, np.float32), 0.0)
    figure = builder.build().plot(tmp_path / "exact.png")
    assert [text.get_text() for text in figure.axes[1].texts] == ["no error", "no error"]
    builder.add(change("nan", 2), np.array([0.25, np.nan], np.float32), float("nan"))
    figure = builder.build().plot(tmp_path / "nan.png")
    assert figure.axes[1].get_xscale() == "linear"  # of numbers there are none to draw


def test_plot_labels_whole_decades(tmp_path: Path) -> None:
    builder = ReportBuilder()
    builder.add(change("t0", 2), np.array([0.0055, 0.0066], np.float32), 0.0)
    axes = builder.build().plot(tmp_path / "report.png").axes[1]
    low, high = axes.get_xlim()
    assert 0.0005 < low < 0.001
    assert 0.01 < high < 0.02
    assert not any(label.get_text() for label in axes.get_xticklabels(minor=True))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_995, "10.0 kB"),
        (99_950, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (12_345_678, "12.3 MB"),
        (7 * 10**15, "7,000 TB"),
    ],
)
def test_readable_bytes(count: int, text: str) -> None:
    assert readable_bytes(count) == text


def test_readable_counts_and_errors() -> None:
    counts = (0, 999_999, 1_000_000, 40_049_999, 1_040_000_000)
    assert [readable_count(count) for count in counts] == ["0", "999,999", "1.0M", "40.0M", "1,040M"]
    errors = (0.0, 0.33149, 0.0055, 0.000999, 1.234e-12, -0.000222, float("nan"), float("inf"))
    expected = ["0", "0.331", "0.0055", "9.99e-4", "1.23e-12", "-2.22e-4", "nan", "inf"]
    assert [readable_error(error) for error in errors] == expected
