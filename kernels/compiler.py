"""One seam to Triton: kernels compile for the GPU their tensors lie on, and importing never needs Triton.

Where Triton is missing, :func:`jit` returns the plain function, so that the torch references beside the
kernels stay usable; only a GPU tensor asks for the compiler, in :func:`uses_kernel`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import torch

from meshwright.errors import CalibrationError, SpecError

__all__ = ["Kernel", "Pointer", "constexpr", "has_triton", "is_rocm", "jit", "launch", "tl", "uses_kernel"]


class Kernel(Protocol):
    """What Triton makes of a function: launched as ``kernel[grid](*arguments, **options)``."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        """Return the function that launches the kernel over a grid of programs."""
        ...


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_triton = _module("triton")
tl = _module("triton.language")

# Annotations of a kernel's parameters. Triton reads their text, in which "constexpr" is its word for what is
# known when it compiles, and looks the names up, which it only allows for its own.
if TYPE_CHECKING:
    Pointer: TypeAlias = Any
    constexpr: TypeAlias = Any
else:
    Pointer = getattr(tl, "tensor", None)
    constexpr = getattr(tl, "constexpr", None)


def has_triton() -> bool:
    """Return whether Triton is installed."""
    return _triton is not None


def is_rocm() -> bool:
    """Return whether this torch is built for AMD GPUs."""
    return torch.version.hip is not None


def jit(function: Callable[..., None]) -> Kernel:
    """Return the function as a Triton kernel, or unchanged where Triton is missing.

    Parameters
    ----------
    function : Callable
        A module-level function whose globals hold this module's ``tl`` under that name.

    Returns
    -------
    Kernel
        Compiled on its first launch, once per combination of types and constants.
    """
    return cast("Kernel", function if _triton is None else _triton.jit(function))


def uses_kernel(where: str, device: torch.device) -> bool:
    """Return whether tensors of a device go to the Triton kernel (GPU) or to torch (CPU).

    Raises
    ------
    CalibrationError
        If the tensors lie on a GPU and Triton is missing.
    SpecError
        If the device is neither a CPU nor a CUDA or ROCm GPU.
    """
    if device.type == "cpu":
        return False
    if device.type != "cuda":  # torch calls ROCm devices "cuda" as well
        raise SpecError(f"{where}: no kernel for device '{device}'; move the tensors to 'cpu' or 'cuda'")
    if not has_triton():
        raise CalibrationError(
            f"{where}: triton is not installed, and on '{device}' nothing else computes this; "
            "run 'pip install triton' (torch's GPU builds bring it along)"
        )
    return True


def launch(
    kernel: Kernel, num_programs: int, device: torch.device, *arguments: object, **constants: object
) -> None:
    """Queue a kernel on the current stream of a device; return before it has run.

    Parameters
    ----------
    kernel : Kernel
        What :func:`jit` returned.
    num_programs : int
        Size of the one-dimensional grid; nothing is launched for 0.
    device : torch.device
        Where the tensors lie; a CPU only under Triton's interpreter.
    *arguments : object
        Tensors, numbers.
    **constants : object
        Compile-time constants, ``num_warps`` and ``num_stages``.
    """
    if num_programs == 0:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # Said outright, because Triton 3.9 warns that its default will change.
        kernel[(num_programs,)](*arguments, enable_fp_fusion=True, **constants)
