"""The precision of each table, chosen by what it does to the user's own metric.

Fewer bits harm a table as much as its rows are used and as their errors matter, which no error of a row tells. So the
metric is measured: with each table alone in each format, then with mixtures of formats that these measurements make
promising. What is chosen has always been measured as a whole, since harms need not add up.

Knows nothing of models or the engine: tables are names and bytes, and a callback measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from dlrm_rs.quantization.budget import Budget, Choice, TableSizes, Trial
from dlrm_rs.quantization.mixtures import MOST_MIXTURES, Option, undominated_mixtures
from dlrm_rs.quantization.readable import readable_bytes, readable_error

__all__ = ["choose_formats"]

# Measurements spent on improving the best model by one table at a time.
_IMPROVEMENTS = 8
# Mixtures measured in search of the best one within a number of bytes.
_BEST_MIXTURES = 3
# The most places that `_probe_for_last` asks at.
_PROBES = 2 * MOST_MIXTURES.bit_length()
# Share of a model's bytes that is not worth a measurement. Tables that can save less than this share of the smallest
# model, all of them together, are not measured one by one.
_NEGLIGIBLE = 2.5e-3
# Harm as good as infinite, of which sums and differences are finite.
_BEYOND_ALL = 1e30
# With half the bits the squared error grows by this much or more. So are formats ordered for which the same harm was
# measured, of a table that does not matter or by a metric too coarse to tell.
_GROWTH_OF_ERROR = 16

_Formats = tuple[str, ...]  # of each table, in the order of the tables
_Move = tuple[float, float, int, str]  # least first: what to order by, a table's index, its new format


def choose_formats(
    budget: Budget,
    tables: Sequence[TableSizes],
    evaluate: Callable[[Mapping[str, str]], float],
    progress: Callable[[int, int], None] | None = None,
) -> Choice:
    """Search for the row format of each table.

    Every table alone in every format gives the harm of each; these harms, added up, rank the mixtures (`mixtures.py`).
    For a tolerance, the smallest mixture within it is then looked for among them, starting where the sums have it. For
    a number of bytes, the best mixtures that fit are measured. Either way, single tables of the best model are changed
    after that where it may improve. All tables in one format are measured too: the choice is never behind such a model.

    Args:
        budget: What is wanted. Its metric is not called here.
        tables: All tables of the model, by distinct names.
        evaluate: Gives the metric with every table in the format given for its name. It leaves the tables so: whoever
            calls this function brings them into the formats of the choice, or back into theirs.
        progress: Called after every measurement with the number of them and the most that there may be; once more at
            the end, with both equal.

    Returns:
        The choice. The same measurements always give the same.

    Raises:
        ValueError: `max_bytes` is less than the tables take in their smallest formats (found before anything is
            measured), or a metric is NaN, or that of the unquantized model is infinite.

    Example:
        >>> tables = [TableSizes(name, "fp32", {"fp32": 400, "int8": 120, "int4": 70}) for name in ("used", "unused")]
        >>> harm = {"fp32": 0.0, "int8": 0.0005, "int4": 0.01}
        >>> budget = Budget(metric=lambda model: 0.0, tolerance=1e-3, formats=("int8", "int4"))
        >>> choose_formats(budget, tables, lambda formats: 0.75 - harm[formats["used"]]).formats
        {'used': 'int8', 'unused': 'int4'}
    """
    measured = _Measured(budget, tables, evaluate, progress)
    unquantized = measured.trial(measured.present, "unquantized")
    if budget.max_bytes is None:
        _search_smallest(measured)
    elif unquantized.total_bytes > budget.max_bytes:
        _search_best(measured, budget.max_bytes)
    return measured.choice()


class _Measured:
    """The models measured so far, and the measurement of others.

    Attributes:
        present: The formats that the tables have.
        smaller: Of each table, the formats to choose from that take fewer bytes, in the order of the budget.
    """

    def __init__(
        self,
        budget: Budget,
        tables: Sequence[TableSizes],
        evaluate: Callable[[Mapping[str, str]], float],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.budget = budget
        self.present: _Formats = tuple(table.format for table in tables)
        self.smaller = [
            [name for name in budget.formats if table.bytes_of[name] < table.bytes_of[table.format]] for table in tables
        ]
        self._tables = tables
        self._evaluate = evaluate
        self._progress = progress
        self._trials: dict[_Formats, Trial] = {}
        self._at_most = 1 + len(budget.formats) + sum(map(len, self.smaller)) + _PROBES + _IMPROVEMENTS
        if budget.max_bytes is not None:
            self._check_feasible(budget.max_bytes)

    def _check_feasible(self, max_bytes: int) -> None:
        needed = self.total_bytes(self.smallest())
        if needed > max_bytes:
            raise ValueError(
                f"max_bytes: expected at least {needed:,}, which the tables take in the smallest of their formats, got "
                f"{max_bytes:,}"
            )

    def __contains__(self, formats: _Formats) -> bool:
        return formats in self._trials

    def trial(self, formats: _Formats, reason: str) -> Trial:
        """Measure a model, unless it has been measured."""
        if formats not in self._trials:
            named = self._named(formats)
            changed = {name: named[name] for name, before in self._named(self.present).items() if named[name] != before}
            metric = _checked_metric(float(self._evaluate(named)), changed)
            unquantized = self._trials[self.present].metric if self._trials else metric
            damage = self.budget.damage(metric, unquantized)
            self._trials[formats] = Trial(changed, self.total_bytes(formats), metric, damage, reason)
            self._tell_progress(self._at_most)
        return self._trials[formats]

    def _named(self, formats: _Formats) -> dict[str, str]:
        return {table.name: name for table, name in zip(self._tables, formats, strict=True)}

    def table_name(self, index: int) -> str:
        """Of a table, by its place."""
        return self._tables[index].name

    def _tell_progress(self, at_most: int) -> None:
        if self._progress is not None:
            self._progress(len(self._trials), at_most)

    def total_bytes(self, formats: _Formats) -> int:
        """What the tables take in these formats."""
        return sum(table.bytes_of[name] for table, name in zip(self._tables, formats, strict=True))

    def smallest(self) -> _Formats:
        """Each table in its smallest format."""
        return tuple(
            min((before, *names), key=table.bytes_of.__getitem__)
            for table, before, names in zip(self._tables, self.present, self.smaller, strict=True)
        )

    def uniform(self) -> list[tuple[_Formats, str]]:
        """All tables in one format, but for those that it does not make smaller; most bytes first, and what to say."""
        models = [(self._all_in(wanted), f"every table in {wanted}") for wanted in self.budget.formats]
        return sorted(models, key=lambda model: -self.total_bytes(model[0]))

    def _all_in(self, wanted: str) -> _Formats:
        return tuple(
            wanted if wanted in names else before for before, names in zip(self.present, self.smaller, strict=True)
        )

    def options(self) -> list[list[Option]]:
        """What each table may be, and the harm of each: measured with the other tables as they are."""
        negligible = self._negligible()
        return [self._options_of(index, index not in negligible) for index in range(len(self._tables))]

    def _negligible(self) -> set[int]:
        """The tables that stay as they are since all of them together can save next to nothing."""
        smallest = self.smallest()
        savings = [
            table.bytes_of[before] - table.bytes_of[least]
            for table, before, least in zip(self._tables, self.present, smallest, strict=True)
        ]
        by_saving = sorted(range(len(savings)), key=savings.__getitem__)
        sums = accumulate(savings[index] for index in by_saving)
        limit = _NEGLIGIBLE * self.total_bytes(smallest)
        return {index for index, sum_ in zip(by_saving, sums, strict=True) if sum_ <= limit}

    def _options_of(self, index: int, may_change: bool) -> list[Option]:
        table, before = self._tables[index], self.present[index]
        options = [Option(before, table.bytes_of[before], 0.0, 0)]
        for name in self.smaller[index] if may_change else ():
            damage = self.trial(_changed(self.present, index, name), "this table alone").damage
            # Less than no harm is noise, or luck that need not last in a mixture.
            harm = min(max(damage, 0.0), _BEYOND_ALL)
            expected = _GROWTH_OF_ERROR ** self.budget.formats.index(name)
            options.append(Option(name, table.bytes_of[name], harm, expected))
        return options

    def best(self) -> _Formats:
        """The measured model that serves the budget best."""
        return min(self._trials, key=lambda formats: self._rank(self._trials[formats]))

    def _rank(self, trial: Trial) -> tuple[bool, float, float]:
        """Least for the best model. The unquantized one is always within a tolerance."""
        if self.budget.max_bytes is None:
            return not self.within_tolerance(trial), trial.total_bytes, trial.damage
        return trial.total_bytes > self.budget.max_bytes, trial.damage, trial.total_bytes

    def within_tolerance(self, trial: Trial) -> bool:
        """Whether a model is good enough, for a budget with a tolerance."""
        return self.budget.tolerance is not None and trial.damage <= self.budget.tolerance

    def choice(self) -> Choice:
        """The best model, and why."""
        best = self.best()
        trials = tuple(self._trials.values())
        self._tell_progress(len(trials))
        chosen = self._trials[best]
        reason = _reason(self.budget, chosen, trials)
        return Choice(self._named(best), self.budget.formats, chosen, trials, reason)


def _search_smallest(measured: _Measured) -> None:
    """Measure what may be the smallest model within the tolerance."""
    for formats, reason in reversed(measured.uniform()):
        if measured.within_tolerance(measured.trial(formats, reason)):
            break  # the others are larger
    if measured.total_bytes(measured.best()) == measured.total_bytes(measured.smallest()):
        return
    options = measured.options()
    limit = measured.total_bytes(measured.best())
    mixtures = [mixture for mixture in undominated_mixtures(options) if mixture.bytes < limit]
    tolerance = measured.budget.tolerance or 0.0

    def is_within(index: int) -> bool:
        reason = f"best mixture of its size; alone, its tables cost {readable_error(mixtures[index].harm)} in all"
        return measured.within_tolerance(measured.trial(mixtures[index].in_order(), reason))

    predicted = sum(mixture.harm <= tolerance for mixture in mixtures) - 1
    _probe_for_last(is_within, len(mixtures), max(predicted, 0))
    for _ in range(_IMPROVEMENTS):
        if not _shrink_a_table(measured, options, tolerance):
            break


def _probe_for_last(holds: Callable[[int], bool], count: int, start: int) -> None:
    """Ask around the last of `count` places where something holds that holds at the first places and at no others.

    Begins at `start`, goes away from it in steps that double, and then halves what is left, so that a good guess is
    cheap. Where the assumption does not hold, it has still asked at no more places.
    """
    low, high, step, place = -1, count, 1, start
    while high - low > 1:
        if holds(place):
            low = place
        else:
            high = place
        if low >= 0 and high < count:
            place = (low + high) // 2
        else:
            place = min(low + step, count - 1) if low >= 0 else max(high - step, 0)
            step *= 2


def _shrink_a_table(measured: _Measured, options: Sequence[Sequence[Option]], tolerance: float) -> bool:
    """Measure the best model with one table smaller: of those that may stay within the tolerance, the smallest.

    Returns:
        Whether there was one.
    """
    best = measured.best()
    total, damage = measured.total_bytes(best), measured.trial(best, "best so far").damage
    moves: list[_Move] = []
    for index, now, other in _changes(options, best):
        if other.bytes - now.bytes <= -_NEGLIGIBLE * total and damage + other.harm - now.harm <= tolerance:
            moves.append((other.bytes - now.bytes, other.harm - now.harm, index, other.format))
    return _measure_first(measured, best, moves)


def _search_best(measured: _Measured, max_bytes: int) -> None:
    """Measure what may be the best model within a number of bytes."""
    for formats, reason in measured.uniform():
        if measured.total_bytes(formats) <= max_bytes:
            measured.trial(formats, reason)
            break  # the others have fewer bits
    options = measured.options()
    mixtures = [mixture for mixture in undominated_mixtures(options) if mixture.bytes <= max_bytes]
    if not mixtures:  # every table counts
        measured.trial(measured.smallest(), "the smallest of all models")
    for mixture in mixtures[:_BEST_MIXTURES]:
        reason = f"a best mixture that fits; alone, its tables cost {readable_error(mixture.harm)} in all"
        measured.trial(mixture.in_order(), reason)
    for _ in range(_IMPROVEMENTS):
        if not _enlarge_a_table(measured, options, max_bytes):
            break


def _enlarge_a_table(measured: _Measured, options: Sequence[Sequence[Option]], max_bytes: int) -> bool:
    """Measure the best model with one table larger: of those that fit, the one that should improve it most.

    Returns:
        Whether there was one.
    """
    best = measured.best()
    left = max_bytes - measured.total_bytes(best)
    moves: list[_Move] = []
    for index, now, other in _changes(options, best):
        if 0 < other.bytes - now.bytes <= left and other.harm < now.harm:
            moves.append((other.harm - now.harm, other.bytes - now.bytes, index, other.format))
    return _measure_first(measured, best, moves)


def _measure_first(measured: _Measured, formats: _Formats, moves: Sequence[_Move]) -> bool:
    """Measure the formats with the first of these moves that leads to something new."""
    for *_, index, name in sorted(moves):
        changed = _changed(formats, index, name)
        if changed not in measured:
            measured.trial(changed, f"the best so far with {measured.table_name(index)!r} in {name}")
            return True
    return False


def _changes(options: Sequence[Sequence[Option]], formats: _Formats) -> Iterator[tuple[int, Option, Option]]:
    """A table's index, what it is, and what else it may be. Without those that were not measured as what they are."""
    for index, (others, name) in enumerate(zip(options, formats, strict=True)):
        for now in others:
            if now.format == name:
                yield from ((index, now, other) for other in others if other is not now)


def _changed(formats: _Formats, index: int, name: str) -> _Formats:
    return (*formats[:index], name, *formats[index + 1 :])


def _checked_metric(metric: float, changed: Mapping[str, str]) -> float:
    # Infinitely bad is a metric that a quantized model may have, but no difference to infinity tells anything.
    if math.isnan(metric) or (math.isinf(metric) and not changed):
        model = f"with {dict(changed)}" if changed else "of the unquantized model"
        raise ValueError(f"metric: expected a number, got {metric} {model}")
    return metric


def _reason(budget: Budget, chosen: Trial, trials: Sequence[Trial]) -> str:
    if budget.max_bytes is None:
        return _reason_of_smallest(f"{budget.tolerance:g}", chosen, trials)
    limit = f"{budget.max_bytes:,} bytes"
    if not chosen.formats:
        return f"Left as it was: the tables take {chosen.total_bytes:,} bytes, which is within {limit}."
    return (
        f"{_sizes(chosen, trials)}, the best of {len(trials)} models measured that fits in {limit}: "
        f"{_metrics(chosen, trials)}."
    )


def _reason_of_smallest(tolerance: str, chosen: Trial, trials: Sequence[Trial]) -> str:
    smaller = [trial for trial in trials if trial.total_bytes < chosen.total_bytes]
    next_smaller = max(smaller, key=lambda trial: trial.total_bytes, default=None)
    beyond = (
        f" The next smaller one, of {readable_bytes(next_smaller.total_bytes)}, is {_worse(next_smaller.damage)}."
        if next_smaller
        else ""
    )
    if not chosen.formats:
        return f"Left as it was: of {len(trials)} models measured, no smaller one is within {tolerance}.{beyond}"
    return (
        f"{_sizes(chosen, trials)}, the smallest of {len(trials)} models measured that is within {tolerance} of the "
        f"unquantized one: {_metrics(chosen, trials)}.{beyond}"
    )


def _sizes(chosen: Trial, trials: Sequence[Trial]) -> str:
    return f"{readable_bytes(chosen.total_bytes)} instead of {readable_bytes(trials[0].total_bytes)}"


def _metrics(chosen: Trial, trials: Sequence[Trial]) -> str:
    return f"metric {chosen.metric:.6g} against {trials[0].metric:.6g}, {_worse(chosen.damage)}"


def _worse(damage: float) -> str:
    if not damage:
        return "no worse"
    return f"{readable_error(abs(damage))} {'better' if damage < 0 else 'worse'}"
