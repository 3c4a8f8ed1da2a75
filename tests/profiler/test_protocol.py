"""How one function is timed, and what its failures mean; on the CPU, and with a stand-in for the GPU's clock."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from meshwright.errors import CalibrationError, ExecutionError
from meshwright.profiler import protocol, sentinels
from meshwright.profiler.device import Device
from meshwright.profiler.failures import describe_failure, expected_errors
from meshwright.profiler.protocol import (
    Failure,
    MeasureLimits,
    Timing,
    measure,
    median_interval,
    timing_of,
)

torch = pytest.importorskip("torch", reason="needs torch")

CPU = Device(
    type="cpu", name="host", gpu="cpu-host", num_devices=1, num_sms=1, memory_bytes=1e10, l2_bytes=3e7
)
GPU = Device(
    type="cuda",
    name="NVIDIA H200",
    gpu="h200-sxm-141",
    num_devices=1,
    num_sms=132,
    memory_bytes=1.5e11,
    l2_bytes=6e7,
)


def spin(seconds: float) -> Callable[[], None]:
    def function() -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return function


def raising(error: Exception) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


@pytest.mark.parametrize("seconds", [100e-6, 2e-3])
def test_the_time_of_a_function_is_its_cpu_time(seconds: float) -> None:
    timing = measure(spin(seconds), CPU)
    assert isinstance(timing, Timing)
    # A spin ends with the first look at the clock after its time; a call costs a few microseconds more.
    assert seconds <= timing.seconds < 1.5 * seconds + 20e-6
    assert timing.minimum <= timing.p10 <= timing.seconds <= timing.p90
    assert 8 <= timing.repeats <= 200
    assert timing.mode == "cpu"
    assert timing.wall_seconds > timing.repeats * timing.minimum


def test_sleeping_costs_no_cpu_time() -> None:
    waiting = SimpleNamespace(calls=0)

    def function() -> None:
        waiting.calls += 1
        spin(1e-3)()
        time.sleep(2e-3)

    timing = measure(function, CPU, MeasureLimits(num_warm_ups=1, max_repeats=8))
    assert isinstance(timing, Timing)
    assert timing.seconds < 2e-3
    assert waiting.calls == 9


def test_threads_are_restored_even_after_a_failure() -> None:
    before = torch.get_num_threads()
    seen = []
    measure(lambda: seen.append(torch.get_num_threads()), CPU)
    measure(raising(RuntimeError("broken")), CPU)
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


def test_time_grows_with_work() -> None:
    times = []
    for edge in (64, 256):
        a = torch.ones((edge, edge))
        timing = measure(functools.partial(torch.mm, a, a), CPU)
        assert isinstance(timing, Timing)
        times.append(timing.seconds)
    assert times[1] > 4.0 * times[0]


def test_a_slow_function_ends_after_three_repeats() -> None:
    limits = MeasureLimits(num_warm_ups=1, kernel_seconds=10.0, relative_interval=0.0, max_seconds=0.02)
    timing = measure(spin(0.01), CPU, limits)
    assert isinstance(timing, Timing)
    assert timing.repeats == 3


def test_repeats_are_bounded() -> None:
    limits = MeasureLimits(kernel_seconds=10.0, relative_interval=0.0, max_repeats=11)
    timing = measure(spin(10e-6), CPU, limits)
    assert isinstance(timing, Timing)
    assert timing.repeats == 11


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), "out_of_memory"),
        (RuntimeError("HIP out of memory"), "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (NotImplementedError("no such path"), "unsupported"),
        (RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Float8_e4m3fn'"), "unsupported"),
        (
            RuntimeError("torch._scaled_mm is only supported on CUDA devices with capability >= 8.9"),
            "unsupported",
        ),
        (RuntimeError("expected mat1 and mat2 to have the same dtype"), "unsupported"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul"), "unsupported"),
        (RuntimeError("No available kernel. Aborting execution."), "unsupported"),
        (CalibrationError("triton is not installed"), "unsupported"),
        (ModuleNotFoundError("No module named 'flash_attn'"), "unsupported"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "failed"),
        (ValueError("wrong"), "failed"),
        (AttributeError("wrong"), "failed"),
        (ZeroDivisionError(), "failed"),
    ],
)
def test_an_error_is_a_status_and_one_line(error: Exception, status: str) -> None:
    failure = measure(raising(error), CPU)
    assert isinstance(failure, Failure)
    assert failure.status == status
    assert type(error).__name__ in failure.reason
    assert "\n" not in failure.reason


def test_a_reason_is_the_first_line_and_short() -> None:
    failure = describe_failure(RuntimeError(f"\n  first {'x' * 500}\nsecond\n"))
    assert failure.reason.startswith("RuntimeError: first xxx")
    assert len(failure.reason) == 200
    assert describe_failure(ValueError()).reason == "ValueError"


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronous",
        "CUDA error: device-side assert triggered",
        "HIP error: unspecified launch failure",
        "CUDA error: operation not supported on global/shared address space: invalid address space",
    ],
)
def test_an_error_that_loses_the_gpu_is_no_result(message: str) -> None:
    with pytest.raises(ExecutionError, match="cannot use it any more"):
        measure(raising(RuntimeError(message)), CPU)


def test_bugs_and_interrupts_pass() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(interrupt, CPU)


def test_errors_of_triton_are_expected_once_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class TritonError(Exception):
        pass

    monkeypatch.setitem(sys.modules, "triton.errors", SimpleNamespace(TritonError=TritonError))
    assert TritonError in expected_errors()
    failure = measure(raising(TritonError("out of resource: shared memory")), CPU)
    assert isinstance(failure, Failure)


def test_memory_is_released_when_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[Device] = []
    monkeypatch.setattr(protocol, "release_memory", released.append)
    measure(raising(MemoryError()), CPU)
    assert released == [CPU]


def test_the_interval_of_the_median_covers_it_in_19_of_20_cases() -> None:
    import numpy as np

    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        samples = generator.lognormal(size=51)
        ordered = np.sort(samples)
        # The width is between two order statistics around the median; find them back by their distance.
        width = median_interval(list(samples)) * np.median(samples)
        low, high = ordered[17], ordered[33]
        assert width == pytest.approx(high - low, rel=1e-9)
        hits += low <= 1.0 <= high
    assert 0.93 <= hits / 400 <= 0.99


def test_statistics_need_a_repeat() -> None:
    timing = timing_of([3.0, 1.0, 2.0], "eager", 7.0)
    assert (timing.seconds, timing.minimum, timing.repeats, timing.wall_seconds) == (2.0, 1.0, 3, 7.0)
    assert timing.spread == pytest.approx((2.8 - 1.2) / 2.0)
    with pytest.raises(ValueError, match="no repeats"):
        timing_of([], "eager", 0.0)


class FakeGpu:
    """Stands for events and graphs: each call takes the seconds it is told to."""

    def __init__(self, seconds: float, *, can_capture: bool = True) -> None:
        self.seconds = seconds
        self.can_capture = can_capture
        self.captures = 0
        self.replays = 0
        self.buffers: list[object] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(protocol, "flush_buffer", lambda l2_bytes: f"buffer of {l2_bytes:g}")
        monkeypatch.setattr(protocol, "event_times", self.event_times)
        monkeypatch.setattr(protocol, "capture", self.capture)

    def event_times(self, call: Callable[[], object], num_repeats: int, buffer: object) -> list[float]:
        self.buffers.append(buffer)
        for _ in range(num_repeats):
            call()
        return [self.seconds] * num_repeats

    def capture(self, function: Callable[[], object]) -> Callable[[], object] | None:
        self.captures += 1

        def replay() -> None:
            self.replays += 1

        return replay if self.can_capture else None


@pytest.mark.parametrize(
    ("seconds", "can_capture", "is_capturable", "mode"),
    [
        (50e-6, True, True, "graph"),
        (50e-6, False, True, "eager"),
        (50e-6, True, False, "eager"),
        (5e-3, True, True, "eager"),
    ],
)
def test_short_kernels_are_replayed_where_they_can_be(
    monkeypatch: pytest.MonkeyPatch, seconds: float, can_capture: bool, is_capturable: bool, mode: str
) -> None:
    gpu = FakeGpu(seconds, can_capture=can_capture)
    gpu.install(monkeypatch)
    timing = measure(lambda: None, GPU, MeasureLimits(is_capturable=is_capturable))
    assert isinstance(timing, Timing)
    assert (timing.mode, timing.seconds, timing.repeats) == (mode, seconds, 8)
    assert gpu.replays == (8 if mode == "graph" else 0)
    assert set(gpu.buffers) == {"buffer of 6e+07"}


def test_a_call_whose_launch_outlasts_its_kernels_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(1e-3)
    gpu.install(monkeypatch)
    timing = measure(spin(2e-3), GPU, MeasureLimits(num_warm_ups=0))
    assert isinstance(timing, Timing)
    assert timing.mode == "graph"


def test_caches_stay_warm_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(1e-3)
    gpu.install(monkeypatch)
    measure(lambda: None, GPU, MeasureLimits(flushes_cache=False))
    assert set(gpu.buffers) == {None}


def test_what_the_timer_cannot_see_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(0.0).install(monkeypatch)
    failure = measure(lambda: None, GPU)
    assert isinstance(failure, Failure)
    assert failure.status == "failed"


def test_sentinels_without_room_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room() -> Callable[[], object]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    prepared = {
        "large": no_room,
        "small": lambda: spin(1e-5),
        "broken": lambda: raising(ValueError("broken")),
    }
    monkeypatch.setattr(sentinels, "sentinel_functions", lambda device: prepared)
    found = sentinels.measure_sentinels(CPU, MeasureLimits(max_repeats=8))
    assert list(found) == ["small"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_multiplies_and_copies_below_its_data_sheet() -> None:
    from meshwright.hardware_specs.catalog import load_gpu
    from meshwright.profiler.device import discover_device

    device = discover_device("cuda")
    a = torch.ones((4096, 4096), dtype=torch.float16, device="cuda")
    small = torch.ones(1024, device="cuda")
    product, tiny = measure(lambda: a @ a, device), measure(lambda: small.add_(1.0), device)
    assert isinstance(product, Timing)
    assert isinstance(tiny, Timing)
    assert tiny.mode == "graph"
    assert 1e-6 < tiny.seconds < 50e-6
    if device.gpu is not None:
        assert product.seconds > 2.0 * 4096**3 / load_gpu(device.gpu).peak("fp16")
    too_large = measure(lambda: torch.empty(int(2 * device.memory_bytes), device="cuda"), device)
    assert isinstance(too_large, Failure)
    assert too_large.status == "out_of_memory"
