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
    assert large.memory == 1_000_000 * (64 + 4)
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
    assert large.swept == 10_000 * 64 + 1_000_000 * 2 * (64 + 64 + 4)
    assert there.costs["GPU"] == pytest.approx((10_000 * 64 + large.swept) / 1e12)


@pytest.mark.parametrize(
    ("dtype", "optimizer", "memory", "pcie"),
    [
        ("fp32", None, 16 * 4, 16 * 2),  # serving: half the bytes, one way
        ("int8", None, 16, 16 * 2),
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
    assert places(small_plan(10_000)) == {"large": "cpu", "hot": "cpu", "small": "gpu"}
    assert places(small_plan(1e9)) == {"large": "gpu", "hot": "gpu", "small": "gpu"}
    assert small_plan(1e9).bottleneck == "PCIe"  # of ids
    busy = dlrm_rs.plan(
        TABLES, 1e9, batch_size=1000, hardware=dataclasses.replace(HARDWARE, gpu_bandwidth=1e6), dense_flops=1e9
    )
    assert set(places(busy).values()) == {"cpu"}  # the GPU is the bottleneck already


def test_quantized_tables_stay_on_the_host() -> None:
    table = EmbeddingBagConfig("t", 100, 16, ["a"], data_type="int8")
    plan = dlrm_rs.plan([table], 1e9, batch_size=1000, hardware=HARDWARE)
    assert places(plan) == {"t": "cpu"}
    with pytest.raises(ValueError, match="got int8 in table 't'; place it on the host"):
        plan.place(t="gpu").build(device="cpu")


def test_the_user_has_the_last_word() -> None:
    chosen = small_plan(places={"small": "cpu"})
    assert places(chosen) == {"large": "cpu", "hot": "gpu", "small": "cpu"}
    assert places(chosen.place(hot="cpu", small="gpu")) == {"large": "cpu", "hot": "cpu", "small": "gpu"}
    with pytest.raises(ValueError, match=r"expected 64,\d+,\d+ bytes for the tables on the GPU, got 1,000,000"):
        chosen.place(large="gpu")
    with pytest.raises(ValueError, match="huge: expected one of the tables"):
        chosen.place(huge="gpu")
    with pytest.raises(ValueError, match="hot: expected 'cpu' or 'gpu', got 'tpu'"):
        chosen.place(hot="tpu")  # type: ignore[arg-type]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size: expected at least 0, got -1"):
        dlrm_rs.plan(TABLES, 0, batch_size=-1, hardware=HARDWARE)
    with pytest.raises(ValueError, match=r"expected a number for every feature, got none for \['b', 'c'\]"):
        dlrm_rs.plan(TABLES, 0, batch_size=1, ids_per_bag={"a": 1}, hardware=HARDWARE)
    with pytest.raises(ValueError, match="pcie_bandwidth: expected a number above 0, got 0"):
        Hardware(pcie_bandwidth=0)
    with pytest.raises(ValueError, match=r"on_device: expected names of tables, got \['huge'\]"):
        PlacedEmbeddingBags(TABLES, ["huge"], "cpu")


def test_the_print_has_every_table_the_costs_and_the_bottleneck() -> None:
    text = str(small_plan(places={"small": "cpu"}, dense_flops=2e9))
    lines = text.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["large", "cpu"], ["hot", "gpu"], ["small", "cpu"]]
    assert lines[3].endswith("(as you say)")
    assert "bottleneck: GPU, 2." in text
    assert "2.0 GFLOP" in text
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


def test_weights_of_ids_for_tables_on_the_device_are_refused() -> None:
    placed = PlacedEmbeddingBags(TABLES[2:], ["small"], "cpu")
    features = dlrm_rs.KeyedJaggedTensor(["d"], torch.tensor([1]), torch.tensor([0.5]), lengths=torch.tensor([1]))
    with pytest.raises(ValueError, match="place the tables of such features on the host"):
        placed(features)


def test_gradients_by_frequency_are_refused_on_the_device() -> None:
    with pytest.raises(ValueError, match=r"without scale_grad_by_freq, got it in table 'small'.* place it on the host"):
        PlacedEmbeddingBags([dataclasses.replace(TABLES[2], scale_grad_by_freq=True)], ["small"], "cpu")
