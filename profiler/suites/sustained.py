"""Burst against sustained: what power and temperature leave of the clock after seconds of dense products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from meshwright.profiler.device import Device, device_state
from meshwright.profiler.gpu_timing import event_times
from meshwright.profiler.nvidia import DeviceState
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.suites.base import Case, Suite, constant
from meshwright.profiler.suites.gemm import prepare_product
from meshwright.profiler.suites.operands import half_precision, lacks, wanted_precisions

__all__ = ["SUITE"]

_NAME = "sustained"
_GPU_EDGE, _CPU_EDGE = 8192, 192
# Products between two readings of the clock [s]; the first of them is the burst, after a pause.
_BATCH_SECONDS = 0.05
_PAUSE_SECONDS = 0.5
_MAX_CPU_SECONDS = 1.0


class _SustainedSuite:
    name = _NAME

    def cases(self, device: Device, settings: ProfileSettings) -> Iterator[Case]:
        seconds = settings.sustained_seconds
        if not device.is_gpu:
            seconds = min(seconds, _MAX_CPU_SECONDS)
        # Calibrations know two clocks: of the 16-bit formats, under the name of bf16, and of the narrow ones.
        for name, precision in (("bf16", half_precision(device)), ("fp8", "fp8")):
            if lacks(device, precision) or precision not in wanted_precisions(device, settings):
                continue
            observation = _Observation(device, precision, seconds)
            yield constant(_NAME, f"sustained_clock.{name}", observation.clock, seconds + 1.0)
            if device.is_gpu:
                for field in ("sm_clock_hertz", "power_watts", "temperature_celsius"):
                    for moment in ("before", "after"):
                        reading = partial(observation.reading, moment, field)
                        yield constant(_NAME, f"sustained.{name}.{field}.{moment}", reading, 0.0)


SUITE: Suite = _SustainedSuite()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Course:
    """Rates of successive batches [1/s], and the state of the device around them."""

    rates: list[float]
    before: DeviceState
    after: DeviceState


class _Observation:
    """Some seconds of one product back to back, made once, whichever of its numbers is asked for first."""

    def __init__(self, device: Device, precision: str, seconds: float) -> None:
        self._device = device
        self._precision = precision
        self._seconds = seconds

    def clock(self) -> float:
        """Return the rate of the last half over that of the first batch."""
        rates = self._course.rates
        return statistics.median(rates[len(rates) // 2 :]) / rates[0]

    def reading(self, moment: str, field: str) -> float:
        """Return what the device read of itself before or at the end."""
        value: float | None = getattr(getattr(self._course, moment), field)
        if value is None:
            raise NotImplementedError(f"{field} is not readable")
        return value

    @cached_property
    def _course(self) -> _Course:
        edge = _GPU_EDGE if self._device.is_gpu else _CPU_EDGE
        shape = {"m": edge, "n": edge, "k": edge}
        product = prepare_product("gemm", self._precision, shape, self._device)
        run = _gpu_seconds if self._device.is_gpu else _cpu_seconds
        for _ in range(3):
            estimate = run(product, 1)
        calls = max(1, round(_BATCH_SECONDS / max(estimate, 1e-7)))
        if self._device.is_gpu:
            time.sleep(_PAUSE_SECONDS)
        before = device_state(self._device)
        rates: list[float] = []
        end = time.perf_counter() + self._seconds
        while len(rates) < 2 or time.perf_counter() < end:
            rates.append(calls / run(product, calls))
        return _Course(rates=rates, before=before, after=device_state(self._device))


def _gpu_seconds(product: Callable[[], object], calls: int) -> float:
    def batch() -> None:
        for _ in range(calls):
            product()

    return event_times(batch, 1, None)[0]


def _cpu_seconds(product: Callable[[], object], calls: int) -> float:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        begin = time.process_time()
        for _ in range(calls):
            product()
        return max(time.process_time() - begin, 1e-9)
    finally:
        torch.set_num_threads(num_threads)
