"""`plan`: the arithmetic of a step, where tables go, and models made by it."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlrm_rs
from dlrm_rs import EmbeddingBagConfig, Pipeline
from dlrm_rs.data import ClickLog
from dlrm_rs.optim import SGD, Adagrad, RowWiseAdagrad
from dlrm_rs.pipeline.pipeline import click_loss
from dlrm_rs.placement import Hardware, PlacedEmbeddingBags

# Round numbers, so that costs can be reckoned in the head.
HARDWARE = Hardware(host_bandwidth=1e9, pcie_bandwidth=1e10, gpu_bandwidth=1e12, gpu_flops=1e12)

TABLES = [
    EmbeddingBagConfig("large", 1_000_000, 16, ["a"]),
    EmbeddingBagConfig("hot", 1000, 16, ["b", "c"]),
    EmbeddingBagConfig("small", 100, 16, ["d"]),
]


def small_plan(gpu_memory: float = 1e6, **options: Any) -> dlrm_rs.placement.Plan:
    return dlrm_rs.plan(TABLES, gpu_memory, batch_size=1000, ids_per_bag=10, hardware=HARDWARE, **options)


def places(plan: dlrm_rs.placement.Plan) -> dict[str, str]:
    return {table.name: table.place for table in plan.tables}


def test_bytes_and_seconds_of_a_step() -> None:
    plan = small_plan(0, optimizer=RowWiseAdagrad(), dense_flops=2e9)
    large, hot, _ = plan.tables
    assert large.memory == large.host_memory == 1_000_000 * (64 + 4)
    assert (large.ids, hot.ids) == (10_000, 20_000)
    assert large.id_bytes == 80_000
    assert large.read == 10_000 * 64
    assert large.updated == 10_000 * (64 + 2 * (64 + 4))
    assert (large.pcie, hot.pcie) == (1000 * 64, 2 * 1000 * 64)
    # Four features of 10,000 ids.
    assert plan.costs == {
        "host memory": pytest.approx(40_000 * (64 + 64 + 136) / 1e9),
        "PCIe": pytest.approx(4 * 1000 * 64 / 1e10),
        "GPU": pytest.approx(2e-3),
    }
    assert (plan.bottleneck, plan.step) == ("host memory", max(plan.costs.values()))
    # torch steps all rows of a table on the GPU: a large one costs more there than its 10,000 ids.
    there = small_plan(1e9, optimizer=RowWiseAdagrad(), places={"large": "gpu", "hot": "cpu", "small": "cpu"})
    assert there.tables[0].memory == 1_000_000 * 64 * 5
    assert large.swept == 10_000 * 64 + 2 * 1_000_000 * 64 * 5
    assert there.costs["GPU"] == pytest.approx((10_000 * 64 + large.swept) / 1e12)


@pytest.mark.parametrize(
    ("dtype", "optimizer", "memory", "pcie"),
    [
        ("fp32", None, 16 * 4, 16 * 2),  # serving: half the bytes, one way
        ("int8", None, 16 + 4, 16 * 2),  # scale and bias
        ("int4", None, 8 + 4, 16 * 2),
        ("fp32", SGD(lr=0.1), 16 * 4, 16 * 4),
        ("fp32", Adagrad(lr=0.1), 16 * 8, 16 * 4),
    ],
)
def test_formats_and_optimizers(
    dtype: str, optimizer: dlrm_rs.optim.OptimizerSpec | None, memory: int, pcie: int
) -> None:
    table = EmbeddingBagConfig("t", 100, 16, ["a"], data_type=dtype)
    plan = dlrm_rs.plan([table], 0, batch_size=1, optimizer=optimizer, hardware=HARDWARE, output_dtype=torch.bfloat16)
    assert plan.tables[0].memory == 100 * memory
    assert plan.tables[0].pcie == pcie


def test_small_and_hot_tables_go_to_the_gpu_while_they_fit_and_help() -> None:
    assert places(small_plan()) == {"large": "cpu", "hot": "gpu", "small": "gpu"}
    # Per byte the smallest relieves most.
    few = small_plan(10_000)
    assert places(few) == {"large": "cpu", "hot": "cpu", "small": "gpu"}
    assert [table.why for table in few.tables] == ["no room on the GPU", "no room on the GPU", ""]
    assert places(small_plan(1e9)) == {"large": "gpu", "hot": "gpu", "small": "gpu"}
    assert small_plan(1e9).bottleneck == "PCIe"  # of ids
    busy = dlrm_rs.plan(
        TABLES, 1e9, batch_size=1000, hardware=dataclasses.replace(HARDWARE, gpu_bandwidth=1e6), dense_flops=1e9
    )
    assert set(places(busy).values()) == {"cpu"}  # the GPU is the bottleneck already
    assert {table.why for table in busy.tables} == {"on the GPU a step would be longer"}


@pytest.mark.parametrize(
    ("options", "is_weighted", "why"),
    [
        ({"data_type": "int8"}, False, "rows in int8, which torch does not train"),
        ({"scale_grad_by_freq": True}, False, "scale_grad_by_freq, for which some versions of torch count other rows"),
        ({"pooling": "mean"}, True, "weights of ids and mean pooling, as torch weights sums alone"),
    ],
)
def test_tables_that_torch_cannot_do_stay_on_the_host_and_the_plan_says_why(
    options: dict[str, Any], is_weighted: bool, why: str
) -> None:
    tables = [EmbeddingBagConfig("t", 100, 16, ["a"], **options), EmbeddingBagConfig("s", 100, 16, ["b"])]
    plan = dlrm_rs.plan(tables, 1e9, batch_size=1000, is_weighted=is_weighted, hardware=HARDWARE)
    assert places(plan) == {"t": "cpu", "s": "gpu"}
    assert str(plan).splitlines()[1].endswith(f"(stays there: {why})")
    built = plan.build(device="cpu")
    assert list(built.device_bags) == ["s"]
    with pytest.raises(ValueError, match=f"places: expected 'cpu' for table 't', got 'gpu'; it has {why}"):
        plan.place(t="gpu")
    with pytest.raises(ValueError, match=f"got table 't' with {why}; place it on the host"):
        PlacedEmbeddingBags(tables, ["t"], "cpu", is_weighted=is_weighted)


def test_an_optimizer_for_some_tables_is_reckoned_for_all() -> None:
    tables = [dataclasses.replace(TABLES[0], data_type="bf16"), *TABLES[1:]]
    optimizer = RowWiseAdagrad(lr=0.1, split_bf16=True, table_lr={"small": 0.2})
    plan = dlrm_rs.plan(tables, 0, batch_size=10, optimizer=optimizer, hardware=HARDWARE)
    assert [table.memory for table in plan.tables] == [1_000_000 * (32 + 32 + 4), 1000 * (64 + 4), 100 * (64 + 4)]


def test_memory_on_the_host_is_what_its_report_tells() -> None:
    config = EmbeddingBagConfig("t", 1000, 16, ["a"], data_type="int8", hot_rows=0.1)
    optimizer = Adagrad(lr=0.1)
    plan = dlrm_rs.plan([config], 0, batch_size=1, optimizer=optimizer, hardware=HARDWARE)
    host = plan.build(optimizer, device="cpu").host
    assert host is not None
    report = host.memory_report()["t"]
    parts = ("payload", "scales", "hot", "state")
    assert plan.tables[0].memory == pytest.approx(sum(report[part] for part in parts), rel=0.05)


def test_a_model_with_all_tables_on_the_gpu_is_for_a_plain_loop() -> None:
    plan = small_plan(1e9)
    assert "all tables are on the GPU: train in a plain loop, a Pipeline has nothing to do on the CPU" in str(plan)
    assert plan.build(SGD(lr=0.1), device="cpu").host is None
    assert "plain loop" not in str(small_plan())


def test_the_user_has_the_last_word() -> None:
    chosen = small_plan(places={"small": "cpu"})
    assert places(chosen) == {"large": "cpu", "hot": "gpu", "small": "cpu"}
    assert places(chosen.place(hot="cpu", small="gpu")) == {"large": "cpu", "hot": "cpu", "small": "gpu"}
    with pytest.raises(ValueError, match=r"expected 64,\d+,\d+ bytes for the tables on the GPU, got 1,000,000"):
        chosen.place(large="gpu")
    with pytest.raises(ValueError, match=r"places: expected tables \['large', 'hot', 'small'\], got 'huge'"):
        chosen.place(huge="gpu")
    with pytest.raises(ValueError, match="places: expected 'cpu' or 'gpu' for table 'hot', got 'tpu'"):
        chosen.place(hot="tpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gpu_memory": float("inf")}, ValueError, "gpu_memory: expected a finite number of at least 0, got inf"),
        ({"gpu_memory": float("nan")}, ValueError, "gpu_memory: expected a finite number of at least 0, got nan"),
        ({"gpu_memory": -1}, ValueError, "gpu_memory: expected a finite number of at least 0, got -1"),
        ({"gpu_memory": "8GB"}, TypeError, "gpu_memory: expected a number, got '8GB'"),
        ({"dense_flops": float("nan")}, ValueError, "dense_flops: expected a finite number of at least 0, got nan"),
        ({"batch_size": -1}, ValueError, "batch_size: expected a number from 0 to 2.63 - 1, got -1"),
        ({"batch_size": 1.5}, TypeError, "batch_size: expected an integer, got float"),
        ({"ids_per_bag": -3}, ValueError, "ids_per_bag: expected a finite number of at least 0, got -3"),
        ({"ids_per_bag": "3"}, TypeError, "ids_per_bag: expected a number, got '3'"),
        (
            {"ids_per_bag": dict.fromkeys("abcd", float("nan"))},
            ValueError,
            r"ids_per_bag\['a'\]: expected a finite number of at least 0, got nan",
        ),
        ({"ids_per_bag": {"a": 1}}, ValueError, r"a number for every feature, got none for \['b', 'c'\, 'd'\]"),
        ({"ids_per_bag": dict.fromkeys("abcde", 1)}, ValueError, r"ids_per_bag: expected features of .*, got \['e'\]"),
        ({"optimizer": torch.optim.SGD}, TypeError, "optimizer: expected None or one of dlrm_rs.optim, got <class"),
        ({"hardware": "H100"}, TypeError, "hardware: expected None or a dlrm_rs.placement.Hardware, got 'H100'"),
        ({"places": ["large"]}, TypeError, r"places: expected None or 'cpu' and 'gpu' by .*, got \['large'\]"),
        ({"output_dtype": torch.float64}, TypeError, "output_dtype: expected one of .*, got torch.float64"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dlrm_rs.plan(TABLES, **{"gpu_memory": 0, "batch_size": 1, "hardware": HARDWARE, **options})


def test_tables_and_speeds_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_embeddings of table 'large': expected a number from 0 to .*, got -1"):
        dlrm_rs.plan([dataclasses.replace(TABLES[0], num_embeddings=-1)], 0, batch_size=1, hardware=HARDWARE)
    with pytest.raises(ValueError, match="pcie_bandwidth: expected a number above 0, got 0"):
        Hardware(pcie_bandwidth=0)
    with pytest.raises(TypeError, match="gpu_flops: expected a number, got '1e12'"):
        Hardware(gpu_flops="1e12")  # type: ignore[arg-type]


def test_the_print_has_every_table_the_costs_and_the_bottleneck() -> None:
    text = str(small_plan(places={"small": "cpu"}, dense_flops=2e9))
    lines = text.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["large", "cpu"], ["hot", "gpu"], ["small", "cpu"]]
    assert lines[3].endswith("(as you say)")
    # id bytes, rows read, updated, and what goes over the bus: pooled rows of one table, ids of the other.
    assert lines[1].split()[5:13] == ["80.0", "KB", "640.0", "KB", "0.0", "B", "64.0", "KB"]
    assert lines[2].split()[5:13] == ["160.0", "KB", "1.3", "MB", "0.0", "B", "160.0", "KB"]
    assert [line.strip() for line in lines[5:10]] == [
        "a step: 320.0 KB of ids",
        "host memory     1.280 ms  1.3 MB of rows read, 0.0 B updated",
        "PCIe            0.029 ms  128.0 KB of pooled rows or their gradients, 160.0 KB of ids",
        "GPU             2.001 ms  1.3 MB of rows read, 0.0 B updated; 2.0 GFLOP in the dense layers",
        "bottleneck: GPU, 2.001 ms side by side, 3.310 ms in turn",
    ]
    assert "not measured: host_bandwidth, pcie_bandwidth, gpu_bandwidth, gpu_flops" in text


def test_this_machine_is_measured() -> None:
    plan = dlrm_rs.plan(TABLES[2:], 0, batch_size=1)
    assert "host_bandwidth" in plan.hardware.measured
    assert 1e7 < plan.hardware.host_bandwidth < 1e13


class Torch(nn.Module):
    """The same tables by torch alone."""

    def __init__(self, placed: PlacedEmbeddingBags) -> None:
        super().__init__()
        self.configs = placed.embedding_bag_configs()
        weights = {name.split(".")[-2]: weight.detach().clone() for name, weight in placed.named_parameters()}
        self.bags = nn.ModuleDict()
        for config in self.configs:
            bags = nn.EmbeddingBag(
                config.num_embeddings, config.embedding_dim, mode=config.pooling, include_last_offset=True
            )
            bags.weight.data = weights[config.name]
            self.bags[config.name] = bags

    def forward(self, features: dlrm_rs.KeyedJaggedTensor) -> Tensor:
        parts = [(config.name, features[feature]) for config in self.configs for feature in config.feature_names]
        return torch.cat([self.bags[name](part.values(), part.offsets()) for name, part in parts], dim=1)


def test_a_model_made_by_a_plan_is_the_model_and_trains_in_a_pipeline() -> None:
    tables = [
        EmbeddingBagConfig("t0", 2000, 8, ["t0"]),
        EmbeddingBagConfig("t1", 20, 8, ["t1"], pooling="mean"),
        EmbeddingBagConfig("t2", 500, 8, ["t2"]),
        EmbeddingBagConfig("t3", 10, 8, ["t3"]),
    ]
    clicks = ClickLog([2000, 20, 500, 10], 32, 30, 3, dense_features=5)
    log = [clicks[k] for k in range(30)]
    plan = dlrm_rs.plan(tables, 2000, batch_size=32, ids_per_bag=3, hardware=HARDWARE)
    assert places(plan) == {"t0": "cpu", "t1": "gpu", "t2": "cpu", "t3": "gpu"}

    def model() -> dlrm_rs.DLRM:
        torch.manual_seed(4)
        return dlrm_rs.DLRM(plan.build(SGD(lr=0.1), device="cpu"), 5, [8], [8, 1])

    def optimizer(model: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD([p for name, p in model.named_parameters() if ".host." not in name], lr=0.1)

    placed = model()
    assert isinstance(placed.embeddings, PlacedEmbeddingBags)
    by_torch = Torch(placed.embeddings)
    torch.testing.assert_close(placed.embed(log[0].sparse), by_torch(log[0].sparse))

    sgd, losses = optimizer(placed), []
    for batch in log:
        sgd.zero_grad()
        loss = click_loss(placed, batch)
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    pipelined = model()
    assert [loss.item() for loss in Pipeline(pipelined, optimizer(pipelined), log)] == losses
    for got, expected in zip(pipelined.parameters(), placed.parameters(), strict=True):
        assert torch.equal(got, expected)
    first = by_torch.bags.get_parameter("t1.weight")
    assert not torch.equal(first, placed.embeddings.device_bags.get_parameter("t1.weight"))  # it was trained
