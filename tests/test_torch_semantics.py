"""What torch's embeddings document: what they refuse ours do, attributes are theirs, and TorchScript is refused."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlrm_rs

IDS = torch.tensor([1, 2])
ROW = IDS.view(1, 2)

# What torch's modules of 4 x 2 refuse, and a word of ours.
REFUSED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "padding_idx": (lambda bag, _: bag(4, 2, padding_idx=4), "padding_idx"),
    "padding_idx of rows": (lambda _, rows: rows(4, 2, padding_idx=-5), "padding_idx"),
    "weight": (lambda bag, _: bag(4, 2, _weight=torch.zeros(3, 2)), "_weight"),
    "weight of rows": (lambda _, rows: rows(4, 2, _weight=torch.zeros(4, 3)), "_weight"),
    "from_pretrained": (lambda bag, _: bag.from_pretrained(torch.zeros(4)), "embeddings"),
    "from_pretrained of rows": (lambda _, rows: rows.from_pretrained(torch.zeros(4, 2, 1)), "embeddings"),
    "offsets of 2-D": (lambda bag, _: bag(4, 2)(ROW, IDS), "offsets"),
    "no offsets": (lambda bag, _: bag(4, 2)(IDS), "offsets"),
    "2-D offsets": (lambda bag, _: bag(4, 2)(IDS, ROW), "offsets"),
    "3-D": (lambda bag, _: bag(4, 2)(IDS.view(1, 1, 2)), "input"),
    "no last offset": (lambda bag, _: bag(4, 2, include_last_offset=True)(IDS, IDS[:0]), "offsets"),
    "first offset": (lambda bag, _: bag(4, 2)(IDS, torch.tensor([1])), "offsets"),
    "offset beyond": (lambda bag, _: bag(4, 2)(IDS, torch.tensor([0, 5])), "offsets"),
    "weights of a mean": (lambda bag, _: bag(4, 2)(ROW, per_sample_weights=torch.ones(1, 2)), "per_sample_weights"),
    "weights of a max": (
        lambda bag, _: bag(4, 2, mode="max")(ROW, per_sample_weights=torch.ones(1, 2)),
        "per_sample_weights",
    ),
    "weights of a shape": (
        lambda bag, _: bag(4, 2, mode="sum")(ROW, per_sample_weights=torch.ones(2)),
        "per_sample_weights",
    ),
    "weights of a dtype": (
        lambda bag, _: bag(4, 2, mode="sum")(ROW, per_sample_weights=torch.ones(1, 2).double()),
        "per_sample_weights",
    ),
    "mode": (lambda bag, _: bag(4, 2, mode="average")(ROW), "mode"),
    "max, sparse": (lambda bag, _: bag(4, 2, mode="max", sparse=True)(ROW), "mode"),
    "max, by frequency": (lambda bag, _: bag(4, 2, mode="max", scale_grad_by_freq=True)(ROW), "mode"),
    "id": (lambda bag, _: bag(4, 2)(ROW + 2), "indices"),
    "id of rows": (lambda _, rows: rows(4, 2)(IDS - 2), "indices"),
    "float ids": (lambda bag, _: bag(4, 2)(ROW.float()), "input"),
    "float rows": (lambda _, rows: rows(4, 2)(IDS.float()), "input"),
    "list": (lambda _, rows: rows(4, 2)([1, 2]), "input"),
}


@pytest.mark.parametrize(("call", "word"), REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_is_refused(call: Callable[[Any, Any], Any], word: str) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever torch has
        call(nn.EmbeddingBag, nn.Embedding)
    with pytest.raises((ValueError, TypeError, IndexError), match=f"{word}.*(expected.*got|only)"):
        call(dlrm_rs.EmbeddingBag, dlrm_rs.Embedding)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(dlrm_rs.EmbeddingBag, nn.EmbeddingBag), (dlrm_rs.Embedding, nn.Embedding)]
)
def test_attributes_are_torchs(ours: Any, theirs: Any) -> None:
    options: dict[str, Any] = {"max_norm": 1.0, "norm_type": 1.0, "scale_grad_by_freq": True, "padding_idx": -2}
    modules = [kind(5, 3, **options) for kind in (ours, theirs)]
    for name in theirs.__constants__:
        assert getattr(modules[0], name) == getattr(modules[1], name), name
    assert isinstance(modules[0], theirs)
    assert repr(modules[0]) == repr(modules[1])


@pytest.mark.parametrize(
    ("ours", "theirs"), [(dlrm_rs.EmbeddingBag, nn.EmbeddingBag), (dlrm_rs.Embedding, nn.Embedding)]
)
def test_from_pretrained_passes_every_argument_on(ours: Any, theirs: Any) -> None:
    options: dict[str, Any] = {
        "freeze": False,
        "max_norm": 2.0,
        "norm_type": 1.0,
        "scale_grad_by_freq": True,
        "mode": "sum",
        "sparse": True,
        "include_last_offset": True,
        "padding_idx": 1,
    }
    options = {
        name: value for name, value in options.items() if name in inspect.signature(ours.from_pretrained).parameters
    }
    rows = torch.randn(5, 3)
    modules = [kind.from_pretrained(rows, **options) for kind in (ours, theirs)]
    for name, value in options.items():
        if name != "freeze":
            assert getattr(modules[0], name) == getattr(modules[1], name) == value
    assert modules[0].weight.requires_grad
    assert not ours.from_pretrained(rows).weight.requires_grad
    assert torch.equal(modules[0].weight, rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(dlrm_rs.EmbeddingBag, nn.EmbeddingBag), (dlrm_rs.Embedding, nn.Embedding)]
)
def test_rows_to_start_from_are_stored_in_their_dtype(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    rows = torch.randn(4, 2, dtype=dtype)
    for kind in (ours, theirs):
        for module in (kind(4, 2, _weight=rows), kind.from_pretrained(rows)):
            assert torch.equal(module.weight, rows)
            assert module(ROW).dtype is dtype
    assert ours(4, 2, _weight=rows, dtype="fp32").weight.dtype is torch.float32


MODULES: dict[str, Callable[[], nn.Module]] = {
    "EmbeddingBag": lambda: dlrm_rs.EmbeddingBag(4, 2),
    "Embedding": lambda: dlrm_rs.Embedding(4, 2, dtype="int8"),
    "EmbeddingBagCollection": lambda: dlrm_rs.EmbeddingBagCollection([dlrm_rs.EmbeddingBagConfig("t", 4, 2, ["f"])]),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", MODULES)
def test_torchscript_is_refused(name: str) -> None:
    words = rf"torch.jit.script: expected .*, got {name}, .*torch.export saves a model with its tables"
    for model in (MODULES[name](), nn.Sequential(MODULES[name](), nn.Linear(2, 1))):
        with pytest.raises(RuntimeError, match=words):
            torch.jit.script(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradient", [torch.enable_grad, torch.no_grad])
def test_torchscripts_tracer_is_refused(gradient: Callable[[], Any]) -> None:
    # It would keep the rows that one batch has looked up as constants.
    model = nn.Sequential(dlrm_rs.Embedding(4, 2), nn.Linear(2, 1))
    with (
        gradient(),
        pytest.raises(RuntimeError, match=r"torch.jit.trace: expected .*torch.export.export traces and saves"),
    ):
        torch.jit.trace(model, IDS)


def test_a_parametrized_table_is_refused() -> None:
    class Doubled(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            return rows * 2

    model = dlrm_rs.EmbeddingBag(4, 2)
    nn.utils.parametrize.register_parametrization(model, "weight", Doubled())
    with pytest.raises(
        RuntimeError, match=r"torch.nn.utils.parametrize and pruning put a computed tensor in its place"
    ):
        model(ROW)
