"""DLRM against its paper written out as loops in float64."""

import pytest
import torch
from torch import Tensor, nn

from dlrm_rs import DLRM, EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from dlrm_rs.demo.torch_bags import TorchEmbeddingBags


def tables(*dims: int) -> list[EmbeddingBagConfig]:
    return [EmbeddingBagConfig(f"t{t}", 5 + t, dim, [f"f{t}"]) for t, dim in enumerate(dims)]


def features(F: int, B: int) -> KeyedJaggedTensor:
    lengths = torch.randint(0, 4, (F * B,))
    values = torch.randint(0, 5, (int(lengths.sum()),))
    return KeyedJaggedTensor.from_lengths_sync([f"f{f}" for f in range(F)], values, lengths)


def mlp(x: list[float], layers: nn.Sequential) -> list[float]:
    for layer in layers:
        if isinstance(layer, nn.Linear):
            weight, bias = layer.weight.tolist(), layer.bias.tolist()
            x = [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        else:
            x = [max(v, 0.0) for v in x]
    return x


def reference(model: DLRM, dense: Tensor, sparse: KeyedJaggedTensor) -> list[list[float]]:
    """The model sample by sample, in Python's float64."""
    bags = sparse.to_dict()
    weights = model.embeddings.state_dict()
    logits = []
    for b, row in enumerate(dense.tolist()):
        x = mlp(row, model.bottom)
        pooled = []
        for f, key in enumerate(sparse.keys()):
            rows = weights[f"embedding_bags.t{f}.weight"].tolist()
            ids = bags[key].to_dense()[b].tolist()
            pooled.append([sum(rows[i][d] for i in ids) for d in range(len(rows[0]))])
        if model.interaction == "dot":
            X = [x, *pooled]
            pairs = [(i, j) for i in range(len(X)) for j in range(i + model.interaction_itself)]
            extra = [sum(p * q for p, q in zip(X[i], X[j], strict=True)) for i, j in pairs]
        else:
            extra = [v for vector in pooled for v in vector]
        logits.append(mlp([*x, *extra], model.top))
    return logits


@pytest.mark.parametrize(
    ("interaction", "dims", "itself"),
    [
        ("dot", (4, 4, 4), False),
        ("dot", (4, 4, 4), True),
        ("dot", (4,), False),
        ("dot", (4,), True),
        ("cat", (4, 4, 4), False),
        ("cat", (2, 7, 1), False),
    ],
)
def test_against_loops(interaction: str, dims: tuple[int, ...], itself: bool) -> None:
    model = DLRM(EmbeddingBagCollection(tables(*dims)), 3, [6, 4], [5, 1], interaction, itself)
    dense, sparse = torch.randn(7, 3), features(len(dims), 7)
    logits = model(dense, sparse)
    assert logits.shape == (7, 1)
    # Float32 against float64: what rounding leaves depends on the order in which a machine's BLAS adds up.
    expected = torch.tensor(reference(model, dense, sparse), dtype=torch.float32)
    torch.testing.assert_close(logits, expected)


def test_the_pairs_come_row_by_row_from_the_lower_triangle() -> None:
    model = DLRM(EmbeddingBagCollection(tables(2, 2)), 2, [2], [1])
    model.bottom = nn.Sequential()  # x is then the dense features
    model.top = nn.Sequential()  # and the logits are what interacts
    x, a, b = torch.tensor([[1.0, 10.0]]), torch.tensor([[2.0, 3.0]]), torch.tensor([[5.0, 7.0]])
    out = model.score(x, torch.cat([a, b], dim=1))
    # x, then a.x, then b.x and b.a
    assert out.tolist() == [[1, 10, 2 + 30, 5 + 70, 10 + 21]]


def test_with_torchs_tables_and_with_ours_it_is_the_same_model() -> None:
    theirs = DLRM(TorchEmbeddingBags(tables(4, 4)), 3, [4], [1])
    ours = DLRM(EmbeddingBagCollection(tables(4, 4)), 3, [4], [1])
    ours.load_state_dict(theirs.state_dict())
    dense, sparse = torch.randn(6, 3), features(2, 6)
    torch.testing.assert_close(ours(dense, sparse), theirs(dense, sparse))


def test_it_learns() -> None:
    model = DLRM(EmbeddingBagCollection(tables(4, 4)), 3, [8, 4], [8, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    dense, sparse, labels = torch.randn(32, 3), features(2, 32), torch.randint(0, 2, (32, 1)).float()
    losses = []
    for _ in range(150):
        loss = nn.functional.binary_cross_entropy_with_logits(model(dense, sparse), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_mlps_start_as_the_reference_implementations() -> None:
    model = DLRM(EmbeddingBagCollection(tables(64)), 300, [400, 64], [1])
    linear = model.bottom[0]
    assert isinstance(linear, nn.Linear)
    assert linear.weight.std().item() == pytest.approx((2 / (300 + 400)) ** 0.5, rel=0.02)
    assert linear.bias.std().item() == pytest.approx((1 / 400) ** 0.5, rel=0.15)
    assert [type(layer) for layer in model.bottom] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU]
    assert [type(layer) for layer in model.top] == [nn.Linear]


def test_the_pairs_are_no_part_of_a_checkpoint() -> None:
    names = list(DLRM(EmbeddingBagCollection(tables(4)), 3, [4], [1]).state_dict())
    assert names == [
        "embeddings.embedding_bags.t0.weight", "bottom.0.weight", "bottom.0.bias", "top.0.weight", "top.0.bias",
    ]  # fmt: skip


def test_bad_sizes() -> None:
    embeddings = EmbeddingBagCollection(tables(4, 8))
    with pytest.raises(ValueError, match=r"bottom_mlp: expected the last width .* got 4 and embedding dims \[4, 8\]"):
        DLRM(embeddings, 3, [4], [1])
    with pytest.raises(ValueError, match=r"interaction: expected one of .* got 'mul'"):
        DLRM(embeddings, 3, [4], [1], "mul")
    with pytest.raises(ValueError, match="interaction_itself: expected False with 'cat', which multiplies nothing"):
        DLRM(embeddings, 3, [4], [1], "cat", interaction_itself=True)
    with pytest.raises(ValueError, match=r"top_mlp: expected widths of at least 1, got \[\]"):
        DLRM(embeddings, 3, [4], [], "cat")
    with pytest.raises(ValueError, match=r"dense_in_features: expected widths of at least 1, got \[0\]"):
        DLRM(embeddings, 0, [4], [1], "cat")
    with pytest.raises(TypeError, match=r"expected a module with embedding_bag_configs.*, got Linear"):
        DLRM(nn.Linear(1, 1), 3, [4], [1])


def test_bad_batches() -> None:
    model = DLRM(EmbeddingBagCollection(tables(4, 4)), 3, [4], [1])
    with pytest.raises(ValueError, match=r"dense_features: expected shape \(B, 3\), got \(5, 2\)"):
        model(torch.randn(5, 2), features(2, 5))
    with pytest.raises(ValueError, match="dense_features: expected as many samples as sparse_features, 5, got 6"):
        model(torch.randn(6, 3), features(2, 5))
