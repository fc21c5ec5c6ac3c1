"""`load_dlrm_checkpoint`: files as facebookresearch/dlrm and TorchRec save them, and files that are refused."""

import io
import os
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import dlrm_rs
from dlrm_rs import (
    DLRM,
    EmbeddingBagConfig,
    KeyedJaggedTensor,
    PrEmbeddingBag,
    QREmbeddingBag,
    WeightedEmbeddingBag,
    load_dlrm_checkpoint,
)
from dlrm_rs.owner import OwnsTables
from reference_dlrm import Batch, ReferenceDLRM, batches, train

SIZES, BOTTOM, TOP = [90, 7, 40], [5, 8, 6], [9, 1]


class ReferenceQR(nn.Module):
    """The original's parts of a table by the quotient-remainder trick."""

    def __init__(self, rows: int, dim: int, operation: str) -> None:
        super().__init__()
        self.operation = operation
        self.weight_q = nn.Parameter(torch.rand(-(-rows // 4), dim))
        self.weight_r = nn.Parameter(torch.rand(4, dim))

    def forward(self, ids: Tensor, offsets: Tensor, per_sample_weights: None = None) -> Tensor:
        parts = ((ids // 4, self.weight_q), (ids % 4, self.weight_r))
        q, r = (nn.functional.embedding_bag(part, rows, offsets, mode="sum") for part, rows in parts)
        if self.operation == "concat":
            return torch.cat([q, r], dim=1)
        return q * r if self.operation == "mult" else q + r


class ReferencePr(nn.Module):
    """The original's parts of a table of another dim than the others."""

    def __init__(self, rows: int, dim: int, base: int) -> None:
        super().__init__()
        self.embs = nn.EmbeddingBag(rows, dim, mode="sum")
        self.proj = nn.Linear(dim, base, bias=False) if dim < base else nn.Identity()

    def forward(self, ids: Tensor, offsets: Tensor, per_sample_weights: None = None) -> Tensor:
        out: Tensor = self.proj(self.embs(ids, offsets))
        return out


def jagged(batch: Batch, keys: tuple[str, ...] = ("cat_0", "cat_1", "cat_2")) -> KeyedJaggedTensor:
    ends = [
        torch.cat([offsets, torch.tensor([len(ids)])]) for offsets, ids in zip(batch.offsets, batch.ids, strict=True)
    ]
    return KeyedJaggedTensor.from_lengths_sync(keys, torch.cat(batch.ids), torch.cat([end.diff() for end in ends]))


def saved(model: nn.Module, path: Path, **entries: Any) -> Path:
    """As the script saves, NumPy's numbers among the entries."""
    loop = {"epoch": 1, "iter": 30, "nepochs": 2, "test_acc": np.float64(0.75), "train_loss": np.float32(0.5)}
    torch.save({"state_dict": model.state_dict(), **loop, **entries}, path)
    return path


def assert_same(reference: nn.Module, model: DLRM) -> None:
    for batch in batches(SIZES, BOTTOM[0], 16, 3):
        assert_close(model(batch.dense, jagged(batch)).sigmoid(), reference(batch))


PLAIN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dot": ({}, {}),
    "dot with itself": ({"itself": True}, {}),
    "cat": ({"interaction": "cat"}, {"interaction": "cat"}),
}


@pytest.mark.parametrize("case", PLAIN)
def test_plain_tables(case: str, tmp_path: Path) -> None:
    shape, said = PLAIN[case]
    reference = ReferenceDLRM(SIZES, BOTTOM, TOP, **shape)
    model, entries = load_dlrm_checkpoint(saved(reference, tmp_path / "dlrm.pt", test_auc=np.float64(0.8)), **said)
    assert_same(reference, model)
    assert isinstance(model.embeddings, dlrm_rs.EmbeddingBagCollection)
    assert entries == {"epoch": 1, "iter": 30, "nepochs": 2, "test_acc": 0.75, "train_loss": 0.5, "test_auc": 0.8}
    assert type(entries["test_acc"]) is type(entries["train_loss"]) is float


def bags(kind: str, k: int) -> nn.Module:
    if kind == "md":
        return ReferencePr(SIZES[k], [2, 6, 4][k], 6)
    if k == 1:  # below --qr-threshold
        return nn.EmbeddingBag(SIZES[k], 6, mode="sum")
    return ReferenceQR(SIZES[k], 3 if kind == "concat" else 6, kind)


@pytest.mark.parametrize("kind", ["mult", "add", "concat", "md", "learned"])
def test_tricks(kind: str, tmp_path: Path) -> None:
    embedding = None if kind == "learned" else lambda k: bags(kind, k)
    reference = ReferenceDLRM(SIZES, BOTTOM, TOP, embedding=embedding, learned=kind == "learned")
    for factors in reference.v_W_l or []:
        nn.init.uniform_(factors, 0.5, 2)
    operation = kind if kind in ("mult", "add") else None
    model, _ = load_dlrm_checkpoint(saved(reference, tmp_path / "dlrm.pt"), qr_operation=operation)
    embeddings: Any = model.embeddings
    trick = {"md": PrEmbeddingBag, "learned": WeightedEmbeddingBag}.get(kind, QREmbeddingBag)
    assert type(embeddings.bags[2]) is trick
    assert_same(reference, model)


@pytest.mark.parametrize("kind", ["plain", "mult", "md", "learned"])
def test_tables_of_half_precision_stay_so(kind: str, tmp_path: Path) -> None:
    embedding = None if kind in ("plain", "learned") else lambda k: bags(kind, k)
    reference = ReferenceDLRM(SIZES, BOTTOM, TOP, embedding=embedding, learned=kind == "learned")
    rows = {name: part.half().float() for name, part in reference.emb_l.state_dict().items()}
    reference.emb_l.load_state_dict(rows)
    path = saved(reference, tmp_path / "dlrm.pt")
    file = torch.load(path, weights_only=False)
    for name, part in file["state_dict"].items():
        if name.startswith("emb_l.") and "proj" not in name:
            file["state_dict"][name] = part.half()
    torch.save(file, path)
    model, _ = load_dlrm_checkpoint(path, qr_operation="mult" if kind == "mult" else None)
    tables = [module for module in model.modules() if isinstance(module, OwnsTables)]
    factors = [module.factors for module in model.modules() if isinstance(module, WeightedEmbeddingBag)]
    formats = [name for table in tables for name in table.row_formats().values() if table not in factors]
    assert set(formats) == {"fp16"}
    for batch in batches(SIZES, BOTTOM[0], 16, 3):
        expected = reference(batch)
        assert_close(model(batch.dense, jagged(batch)).sigmoid(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["plain", "add"])
def test_training_goes_on(kind: str, tmp_path: Path) -> None:
    reference = ReferenceDLRM(SIZES, BOTTOM, TOP, embedding=None if kind == "plain" else lambda k: bags(kind, k))
    theirs = torch.optim.Adagrad(reference.parameters(), lr=0.01)
    train(reference, batches(SIZES, BOTTOM[0], 16, 3), theirs, nn.MSELoss())
    path = saved(reference, tmp_path / "dlrm.pt", opt_state_dict=theirs.state_dict())
    model, entries = load_dlrm_checkpoint(path, qr_operation=None if kind == "plain" else kind)
    path.write_bytes(b"")  # nothing that was loaded may be left in the file
    ours = torch.optim.Adagrad(model.parameters(), lr=0.01)
    ours.load_state_dict(entries["opt_state_dict"])
    loss = dlrm_rs.DLRMLoss("mse")
    data = list(batches(SIZES, BOTTOM[0], 16, 3))
    for batch in data:
        ours.zero_grad()
        loss(model(batch.dense, jagged(batch)), batch.targets).backward()
        ours.step()
    train(reference, iter(data), theirs, nn.MSELoss())
    assert_same(reference, model)


def test_row_formats_optimizers_and_names(tmp_path: Path) -> None:
    reference = ReferenceDLRM(SIZES, BOTTOM, TOP)
    path = saved(reference, tmp_path / "dlrm.pt")
    small: Any = load_dlrm_checkpoint(path, dtype="int8").model
    assert small.embeddings.row_formats() == {"cat_0": "int8", "cat_1": "int8", "cat_2": "int8"}
    fused: Any = load_dlrm_checkpoint(path, optimizer=dlrm_rs.optim.SGD(lr=0.1)).model
    assert fused.embeddings.fused_optimizer is not None
    keys = ("user", "ad", "site")
    tables = [EmbeddingBagConfig(f"t_{key}", rows, 6, [key]) for key, rows in zip(keys, SIZES, strict=True)]
    model = load_dlrm_checkpoint(path, tables=tables).model
    batch = next(batches(SIZES, BOTTOM[0], 16, 1))
    assert_close(model(batch.dense, jagged(batch, keys)).sigmoid(), reference(batch))
    assert "embeddings.embedding_bags.t_ad.weight" in model.state_dict()
    before = model.state_dict()["embeddings.embedding_bags.t_ad.weight"].clone()
    embeddings: Any = model.embeddings
    embeddings.reset_parameters()  # from U, and not what was loaded
    assert not torch.equal(model.state_dict()["embeddings.embedding_bags.t_ad.weight"], before)


def test_files_of_every_kind(tmp_path: Path) -> None:
    reference = ReferenceDLRM(SIZES, BOTTOM, TOP)
    state = reference.state_dict()
    wrapped = {key.replace("bot_l.", "bot_l.module."): tensor for key, tensor in state.items()}
    legacy, bare, data_parallel = (tmp_path / name for name in ("legacy.pt", "bare.pt", "data_parallel.pt"))
    torch.save({"state_dict": wrapped, "iter": np.int64(7)}, legacy, _use_new_zipfile_serialization=False)
    torch.save(state, bare)
    torch.save({"model_state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}, data_parallel)
    buffer = io.BytesIO(bare.read_bytes())
    files: list[Any] = [legacy, str(bare), data_parallel, buffer]
    for file in files:
        model, entries = load_dlrm_checkpoint(file)
        assert_same(reference, model)
        assert entries == ({"iter": 7} if file is legacy else {})


def rewritten(path: Path, old: bytes, new: bytes) -> Path:
    """The same file with other bytes in its pickle."""
    other = path.with_suffix(".rewritten.pt")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            assert not name.endswith("data.pkl") or old in content
            target.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)
    return other


def test_numpys_numbers_of_every_kind_and_version(tmp_path: Path) -> None:
    numbers = [
        np.bool_(True),
        np.int8(-3),
        np.uint16(9),
        np.int64(2**40),
        np.float16(0.5),
        np.float32(1.5),
        np.float64(2),
    ]
    swapped = np.array([1, 258], np.dtype(">i4"))[1]
    path = saved(ReferenceDLRM(SIZES, BOTTOM, TOP), tmp_path / "dlrm.pt", numbers=[*numbers, swapped])
    expected = [True, -3, 9, 2**40, 0.5, 1.5, 2.0, 258]
    assert load_dlrm_checkpoint(path).entries["numbers"] == expected
    ours, other = b"numpy._core.multiarray", b"numpy.core.multiarray"
    if np.lib.NumpyVersion(np.__version__) < "2.0.0":
        ours, other = other, ours
    assert load_dlrm_checkpoint(rewritten(path, ours, other)).entries["numbers"] == expected


class Payload:
    """Would run code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "entry",
    [Payload, lambda path: np.array([1.0]), lambda path: np.array(["a"])[0], lambda path: np.datetime64(1, "s")],
)
def test_what_could_run_code_is_refused_and_not_run(entry: Callable[[Path], Any], tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    path = saved(ReferenceDLRM(SIZES, BOTTOM, TOP), tmp_path / "dlrm.pt", entry=entry(ran))
    with pytest.raises(ValueError, match=r"path: expected tensors, numbers, .*dlrm\.pt; if you trust it, read it by"):
        load_dlrm_checkpoint(path)
    assert not ran.exists()


def test_numpys_numbers_of_a_wrong_size_are_refused(tmp_path: Path) -> None:
    path = saved(ReferenceDLRM(SIZES, BOTTOM, TOP), tmp_path / "dlrm.pt", number=np.int16(3))
    with pytest.raises(ValueError, match="path: expected tensors, numbers"):
        load_dlrm_checkpoint(rewritten(path, b"i2", b"i8"))


def state(**changes: Tensor | None) -> dict[str, Tensor]:
    """That of a model with some keys changed or, for None, taken away."""
    found = dict(ReferenceDLRM([9, 8, 7], [5, 4], [3, 1]).state_dict().items())
    for key, tensor in changes.items():
        found.pop(key.replace("__", "."))
        if tensor is not None:
            found[key.replace("__", ".")] = tensor
    return found


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ([1], {}, "expected a dictionary .* got list"),
        ({"state_dict": {}}, {}, "expected a state_dict, names and tensors"),
        (
            {"a": torch.ones(1)},
            {},
            r"expected keys of facebookresearch/dlrm .* got \['a'\]; a state_dict of dlrm_rs.DLRM",
        ),
        ({**state(), "emb_l.3.rows": torch.ones(1)}, {}, "expected keys of facebookresearch/dlrm, got 'emb_l.3.rows'"),
        (state(emb_l__0__weight=None), {}, r"expected tables emb_l.0 to emb_l.1, got \[1, 2\]"),
        (
            state(emb_l__1__weight=None, emb_l__2__weight=None),
            {},
            "of a run of several processes",
        ),
        (state(emb_l__1__weight=torch.ones(8)), {}, r"expected rows \(N, D\) of floats for cat_1, got \(8,\)"),
        (state(bot_l__0__bias=None), {}, "a weight and a bias of every layer of bot_l"),
        (state(bot_l__0__bias=torch.ones(1)), {}, "expected layers of bot_l that take what the one before gives"),
        (state(top_l__2__weight=torch.ones(1, 9)), {}, "expected layers of top_l that take what the one before gives"),
        (state(), {"interaction": "cat"}, "expected a top MLP for 3 tables"),
        (
            state(),
            {"tables": [EmbeddingBagConfig("t", 9, 4, ["f"])]},
            r"tables: expected those of the file, .* got \[",
        ),
    ],
)
def test_other_files_are_refused_in_words(content: Any, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "dlrm.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=words):
        load_dlrm_checkpoint(path, **options)


def test_what_a_file_leaves_open_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "dlrm.pt"
    torch.save(ReferenceDLRM([4, 3, 2], [4, 3, 2], [4, 2, 1]).state_dict(), path)  # the script's defaults: 8 columns
    with pytest.raises(ValueError, match=r"interaction, .*\('dot', False\), \('cat', False\).* --arch-interaction-op"):
        load_dlrm_checkpoint(path)
    assert load_dlrm_checkpoint(path, interaction="cat").model.interaction == "cat"
    reference = ReferenceDLRM(SIZES, BOTTOM, TOP, embedding=lambda k: bags("mult", k))
    with pytest.raises(ValueError, match=r"qr_operation: expected 'mult', 'add' or .* --qr-operation .* got None"):
        load_dlrm_checkpoint(saved(reference, path))
    tables = [EmbeddingBagConfig(f"t{k}", rows, 6, [f"f{k}"], "mean") for k, rows in enumerate(SIZES)]
    with pytest.raises(ValueError, match="tables: expected 3 tables of one feature and pooling 'sum' each"):
        load_dlrm_checkpoint(path, tables=tables, qr_operation="mult")
    with pytest.raises(FileNotFoundError):
        load_dlrm_checkpoint(tmp_path / "none.pt")


class TorchRecDLRM(nn.Module):
    """What TorchRec's DLRM computes, with its keys: pairs from the upper triangle."""

    def __init__(self, tables: list[EmbeddingBagConfig], dense: int, bottom: list[int], over: list[int]) -> None:
        super().__init__()
        self.tables = tables

        def perceptrons(widths: list[int]) -> nn.Module:
            layers = [nn.ModuleDict({"_linear": nn.Linear(*pair)}) for pair in pairwise(widths)]
            return nn.ModuleDict({"_mlp": nn.ModuleList(layers)})

        F = sum(len(table.feature_names) for table in tables)
        rows = {table.name: nn.EmbeddingBag(table.num_embeddings, table.embedding_dim) for table in tables}
        bags = nn.ModuleDict({"embedding_bags": nn.ModuleDict(rows)})
        self.sparse_arch = nn.ModuleDict({"embedding_bag_collection": bags})
        self.dense_arch = nn.ModuleDict({"model": perceptrons([dense, *bottom])})
        hidden = perceptrons([bottom[-1] + F * (F + 1) // 2, *over[:-1]])
        self.over_arch = nn.ModuleDict({"model": nn.ModuleList([hidden, nn.Linear(over[-2], over[-1])])})

    def forward(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        state = self.state_dict()

        def mlp(x: Tensor, prefix: str) -> Tensor:
            for layer in range(2):
                weight, bias = (state[f"{prefix}._mlp.{layer}._linear.{part}"] for part in ("weight", "bias"))
                x = nn.functional.linear(x, weight, bias).relu()
            return x

        x = mlp(dense, "dense_arch.model")
        X = [x]
        for table in self.tables:
            weight = state[f"sparse_arch.embedding_bag_collection.embedding_bags.{table.name}.weight"]
            for name in table.feature_names:
                part = features[name]
                offsets = part.offsets()[:-1]
                X.append(nn.functional.embedding_bag(part.values(), weight, offsets, mode=table.pooling))
        pairs = [(X[i] * X[j]).sum(1, keepdim=True) for i in range(len(X)) for j in range(i + 1, len(X))]
        hidden = mlp(torch.cat([x, *pairs], dim=1), "over_arch.model.0")
        return nn.functional.linear(hidden, state["over_arch.model.1.weight"], state["over_arch.model.1.bias"])


@pytest.mark.parametrize("prefix", ["", "model."])
def test_torchrecs(prefix: str, tmp_path: Path) -> None:
    tables = [
        EmbeddingBagConfig("t_a", 90, 6, ["cat_0"]),
        EmbeddingBagConfig("t_b", 90, 6, ["cat_2", "cat_1"], pooling="mean"),
    ]
    theirs = TorchRecDLRM(tables, 5, [8, 6], [9, 4, 1])
    path = tmp_path / "torchrec.pt"
    torch.save({f"{prefix}{key}": tensor for key, tensor in theirs.state_dict().items()}, path)
    model, entries = load_dlrm_checkpoint(path, tables=tables)
    assert entries == {}
    batch = next(batches([90, 90, 90], 5, 16, 1))
    assert_close(model(batch.dense, jagged(batch)), theirs(batch.dense, jagged(batch)))
    with pytest.raises(ValueError, match=r"over_arch of 9 columns, for 2 .* got 12; tell by tables=\[\.\.\.\]"):
        load_dlrm_checkpoint(path)
    with pytest.raises(ValueError, match=r"interaction, .*: expected None of the three"):
        load_dlrm_checkpoint(path, tables=tables, interaction="cat")
    cross = {**theirs.state_dict(), "inter_arch.crossnet.bias.0": torch.ones(1)}
    torch.save(cross, path)
    with pytest.raises(ValueError, match=r"got 'inter_arch.crossnet.bias.0'; of DLRM_DCN .*replace_embeddings"):
        load_dlrm_checkpoint(path, tables=tables)
