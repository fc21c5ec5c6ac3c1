"""KeyedJaggedTensor, JaggedTensor and KeyedTensor against examples worked by hand."""

import pickle

import pytest
import torch

from dlrm_rs.jagged import JaggedTensor
from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.keyed_tensor import KeyedTensor

KEYS = ["a", "b", "c"]
VALUES = [10, 11, 20, 30, 31, 32, 40]
LENGTHS = [2, 1, 0, 3, 0, 1]  # a: [10 11] [20]; b: [] [30 31 32]; c: [] [40]
OFFSETS = [0, 2, 3, 3, 6, 6, 7]


def example(dtype: torch.dtype = torch.int64, weighted: bool = False) -> KeyedJaggedTensor:
    weights = torch.arange(7, dtype=torch.float32) if weighted else None
    return KeyedJaggedTensor.from_lengths_sync(KEYS, torch.tensor(VALUES), torch.tensor(LENGTHS, dtype=dtype), weights)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_and_offsets_give_each_other_in_the_dtype_given(dtype: torch.dtype) -> None:
    by_lengths = example(dtype)
    by_offsets = KeyedJaggedTensor.from_offsets_sync(KEYS, torch.tensor(VALUES), torch.tensor(OFFSETS, dtype=dtype))
    for batch in (by_lengths, by_offsets):
        assert batch.stride() == 2
        assert batch.offsets().tolist() == OFFSETS
        assert batch.lengths().tolist() == LENGTHS
        assert batch.offsets().dtype is dtype
        assert batch.lengths().dtype is dtype
    assert by_lengths.offset_per_key() == [0, 3, 6, 7]
    assert by_lengths.length_per_key() == [3, 3, 1]


def test_what_was_not_given_is_none_until_computed() -> None:
    batch = KeyedJaggedTensor.from_offsets_sync(KEYS, torch.tensor(VALUES), torch.tensor(OFFSETS))
    assert batch.lengths_or_none() is None
    batch.lengths()
    assert batch.lengths_or_none() is not None
    assert batch.offsets_or_none() is not None
    assert example().offsets_or_none() is None


def test_permute_reorders_repeats_and_drops() -> None:
    batch = example(weighted=True).permute([2, 0, 2])
    assert batch.keys() == ["c", "a", "c"]
    assert batch.values().tolist() == [40, 10, 11, 20, 40]
    assert batch.weights().tolist() == [6, 0, 1, 2, 6]
    assert batch.lengths().tolist() == [0, 1, 2, 1, 0, 1]
    assert batch.stride() == 2
    assert example().permute([]).stride() == 2


def test_features_by_name_and_by_segments() -> None:
    batch = example(weighted=True)
    assert [bag.tolist() for bag in batch["b"].to_dense()] == [[], [30, 31, 32]]
    assert batch["b"].weights().tolist() == [3, 4, 5]
    assert list(batch) == list(batch.to_dict()) == KEYS
    first, second = batch.split([1, 2])
    assert (first.keys(), second.keys()) == (["a"], ["b", "c"])
    assert second.values().tolist() == [30, 31, 32, 40]
    assert second.lengths().tolist() == [0, 3, 0, 1]


def test_a_batch_of_no_samples() -> None:
    batch = KeyedJaggedTensor(["a"], torch.empty(0, dtype=torch.int64), offsets=torch.tensor([0]))
    assert (batch.stride(), batch.offset_per_key(), batch.lengths().tolist()) == (0, [0, 0], [])


def test_to_and_pickle_keep_everything() -> None:
    batch = example(weighted=True)
    for copy in (batch.to("cpu"), pickle.loads(pickle.dumps(batch))):
        assert copy.keys() == batch.keys()
        assert torch.equal(copy.values(), batch.values())
        assert torch.equal(copy.offsets(), batch.offsets())
        assert torch.equal(copy.weights(), batch.weights())
    assert batch.to("cpu").values() is batch.values()
    assert batch.to("meta").device() == torch.device("meta")


def test_a_jagged_tensor_may_hold_rows() -> None:
    rows = JaggedTensor(torch.arange(6.0).view(3, 2), offsets=torch.tensor([0, 1, 3]))
    assert [bag.shape for bag in rows.to_dense()] == [(1, 2), (2, 2)]


def test_no_weights_is_said() -> None:
    assert example().weights_or_none() is None
    with pytest.raises(ValueError, match="without weights"):
        example().weights()


@pytest.mark.parametrize(
    ("lengths", "offsets", "stride", "message"),
    [
        (None, None, None, "at least one of the two"),
        ([2, 1, 0, 3, 1], None, None, "multiple of 3 keys in bags, got 5"),
        (LENGTHS, None, 3, "3 keys times stride 3 = 9 bags, got 6"),
        (LENGTHS, OFFSETS[:-1], None, "offsets: expected 7 elements for 6 lengths, got 6"),
        (None, [], None, "at least 1, got 0"),
    ],
)
def test_shapes_that_do_not_fit(
    lengths: list[int] | None, offsets: list[int] | None, stride: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        KeyedJaggedTensor(
            KEYS,
            torch.tensor(VALUES),
            lengths=None if lengths is None else torch.tensor(lengths, dtype=torch.int64),
            offsets=None if offsets is None else torch.tensor(offsets, dtype=torch.int64),
            stride=stride,
        )


def test_other_bad_arguments() -> None:
    values, lengths = torch.tensor(VALUES), torch.tensor(LENGTHS)
    with pytest.raises(TypeError, match=r"lengths: expected torch.int32 or torch.int64, got torch.float32"):
        KeyedJaggedTensor(KEYS, values, lengths=lengths.float())
    with pytest.raises(ValueError, match=r"values: expected shape \(L,\), got \(7, 1\)"):
        KeyedJaggedTensor(KEYS, values[:, None], lengths=lengths)
    with pytest.raises(ValueError, match=r"weights: expected one per value, shape \(7,\), got \(6,\)"):
        KeyedJaggedTensor(KEYS, values, torch.ones(6), lengths=lengths)
    with pytest.raises(ValueError, match="lengths: expected on the device of values, cpu, got meta"):
        KeyedJaggedTensor(KEYS, values, lengths=lengths.to("meta"))
    with pytest.raises(ValueError, match="stride: expected the batch size"):
        KeyedJaggedTensor([], values[:0], lengths=lengths[:0])
    with pytest.raises(KeyError, match=r"expected one of .*, got 'd'"):
        example()["d"]
    with pytest.raises(IndexError, match="expected features 0 to 2, got 3"):
        example().permute([3])
    with pytest.raises(ValueError, match="segments: expected sizes that add up to 3 keys"):
        example().split([1, 1])


@pytest.mark.parametrize(
    "offsets", [[0, 2, 3, 3, 6, 6, 8], [0, 2, 3, 3, 6, 6, 6], [1, 2, 3, 3, 6, 6, 7], [0, 2, 5, 3, 4, 6, 7]]
)
def test_offsets_are_checked_before_values_are_cut(offsets: list[int]) -> None:
    batch = KeyedJaggedTensor.from_offsets_sync(KEYS, torch.tensor(VALUES), torch.tensor(offsets))
    with pytest.raises(ValueError, match="offsets: expected to rise from 0 to the 7 values"):
        batch["a"].to_dense(), batch["b"].to_dense(), batch["c"].to_dense()


def test_keyed_tensor_by_name() -> None:
    pooled = KeyedTensor(["a", "b"], [1, 2], torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert pooled["a"].tolist() == [[1], [4]]
    assert pooled["b"].tolist() == [[2, 3], [5, 6]]
    assert {key: value.tolist() for key, value in pooled.to_dict().items()} == {"a": [[1], [4]], "b": [[2, 3], [5, 6]]}
    assert pooled.offset_per_key() == [0, 1, 3]
    assert pooled.to("meta").device() == torch.device("meta")


def test_keyed_tensor_bad_arguments() -> None:
    values = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"values: expected shape \(B, 4\), got \(2, 3\)"):
        KeyedTensor(["a", "b"], [1, 3], values)
    with pytest.raises(ValueError, match="length_per_key: expected 2 lengths"):
        KeyedTensor(["a", "b"], [3], values)
    with pytest.raises(ValueError, match="keys: expected names that differ"):
        KeyedTensor(["a", "a"], [1, 2], values)
    with pytest.raises(KeyError, match="got 'c'"):
        KeyedTensor(["a", "b"], [1, 2], values)["c"]
