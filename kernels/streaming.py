"""Streaming bandwidth: a copy and a triad that touch every byte once."""

from __future__ import annotations

import torch

from meshwright.kernels.compiler import Pointer, constexpr, jit, launch, tl, uses_kernel
from meshwright.kernels.operands import (
    FLOAT_TYPES,
    accumulation_type,
    require_dense,
    require_device,
    require_shape,
    require_type,
)

__all__ = ["stream_copy", "stream_copy_reference", "stream_triad", "stream_triad_reference"]

# Per program: 256 threads (8 warps of 32) with four 16-byte accesses in flight each, which hides the latency
# of HBM on Ampere and later without asking for high occupancy.
_BLOCK_BYTES = 16 * 1024
_NUM_WARPS = 8


@jit
def _copy_kernel(out_ptr: Pointer, x_ptr: Pointer, num_elements: int, block: constexpr) -> None:
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = offsets < num_elements
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=mask), mask=mask)


@jit
def _triad_kernel(
    out_ptr: Pointer, a_ptr: Pointer, b_ptr: Pointer, scale: float, num_elements: int, block: constexpr
) -> None:
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = offsets < num_elements
    a = tl.load(a_ptr + offsets, mask=mask).to(tl.float32)
    b = tl.load(b_ptr + offsets, mask=mask).to(tl.float32)
    tl.store(out_ptr + offsets, a + scale * b, mask=mask)


def stream_copy(out: torch.Tensor, x: torch.Tensor) -> None:
    """Copy a tensor; reads and writes ``x.nbytes`` each.

    Parameters
    ----------
    out : torch.Tensor
        Written; shape and type of ``x``, contiguous.
    x : torch.Tensor
        bf16, fp16 or fp32, any shape, contiguous. Larger than the last cache to measure memory.

    Raises
    ------
    SpecError
        If a tensor's shape, type, layout or device does not fit.
    CalibrationError
        If the tensors lie on a GPU and Triton is missing.

    Examples
    --------
    >>> x, out = torch.arange(3.0), torch.empty(3)
    >>> stream_copy(out, x)
    >>> out
    tensor([0., 1., 2.])
    """
    if uses_kernel("stream_copy", _check("stream_copy", out=out, x=x)):
        _launch_copy(out, x)
    else:
        stream_copy_reference(out, x)


def stream_copy_reference(out: torch.Tensor, x: torch.Tensor) -> None:
    """Do what :func:`stream_copy` does, in torch."""
    out.copy_(x)


def stream_triad(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """Write ``a + scale * b``, computed in fp32; reads ``2 * a.nbytes`` and writes ``a.nbytes``.

    Parameters
    ----------
    out : torch.Tensor
        Written; shape and type of ``a``, contiguous.
    a, b : torch.Tensor
        bf16, fp16 or fp32, one shape and type, contiguous.
    scale : float
        Factor of ``b``.

    Raises
    ------
    SpecError
        If a tensor's shape, type, layout or device does not fit.
    CalibrationError
        If the tensors lie on a GPU and Triton is missing.

    Notes
    -----
    The triad of the STREAM benchmark  [McCalpin 1995].

    Examples
    --------
    >>> a, b, out = torch.ones(2), torch.tensor([1.0, 2.0]), torch.empty(2)
    >>> stream_triad(out, a, b, scale=0.5)
    >>> out
    tensor([1.5000, 2.0000])
    """
    if uses_kernel("stream_triad", _check("stream_triad", out=out, a=a, b=b)):
        _launch_triad(out, a, b, scale)
    else:
        stream_triad_reference(out, a, b, scale)


def stream_triad_reference(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """Do what :func:`stream_triad` does, in torch and at least in fp32."""
    wide = accumulation_type(a.dtype)
    out.copy_(a.to(wide) + scale * b.to(wide))


def _check(where: str, **tensors: torch.Tensor) -> torch.device:
    first = next(iter(tensors.values()))
    require_type(where, next(iter(tensors)), first, FLOAT_TYPES)
    for name, tensor in tensors.items():
        require_shape(where, name, tensor, first.shape, "one shape for all tensors")
        require_type(where, name, tensor, (first.dtype,))
        require_dense(where, name, tensor)
    return require_device(where, **tensors)


def _launch_copy(out: torch.Tensor, x: torch.Tensor) -> None:
    num_elements, block = x.numel(), _BLOCK_BYTES // x.itemsize
    programs = -(-num_elements // block)
    launch(_copy_kernel, programs, x.device, out, x, num_elements, block=block, num_warps=_NUM_WARPS)


def _launch_triad(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    num_elements, block = a.numel(), _BLOCK_BYTES // a.itemsize
    programs = -(-num_elements // block)
    launch(
        _triad_kernel,
        programs,
        a.device,
        out,
        a,
        b,
        float(scale),
        num_elements,
        block=block,
        num_warps=_NUM_WARPS,
    )
