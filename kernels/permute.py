"""Token dispatch: rows sorted by expert, and back with routing weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meshwright.errors import SpecError
from meshwright.kernels.compiler import Pointer, constexpr, jit, launch, tl, uses_kernel
from meshwright.kernels.operands import (
    FLOAT_TYPES,
    INDEX_TYPES,
    accumulation_type,
    require_dense,
    require_device,
    require_shape,
    require_type,
)

__all__ = [
    "ExpertOrder",
    "expert_order",
    "permute_tokens",
    "permute_tokens_reference",
    "unpermute_tokens",
    "unpermute_tokens_reference",
]

_MAX_BLOCK = 2048
_NUM_WARPS = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertOrder:
    """Where each choice of each token goes when rows are sorted by expert.

    Parameters
    ----------
    destinations : torch.Tensor
        Row of each choice (num_tokens, top_k), int64: a permutation of ``0 .. num_tokens * top_k - 1``.
    group_sizes : torch.Tensor
        Rows per expert (num_experts,), int64, as :func:`meshwright.kernels.grouped_gemm.grouped_gemm` takes
        them.
    """

    destinations: torch.Tensor
    group_sizes: torch.Tensor


@jit
def _permute_kernel(
    rows_ptr: Pointer,
    x_ptr: Pointer,
    destinations_ptr: Pointer,
    hidden_size: int,
    top_k: constexpr,
    block: constexpr,
) -> None:
    num_column_blocks = tl.cdiv(hidden_size, block)
    token = (tl.program_id(0) // num_column_blocks).to(tl.int64)
    columns = (tl.program_id(0) % num_column_blocks) * block + tl.arange(0, block)
    mask = columns < hidden_size
    values = tl.load(x_ptr + token * hidden_size + columns, mask=mask)
    for choice in range(top_k):
        row = tl.load(destinations_ptr + token * top_k + choice)
        tl.store(rows_ptr + row * hidden_size + columns, values, mask=mask)


@jit
def _unpermute_kernel(
    out_ptr: Pointer,
    rows_ptr: Pointer,
    destinations_ptr: Pointer,
    weights_ptr: Pointer,
    hidden_size: int,
    top_k: constexpr,
    block: constexpr,
) -> None:
    num_column_blocks = tl.cdiv(hidden_size, block)
    token = (tl.program_id(0) // num_column_blocks).to(tl.int64)
    columns = (tl.program_id(0) % num_column_blocks) * block + tl.arange(0, block)
    mask = columns < hidden_size
    total = tl.zeros((block,), dtype=tl.float32)
    for choice in range(top_k):
        row = tl.load(destinations_ptr + token * top_k + choice)
        weight = tl.load(weights_ptr + token * top_k + choice).to(tl.float32)
        total += weight * tl.load(rows_ptr + row * hidden_size + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * hidden_size + columns, total, mask=mask)


def expert_order(expert_ids: torch.Tensor, num_experts: int) -> ExpertOrder:
    """Return the order of tokens by expert; equal experts keep the order of tokens, then of choices.

    Parameters
    ----------
    expert_ids : torch.Tensor
        Experts each token chose (num_tokens, top_k), int32 or int64, each in ``0 .. num_experts - 1``; not
        checked on a GPU, where that would wait for the device.
    num_experts : int
        Experts there are, at least 1.

    Returns
    -------
    ExpertOrder
        Equal for equal choices.

    Raises
    ------
    SpecError
        If the shape or type does not fit, or an expert on the CPU does not exist.

    Examples
    --------
    >>> order = expert_order(torch.tensor([[1, 0], [1, 2]]), num_experts=4)
    >>> order.destinations
    tensor([[1, 0],
            [2, 3]])
    >>> order.group_sizes
    tensor([1, 2, 1, 0])
    """
    where = "expert_order"
    require_shape(where, "expert_ids", expert_ids, (None, None), "(num_tokens, top_k)")
    require_type(where, "expert_ids", expert_ids, INDEX_TYPES)
    if num_experts < 1:
        raise SpecError(f"{where}: num_experts is {num_experts}; pass at least 1")
    flat = expert_ids.reshape(-1).long()
    if (
        flat.device.type == "cpu"
        and flat.numel()
        and not 0 <= int(flat.min()) <= int(flat.max()) < num_experts
    ):
        raise SpecError(
            f"{where}: expert_ids lie in {int(flat.min())} .. {int(flat.max())}; pass 0 to {num_experts - 1}"
        )
    in_order, sources = torch.sort(flat, stable=True)
    destinations = torch.empty_like(sources)
    destinations[sources] = torch.arange(flat.numel(), device=flat.device)
    # Boundaries by binary search, because torch.bincount makes the host wait.
    ends = torch.searchsorted(in_order, torch.arange(num_experts, device=flat.device), right=True)
    return ExpertOrder(
        destinations=destinations.reshape(expert_ids.shape),
        group_sizes=torch.diff(ends, prepend=ends.new_zeros(1)),
    )


def permute_tokens(x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Return one row per choice, sorted by expert: ``rows[destinations[t, c]] = x[t]``.

    Reads every token once and writes it ``top_k`` times.

    Parameters
    ----------
    x : torch.Tensor
        Tokens (num_tokens, hidden_size), bf16, fp16 or fp32, contiguous.
    order : ExpertOrder
        From :func:`expert_order`.

    Returns
    -------
    torch.Tensor
        Rows (num_tokens * top_k, hidden_size) of the type of ``x``.

    Raises
    ------
    SpecError
        If a tensor's shape, type, layout or device does not fit.
    CalibrationError
        If the tensors lie on a GPU and Triton is missing.

    Examples
    --------
    >>> order = expert_order(torch.tensor([[1], [0]]), num_experts=2)
    >>> permute_tokens(torch.tensor([[1.0], [2.0]]), order).flatten()
    tensor([2., 1.])
    """
    where = "permute_tokens"
    require_shape(where, "x", x, (order.destinations.shape[0], None), "(num_tokens, hidden_size)")
    require_type(where, "x", x, FLOAT_TYPES)
    require_dense(where, "x", x)
    if uses_kernel(where, require_device(where, x=x, destinations=order.destinations)):
        return _launch_permute(x, order.destinations)
    return permute_tokens_reference(x, order)


def permute_tokens_reference(x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Do what :func:`permute_tokens` does, in torch."""
    top_k = order.destinations.shape[1]
    rows = x.new_empty((order.destinations.numel(), x.shape[1]))
    rows[order.destinations.reshape(-1)] = x.repeat_interleave(top_k, dim=0)
    return rows


def unpermute_tokens(rows: torch.Tensor, order: ExpertOrder, routing_weights: torch.Tensor) -> torch.Tensor:
    """Return each token's weighted sum: ``out[t] = sum_c weights[t, c] * rows[destinations[t, c]]``.

    Summed in fp32 from the first choice to the last, so that equal inputs give equal bits.

    Parameters
    ----------
    rows : torch.Tensor
        Outputs of the experts (num_tokens * top_k, hidden_size), bf16, fp16 or fp32, contiguous.
    order : ExpertOrder
        The one that the tokens were permuted by.
    routing_weights : torch.Tensor
        Weight of each choice (num_tokens, top_k), bf16, fp16 or fp32, contiguous.

    Returns
    -------
    torch.Tensor
        Tokens (num_tokens, hidden_size) of the type of ``rows``.

    Raises
    ------
    SpecError
        If a tensor's shape, type, layout or device does not fit.
    CalibrationError
        If the tensors lie on a GPU and Triton is missing.

    Examples
    --------
    >>> order = expert_order(torch.tensor([[1, 0]]), num_experts=2)
    >>> unpermute_tokens(torch.tensor([[1.0], [10.0]]), order, torch.tensor([[0.25, 0.75]]))
    tensor([[3.2500]])
    """
    where = "unpermute_tokens"
    require_shape(
        where, "rows", rows, (order.destinations.numel(), None), "(num_tokens * top_k, hidden_size)"
    )
    require_shape(where, "routing_weights", routing_weights, order.destinations.shape, "(num_tokens, top_k)")
    for name, tensor in (("rows", rows), ("routing_weights", routing_weights)):
        require_type(where, name, tensor, FLOAT_TYPES)
        require_dense(where, name, tensor)
    device = require_device(
        where, rows=rows, destinations=order.destinations, routing_weights=routing_weights
    )
    if uses_kernel(where, device):
        return _launch_unpermute(rows, order.destinations, routing_weights)
    return unpermute_tokens_reference(rows, order, routing_weights)


def unpermute_tokens_reference(
    rows: torch.Tensor, order: ExpertOrder, routing_weights: torch.Tensor
) -> torch.Tensor:
    """Do what :func:`unpermute_tokens` does, in torch and at least in fp32."""
    wide = accumulation_type(rows.dtype)
    chosen = rows.to(wide)[order.destinations]
    return (routing_weights.to(wide).unsqueeze(-1) * chosen).sum(dim=1).to(rows.dtype)


def _block(hidden_size: int) -> int:
    return min(1 << max(hidden_size - 1, 0).bit_length(), _MAX_BLOCK)


def _launch_permute(x: torch.Tensor, destinations: torch.Tensor) -> torch.Tensor:
    num_tokens, hidden_size = x.shape
    rows, block = x.new_empty((destinations.numel(), hidden_size)), _block(hidden_size)
    launch(
        _permute_kernel,
        num_tokens * -(-hidden_size // block),
        x.device,
        rows,
        x,
        destinations,
        hidden_size,
        top_k=destinations.shape[1],
        block=block,
        num_warps=_NUM_WARPS,
    )
    return rows


def _launch_unpermute(
    rows: torch.Tensor, destinations: torch.Tensor, routing_weights: torch.Tensor
) -> torch.Tensor:
    (num_tokens, top_k), hidden_size = destinations.shape, rows.shape[1]
    out, block = rows.new_empty((num_tokens, hidden_size)), _block(hidden_size)
    launch(
        _unpermute_kernel,
        num_tokens * -(-hidden_size // block),
        rows.device,
        out,
        rows,
        destinations,
        routing_weights,
        hidden_size,
        top_k=top_k,
        block=block,
        num_warps=_NUM_WARPS,
    )
    return out
