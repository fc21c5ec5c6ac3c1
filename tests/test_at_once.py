"""Lookups that no backward follows go to the engine at once: the same results and the same words as with checks."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

import dlrm_rs
from dlrm_rs import EmbeddingBagCollection, EmbeddingBagConfig, operators
from dlrm_rs.row_formats import TAKES_TENSORS

FORMATS = ["fp32", "fp16", "bf16", "int8", "int4", "int2"]
ROWS = [9, 5]
BATCH = 3

# Two features with three bags each: an empty one, one of several ids, one with a duplicate.
INDICES = [0, 8, 8, 3, 4, 0, 0, 1]
OFFSETS = [0, 0, 3, 4, 6, 6, 8]


def collection(row_format: str = "fp32", *, is_weighted: bool = False) -> EmbeddingBagCollection:
    """Two tables of different dims and poolings."""
    tables = [
        EmbeddingBagConfig(f"t{i}", rows, 16 * i + 5, [f"f{i}"], pooling=pooling, data_type=row_format)
        for i, (rows, pooling) in enumerate(zip(ROWS, ["sum", "mean"], strict=True))
    ]
    return EmbeddingBagCollection(tables, is_weighted=is_weighted)


def checked(tables: EmbeddingBagCollection, *given: Tensor | None) -> Tensor:
    """The lookup with every check before it."""
    with mock.patch.object(operators, "lookup_at_once", return_value=None), torch.no_grad():
        return tables.lookup(*given)  # type: ignore[arg-type]


def is_at_once(tables: EmbeddingBagCollection, *given: Tensor | None) -> bool:
    """Whether nothing but the engine is asked."""
    with mock.patch.object(tables, "_checked", side_effect=AssertionError("checked")), torch.no_grad():
        try:
            tables.lookup(*given)  # type: ignore[arg-type]
        except AssertionError:
            return False
    return True


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("row_format", FORMATS)
def test_bits_are_those_with_checks(row_format: str, is_weighted: bool, dtype: torch.dtype) -> None:
    tables = collection(row_format, is_weighted=is_weighted)
    given = torch.tensor(INDICES, dtype=dtype), torch.tensor(OFFSETS), torch.rand(8) if is_weighted else None

    if not TAKES_TENSORS:
        pytest.skip("this torch does not describe its tensors")
    assert is_at_once(tables, *given)
    with torch.inference_mode():
        at_once = tables.lookup(*given)
    assert at_once.dtype is torch.float32
    assert torch.equal(at_once, checked(tables, *given))


def test_no_bags_and_no_ids() -> None:
    tables = collection()
    with torch.no_grad():
        assert tables.lookup(torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)).shape == (0, 26)
        empty = tables.lookup(torch.empty(0, dtype=torch.int64), torch.zeros(5, dtype=torch.int64))
    assert torch.equal(empty, torch.zeros(2, 26))


def test_backward_follows_where_gradients_are_on() -> None:
    tables = collection()
    assert tables.lookup(torch.tensor(INDICES), torch.tensor(OFFSETS)).requires_grad


# What is taken after a conversion: it has a result, and the same one.
CONVERTED: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "strides": lambda: (torch.tensor(INDICES).repeat_interleave(2)[::2], torch.tensor(OFFSETS)),
    "offsets with strides": lambda: (torch.tensor(INDICES), torch.tensor(OFFSETS).repeat_interleave(2)[::2]),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_what_is_converted_is_not_at_once(case: str) -> None:
    tables, given = collection(), CONVERTED[case]()
    assert not is_at_once(tables, *given)
    with torch.no_grad():
        result = tables.lookup(*given)
    assert torch.equal(result, checked(tables, torch.tensor(INDICES), torch.tensor(OFFSETS)))


# What is refused, in the same words.
REFUSED: dict[str, tuple[object, ...]] = {
    "a list": (INDICES, torch.tensor(OFFSETS)),
    "floats": (torch.tensor(INDICES).float(), torch.tensor(OFFSETS)),
    "offsets of floats": (torch.tensor(INDICES), torch.tensor(OFFSETS).float()),
    "two dimensions": (torch.tensor([INDICES]), torch.tensor(OFFSETS)),
    "one number": (torch.tensor(3), torch.tensor(OFFSETS)),
    "offsets of one number": (torch.tensor(INDICES), torch.tensor(0)),
    "no offsets": (torch.tensor(INDICES), torch.empty(0, dtype=torch.int64)),
    "an offset less": (torch.tensor(INDICES), torch.tensor(OFFSETS[:-1])),
    "no tensor of offsets": (torch.tensor(INDICES), None),
    "another device": (torch.tensor(INDICES, device="meta"), torch.tensor(OFFSETS)),
    "a sparse tensor": (torch.tensor(INDICES).to_sparse(), torch.tensor(OFFSETS)),
    "weights unasked": (torch.tensor(INDICES), torch.tensor(OFFSETS), torch.ones(8)),
    "an id too large": (torch.tensor([9, *INDICES[1:]]), torch.tensor(OFFSETS)),
    "an id below 0": (torch.tensor([*INDICES[:-1], -1]), torch.tensor(OFFSETS)),
    "offsets that fall": (torch.tensor(INDICES), torch.tensor([0, 3, 2, 4, 6, 6, 8])),
    "offsets beyond": (torch.tensor(INDICES), torch.tensor([*OFFSETS[:-1], 9])),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_refused_in_the_same_words(case: str) -> None:
    tables, given = collection(), REFUSED[case]
    with pytest.raises((TypeError, ValueError, IndexError)) as with_checks:
        checked(tables, *given)  # type: ignore[arg-type]
    with torch.no_grad(), pytest.raises(with_checks.type) as raised:
        tables.lookup(*given)  # type: ignore[arg-type]
    assert str(raised.value) == str(with_checks.value)


@pytest.mark.parametrize(
    "weights", [None, torch.ones(7), torch.ones(8, dtype=torch.float64), torch.full((8,), torch.nan)]
)
def test_weights_of_ids_are_refused_in_the_same_words(weights: Tensor | None) -> None:
    tables, bags = collection(is_weighted=True), (torch.tensor(INDICES), torch.tensor(OFFSETS))
    with pytest.raises((TypeError, ValueError)) as with_checks:
        checked(tables, *bags, weights)
    with torch.no_grad(), pytest.raises(with_checks.type) as raised:
        tables.lookup(*bags, weights)
    assert str(raised.value) == str(with_checks.value)


def test_rows_that_were_put_elsewhere_are_taken_in() -> None:
    tables = collection()
    weight = tables.embedding_bags["t0"].weight
    weight.data = torch.arange(45.0).view(9, 5)
    with torch.no_grad():
        assert torch.equal(tables.lookup(torch.tensor(INDICES), torch.tensor(OFFSETS))[2, :5], torch.arange(15.0, 20.0))


def test_a_default_device_does_not_matter() -> None:
    tables, given = collection(), (torch.tensor(INDICES), torch.tensor(OFFSETS))
    with torch.no_grad(), torch.device("meta"):
        assert tables.lookup(*given).device.type == "cpu"


def test_a_batch_of_features() -> None:
    tables = collection()
    lengths = torch.tensor(OFFSETS).diff()
    features = dlrm_rs.KeyedJaggedTensor.from_lengths_sync(["f0", "f1"], torch.tensor(INDICES), lengths)
    with torch.no_grad():
        pooled = tables(features)
    assert pooled.keys() == ["f0", "f1"]
    assert torch.equal(pooled.values(), checked(tables, torch.tensor(INDICES), torch.tensor(OFFSETS)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("row_format", FORMATS)
def test_bags_of_one_id_have_the_bits_they_have_among_others(row_format: str, dtype: torch.dtype) -> None:
    tables = EmbeddingBagCollection(
        [
            EmbeddingBagConfig(f"t{dim}", 50, dim, [f"f{dim}"], pooling=pooling, data_type=row_format)
            for dim, pooling in ((1, "sum"), (16, "sum"), (33, "mean"), (64, "sum"), (128, "mean"))
        ]
    )
    ids = torch.randint(50, (5, 40), dtype=dtype)
    with_empty = torch.cat([torch.arange(40).repeat(5, 1), torch.full((5, 1), 40)], 1)  # the last bag of each feature
    offsets = (with_empty + 40 * torch.arange(5).unsqueeze(1)).view(-1)
    with torch.no_grad():
        alone = tables.lookup(ids.view(-1), torch.arange(201))
        among = tables.lookup(ids.view(-1), torch.cat([offsets, torch.tensor([200])]))
    assert torch.equal(alone.view(torch.int32), among[:40].view(torch.int32))
    assert not among[40].any()
