"""Which requests an engine takes in, and how much of a prompt a step holds."""
# ruff: noqa: PLR1730 - calls of max() and min() halve the speed of plain Python

from __future__ import annotations

from meshwright.simcore.compiled import kernel_part
from meshwright.simcore.serving.event_loop.blocks import (
    matched_segments,
    shared_blocks,
    take_blocks,
    unlink_segment,
)
from meshwright.simcore.serving.event_loop.costs import prompt_attention
from meshwright.simcore.serving.event_loop.fields import (
    BLOCK,
    BLOCKS_AT,
    BY_CHUNK,
    CACHE_AT,
    CACHED,
    CACHED_SHARE,
    COMPUTED,
    COUNTER,
    DONE_COUNT,
    DONE_HEAD,
    EVICTABLE,
    FIRST_CACHED,
    FIRST_SEGMENT,
    FREE,
    GROWTH_AT,
    HAS_CACHE,
    LINK,
    MAX_SEQUENCES,
    OUTPUT,
    PARTIAL,
    PHASE,
    PREFILL,
    PRIVATE,
    PROMPT,
    READY,
    REFS,
    RESERVES,
    ROLE,
    RUNNING,
    SPLITS,
    STRIDE,
    TRANSFERRED,
    WAIT_HEAD,
    WAITING,
    WATERMARK,
    Floats,
    Ints,
)
from meshwright.simcore.serving.event_loop.sequences import enter_decode, enter_running

__all__ = ["admit_request", "admit_transferred", "compute_chunk", "continue_prompt"]


@kernel_part
def admit_transferred(ints: Ints, floats: Floats, engine: int, pool: int, now: float) -> bool:
    """Let requests whose KV cache has come from the prefill pool decode; return whether one did."""
    block = ints[pool + BLOCK]
    is_admitting = False
    while ints[engine + WAITING] > 0 and ints[engine + RUNNING] < ints[pool + MAX_SEQUENCES]:
        request = ints[engine + WAIT_HEAD]
        if floats[request + READY] > now or ints[request + PHASE] != TRANSFERRED:
            break
        tokens = ints[request + PROMPT]
        if ints[pool + RESERVES] == 1:
            tokens += ints[request + OUTPUT] - 1
        need = (tokens + block - 1) // block
        if ints[engine + RUNNING] > 0:
            spare = ints[engine + FREE] - ints[pool + WATERMARK] - 1
            if ints[pool + RESERVES] == 0:
                spare -= ints[ints[engine + GROWTH_AT] + -ints[engine + COUNTER] % ints[pool + STRIDE]]
            if need > spare:
                break
        take_blocks(ints, engine, need)
        ints[request + PRIVATE] = need
        enter_running(ints, floats, engine, request, now)
        enter_decode(ints, floats, engine, request, pool)
        is_admitting = True
    return is_admitting


@kernel_part
def compute_chunk(ints: Ints, floats: Floats, engine: int, pool: int, request: int, length: int) -> float:
    """Compute the next tokens of a prompt; return the attention time of the chunk [s]."""
    past = ints[request + COMPUTED]
    ints[request + COMPUTED] = past + length
    if past + length == ints[request + PROMPT]:
        ints[request + LINK] = ints[engine + DONE_HEAD]
        ints[engine + DONE_HEAD] = request
        ints[engine + DONE_COUNT] += 1
        ints[engine + PARTIAL] = -1
    else:
        ints[engine + PARTIAL] = request
    time = prompt_attention(ints, floats, pool, past + length)
    return time - prompt_attention(ints, floats, pool, past) if past > 0 else time


@kernel_part
def continue_prompt(ints: Ints, floats: Floats, engine: int, pool: int, budget: int) -> int:
    """Return how many tokens of the partly computed prompt the next step may hold, with blocks for them."""
    block = ints[pool + BLOCK]
    request = ints[engine + PARTIAL]
    computed = ints[request + COMPUTED]
    length: int = ints[request + PROMPT] - computed
    if length > budget:
        length = budget
    if ints[pool + BY_CHUNK] == 1:
        held = ints[request + PRIVATE] + shared_blocks(ints, request, ints[request + REFS])
        free = ints[engine + FREE] + ints[engine + EVICTABLE]
        if length > (held + free) * block - computed:
            length = (held + free) * block - computed
        need = (computed + length + block - 1) // block - held
        if need > 0:
            take_blocks(ints, engine, need)
            ints[request + PRIVATE] += need
    return length


@kernel_part
def admit_request(
    ints: Ints, floats: Floats, engine: int, pool: int, now: float, budget: int, is_first: bool
) -> int:
    """Admit the first waiting request if it fits; return the prompt tokens it adds to the step, 0 for none."""
    request, block = ints[engine + WAIT_HEAD], ints[pool + BLOCK]
    prompt, first = ints[request + PROMPT], ints[request + FIRST_SEGMENT]
    available = ints[engine + FREE] + ints[engine + EVICTABLE]
    matched, shared, cache = 0, 0, ints[engine + CACHE_AT]
    computed = int(floats[pool + CACHED_SHARE] * prompt)
    if ints[pool + HAS_CACHE] == 1:
        matched = matched_segments(ints, engine, request)
        shared = shared_blocks(ints, request, matched)
        for index in range(first, first + matched):
            if ints[cache + 3 * ints[index]] == 0:
                available -= ints[ints[BLOCKS_AT] + ints[index]]
        computed = shared * block
    if computed > prompt - 1:
        computed = prompt - 1
    length: int = prompt - computed
    if length > budget:
        if ints[pool + SPLITS] == 1:
            length = budget
        elif not is_first:
            return 0
    if ints[engine + RUNNING] > 0:
        available -= ints[pool + WATERMARK]
    tokens = prompt
    if ints[pool + BY_CHUNK] == 1:
        if length > (shared + available) * block - computed:
            length = (shared + available) * block - computed
        if length <= 0:
            return 0
        tokens = computed + length
    elif ints[pool + RESERVES] == 1 and ints[pool + ROLE] != PREFILL:
        tokens += ints[request + OUTPUT] - 1
    need = (tokens + block - 1) // block - shared
    if need > available:
        return 0
    for index in range(first, first + matched):
        segment = ints[index]
        if ints[cache + 3 * segment] == 0:
            unlink_segment(ints, engine, segment)
        ints[cache + 3 * segment] += 1
    take_blocks(ints, engine, need)
    ints[request + PRIVATE] = need
    ints[request + REFS] = matched
    ints[request + COMPUTED] = computed
    ints[request + CACHED] += computed
    if ints[request + FIRST_CACHED] < 0:
        ints[request + FIRST_CACHED] = computed
    enter_running(ints, floats, engine, request, now)
    return length
