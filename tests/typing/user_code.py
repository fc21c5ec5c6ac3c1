"""Code as a user writes it, which must pass `mypy --strict` as it is: no cast, no ignore."""

from collections.abc import Iterator
from typing import assert_type

import torch
from torch import Tensor, nn

import dlrm_rs


class Ranker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        tables = [
            dlrm_rs.EmbeddingBagConfig("ads", 1_000, 16, ["ad"], pooling="mean", data_type=torch.bfloat16),
            dlrm_rs.EmbeddingBagConfig("users", 5_000, 16, ["viewer", "author"], init_fn=nn.init.zeros_),
        ]
        self.embeddings = dlrm_rs.EmbeddingBagCollection(tables)
        self.top = nn.Linear(48, 1)

    def forward(self, features: dlrm_rs.KeyedJaggedTensor) -> Tensor:
        pooled = self.embeddings.forward(features)
        assert_type(pooled, dlrm_rs.KeyedTensor)
        assert_type(pooled["ad"], Tensor)
        scores: Tensor = self.top(pooled.values())
        return scores


def modules() -> Iterator[nn.Module]:
    bags = dlrm_rs.EmbeddingBag(10, 4, mode="sum", optimizer=dlrm_rs.optim.RowWiseAdagrad(lr=0.01), dtype="fp32")
    assert_type(bags.fused_optimizer, dlrm_rs.optim.FusedOptimizer | None)
    assert_type(bags.memory_report(), dict[str, dict[str, int]])
    if bags.fused_optimizer is not None:
        yield bags
        torch.optim.lr_scheduler.StepLR(bags.fused_optimizer, step_size=1).step()
    rows = dlrm_rs.Embedding.from_pretrained(torch.randn(4, 2), freeze=False)
    assert_type(rows, dlrm_rs.Embedding)
    assert_type(rows.forward(torch.tensor([1])), Tensor)
    theirs: nn.EmbeddingBag = dlrm_rs.EmbeddingBag(4, 2)
    yield theirs


def swap(model: nn.Sequential) -> nn.Sequential:
    replaced = dlrm_rs.replace_embeddings(model, dtype=torch.float16, optimizer=dlrm_rs.optim.SGD(lr=0.1))
    assert_type(replaced, nn.Sequential)
    assert_type(dlrm_rs.distributed.table_parameters(replaced), set[nn.Parameter])
    return dlrm_rs.distributed.leave_tables_to_each_process(replaced)


def quantize(model: Ranker) -> None:
    def auc(tried: nn.Module) -> float:
        return float(len(list(tried.parameters())))

    report = dlrm_rs.quantize(model, budget=dlrm_rs.Budget(auc, tolerance=1e-3))
    assert_type(report, dlrm_rs.QuantizationReport)
    assert_type(dlrm_rs.dequantize(model), Ranker)


def train(model: Ranker) -> Tensor:
    features = dlrm_rs.KeyedJaggedTensor.from_lengths_sync(
        keys=["ad", "viewer", "author"], values=torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 1, 1])
    )
    assert_type(features["ad"].to_dense(), list[Tensor])
    dlrm = dlrm_rs.DLRM(model.embeddings, dense_in_features=3, bottom_mlp=[8, 16], top_mlp=[1])
    loss: Tensor = dlrm(torch.randn(1, 3), features).square().mean()
    compiled = torch.compile(model, fullgraph=True)
    scores: Tensor = compiled(features)
    return loss + scores


def settings() -> None:
    assert_type(dlrm_rs.get_num_threads(), int)
    dlrm_rs.set_num_threads(2)
    assert_type(dlrm_rs.__version__, str)
