"""One collection's way through the pipeline: the calls of the engine for one batch, and the hand-overs to the model.

A `Lane` belongs to a collection, a `Visit` to a lane and a batch. The table thread calls `Visit.prepare`, `lookup` and
`update`; in the meantime the model, in the user's thread, takes the pooled rows and leaves their gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dlrm_rs._dlrm_rs import Overlap, Prepared
from dlrm_rs.collection import EmbeddingBagCollection, LookupCall
from dlrm_rs.devices.device import Fetched, Mark, Sent
from dlrm_rs.devices.ring import Ring, huge_pages
from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.pipeline.pooled import pooled
from dlrm_rs.pipeline.watch import Watch
from dlrm_rs.row_formats import as_array

if TYPE_CHECKING:
    from dlrm_rs.pipeline.run import Run

__all__ = ["Lane", "Visit"]


class Lane:
    """A collection in a pipeline.

    Args:
        name: The collection's in the model, for messages.
        collection: The collection.
        run: The pass over the loader.
        check_finite: Whether a gradient with an infinity or a NaN is refused.

    Attributes:
        visit: That of the batch that the user has; None between batches.
        watch: Tells whether the tables are as they were.
        argmaxes: Memory for which row of a bag was the largest.
    """

    def __init__(
        self,
        name: str,
        collection: EmbeddingBagCollection,
        run: Run,
        check_finite: bool,
    ) -> None:
        self.name = name
        self.collection = collection
        self.run = run
        optimizer = self._optimizer = collection.fused_optimizer
        # Also where the optimizer was made to refuse them.
        self.check_finite = check_finite or (optimizer is not None and optimizer.check_finite)
        self.visit: Visit | None = None
        self.watch = Watch(collection._tables)
        self.argmaxes = Ring(huge_pages)

    def attach(self) -> None:
        """Have the tables and their optimizer ask here what is under way."""
        self.collection._tables.lane = self
        if self._optimizer is not None:
            self._optimizer.lane = self

    def detach(self) -> None:
        """Leave them as they were."""
        self.visit = None
        self.collection._tables.lane = None
        if self._optimizer is not None:
            self._optimizer.lane = None

    def settle(self) -> None:
        """Wait until the tables have the update of every gradient that has been left."""
        self.run.settle()

    def mark(self) -> Mark:
        """The end of what the device has to do now."""
        return self.collection._tables.output_device.mark()

    def take(self, features: KeyedJaggedTensor) -> Tensor | None:
        """The pooled rows of the batch's features, `(B, W)`; None for what is to be looked up now.

        That is other features, and those of the batch once more when they are being trained.

        Raises:
            RuntimeError: The rows of this batch have been taken before, or other features are looked up to be trained.
        """
        visit = self.visit
        if visit is not None and visit.is_of(features):
            if not visit.is_taken:
                return visit.take()
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"features: expected one lookup of every batch, got a second one in collection {self.name!r}; look "
                    "up again under torch.no_grad(), or train a model that looks the same features up twice without a "
                    "pipeline"
                )
        self.look_up_beside("features")
        return None

    def look_up_beside(self, argument: str) -> None:
        """Have the tables ready for a lookup of their own: of other ids than the batch's, or of these once more.

        Args:
            argument: What the ids came in.

        Raises:
            RuntimeError: It is to be trained.
        """
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.collection._tables.weights()):
            raise RuntimeError(
                f"{argument}: expected the features of the batch that the pipeline gave, as collection {self.name!r} "
                "is in one, got others, or with other weights or bags; tell the pipeline what the collection is called "
                "with (features=), or look up under torch.no_grad()"
            )
        self.settle()


class Visit:
    """A batch in a lane.

    Args:
        lane: The lane.
        features: What the model will look up.

    Attributes:
        is_taken: Whether the model has rows to be trained.
        is_lost: Whether a gradient has been left and given up.

    Raises:
        ValueError: As of the collection's `forward`; weights of ids that want a gradient.
        TypeError: As of the collection's `forward`.
    """

    def __init__(self, lane: Lane, features: KeyedJaggedTensor) -> None:
        self.lane = lane
        self._features = features
        self._call: LookupCall = lane.collection._lookup_call(features)
        weights = self._call.per_sample_weights
        if weights is not None and weights.requires_grad:
            raise ValueError(
                "features.weights(): expected weights of ids that want no gradient, since it needs the rows as they "
                "were, which a pipeline updates meanwhile; detach them, or train without a pipeline"
            )
        self._arrays = self._call.arrays()
        self._tables = lane.collection._tables
        self._out: Tensor | None = None
        self._argmax: Tensor | None = None
        self._sent: Sent | None = None
        self._is_given = False  # whether somebody has the rows, and may work on them in place
        self.is_lost = self.is_taken = False
        self._gradient: Fetched | None = None
        # As backward made it. While it is kept, autograd gives its memory to no Parameter's `grad`, which users change.
        self._left: Tensor | None = None
        self._factor = 1.0
        self._groups: list[dict[str, Any]] = []
        self._trainable: list[bool] = []
        self._updated: set[str | None] = set()

    def is_of(self, features: KeyedJaggedTensor) -> bool:
        """Whether these are the features of the batch: the same object, or one that is made of the same tensors."""
        own = self._features
        if features is own:
            return True
        if features.values() is not own.values() or features.weights_or_none() is not own.weights_or_none():
            return False
        bags = [
            (features.lengths_or_none(), own.lengths_or_none()),
            (features.offsets_or_none(), own.offsets_or_none()),
        ]
        return (
            any(other is not None and one is other for one, other in bags)
            and features.keys() == own.keys()
            and features.stride_per_key() == own.stride_per_key()
        )

    # In the table thread.

    def prepare(self) -> None:
        """Check the ids and sort them by row.

        Raises:
            IndexError: An id is not a row of its table.
            ValueError: Offsets or weights that cannot be; tables that are trained by now, and no optimizer.
        """
        self._seen = self.lane.watch.state()
        self._weights = self._tables.weights()
        self._trainable = [weight.requires_grad for weight in self._weights]
        if self.is_trained and self._tables.optimizer is None:
            raise ValueError(
                f"model: expected weights of collection {self.lane.name!r} that stay frozen, as it has no fused "
                "optimizer, got some that are to be trained; make it with one"
            )
        self._memory = self._tables.memory
        self._prepared = Prepared(
            self._memory.handle, *self._arrays, self._trainable, self.lane.collection._scale_grad_by_freq
        )
        self._out = self._tables.output_device.outputs.take(
            (self._call.batch_size, self._tables.width), self._tables.output_dtype
        )
        if self._tables.pools_by_max:
            self._argmax = self.lane.argmaxes.take(tuple(self._out.shape), torch.int32)

    def can_be_parted(self, following: Visit) -> bool:
        """Whether this batch and the next, which is prepared, know of their ids in the same tables: those trained."""
        return self._trainable == following._trainable

    def overlap(self, following: Visit, parts_bags: bool) -> Overlap:
        """The overlap of this batch with the next, which is prepared, and whose bags may be parted too."""
        return self._prepared.overlap(following._prepared, *following._arrays, parts_bags)

    def lookup(self, overlap: Overlap | None = None, part: str = "") -> None:
        """Look all bags up, or those on one side of the overlap of the batch before with this."""
        assert self._out is not None
        out, argmax = as_array(self._out), self._argmax_array()
        if overlap is None:
            self._memory.handle.lookup(*self._arrays, out, argmax)
        else:
            overlap.lookup(part, *self._arrays, out, argmax)

    def send(self) -> None:
        """Start the copy of the pooled rows to the device."""
        assert self._out is not None
        self._sent, self._is_given = self._tables.output_device.send(self._out), False
        self._out = None  # whoever has the rows now keeps them

    def renew(self) -> None:
        """Look all bags up by the tables as they are now, in the place of what they were."""
        self.prepare()
        self.lookup()
        self.send()

    def wait(self) -> None:
        """Wait for the gradient, if one has been left.

        Raises:
            FloatingPointError: It has an infinity or a NaN, and that is to be refused, or its norm is to be clipped.
        """
        if self._gradient is None or self._is_updated:
            return
        grad = self._gradient.wait()
        if self.lane.check_finite and not torch.isfinite(grad).all():
            count = int((~torch.isfinite(grad)).sum())
            raise FloatingPointError(
                f"gradient of the pooled rows of collection {self.lane.name!r}: expected finite numbers, got {count} "
                "that are infinite or NaN; its tables are as they were before this batch"
            )
        if self._memory.overlaps(grad):
            grad = grad.clone()  # the update would write to what it still has to read
        self._grad = grad.numpy()
        if self.is_trained and any(group["clip_norm"] is not None for group in self._groups):
            # By the norm of all rows, before the first of them moves.
            self._factor = self._prepared.clipped_factor(self._argmax_array(), self._grad, 1.0, self._groups)

    def update(self, overlap: Overlap | None = None, part: str | None = None) -> None:
        """Update all rows by the gradient, or those on one side of the overlap of this batch with the next; once."""
        if self._gradient is None or self._is_updated or part in self._updated:
            return
        try:
            self._prepared.update(self._argmax_array(), self._grad, self._factor, self._groups, overlap, part)
        except BaseException:
            self.drop()
            raise
        self._updated.add(part)
        if self._is_updated:
            self._left = None
        trained = zip(self._weights, self._trainable, strict=True)
        self.lane.watch.count([weight for weight, is_trained in trained if is_trained])

    def _argmax_array(self) -> Any:
        return None if self._argmax is None else self._argmax.numpy()

    def drop(self) -> None:
        """Give up the update by a gradient that has been left, if it has not begun."""
        if self._gradient is not None and not self._updated:
            self._gradient = self._left = None
            self.is_lost = True
            if self._tables.optimizer is not None:
                self._tables.optimizer.take_back_step()

    def span(self) -> tuple[float, float] | None:
        """When the device worked; None if no gradient was left."""
        return None if self._gradient is None else self._gradient.span()

    # In the user's thread, or that of backward.

    def take(self) -> Tensor:
        """The pooled rows, `(B, W)`, on the device."""
        self.lane.run.await_rows()
        if self._is_given or self._seen != self.lane.watch.state():
            self.lane.run.renew(self)
        assert self._sent is not None
        rows, self._is_given = self._sent.tensor(), True
        if not torch.is_grad_enabled() or not self.is_trained:
            return rows
        self.is_taken = True
        return pooled(rows, self)

    @property
    def is_trained(self) -> bool:
        """Whether any of the tables is; known when the batch is prepared."""
        return True in self._trainable

    @property
    def is_left(self) -> bool:
        """Whether the gradient has been left."""
        return self._gradient is not None

    @property
    def is_waiting(self) -> bool:
        """Whether the gradient has been left, and the tables have not had all of it."""
        return self.is_left and not self._is_updated

    @property
    def _is_updated(self) -> bool:
        return None in self._updated or "apart" in self._updated  # shared rows come first

    def leave(self, grad: Tensor) -> None:
        """Leave the gradient of the rows, for the update.

        Raises:
            RuntimeError: It is the second one, or the user has asked for the next batch.
        """
        assert self._sent is not None
        if self._gradient is not None or self.lane.visit is not self:
            raise RuntimeError(
                "backward: expected one of every batch, before the next one is asked for: the rows have moved since"
            )
        optimizer = self._tables.optimizer
        # As float32, which the update reads: the device converts in less time than the host.
        fetched = self._tables.output_device.fetch(grad.contiguous(), torch.float32, self._sent)
        # The learning rate of now: a scheduler may change it before the update runs.
        self._groups = [] if optimizer is None else optimizer.begin_step()
        self._left, self._gradient = grad, fetched
        self.lane.run.notify()
