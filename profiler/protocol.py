"""How one function is timed, and what its failure means.

On a GPU: CUDA events around one call (replayed as a CUDA graph when it is short). On a CPU: the process's own CPU time
on one thread, which a neighbour's turns are not in. In both, the caches are flushed before each repeat (on a CPU the
core's own), and repeats go on until the median is known well enough.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from meshwright.profiler.device import Device
from meshwright.profiler.failures import Failure, describe_failure, expected_errors, release_memory
from meshwright.profiler.gpu_timing import capture, event_times, flush_buffer

__all__ = ["Failure", "MeasureLimits", "Timing", "TimingMode", "measure", "median_interval", "timing_of"]

TimingMode = Literal["graph", "eager", "cpu"]
Function = Callable[[], object]

# Twice the cache that one core of a current server has for itself, 1 or 2 MiB.
_CORE_CACHE_BYTES = 2**22
# Repeats queued before the host waits for the GPU, and the GPU time they may take [s].
_BATCH = 8
_BATCH_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureLimits:
    """When a measurement is good enough.

    Parameters
    ----------
    num_warm_ups : int
        Calls before the first that counts.
    min_repeats, max_repeats : int
        Bounds of the repeats.
    relative_interval : float
        Stop when the 95 % confidence interval of the median is narrower than this share of it.
    kernel_seconds : float
        Stop after this much measured time [s].
    graph_below_seconds : float
        Shorter calls are replayed as a CUDA graph [s].
    max_seconds : float
        Of wall time, after which three repeats are enough [s].
    flushes_cache : bool
        Overwrite the GPU's caches before each repeat.
    is_capturable : bool
        Whether a CUDA graph can hold the function; false saves the attempt.
    """

    num_warm_ups: int = 3
    min_repeats: int = 8
    max_repeats: int = 200
    relative_interval: float = 0.01
    kernel_seconds: float = 0.020
    graph_below_seconds: float = 200e-6
    max_seconds: float = 5.0
    flushes_cache: bool = True
    is_capturable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long one call takes.

    Parameters
    ----------
    seconds : float
        Median [s].
    p10, p90, minimum : float
        Of the repeats [s].
    repeats : int
        How many.
    spread : float
        ``(p90 - p10) / seconds``.
    mode : TimingMode
        ``graph`` (replayed), ``eager`` (launched) or ``cpu`` (CPU time of one thread).
    wall_seconds : float
        Everything the measurement took, warm-up included [s].
    """

    seconds: float
    p10: float
    p90: float
    minimum: float
    repeats: int
    spread: float
    mode: TimingMode
    wall_seconds: float


def measure(function: Function, device: Device, limits: MeasureLimits | None = None) -> Timing | Failure:
    """Return how long one call of a function takes, or why it cannot be called.

    Parameters
    ----------
    function : Callable[[], object]
        Launches the work; what it allocates it must let go of.
    device : Device
        Where it runs.
    limits : MeasureLimits | None
        Defaults when None.

    Raises
    ------
    ExecutionError
        If the GPU is left in a state in which nothing runs any more in this process.
    """
    limits = limits or MeasureLimits()
    try:
        timing = _measure_gpu(function, device, limits) if device.is_gpu else _measure_cpu(function, limits)
        if timing.seconds > 0.0:
            return timing
        failure = Failure(status="failed", reason="shorter than the timer can tell")
    except expected_errors() as error:
        failure = describe_failure(error)
    # Only here: the caught error kept the frames alive that hold the tensors.
    if failure.status == "out_of_memory":
        release_memory(device)
    return failure


def timing_of(samples: Sequence[float], mode: TimingMode, wall_seconds: float) -> Timing:
    """Return the statistics of repeated times [s].

    Raises
    ------
    ValueError
        If there are none.
    """
    if not samples:
        raise ValueError("no repeats to summarise")
    p10, median, p90 = (float(value) for value in np.quantile(samples, (0.1, 0.5, 0.9)))
    return Timing(
        seconds=median,
        p10=p10,
        p90=p90,
        minimum=min(samples),
        repeats=len(samples),
        spread=(p90 - p10) / median if median > 0.0 else 0.0,
        mode=mode,
        wall_seconds=wall_seconds,
    )


def median_interval(samples: Sequence[float]) -> float:
    """Return the width of the 95 % confidence interval of the median, as a share of the median.

    Notes
    -----
    Between the order statistics ``(n - 1.96 sqrt(n)) / 2`` and ``1 + (n + 1.96 sqrt(n)) / 2`` [Conover, Practical
    Nonparametric Statistics, 3rd ed., section 3.2], whatever the distribution.

    Examples
    --------
    >>> median_interval([1.0] * 8)
    0.0
    >>> median_interval([0.98, 0.99, 0.99, 1.0, 1.0, 1.01, 1.01, 1.02])
    0.04
    """
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    count = len(ordered)
    margin = 1.96 * count**0.5
    low = max(1, int(np.floor((count - margin) / 2.0)))
    high = min(count, int(np.ceil(1.0 + (count + margin) / 2.0)))
    median = float(np.median(ordered))
    width = float(ordered[high - 1] - ordered[low - 1])
    return round(width / median, 12) if median > 0.0 else 0.0


def _is_enough(samples: Sequence[float], started: float, limits: MeasureLimits) -> bool:
    count = len(samples)
    if count >= limits.max_repeats:
        return True
    if count >= min(3, limits.min_repeats) and time.perf_counter() - started > limits.max_seconds:
        return True
    if count < limits.min_repeats:
        return False
    return sum(samples) >= limits.kernel_seconds or median_interval(samples) < limits.relative_interval


def _measure_gpu(function: Function, device: Device, limits: MeasureLimits) -> Timing:
    import torch

    started = time.perf_counter()
    buffer = flush_buffer(device.l2_bytes) if limits.flushes_cache else None
    for _ in range(limits.num_warm_ups):
        function()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    launch_seconds = time.perf_counter() - begin
    (estimate,) = event_times(function, 1, buffer)
    # A call whose launches outlast its kernels would time the host.
    is_short = estimate < limits.graph_below_seconds or launch_seconds > 0.5 * estimate
    graph = capture(function) if is_short and limits.is_capturable else None
    call = function if graph is None else graph
    batch = min(_BATCH, max(1, int(_BATCH_SECONDS / max(estimate, 1e-9))))
    samples: list[float] = []
    while not _is_enough(samples, started, limits):
        samples += event_times(call, min(batch, limits.max_repeats - len(samples)), buffer)
    return timing_of(samples, "eager" if graph is None else "graph", time.perf_counter() - started)


def _measure_cpu(function: Function, limits: MeasureLimits) -> Timing:
    import torch

    started = time.perf_counter()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Between two calls of a kernel a training step runs others, whose operands leave none of its own in the cache
        # of a core; a cache that all cores share keeps some.
        buffer = torch.empty(_CORE_CACHE_BYTES, dtype=torch.uint8)
        for _ in range(limits.num_warm_ups):
            function()
        samples: list[float] = []
        while not _is_enough(samples, started, limits):
            if limits.flushes_cache:
                buffer.fill_(0)
            samples.append(_cpu_time(function))
    finally:
        torch.set_num_threads(num_threads)
    return timing_of(samples, "cpu", time.perf_counter() - started)


def _cpu_time(function: Function) -> float:
    """Return the CPU seconds of one call."""
    begin = time.process_time()
    function()
    # The clock ticks in nanoseconds: a call that costs none of them is an empty function.
    return max(time.process_time() - begin, 1e-9)
