"""How much a matrix product slows down while something else uses the memory, or links and SMs, beside it."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.cuda import nccl

from meshwright.kernels.compiler import has_triton
from meshwright.kernels.contention import stream_contention
from meshwright.profiler.device import Device
from meshwright.profiler.gpu_timing import event_times
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.suites.base import Case, Suite, constant
from meshwright.profiler.suites.gemm import prepare_product
from meshwright.profiler.suites.operands import half_precision
from meshwright.profiler.suites.streams import new_event, new_stream, seconds_between

__all__ = ["SUITE"]

_NAME = "contention"
_GPU_EDGE, _CPU_EDGE = 4096, 192
_GPU_BYTES, _CPU_BYTES = 2**28, 2**24
_ROUNDS = 5
# How long the product runs alone [s]; what runs beside it is queued for this many times as long.
_SPAN = 0.02
_LONGER = 4.0
# NCCL takes some SMs of many; as many stream memory when there is no second GPU to talk to.
_SM_SHARE = 8
# Fewer launches than the queue of a GPU holds.
_MAX_WORKS = 500


class _ContentionSuite:
    name = _NAME

    def cases(self, device: Device, settings: ProfileSettings) -> Iterator[Case]:
        yield constant(_NAME, "contention.copy", partial(_slowdown, device, _copy), 1.0)
        if device.is_gpu and has_triton():
            yield constant(_NAME, "contention.stream", partial(_slowdown, device, _stream), 1.0)
        if device.is_gpu and device.num_devices >= 2:
            yield constant(_NAME, "software.all.fsdp_contention", partial(_all_reduce_cost, device), 3.0)


SUITE: Suite = _ContentionSuite()


def _slowdown(device: Device, neighbour: Callable[[Device], Callable[[], object]]) -> float:
    """Return the product's time beside a neighbour over its time alone."""
    edge = _GPU_EDGE if device.is_gpu else _CPU_EDGE
    precision = half_precision(device) if device.is_gpu else "fp32"
    product = prepare_product("gemm", precision, {"m": edge, "n": edge, "k": edge}, device)
    work = neighbour(device)
    if not device.is_gpu:
        return _cpu_slowdown(product, work)
    calls = max(1, round(_SPAN / _seconds_per_call(product)))
    alone = statistics.median(_seconds_per_call(product, calls) for _ in range(_ROUNDS))
    beside = statistics.median(_beside(product, calls, work, alone * calls) for _ in range(_ROUNDS))
    return beside / calls / alone


def _beside(product: Callable[[], object], calls: int, work: Callable[[], object], alone: float) -> float:
    """Return the seconds of the product while a side stream is busy all along."""
    side = new_stream("cuda")
    num_works = max(1, round(_LONGER * alone / _seconds_per_call(work)))
    while True:
        start, end, last = new_event(), new_event(), new_event()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for _ in range(num_works):
                work()
            last.record()
        start.record()
        for _ in range(calls):
            product()
        end.record()
        torch.cuda.synchronize()
        if seconds_between(end, last) > 0.0 or num_works > _MAX_WORKS:
            return seconds_between(start, end)
        num_works *= 2


def _all_reduce_cost(device: Device) -> float:
    """Return the extra seconds of compute per second of an all-reduce over all GPUs of the node that it hides.

    One process drives all GPUs; the product runs on the first, twice as long as the all-reduce takes alone.
    """
    indices = range(device.num_devices)
    buffers = [torch.ones(_GPU_BYTES // 2, dtype=torch.float16, device=f"cuda:{index}") for index in indices]
    streams = [new_stream(f"cuda:{index}") for index in indices]

    def reduce() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = new_event(), new_event()
        start.record(streams[0])
        nccl.all_reduce(buffers, streams=streams)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        end.record(streams[0])
        return start, end

    def synchronize() -> None:
        for index in indices:
            torch.cuda.synchronize(index)

    def alone() -> float:
        start, end = reduce()
        synchronize()
        return seconds_between(start, end)

    alone()  # builds the communicator
    communication = statistics.median(alone() for _ in range(_ROUNDS))
    edges = {"m": _GPU_EDGE, "n": _GPU_EDGE, "k": _GPU_EDGE}
    product = prepare_product("gemm", half_precision(device), edges, device)
    calls = max(1, round(2.0 * communication / _seconds_per_call(product)))
    compute = statistics.median(_seconds_per_call(product, calls) * calls for _ in range(_ROUNDS))
    costs = []
    for _ in range(_ROUNDS):
        begin, finish = new_event(), new_event()
        synchronize()
        _, end = reduce()
        begin.record()
        for _ in range(calls):
            product()
        finish.record()
        synchronize()
        # What of the all-reduce is left when the products are done was not hidden.
        hidden = communication - max(0.0, seconds_between(finish, end))
        if hidden > 0.0:
            costs.append((seconds_between(begin, finish) - compute) / hidden)
    if not costs:
        raise RuntimeError("the all-reduce did not run beside the products")
    return max(0.0, statistics.median(costs))


def _seconds_per_call(function: Callable[[], object], calls: int = 3) -> float:
    """Return the device's seconds per call, after one that does not count."""

    def batch() -> None:
        for _ in range(calls):
            function()

    function()
    return max(event_times(batch, 1, None)[0] / calls, 1e-7)


def _copy(device: Device) -> Callable[[], object]:
    source = torch.ones(
        _GPU_BYTES if device.is_gpu else _CPU_BYTES, dtype=torch.uint8, device=device.torch_name
    )
    return partial(torch.empty_like(source).copy_, source)


def _stream(device: Device) -> Callable[[], object]:
    x = torch.ones(_GPU_BYTES // 4, dtype=torch.float32, device=device.torch_name)
    num_programs = max(1, device.num_sms // _SM_SHARE)
    return partial(stream_contention, torch.zeros_like(x), x, num_programs=num_programs, num_rounds=1)


def _cpu_slowdown(product: Callable[[], object], work: Callable[[], object]) -> float:
    """Return the slow-down by the wall clock while a thread works on another core."""

    def seconds() -> float:
        begin = time.perf_counter()
        for _ in range(_ROUNDS):
            product()
        return time.perf_counter() - begin

    with _one_thread():
        seconds()
        alone = statistics.median(seconds() for _ in range(_ROUNDS))
        is_over = threading.Event()

        def neighbour() -> None:
            torch.set_num_threads(1)
            while not is_over.is_set():
                work()

        thread = threading.Thread(target=neighbour, daemon=True)
        thread.start()
        try:
            beside = statistics.median(seconds() for _ in range(_ROUNDS))
        finally:
            is_over.set()
            thread.join()
    return beside / alone


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
