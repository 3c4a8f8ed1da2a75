"""Launch latency: a kernel that does nothing."""

from __future__ import annotations

import torch

from meshwright.kernels.compiler import Pointer, jit, launch, uses_kernel

__all__ = ["empty_launch"]


@jit
def _empty_kernel(x_ptr: Pointer) -> None:
    pass


def empty_launch(x: torch.Tensor) -> None:
    """Launch one program that leaves a tensor alone.

    What a kernel costs before it works. Seen from the host it includes Triton's own launcher; on the device
    (between events, or replayed in a CUDA graph) it is the floor under every other kernel. On a CPU tensor
    there is nothing to launch, and the call returns at once.

    Parameters
    ----------
    x : torch.Tensor
        Any tensor; names the device, and is passed as the kernel's one argument.

    Raises
    ------
    SpecError
        If the device is neither a CPU nor a CUDA or ROCm GPU.
    CalibrationError
        If the tensor lies on a GPU and Triton is missing.
    """
    if uses_kernel("empty_launch", x.device):
        _launch(x)


def _launch(x: torch.Tensor) -> None:
    launch(_empty_kernel, 1, x.device, x, num_warps=1)
