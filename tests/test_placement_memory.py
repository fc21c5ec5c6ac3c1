"""What a plan says of the GPU's memory is what a step of torch's takes there, here counted on the CPU."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dlrm_rs
from dlrm_rs import EmbeddingBagConfig, KeyedJaggedTensor
from dlrm_rs.optim import SGD, Adagrad, Adam, OptimizerSpec
from dlrm_rs.placement import Hardware


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._sizes:
            self._sizes[address] = storage.nbytes()
            weakref.finalize(storage, self._sizes.pop, address)
            self.peak = max(self.peak, sum(self._sizes.values()))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("spec", "optimizer"),
    [
        (SGD(lr=0.1), lambda weights: torch.optim.SGD(weights, 0.1, foreach=True)),
        (SGD(lr=0.1, weight_decay=0.1), lambda weights: torch.optim.SGD(weights, 0.1, weight_decay=0.1, foreach=True)),
        (SGD(lr=0.1, momentum=0.9), lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, foreach=True)),
        (Adagrad(lr=0.1), lambda weights: torch.optim.Adagrad(weights, 0.1, foreach=True)),
        (Adam(lr=0.1), lambda weights: torch.optim.Adam(weights, 0.1, foreach=True)),
    ],
    ids=["sgd", "decay", "momentum", "adagrad", "adam"],
)
def test_memory_on_the_gpu_is_what_training_takes(
    spec: OptimizerSpec, optimizer: Callable[[list[Tensor]], torch.optim.Optimizer], dtype: str
) -> None:
    tables = [
        EmbeddingBagConfig("t0", 10_000, 16, ["a", "b"], data_type=dtype),
        EmbeddingBagConfig("t1", 5_000, 16, ["c"], data_type=dtype),
    ]
    plan = dlrm_rs.plan(tables, 1e9, batch_size=1, optimizer=spec, hardware=Hardware(gpu_bandwidth=1e15))
    bags = plan.build(device="cpu")
    assert list(bags.device_bags) == ["t0", "t1"]
    weights: list[Tensor] = list(bags.parameters())
    features = KeyedJaggedTensor(["a", "b", "c"], torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 1, 1]))
    with Peak() as counted:
        for weight in weights:
            counted.add(weight)
        trains = optimizer(weights)
        for _ in range(3):
            trains.zero_grad()
            bags(features).values().sum().backward()
            trains.step()
    assert 0.97 * counted.peak < plan.gpu_bytes <= counted.peak
