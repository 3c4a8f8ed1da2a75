"""Copies: inside the device's memory, from and to pinned host memory, and between two devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from meshwright.profiler.device import Device
from meshwright.profiler.sampling import byte_sizes
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.suites.base import Case, Suite
from meshwright.profiler.suites.operands import main_precision

__all__ = ["SUITE"]

_NAME = "copies"
# A copy in memory must leave the last cache behind to tell the memory's bandwidth.
_CACHE_MULTIPLE = 4.0


class _CopiesSuite:
    name = _NAME

    def cases(self, device: Device, settings: ProfileSettings) -> Iterator[Case]:
        precision = main_precision(device, settings)
        for operator, prepare in _operators(device).items():
            smallest, largest = (
                (2**12, 2.0**31) if device.is_gpu else (2**12, _CACHE_MULTIPLE * device.l2_bytes)
            )
            if operator in ("host_to_device", "device_to_host"):
                largest = 2.0**29  # of pinned memory, which the host can only spare so much of
            largest = min(largest, 0.1 * device.memory_bytes)
            # Bytes cross a link once; in memory they are read and written.
            passes = 2 if operator == "copy" else 1
            for size in byte_sizes(settings.num_points("copies"), smallest, largest):
                yield Case(
                    suite=_NAME,
                    operator=operator,
                    precision=precision,
                    shape={"num_bytes": size},
                    prepare=partial(prepare, size // passes),
                    is_capturable=operator == "copy",
                )


SUITE: Suite = _CopiesSuite()


def _operators(device: Device) -> Mapping[str, Callable[[int], Callable[[], object]]]:
    if not device.is_gpu:
        return {"copy": partial(_copy, "cpu", "cpu")}
    here, there = "cuda:0", "cuda:1"
    found = {
        "copy": partial(_copy, "cuda", "cuda"),
        "host_to_device": partial(_copy, "cpu", "cuda"),
        "device_to_host": partial(_copy, "cuda", "cpu"),
    }
    # Torch queues a copy between devices on the stream of its source, where the events are.
    return found | ({"peer_to_peer": partial(_copy, here, there)} if device.num_devices >= 2 else {})


def _copy(source_name: str, target_name: str, num_bytes: int) -> Callable[[], object]:
    is_pinned = source_name != target_name
    source = torch.ones(num_bytes, dtype=torch.uint8, device=source_name)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=target_name)
    if is_pinned and source_name == "cpu":
        source = source.pin_memory()
    if is_pinned and target_name == "cpu":
        target = target.pin_memory()
    return partial(target.copy_, source, non_blocking=True)
