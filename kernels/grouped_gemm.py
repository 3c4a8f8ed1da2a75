"""Grouped matrix product: tokens sorted by expert, one weight matrix per expert."""

from __future__ import annotations

from typing import NamedTuple

import torch

from meshwright.errors import SpecError
from meshwright.kernels.compiler import Pointer, constexpr, is_rocm, jit, launch, tl, uses_kernel
from meshwright.kernels.operands import (
    FLOAT_TYPES,
    INDEX_TYPES,
    accumulation_type,
    require_dense,
    require_device,
    require_shape,
    require_type,
)

__all__ = ["grouped_gemm", "grouped_gemm_reference"]

# The kernel holds all group sizes in the registers of one program.
_MAX_EXPERTS = 4096
# Row tiles that run side by side over all columns, so that a band's rows and the weights stay in L2.
_BAND_HEIGHT = 8


class _Tile(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int


@jit
def _grouped_gemm_kernel(
    out_ptr: Pointer,
    x_ptr: Pointer,
    weights_ptr: Pointer,
    sizes_ptr: Pointer,
    num_tokens: int,
    n: int,
    k: int,
    num_experts: int,
    x_row_stride: int,
    x_k_stride: int,
    expert_stride: int,
    weight_k_stride: int,
    weight_n_stride: int,
    num_row_tiles: int,
    block_experts: constexpr,
    block_m: constexpr,
    block_n: constexpr,
    block_k: constexpr,
    band_height: constexpr,
    is_k_even: constexpr,
    widen: constexpr,
) -> None:
    program = tl.program_id(0)
    band_size = band_height * tl.cdiv(n, block_n)
    first_row_tile = (program // band_size) * band_height
    height = tl.minimum(num_row_tiles - first_row_tile, band_height)
    row_tile = first_row_tile + (program % band_size) % height
    column_tile = (program % band_size) // height

    # Which expert owns this row tile: every program sums the tile counts itself, all experts at once, so that
    # the host never waits for the sizes.
    experts = tl.arange(0, block_experts)
    sizes = tl.load(sizes_ptr + experts, mask=experts < num_experts, other=0).to(tl.int32)
    sizes = tl.maximum(sizes, 0)
    tiles = (sizes + block_m - 1) // block_m
    expert = tl.sum((tl.cumsum(tiles, 0) <= row_tile).to(tl.int32), 0)
    if expert >= num_experts:  # the grid has room for the most tiles that any sizes can need
        return
    first_row = tl.sum(tl.where(experts < expert, sizes, 0), 0)
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0), 0)
    size = tl.sum(tl.where(experts == expert, sizes, 0), 0)

    rows_of_expert = (row_tile - first_tile) * block_m + tl.arange(0, block_m)
    rows = (first_row + rows_of_expert).to(tl.int64)
    columns = (column_tile * block_n + tl.arange(0, block_n)).to(tl.int64)
    inner = tl.arange(0, block_k)
    # The second test only matters for sizes that sum to more than there are tokens.
    is_row = ((rows_of_expert < size) & (rows < num_tokens))[:, None]
    is_column = (columns < n)[None, :]
    x_ptrs = x_ptr + rows[:, None] * x_row_stride + inner[None, :] * x_k_stride
    weight_ptrs = (
        weights_ptr
        + expert.to(tl.int64) * expert_stride
        + inner[:, None] * weight_k_stride
        + columns[None, :] * weight_n_stride
    )
    total = tl.zeros((block_m, block_n), dtype=tl.float32)
    for step in range(tl.cdiv(k, block_k)):
        if is_k_even:
            x = tl.load(x_ptrs, mask=is_row, other=0.0)
            weight = tl.load(weight_ptrs, mask=is_column, other=0.0)
        else:
            is_inner = inner < k - step * block_k
            x = tl.load(x_ptrs, mask=is_row & is_inner[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=is_inner[:, None] & is_column, other=0.0)
        if widen:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        # "ieee" concerns fp32 inputs alone, which would be rounded to tf32 otherwise.
        total = tl.dot(x, weight, total, input_precision="ieee")
        x_ptrs += block_k * x_k_stride
        weight_ptrs += block_k * weight_k_stride
    tl.store(out_ptr + rows[:, None] * n + columns[None, :], total, mask=is_row & is_column)


def grouped_gemm(x: torch.Tensor, weights: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
    """Multiply each expert's tokens with its weights: ``out[rows of e] = x[rows of e] @ weights[e]``.

    Products are summed in fp32 and rounded once; fp32 inputs are not rounded to tf32. On a GPU nothing waits
    for the group sizes.

    Parameters
    ----------
    x : torch.Tensor
        Tokens sorted by expert (num_tokens, k), bf16, fp16 or fp32, any strides.
    weights : torch.Tensor
        One matrix per expert (num_experts, k, n) of the type of ``x``, any strides: weights stored as
        ``(num_experts, n, k)`` go in transposed.
    group_sizes : torch.Tensor
        Tokens per expert (num_experts,), int32 or int64, contiguous; 0 for an expert without tokens. They sum
        to num_tokens; on a GPU, where a check would wait for the device, rows beyond the sum stay unset.

    Returns
    -------
    torch.Tensor
        Products (num_tokens, n) of the type of ``x``.

    Raises
    ------
    SpecError
        If a tensor's shape, type, layout or device does not fit, or sizes on the CPU do not sum to
        num_tokens.
    CalibrationError
        If the tensors lie on a GPU and Triton is missing.

    Examples
    --------
    >>> x, weights = torch.ones(3, 2), torch.tensor([1.0, 2.0]).reshape(2, 1, 1).expand(2, 2, 1)
    >>> grouped_gemm(x, weights, torch.tensor([1, 2])).flatten()
    tensor([2., 4., 4.])
    """
    where = "grouped_gemm"
    require_shape(where, "x", x, (None, None), "(num_tokens, k)")
    require_shape(where, "weights", weights, (None, x.shape[1], None), "(num_experts, k, n)")
    require_shape(where, "group_sizes", group_sizes, (weights.shape[0],), "(num_experts,)")
    require_type(where, "x", x, FLOAT_TYPES)
    require_type(where, "weights", weights, (x.dtype,))
    require_type(where, "group_sizes", group_sizes, INDEX_TYPES)
    require_dense(where, "group_sizes", group_sizes)
    if not (0 < weights.shape[0] <= _MAX_EXPERTS and weights.shape[1] and weights.shape[2]):
        raise SpecError(
            f"{where}: weights has shape {tuple(weights.shape)}; "
            f"pass 1 to {_MAX_EXPERTS} experts and no empty dim"
        )
    if uses_kernel(where, require_device(where, x=x, weights=weights, group_sizes=group_sizes)):
        return _launch(x, weights, group_sizes)
    return grouped_gemm_reference(x, weights, group_sizes)


def grouped_gemm_reference(x: torch.Tensor, weights: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
    """Do what :func:`grouped_gemm` does, in torch and at least in fp32."""
    sizes = [int(size) for size in group_sizes]
    if min(sizes) < 0 or sum(sizes) != x.shape[0]:
        raise SpecError(
            f"grouped_gemm: group_sizes sum to {sum(sizes)} (least: {min(sizes)}) for {x.shape[0]} tokens; "
            "pass how many rows of x each expert has"
        )
    wide = accumulation_type(x.dtype)
    products = [
        rows.to(wide) @ weight.to(wide) for rows, weight in zip(torch.split(x, sizes), weights, strict=True)
    ]
    return torch.cat(products).to(x.dtype)


def _tile(num_tokens: int, num_experts: int, dtype: torch.dtype) -> _Tile:
    """Return the tile for a mean group: low tiles waste less of the last tile of each group."""
    if dtype == torch.float32:
        # No tensor cores: the operands of a step live in registers, so the tile is small.
        return _Tile(64, 64, 16, 4)
    mean_group = num_tokens / num_experts
    if mean_group <= 16:
        return _Tile(16, 128, 128, 4)
    if mean_group <= 96:
        return _Tile(64, 128, 64, 4)
    return _Tile(128, 128, 64, 8)


def _launch(x: torch.Tensor, weights: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
    (num_tokens, k), (num_experts, _, n) = x.shape, weights.shape
    out = x.new_empty((num_tokens, n))
    tile = _tile(num_tokens, num_experts, x.dtype)
    # Worst case over all sizes: every group but the empty ones ends in a tile of one row.
    num_row_tiles = (num_tokens + min(num_experts, num_tokens) * (tile.block_m - 1)) // tile.block_m
    launch(
        _grouped_gemm_kernel,
        num_row_tiles * -(-n // tile.block_n),
        x.device,
        out,
        x,
        weights,
        group_sizes,
        num_tokens,
        n,
        k,
        num_experts,
        *x.stride(),
        *weights.stride(),
        num_row_tiles,
        block_experts=1 << (num_experts - 1).bit_length(),
        band_height=_BAND_HEIGHT,
        is_k_even=k % tile.block_k == 0,
        # Triton's interpreter, the only way here with a CPU tensor, multiplies bf16 as if it were integers.
        widen=x.device.type == "cpu",
        # Three buffers of 32 KiB fit the shared memory of every NVIDIA GPU since Ampere; CDNA has 64 KiB.
        num_stages=2 if is_rocm() else 3,
        **tile._asdict(),
    )
    return out
