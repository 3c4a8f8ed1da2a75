"""The optimizer of all runs, its states on the device or in host memory as far as a plan says.

Gradients of states on the host travel there, the host updates its single-precision weights, and the weights travel back
(ZeRO-Offload, Ren et al. 2021, arXiv 2101.06840, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meshwright.profiler.executor.offload import copy_from_host, copy_to_host
from meshwright.profiler.executor.recording import Recorder

__all__ = ["Adamw", "FlatTensor"]

_LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class FlatTensor:
    """Weights of one dimension, and where their gradients are when the optimizer steps."""

    weights: Tensor
    gradients: Callable[[], Tensor]


@dataclass(slots=True)
class _Part:
    """A run of weights, and the single-precision copy that is updated: the weights themselves where they are one."""

    source: FlatTensor
    run: slice
    master: nn.Parameter
    is_on_host: bool

    @property
    def weights(self) -> Tensor:
        return self.source.weights[self.run]


class Adamw:
    """AdamW as Llama 2 was trained (arXiv 2307.09288, section 2.2).

    Its epsilon keeps a gradient that is zero but for rounding from becoming a whole step.

    Parameters
    ----------
    tensors : Sequence[FlatTensor]
        What is updated.
    host_share : float
        Share of each tensor's states that rests on the host, from its first element on, 0 to 1.
    recorder : Recorder
        Counts the copies.
    """

    def __init__(self, tensors: Sequence[FlatTensor], host_share: float, recorder: Recorder) -> None:
        self._recorder = recorder
        self._parts: list[_Part] = []
        for each in tensors:
            size = each.weights.numel()
            num_on_host = round(host_share * size)
            if num_on_host:
                self._parts.append(_part(each, slice(0, num_on_host), is_on_host=True))
            if num_on_host < size or not size:
                self._parts.append(_part(each, slice(num_on_host, size), is_on_host=False))
        self._optimizer = torch.optim.AdamW(
            [part.master for part in self._parts],
            lr=_LEARNING_RATE,
            betas=(0.9, 0.95),
            eps=1e-5,
            weight_decay=0.1,
            # One pass over the states, on a CPU too (from Torch 2.4): what the optimizer is priced as.
            fused=True,
        )

    def step(self) -> None:
        """Update the weights."""
        for part in self._parts:
            gradients = part.source.gradients()[part.run]
            if part.is_on_host:
                gradients = copy_to_host(gradients, self._recorder)
            part.master.grad = gradients
        self._optimizer.step()
        for part in self._parts:
            if part.is_on_host:
                copy_from_host(part.weights, part.master, self._recorder)
            elif part.master.dtype != part.weights.dtype:
                part.weights.copy_(part.master.detach())


def _part(source: FlatTensor, run: slice, *, is_on_host: bool) -> _Part:
    held = source.weights[run].detach()
    if is_on_host:
        held = held.to("cpu", torch.float32, copy=True)
    return _Part(source, run, nn.Parameter(held.float()), is_on_host)
