"""`Pipeline`: a training loop whose tables work while the device does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dlrm_rs.arguments import check_size
from dlrm_rs.collection import EmbeddingBagCollection
from dlrm_rs.keyed_jagged import KeyedJaggedTensor
from dlrm_rs.pipeline.parting import Trials
from dlrm_rs.pipeline.run import PATIENCE, Run
from dlrm_rs.pipeline.split_backward import SplitBackward, linear_layers
from dlrm_rs.pipeline.timeline import Summary, Timeline, trace_path

__all__ = ["Pipeline"]

T = TypeVar("T")


class Pipeline:
    """Training steps whose tables are looked up and updated on CPU threads while the device does the dense layers.

    ```
    device     | dense layers i       | dense layers i + 1   |
    CPU        | update i - 1, lookup i + 1 | update i, ...
    ```

    It is for dense layers on another device: on the CPU they want the cores that the tables work on, and a plain loop
    is faster.

    Every `EmbeddingBagCollection` of the model takes part, each with a fused optimizer; other modules run as ever.
    Two ways to use it, with the same results: iterate over the losses, or over `batches()` with a loop of one's own.

    Updates are "exact" or "stale". Exact: every loss has the bits of the same loop without a pipeline. The rows that
    batch `i` updates and batch `i + 1` looks up are updated first and looked up last; only these are waited for. (How
    much is parted in this way is found by trial, since parting is work.) Stale: batch `i + 1` is looked up before the
    update by batch `i`, so rows are one step old; nothing is waited for.

    Inside the loop the last update may still be running. Checkpoints and copies (`state_dict`, `load_state_dict`,
    `copy.deepcopy`, `torch.save`), `dlrm_rs.quantize`, and lookups under `torch.no_grad` wait for it; before a look at
    a `weight` itself, or a write to it, call `synchronize`. The next batch is looked up again where tables have been
    written to, exchanged, frozen or thawed since (but for writes to `weight.data`, which torch does not count). Where
    stale updates are waited for, a next batch that has not been looked up yet sees them.

    When the loop ends, however it does, all is done; batches that have been loaded ahead are lost then, and the one
    that is being loaded is waited for, two seconds at most (not after Ctrl-C).

    Args:
        model: The model.
        dense_optimizer: Steps the dense layers; None for a loop of one's own.
        loader: Batches, such as a `DataLoader`; iterated over in a thread. For a GPU let it pin them: dense features of
            other memory keep the loop waiting until they are copied.
        loss: `loss(model, batch)` gives the loss to minimize, a scalar. By default the log loss of a model that is
            called with `batch.dense` and `batch.sparse`, as `DLRM` and `dlrm_rs.data.Batch` are.
        updates: "exact" or "stale".
        features: `features(batch)` gives what the collections will be called with: a KeyedJaggedTensor, or a mapping of
            one for each, by their names in the model. By default the one that is in the batch.
        prefetch: Batches that are loaded ahead, at least 1.
        check_finite: End with an error when a gradient has an infinity or a NaN, before it gets into a table; so do
            collections whose optimizer has `check_finite`.
        split_backward: In backward, compute the gradients of linear layers' weights after that of the pooled rows, so
            that tables are updated and looked up meanwhile. Bits are the same, but for the last ones of a weight that
            gets three gradients and more, some of them by other ways than its layer's calls. False to save memory, as
            what these gradients are made of is kept until then, and for what cannot be split: a backward that is
            differentiated itself (`create_graph=True`), CUDA graphs, TorchScript, compiled autograd.
        profile: A file for a trace of the last loop, for chrome://tracing or Perfetto.

    Raises:
        TypeError: `dense_optimizer` is no optimizer, or an option is of another type.
        ValueError: There is no collection, one without a fused optimizer, or an option that cannot be, as a `profile`
            where no file can be written.

    Example:
        >>> import torch, dlrm_rs
        >>> from dlrm_rs.data import ClickLog
        >>> log = ClickLog([1000, 50], batch_size=32, num_batches=5)
        >>> tables = [dlrm_rs.EmbeddingBagConfig(f"t{t}", rows, 8, [f"t{t}"]) for t, rows in enumerate([1000, 50])]
        >>> embeddings = dlrm_rs.EmbeddingBagCollection(tables, optimizer=dlrm_rs.optim.RowWiseAdagrad(lr=0.01))
        >>> model = dlrm_rs.DLRM(embeddings, dense_in_features=13, bottom_mlp=[16, 8], top_mlp=[16, 1])
        >>> dense = [p for name, p in model.named_parameters() if not name.startswith("embeddings.")]
        >>> optimizer = torch.optim.Adam(dense, lr=0.001)
        >>> len([loss.item() for loss in dlrm_rs.Pipeline(model, optimizer, log)])
        5

        A loop of one's own:

        >>> for batch in dlrm_rs.Pipeline(model, None, log).batches():
        ...     optimizer.zero_grad()
        ...     logits = model(batch.dense, batch.sparse).squeeze(1)
        ...     torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels).backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        dense_optimizer: torch.optim.Optimizer | None,
        loader: Iterable[Any] | Dataset[Any],
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        *,
        updates: Literal["exact", "stale"] = "exact",
        features: Callable[[Any], KeyedJaggedTensor | Mapping[str, KeyedJaggedTensor]] | None = None,
        prefetch: int = 2,
        check_finite: bool = False,
        split_backward: bool = True,
        profile: str | Path | None = None,
    ) -> None:
        if updates not in ("exact", "stale"):
            raise ValueError(f"updates: expected 'exact' or 'stale', got {updates!r}")
        if check_size("prefetch", prefetch) < 1:
            raise ValueError(f"prefetch: expected at least 1, got {prefetch}")
        self._collections = _collections(model)
        _check_dense_optimizer(dense_optimizer, self._collections)
        self._model, self._optimizer = model, dense_optimizer
        self._loader = cast(Iterable[Any], loader)  # Python iterates over whatever has items
        self._loss = click_loss if loss is None else loss
        self._updates: Literal["exact", "stale"] = updates
        self._features = find_features if features is None else features
        self._prefetch, self._check_finite, self._profile = prefetch, check_finite, trace_path(profile)
        self._is_split = split_backward
        self._trials = Trials()
        self._run: Run | None = None
        self._timeline = Timeline(None)

    def __iter__(self) -> Generator[Tensor]:
        """Train, and give the loss of every step.

        Raises:
            ValueError: There is no `dense_optimizer`.
            Exception: What failed in a thread, as it was raised there; the note says where.
        """
        if self._optimizer is None:
            raise ValueError("dense_optimizer: expected an optimizer, got None; without one use batches()")
        return self._each(self._train)

    def batches(self) -> Generator[Any]:
        """Give every batch, its rows being looked up, for a loop that runs the model and its backward.

        A batch without a backward updates nothing. Leave its ids as they are until the model has looked them up.

        Raises:
            RuntimeError: A loop over this pipeline, or another over the same tables, is running.
            Exception: What failed in a thread, as it was raised there; the note says where.
        """
        return self._each(lambda batch: batch)

    def _train(self, batch: Any) -> Tensor:
        assert self._optimizer is not None
        self._optimizer.zero_grad()
        loss = self._loss(self._model, batch)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def _each(self, do: Callable[[Any], T]) -> Generator[T]:
        if self._run is not None:
            raise RuntimeError("batches: expected one loop over a pipeline at a time, got a second")
        self._timeline = Timeline(self._profile)
        self._collections = _collections(self._model)  # as it may have others by now
        run = Run(
            self._collections,
            self._loader,
            self._named_features,
            self._timeline,
            is_stale=self._updates == "stale",
            trials=self._trials,
            prefetch=self._prefetch,
            check_finite=self._check_finite,
        )
        patience, is_left, interrupt, split = PATIENCE, False, False, None
        try:
            self._run = run
            split = SplitBackward(linear_layers(self._model) if self._is_split else [])
            run.start()
            while (step := run.next()) is not None:
                split.begin()
                yield do(step.batch)
        except GeneratorExit:
            is_left = True
            raise
        except KeyboardInterrupt:
            patience = 0.0
            run.unlock()
            raise
        finally:
            try:
                while True:
                    try:
                        run.close(patience)
                        break
                    except KeyboardInterrupt:  # the tables are in use until it has ended
                        patience, interrupt = 0.0, True
                        run.unlock()
            finally:
                self._run = None
                if split is not None:
                    split.remove()
                self._timeline.write()
            if interrupt and not is_left:
                raise KeyboardInterrupt
            if interrupt:
                _interrupt_soon()

    def synchronize(self) -> None:
        """Wait until the tables have the update of every batch whose backward has run."""
        if self._run is not None:
            self._run.settle()

    def summary(self) -> Summary:
        """Where the time of the last loop went, and how much of it was hidden; `print` it."""
        return self._timeline.summary(self._updates)

    def _named_features(self, batch: Any) -> Mapping[str, KeyedJaggedTensor]:
        features = self._features(batch)
        found = features if isinstance(features, Mapping) else dict.fromkeys(self._collections, features)
        missing = [name for name in self._collections if name not in found]
        if missing:
            raise ValueError(f"features: expected those of {list(self._collections)}, got none of {missing}")
        others = [found[name] for name in self._collections if not _is_keyed_jagged(found[name])]
        if others:
            raise TypeError(
                "features: expected it to return a KeyedJaggedTensor, or a mapping of one for each collection, got "
                f"{'one of ' if features is found else ''}{type(others[0]).__name__}"
            )
        return found


def _interrupt_soon() -> None:
    """Interrupt the main thread when a generator has been dropped: what is raised while it is Python only prints."""
    main = threading.main_thread().ident
    assert main is not None
    if not callable(signal.getsignal(signal.SIGINT)):
        return  # it would end the process
    threading.Timer(0.01, signal.pthread_kill, [main, signal.SIGINT]).start()


def click_loss(model: nn.Module, batch: Any) -> Tensor:
    """The log loss of clicks.

    Args:
        model: Gives logits `(B, 1)` of dense and sparse features.
        batch: With `dense` `(B, P)`, `sparse` and `labels` `(B,)`.
    """
    device = next((p.device for p in model.parameters() if not p.is_cpu), torch.device("cpu"))
    logits: Tensor = model(batch.dense.to(device, non_blocking=True), batch.sparse)
    labels = batch.labels.to(logits.device, non_blocking=True)
    return nn.functional.binary_cross_entropy_with_logits(logits.squeeze(1), labels)


def find_features(batch: Any) -> KeyedJaggedTensor:
    """The KeyedJaggedTensor of a batch: the batch itself, or the only one in its elements, values or fields.

    Raises:
        ValueError: There is none, or more than one.
    """
    if _is_keyed_jagged(batch):
        found: KeyedJaggedTensor = batch
        return found
    if isinstance(batch, Mapping):
        parts = list(batch.values())
    elif isinstance(batch, tuple | list):
        parts = list(batch)
    elif is_dataclass(batch):
        parts = [getattr(batch, field.name) for field in fields(batch)]
    else:
        parts = list(getattr(batch, "__dict__", {}).values())
    jagged: list[KeyedJaggedTensor] = [part for part in parts if _is_keyed_jagged(part)]
    if len(jagged) != 1:
        raise ValueError(
            f"features: expected one KeyedJaggedTensor in a batch, got {len(jagged)} in {type(batch).__name__}; say by "
            "features= what the collections will be called with"
        )
    return jagged[0]


def _is_keyed_jagged(value: Any) -> bool:
    # TorchRec's by its name: it need not be installed.
    return any(base.__name__ == "KeyedJaggedTensor" for base in type(value).__mro__)


def _collections(model: nn.Module) -> dict[str, EmbeddingBagCollection]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, EmbeddingBagCollection)}
    if not found:
        raise ValueError(
            "model: expected an EmbeddingBagCollection in it, got none; replace_embeddings makes TorchRec's ours"
        )
    for name, collection in found.items():
        if collection.fused_optimizer is None and any(weight.requires_grad for weight in collection._tables.weights()):
            raise ValueError(
                f"model: expected a fused optimizer in collection {name!r}, as one of torch's steps only when backward "
                "has made gradients of all tables; make it with optimizer=dlrm_rs.optim.RowWiseAdagrad(...) or "
                "another, or freeze its weights"
            )
        if collection.fused_optimizer is not None and collection.fused_optimizer.update_at == "step":
            raise ValueError(
                f"model: expected rows of collection {name!r} to move in backward, got update='step', "
                "which waits for step(); make it with update='backward', or train without a pipeline"
            )
        collection._tables.check_unshared(
            f"model: cannot look up collection {name!r} ahead of the other processes' updates; train without a pipeline"
        )
    return found


def _check_dense_optimizer(optimizer: Any, collections: Mapping[str, EmbeddingBagCollection]) -> None:
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"dense_optimizer: expected a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    tables = {id(weight) for collection in collections.values() for weight in collection._tables.weights()}
    if any(id(parameter) in tables for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            "dense_optimizer: expected the dense layers' parameters alone, got weights of tables, which their fused "
            "optimizer updates; leave them out"
        )
