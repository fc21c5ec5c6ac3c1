"""Processes that train the same tables, in memory that they share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dlrm_rs
from dlrm_rs.distributed import share_tables
from dlrm_rs.shared_memory import SharedMemory
from test_distributed import run

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")

# A model with tables of every kind, and batches: of any samples, so also of those of all ranks.
MODEL = """
import copy, os, re, tempfile
from dlrm_rs.distributed import share_tables

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(rank)
        table = dlrm_rs.EmbeddingBagConfig
        tables = [table("t", 20, 5, ["a", "b"]), table("u", 30, 3, ["c"], "mean", data_type="bf16")]
        tables.append(table("v", 160_000, 64, ["d"]))
        self.many = dlrm_rs.EmbeddingBagCollection(
            tables, optimizer=dlrm_rs.optim.RowWiseAdagrad(lr=0.1, clip_norm=0.01)
        )
        adam = dlrm_rs.optim.Adam(lr=0.1, update="step", clip_norm=0.01)
        self.largest = dlrm_rs.EmbeddingBag(20, 4, mode="max", optimizer=adam)
        self.weighted = dlrm_rs.EmbeddingBag(20, 4, mode="sum", optimizer=SGD)
        self.codes = dlrm_rs.EmbeddingBag(20, 4, mode="sum", dtype="int4")
        self.frozen = dlrm_rs.EmbeddingBag(20, 4, mode="sum").requires_grad_(False)
        self.dense = nn.Linear(5 + 5 + 3 + 64 + 4 * 4, 1)

    def forward(self, features, ids, offsets, weights):
        bags = [self.largest(ids, offsets), self.weighted(ids, offsets, weights)]
        bags += [self.codes(ids, offsets), self.frozen(ids, offsets)]
        return self.dense(torch.cat([self.many(features).values(), *bags], 1))

def batch(samples):
    lengths = [[(s + f) % 4 for s in samples] for f in range(4)]
    ids = [[(7 * s + 3 * k + f) % 20 for s in samples for k in range((s + f) % 4)] for f in range(4)]
    values, lengths = torch.tensor(sum(ids, [])), torch.tensor(sum(lengths, []))
    features = dlrm_rs.KeyedJaggedTensor(["a", "b", "c", "d"], values, lengths=lengths)
    own = features["c"]
    return features, own.values(), own.offsets()[:-1], own.values() * 0.25 + 0.5

def train(model, tables, samples, steps=4):
    optimizer = torch.optim.SGD(tables.dense.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(*batch([s + 4 * world * step for s in samples])).square().mean().backward()
        optimizer.step()
        tables.largest.fused_optimizer.step()
        tables.largest.fused_optimizer.zero_grad()

def everything(model):
    optimizers = [model.many.fused_optimizer, model.largest.fused_optimizer]
    states = [state for optimizer in optimizers for by_name in optimizer.state.values() for state in by_name.values()]
    return [*model.state_dict().values(), *states]

def resident(kind):
    with open("/proc/self/status") as status:
        return int(re.search(f"Rss{kind}:\\\\s*(\\\\d+)", status.read())[1]) << 10

def refused(words, action):
    try:
        action()
    except (RuntimeError, ValueError, MemoryError) as error:
        assert re.search(words, str(error)), str(error)
    else:
        raise AssertionError(f"not refused: {words}")
"""


def test_tables_are_trained_as_by_one_process(tmp_path: Path) -> None:
    run(
        tmp_path,
        MODEL
        + """
model = Model()
before = resident("Anon")
assert share_tables(model) is model
assert before - resident("Anon") > 30 << 20  # the 41 MB of one table
assert resident("Shmem") > 38 << 20 or rank  # which has not read them yet
with open("/proc/self/maps") as maps:
    files = {line.split()[4] for line in maps if "memfd:dlrm_rs" in line}
assert len(files) == 5
everywhere = [None] * world
dist.all_gather_object(everywhere, files)
assert all(of_rank == files for of_rank in everywhere)  # the same files

wrapped = DistributedDataParallel(model)
alone = copy.deepcopy(model)  # with tables of its own
first = [tensor.clone() for tensor in everything(model)]
optimizers = [model.many.fused_optimizer, model.largest.fused_optimizer]
checkpoint = copy.deepcopy([part.state_dict() for part in (model, *optimizers)])
dist.barrier()
train(wrapped, model, range(4 * rank, 4 * rank + 4))
for tensor in everything(model):
    assert all(torch.equal(tensor.float(), other) for other in of_all(tensor.float()))
trained = [tensor.clone() for tensor in everything(model)]
train(alone, alone, range(4 * world))
for got, expected, start in zip(trained, everything(alone), first, strict=True):
    torch.testing.assert_close(got, expected, rtol=1e-5 if got.dtype is torch.float32 else 2e-2, atol=1e-6)
assert sum(not torch.equal(*pair) for pair in zip(trained, first, strict=True)) >= 10
assert model.many.fused_optimizer.param_groups[0]["step"] == 4
dist.barrier()

parts = checkpoint[0]
for name in [name for name in parts if name.startswith("codes.")]:
    del parts[name]
refused("rows: cannot be replaced; do so before", lambda: model.load_state_dict(alone.state_dict()))
model.load_state_dict(parts, strict=False)
for optimizer, state in zip(optimizers, checkpoint[1:], strict=True):
    optimizer.load_state_dict(state)
dist.barrier()
train(wrapped, model, range(4 * rank, 4 * rank + 4))
assert all(map(torch.equal, everything(model), trained))  # the same bits
dist.barrier()

refused("shared already", lambda: share_tables(model))
refused("module: cannot change the rows of 'many.t'", lambda: dlrm_rs.quantize(model))
refused("reset_parameters: cannot fill", model.weighted.reset_parameters)
refused("cannot look up collection 'many' ahead", lambda: dlrm_rs.Pipeline(model, None, []))
out = model.frozen.requires_grad_()(torch.tensor([[1]])).sum()
refused("backward: cannot give a weight its gradient, by which every process", out.backward)
weight = model.weighted.weight.data
model.weighted.weight.data = torch.zeros(20, 4)
refused("weight: cannot be put in other memory", lambda: model.weighted(torch.tensor([[1]])))
model.weighted.weight.data = weight
model.frozen.requires_grad_(False)
if rank == 0:
    dlrm_rs.operators.sharing.merged = lambda calls: (print("done", flush=True), os._exit(0))
def lost():
    wrapped(*batch(range(4))).sum().backward()
refused("lost the process of rank 0, which updates the shared tables", lost)
""",
        3,
    )


def test_rows_of_codes_have_the_bits_of_one_process(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
import copy
from dlrm_rs.distributed import share_tables

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(rank)
        spec, table = dlrm_rs.optim, dlrm_rs.EmbeddingBagConfig
        tables = [table("t", 40, 8, ["a", "b"], data_type="int8"), table("u", 30, 5, ["c"], "mean", data_type="int2")]
        self.many = dlrm_rs.EmbeddingBagCollection(tables, optimizer=spec.RowWiseAdagrad(lr=0.1))
        self.step = dlrm_rs.EmbeddingBag(40, 8, mode="sum", dtype="int4", optimizer=spec.Adam(lr=0.1, update="step"))

    def forward(self, samples):
        lengths = torch.tensor([[(s + f) % 4 for s in samples] for f in range(3)])
        ids = [torch.tensor([(7 * s + 3 * k + f) % 30 for s in samples for k in range((s + f) % 4)]) for f in range(3)]
        features = dlrm_rs.KeyedJaggedTensor(["a", "b", "c"], torch.cat(ids), lengths=lengths.view(-1))
        pooled = self.many(features).values()
        return torch.cat([pooled, self.step(features["b"].values(), features["b"].offsets()[:-1])], 1)

def train(model, samples, processes, steps=5):
    for step in range(steps):
        model([s + 4 * processes * step for s in samples]).square().sum(1).mean().backward()
        model.step.fused_optimizer.step()
        model.step.fused_optimizer.zero_grad()

def everything(model):
    optimizers = [model.many.fused_optimizer, model.step.fused_optimizer]
    states = [state for optimizer in optimizers for by_name in optimizer.state.values() for state in by_name.values()]
    return [*model.state_dict().values(), *states]

def check(group, members):
    place, many = members.index(rank), len(members)
    model = share_tables(Model(), group)
    alone = copy.deepcopy(model)  # with the rows of the first
    dist.barrier(group)
    dlrm_rs.set_num_threads(1 + (place == 0))
    train(model, range(4 * place, 4 * place + 4), many)
    before = [tensor.clone() for tensor in everything(alone)]
    train(alone, range(4 * many), many)
    pairs = list(zip(everything(model), everything(alone), strict=True))
    assert all(torch.equal(*pair) for pair in pairs)  # dividing by 4, or 2, is exact
    assert sum(not torch.equal(old, new) for old, (new, _) in zip(before, pairs, strict=True)) > 6
    for name in ("weight_codes", "weight_scales"):
        part = getattr(model.step, name)
        part.data = part.clone()
        try:
            model.step(torch.tensor([[1]]))
        except RuntimeError as error:
            assert "weight_codes: cannot be replaced; copy into it (dlrm_rs.distr" in str(error)
        else:
            raise AssertionError(name)
        part.data = model.step._tables.memory.parts[0][name == "weight_scales"]
    model.step(torch.tensor([[1]]))
    return model

check(None, range(4))
dist.barrier()
pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
model = check(pairs[rank % 2], [rank % 2, rank % 2 + 2])
codes = of_all(model.step.weight_codes)
assert torch.equal(codes[0], codes[2])
assert torch.equal(codes[1], codes[3])
assert not torch.equal(codes[0], codes[1])
""",
        4,
    )


def test_a_backend_that_knows_no_tensors_of_the_cpu_is_not_asked(tmp_path: Path) -> None:
    # As NCCL is to the tables: a group of which nothing is wanted but who is in it.
    run(
        tmp_path,
        """
from dlrm_rs.distributed import share_tables

class OfAnotherDevice(dist.ProcessGroup):
    def getBackendName(self):
        return "other"

dist.Backend.register_backend("other", lambda store, rank, size, timeout: OfAnotherDevice(rank, size), devices=["cpu"])
dist.barrier()
dist.destroy_process_group()
store = dist.FileStore(sys.argv[3] + "again", world)
dist.init_process_group("other", store=store, rank=rank, world_size=world)
try:
    dist.all_reduce(torch.zeros(1))
except RuntimeError:
    pass
else:
    raise AssertionError("a backend that works")
model = share_tables(rows(rank, SGD))
before = model.weight.detach().clone()
model(torch.tensor([[1, 2], [3, rank]])).sum().backward()
expected = torch.zeros(6, 1)
for row in (1, 2, 3, 1, 2, 3, 0, 1):
    expected[row] += 0.5
assert torch.allclose(model.weight, before - 0.1 * expected)
print("done", flush=True)
dist.barrier = lambda: None
""",
    )


def test_without_gloo_there_is_no_way_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    with pytest.raises(RuntimeError, match="group: expected a torch that is built with gloo"):
        share_tables(dlrm_rs.EmbeddingBag(4, 2, optimizer=dlrm_rs.optim.SGD(lr=0.1)))


def test_what_cannot_be_shared_is_refused_in_every_process(tmp_path: Path) -> None:
    run(
        tmp_path,
        MODEL
        + """
refused("model: expected one with tables of dlrm_rs, got none .in the process of rank 1", lambda: share_tables(
    nn.Linear(2, 2) if rank else rows(0, SGD)
))
refused("expected a fused optimizer for table 'embedding_bag'.*or leave it to Dist", lambda: share_tables(rows(0)))
refused("max_norm: expected None", lambda: share_tables(dlrm_rs.EmbeddingBag(6, 3, max_norm=1.0, optimizer=SGD)))
refused(
    r"got TableSpec.name='embedding_bag', num_embeddings=6.* in the first and .*num_embeddings=7",
    lambda: share_tables(dlrm_rs.EmbeddingBag(6 + rank, 3, optimizer=SGD)),
)
refused("'lr': 0.5.* in the first and .*'lr': 1.5", lambda: share_tables(rows(0, dlrm_rs.optim.SGD(lr=0.5 + rank))))
refused("got .* in the first and nothing in number 1", lambda: share_tables(
    nn.ModuleList(rows(0, SGD) for _ in range(2 - rank))
))
alone = dist.new_group([0])
if rank == 1:
    refused("group: expected one with this process, of rank 1", lambda: share_tables(rows(0, SGD), alone))

bags = rows(rank, SGD)
own = bags.weight.detach().clone()
find = dlrm_rs.shared_tables.SharedMemory.open
if rank == 1:  # as if it were on another host
    dlrm_rs.shared_tables.SharedMemory.open = lambda shapes, place: find(shapes, place._replace(pid=2**22 + 1))
refused("group: expected processes of one host.*No such file", lambda: share_tables(bags))
dlrm_rs.shared_tables.SharedMemory.open = find
reserve = dlrm_rs.shared_tables.SharedMemory.reserve
def full(memory, array):
    raise OSError(28, "No space left on device")
dlrm_rs.shared_tables.SharedMemory.reserve = full
refused("No space left", lambda: share_tables(bags))
dlrm_rs.shared_tables.SharedMemory.reserve = reserve
assert torch.equal(bags.weight, own)
bags(torch.tensor([[1, 2]])).sum().backward()  # by itself still
assert not torch.equal(bags.weight, own)

dist.barrier()
share_tables(bags, timeout=__import__("datetime").timedelta(seconds=20))
assert torch.equal(*of_all(bags.weight))
own = bags.weight.detach().clone()
dist.barrier()
bags.scale_grad_by_freq = rank == 1
def step():
    bags(torch.tensor([[1, 2]])).sum().backward()
refused(r"update: .* got a set of scale_grad_by_freq of .* in the order", step)
bags.scale_grad_by_freq = False
assert bags.fused_optimizer.param_groups[0]["step"] == 1
with torch.no_grad():
    bags(torch.tensor([[1, 2]]))
if rank == 1:
    print("done", flush=True)
    os._exit(0)
refused("every process that shares the tables to take this step", step)
assert torch.equal(bags.weight, own)
""",
    )


def test_without_a_process_group_nothing_is_shared() -> None:
    with pytest.raises(RuntimeError, match=r"group: expected torch.distributed.init_process_group to have been called"):
        share_tables(dlrm_rs.EmbeddingBag(4, 2, optimizer=dlrm_rs.optim.SGD(lr=0.1)))


@pytest.fixture
def _group_of_one(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined] # torch says not that it exports it
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_group_of_one")
def test_compiled_models_update_shared_tables_where_they_are() -> None:
    bags = share_tables(dlrm_rs.EmbeddingBag(4, 2, mode="sum", optimizer=dlrm_rs.optim.SGD(lr=0.5)))
    tables, before = bags._tables, bags.weight.detach().clone()
    rows = [part for parts in tables.memory.parts for part in parts]
    arguments = (tables.key, tables.layout, torch.tensor([1, 3]), torch.tensor([0]), 1, None, None, torch.ones(1, 2))
    torch.ops.dlrm_rs.update(rows, [], *arguments, [True], [False])
    assert torch.equal(bags.weight, before - torch.tensor([[0.0], [0.5], [0.0], [0.5]]))
    with pytest.raises(RuntimeError, match=r"update: cannot change copies of the rows, .* take Inductor"):
        torch.ops.dlrm_rs.update([part.clone() for part in rows], [], *arguments, [True], [False])


def test_memory_of_another_process_is_told_by_its_token() -> None:
    shapes = [((2, 3), "float32"), ((0, 5), "int16"), ((70_000,), "uint8")]
    memory, place = SharedMemory.create(shapes)
    memory.reserve(2)
    other = SharedMemory.open(shapes, place)
    memory.arrays[2][-1] = 9
    assert other.arrays[2][-1] == 9
    assert [array.shape for array in other.arrays] == [(2, 3), (0, 5), (70_000,)]
    with pytest.raises(OSError, match=r"got another's"):
        SharedMemory.open(shapes, place._replace(token=b"0" * 16))
    del memory
    with pytest.raises(OSError, match=r"No such file|got another's"):
        SharedMemory.open(shapes, place)
    other.arrays[0][0, 0] = 1.0  # it stays as long as an array is there
