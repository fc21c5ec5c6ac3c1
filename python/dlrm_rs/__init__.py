"""Embedding tables for PyTorch recommenders: stored, looked up and trained on all cores by Rust.

    import dlrm_rs

    model = dlrm_rs.replace_embeddings(model)  # every nn.EmbeddingBag and nn.Embedding of a model

or many tables in one call, trained inside backward:

    tables = [dlrm_rs.EmbeddingBagConfig("product", 1_000_000, 64, ["clicked", "bought"])]
    collection = dlrm_rs.EmbeddingBagCollection(tables, optimizer=dlrm_rs.optim.RowWiseAdagrad(lr=0.01))
"""

from dlrm_rs import distributed, optim, pytree
from dlrm_rs._dlrm_rs import __version__, get_num_threads, info, set_num_threads
from dlrm_rs.checkpoints import DLRMCheckpoint, load_dlrm_checkpoint
from dlrm_rs.collection import EmbeddingBagCollection
from dlrm_rs.embedding import Embedding
from dlrm_rs.embedding_bag import EmbeddingBag
from dlrm_rs.embedding_collection import EmbeddingCollection
from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.keyed_tensor import KeyedTensor
from dlrm_rs.losses import DLRMLoss
from dlrm_rs.lr_policy import LRPolicyScheduler
from dlrm_rs.model import DLRM
from dlrm_rs.pipeline import Pipeline
from dlrm_rs.placement import plan
from dlrm_rs.quantization import Budget, QuantizationReport, dequantize, quantize
from dlrm_rs.replace import replace_embeddings
from dlrm_rs.table_configs import EmbeddingBagConfig, EmbeddingConfig
from dlrm_rs.tricks import PrEmbeddingBag, QREmbeddingBag, WeightedEmbeddingBag, md_solver

pytree.register()

__all__ = [
    "DLRM",
    "Budget",
    "DLRMCheckpoint",
    "DLRMLoss",
    "Embedding",
    "EmbeddingBag",
    "EmbeddingBagCollection",
    "EmbeddingBagConfig",
    "EmbeddingCollection",
    "EmbeddingConfig",
    "KeyedJaggedTensor",
    "KeyedTensor",
    "LRPolicyScheduler",
    "Pipeline",
    "PrEmbeddingBag",
    "QREmbeddingBag",
    "QuantizationReport",
    "WeightedEmbeddingBag",
    "__version__",
    "dequantize",
    "distributed",
    "get_num_threads",
    "info",
    "load_dlrm_checkpoint",
    "md_solver",
    "optim",
    "plan",
    "quantize",
    "replace_embeddings",
    "set_num_threads",
]
