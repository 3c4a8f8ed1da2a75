"""Residual addition and RMSNorm in one pass over memory."""

from __future__ import annotations

import torch

from meshwright.errors import SpecError
from meshwright.kernels.compiler import Pointer, constexpr, jit, launch, tl, uses_kernel
from meshwright.kernels.operands import (
    FLOAT_TYPES,
    accumulation_type,
    require_dense,
    require_device,
    require_shape,
    require_type,
)

__all__ = ["add_rms_norm", "add_rms_norm_reference"]

# One program holds a whole row in registers: 64 fp32 values per thread at the most.
_MAX_HIDDEN_SIZE = 32768


@jit
def _add_rms_norm_kernel(
    out_ptr: Pointer,
    new_residual_ptr: Pointer,
    x_ptr: Pointer,
    residual_ptr: Pointer,
    weight_ptr: Pointer,
    hidden_size: int,
    epsilon: float,
    block: constexpr,
) -> None:
    columns = tl.arange(0, block)
    mask = columns < hidden_size
    offsets = tl.program_id(0).to(tl.int64) * hidden_size + columns
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    # Rounded before the statistics: the next layer reads the rounded sum.
    rounded = (x + residual).to(new_residual_ptr.dtype.element_ty)
    tl.store(new_residual_ptr + offsets, rounded, mask=mask)
    wide = rounded.to(tl.float32)
    mean_square = tl.sum(wide * wide, 0) / hidden_size
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, wide * tl.rsqrt(mean_square + epsilon) * weight, mask=mask)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a block's output to the residual stream and normalise the sum.

    Statistics and scaling are computed in fp32 from the sum as it is stored; reads ``2 * x.nbytes`` and the
    weight, and writes ``2 * x.nbytes``.

    Parameters
    ----------
    x : torch.Tensor
        Output of the block (num_tokens, hidden_size), bf16, fp16 or fp32, contiguous.
    residual : torch.Tensor
        Residual stream, shape and type of ``x``, contiguous.
    weight : torch.Tensor
        Scale (hidden_size,), bf16, fp16 or fp32, contiguous.
    epsilon : float
        Added to the mean square.

    Returns
    -------
    normalised : torch.Tensor
        ``new_residual * rsqrt(mean(new_residual ** 2) + epsilon) * weight``, shape and type of ``x``.
    new_residual : torch.Tensor
        ``x + residual``, shape and type of ``x``.

    Raises
    ------
    SpecError
        If a tensor's shape, type, layout or device does not fit.
    CalibrationError
        If the tensors lie on a GPU and Triton is missing.

    Notes
    -----
    RMSNorm  [Zhang and Sennrich 2019, eq. 4].

    Examples
    --------
    >>> normalised, new_residual = add_rms_norm(torch.zeros(1, 2), torch.tensor([[3.0, -3.0]]), torch.ones(2))
    >>> normalised
    tensor([[ 1.0000, -1.0000]])
    """
    where = "add_rms_norm"
    require_shape(where, "x", x, (None, None), "(num_tokens, hidden_size)")
    require_shape(where, "residual", residual, x.shape, "the shape of x")
    require_shape(where, "weight", weight, (x.shape[1],), "(hidden_size,)")
    require_type(where, "residual", residual, (x.dtype,))
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight)):
        require_type(where, name, tensor, FLOAT_TYPES)
        require_dense(where, name, tensor)
    if not 0 < x.shape[1] <= _MAX_HIDDEN_SIZE:
        raise SpecError(
            f"{where}: hidden_size is {x.shape[1]}; pass rows of 1 to {_MAX_HIDDEN_SIZE} elements"
        )
    if uses_kernel(where, require_device(where, x=x, residual=residual, weight=weight)):
        return _launch(x, residual, weight, epsilon=epsilon)
    return add_rms_norm_reference(x, residual, weight, epsilon=epsilon)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what :func:`add_rms_norm` does, in torch and at least in fp32."""
    wide = accumulation_type(x.dtype)
    new_residual = (x.to(wide) + residual.to(wide)).to(x.dtype)
    stream = new_residual.to(wide)
    scale = torch.rsqrt(stream.square().mean(dim=-1, keepdim=True) + epsilon)
    return (stream * scale * weight.to(wide)).to(x.dtype), new_residual


def _launch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, hidden_size = x.shape
    out, new_residual = torch.empty_like(x), torch.empty_like(x)
    block = 1 << (hidden_size - 1).bit_length()
    launch(
        _add_rms_norm_kernel,
        num_tokens,
        x.device,
        out,
        new_residual,
        x,
        residual,
        weight,
        hidden_size,
        float(epsilon),
        block=block,
        # 512 elements per warp are two 16-byte accesses per thread in 16 bit; 16 warps fit every GPU.
        num_warps=min(16, max(1, block // 512)),
    )
    return out, new_residual
