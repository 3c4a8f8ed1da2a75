"""Bandwidth-bound contention: part of a GPU streams memory while something else is measured beside it."""

from __future__ import annotations

import torch

from meshwright.errors import SpecError
from meshwright.kernels.compiler import Pointer, constexpr, is_rocm, jit, launch, tl, uses_kernel
from meshwright.kernels.operands import require_dense, require_device, require_shape, require_type

__all__ = ["stream_contention", "stream_contention_reference"]

_BLOCK = 4096


@jit
def _contention_kernel(
    out_ptr: Pointer,
    x_ptr: Pointer,
    num_elements: int,
    num_blocks: int,
    num_programs: int,
    num_rounds: int,
    block: constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64)
    for _ in range(num_rounds):
        for index in range(first, num_blocks, num_programs):
            offsets = index * block + tl.arange(0, block)
            mask = offsets < num_elements
            # ".cg" passes L1 by, so that a small share per program still loads L2 and memory.
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
            out = tl.load(out_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(out_ptr + offsets, out + x, mask=mask)


def stream_contention(out: torch.Tensor, x: torch.Tensor, *, num_programs: int, num_rounds: int) -> int:
    """Add ``x`` to ``out`` ``num_rounds`` times on a chosen part of the GPU; return the bytes moved.

    Launched on a side stream it takes bandwidth, and that many SMs (CUs), from what runs beside it. Programs
    are wide enough that the GPU places one per SM while SMs are free; they are not pinned there. Every round
    reads both tensors and writes one, and no round can be left out without changing the result.

    Parameters
    ----------
    out : torch.Tensor
        fp32, contiguous, changed in place.
    x : torch.Tensor
        fp32, the shape of ``out``, contiguous. Larger than the last cache to load memory and not the cache.
    num_programs : int
        SMs to occupy, from 1 to those the GPU has; without meaning on the CPU.
    num_rounds : int
        How often to stream the tensors, at least 0.

    Returns
    -------
    int
        Bytes read plus written [B], ``3 * x.nbytes * num_rounds``.

    Raises
    ------
    SpecError
        If a tensor's shape, type, layout or device does not fit, or a number lies outside its range.
    CalibrationError
        If the tensors lie on a GPU and Triton is missing.

    Examples
    --------
    >>> out = torch.zeros(2)
    >>> stream_contention(out, torch.tensor([1.0, 2.0]), num_programs=1, num_rounds=3)
    72
    >>> out
    tensor([3., 6.])
    """
    where = "stream_contention"
    require_shape(where, "x", x, out.shape, "the shape of out")
    for name, tensor in (("out", out), ("x", x)):
        require_type(where, name, tensor, (torch.float32,))
        require_dense(where, name, tensor)
    if num_programs < 1 or num_rounds < 0:
        raise SpecError(
            f"{where}: num_programs is {num_programs} and num_rounds is {num_rounds}; pass at least 1 and 0"
        )
    if uses_kernel(where, require_device(where, out=out, x=x)):
        num_sms = torch.cuda.get_device_properties(x.device).multi_processor_count
        if num_programs > num_sms:
            raise SpecError(
                f"{where}: num_programs is {num_programs}; pass at most the {num_sms} SMs of {x.device}"
            )
        _launch(out, x, num_programs=num_programs, num_rounds=num_rounds)
    else:
        stream_contention_reference(out, x, num_rounds=num_rounds)
    return 3 * x.nbytes * num_rounds


def stream_contention_reference(out: torch.Tensor, x: torch.Tensor, *, num_rounds: int) -> None:
    """Do what :func:`stream_contention` does, in torch."""
    for _ in range(num_rounds):
        out += x


def _launch(out: torch.Tensor, x: torch.Tensor, *, num_programs: int, num_rounds: int) -> None:
    launch(
        _contention_kernel,
        num_programs,
        x.device,
        out,
        x,
        x.numel(),
        -(-x.numel() // _BLOCK),
        num_programs,
        num_rounds,
        block=_BLOCK,
        # 1024 threads, the most a program may have: two of them never share an SM while another is free.
        num_warps=16 if is_rocm() else 32,
    )
