"""What a kernel costs before it works: a launch that is waited for, one of many in a queue, one inside a graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from meshwright.profiler.device import Device
from meshwright.profiler.gpu_timing import capture, event_times
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.suites.base import Case, Suite, constant

__all__ = ["SUITE"]

_NAME = "launch"
_ROUNDS = 50
# Kernels in one graph, and operations queued before the host waits: far fewer than the queue of a GPU holds.
_NUM_KERNELS = 100


class _LaunchSuite:
    name = _NAME

    def cases(self, device: Device, settings: ProfileSettings) -> Iterator[Case]:
        # A CPU computes as it dispatches, so there it is in the launch time of every operator, and a figure to read.
        dispatch = "software.all.host_launch_latency" if device.is_gpu else "launch.dispatch"
        constants = {"launch.kernel": _kernel_latency, dispatch: _dispatch_time, "launch.graph": _graph_time}
        for name, value in constants.items():
            yield constant(_NAME, name, partial(value, device), expected_seconds=0.1)


SUITE: Suite = _LaunchSuite()


def _kernel_latency(device: Device) -> float:
    """Return the seconds from the launch of a kernel on an idle device until the host knows that it is done."""
    operate, synchronize = _tiny_operation(device), _synchronize(device)

    def once() -> float:
        begin = time.perf_counter()
        operate()
        synchronize()
        return time.perf_counter() - begin

    return _median(once)


def _dispatch_time(device: Device) -> float:
    """Return the seconds the host spends per torch operation that it does not wait for."""
    operate, synchronize = _tiny_operation(device), _synchronize(device)

    def once() -> float:
        begin = time.perf_counter()
        for _ in range(_NUM_KERNELS):
            operate()
        seconds = time.perf_counter() - begin
        synchronize()
        return seconds / _NUM_KERNELS

    return _median(once)


def _graph_time(device: Device) -> float:
    """Return the device's seconds per kernel of a replayed graph."""
    if not device.is_gpu:
        raise NotImplementedError("a CPU has no graphs to replay")
    operate = _tiny_operation(device)

    def operations() -> None:
        for _ in range(_NUM_KERNELS):
            operate()

    replay = capture(operations)
    if replay is None:
        raise NotImplementedError("CUDA graphs are not available")
    return statistics.median(event_times(replay, _ROUNDS, None)) / _NUM_KERNELS


def _tiny_operation(device: Device) -> Callable[[], object]:
    return partial(torch.zeros(1, device=device.torch_name).add_, 1.0)


def _synchronize(device: Device) -> Callable[[], object]:
    return torch.cuda.synchronize if device.is_gpu else lambda: None


def _median(once: Callable[[], float]) -> float:
    for _ in range(3):
        once()
    return statistics.median(once() for _ in range(_ROUNDS))
