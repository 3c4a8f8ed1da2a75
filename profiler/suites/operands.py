"""Number formats on a device, and tensors to compute with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from meshwright.profiler.device import Device
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.suites.base import Case

__all__ = [
    "dtype_of",
    "half_precision",
    "lacks",
    "main_precision",
    "normal",
    "unsupported",
    "wanted_precisions",
]

# Least compute capability with units of a format; those not listed run everywhere.
_LEAST_CAPABILITY: Mapping[str, tuple[int, int]] = {"bf16": (8, 0), "tf32": (8, 0), "fp8": (8, 9)}
_FP8_ROCM = ("gfx942", "gfx950", "gfx1200", "gfx1201")
_DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}


def lacks(device: Device, precision: str) -> str | None:
    """Return why a number format cannot be measured on a device; None when it can."""
    if device.type == "cpu":
        return f"a CPU has no {precision} units" if precision in ("fp8", "tf32") else None
    if device.type == "rocm":
        if precision == "tf32":
            # Without HIPBLASLT_ALLOW_TF32 torch computes in fp32 and says nothing.
            return "tf32 on ROCm depends on an environment variable"
        architecture = _architecture(device)
        return (
            f"{architecture} has no fp8 units"
            if precision == "fp8" and architecture not in _FP8_ROCM
            else None
        )
    text = device.software.get("compute_capability", "0.0")
    major, _, minor = text.partition(".")
    if (int(major), int(minor)) < _LEAST_CAPABILITY.get(precision, (0, 0)):
        return f"compute capability {text} has no {precision} units"
    return None


def half_precision(device: Device) -> str:
    """Return the 16-bit format that models run in on a device."""
    return "fp16" if lacks(device, "bf16") else "bf16"


def main_precision(device: Device, settings: ProfileSettings) -> str:
    """Return the format of everything that is measured in one: 16 bits unless they are not asked for."""
    half, asked = half_precision(device), wanted_precisions(device, settings)
    return next((each for each in (half, "fp16", "fp32") if each in asked), half)


def wanted_precisions(device: Device, settings: ProfileSettings) -> tuple[str, ...]:
    """Return the formats to try; who asks for bf16 means fp16 on a device without it."""
    half = half_precision(device)
    extra = (half,) if "bf16" in settings.precisions and half not in settings.precisions else ()
    return (*extra, *settings.precisions)


def dtype_of(precision: str, device: Device) -> torch.dtype:
    """Return torch's type of a format; CDNA3 has an fp8 of its own."""
    if precision == "fp8" and _architecture(device) == "gfx942":
        return torch.float8_e4m3fnuz
    return _DTYPES[precision]


def normal(size: tuple[int, ...], precision: str, device: Device) -> torch.Tensor:
    """Return normal random numbers: power, and so the clock, depends on how many bits change."""
    dtype = dtype_of(precision, device)
    if dtype.itemsize > 1:
        return torch.empty(size, dtype=dtype, device=device.torch_name).normal_()
    return torch.empty(size, dtype=torch.bfloat16, device=device.torch_name).normal_().to(dtype)


def unsupported(suite: str, operator: str, precision: str, shape: Mapping[str, float], reason: str) -> Case:
    """Return the case that becomes the one row that says why a format is not measured."""

    def prepare() -> Callable[[], object]:
        raise NotImplementedError(reason)

    return Case(suite=suite, operator=operator, precision=precision, shape=shape, prepare=prepare)


def _architecture(device: Device) -> str:
    return device.software.get("architecture", "").partition(":")[0]
