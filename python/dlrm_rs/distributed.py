"""Tables beside torch's distributed wrappers, which would broadcast, reduce or shard every Parameter that they find.

The gradients of a table with a fused optimizer do not exist, so none can be reduced. What is said here is for the dense
layers of a model to be replicated or sharded, and for its tables to be left alone: every process has its own, or those
of one host share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from dlrm_rs.operators.sharing import Sharing
from dlrm_rs.owner import HoldsWeight, OwnsTables
from dlrm_rs.shared_tables import share

__all__ = ["leave_tables_to_each_process", "share_tables", "table_parameters"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_NO_TABLES = "model: expected one with tables of dlrm_rs, got none"


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
        raise ValueError(_NO_TABLES)
    # What DistributedDataParallel asks its module for; torch has no public way to say it.
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    model._ddp_params_and_buffers_to_ignore = [*ignored, *names]  # type: ignore[assignment] # no submodule
    return model


def share_tables(
    model: ModuleT, group: dist.ProcessGroup | None = None, *, timeout: timedelta | None = None
) -> ModuleT:
    """Have the processes of one host train the same tables, in memory that they share; call it in all of them.

    Call it before wrapping the model by `DistributedDataParallel`, which then leaves the tables alone. Rows and
    optimizer state are those of the group's first process, and on the host once. (Until the call every process has its
    own.) Every process looks up by itself. In backward, or in `step()` with `update="step"`, each hands its ids and
    gradients to the first, which updates the rows once, by the mean of the gradients as DDP's, and the others wait. So
    tables are trained as by one process with the batches of all, in the order of the ranks, by the hyperparameters of
    the first; the same batches give the same bits. As the first works for all, let it have more threads than the
    others: `dlrm_rs.set_num_threads`.

    As with DDP, all processes must train the same modules in the same order. When one fails or ends, the next update
    fails in the others: at once where torch notices, at the latest after `timeout`. Tables are as they were then,
    unless it was the first process that ended, in the middle of an update.

    What writes to a weight in one process writes to it in all, as `load_state_dict` does: have all do it, and meet
    (`torch.distributed.barrier`) before the next forward. A copy of the model, as by `copy.deepcopy`, is not shared.
    Tables in other row formats can be shared and not brought into others then; quantized or frozen ones are looked up.

    Args:
        model: A model with tables of `dlrm_rs` in it, made alike in all processes. It is changed, and returned.
        group: The processes, all on this host, of any backend (tables go by gloo); None for all.
        timeout: How long a process waits for another; None for torch's default, half an hour.

    Returns:
        `model`.

    Raises:
        ValueError: No tables in the model, or not the same in every process; processes on several hosts; tables that
            cannot be shared: trained without a fused optimizer, as every process's would move the same rows, or with
            `max_norm`. It is raised in all processes, and nothing has changed then.
        RuntimeError: There is no process group, or no gloo, or the tables are shared already.
        MemoryError: The system has no memory for another table; every process keeps its own tables then.

    Example:
        >>> import torch, dlrm_rs
        >>> store = torch.distributed.HashStore()
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)  # of this process alone
        >>> model = torch.nn.Sequential(torch.nn.EmbeddingBag(100, 8, mode="sum"), torch.nn.Linear(8, 1))
        >>> model = dlrm_rs.replace_embeddings(model, optimizer=dlrm_rs.optim.SGD(lr=0.1))
        >>> model = torch.nn.parallel.DistributedDataParallel(dlrm_rs.distributed.share_tables(model))
        >>> model(torch.tensor([[1, 2]])).sum().backward()
        >>> torch.distributed.destroy_process_group()
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("group: expected torch.distributed.init_process_group to have been called, and it was not")
    if dist.get_rank(group) < 0:
        raise ValueError(f"group: expected one with this process, of rank {dist.get_rank()}, got one without it")
    if not dist.is_gloo_available():
        raise RuntimeError("group: expected a torch that is built with gloo, by which processes share tables, got none")
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    # Of a backend that moves tensors of the CPU, whatever reduces the gradients of the dense layers: NCCL does not.
    # Where some make a group by themselves, torch 2.11 and older find it by how many groups each has: not if all do.
    some = len(members) < dist.get_world_size()
    meeting = dist.new_group(members, timeout=timeout, backend="gloo", use_local_synchronization=some)
    assert isinstance(meeting, dist.ProcessGroup)  # this process is a member
    owners = [module for module in model.modules() if isinstance(module, OwnsTables)]
    sets = list({id(owner._tables): owner._tables for owner in owners}.values())
    share(sets, _refusal(owners), meeting)
    for number, tables in enumerate(sets):
        tables.sharing = Sharing(meeting, number)
    return leave_tables_to_each_process(model)


def _refusal(owners: Sequence[OwnsTables]) -> Exception | None:
    """Why tables cannot be shared."""
    if not owners:
        return ValueError(_NO_TABLES)
    for owner in owners:
        tables = owner._tables
        if tables.sharing is not None:
            return RuntimeError("model: expected tables of this process alone, got tables that are shared already")
        if getattr(owner, "max_norm", None) is not None:
            return ValueError(f"max_norm: expected None, as lookups would write to shared rows, got {owner.max_norm}")
        if tables.any_hot_rows():
            return ValueError(
                "model: expected tables without hot rows, which move as one process alone sees them, got some; "
                "dlrm_rs.quantize(model, hot_rows=0) brings them into codes"
            )
        weights = zip(tables.tables, tables.weights(), strict=True)
        trained = [spec.name for spec, weight in weights if weight.requires_grad]
        if tables.optimizer is None and trained:
            return ValueError(
                f"model: expected a fused optimizer for table {trained[0]!r}, as one of torch's in every process would "
                "move the same rows, got none; make it with optimizer=dlrm_rs.optim..., freeze it, or leave it to "
                "DistributedDataParallel, which replicates it"
            )
    return None


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
