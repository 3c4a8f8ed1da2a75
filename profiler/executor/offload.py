"""Copies to host memory and back, each counted under the axis ``host``; on a CPU both are the same memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from meshwright.profiler.executor.recording import Recorder

__all__ = ["copy_from_host", "copy_to_host", "offloads_input"]

_HOST = torch.device("cpu")


def copy_to_host(tensor: Tensor, recorder: Recorder) -> Tensor:
    """Return a copy in host memory."""
    with _counted(recorder, "to_host", tensor):
        return tensor.detach().to(_HOST, copy=True)


def copy_from_host(target: Tensor, tensor: Tensor, recorder: Recorder) -> None:
    """Fill a tensor of the device from one in host memory, in the device's precision."""
    with _counted(recorder, "from_host", target):
        target.copy_(tensor.detach().to(target.dtype))


def offloads_input(x: Tensor, recorder: Recorder) -> saved_tensors_hooks:
    """Return the context in which a layer's input, once saved for backward, rests on the host until then."""

    def pack(saved: Tensor) -> Any:
        # What else is saved, such as tables of positions, all layers share.
        if saved.data_ptr() != x.data_ptr() or saved.shape != x.shape:
            return saved
        return copy_to_host(saved, recorder), torch.empty_like(saved, device="meta"), saved.device

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        on_host, shape, device = packed
        back = torch.empty_like(shape, device=device)
        copy_from_host(back, on_host, recorder)
        return back

    return saved_tensors_hooks(pack, unpack)


def _counted(recorder: Recorder, operation: str, tensor: Tensor) -> Any:
    return recorder.sending("host", operation, tensor.numel() * tensor.element_size(), "host memory")
