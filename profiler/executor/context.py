"""Attention over a sequence that is split over context parallel ranks.

``ring`` and ``all_gather`` cut a sequence into ``2 cp`` pieces of which rank ``r`` holds ``r`` and ``2 cp - 1 - r``, so
that causal attention is the same work on every rank (Llama 3, arXiv 2407.21783, section 3.3.2); ``ulysses`` splits it
into runs. Tensors are ``(batch, heads, sequence, head_dim)``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from meshwright.profiler.executor.communication import Group, Pending
from meshwright.simcore.domain.plan import CpMethod

__all__ = ["biased_attention", "causal_attention", "context_attention", "local_positions"]


def local_positions(sequence_length: int, cp: int, index: int, method: CpMethod) -> list[int]:
    """Return the positions of a sequence that a context parallel rank holds, in the order it holds them.

    Examples
    --------
    >>> local_positions(8, 2, 0, "ring"), local_positions(8, 2, 0, "ulysses")
    ([0, 1, 6, 7], [0, 1, 2, 3])
    """
    if cp == 1 or method == "ulysses":
        share = sequence_length // cp
        return list(range(index * share, (index + 1) * share))
    piece = sequence_length // (2 * cp)
    mirrored = 2 * cp - 1 - index
    return [*range(index * piece, (index + 1) * piece), *range(mirrored * piece, (mirrored + 1) * piece)]


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int | None = None, scale: float | None = None
) -> Tensor:
    """Return causal attention of the last tokens of sequences to all of them.

    Parameters
    ----------
    query, key, value : Tensor
        Of whole sequences, or queries of their last tokens alone, ``(batch, heads, tokens, head_dim)``; key and value
        may have fewer heads.
    window : int | None
        Keys that each query sees, its own included; None is all before it.
    scale : float | None
        Of the scores; None is by the width of the heads.
    """
    new, length = query.shape[2], key.shape[2]
    mask = None
    if (window or length) < length or 1 < new < length:
        distance = _distances(query, key)
        mask = (distance >= 0) & (distance < (window or length))
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        # A single query sees every key.
        is_causal=mask is None and new > 1,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def biased_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, slopes: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """Return causal attention with something added to the scores of each head.

    Parameters
    ----------
    query, key, value, window : Tensor, Tensor, Tensor, int | None
        As of :func:`causal_attention`.
    slopes : Tensor | None
        What each head takes off a score per position of distance (ALiBi, arXiv 2108.12409, section 3).
    sinks : Tensor | None
        Logit of each head that stands beside its scores and takes part of their weight (GPT-OSS).
    """
    heads, new, length = query.shape[1], query.shape[2], key.shape[2]
    distance = _distances(query, key)
    is_hidden = (distance < 0) | (distance >= (length if window is None else window))
    bias = torch.zeros(heads, new, length, dtype=query.dtype, device=query.device)
    if slopes is not None:
        bias = bias - slopes.to(query.dtype).view(-1, 1, 1) * distance.to(query.dtype)
    bias = bias.masked_fill(is_hidden, -torch.inf)
    if sinks is not None:
        # A key of zeros scores nothing but its bias, and its value of zeros adds nothing.
        bias = torch.cat([bias, sinks.to(query.dtype).view(-1, 1, 1).expand(-1, new, 1)], dim=2)
        key, value = (functional.pad(each, (0, 0, 0, 1)) for each in (key, value))
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, enable_gqa=heads != key.shape[1]
    )


def _distances(query: Tensor, key: Tensor) -> Tensor:
    """Return how far each key lies before each query, ``(queries, keys)``; the queries are of the last tokens."""
    position = torch.arange(key.shape[2], device=query.device)
    return position[-query.shape[2] :].unsqueeze(1) - position.unsqueeze(0)


def context_attention(
    query: Tensor, key: Tensor, value: Tensor, group: Group, method: CpMethod, window: int | None = None
) -> Tensor:
    """Return causal attention where every rank of a group holds a part of the sequence."""
    if group.size == 1:
        return causal_attention(query, key, value, window)
    if method == "ring":
        result: Tensor = _Ring.apply(query, key, value, group)  # type: ignore[no-untyped-call]
        return result
    if method == "ulysses":
        return _ulysses(query, key, value, group, window)
    return _gathered(query, key, value, group)


class _Exchange(Function):
    """Equal parts along dimension 0 change places; so do their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_to_all(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_to_all(gradients[0]), None


def _ulysses(query: Tensor, key: Tensor, value: Tensor, group: Group, window: int | None) -> Tensor:
    """Swap sequence for heads, attend, and swap back (Jacobs et al. 2023, arXiv 2309.14509)."""
    size = group.size
    heads, kv_heads = query.shape[1] // size, key.shape[1] // size
    parts = [torch.unflatten(each, 1, (size, -1)) for each in (query, key, value)]
    # (ranks, batch, heads of each, sequence, head_dim): one exchange for all three.
    packed = torch.cat(parts, dim=2).transpose(0, 1).contiguous()
    swapped: Tensor = _Exchange.apply(packed, group)  # type: ignore[no-untyped-call]
    whole = swapped.permute(1, 2, 0, 3, 4).flatten(2, 3)
    q, k, v = torch.split(whole, [heads, kv_heads, kv_heads], dim=1)
    output = (
        torch.unflatten(causal_attention(q, k, v, window), 2, (size, -1)).permute(2, 0, 1, 3, 4).contiguous()
    )
    back: Tensor = _Exchange.apply(output, group)  # type: ignore[no-untyped-call]
    return back.transpose(0, 1).flatten(1, 2)


class _GatherSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_gather(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.group.reduce_scatter(gradients[0]), None


def _gathered(query: Tensor, key: Tensor, value: Tensor, group: Group) -> Tensor:
    """Gather keys and values and attend with the queries at hand."""
    packed = torch.cat([key, value], dim=3).permute(2, 0, 1, 3)
    whole: Tensor = _GatherSequence.apply(packed, group)  # type: ignore[no-untyped-call]
    length = whole.shape[0]
    positions = [local_positions(length, group.size, each, "all_gather") for each in range(group.size)]
    held = torch.tensor([position for part in positions for position in part], device=query.device)
    mine = torch.tensor(positions[group.index], device=query.device)
    k, v = torch.split(whole.permute(1, 2, 0, 3), [key.shape[3], value.shape[3]], dim=3)
    mask = mine.unsqueeze(1) >= held.unsqueeze(0)
    return functional.scaled_dot_product_attention(
        query, k, v, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1]
    )


class _Ring(Function):
    """Blocks of keys and values pass round while each rank attends to the one it holds (arXiv 2310.01889).

    Forward passes keys and values ``cp - 1`` times. Backward passes them again, and their gradients ``cp`` times: one
    hop behind, and home at the end.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: Group) -> Tensor:
        block = torch.stack([key, value]).contiguous()
        output = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        log_sum = torch.full(query.shape[:-1], -math.inf, dtype=torch.float32, device=query.device)
        for step in range(group.size):
            following, works = block, list[Pending]()
            if step < group.size - 1:
                following, works = group.pass_round(block)
            q, k, v, is_causal, rows = _block_part(query, block, step, group)
            scores = _scores(q, k, is_causal)
            new_log = torch.logsumexp(scores, dim=-1)
            new_output = _times_values(torch.exp(scores - new_log.unsqueeze(-1)), v)
            old_log = log_sum[:, :, rows]
            total = torch.logaddexp(old_log, new_log)
            output[:, :, rows] = output[:, :, rows] * torch.exp(old_log - total).unsqueeze(
                -1
            ) + new_output * torch.exp(new_log - total).unsqueeze(-1)
            log_sum[:, :, rows] = total
            for work in works:
                work.wait()
            block = following
        result = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, result, log_sum)
        ctx.group = group
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, output, log_sum = ctx.saved_tensors
        group: Group = ctx.group
        gradient = gradients[0].float()
        # Row sums of gradient times output (FlashAttention, arXiv 2205.14135, appendix B.4).
        delta = (gradient * output.float()).sum(-1)
        for_query = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        block = torch.stack([key, value]).contiguous()
        for_block = torch.zeros(block.shape, dtype=torch.float32, device=query.device)
        returning: list[Pending] = []
        for step in range(group.size):
            following, works = block, list[Pending]()
            if step < group.size - 1:
                following, works = group.pass_round(block)
            q, k, v, is_causal, rows = _block_part(query, block, step, group)
            contribution = torch.zeros_like(for_block)
            length = k.shape[2]
            probabilities = torch.exp(_scores(q, k, is_causal) - log_sum[:, :, rows].unsqueeze(-1))
            given = gradient[:, :, rows]
            groups = k.shape[1]
            for_probabilities = torch.matmul(
                _grouped(given, groups), v.float().unsqueeze(2).transpose(-1, -2)
            ).flatten(1, 2)
            for_scores = probabilities * (for_probabilities - delta[:, :, rows].unsqueeze(-1))
            for_scores = for_scores / math.sqrt(q.shape[-1])
            grouped_scores = _grouped(for_scores, groups)
            for_query[:, :, rows] += torch.matmul(grouped_scores, k.float().unsqueeze(2)).flatten(1, 2)
            for_key = torch.matmul(grouped_scores.transpose(-1, -2), _grouped(q.float(), groups)).sum(2)
            for_value = torch.matmul(
                _grouped(probabilities, groups).transpose(-1, -2), _grouped(given, groups)
            ).sum(2)
            contribution[0, :, :, :length] = for_key
            contribution[1, :, :, :length] = for_value
            for work in returning:
                work.wait()
            # The sum for the block at hand has arrived from the rank before, which held it before.
            for_block = for_block + contribution
            for work in works:
                work.wait()
            for_block, returning = group.pass_round(for_block)
            block = following
        for work in returning:
            work.wait()
        home = for_block.to(key.dtype)
        return for_query.to(query.dtype), home[0], home[1], None


def _block_part(
    query: Tensor, block: Tensor, step: int, group: Group
) -> tuple[Tensor, Tensor, Tensor, bool, slice]:
    """Return the queries and the keys and values that meet in a step, whether causally, and the queries' rows."""
    source = (group.index - step) % group.size
    half = query.shape[2] // 2
    if source == group.index:
        return query, block[0], block[1], True, slice(None)
    if source < group.index:
        # Its first piece lies before both of ours, its second behind.
        return query, block[0, :, :, :half], block[1, :, :, :half], False, slice(None)
    return query[:, :, half:], block[0], block[1], False, slice(half, None)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Return ``(batch, groups, heads of a group, ...)``."""
    return torch.unflatten(x, 1, (groups, -1))


def _scores(query: Tensor, key: Tensor, is_causal: bool) -> Tensor:
    """Return scaled scores, ``(batch, heads, queries, keys)``.

    Both halves of what a rank holds are in the order of the sequence, so that its own block is causal by row.
    """
    grouped = _grouped(query.float(), key.shape[1])
    scores = torch.matmul(grouped, key.float().unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
    scores = scores / math.sqrt(query.shape[-1])
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores


def _times_values(probabilities: Tensor, value: Tensor) -> Tensor:
    return torch.matmul(_grouped(probabilities, value.shape[1]), value.float().unsqueeze(2)).flatten(1, 2)
