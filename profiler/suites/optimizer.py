"""Adam steps on one parameter tensor: the fused kernel, and the loop over plain operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from meshwright.profiler.device import Device
from meshwright.profiler.sampling import byte_sizes
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.suites.base import Case, Suite

__all__ = ["SUITE"]

_NAME = "optimizer"
# Parameter, gradient and two moments read, all but the gradient written, 4 bytes each.
_BYTES_PER_PARAMETER = 28
_CACHE_MULTIPLE = 4.0


class _OptimizerSuite:
    name = _NAME

    def cases(self, device: Device, settings: ProfileSettings) -> Iterator[Case]:
        # A processor's caches would hold small states from one repeat to the next, as they never do in training.
        cache = device.l2_bytes
        smallest, largest = (2**20, 2**33) if device.is_gpu else (cache, _CACHE_MULTIPLE * cache)
        # The four tensors take 16 of the 28 bytes; unfused steps need temporary ones beside them.
        sizes = byte_sizes(
            settings.num_points("streaming"), smallest, min(largest, 0.2 * device.memory_bytes)
        )
        for operator, is_fused in (("adam_fused", True), ("adam_unfused", False)):
            for size in sizes:
                num_parameters = size // _BYTES_PER_PARAMETER
                yield Case(
                    suite=_NAME,
                    operator=operator,
                    precision="fp32",
                    shape={"num_bytes": num_parameters * _BYTES_PER_PARAMETER},
                    prepare=partial(_prepare, num_parameters, device, is_fused=is_fused),
                    # The plain loop asks the host for its step count.
                    is_capturable=is_fused,
                )


SUITE: Suite = _OptimizerSuite()


def _prepare(num_parameters: int, device: Device, *, is_fused: bool) -> Callable[[], object]:
    parameter = torch.nn.Parameter(torch.randn(num_parameters, device=device.torch_name))
    parameter.grad = torch.randn_like(parameter)
    # A step count on the device, so that a graph can hold the fused step.
    is_capturable = is_fused and device.is_gpu
    optimizer = torch.optim.AdamW(
        [parameter], lr=1e-6, fused=is_fused, foreach=False, capturable=is_capturable
    )
    optimizer.step()  # allocates the moments
    return optimizer.step
