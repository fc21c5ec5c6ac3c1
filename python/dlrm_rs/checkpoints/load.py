"""`load_dlrm_checkpoint`: a DLRM that facebookresearch/dlrm or TorchRec has saved, as ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlrm_rs.checkpoints.parts import Options
from dlrm_rs.checkpoints.read import File, read_checkpoint
from dlrm_rs.checkpoints.reference import load_reference
from dlrm_rs.checkpoints.torchrec_dlrm import load_torchrec
from dlrm_rs.model import DLRM
from dlrm_rs.optim import OptimizerSpec

__all__ = ["DLRMCheckpoint", "load_dlrm_checkpoint"]

# The first parts of the keys, by who saves them.
_ROOTS = {
    ("emb_l.", "bot_l.", "top_l.", "v_W_l."): load_reference,
    ("sparse_arch.", "dense_arch.", "inter_arch.", "over_arch."): load_torchrec,
}


class DLRMCheckpoint(NamedTuple):
    """What `load_dlrm_checkpoint` gives."""

    model: DLRM
    # What else the file says: of facebookresearch/dlrm "epoch", "iter", "test_acc", "opt_state_dict" and more.
    entries: dict[str, Any]


def load_dlrm_checkpoint(
    path: File,
    *,
    tables: Sequence[Any] | None = None,
    interaction: str | None = None,
    interaction_itself: bool | None = None,
    qr_operation: str | None = None,
    dtype: torch.dtype | str | None = None,
    optimizer: OptimizerSpec | None = None,
) -> DLRMCheckpoint:
    """Load a DLRM that was saved by facebookresearch/dlrm (`--save-model`) or is TorchRec's.

    Nothing that the file may hold is run: it is read as tensors, numbers, strings and containers.

    The model gives logits. facebookresearch/dlrm's gives their sigmoid: `model(...).sigmoid()`. Its tricks come as
    `QREmbeddingBag`, `PrEmbeddingBag` and `WeightedEmbeddingBag`. The parameters are in its order (but for learned
    weights of pooling, which come beside their tables), so that
    `torch.optim.SGD(model.parameters(), lr).load_state_dict(entries["opt_state_dict"])` goes on with its training. Of
    TorchRec's DLRM the columns of the first top layer come permuted, into our order of the pairs.

    Args:
        path: The file, or one open for reading bytes.
        tables: What each table is called, the features that look it up, and their pooling: an `EmbeddingBagConfig`
            each, ours or TorchRec's, in the file's order. By default tables have one feature of their own name and sum;
            facebookresearch/dlrm's are called "cat_0", "cat_1" and so on.
        interaction: "dot" or "cat"; needed where the file fits both.
        interaction_itself: As of `DLRM`; needed where the file fits both.
        qr_operation: `--qr-operation` of the run: "mult", "add" or "concat". Needed for the first two, which no file
            tells apart.
        dtype: How rows are stored, as of `replace_embeddings`; None as in the file.
        optimizer: One of `dlrm_rs.optim`, for all tables.

    Returns:
        The model, and what else the file says.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another model's file, one that would have to run code, or one that leaves open what is not said.
        MemoryError: The tables cannot be allocated.

    Example:
        >>> import tempfile, torch, dlrm_rs
        >>> state = {"emb_l.0.weight": torch.rand(10, 2), "emb_l.1.weight": torch.rand(20, 2)}
        >>> state |= {"bot_l.0.weight": torch.rand(2, 4), "bot_l.0.bias": torch.rand(2)}
        >>> state |= {"top_l.0.weight": torch.rand(1, 5), "top_l.0.bias": torch.rand(1)}
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     torch.save({"state_dict": state, "epoch": 3}, file.name)
        ...     model, entries = dlrm_rs.load_dlrm_checkpoint(file.name)
        >>> entries
        {'epoch': 3}
        >>> clicks = dlrm_rs.KeyedJaggedTensor.from_lengths_sync(
        ...     keys=["cat_0", "cat_1"], values=torch.tensor([9, 3, 19]), lengths=torch.tensor([2, 1])
        ... )
        >>> model(torch.rand(1, 4), clicks).shape
        torch.Size([1, 1])
    """
    options = Options(tables, interaction, interaction_itself, qr_operation, dtype, optimizer)
    state, entries = read_checkpoint(path)
    for roots, load in _ROOTS.items():
        for prefix in ("", "module.", "model.", "module.model."):  # of DistributedDataParallel and of DLRMTrain
            if all(key.startswith(tuple(prefix + root for root in roots)) for key in state):
                named = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
                return DLRMCheckpoint(load(named, options), entries)
    raise ValueError(
        "path: expected keys of facebookresearch/dlrm (emb_l, bot_l, top_l) or of TorchRec's DLRM (sparse_arch, "
        f"dense_arch, over_arch), got {_some(state)}; a state_dict of dlrm_rs.DLRM loads by its load_state_dict"
    )


def _some(state: Mapping[str, Tensor]) -> str:
    names = list(state)
    return f"{names[:5]}{' and more' if len(names) > 5 else ''}"
