"""`EmbeddingBagCollection`: many tables and one call, by TorchRec's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dlrm_rs import operators
from dlrm_rs.arguments import check_device, check_pooling, float_tensor, index_tensor
from dlrm_rs.devices import CPU, Device
from dlrm_rs.devices import output_device as checked_output_device
from dlrm_rs.devices.transfer import to_device
from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.keyed_tensor import KeyedTensor
from dlrm_rs.named_tables import NamedTables, beside
from dlrm_rs.optim import OptimizerSpec
from dlrm_rs.table_configs import EmbeddingBagConfig
from dlrm_rs.variable_batch import expand, fill_up

__all__ = ["EmbeddingBagCollection", "LookupCall"]


class LookupCall(NamedTuple):
    """The ids of a lookup, checked by type and shape, and in the order of the tables."""

    indices: Tensor
    offsets: Tensor
    batch_size: int
    per_sample_weights: Tensor | None

    def arrays(self) -> tuple[Any, Any, int, Any]:
        """The same as the engine takes it."""
        weights = None if self.per_sample_weights is None else self.per_sample_weights.detach().numpy()
        return self.indices.numpy(), self.offsets.numpy(), self.batch_size, weights


class EmbeddingBagCollection(NamedTables):
    """Many embedding tables, looked up and pooled in one call.

    Letters: `F` features, `B` batch, `D` dim of a feature's table. The output has a feature's columns side by side:
    tables in their order, and of each table its `feature_names` in theirs.

    ```
    #              bag 0    bag 1     tables:  "t1"  N 10, D 2, features "a"
    # "a"          [0, 1]   [2]                "t2"  N 5,  D 3, features "b"
    # "b"          [4]      []
    values   [0, 1, 2, 4]             # feature-major ids
    offsets  [0, 2, 3, 4, 4]          # (F * B + 1,)
    output   [[a a b b b],            # (B, 2 + 3)
              [a a 0 0 0]]
    ```

    Args:
        tables: The tables. A feature that several tables name is called "feature@table" in the output.
        is_weighted: Whether every id comes with a weight that multiplies its row.
        device: None or the CPU, where the tables live and stay.
        optimizer: One of `dlrm_rs.optim`: backward then updates the rows itself and no gradient tensor exists.
        output_dtype: Of the output: `torch.float32`, or `torch.float16` or `torch.bfloat16`, to which sums in float32
            are rounded: half the bytes to bring to another device.
        output_device: Where the output is wanted: "cuda" for page-locked memory, which the engine writes to, and copies
            beside the current stream, ready when that uses them; gradients come back the same way.

    Attributes:
        embedding_bags: One module per table, which holds its `weight`, `(N, D)`; quantized tables have none.
        fused_optimizer: A `torch.optim.Optimizer` for schedulers and checkpoints, or None without `optimizer`.

    Raises:
        ValueError: A name, size, pooling or device that cannot be.
        TypeError: A row format or output dtype that cannot be.
        MemoryError: The tables cannot be allocated.

    Example:
        >>> import torch, dlrm_rs
        >>> collection = dlrm_rs.EmbeddingBagCollection(
        ...     tables=[
        ...         dlrm_rs.EmbeddingBagConfig("t1", 10, 2, ["a"], init_fn=torch.nn.init.ones_),
        ...         dlrm_rs.EmbeddingBagConfig("t2", 5, 3, ["b"], init_fn=torch.nn.init.ones_),
        ...     ],
        ...     optimizer=dlrm_rs.optim.RowWiseAdagrad(lr=0.01),
        ... )
        >>> features = dlrm_rs.KeyedJaggedTensor.from_lengths_sync(
        ...     keys=["a", "b"], values=torch.tensor([0, 1, 2, 4]), lengths=torch.tensor([2, 1, 1, 0])
        ... )
        >>> pooled = collection(features)
        >>> pooled.values().detach()
        tensor([[2., 2., 1., 1., 1.],
                [1., 1., 0., 0., 0.]])
        >>> pooled.values().sum().backward()  # and the rows have moved
        >>> pooled["b"].shape
        torch.Size([2, 3])
    """

    embedding_bags: nn.ModuleDict
    _holders = "embedding_bags"

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | str | int | None = None,
        *,
        optimizer: OptimizerSpec | None = None,
        output_dtype: torch.dtype = torch.float32,
        output_device: Device | torch.device | str | int | None = None,
    ) -> None:
        check_device(device)
        super().__init__(tables)
        self._is_weighted = is_weighted
        poolings = [check_pooling(f"pooling of table {config.name!r}", config.pooling) for config in tables]
        self._make_tables(poolings, optimizer, output_dtype)
        self._tables.output_device = checked_output_device(output_device)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool every feature.

        Args:
            features: A KeyedJaggedTensor, ours or TorchRec's, on the CPU, with at least the features of the tables.
                Best in the order of the tables; other orders and other features cost a copy of the ids. Where features
                have numbers of bags of their own, with inverse indices.

        Returns:
            A KeyedTensor, ours or TorchRec's as came in, with a feature's columns under its name.

        Raises:
            IndexError: An id is not a row of its table, or an inverse index not a bag of its feature.
            ValueError: A feature is missing, or ids, offsets, weights or inverse indices cannot be.
            TypeError: `features` is no KeyedJaggedTensor, or ids that are not integers.
            RuntimeError: In a `Pipeline`'s loop, where other features than the batch's are to be trained.
        """
        keyed_tensor: type[KeyedTensor] = beside(type(features), "KeyedTensor")
        lane = self._tables.lane  # of a pipeline, which looks up ahead of the model
        values = None if lane is None else lane.take(features)
        if values is None:
            values = self._pooled(*self._of(features))
        inverse = features.inverse_indices_or_none()
        if inverse is not None or features.variable_stride_per_key():
            strides = self._in_order(features).stride_per_key()
            values = expand(values, self._features, self._lengths, strides, inverse)
        # An object that is made without its constructor is what torch 2.6 cannot trace.
        unchecked = keyed_tensor is KeyedTensor and not torch.compiler.is_compiling()
        make = KeyedTensor._of_checked if unchecked else keyed_tensor
        return make(self._embedding_names, self._lengths, values)

    def lookup(self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        """Look up and pool ids that are in the order of the features already.

        Args:
            indices: `(L,)` ids, feature-major, int32 or int64.
            offsets: `(F * B + 1,)`: bag `b` of feature `f` is `indices[offsets[f * B + b] : offsets[f * B + b + 1]]`.
            per_sample_weights: `(L,)` float32, exactly if `is_weighted`.

        Returns:
            `(B, sum of D)` of the output dtype.

        Raises:
            IndexError: An id is not a row of its table.
            ValueError: Offsets of a wrong length, or that fall, begin above 0 or end beyond the ids; weights missing,
                not wanted, or NaN; tensors on another device.
            TypeError: Ids or offsets that are not integers, weights that are not float32.
            RuntimeError: In a `Pipeline`'s loop, where it is to be trained.

        Example:
            >>> import torch, dlrm_rs
            >>> table = dlrm_rs.EmbeddingBagConfig("t", 4, 1, ["a", "b"], init_fn=torch.nn.init.ones_)
            >>> collection = dlrm_rs.EmbeddingBagCollection([table])
            >>> collection.lookup(torch.tensor([0, 1, 3]), torch.tensor([0, 2, 3])).detach()
            tensor([[2., 1.]])
        """
        if self._tables.lane is not None:
            self._tables.lane.look_up_beside("indices")
        return self._pooled("indices", indices, "offsets", offsets, per_sample_weights)

    def _lookup_call(self, features: KeyedJaggedTensor) -> LookupCall:
        """What `forward` looks up."""
        return self._checked(*self._of(features))

    def _of(self, features: KeyedJaggedTensor) -> tuple[str, Tensor, str, Tensor, Tensor | None]:
        """The ids, offsets and weights of ids in a batch, by the names that a user knows."""
        inverse = features.inverse_indices_or_none()
        features = self._in_order(features)
        ids, offsets, weights = features.values(), features.offsets(), features.weights_or_none()
        if inverse is not None or features.variable_stride_per_key():
            offsets = fill_up(offsets, features.stride_per_key())
        return "features.values()", ids, "features.offsets()", offsets, weights

    def _pooled(self, ids_name: str, ids: Tensor, offsets_name: str, offsets: Tensor, weights: Tensor | None) -> Tensor:
        if (weights is not None) is self._is_weighted:
            at_once = operators.lookup_at_once(self._tables, ids, offsets, weights)
            if at_once is not None:
                return at_once
        call = self._checked(ids_name, ids, offsets_name, offsets, weights)
        pooled = operators.lookup(self._tables, *call, scale_grad_by_freq=self._scale_grad_by_freq)
        return pooled if self._tables.output_device is CPU else to_device(pooled, self._tables.output_device)

    def _checked(
        self, ids_name: str, ids: Tensor, offsets_name: str, offsets: Tensor, weights: Tensor | None
    ) -> LookupCall:
        ids = index_tensor(ids_name, ids)  # (L,)
        offsets = index_tensor(offsets_name, offsets)  # (F * B + 1,)
        F = len(self._features)
        bags = offsets.numel() - 1
        batch_size = bags // F  # not divmod, which torch.compile cannot trace
        if ids.dim() != 1 or offsets.dim() != 1:
            raise ValueError(
                f"{ids_name}, {offsets_name}: expected one dimension each, "
                f"got shapes {tuple(ids.shape)} and {tuple(offsets.shape)}"
            )
        if bags % F or bags < 0:
            raise ValueError(
                f"{offsets_name}: expected F * B + 1 elements with F = {F}, the features of this collection, "
                f"got {offsets.numel()}"
            )
        if (weights is not None) != self._is_weighted:
            raise ValueError(
                f"per_sample_weights: expected {'one per id' if self._is_weighted else 'None'}, as this collection has "
                f"is_weighted={self._is_weighted}, got {'none' if weights is None else 'some'}; give a batch "
                f"{'with' if self._is_weighted else 'without'} weights, or make the collection with "
                f"is_weighted={not self._is_weighted}"
            )
        if weights is not None:
            weights = float_tensor("per_sample_weights", weights, ids.shape)
        return LookupCall(ids, offsets, batch_size, weights)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables, in their order."""
        return self._configs

    def embedding_names(self) -> list[str]:
        """The features by the names they have in the output, in its order."""
        return self._embedding_names

    def lengths_per_embedding(self) -> list[int]:
        """`D` of every feature, in the output's order."""
        return self._lengths

    def is_weighted(self) -> bool:
        """Whether every id comes with a weight."""
        return self._is_weighted

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        algorithm = self.fused_optimizer.defaults["algorithm"] if self.fused_optimizer else None
        return f"features={self._embedding_names}, is_weighted={self._is_weighted}, optimizer={algorithm}"
