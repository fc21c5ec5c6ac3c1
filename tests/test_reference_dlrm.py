"""facebookresearch/dlrm's script with nothing exchanged but `nn.EmbeddingBag`: the same losses, to six digits."""

# ruff: noqa: NPY002 - NumPy's global state, as the script

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dlrm_rs
from reference_dlrm import SEED, ReferenceDLRM, batches, train

# Its defaults: --arch-embedding-size, --arch-mlp-bot, --arch-mlp-top, --learning-rate.
SIZES, BOTTOM, TOP, LR = [4, 3, 2], [4, 3, 2], [4, 2, 1], 0.01


def losses(embedding_bag: Any, batch: int, count: int, optimizer: Any = torch.optim.SGD, **shape: Any) -> list[float]:
    """Those of its run."""
    np.random.seed(SEED)
    sizes, bottom, top, lr = (shape.get(key, default) for key, default in DEFAULTS.items())
    model = ReferenceDLRM(sizes, bottom, top, embedding_bag)
    data = batches(sizes, bottom[0], batch, count)
    return train(model, data, optimizer(model.parameters(), lr=lr), nn.MSELoss())


def printed(losses: list[float]) -> list[str]:
    """As the script prints them."""
    return [f"{loss:.6f}" for loss in losses]


DEFAULTS: dict[str, Any] = {"sizes": SIZES, "bottom": BOTTOM, "top": TOP, "lr": LR}
LARGER: dict[str, Any] = {"sizes": [1000, 50, 300], "bottom": [13, 64, 16], "top": [64, 1]}


@pytest.mark.parametrize("embedding_bag", [nn.EmbeddingBag, dlrm_rs.EmbeddingBag])
def test_its_default_command_prints(embedding_bag: Any) -> None:
    assert printed(losses(embedding_bag, 1, 1)) == ["0.083850"]


@pytest.mark.parametrize("embedding_bag", [nn.EmbeddingBag, dlrm_rs.EmbeddingBag])
def test_it_prints_with_two_samples_a_batch_and_three_batches(embedding_bag: Any) -> None:
    # --mini-batch-size=2 --data-size=6
    assert printed(losses(embedding_bag, 2, 3)) == ["0.025266", "0.180494", "0.083240"]


@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.SGD, 0.1), (torch.optim.Adagrad, 0.01)])
def test_larger_tables_with_either_are_the_same(optimizer: Any, lr: float) -> None:
    ours = losses(dlrm_rs.EmbeddingBag, 128, 20, optimizer, **LARGER, lr=lr)
    assert ours == pytest.approx(losses(nn.EmbeddingBag, 128, 20, optimizer, **LARGER, lr=lr), rel=1e-5)
    assert len(set(ours)) == 20


def test_replaced_afterwards_it_is_the_same_too() -> None:
    def replaced(*args: Any, **options: Any) -> nn.Module:
        return dlrm_rs.replace_embeddings(nn.EmbeddingBag(*args, **options))

    assert printed(losses(replaced, 2, 3)) == ["0.025266", "0.180494", "0.083240"]
