"""Tables beside torch's distributed wrappers, which would broadcast, reduce or shard every Parameter that they find.

A table with a fused optimizer belongs to its process: its gradients do not exist, so none can be reduced. What is said
here is for the dense layers of a model to be replicated or sharded, and for its tables to be left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor, nn

from dlrm_rs.owner import HoldsWeight

__all__ = ["leave_tables_to_each_process", "table_parameters"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def leave_tables_to_each_process(model: ModuleT) -> ModuleT:
    """Have `DistributedDataParallel` neither broadcast nor reduce a model's tables; call it before wrapping the model.

    Every process then has tables of its own, which its own batches train. Without this call tables are replicated as
    all Parameters are, which is right without a fused optimizer and impossible with one. So `dlrm_rs.DLRM` and
    `replace_embeddings` make this call themselves where there is a fused optimizer.

    Args:
        model: What will be given to `DistributedDataParallel`. It is changed, and returned.

    Returns:
        `model`.

    Raises:
        ValueError: No tables of `dlrm_rs` in the model.

    Example:
        >>> import torch, dlrm_rs
        >>> bags = dlrm_rs.EmbeddingBag(100, 8, mode="sum", optimizer=dlrm_rs.optim.SGD(lr=0.1))
        >>> model = torch.nn.Sequential(bags, torch.nn.Linear(8, 1))
        >>> model = dlrm_rs.distributed.leave_tables_to_each_process(model)
        >>> # model = torch.nn.parallel.DistributedDataParallel(model), in every process
    """
    names = [name for name, _ in table_tensors(model)]
    if not names:
        raise ValueError("model: expected one with tables of dlrm_rs, got none")
    # What DistributedDataParallel asks its module for; torch has no public way to say it.
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    model._ddp_params_and_buffers_to_ignore = [*ignored, *names]  # type: ignore[assignment] # no submodule
    return model


def table_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The Parameters of a model that are tables, for wrappers that are told what to ignore.

    Args:
        model: Any model.

    Returns:
        For `torch.distributed.fsdp.fully_shard(model, ignored_params=...)` or
        `FullyShardedDataParallel(model, ignored_states=...)`.

    Example:
        >>> import torch, dlrm_rs
        >>> model = torch.nn.Sequential(dlrm_rs.EmbeddingBag(100, 8), torch.nn.Linear(8, 1))
        >>> dlrm_rs.distributed.table_parameters(model) == {model[0].weight}
        True
    """
    return {tensor for _, tensor in table_tensors(model) if isinstance(tensor, nn.Parameter)}


def table_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model that are tables, by their names there."""
    for prefix, module in model.named_modules():
        if isinstance(module, HoldsWeight):
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                yield f"{prefix}.{name}" if prefix else name, tensor
