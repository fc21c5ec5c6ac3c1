"""`replace_embeddings`: the one-line swap of a model's embeddings for the engine's.

A module is not exchanged for another but changes its class in place: whoever holds it, its hooks, its training flag and
its place in the model stay as they are. The same holds for its Parameter, whose data moves into the engine's memory, so
an optimizer that was made over `model.parameters()` goes on working.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dlrm_rs import torchrec
from dlrm_rs.arguments import check_table_weight
from dlrm_rs.collection import EmbeddingBagCollection
from dlrm_rs.distributed import leave_tables_to_each_process
from dlrm_rs.embedding import Embedding
from dlrm_rs.embedding_bag import EmbeddingBag
from dlrm_rs.embedding_collection import EmbeddingCollection
from dlrm_rs.hot_rows import check_hot_rows
from dlrm_rs.optim import OptimizerSpec
from dlrm_rs.owner import OwnsTables, single_table
from dlrm_rs.quantization import torch_ao
from dlrm_rs.row_formats import TORCH_DTYPES, row_format
from dlrm_rs.tables import EmbeddingTables

__all__ = ["replace_embeddings"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_REPLACEMENTS: dict[type[nn.Module], type[EmbeddingBag | Embedding]] = {
    nn.EmbeddingBag: EmbeddingBag,
    nn.Embedding: Embedding,
}


class _Owner(NamedTuple):
    """A module that has a tensor, and the tensor's name in the model."""

    name: str
    module: nn.Module
    tensor: Tensor


def replace_embeddings(
    model: ModuleT,
    *,
    dtype: torch.dtype | str | None = None,
    optimizer: OptimizerSpec | None = None,
    hot_rows: float = 0.0,
    hot_data_type: torch.dtype | str = "fp32",
) -> ModuleT:
    """Put every `nn.EmbeddingBag` and `nn.Embedding` of a model into the engine, torch's quantized ones and TorchRec's.

    TorchRec's `EmbeddingBagCollection` and `EmbeddingCollection` become ours, which look all their tables up in one
    call; they take TorchRec's KeyedJaggedTensor and give its KeyedTensor or JaggedTensors. TorchRec need not be there.

    Weights, `state_dict()` and its keys, hooks, `requires_grad`, shared modules and the training flag stay. So do the
    Parameters, as objects: an optimizer made before goes on working (with `optimizer` it finds no gradients to apply),
    and a Linear tied to an embedding's weight stays tied. Embeddings that are the engine's already are left as they
    are. Rows of `torch.ao.nn.quantized` modules are taken over as they are, bit for bit, without requantizing.

    Args:
        model: Any module, an embedding itself included. It is changed, and returned.
        dtype: How a row is stored, as of `dlrm_rs.EmbeddingBag`: "int8" takes a quarter of the bytes. None leaves the
            dtype of the weights. Outputs keep that in any case, so that the rest of the model sees no difference.
        optimizer: One of `dlrm_rs.optim`, for every embedding: backward then updates the rows itself. None leaves the
            update to torch's optimizers.
        hot_rows: The share of each table's rows, those that training touches most, that are kept in fp32 while the
            others are in codes, as of `dlrm_rs.EmbeddingBag`; 0 for none. For a quantized `dtype`, with `optimizer`.
            What torch has quantized is not trained, and has none.
        hot_data_type: How these are stored: "fp32".

    Returns:
        `model`.

    Raises:
        TypeError: A weight that is not of a floating dtype of the engine's, a subclass of torch's embeddings or
            TorchRec's collections, whose behaviour is its own, or a collection that is sharded, fused or quantized.
        ValueError: No embedding in the model, or one that cannot be replaced as it is: on another device, with hooks
            that compute its weight, in shared memory, sharing its memory with another, with a NaN or an infinity
            where rows are to be quantized, or in a collection of TorchRec's and elsewhere; or hot rows that cannot be.
        MemoryError: A table cannot be allocated. In all cases the model works as it did.

    Example:
        >>> import torch, dlrm_rs
        >>> model = torch.nn.Sequential(torch.nn.EmbeddingBag(100, 8, mode="sum"), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
        >>> model = dlrm_rs.replace_embeddings(model)
        >>> model[0]
        EmbeddingBag(100, 8, mode='sum')
        >>> type(model[0]) is dlrm_rs.EmbeddingBag, list(model.state_dict())
        (True, ['0.weight', '1.weight', '1.bias'])
        >>> model(torch.tensor([[3, 4]])).sum().backward()
        >>> optimizer.step()
    """
    found, quantized = _found(model)
    owners, parents = _owners(model), _parents(model)

    def format_of(stored: torch.dtype) -> str:
        return row_format("dtype", dtype or stored)

    row_format("dtype", dtype)  # if it is none, then rather now
    for one in found:
        _check_found(one, parents)
        for name, embedding in one.embeddings:
            _check_module(name, embedding)
            stored = format_of(embedding.weight.dtype)
            check_hot_rows(f" of {name!r}", hot_rows, hot_data_type, stored, trained=optimizer is not None)
            same = TORCH_DTYPES.get(format_of(embedding.weight.dtype)) is embedding.weight.dtype
            _check_sharing(name, embedding, owners, alone=optimizer is not None or not same)
    # From here on only memory can run out. A Parameter that has moved by then serves torch's module as it did before.
    formats = [{format_of(embedding.weight.dtype) for _, embedding in one.embeddings} for one in found]
    specs = [_for_some(optimizer, own, set().union(*formats)) for own in formats]
    tables = [one.tables(format_of, spec, hot_rows) for one, spec in zip(found, specs, strict=True)]
    taken = [
        torch_ao.tables_of(name, module, None if dtype is None else row_format("dtype", dtype))
        for name, module in quantized
    ]
    for one, table in zip(found, tables, strict=True):
        one.take_over(table)
        table.release()
    for (_, owner), table in zip(quantized, taken, strict=True):
        torch_ao.take_over(owner)
        owner.__dict__["_tables"] = table
        owner.__class__ = EmbeddingBag if hasattr(owner, "mode") else Embedding
    if optimizer is not None:
        leave_tables_to_each_process(model)
    return model


def _for_some(optimizer: OptimizerSpec | None, own: set[str], of_all: set[str]) -> OptimizerSpec | None:
    """The optimizer for tables of some row formats: without `split_bf16` where only others have bf16 rows."""
    if isinstance(optimizer, OptimizerSpec) and "bf16" in of_all - own:
        return dataclasses.replace(optimizer, split_bf16=False)
    return optimizer


class _Found(NamedTuple):
    """What is replaced as one: an embedding of torch's, or a collection of TorchRec's with several."""

    name: str
    module: nn.Module
    collection: type[EmbeddingBagCollection | EmbeddingCollection] | None
    # Who hold the weights, by their names in the model.
    embeddings: Sequence[tuple[str, nn.Embedding | nn.EmbeddingBag]]

    def tables(
        self, format_of: Callable[[torch.dtype], str], optimizer: OptimizerSpec | None, hot_rows: float
    ) -> EmbeddingTables:
        """The tables in the engine; the model is as it was."""
        if self.collection is not None:
            return torchrec.tables_of(self.module, self.collection, format_of, optimizer, hot_rows)
        [(name, embedding)] = self.embeddings
        stored = embedding.weight.dtype
        return single_table(embedding, name, format_of(stored), optimizer, stored, hot_rows)

    def take_over(self, tables: EmbeddingTables) -> None:
        """Give the module its tables and its new class."""
        if self.collection is not None:
            torchrec.take_over(self.module, self.collection, tables)
            return
        [(_, embedding)] = self.embeddings
        embedding.padding_idx = tables.features[0].padding_idx
        embedding.__dict__["_tables"] = tables
        embedding.__class__ = _REPLACEMENTS[type(embedding)]  # with all that it needs, should Ctrl-C come between


def _found(model: nn.Module) -> tuple[list[_Found], list[tuple[str, nn.Module]]]:
    """What to replace and its names in the model, every module once: what trains, and quantized modules."""
    found: list[_Found] = []
    quantized: list[tuple[str, nn.Module]] = []
    inside: set[int] = set()  # of collections
    others = 0
    for name, module in model.named_modules():
        if isinstance(module, OwnsTables):
            others += 1
        elif torch_ao.is_quantized_embedding(module):
            quantized.append((name or "embedding", module))
        elif collection := torchrec.collection_class(name, module):
            embeddings = torchrec.embeddings_of(name, module, collection)
            inside.update(id(embedding) for _, embedding in embeddings)
            found.append(_Found(name, module, collection, embeddings))
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag) and id(module) not in inside:
            if type(module) not in _REPLACEMENTS:
                raise TypeError(
                    f"model: expected embeddings of torch's own classes, got {type(module).__name__} at {name!r}, a "
                    "subclass, whose behaviour a replacement would lose"
                )
            name = name or "embedding"
            found.append(_Found(name, module, None, [(name, module)]))
    if not found and not quantized and not others:
        raise ValueError(
            "model: expected at least one torch.nn.EmbeddingBag, torch.nn.Embedding or collection of TorchRec's in it, "
            "got none"
        )
    return found, quantized


def _parents(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """By whom a module is held, and their names."""
    parents: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, parent in model.named_modules():
        for module in {id(child): child for child in parent._modules.values() if child is not None}.values():
            parents[id(module)].append((name, parent))
    return parents


def _check_found(one: _Found, parents: Mapping[int, Sequence[tuple[str, nn.Module]]]) -> None:
    if "forward" in one.module.__dict__:
        raise ValueError(f"model: expected the forward of its class at {one.name!r}, got one that was put in its place")
    if one.collection is None:
        return
    holders = getattr(one.module, one.collection._holders)
    for name, embedding in one.embeddings:
        for parent_name, parent in parents[id(embedding)]:
            if parent is not holders:
                raise ValueError(
                    f"model: expected {name!r} to be in its collection alone, which takes its rows over, got "
                    f"{parent_name!r}, where it is too; give that an embedding of its own"
                )


def _check_module(name: str, module: nn.Embedding | nn.EmbeddingBag) -> None:
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        raise ValueError(
            f"model: expected a torch.nn.Parameter as weight of {name!r}, got {type(module.weight).__name__}; take "
            "away what computes it, such as weight_norm or pruning, first"
        )
    check_table_weight(f"weight of {name!r}", weight, (module.num_embeddings, module.embedding_dim))
    if weight.is_shared():
        raise ValueError(f"weight of {name!r}: expected memory of its own, got memory shared between processes")


def _check_sharing(
    name: str, module: nn.Embedding | nn.EmbeddingBag, owners: Mapping[int, Sequence[_Owner]], *, alone: bool
) -> None:
    """Refuse ties that would break: a Parameter that moves takes its owners along, not other views of its memory.

    `alone` is for tables of which no other owner could go on using the Parameter.
    """
    for other_name, other, tensor in owners.get(_memory(module.weight), ()):
        if other is module:
            continue
        if tensor is not module.weight:
            raise ValueError(
                f"weight of {name!r}: expected memory of its own, got memory that {other_name!r} views too"
            )
        if alone or isinstance(other, nn.Embedding | nn.EmbeddingBag):
            raise ValueError(
                f"weight of {name!r}: expected no other owner with a fused optimizer or another row format, nor "
                f"another embedding without, got {other_name!r} as well; embeddings can share a table by being one "
                "module"
            )


def _owners(model: nn.Module) -> dict[int, list[_Owner]]:
    """Who has a tensor in which memory; empty tensors are in none."""
    owners: dict[int, list[_Owner]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_cpu and tensor.layout is torch.strided and tensor.numel():
                owners[_memory(tensor)].append(_Owner(f"{name}.{key}", module, tensor))
    return owners


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
