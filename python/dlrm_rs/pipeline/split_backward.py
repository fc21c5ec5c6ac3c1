"""Backward in two parts: first the gradient that the tables wait for, then those of the dense layers' weights.

Of a linear layer's backward one product, the gradient of its input, is on the way to the pooled rows; the other, the
gradient of its weight, is needed by the dense optimizer alone. Autograd has both in one node, so the tables wait for
all of them. Here they are two nodes, and the second kind runs last: of the nodes that are ready, autograd's engine
takes the one that was made last, so nodes that are made before the first layer runs come after all others. The
products and their order of addition are autograd's own, and so are the bits; but where three and more gradients of one
weight are added, some of them by other ways than its layer's calls, their sum may be rounded in another order. The
inputs of the layers and the gradients of their outputs stay in memory until then.

That weights' gradients can wait is used by "Zero Bubble Pipeline Parallelism" (Qi et al., 2023,
https://arxiv.org/abs/2401.10241) to fill gaps between devices; here the gap is between the device and the tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

__all__ = ["SplitBackward", "linear_layers"]


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Those whose gradients are two products: `nn.Linear` itself, its parameters in no other module."""
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    return [layer for layer in layers if all(uses[id(p)] == 1 for p in layer.parameters())]


class SplitBackward:
    """Layers whose weights' gradients come last in backward.

    A call is split if autograd has it as the product of a matrix with the layer's own weight, plus its bias; others
    (input of three dimensions, weights that are made of others, layers that have been compiled) run as ever.

    Args:
        layers: Of `linear_layers`.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers = layers
        # Before the user's own hooks, which then see what the model goes on with.
        self._hooks = [layer.register_forward_hook(_split, prepend=True) for layer in layers]

    def begin(self) -> None:
        """Make the nodes that come last, of a batch whose first layer has not run yet."""
        with torch.enable_grad():
            for layer in self._layers:
                weight, bias = (layer._parameters.get(name) for name in ("weight", "bias"))
                _last.pop(layer, None)
                if type(weight) is nn.Parameter and weight.requires_grad and type(bias) in (nn.Parameter, type(None)):
                    left = _Left()  # not what has the node: that would be a circle
                    _last[layer] = _Last(weight, bias, _WeightGradient.apply(weight, bias, left), left)

    def remove(self) -> None:
        """Let the layers run as ever."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            _last.pop(layer, None)


class _Left:
    """What a layer's calls leave in backward for the gradients of its weight and bias."""

    def __init__(self) -> None:
        # By the pass of the engine: one that ends at an input never comes to the weights.
        self._by_pass: dict[int, list[_Operands]] = {}

    def put(self, x: Tensor, grad: Tensor, copy: object) -> None:
        """Keep the input of a call and the gradient of its output."""
        stream = torch.cuda.current_stream(grad.device) if grad.is_cuda else None
        operands = _Operands(x, grad, copy, (x._version, grad._version), stream)
        self._by_pass.setdefault(torch._C._current_graph_task_id(), []).append(operands)

    def take(self) -> list[_Operands]:
        """What this pass has left, in its order, for work that is queued from here on.

        Raises:
            RuntimeError: Something of it has been changed in place since.
        """
        left = self._by_pass.pop(torch._C._current_graph_task_id(), [])
        for x, grad, _, versions, stream in left:
            if (x._version, grad._version) != versions:
                raise RuntimeError(
                    "backward: expected a linear layer's input and the gradient of its output as they were, but one "
                    "was changed in place before the gradient of the weight; use Pipeline(..., split_backward=False)"
                )
            if stream is not None and (current := torch.cuda.current_stream(grad.device)) != stream:
                current.wait_stream(stream)
                x.record_stream(current)
                grad.record_stream(current)
        return left


class _Operands(NamedTuple):
    """Of the products of a call."""

    x: Tensor
    grad: Tensor
    copy: object
    """By which calls share one copy of the weight, as `autocast` makes it."""
    versions: tuple[int, int]
    stream: Any


class _Last(NamedTuple):
    """Of a layer in a batch: its parameters, their node, and where that finds what their gradients are made of."""

    weight: Tensor
    bias: Tensor | None
    node: Tensor
    left: _Left


_last: WeakKeyDictionary[nn.Module, _Last] = WeakKeyDictionary()


def _split(layer: nn.Module, args: tuple[Any, ...], out: Any) -> Tensor | None:
    """A hook of forward: a function of this module, so that models can be copied and pickled with it."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or layer not in _last:
        return None
    (x, *others), last = args or (None,), _last[layer]
    copy = None if others else _copy_of_weight(x, last.weight, last.bias, out)
    if copy is None or last.weight.dtype != last.node.dtype:
        if torch.is_grad_enabled():  # all calls in one way, for the order of addition
            del _last[layer]
        return None
    # `.data`, as autograd would take `detach()` for a view, on which no ReLU can work in place.
    split: Tensor = _InputGradient.apply(x, last.weight, last.node, last.left, copy, (out.data,))
    return split


def _copy_of_weight(x: Any, weight: Tensor, bias: Tensor | None, out: Any) -> object | None:
    """What tells the weight's copy that `out` was made with from others, if autograd has it as `x @ weight.t() + bias`.

    None if it has not.
    """
    if not (isinstance(out, Tensor) and _is_row_major(x)):
        return None
    product = out.grad_fn
    if product is None or product.name() != ("MmBackward0" if bias is None else "AddmmBackward0"):
        return None
    *of_bias, (of_x, number), (transposed, _) = product.next_functions
    if transposed is None or transposed.name() != "TBackward0":
        return None
    of_weight = transposed.next_functions[0][0]
    leaves = [(of_weight, weight), *((node, bias) for node, _ in of_bias)]
    if any(getattr(_uncopied(node), "variable", None) is not leaf for node, leaf in leaves):
        return None
    if x.requires_grad and not _is_of(x, of_x, number):
        return None
    return of_weight if _uncopied(of_weight) is not of_weight else object()


def _is_row_major(x: Any) -> bool:
    # Of other matrices autograd takes the products by columns.
    is_matrix = isinstance(x, Tensor) and x.layout is torch.strided and x.dim() == 2 and x.is_floating_point()
    return is_matrix and x.stride() == (x.shape[1], 1)


def _is_of(x: Tensor, node: Any, number: int) -> bool:
    if x.is_leaf:  # a copy of it would be shared with other layers
        return getattr(node, "variable", None) is x
    if node is not None and _uncopied(node) is not node:
        node, number = node.next_functions[0]
    return node is x.grad_fn and number == x.output_nr


def _uncopied(node: Any) -> Any:
    """The node below a conversion."""
    return node.next_functions[0][0] if node is not None and node.name() == "ToCopyBackward0" else node


class _InputGradient(torch.autograd.Function):
    """A linear layer's output, which backward takes to the input alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, node: Tensor, left: _Left, copy: object, out: tuple[Tensor]
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        dtype = out[0].dtype  # that of the products, which `autocast` may have chosen
        ctx.save_for_backward(x.to(dtype), weight.to(dtype) if ctx.needs_input_grad[0] else None)
        ctx.dtype, ctx.left, ctx.copy = x.dtype, left, copy
        return out[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "backward: expected one that is not differentiated itself, got create_graph=True; use "
                "Pipeline(..., split_backward=False)"
            )
        x, weight = ctx.saved_tensors
        x_grad = None
        if grad is not None:
            ctx.left.put(x, grad, ctx.copy)
            x_grad = None if weight is None else grad.mm(weight).to(ctx.dtype)
        return x_grad, None, None, None, None, None


class _WeightGradient(torch.autograd.Function):
    """Nothing in forward; in backward the gradients of weight and bias from what the calls have left."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, left: _Left) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.left, ctx.dtypes = left, (weight.dtype, None if bias is None else bias.dtype)
        return weight.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: None) -> tuple[Tensor | None, ...]:
        calls = ctx.left.take()
        weight, bias = ctx.dtypes
        weights = [(call.copy, call.grad.t().mm(call.x)) for call in calls]
        biases = [(call.copy, call.grad.sum(0)) for call in calls if ctx.needs_input_grad[1]]
        return _total(weights, weight), _total(biases, bias), None


def _total(gradients: list[tuple[object, Tensor]], dtype: torch.dtype) -> Tensor | None:
    """The sum in autograd's order: first those of one copy, then the copies by when their last one came."""
    copies: dict[object, Tensor] = {}
    for copy, gradient in gradients:
        before = copies.pop(copy, None)
        copies[copy] = gradient if before is None else before + gradient
    return reduce(torch.add, [total.to(dtype) for total in copies.values()]) if copies else None
