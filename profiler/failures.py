"""What an error of a kernel means: no memory, not supported here, broken, or a GPU that is lost."""

from __future__ import annotations

import gc
import re
import sys
from dataclasses import dataclass
from typing import Literal

from meshwright.errors import CalibrationError, ExecutionError
from meshwright.profiler.device import Device

__all__ = ["Failure", "FailureStatus", "describe_failure", "expected_errors", "release_memory"]

FailureStatus = Literal["out_of_memory", "unsupported", "failed"]

# After these errors every call of the process fails, whatever it asks of the GPU.
_STICKY = re.compile(
    r"illegal memory access|illegal address|illegal instruction|misaligned address|device-side assert"
    r"|unspecified launch failure|hardware stack error|invalid program counter|invalid address space"
    r"|launch timed out|uncorrectable|context is destroyed",
    re.IGNORECASE,
)
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)
_UNSUPPORTED = re.compile(
    r"not implemented|not supported|unsupported|not_supported|only supported|supports? only|only supports?"
    r"|does(?: not|n't) support|no kernel image|no available kernel|dtype|data type|scalar ?type"
    r"|compute capability|requires (?:sm|cuda|rocm)|not compiled with|not installed|no module named",
    re.IGNORECASE,
)
_MAX_REASON = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there is no time: ``out_of_memory``, ``unsupported`` by this device or software, or ``failed``."""

    status: FailureStatus
    reason: str


def expected_errors() -> tuple[type[Exception], ...]:
    """Return what a kernel that cannot run raises: torch's errors, Triton's when it is loaded, and Python's own."""
    triton = getattr(sys.modules.get("triton.errors"), "TritonError", None)
    known = (
        ArithmeticError,
        AssertionError,
        AttributeError,
        CalibrationError,
        ImportError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    )
    return known if triton is None else (*known, triton)


def describe_failure(error: Exception) -> Failure:
    """Return what an error of a kernel means, its first line as the reason.

    Raises
    ------
    ExecutionError
        If the error leaves the GPU unusable for this process.
    """
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    reason = reason if len(reason) <= _MAX_REASON else f"{reason[: _MAX_REASON - 3]}..."
    if isinstance(error, RuntimeError) and _STICKY.search(text):
        raise ExecutionError(f"the GPU failed and this process cannot use it any more: {reason}") from None
    if isinstance(error, MemoryError) or _is_out_of_memory(error, text):
        return Failure(status="out_of_memory", reason=reason)
    is_missing = isinstance(error, NotImplementedError | ImportError | CalibrationError)
    if is_missing or _UNSUPPORTED.search(text):
        return Failure(status="unsupported", reason=reason)
    return Failure(status="failed", reason=reason)


def release_memory(device: Device) -> None:
    """Give what nothing refers to any more back to the device."""
    gc.collect()
    if device.is_gpu:
        import torch

        torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception, text: str) -> bool:
    torch_error = getattr(sys.modules.get("torch"), "OutOfMemoryError", None)
    return (torch_error is not None and isinstance(error, torch_error)) or bool(_NO_MEMORY.search(text))
