"""Eight fixed shapes, measured again and again during a profile: when they change, the device has."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from meshwright.profiler.device import Device
from meshwright.profiler.failures import Failure, describe_failure, expected_errors
from meshwright.profiler.protocol import MeasureLimits, measure

__all__ = ["drift_of", "measure_sentinels", "sentinel_functions"]

# Edges of square products, and bytes of copies (read plus written): small, middling and memory- or power-bound.
_GPU_EDGES, _GPU_BYTES = (1024, 2048, 4096, 8192), (2**24, 2**26, 2**28, 2**30)
_CPU_EDGES, _CPU_BYTES = (64, 96, 128, 192), (2**16, 2**18, 2**20, 2**22)


def sentinel_functions(device: Device) -> Mapping[str, Callable[[], Callable[[], object]]]:
    """Return what prepares each sentinel, by name."""
    edges, sizes = (_GPU_EDGES, _GPU_BYTES) if device.is_gpu else (_CPU_EDGES, _CPU_BYTES)
    products = {f"gemm.{edge}": _product(device, edge) for edge in edges}
    return products | {f"copy.{size}": _copy(device, size) for size in sizes}


def measure_sentinels(device: Device, limits: MeasureLimits) -> Mapping[str, float]:
    """Return the seconds of each sentinel that could be measured [s]."""
    found = {}
    for name, prepare in sentinel_functions(device).items():
        try:
            function = prepare()
        except expected_errors() as error:
            # A device that others fill may have no room for the largest; says so if the GPU is lost instead.
            describe_failure(error)
            continue
        result = measure(function, device, limits)
        if not isinstance(result, Failure):
            found[name] = result.seconds
    return found


def drift_of(rounds: Mapping[str, list[float]]) -> Mapping[str, float]:
    """Return how far each sentinel has been from its first time, as a share of it.

    Examples
    --------
    >>> drift_of({"gemm.1024": [2.0, 2.5, 1.5, 2.0]})
    {'gemm.1024': 0.25}
    """
    return {name: max(abs(each / times[0] - 1.0) for each in times) for name, times in rounds.items()}


def _product(device: Device, edge: int) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        import torch

        # Every GPU multiplies fp16; a processor without AMX emulates it.
        kind = torch.float16 if device.is_gpu else torch.float32
        a = torch.ones((edge, edge), dtype=kind, device=device.torch_name)
        out = torch.empty_like(a)
        return lambda: torch.mm(a, a, out=out)

    return prepare


def _copy(device: Device, num_bytes: int) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        import torch

        source = torch.ones(num_bytes // 2, dtype=torch.int8, device=device.torch_name)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return prepare
