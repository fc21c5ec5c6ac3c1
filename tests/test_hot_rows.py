"""Hot rows: the most used rows of quantized tables in fp32, trained exactly, saved, copied and brought into codes."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlrm_rs
from dlrm_rs.optim import Adagrad, RowWiseAdagrad
from dlrm_rs.row_formats import QUANTIZED
from test_low_precision import rows_of, same, state

ROWS, DIM = 400, 16
SPEC = RowWiseAdagrad(lr=0.1)


def bags(dtype: str = "int8", hot_rows: float = 0.1, **options: Any) -> dlrm_rs.EmbeddingBag:
    torch.manual_seed(2)
    options = {"mode": "sum", "optimizer": SPEC, **options}
    return dlrm_rs.EmbeddingBag(ROWS, DIM, dtype=dtype, hot_rows=hot_rows, **options)


def ids(seed: int, count: int = 240) -> Tensor:
    """Bags of 3, small ids more often."""
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return (drawn**4 * ROWS).long().view(-1, 3)


def train(module: nn.Module, steps: range) -> None:
    for step in steps:
        module(ids(step)).square().sum().backward()


def hot_ids(module: nn.Module) -> Tensor:
    found: Tensor = module.state_dict()["weight_hot_ids"]
    return found[found >= 0].sort().values


def test_the_rows_that_training_touches_most_become_hot() -> None:
    module = bags()
    assert len(hot_ids(module)) == 0
    train(module, range(60))
    used = torch.stack([torch.bincount(ids(step).unique(), minlength=ROWS) for step in range(60)]).sum(0)
    assert len(hot_ids(module)) == 48  # 40 rows, rounded up to sets of 16
    assert used[hot_ids(module)].sum() > 0.85 * used.topk(48).values.sum()
    assert set(range(5)) <= set(hot_ids(module).tolist())
    assert str(module).endswith("dtype=int8, hot_rows=0.1, optimizer=rowwise_adagrad)")
    report = module.memory_report()["embedding_bag"]
    assert report["hot"] == 48 * (4 * DIM + 8 + 1)
    assert bags(hot_rows=0).memory_report()["embedding_bag"]["hot"] == 0


def test_lookups_are_of_the_decoded_rows_and_hot_ones_are_trained_as_fp32_ones_are() -> None:
    for dtype in QUANTIZED:
        module = bags(dtype, hot_rows=1.0)
        every = torch.arange(ROWS)
        module(every.view(1, -1)).sum().backward()
        hot = hot_ids(module)  # nearly all: in some sets there are more rows than ways
        assert len(hot) > 0.8 * ROWS
        reference = dlrm_rs.dequantize(copy.deepcopy(module))
        for step in range(5):
            one_batch = hot[torch.randint(len(hot), (20, 3), generator=torch.Generator().manual_seed(step))]
            out, expected = module(one_batch), reference(one_batch)
            assert torch.equal(out, expected)
            for one in (out, expected):
                one.square().sum().backward()
        still = hot_ids(module)
        assert torch.equal(rows_of(module)[still], reference.weight.detach()[still])


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_fifty_steps_repeat_and_resume_bit_for_bit(dtype: str) -> None:
    states = []
    for threads in (1, 2, 3, 7, 8):
        before = dlrm_rs.get_num_threads()
        dlrm_rs.set_num_threads(threads)
        module = bags(dtype)
        train(module, range(50))
        dlrm_rs.set_num_threads(before)
        states.append(state(module))
    assert all(same(states[0], other) for other in states[1:])

    module = bags(dtype)
    train(module, range(20))
    file = io.BytesIO()
    assert module.fused_optimizer is not None
    torch.save((module.state_dict(), module.fused_optimizer.state_dict()), file)
    file.seek(0)
    rows, optimizer = torch.load(file, weights_only=True)
    assert all(torch.isfinite(part.float()).all() for part in rows.values())
    resumed = bags(dtype)
    resumed.load_state_dict(rows)
    assert resumed.fused_optimizer is not None
    resumed.fused_optimizer.load_state_dict(optimizer)
    twin, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for one in (module, resumed, twin, pickled):
        train(one, range(20, 50))
        assert same(state(one), states[0])


def test_a_copy_is_its_own() -> None:
    module = bags()
    train(module, range(10))
    before = copy.deepcopy(module.state_dict())
    twin = copy.deepcopy(module)
    train(twin, range(10, 20))
    assert same(module.state_dict(), before)
    assert not same(twin.state_dict(), before)


def test_buffers_that_are_put_in_the_place_of_others_are_taken_in() -> None:
    module = bags()
    train(module, range(5))
    decoded, hot = rows_of(module), hot_ids(module)
    module.weight_codes.data = module.weight_codes.clone()
    assert torch.equal(module(hot.view(-1, 1)), decoded[hot])
    module.weight_hot_rows = module.weight_hot_rows * 2
    assert torch.equal(module(hot.view(-1, 1)), decoded[hot] * 2)
    train(module, range(5, 8))
    module.weight_hot_ids = module.weight_hot_ids + 1
    with pytest.raises(ValueError, match="of table 'embedding_bag': expected scale and bias that decode to finite num"):
        module(hot.view(-1, 1))  # rows that were hot have no codes


def test_a_state_dict_of_other_hot_rows_is_refused_in_words() -> None:
    module, plain, more = bags(), bags(hot_rows=0), bags(hot_rows=0.2)
    train(module, range(5))
    states = [one.state_dict() for one in (module, plain, more)]
    for into, of, expected, got in [(0, 1, 48, 0), (1, 0, 0, 48), (0, 2, 48, 80)]:
        one = (module, plain, more)[into]
        before = copy.deepcopy(one.state_dict())
        words = f"weight: expected {expected} ways of hot rows, which this table keeps in fp32, got {got}; load into"
        with pytest.raises(RuntimeError, match=words):
            one.load_state_dict(states[of])
        assert same(one.state_dict(), before)
    lacking = {name: part for name, part in states[0].items() if name != "weight_hot_counts"}
    with pytest.raises(
        RuntimeError, match="weight_codes, weight_scales, weight_hot_rows, weight_hot_ids and weight_hot"
    ):
        module.load_state_dict(lacking)
    wrong = {**states[0], "weight_hot_ids": states[0]["weight_hot_ids"] + 1}
    with pytest.raises(RuntimeError, match="hot ids of table 'embedding_bag': expected rows below 400 in the sets of"):
        module.load_state_dict(wrong)
    assert same(module.state_dict(), states[0])


def test_quantize_and_dequantize() -> None:
    module = bags()
    train(module, range(20))
    decoded, hot = rows_of(module), hot_ids(module)

    four = copy.deepcopy(module)
    report = dlrm_rs.quantize(four, "int4")
    assert torch.equal(hot_ids(four), hot)
    assert torch.equal(rows_of(four)[hot], decoded[hot])
    assert report.total.bytes_after == ROWS * (DIM // 2 + 4) + 48 * (4 * DIM + 9)
    train(four, range(20, 25))

    plain = copy.deepcopy(module)
    dlrm_rs.quantize(plain, "int8", hot_rows=0)
    assert "weight_hot_ids" not in plain.state_dict()
    assert "hot_rows" not in str(plain)
    step = (decoded.amax(1) - decoded.amin(1)) / 255
    assert ((rows_of(plain) - decoded).abs() <= step.unsqueeze(1) * 1.1 + 1e-4).all()
    assert plain.to_packed().shape == (ROWS, DIM + 8)

    codes = plain.state_dict()
    dlrm_rs.quantize(plain, "int8", hot_rows=0.2)  # which moves no row
    assert torch.equal(plain.state_dict()["weight_codes"], codes["weight_codes"])
    assert plain.memory_report()["embedding_bag"]["hot"] == 80 * (4 * DIM + 9)
    dlrm_rs.quantize(plain, "int8", hot_rows=0.1)
    assert plain.memory_report()["embedding_bag"]["hot"] == 48 * (4 * DIM + 9)

    fp32 = dlrm_rs.dequantize(copy.deepcopy(module))
    assert torch.equal(fp32.weight.detach(), decoded)
    dlrm_rs.quantize(fp32, "int8")
    assert "weight_hot_ids" not in fp32.state_dict()
    dlrm_rs.quantize(dlrm_rs.dequantize(fp32), "int2", hot_rows=0.1)
    train(fp32, range(10))
    assert len(hot_ids(fp32)) == 48
    assert module(ids(0)).isfinite().all()


def test_a_collection_and_replaced_embeddings_have_them_by_table() -> None:
    collection = dlrm_rs.EmbeddingBagCollection(
        [
            dlrm_rs.EmbeddingBagConfig("a", ROWS, DIM, ["x"], data_type="int8", hot_rows=0.05, hot_data_type="fp32"),
            dlrm_rs.EmbeddingBagConfig("b", 10, DIM, ["y"], data_type=torch.float32),
        ],
        optimizer=SPEC,
    )
    assert "400, 16, dtype=int8, hot_rows=0.05" in str(collection)
    features = dlrm_rs.KeyedJaggedTensor.from_lengths_sync(
        ["x", "y"], torch.cat([ids(0).view(-1), torch.arange(80) % 10]), torch.tensor([3] * 80 + [1] * 80)
    )
    collection(features).values().sum().backward()
    assert (collection.state_dict()["embedding_bags.a.weight_hot_ids"] >= 0).sum() == 32
    assert "embedding_bags.b.weight_hot_ids" not in collection.state_dict()
    before = collection(features).values().detach()
    # The other table's weight is put elsewhere, and so all tables move.
    kept = collection.embedding_bags["b"].get_parameter("weight")
    kept.data = kept.detach().clone()
    assert torch.equal(collection(features).values().detach(), before)
    assert (collection.state_dict()["embedding_bags.a.weight_hot_ids"] >= 0).sum() == 32

    rows = dlrm_rs.EmbeddingCollection(
        [dlrm_rs.EmbeddingConfig("a", ROWS, DIM, ["x"], data_type="int4", hot_rows=0.05)], optimizer=SPEC
    )
    assert rows.memory_report()["a"]["hot"] > 0
    model = nn.Sequential(nn.EmbeddingBag(ROWS, DIM, mode="sum"), nn.Linear(DIM, 1))
    dlrm_rs.replace_embeddings(model, dtype="int8", optimizer=SPEC, hot_rows=0.1)
    train(model, range(3))
    assert len(hot_ids(model[0])) == 48
    assert dlrm_rs.Embedding(ROWS, DIM, dtype="int2", hot_rows=0.1, optimizer=SPEC).memory_report()["embedding"]["hot"]


def test_what_cannot_be_is_refused_in_words() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"hot_rows": -0.1}, "hot_rows: expected a share of the rows, from 0 to 1, got -0.1"),
        ({"hot_rows": 20}, "hot_rows: expected a share of the rows, from 0 to 1, got 20"),
        ({"hot_rows": True}, "hot_rows: expected a share of the rows, from 0 to 1, got True"),
        ({"hot_data_type": "fp16"}, "hot_data_type: expected 'fp32', got 'fp16'"),
        ({"dtype": "fp16"}, "hot_rows: expected 0 for rows of fp16, got 0.1; hot rows are in fp32 beside rows of"),
        ({"optimizer": None}, "hot_rows: expected a fused optimizer, by whose updates rows become hot, got none"),
    ]
    for options, words in cases:
        with pytest.raises(ValueError, match=words):
            bags(**options)
    config = dlrm_rs.EmbeddingBagConfig("a", ROWS, DIM, ["x"], hot_rows=0.05)
    with pytest.raises(ValueError, match=r"hot_rows of table 'a': expected 0 for rows of fp32, got 0\.05"):
        dlrm_rs.EmbeddingBagCollection([config], optimizer=SPEC)
    model = nn.Sequential(nn.EmbeddingBag(ROWS, DIM, mode="sum"))
    with pytest.raises(ValueError, match="hot_rows of '0': expected a fused optimizer"):
        dlrm_rs.replace_embeddings(model, dtype="int8", hot_rows=0.1)
    assert type(model[0]) is nn.EmbeddingBag

    module = bags()
    train(module, range(3))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="hot_rows: expected 0 with 'codebook', got tables that have some"):
        dlrm_rs.quantize(module, "int4", method="codebook")
    budget = dlrm_rs.Budget(metric=lambda _: 0.0, tolerance=0.1)
    with pytest.raises(ValueError, match=r"hot_rows: expected 0 with a budget, got 0\.1; give hot_rows=0"):
        dlrm_rs.quantize(module, budget=budget, hot_rows=0.1)
    with pytest.raises(ValueError, match="hot_rows of 'embedding_bag': expected a fused optimizer"):
        dlrm_rs.quantize(module, "int8", hot_rows=0.1, keep_optimizer=False)
    with pytest.raises(ValueError, match="expected rows that are all in codes, got hot rows in fp32; quantize the"):
        module.to_packed()
    with pytest.raises(IndexError):
        module(torch.tensor([[ROWS]]))
    assert same(module.state_dict(), before)


def test_graphs_are_refused_in_words_and_a_model_that_moves_leaves_them_alone() -> None:
    module = bags()
    train(module, range(3))
    before = module.state_dict()
    with pytest.raises(Exception, match=r"hot_rows: expected none in a model that torch\.compile or torch\.export tr"):
        torch.export.export(module.eval(), (ids(0),))
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"hot_rows: expected none in a model that torch\.compile or torch\.export tr"):
        torch.compile(module, fullgraph=True, backend="eager")(ids(0))
    assert module.to("cpu") is module
    assert same(module.state_dict(), before)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_they_are_not_shared_by_processes() -> None:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"model: expected tables without hot rows, .*\(model, hot_rows=0\) "):
            dlrm_rs.distributed.share_tables(nn.Sequential(bags()))
    finally:
        torch.distributed.destroy_process_group()


def test_an_optimizer_that_is_given_up_leaves_the_hot_rows() -> None:
    module = bags(optimizer=Adagrad(lr=0.1))
    train(module, range(5))
    decoded, hot = rows_of(module), hot_ids(module)
    dlrm_rs.quantize(module, "int4", keep_optimizer=False)
    assert module.fused_optimizer is None
    assert torch.equal(rows_of(module)[hot], decoded[hot])
    assert torch.equal(copy.deepcopy(module)(hot.view(-1, 1)), decoded[hot])
