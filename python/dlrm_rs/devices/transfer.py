"""The copy of pooled rows to a device as a differentiable operation, for a plain training loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dlrm_rs.devices.device import Device

__all__ = ["to_device"]


def to_device(rows: Tensor, device: Device) -> Tensor:
    """Pooled rows on the device, ready for the work that is queued from here on.

    Args:
        rows: On the host, from `device.outputs`.
        device: Where to.
    """
    out: Tensor = _ToDevice.apply(rows, device)
    return out


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, device: Device) -> Tensor:
        sent = device.send(rows.detach())
        ctx.device, ctx.sent = device, sent
        # Not the tensor that `sent` has: graph and tensor would keep each other until Python's collector comes.
        return sent.tensor().detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.device.fetch(grad, grad.dtype, ctx.sent).wait(), None
