"""`quantize` and `dequantize` on models: in place, all or nothing, with what was lost and why."""

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dlrm_rs
from dlrm_rs.quantization import encoding

FORMATS = ["fp16", "bf16", "int8", "int4", "int2"]


def model() -> nn.ModuleDict:
    tables = [dlrm_rs.EmbeddingBagConfig("a", 300, 16, ["x", "y"]), dlrm_rs.EmbeddingBagConfig("b", 50, 8, ["z"])]
    return nn.ModuleDict(
        {
            "bags": dlrm_rs.EmbeddingBagCollection(tables),
            "table": dlrm_rs.Embedding(40, 12),
            "dense": nn.Linear(4, 4),
        }
    )


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters() if "dense" not in name}


def decoded(module: nn.Module) -> dict[str, Tensor]:
    return weights_of(dlrm_rs.dequantize(copy.deepcopy(module)))


@pytest.mark.parametrize("dtype", FORMATS)
def test_reports_what_was_lost_by_table_and_in_all(dtype: str) -> None:
    tables = model()
    before = weights_of(tables)
    report = dlrm_rs.quantize(tables, dtype)
    after = decoded(tables)
    keys = {"bags.a": "bags.embedding_bags.a.weight", "bags.b": "bags.embedding_bags.b.weight", "table": "table.weight"}
    assert [table.name for table in report.tables] == list(keys)
    for table in report.tables:
        x, y = before[keys[table.name]].double(), after[keys[table.name]].double()
        errors = (x - y).norm(dim=1) / x.norm(dim=1)
        assert (table.num_embeddings, table.embedding_dim) == x.shape
        assert (table.format_before, table.format_after) == ("fp32", dtype)
        assert table.bytes_before == x.numel() * 4
        assert table.error_mean == pytest.approx(errors.mean().item(), rel=1e-4)
        assert table.error_worst == pytest.approx(errors.max().item(), rel=1e-4)
        assert table.error_p99 == pytest.approx(errors.quantile(0.99, interpolation="lower").item(), rel=0.2)
        assert table.max_abs_error == pytest.approx((x - y).abs().max().item(), rel=1e-5)
    assert report.total.bytes_after == sum(table.bytes_after for table in report.tables)
    assert f" {dtype} " in str(report)
    assert list(report.to_dataframe()["name"]) == list(keys)


def test_the_best_method_is_better_and_the_codebook_better_still_for_heavy_tails() -> None:
    weight = torch.distributions.Laplace(0.0, 1.0).sample((2000, 128))
    errors = []
    for method in ("minmax", "lsq", "codebook"):
        bags = dlrm_rs.EmbeddingBag(2000, 128, _weight=weight)
        errors.append(dlrm_rs.quantize(bags, "int4", method=method).total.error_mean)
    assert errors[1] < 0.95 * errors[0]
    assert errors[1] < 0.121
    assert errors[2] < 0.113


@pytest.mark.parametrize(
    ("dtype", "method", "dim", "limit"),
    [
        ("int8", "minmax", 64, 0.0055),
        ("int4", "minmax", 64, 0.0905),
        ("int4", None, 64, 0.083),
        ("int2", None, 64, 0.33),
        ("int8", "minmax", 128, 0.0062),
        ("int4", "minmax", 128, 0.100),
        ("int4", None, 128, 0.092),
        ("int2", None, 128, 0.34),
    ],
)
def test_errors_of_gaussian_rows(dtype: str, method: str | None, dim: int, limit: float) -> None:
    bags = dlrm_rs.EmbeddingBag(5000, dim)
    assert dlrm_rs.quantize(bags, dtype, method=method).total.error_mean <= limit


def test_the_old_rows_are_freed_unless_somebody_holds_them() -> None:
    bags = dlrm_rs.EmbeddingBag(100, 8)
    gone = weakref.ref(bags.weight)
    held = bags.weight.detach()
    values = held.clone()
    dlrm_rs.quantize(bags, "int2")
    gc.collect()
    assert gone() is None
    assert torch.equal(held, values)


@pytest.mark.parametrize("options", [{"keep_optimizer": False}, {"dtype": "int4", "method": "codebook"}])
def test_a_fused_optimizer_is_given_up_with_its_state(options: dict[str, Any]) -> None:
    bags = dlrm_rs.EmbeddingBag(100, 8, optimizer=dlrm_rs.optim.Adagrad(lr=0.1))
    out = bags(torch.tensor([[1, 2]]))
    dlrm_rs.quantize(bags, **options)
    assert bags.fused_optimizer is None
    assert list(bags.parameters()) == []
    assert bags.memory_report()["embedding_bag"]["state"] == 0
    assert not bags(torch.tensor([[1, 2]])).requires_grad
    with pytest.raises(RuntimeError, match="backward: expected the fused optimizer that the forward was made with"):
        out.sum().backward()


@pytest.mark.parametrize("split", [False, True])
def test_a_fused_optimizer_trains_on_in_every_row_format(split: bool) -> None:
    spec = dlrm_rs.optim.Adagrad(lr=0.1, split_bf16=split)
    bags = dlrm_rs.EmbeddingBag(100, 8, mode="sum", dtype="bf16", optimizer=spec)
    ids = torch.tensor([[1, 2]])
    for steps, dtype in enumerate(("fp16", "int8", "bf16", "int4", "fp32", "int2", "bf16"), 1):
        change = dlrm_rs.quantize if dtype.startswith("int") else dlrm_rs.dequantize
        change(bags, dtype)
        before = dlrm_rs.dequantize(copy.deepcopy(bags))
        bags(ids).sum().backward()
        after = dlrm_rs.dequantize(copy.deepcopy(bags))
        moved = (before.weight - after.weight).mean(dim=1)
        assert (moved[1:3] > 0).all(), dtype
        assert torch.equal(before.weight[3:], after.weight[3:])
        assert bags.fused_optimizer is not None
        (state,) = bags.fused_optimizer.state_dict()["state"].values()
        assert torch.equal(state["sum"][1:3], torch.full((2, 8), float(steps)))
        assert ("low_bits" in state) == (split and dtype == "bf16")


def test_a_backward_of_an_earlier_forward_does_not_read_other_rows() -> None:
    bags = dlrm_rs.EmbeddingBag(100, 8, mode="sum")
    weights = torch.rand(1, 2, requires_grad=True)
    out = bags(torch.tensor([[1, 2]]), per_sample_weights=weights)
    dlrm_rs.quantize(bags)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_all_or_nothing() -> None:
    tables = model()
    with torch.no_grad():
        tables["table"].weight[17, 3] = torch.inf  # type: ignore[operator]
    before = weights_of(tables)
    with pytest.raises(ValueError, match="table: row 17 of table 'embedding': expected finite numbers, got inf"):
        dlrm_rs.quantize(tables)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(tables).items())
    report = dlrm_rs.quantize(tables, nonfinite="zero")
    assert [table.format_after for table in report.tables] == ["int8"] * 3


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("scale_dtype", [None, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("number", [2.0**15, 65519.0, 65520.0, 2.0**125, 3e38, 3.4e38, -3.4e38, torch.nan, -torch.inf])
def test_rows_are_checked_as_they_are_encoded(dtype: str, scale_dtype: torch.dtype | None, number: float) -> None:
    tables = nn.ModuleDict({"sound": dlrm_rs.Embedding(5, 8), "bad": dlrm_rs.Embedding(1000, 8)})
    alone = dlrm_rs.Embedding(1000, 8)
    with torch.no_grad():
        for table in (tables["bad"], alone):
            table.weight.zero_()  # type: ignore[operator]
            table.weight[700:702, 5] = number  # type: ignore[operator]
    refused = []
    for module in (tables, alone):  # one table is not checked, but encoded
        try:
            dlrm_rs.quantize(module, dtype, scale_dtype=scale_dtype)
            refused.append("")
        except ValueError as error:
            refused.append(str(error).partition("row ")[2])
    assert refused[0] == refused[1]
    expected = dtype if not refused[0] else "fp32"
    assert [table.row_formats() for table in tables.values()] == [{"embedding": expected}] * 2  # type: ignore[operator]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("dim", [1, 16, 24])
@pytest.mark.parametrize("numbers", [(torch.nan, torch.inf), (torch.inf, torch.nan)])
def test_the_first_row_that_is_not_finite_is_named(dtype: str, dim: int, numbers: tuple[float, float]) -> None:
    table = dlrm_rs.Embedding(40, dim)
    with torch.no_grad():
        table.weight[18, -1], table.weight[20, 0] = numbers  # side by side for the engine
        table.weight[30:] = 3e38  # which half precision does not hold
    with pytest.raises(ValueError, match=r"row 18 of table 'embedding': expected finite numbers, got (NaN|inf)"):
        dlrm_rs.quantize(table, dtype)


def test_without_memory_for_a_table_those_before_it_are_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = model()
    others = copy.deepcopy(tables)
    kind = encoding.Encoding
    encode, calls = kind.encode, []

    def encode_or_fail(self: Any, table: Any, *args: Any) -> Any:
        calls.append(table.name)
        if len(calls) == 2:
            raise MemoryError("cannot allocate a table")
        return encode(self, table, *args)

    monkeypatch.setattr(kind, "encode", encode_or_fail)
    with pytest.raises(MemoryError, match="cannot allocate a table"):
        dlrm_rs.quantize(tables, "int4")
    formats = {**tables["bags"].row_formats(), **tables["table"].row_formats()}  # type: ignore[operator]
    assert formats == {"a": "int4", "b": "fp32", "embedding": "fp32"}
    dlrm_rs.quantize(tables, "int4")
    dlrm_rs.quantize(others, "int4")
    assert all(
        torch.equal(a, b) for a, b in zip(tables.state_dict().values(), others.state_dict().values(), strict=True)
    )


def test_the_next_rows_are_where_the_last_were_and_are_right() -> None:
    configs = [dlrm_rs.EmbeddingBagConfig(name, 40_000, 64, [name]) for name in "abcdef"]
    bags = dlrm_rs.EmbeddingBagCollection(configs)
    before = weights_of(bags)
    places = [tensor.data_ptr() for tensor in bags.parameters()]
    held = bags.get_parameter("embedding_bags.b.weight").detach()
    dlrm_rs.quantize(bags, "int8")
    state = {name: tensor for name, tensor in bags.named_buffers() if name.endswith("codes")}
    assert state["embedding_bags.b.weight_codes"].data_ptr() == places[0]
    assert places[1] not in [tensor.data_ptr() for tensor in state.values()]
    assert torch.equal(held, before["embedding_bags.b.weight"])
    for name, tensor in decoded(bags).items():
        assert (tensor - before[name]).norm() < 0.006 * before[name].norm()


def test_rows_are_requantized_from_what_they_are() -> None:
    bags = dlrm_rs.EmbeddingBag(200, 32)
    dlrm_rs.quantize(bags, "int8")
    int8 = decoded(bags)["weight"]
    report = dlrm_rs.quantize(bags, "int4")
    assert (report.tables[0].format_before, report.tables[0].format_after) == ("int8", "int4")
    expected = (int8 - decoded(bags)["weight"]).norm(dim=1) / int8.norm(dim=1)
    assert report.total.error_mean == pytest.approx(expected.mean().item(), rel=1e-4)
    assert dlrm_rs.quantize(bags, "int4").total.error_mean == 0  # nothing to do


def test_weights_of_rows_weigh_the_report() -> None:
    bags = dlrm_rs.EmbeddingBag(4, 8)
    used = np.array([0, 0, 3, 0])
    even, weighted = (
        dlrm_rs.quantize(copy.deepcopy(bags), "int2", weights=weights).total
        for weights in (None, {"embedding_bag": used})
    )
    assert weighted.error_mean != even.error_mean
    assert weighted.error_mean == weighted.error_p99
    for weights, words in [
        ({"other": used}, r"weights: expected one array for each table, \['embedding_bag'\], got \['other'\]"),
        ({"embedding_bag": used[:3]}, r"weights of 'embedding_bag': expected shape \(4,\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            dlrm_rs.quantize(bags, "int2", weights=weights)
    assert bags.row_formats() == {"embedding_bag": "fp32"}


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"dtype": "int3"}, TypeError, "dtype: expected one of .* got 'int3'"),
        ({"dtype": "int8", "method": "best"}, ValueError, "method: expected one of minmax, lsq, codebook, got 'best'"),
        ({"dtype": "int8", "method": "codebook"}, ValueError, "method: expected int4 rows with 'codebook', got int8"),
        (
            {"dtype": "fp16", "method": "lsq"},
            ValueError,
            "method: expected int8, int4 or int2 rows with 'lsq', got fp16",
        ),
        ({"scale_dtype": torch.float64}, TypeError, "scale_dtype: expected None or one of"),
        ({"nonfinite": "skip"}, ValueError, "nonfinite: expected 'error' or 'zero', got 'skip'"),
    ],
)
def test_bad_options_change_nothing(kwargs: dict[str, Any], error: type[Exception], words: str) -> None:
    tables = model()
    before = weights_of(tables)
    with pytest.raises(error, match=words):
        dlrm_rs.quantize(tables, **kwargs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(tables).items())


def test_a_model_without_tables_of_ours_is_refused() -> None:
    for function in (dlrm_rs.quantize, dlrm_rs.dequantize):
        with pytest.raises(
            ValueError, match=r"expected a model with tables of dlrm_rs, got none; .*replace_embeddings"
        ):
            function(nn.EmbeddingBag(4, 4))
    with pytest.raises(TypeError, match="dtype: expected one of 'fp32', 'fp16', 'bf16', got 'int8'"):
        dlrm_rs.dequantize(dlrm_rs.EmbeddingBag(4, 4), "int8")


def test_a_shared_module_is_quantized_once() -> None:
    bags = dlrm_rs.EmbeddingBag(10, 4)
    assert len(dlrm_rs.quantize(nn.ModuleList([bags, bags])).tables) == 1


def test_weights_are_looked_at_again_where_not_all_rows_are_codes() -> None:
    bags = [dlrm_rs.EmbeddingBagConfig(name, 2, 4, [name]) for name in ("a", "b")]
    module = dlrm_rs.EmbeddingBagCollection(bags)
    features = dlrm_rs.KeyedJaggedTensor(["a", "b"], torch.tensor([0, 1]), lengths=torch.ones(2, dtype=torch.int64))
    dlrm_rs.quantize(module, "int8")
    module(features)
    dlrm_rs.dequantize(module)
    for bag in module.embedding_bags.values():
        bag.weight.data = torch.full((2, 4), 3.0)
    assert torch.equal(module(features).values(), torch.full((1, 8), 3.0))


def test_dequantized_rows_can_be_trained() -> None:
    bags = dlrm_rs.EmbeddingBag(10, 4, mode="sum", dtype="int8")
    out = bags(torch.tensor([[1, 2]]))
    dlrm_rs.dequantize(bags)
    assert torch.equal(bags(torch.tensor([[1, 2]])).detach(), out)
    bags(torch.tensor([[1, 2]])).sum().backward()
    assert bags.weight.grad is not None
    assert bags.weight.grad[1:3].eq(1).all()


def test_a_progress_bar_is_drawn_where_it_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    dlrm_rs.quantize(dlrm_rs.EmbeddingBag(10, 4), progress=True)
    dlrm_rs.quantize(dlrm_rs.EmbeddingBag(10, 4), progress=False)
    assert capsys.readouterr().out == ""  # all of it goes to the terminal's other stream


class Metric:
    """How near the pooled rows of table "a" are to what they were; what "b" and the rest hold does not matter."""

    def __init__(self, tables: nn.ModuleDict) -> None:
        self.ids, self.offsets = torch.arange(50).repeat(3), torch.arange(151)
        self.expected = self.of(tables)
        self.seen: list[dict[str, str]] = []

    def of(self, tables: nn.ModuleDict) -> Tensor:
        out: Tensor = tables["bags"].lookup(self.ids, self.offsets).detach()[:, :16]  # type: ignore[operator]
        return out

    def __call__(self, tables: nn.ModuleDict) -> float:
        self.seen.append({**tables["bags"].row_formats(), **tables["table"].row_formats()})  # type: ignore[operator]
        off: Tensor = (self.of(tables) - self.expected).norm() / self.expected.norm()
        return 1 - float(off)


def test_a_budget_gives_bits_to_the_tables_that_matter() -> None:
    tables = model()
    metric = Metric(tables)
    report = dlrm_rs.quantize(tables, budget=dlrm_rs.Budget(metric, tolerance=0.02))
    assert {table.name: table.format_after for table in report.tables} == {
        "bags.a": "int8",
        "bags.b": "int2",
        "table": "int2",
    }
    assert metric.seen[0] == {"a": "fp32", "b": "fp32", "embedding": "fp32"}
    assert len(report.trials) == len(metric.seen)
    assert report.choice is not None
    assert report.choice.trial.damage <= 0.02
    assert "int2" in str(report)
    # Encoded from the rows as they were, however often they have been switched.
    assert metric(tables) == report.choice.trial.metric


def test_a_budget_of_bytes_is_kept() -> None:
    tables = model()
    metric = Metric(tables)
    report = dlrm_rs.quantize(tables, budget=dlrm_rs.Budget(metric, max_bytes=8000))
    assert report.total.bytes_after <= 8000
    assert report.tables[0].format_after == "int8"


@pytest.mark.parametrize("error", [ValueError("no such batch"), KeyboardInterrupt()])
def test_a_metric_that_fails_leaves_the_model(error: BaseException) -> None:
    tables = model()
    before = weights_of(tables)
    parameters = dict(tables.named_parameters())
    calls = []

    def metric(_: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return 1 / len(calls)

    with pytest.raises(type(error)):
        dlrm_rs.quantize(tables, budget=dlrm_rs.Budget(metric, tolerance=0.1, formats=("int8", "int4")))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(tables).items())
    assert all(tables.get_parameter(name) is parameter for name, parameter in parameters.items())


def test_a_model_with_a_fused_optimizer_trains_on_after_a_search_that_fails() -> None:
    bags = dlrm_rs.EmbeddingBag(100, 8, mode="sum", optimizer=dlrm_rs.optim.Adagrad(lr=0.1))
    ids = torch.tensor([[1, 2]])
    bags(ids).sum().backward()
    twin = copy.deepcopy(bags)
    with pytest.raises(ValueError, match="metric"):
        dlrm_rs.quantize(bags, budget=dlrm_rs.Budget(lambda _: float("nan"), tolerance=0.1))
    for module in (bags, twin):
        module(ids).sum().backward()
    assert torch.equal(bags.weight, twin.weight)


def test_a_budget_names_row_formats_that_exist() -> None:
    with pytest.raises(TypeError, match=r"formats of the budget: expected one of .* got 'int3'"):
        dlrm_rs.quantize(model(), budget=dlrm_rs.Budget(lambda _: 0.0, tolerance=0.1, formats=("int3",)))


@pytest.mark.parametrize("change", [dlrm_rs.quantize, lambda module: dlrm_rs.dequantize(module, "fp16")])
def test_what_would_not_work_any_more_is_refused(change: Any) -> None:
    normed = dlrm_rs.EmbeddingBag(4, 4, max_norm=1.0)
    with pytest.raises(ValueError, match=r"max_norm: expected None of '' for rows of (int8|fp16), got 1.0"):
        change(normed)
    table, linear = dlrm_rs.Embedding(4, 4), nn.Linear(4, 4)
    linear.weight = table.weight
    with pytest.raises(ValueError, match=r"their Parameter with no other module, got '1', whose 'weight' is one's"):
        change(nn.ModuleList([table, linear]))
    assert (normed.row_formats(), table.row_formats()) == ({"embedding_bag": "fp32"}, {"embedding": "fp32"})
    with pytest.raises(ValueError, match="max_norm: expected None for rows of int8, got 1"):
        dlrm_rs.EmbeddingBag(4, 4, max_norm=1.0, dtype="int8")
    with pytest.raises(ValueError, match="max_norm: expected None for rows of int8, got 1"):
        dlrm_rs.replace_embeddings(nn.Embedding(4, 4, max_norm=1.0), dtype="int8")


def test_a_frozen_table_comes_back_frozen() -> None:
    table = dlrm_rs.Embedding.from_pretrained(torch.rand(4, 4))
    dlrm_rs.quantize(table)
    assert not dlrm_rs.dequantize(table).weight.requires_grad


def test_a_budget_counts_scales_as_they_will_be_and_takes_names_as_quantize_does() -> None:
    tables = model()
    budget = dlrm_rs.Budget(lambda _: 1.0, tolerance=0.1, formats=("INT8",))
    report = dlrm_rs.quantize(tables, scale_dtype=torch.float32, budget=budget)
    assert report.choice is not None
    assert report.choice.trial.total_bytes == report.total.bytes_after
    with pytest.raises(ValueError, match="method: expected int4 rows with 'codebook', got int8"):
        dlrm_rs.quantize(tables, method="codebook", budget=dlrm_rs.Budget(lambda _: 1.0, tolerance=0.1))


def test_a_table_that_is_never_used_weighs_nothing() -> None:
    tables = nn.ModuleDict({"used": dlrm_rs.Embedding(4, 4), "unused": dlrm_rs.Embedding(4, 4)})
    report = dlrm_rs.quantize(tables, "int2", weights={"used": np.ones(4), "unused": np.zeros(4)})
    assert report.total.error_mean == pytest.approx(report.tables[0].error_mean)


@pytest.mark.parametrize("method", ["minmax", "lsq"])
def test_a_budget_leaves_the_tables_alone_that_it_keeps(method: str) -> None:
    tables = model()
    before = weights_of(tables)
    parameters = dict(tables.named_parameters())
    metric = Metric(tables)
    budget = dlrm_rs.Budget(metric, tolerance=0.0, formats=("int2",))
    report = dlrm_rs.quantize(tables, method=method, budget=budget)
    assert report.tables[0].format_after == "fp32"
    assert report.tables[0].error_worst == 0
    name = "bags.embedding_bags.a.weight"
    assert tables.get_parameter(name) is parameters[name]
    assert torch.equal(tables.get_parameter(name), before[name])
