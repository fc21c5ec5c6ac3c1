"""The search for the format of each table, against every mixture there is."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm_rs.quantization.budget import Budget, Choice, TableSizes
from dlrm_rs.quantization.mixtures import MOST_MIXTURES, Option, undominated_mixtures
from dlrm_rs.quantization.search import choose_formats

FORMATS = ("int8", "int4", "int2")
BYTES_PER_ROW = {"fp32": 256, "int8": 70, "int4": 37, "int2": 21}
# Squared relative errors, of a kind.
ERROR = {"fp32": 0.0, "int8": 2.0**-15, "int4": 2.0**-7, "int2": 2.0**-3}

Evaluate = Callable[[Mapping[str, str]], float]


def table(name: str, rows: int) -> TableSizes:
    return TableSizes(name, "fp32", {name: rows * size for name, size in BYTES_PER_ROW.items()})


def tolerate(tolerance: float, **kwargs: Any) -> Budget:
    return Budget(metric=lambda model: 0.0, tolerance=tolerance, **kwargs)


def fit(max_bytes: int, **kwargs: Any) -> Budget:
    return Budget(metric=lambda model: 0.0, max_bytes=max_bytes, **kwargs)


def additive(damages: Mapping[str, Mapping[str, float]]) -> Evaluate:
    """A metric, 1 at first, that loses a number for each table's format. Sums of the numbers must be exact."""
    return lambda formats: 1.0 - sum(damages[name].get(form, 0.0) for name, form in formats.items())


def used(shares: Mapping[str, float]) -> Evaluate:
    """A metric that the error of a table harms as often as its rows are used."""
    return additive({name: {form: share * error for form, error in ERROR.items()} for name, share in shares.items()})


def every_mixture(tables: Sequence[TableSizes], formats: Sequence[str] = FORMATS) -> list[tuple[int, dict[str, str]]]:
    """All there are, and their bytes."""
    names = [table.name for table in tables]
    options = [dict.fromkeys((table.format, *formats)) for table in tables]
    mixtures = [dict(zip(names, mixture, strict=True)) for mixture in itertools.product(*options)]
    return [(total_bytes(tables, mixture), mixture) for mixture in mixtures]


def total_bytes(tables: Sequence[TableSizes], formats: Mapping[str, str]) -> int:
    return sum(table.bytes_of[formats[table.name]] for table in tables)


def smallest_within(tables: Sequence[TableSizes], evaluate: Evaluate, tolerance: float) -> int:
    """Bytes of the smallest mixture within a tolerance."""
    unquantized = evaluate({table.name: table.format for table in tables})
    return min(size for size, formats in every_mixture(tables) if unquantized - evaluate(formats) <= tolerance)


def check_consistent(choice: Choice, tables: Sequence[TableSizes], evaluate: Evaluate, sign: int = 1) -> None:
    """The choice is a trial, and trials are what `evaluate` says."""
    assert choice.trial in choice.trials
    assert set(choice.formats) == {table.name for table in tables}
    present = {table.name: table.format for table in tables}
    assert choice.formats == {**present, **choice.trial.formats}
    assert choice.trials[0].formats == {}
    assert len({tuple(sorted(trial.formats.items())) for trial in choice.trials}) == len(choice.trials)
    for trial in choice.trials:
        formats = {**present, **trial.formats}
        assert all(present[name] != form for name, form in trial.formats.items())
        assert trial.metric == evaluate(formats)
        assert trial.damage == sign * (evaluate(present) - trial.metric)
        assert trial.total_bytes == total_bytes(tables, formats)


# Bytes in steps that are worth a measurement, whatever the other tables are.
sizes = st.fixed_dictionaries({form: st.integers(1, 60).map(lambda size: 16 * size) for form in ("fp32", *FORMATS)})
damages = st.fixed_dictionaries({form: st.integers(0, 8).map(lambda damage: damage / 64) for form in FORMATS})


@st.composite
def additive_models(draw: st.DrawFn) -> tuple[list[TableSizes], Evaluate]:
    drawn = draw(st.lists(st.tuples(sizes, damages), min_size=1, max_size=4))
    tables = [TableSizes(f"t{index}", "fp32", size) for index, (size, _) in enumerate(drawn)]
    return tables, additive({f"t{index}": damage for index, (_, damage) in enumerate(drawn)})


@given(additive_models(), st.integers(0, 32).map(lambda tolerance: tolerance / 64))
def test_finds_the_smallest_where_damages_add_up(model: tuple[list[TableSizes], Evaluate], tolerance: float) -> None:
    tables, evaluate = model
    choice = choose_formats(tolerate(tolerance), tables, evaluate)
    check_consistent(choice, tables, evaluate)
    assert choice.trial.damage <= tolerance
    assert choice.trial.total_bytes == smallest_within(tables, evaluate, tolerance)


@given(additive_models(), st.floats(0, 1))
def test_finds_the_best_that_fits_where_damages_add_up(model: tuple[list[TableSizes], Evaluate], share: float) -> None:
    tables, evaluate = model
    mixtures = every_mixture(tables)
    smallest, largest = min(size for size, _ in mixtures), total_bytes(tables, {t.name: "fp32" for t in tables})
    limit = smallest + int(share * (largest - smallest))
    choice = choose_formats(fit(limit), tables, evaluate)
    check_consistent(choice, tables, evaluate)
    assert choice.trial.total_bytes <= limit
    assert choice.trial.metric == max(evaluate(formats) for size, formats in mixtures if size <= limit)


@given(st.lists(sizes, max_size=4), st.integers(0, 2**32), st.floats(0, 1), st.booleans())
def test_keeps_its_promises_for_any_metric(
    drawn: list[dict[str, int]], seed: int, tolerance: float, higher_is_better: bool
) -> None:
    """Of a metric that is nothing but noise: within the tolerance, and no larger than all tables in one format."""
    tables = [TableSizes(f"t{index}", "fp32", size) for index, size in enumerate(drawn)]

    def evaluate(formats: Mapping[str, str]) -> float:
        return random.Random(f"{seed}{sorted(formats.items())}").random()

    sign = 1 if higher_is_better else -1
    choice = choose_formats(tolerate(tolerance, higher_is_better=higher_is_better), tables, evaluate)
    check_consistent(choice, tables, evaluate, sign)
    assert choice.trial.damage <= tolerance
    unquantized = evaluate({table.name: "fp32" for table in tables})
    for wanted in FORMATS:
        formats = {
            table.name: wanted if table.bytes_of[wanted] < table.bytes_of["fp32"] else "fp32" for table in tables
        }
        if sign * (unquantized - evaluate(formats)) <= tolerance:
            assert choice.trial.total_bytes <= total_bytes(tables, formats)

    limit = max(size for size, _ in every_mixture(tables)) // 2
    if limit >= min(size for size, _ in every_mixture(tables)):
        best = choose_formats(fit(limit, higher_is_better=higher_is_better), tables, evaluate)
        check_consistent(best, tables, evaluate, sign)
        assert best.trial.total_bytes <= limit
        assert all(best.trial.damage <= trial.damage for trial in best.trials if trial.total_bytes <= limit)


def test_rarely_used_tables_get_fewer_bits() -> None:
    shares = {"every request": 1.0, "now and then": 2.0**-6, "hardly ever": 2.0**-14, "never": 0.0}
    tables = [table(name, 1000) for name in shares]
    choice = choose_formats(tolerate(2.0**-12), tables, used(shares))
    assert choice.formats == {
        "every request": "int8",
        "now and then": "int4",
        "hardly ever": "int2",
        "never": "int2",
    }
    assert choice.trial.damage <= 2.0**-12


def test_bytes_go_where_they_are_needed() -> None:
    shares = {"never": 0.0, "often": 1.0, "seldom": 2.0**-10}
    tables = [table(name, 100) for name in shares]
    choice = choose_formats(fit(100 * (256 + 37 + 21)), tables, used(shares))
    assert choice.formats == {"never": "int2", "often": "fp32", "seldom": "int4"}
    assert choice.reason == (
        "31.4 kB instead of 76.8 kB, the best of 13 models measured that fits in 31,400 bytes: metric 0.999992 against "
        "1, 7.63e-6 worse."
    )


def test_harmless_one_by_one_and_not_together() -> None:
    """Damage that starts beyond some error in all: the single measurements show nothing at all."""
    tables = [table(f"t{index}", 1000) for index in range(6)]

    def evaluate(formats: Mapping[str, str]) -> float:
        return 0.75 - max(0.0, sum(ERROR[form] for form in formats.values()) - 2.0**-2)

    choice = choose_formats(tolerate(0.0), tables, evaluate)
    assert all(trial.damage == 0 for trial in choice.trials if len(trial.formats) == 1)
    assert sorted(choice.formats.values()) == ["int2", "int4", "int4", "int4", "int4", "int4"]
    assert choice.trial.total_bytes == smallest_within(tables, evaluate, 0.0)


def test_harm_of_the_worst_table_alone() -> None:
    """Damage far below the sum: what the sums predict is far too large."""
    tables = [table(f"t{index}", 1000 + index) for index in range(5)]

    def evaluate(formats: Mapping[str, str]) -> float:
        return 0.75 - max(ERROR[form] for form in formats.values())

    choice = choose_formats(tolerate(ERROR["int4"]), tables, evaluate)
    assert set(choice.formats.values()) == {"int4"}

    def evaluate_two(formats: Mapping[str, str]) -> float:
        """The first table does not matter."""
        return 0.75 - max(ERROR[form] for name, form in formats.items() if name != "t0")

    choice = choose_formats(tolerate(ERROR["int4"]), tables, evaluate_two)
    assert choice.formats == {"t0": "int2", "t1": "int4", "t2": "int4", "t3": "int4", "t4": "int4"}


@pytest.mark.parametrize("seed", range(10))
def test_noise_below_the_tolerance(seed: int) -> None:
    generator = random.Random(seed)
    shares = {f"t{index}": generator.random() ** 4 for index in range(8)}
    tables = [table(name, generator.randint(100, 10_000)) for name in shares]
    exact = used(shares)

    def noisy(formats: Mapping[str, str]) -> float:
        return exact(formats) + random.Random(f"{seed}{sorted(formats.items())}").uniform(-1e-4, 1e-4)

    tolerance = 2.0**-6
    choice = choose_formats(tolerate(tolerance), tables, noisy)
    check_consistent(choice, tables, noisy)
    assert choice.trial.damage <= tolerance
    # Of the best that can be had without noise, nearly all is found.
    assert choice.trial.total_bytes <= 1.03 * smallest_within(tables, exact, tolerance - 4e-4)


def test_ties_are_broken_the_same_way() -> None:
    tables = [table(name, 100) for name in ("a", "b", "c")]
    evaluate = used({"a": 0.5, "b": 0.5, "c": 0.5})
    tolerance = ERROR["int4"] / 2 + ERROR["int8"]
    first = choose_formats(tolerate(tolerance), tables, evaluate)
    assert sorted(first.formats.values()) == ["int4", "int8", "int8"]
    assert choose_formats(tolerate(tolerance), tables, evaluate) == first


@pytest.mark.parametrize(
    ("tolerance", "chosen"), [(0.0, "fp32"), (ERROR["int8"], "int8"), (0.1, "int4"), (ERROR["int2"], "int2")]
)
def test_one_table(tolerance: float, chosen: str) -> None:
    choice = choose_formats(tolerate(tolerance), [table("only", 10)], used({"only": 1.0}))
    assert choice.formats == {"only": chosen}
    assert len(choice.trials) <= 4


def test_no_tables() -> None:
    for budget in (tolerate(0.1), fit(0)):
        choice = choose_formats(budget, [], lambda formats: 0.5)
        assert choice.formats == {}
        assert [trial.metric for trial in choice.trials] == [0.5]


def test_tables_without_rows_stay_as_they_are() -> None:
    tables = [table("none", 0), table("some", 100)]
    choice = choose_formats(tolerate(0.1), tables, used({"none": 0.0, "some": 1.0}))
    assert choice.formats == {"none": "fp32", "some": "int4"}


def test_the_smallest_model_within_is_found_at_once() -> None:
    tables = [table(f"t{index}", 100) for index in range(5)]
    choice = choose_formats(tolerate(1.0), tables, used({f"t{index}": 1.0 for index in range(5)}))
    assert [trial.reason for trial in choice.trials] == ["unquantized", "every table in int2"]
    assert set(choice.formats.values()) == {"int2"}


def test_a_loss_is_better_when_lower() -> None:
    tables = [table("often", 100), table("seldom", 100)]
    auc = used({"often": 1.0, "seldom": 2.0**-8})
    by_auc = choose_formats(tolerate(2.0**-10), tables, auc)
    by_loss = choose_formats(tolerate(2.0**-10, higher_is_better=False), tables, lambda formats: -auc(formats))
    assert by_loss.formats == by_auc.formats == {"often": "int8", "seldom": "int2"}
    assert [trial.damage for trial in by_loss.trials] == [trial.damage for trial in by_auc.trials]


def test_a_better_metric_is_damage_below_zero() -> None:
    choice = choose_formats(
        tolerate(0.0), [table("t", 10)], lambda formats: {"fp32": 0.5, "int8": 0.625}.get(formats["t"], 0.0)
    )
    assert choice.formats == {"t": "int8"}
    assert choice.trial.damage == -0.125
    assert "0.125 better" in choice.reason


def test_formats_that_save_nothing_are_not_tried() -> None:
    tables = [
        TableSizes("already int4", "int4", {"int8": 70, "int4": 37, "int2": 21}),
        TableSizes("one element a row", "fp32", {"fp32": 4, "int8": 9, "int4": 5, "int2": 5}),
    ]
    tried = []

    def evaluate(formats: Mapping[str, str]) -> float:
        tried.append(tuple(formats.values()))
        return 0.5 if formats["already int4"] == "int2" else 0.75

    choice = choose_formats(tolerate(0.1), tables, evaluate)
    assert choice.formats == {"already int4": "int4", "one element a row": "fp32"}
    assert tried == [("int4", "fp32"), ("int2", "fp32")]
    assert choice.reason == (
        "Left as it was: of 2 models measured, no smaller one is within 0.1. The next smaller one, of 25 B, is 0.25 "
        "worse."
    )


def test_small_tables_are_not_measured_one_by_one() -> None:
    shares = {"large": 2.0**-8, "larger": 1.0, "tiny": 1.0, "tinier": 1.0}
    tables = [table("large", 10**6), table("larger", 2 * 10**6), table("tiny", 100), table("tinier", 3)]
    choice = choose_formats(tolerate(2.0**-10), tables, used(shares))
    assert choice.formats == {"large": "int2", "larger": "int8", "tiny": "fp32", "tinier": "fp32"}
    assert not any(set(trial.formats) <= {"tiny", "tinier"} for trial in choice.trials[1:])


def test_small_tables_shrink_when_all_bytes_count() -> None:
    tables = [table("large", 10**6), table("tiny", 100)]
    limit = 21 * (10**6 + 100)
    choice = choose_formats(fit(limit), tables, used({"large": 1.0, "tiny": 1.0}))
    assert choice.formats == {"large": "int2", "tiny": "int2"}
    assert choice.trial.total_bytes == limit


def test_a_model_that_fits_is_left_as_it_is() -> None:
    tables = [table("t", 10)]
    choice = choose_formats(fit(2560), tables, used({"t": 1.0}))
    assert choice.formats == {"t": "fp32"}
    assert len(choice.trials) == 1
    assert choice.reason == "Left as it was: the tables take 2,560 bytes, which is within 2,560 bytes."


def test_bytes_that_no_format_fits() -> None:
    tables = [table("a", 100), table("b", 1000)]
    with pytest.raises(ValueError, match=r"max_bytes: expected at least 23,100, which .* smallest .*, got 23,099"):
        choose_formats(fit(23_099), tables, lambda formats: pytest.fail("measured"))
    assert choose_formats(fit(23_100), tables, used({"a": 1.0, "b": 1.0})).trial.total_bytes == 23_100


def test_nan_names_the_formats_that_gave_it() -> None:
    tables = [table("a", 10), table("b", 10)]

    def evaluate(formats: Mapping[str, str]) -> float:
        return float("nan") if formats == {"a": "fp32", "b": "int4"} else 0.0 if "int2" in formats.values() else 1.0

    with pytest.raises(ValueError, match=r"metric: expected a number, got nan with \{'b': 'int4'\}"):
        choose_formats(tolerate(0.0, formats=("int4", "int2")), tables, lambda f: evaluate(f) - ("int4" in f["a"]))
    for metric in ("nan", "inf"):
        with pytest.raises(ValueError, match=f"metric: expected a number, got {metric} of the unquantized model"):
            choose_formats(tolerate(0.0), tables, lambda formats: float(metric))  # noqa: B023


def test_infinitely_bad_is_bad() -> None:
    tables = [table("a", 10), table("b", 10), table("c", 10)]

    def loss(formats: Mapping[str, str]) -> float:
        return float("inf") if "int2" in (formats["a"], formats["b"]) else 0.5

    choice = choose_formats(tolerate(0.1, higher_is_better=False), tables, loss)
    assert choice.formats == {"a": "int4", "b": "int4", "c": "int2"}
    choice = choose_formats(fit(10 * (37 + 37 + 21), higher_is_better=False), tables, loss)
    assert choice.formats == {"a": "int4", "b": "int4", "c": "int2"}


@pytest.mark.parametrize("count", [1, 26, 100])
def test_measures_no_more_than_it_says(count: int) -> None:
    generator = random.Random(count)
    shares = {f"t{index}": generator.random() ** 8 for index in range(count)}
    tables = [table(name, generator.randint(1000, 10_000)) for name in shares]
    budgets = [tolerate(sum(shares.values()) / 1000), fit(30 * sum(t.bytes_of["fp32"] for t in tables) // 256)]
    for budget in budgets:
        done: list[int] = []
        at_most: list[int] = []

        def progress(count: int, most: int, done: list[int] = done, at_most: list[int] = at_most) -> None:
            done.append(count)
            at_most.append(most)

        choice = choose_formats(budget, tables, used(shares), progress)
        assert len(choice.trials) <= 1 + 3 * (count + 1) + 30
        assert done == [*range(1, len(choice.trials) + 1), len(choice.trials)]
        assert all(now <= most for now, most in zip(done, at_most, strict=True))
        assert done[-1] == at_most[-1]


def test_tells_what_it_tried_and_why() -> None:
    tables = [table("often", 1000), table("seldom", 1000)]
    choice = choose_formats(tolerate(2.0**-8, formats=("int8", "int2")), tables, used({"often": 1.0, "seldom": 0.25}))
    assert [(dict(trial.formats), trial.reason) for trial in choice.trials] == [
        ({}, "unquantized"),
        ({"often": "int2", "seldom": "int2"}, "every table in int2"),
        ({"often": "int8", "seldom": "int8"}, "every table in int8"),
        ({"often": "int8"}, "this table alone"),
        ({"often": "int2"}, "this table alone"),
        ({"seldom": "int8"}, "this table alone"),
        ({"seldom": "int2"}, "this table alone"),
        ({"often": "int8", "seldom": "int2"}, "best mixture of its size; alone, its tables cost 0.0313 in all"),
    ]
    assert choice.reason == (
        "140 kB instead of 512 kB, the smallest of 8 models measured that is within 0.00390625 of the unquantized one: "
        "metric 0.999962 against 1, 3.81e-5 worse. The next smaller one, of 91.0 kB, is 0.0313 worse."
    )


def test_many_tables_are_thinned_and_lose_little() -> None:
    generator = random.Random(0)
    options = []
    for _ in range(40):
        rows, share = generator.randint(1000, 100_000), generator.random() ** 4
        sizes = [rows * size for size in BYTES_PER_ROW.values()]
        options.append([Option(f, s, share * ERROR[f], i) for i, (f, s) in enumerate(zip(ERROR, sizes, strict=True))])
    mixtures = undominated_mixtures(options)
    assert MOST_MIXTURES / 2 < len(mixtures) <= MOST_MIXTURES
    assert set(mixtures[0].in_order()) == {"fp32"}
    assert set(mixtures[-1].in_order()) == {"int2"}
    for above, below in itertools.pairwise(mixtures):
        assert above.bytes > below.bytes
        assert (above.harm, above.expected_harm) < (below.harm, below.expected_harm)
    for mixture in mixtures[:: len(mixtures) // 20]:
        chosen = [next(o for o in table if o.format == f) for table, f in zip(options, mixture.in_order(), strict=True)]
        assert mixture.bytes == sum(option.bytes for option in chosen)
        assert mixture.harm == pytest.approx(sum(option.harm for option in chosen))
        # By weak duality no mixture of fewer bytes is much better: this bound holds for every price of a byte.
        bound = max(
            sum(min(option.harm + price * option.bytes for option in table) for table in options)
            - price * mixture.bytes
            for price in (2.0**-exponent for exponent in range(10, 50))
        )
        assert mixture.harm <= 1.2 * max(bound, 0) + 1e-4


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, "tolerance, max_bytes: expected exactly one of them, got None and None"),
        ({"tolerance": 0.1, "max_bytes": 5}, ValueError, "expected exactly one of them, got 0.1 and 5"),
        ({"tolerance": -0.1}, ValueError, "tolerance: expected a finite number of at least 0, got -0.1"),
        ({"tolerance": float("nan")}, ValueError, "tolerance: expected a finite number of at least 0, got nan"),
        ({"tolerance": float("inf")}, ValueError, "tolerance: expected a finite number of at least 0, got inf"),
        ({"max_bytes": -1}, ValueError, "max_bytes: expected a finite number of at least 0, got -1"),
        ({"max_bytes": 1.5}, TypeError, "max_bytes: expected an integer, got float"),
        ({"tolerance": "1e-3"}, TypeError, "tolerance: expected a number, got str"),
        ({"tolerance": True}, TypeError, "tolerance: expected a number, got bool"),
        ({"tolerance": 0, "formats": ()}, ValueError, r"formats: expected one row format or more, each once, got \(\)"),
        ({"tolerance": 0, "formats": ("int8", "int8")}, ValueError, r"each once, got \('int8', 'int8'\)"),
        ({"tolerance": 0, "formats": "int8"}, TypeError, "formats: expected names .* got the string 'int8'"),
        ({"tolerance": 0, "metric": 0.5}, TypeError, "metric: expected a function of the model, got float"),
    ],
)
def test_budgets_that_cannot_be(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Budget(**{"metric": lambda model: 0.0, **kwargs})


def test_formats_become_a_tuple() -> None:
    assert tolerate(0.0, formats=["int8", "int4"]).formats == ("int8", "int4")
