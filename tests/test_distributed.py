"""Several processes with torch's distributed wrappers around models with our tables."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import dlrm_rs
from dlrm_rs.distributed import leave_tables_to_each_process, table_parameters

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")

# What every process starts with: `rank`, `world`, a model whose weights and a batch that are the rank's own.
BEGIN = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import dlrm_rs
from dlrm_rs.distributed import leave_tables_to_each_process, table_parameters

rank, world = map(int, sys.argv[1:3])
torch.set_num_threads(1)
store = dist.FileStore(sys.argv[3], world)
dist.init_process_group("gloo", store=store, rank=rank, world_size=world)

def rows(seed, optimizer=None):
    torch.manual_seed(seed)
    return dlrm_rs.EmbeddingBag(6, 3, mode="sum", optimizer=optimizer)

def of_all(tensor):
    found = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(found, tensor.detach().contiguous())
    return found

def train(model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.tensor([[rank, 2], [3 + rank, 3 + rank]])).square().mean().backward()
        optimizer.step()

SGD = dlrm_rs.optim.SGD(lr=0.1)
"""


def run(tmp_path: Path, code: str, world: int = 2) -> None:
    """In so many processes."""
    # What is printed counts: gloo's threads now and then abort a process that is already done.
    end = '\nprint("done", flush=True)\ndist.barrier()\n__import__("os")._exit(0)\n'
    command = [sys.executable, "-W", "ignore", "-c", BEGIN + code + end]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(tmp_path / "store")], stdout=pipe, stderr=pipe, text=True
        )
        for rank in range(world)
    ]
    try:
        printed = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [out.split()[-1:] for out, _ in printed] == [["done"]] * world, "\n".join(error for _, error in printed)


def test_tables_are_left_to_each_process(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
bags = rows(rank, SGD)
own = bags.weight.detach().clone()
quantized = dlrm_rs.EmbeddingBag(6, 3, mode="sum", dtype="int8")
class Model(nn.Sequential):
    def forward(self, ids):
        return self[2](self[0](ids) + self[1](ids))
model = Model(bags, quantized, nn.Linear(3, 1))
codes = quantized.weight_codes.clone()
wrapped = DistributedDataParallel(leave_tables_to_each_process(model))
assert torch.equal(bags.weight, own)  # not broadcast
assert torch.equal(quantized.weight_codes, codes)
train(wrapped)
first, second = of_all(model[2].weight)
assert torch.equal(first, second)  # the dense layer is replicated
touched = (bags.weight != own).any(1).tolist()
assert touched == [rank == 0, rank == 1, True, rank == 0, rank == 1, False], touched  # by the rank's own batches
assert bags.weight.grad is None
""",
    )


def test_a_dlrm_with_a_fused_optimizer_needs_no_call(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
def collection(seed):
    torch.manual_seed(seed)
    return dlrm_rs.EmbeddingBagCollection([dlrm_rs.EmbeddingBagConfig("a", 6, 4, ["x"])], optimizer=SGD)
model = dlrm_rs.DLRM(collection(rank), dense_in_features=2, bottom_mlp=[4], top_mlp=[1])
own = model.embeddings.embedding_bags["a"].weight.detach().clone()
wrapped = DistributedDataParallel(model)
assert torch.equal(model.embeddings.embedding_bags["a"].weight, own)
features = dlrm_rs.KeyedJaggedTensor(["x"], torch.tensor([rank, 3]), lengths=torch.tensor([1, 1]))
for _ in range(3):
    wrapped(torch.ones(2, 2), features).square().mean().backward()
first, second = of_all(model.bottom[0].weight.grad)
assert torch.equal(first, second)
theirs = nn.Sequential(nn.EmbeddingBag(6, 3, mode="sum"), nn.Linear(3, 1))
wrapped = DistributedDataParallel(dlrm_rs.replace_embeddings(theirs, optimizer=SGD))
train(wrapped)
""",
    )


def test_tables_without_a_fused_optimizer_are_replicated_unless_left_out(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
for sparse in (False, True):
    bags = rows(rank)
    bags.sparse = sparse
    model = nn.Sequential(bags, nn.Linear(3, 1))
    wrapped = DistributedDataParallel(model)
    assert torch.equal(*of_all(bags.weight))  # broadcast
    train(wrapped)
    assert torch.equal(*of_all(bags.weight))  # and reduced
""",
    )


def test_fully_sharded_data_parallel_ignores_tables(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
from torch.distributed.fsdp import FullyShardedDataParallel
bags = rows(rank, SGD)
own = bags.weight.detach().clone()
model = nn.Sequential(bags, nn.Linear(3, 8), nn.Linear(8, 1))
wrapped = FullyShardedDataParallel(
    model, ignored_states=table_parameters(model), device_id=torch.device("cpu"), use_orig_params=True
)
assert torch.equal(bags.weight, own)
assert bags.weight.data_ptr() == bags._tables.handle.weight(0).ctypes.data
out = wrapped(torch.tensor([[rank, 2]]))
out.sum().backward()
assert (bags.weight != own).any(1).tolist() == [rank == 0, rank == 1, True, False, False, False]
""",
    )


def test_fully_shard_ignores_tables(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        pytest.skip("fully_shard of this version of torch cannot be told what to ignore; shard the dense layers alone")
    run(
        tmp_path,
        """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
bags = rows(rank, SGD)
own = bags.weight.detach().clone()
model = nn.Sequential(bags, nn.Linear(3, 8), nn.Linear(8, 1))
fully_shard(model, mesh=init_device_mesh("cpu", (world,)), ignored_params=table_parameters(model))
assert torch.equal(bags.weight, own)
train(model)
assert (bags.weight != own).any(1).tolist() == [rank == 0, rank == 1, True, rank == 0, rank == 1, False]
assert bags.weight.data_ptr() == bags._tables.handle.weight(0).ctypes.data
""",
    )


def test_names_and_parameters_of_tables() -> None:
    bags, rows = dlrm_rs.EmbeddingBag(4, 2), dlrm_rs.Embedding(4, 2, dtype="int4")
    collection = dlrm_rs.EmbeddingBagCollection([dlrm_rs.EmbeddingBagConfig("t", 4, 2, ["f"])])
    model = nn.ModuleDict({"bags": bags, "rows": rows, "many": collection, "dense": nn.Linear(2, 2)})
    weight = collection.embedding_bags["t"].weight
    assert table_parameters(model) == {bags.weight, weight}
    model._ddp_params_and_buffers_to_ignore = ["dense.bias"]  # type: ignore[assignment]
    assert leave_tables_to_each_process(model) is model
    assert model._ddp_params_and_buffers_to_ignore == [
        "dense.bias",
        "bags.weight",
        "rows.weight_codes",
        "rows.weight_scales",
        "many.embedding_bags.t.weight",
    ]
    assert leave_tables_to_each_process(dlrm_rs.Embedding(4, 2))._ddp_params_and_buffers_to_ignore == ["weight"]
    with pytest.raises(ValueError, match="model: expected one with tables of dlrm_rs, got none"):
        leave_tables_to_each_process(nn.Linear(2, 2))
