"""TorchRec's collections and models, replaced: their results, their containers, their checkpoints."""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import dlrm_rs
from batches import batch

with warnings.catch_warnings():  # of TorchRec's own imports
    warnings.simplefilter("ignore")
    torchrec: Any = pytest.importorskip("torchrec", reason="TorchRec is not installed: `make test-torchrec` runs this")
    models: Any = pytest.importorskip("torchrec.models.dlrm")

KeyedJaggedTensor: Any = torchrec.KeyedJaggedTensor
SUM, MEAN = torchrec.PoolingType.SUM, torchrec.PoolingType.MEAN
BATCH = 5
ROWS = {"f1": 10, "f2": 7, "f3": 7, "f4": 12, "unused": 3}


def config(name: str, rows: int, dim: int, features: list[str], pooling: Any = SUM, **options: Any) -> Any:
    return torchrec.EmbeddingBagConfig(
        name=name, num_embeddings=rows, embedding_dim=dim, feature_names=features, pooling=pooling, **options
    )


def interleaved() -> list[Any]:
    """Sum and mean in turn, dims that differ, a table of two features, and a feature of two tables."""
    return [
        config("t1", 10, 3, ["f1"]),
        config("t2", 7, 16, ["f3", "f2"], MEAN),
        config("t3", 12, 33, ["f4"]),
        config("t4", 10, 1, ["f1"], MEAN),
        config("t5", 7, 8, ["f2"]),
    ]


def features(keys: Sequence[str] = tuple(ROWS), dtype: torch.dtype = torch.int64, *, weighted: bool = False) -> Any:
    parts = [batch(ROWS[key], BATCH, dtype) for key in keys]
    return KeyedJaggedTensor.from_lengths_sync(
        list(keys),
        torch.cat([part.indices for part in parts]),
        torch.cat([part.offsets.diff() for part in parts]),
        torch.cat([part.weights for part in parts]) if weighted else None,
    )


def pair(tables: Sequence[Any], **options: Any) -> tuple[nn.Module, nn.Module]:
    """A collection of theirs, and the same replaced."""
    theirs = torchrec.EmbeddingBagCollection(tables=list(tables), **options)
    ours = copy.deepcopy(theirs)
    assert dlrm_rs.replace_embeddings(ours) is ours
    assert type(ours) is dlrm_rs.EmbeddingBagCollection
    return theirs, ours


def assert_same(theirs: nn.Module, ours: nn.Module, jagged: Any) -> None:
    """The KeyedTensor, and the gradient of every table."""
    expected, got = theirs(jagged), ours(jagged)
    assert type(got) is torchrec.KeyedTensor
    assert (got.keys(), got.length_per_key()) == (expected.keys(), expected.length_per_key())
    assert_close(got.values(), expected.values())
    for key in expected.keys():  # noqa: SIM118 - not a dict
        assert_close(got[key], expected[key])
    grad = torch.randn_like(expected.values())
    wanted = torch.autograd.grad(expected.values(), list(theirs.parameters()), grad)
    assert_close(torch.autograd.grad(got.values(), list(ours.parameters()), grad), wanted)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("keys", [("f1", "f3", "f2", "f4"), ("f4", "f3", "unused", "f2", "f1")])
def test_interleaved_poolings_and_shared_features(keys: Sequence[str], dtype: torch.dtype) -> None:
    theirs, ours = pair(interleaved())
    for _ in range(3):
        assert_same(theirs, ours, features(keys, dtype))


def test_in_the_order_of_the_tables() -> None:
    theirs, ours = pair(interleaved()[:3])
    assert_same(theirs, ours, features(["f1", "f3", "f2", "f4"]))


def test_weighted() -> None:
    tables = [config("t1", 10, 3, ["f1"]), config("t2", 7, 16, ["f3", "f2"])]
    theirs, ours = pair(tables, is_weighted=True)
    jagged = features(weighted=True)
    assert_same(theirs, ours, jagged)
    gradients = []
    for module in (theirs, ours):
        weights = jagged.weights().clone().requires_grad_()
        weighted = KeyedJaggedTensor(jagged.keys(), jagged.values(), weights, lengths=jagged.lengths())
        gradients.append(torch.autograd.grad(module(weighted).values().square().sum(), weights))
    assert_close(gradients[1], gradients[0])


def varying(weighted: bool = False) -> Any:
    """A variable batch per key, with keys in an order that is not the tables'."""
    strides = {"f4": [3, 1], "f2": [2, 0], "f1": [4, 1], "f3": [1, 2]}
    parts = [batch(ROWS[key], sum(ranks)) for key, ranks in strides.items()]
    inverse = torch.stack([torch.randint(0, sum(ranks), (11,)) for ranks in strides.values()])
    return KeyedJaggedTensor(
        list(strides),
        torch.cat([part.indices for part in parts]),
        torch.cat([part.weights for part in parts]) if weighted else None,
        lengths=torch.cat([part.offsets.diff() for part in parts]),
        stride_per_key_per_rank=list(strides.values()),
        inverse_indices=(list(strides), inverse),
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_variable_batch_per_key(weighted: bool) -> None:
    tables = interleaved() if not weighted else [table for table in interleaved() if table.pooling is SUM]
    theirs, ours = pair(tables, is_weighted=weighted)
    assert_same(theirs, ours, varying(weighted))


def test_half_precision_tables_give_float32() -> None:
    tables = [config("t1", 10, 16, ["f1"], data_type=torchrec.modules.embedding_configs.DataType.FP16)]
    theirs, ours = pair(tables)
    assert ours.row_formats() == {"t1": "fp16"}  # type: ignore[operator]
    jagged = KeyedJaggedTensor.from_lengths_sync(["f1"], torch.tensor([3, 4, 9]), torch.tensor([1, 1, 1]))
    got, expected = ours(jagged).values(), theirs(jagged).values()
    assert got.dtype is expected.dtype is torch.float32
    assert torch.equal(got, expected)


def test_checkpoints_go_both_ways() -> None:
    theirs, ours = pair(interleaved())
    other_theirs, other_ours = pair(interleaved())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert other_ours.load_state_dict(theirs.state_dict()).missing_keys == []
    assert other_theirs.load_state_dict(ours.state_dict()).missing_keys == []
    jagged = features()
    assert_close(other_ours(jagged).values(), theirs(jagged).values())
    assert_close(other_theirs(jagged).values(), ours(jagged).values())


def test_what_a_collection_tells_stays() -> None:
    theirs: Any = torchrec.EmbeddingBagCollection(tables=interleaved(), is_weighted=True)
    configs = theirs.embedding_bag_configs()
    weights = dict(theirs.named_parameters())
    dlrm_rs.replace_embeddings(theirs)
    assert all(mine is was for mine, was in zip(theirs.embedding_bag_configs(), configs, strict=True))
    assert all(mine is weights[name] for name, mine in theirs.named_parameters())
    assert theirs.is_weighted()
    assert theirs.device == torch.device("cpu")
    theirs.reset_parameters()  # by their init_fn
    assert theirs.embedding_bags["t3"].weight.abs().max() <= 12**-0.5


def dense_and_sparse(keys: Sequence[str]) -> tuple[Tensor, Any]:
    return torch.randn(BATCH, 6), features(keys)


def dlrm(kind: str) -> nn.Module:
    tables = [config("t1", 10, 8, ["f1"]), config("t2", 7, 8, ["f3", "f2"], MEAN), config("t3", 12, 8, ["f4"])]
    options: dict[str, Any] = {"dcn_num_layers": 2, "dcn_low_rank_dim": 4} if kind == "DLRM_DCN" else {}
    model: nn.Module = getattr(models, kind)(
        embedding_bag_collection=torchrec.EmbeddingBagCollection(tables=tables),
        dense_in_features=6,
        dense_arch_layer_sizes=[16, 8],
        over_arch_layer_sizes=[16, 1],
        **options,
    )
    return model


@pytest.mark.parametrize("kind", ["DLRM", "DLRM_DCN"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_dlrm_trains_as_before(kind: str, fused: bool) -> None:
    theirs = dlrm(kind)
    ours = copy.deepcopy(theirs)
    optimizer = dlrm_rs.optim.SGD(lr=0.1) if fused else None
    dlrm_rs.replace_embeddings(ours, optimizer=optimizer)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    steps = [dense_and_sparse(["f1", "f3", "f2", "f4"]) for _ in range(5)]
    losses: list[list[float]] = []
    for model in (theirs, ours):
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for dense, sparse in steps:
            sgd.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(model(dense, sparse)[:, 0], torch.ones(BATCH))
            loss.backward()
            sgd.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_close(ours.state_dict(), theirs.state_dict())


def test_quantized_on_the_way() -> None:
    model = dlrm("DLRM")
    dense, sparse = dense_and_sparse(["f1", "f3", "f2", "f4"])
    before = model(dense, sparse)
    dlrm_rs.replace_embeddings(model, dtype="int8")
    assert (model(dense, sparse) - before).abs().max() < 0.02


@pytest.mark.parametrize("need_indices", [False, True])
def test_embedding_collection(need_indices: bool) -> None:
    tables = [
        torchrec.EmbeddingConfig(name="t1", num_embeddings=10, embedding_dim=9, feature_names=["f1"]),
        torchrec.EmbeddingConfig(name="t2", num_embeddings=7, embedding_dim=9, feature_names=["f3", "f2"]),
        torchrec.EmbeddingConfig(name="t3", num_embeddings=12, embedding_dim=9, feature_names=["f4", "f1"]),
    ]
    theirs = torchrec.EmbeddingCollection(tables=tables, need_indices=need_indices)
    ours = dlrm_rs.replace_embeddings(copy.deepcopy(theirs))
    assert type(ours) is dlrm_rs.EmbeddingCollection
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.embedding_names_by_table() == theirs.embedding_names_by_table()
    for jagged in (features(), features(["f1", "f3", "f2", "f4"])):
        expected, got = theirs(jagged), ours(jagged)
        assert list(got) == list(expected)
        for name, rows in expected.items():
            assert type(got[name]) is torchrec.JaggedTensor
            assert torch.equal(got[name].values(), rows.values())
            assert torch.equal(got[name].lengths(), rows.lengths())
            assert torch.equal(got[name].offsets(), rows.offsets())
            weights, wanted = got[name].weights_or_none(), rows.weights_or_none()
            assert (weights is None) is (wanted is None)
            assert weights is None or torch.equal(weights, wanted)
        total = [torch.stack([rows.values().square().sum() for rows in out.values()]).sum() for out in (expected, got)]
        gradients = [
            torch.autograd.grad(loss, list(module.parameters()))
            for loss, module in zip(total, (theirs, ours), strict=True)
        ]
        assert_close(gradients[1], gradients[0])


def test_their_containers_in_a_collection_of_ours() -> None:
    theirs = torchrec.EmbeddingBagCollection(tables=interleaved())
    ours = dlrm_rs.EmbeddingBagCollection(interleaved())  # their configs, too
    ours.load_state_dict(theirs.state_dict())
    assert_same(theirs, ours, features())


def test_a_tensor_dict_is_refused_in_words() -> None:
    tensordict: Any = pytest.importorskip("tensordict")
    _, ours = pair(interleaved())
    with pytest.raises(TypeError, match=r"got TensorDict.*maybe_td_to_kjt"):
        ours(tensordict.TensorDict({}, batch_size=[]))


def test_collections_that_are_built_already_are_refused() -> None:
    fused: Any = pytest.importorskip("torchrec.modules.fused_embedding_modules")
    model = nn.Sequential(
        fused.FusedEmbeddingBagCollection(
            tables=[config("t1", 10, 4, ["f1"])], optimizer_type=torch.optim.SGD, optimizer_kwargs={"lr": 0.1}
        )
    )
    with pytest.raises(TypeError, match="FusedEmbeddingBagCollection at '0'; replace the embeddings before"):
        dlrm_rs.replace_embeddings(model)


def test_a_dlrm_checkpoint_loads_as_our_model(tmp_path: Path) -> None:
    theirs = models.DLRMTrain(dlrm("DLRM"))
    torch.save(theirs.state_dict(), tmp_path / "dlrm.pt")
    tables = theirs.model.sparse_arch.embedding_bag_collection.embedding_bag_configs()
    ours, _ = dlrm_rs.load_dlrm_checkpoint(tmp_path / "dlrm.pt", tables=tables)
    for keys in (["f1", "f3", "f2", "f4"], ["f4", "f1", "f2", "f3"]):
        dense, sparse = dense_and_sparse(keys)
        assert_close(ours(dense, sparse), theirs.model(dense, sparse))
