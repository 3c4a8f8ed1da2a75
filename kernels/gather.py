"""Row gathers: by index as an embedding does, or by a fixed stride."""

from __future__ import annotations

import torch

from meshwright.errors import SpecError
from meshwright.kernels.compiler import Pointer, constexpr, jit, launch, tl, uses_kernel
from meshwright.kernels.operands import (
    FLOAT_TYPES,
    INDEX_TYPES,
    require_dense,
    require_device,
    require_shape,
    require_type,
)

__all__ = ["gather_rows", "gather_rows_reference", "strided_gather", "strided_gather_reference"]

# Elements per program: long rows are cut, short ones bundled, so that every program moves a few KiB.
_BLOCK_ELEMENTS = 4096
_MAX_BLOCK_COLUMNS = 2048
_NUM_WARPS = 8


@jit
def _gather_kernel(
    out_ptr: Pointer,
    x_ptr: Pointer,
    indices_ptr: Pointer,
    num_out: int,
    num_rows: int,
    row_width: int,
    stride: int,
    has_indices: constexpr,
    block_rows: constexpr,
    block_columns: constexpr,
) -> None:
    num_column_blocks = tl.cdiv(row_width, block_columns)
    row_block = tl.program_id(0) // num_column_blocks
    column_block = tl.program_id(0) % num_column_blocks
    rows = row_block.to(tl.int64) * block_rows + tl.arange(0, block_rows)
    columns = column_block * block_columns + tl.arange(0, block_columns)
    is_wanted = rows < num_out
    if has_indices:
        sources = tl.load(indices_ptr + rows, mask=is_wanted, other=0).to(tl.int64)
    else:
        sources = rows * stride
    is_inside = is_wanted & (sources >= 0) & (sources < num_rows)
    is_column = (columns < row_width)[None, :]
    values = tl.load(
        x_ptr + sources[:, None] * row_width + columns[None, :],
        mask=is_inside[:, None] & is_column,
        other=0.0,
    )
    tl.store(
        out_ptr + rows[:, None] * row_width + columns[None, :], values, mask=is_wanted[:, None] & is_column
    )


def gather_rows(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the rows of a table that indices name: ``out[i] = x[indices[i]]``.

    Parameters
    ----------
    x : torch.Tensor
        Table (num_rows, row_width), bf16, fp16 or fp32, contiguous.
    indices : torch.Tensor
        int32 or int64 (num_out,), contiguous, each in ``0 .. num_rows - 1``. On a GPU a row outside reads as
        zeros: a check would wait for the device.

    Returns
    -------
    torch.Tensor
        Rows (num_out, row_width) of the table's type.

    Raises
    ------
    SpecError
        If a tensor's shape, type, layout or device does not fit, or an index on the CPU lies outside.
    CalibrationError
        If the tensors lie on a GPU and Triton is missing.

    Examples
    --------
    >>> gather_rows(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([1, 1, 0]))
    tensor([[2., 3.],
            [2., 3.],
            [0., 1.]])
    """
    where = "gather_rows"
    _check_table(where, x)
    require_shape(where, "indices", indices, (None,), "(num_out,)")
    require_type(where, "indices", indices, INDEX_TYPES)
    require_dense(where, "indices", indices)
    if uses_kernel(where, require_device(where, x=x, indices=indices)):
        return _launch(x, indices, stride=1, num_out=indices.numel())
    return gather_rows_reference(x, indices)


def gather_rows_reference(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Do what :func:`gather_rows` does, in torch."""
    is_outside = (indices < 0) | (indices >= x.shape[0])
    if is_outside.any():
        first = int(indices[is_outside][0])
        raise SpecError(f"gather_rows: indices holds {first}; pass rows 0 to {x.shape[0] - 1} of x")
    return x.index_select(0, indices)


def strided_gather(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Return every ``stride``-th row of a table: ``out[i] = x[i * stride]``.

    With rows narrower than a memory transaction this reads ``min(stride, transaction / row)`` times the bytes
    it uses.

    Parameters
    ----------
    x : torch.Tensor
        Table (num_rows, row_width), bf16, fp16 or fp32, contiguous.
    stride : int
        Rows from one to the next, at least 1.

    Returns
    -------
    torch.Tensor
        Rows (ceil(num_rows / stride), row_width) of the table's type.

    Raises
    ------
    SpecError
        If the table's shape, type or layout does not fit, or the stride is below 1.
    CalibrationError
        If the table lies on a GPU and Triton is missing.

    Examples
    --------
    >>> strided_gather(torch.arange(5.0).reshape(5, 1), stride=2).flatten()
    tensor([0., 2., 4.])
    """
    where = "strided_gather"
    _check_table(where, x)
    if stride < 1:
        raise SpecError(f"{where}: stride is {stride}; pass at least 1")
    if uses_kernel(where, x.device):
        return _launch(x, None, stride=stride, num_out=-(-x.shape[0] // stride))
    return strided_gather_reference(x, stride)


def strided_gather_reference(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Do what :func:`strided_gather` does, in torch."""
    return x[::stride].contiguous()


def _check_table(where: str, x: torch.Tensor) -> None:
    require_shape(where, "x", x, (None, None), "(num_rows, row_width)")
    require_type(where, "x", x, FLOAT_TYPES)
    require_dense(where, "x", x)


def _launch(x: torch.Tensor, indices: torch.Tensor | None, *, stride: int, num_out: int) -> torch.Tensor:
    num_rows, row_width = x.shape
    out = x.new_empty((num_out, row_width))
    block_columns = min(1 << max(row_width - 1, 0).bit_length(), _MAX_BLOCK_COLUMNS)
    block_rows = _BLOCK_ELEMENTS // block_columns
    launch(
        _gather_kernel,
        -(-num_out // block_rows) * -(-row_width // block_columns),
        x.device,
        out,
        x,
        x if indices is None else indices,  # any pointer will do where none is read
        num_out,
        num_rows,
        row_width,
        stride,
        has_indices=indices is not None,
        block_rows=block_rows,
        block_columns=block_columns,
        num_warps=_NUM_WARPS,
    )
    return out
