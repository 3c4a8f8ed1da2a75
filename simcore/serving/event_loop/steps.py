"""Steps of an engine: formed, completed, and runs of pure decode skipped through."""
# ruff: noqa: PLR1730 - calls of max() and min() halve the speed of plain Python

from __future__ import annotations

import math

from meshwright.simcore.compiled import kernel_part
from meshwright.simcore.serving.event_loop.admission import (
    admit_request,
    admit_transferred,
    compute_chunk,
    continue_prompt,
)
from meshwright.simcore.serving.event_loop.blocks import release_blocks, share_prompt, take_blocks
from meshwright.simcore.serving.event_loop.costs import locate, step_time
from meshwright.simcore.serving.event_loop.events import push_event
from meshwright.simcore.serving.event_loop.fields import (
    AFTER,
    BLOCKED,
    BUDGET,
    BY_CHUNK,
    CONTEXT,
    CONTEXT_HINT,
    CONTEXTS_AT,
    COUNTER,
    CROSS,
    DECODE,
    DECODE_AT,
    DECODE_BUSY,
    DECODES,
    DONE,
    DONE_COUNT,
    DONE_HEAD,
    EAGER_HOST,
    ENTRY,
    EVICTABLE,
    FILLS_EMPTY,
    FIRST_TOKEN,
    FREE,
    GROWTH_AT,
    HAS_BUDGET,
    HAS_CACHE,
    HAS_LAG,
    HELD,
    HOST,
    HOST_SEQUENCE,
    IS_DECODING,
    IS_HIDDEN,
    LATENCY,
    LINK,
    LINK_FREE,
    LINK_LATENCY,
    LINK_PER_TOKEN,
    LIVE,
    LOAD,
    MAX_GRAPH,
    MAX_SEQUENCES,
    MIXES,
    NO_BUDGET,
    NUM_CONTEXTS,
    NUM_TOKENS,
    PARTIAL,
    PATIENCE,
    PER_TOKEN,
    PHASE,
    POOL,
    PREFILL,
    PREFILLED,
    PROMPT,
    PROMPT_BUSY,
    RATE_SQUARE,
    RATES,
    READY,
    RECORD_AT,
    RECORD_DECODES,
    RECORD_END,
    RECORD_ENGINE,
    RECORD_FIRST_TOKENS,
    RECORD_PROMPT_TOKENS,
    RECORD_SIZE,
    RECORD_START,
    RECORD_STRIDE,
    RECORDED,
    REPLICA,
    RESERVES,
    ROLE,
    RUNNING,
    SKEW,
    SPECULATION,
    SQUARE,
    STEP_START,
    STEP_TIME,
    STEP_TOKENS,
    STEPS,
    STEPS_RUN,
    STREAM_FREE,
    STRIDE,
    TOKEN_HINT,
    TOKENS_AT,
    TRANSFER,
    TRANSFERRED,
    WAIT_HEAD,
    WAITED,
    WAITING,
    WHEEL_AT,
    WHEEL_SIZE,
    Floats,
    Ints,
)
from meshwright.simcore.serving.event_loop.sequences import (
    clear_batch,
    enter_decode,
    finish_request,
    grow_sequences,
    leave_decode,
    leave_running,
    move_contexts,
    note_token,
    show_tokens,
)

__all__ = ["complete_decode", "complete_step", "form_step", "send_to_decode", "skip_decodes"]


@kernel_part
def complete_decode(ints: Ints, floats: Floats, engine: int, pool: int) -> None:
    """Give every decoding sequence its tokens and finish those that have all."""
    counter = ints[engine + COUNTER]
    move_contexts(floats, engine)
    ints[engine + COUNTER] = counter + 1
    request = ints[ints[engine + WHEEL_AT] + counter % ints[WHEEL_SIZE]]
    while request >= 0:
        following = ints[request + AFTER]
        if ints[request + ENTRY] + ints[request + STEPS] - 1 == counter:
            note_token(ints, engine, request)
            if ints[pool + FILLS_EMPTY] == 1:
                ints[request + PHASE] = DONE
                ints[engine + LIVE] -= 1
            else:
                leave_decode(ints, floats, engine, request, pool)
                finish_request(ints, engine, request)
        request = following


@kernel_part
def send_to_decode(ints: Ints, floats: Floats, engine: int, request: int, pool: int, end: float) -> None:
    """Send a prompt's KV cache to the decode pool, after what the replica's link already carries."""
    replica = ints[engine + REPLICA]
    leave_running(ints, engine, request)
    release_blocks(ints, engine, request, False)
    ints[replica + LOAD] -= 1
    ints[engine + BLOCKED] = 0
    begin = floats[replica + LINK_FREE]
    if begin < end:
        begin = end
    floats[replica + LINK_FREE] = begin + floats[pool + LINK_PER_TOKEN] * ints[request + PROMPT]
    arrival = floats[replica + LINK_FREE] + floats[pool + LINK_LATENCY]
    floats[request + TRANSFER] = arrival - end
    ints[request + PHASE] = TRANSFERRED
    push_event(ints, floats, arrival, request)


@kernel_part
def complete_step(ints: Ints, floats: Floats, engine: int, pool: int, end: float) -> None:
    """Apply what a step brings at its end."""
    replica = ints[engine + REPLICA]
    if ints[RECORD_SIZE] > 0:
        row = ints[RECORD_AT] + RECORD_STRIDE * ints[RECORDED]
        ints[RECORDED] += 1
        floats[row + RECORD_START] = floats[replica + STEP_START]
        floats[row + RECORD_END] = end
        ints[row + RECORD_ENGINE] = engine
        if ints[engine + IS_DECODING] == 0:
            ints[row + RECORD_DECODES] = 0
        else:
            # Places of a static batch that are done decode nothing.
            ints[row + RECORD_DECODES] = ints[engine + (LIVE if ints[pool + FILLS_EMPTY] == 1 else DECODES)]
        ints[row + RECORD_PROMPT_TOKENS] = ints[engine + STEP_TOKENS]
        ints[row + RECORD_FIRST_TOKENS] = ints[engine + DONE_COUNT]
    busy = engine + (PROMPT_BUSY if ints[engine + STEP_TOKENS] > 0 else DECODE_BUSY)
    floats[busy] += end - floats[replica + STEP_START]
    visible = end
    if floats[pool + PER_TOKEN] > 0.0:
        tokens = 1.0 * ints[engine + DONE_COUNT]
        if ints[engine + IS_DECODING] == 1:
            tokens += floats[engine + RATES]
        if floats[replica + STREAM_FREE] > end:
            visible = floats[replica + STREAM_FREE]
        visible += floats[pool + PER_TOKEN] * tokens
        floats[replica + STREAM_FREE] = visible
    if ints[pool + HAS_LAG] == 1:
        show_tokens(ints, floats, engine, visible)
    if ints[engine + IS_DECODING] == 1:
        complete_decode(ints, floats, engine, pool)
    request = ints[engine + DONE_HEAD]
    while request >= 0:
        following = ints[request + LINK]
        if floats[request + PREFILLED] < 0.0:
            floats[request + PREFILLED] = end
        if ints[pool + HAS_CACHE] == 1:
            share_prompt(ints, engine, request)
        if ints[pool + ROLE] == PREFILL and ints[request + STEPS] > 0:
            send_to_decode(ints, floats, engine, request, pool, end)
        else:
            if floats[request + FIRST_TOKEN] < 0.0 or ints[request + STEPS] == 0:
                note_token(ints, engine, request)
            if ints[request + STEPS] > 0:
                enter_decode(ints, floats, engine, request, pool)
            elif ints[pool + FILLS_EMPTY] == 1:
                ints[request + PHASE] = DONE
                ints[engine + LIVE] -= 1
            else:
                finish_request(ints, engine, request)
        request = following
    if ints[pool + FILLS_EMPTY] == 1 and ints[engine + LIVE] == 0:
        clear_batch(ints, floats, engine, pool)
    if ints[pool + HAS_LAG] == 0:
        show_tokens(ints, floats, engine, visible)


@kernel_part
def form_step(ints: Ints, floats: Floats, engine: int, pool: int, now: float) -> bool:
    """Choose what the next step of an engine holds and set its time; return whether it holds anything."""
    ints[engine + DONE_HEAD] = -1
    ints[engine + DONE_COUNT] = 0
    is_admitting = ints[pool + ROLE] == DECODE and admit_transferred(ints, floats, engine, pool, now)
    mixes, is_preempting, num_decodes = ints[pool + MIXES] == 1, False, 0
    budget = ints[pool + BUDGET] if ints[pool + HAS_BUDGET] == 1 else NO_BUDGET
    if mixes and ints[engine + DECODES] > 0:
        is_preempting = grow_sequences(ints, floats, engine, pool)
        num_decodes = ints[engine + DECODES]
        budget -= num_decodes * (1 + ints[pool + SPECULATION])
    tokens, attention, num_prompts = 0, 0.0, 0
    if ints[engine + PARTIAL] >= 0 and budget > 0:
        request = ints[engine + PARTIAL]
        tokens = continue_prompt(ints, floats, engine, pool, budget)
        if tokens > 0:
            attention += compute_chunk(ints, floats, engine, pool, request, tokens)
            num_prompts = 1
            budget -= tokens
    may_fill = (
        not is_preempting
        and ints[engine + HELD] == 0
        and (ints[pool + FILLS_EMPTY] == 0 or ints[engine + RUNNING] == 0)
    )
    while (
        may_fill
        and budget > 0
        and ints[engine + PARTIAL] < 0
        and ints[engine + WAITING] > 0
        and ints[engine + RUNNING] < ints[pool + MAX_SEQUENCES]
    ):
        request = ints[engine + WAIT_HEAD]
        if floats[request + READY] > now or ints[request + PHASE] == TRANSFERRED:
            break
        length = admit_request(ints, floats, engine, pool, now, budget, num_prompts == 0)
        if length == 0:
            break
        attention += compute_chunk(ints, floats, engine, pool, request, length)
        num_prompts += 1
        tokens += length
        budget -= length
        if ints[pool + FILLS_EMPTY] == 1:
            ints[engine + LIVE] += 1
    if not mixes and num_prompts == 0 and ints[engine + DECODES] > 0:
        is_preempting = grow_sequences(ints, floats, engine, pool)
        num_decodes = ints[engine + DECODES]
    ints[engine + IS_DECODING] = 1 if num_decodes > 0 else 0
    ints[engine + STEP_TOKENS] = tokens
    ints[engine + BLOCKED] = 0
    if num_prompts == 0 and not is_preempting and not is_admitting and ints[engine + PARTIAL] < 0:
        if ints[engine + WAITING] == 0 or floats[ints[engine + WAIT_HEAD] + READY] > now:
            ints[engine + BLOCKED] = 2
        elif ints[engine + HELD] == 0 and (
            ints[engine + RUNNING] >= ints[pool + MAX_SEQUENCES]
            or (
                # What decoding needs next, or evicts, may let a request in that had no room before.
                ints[pool + ROLE] != DECODE and (ints[pool + BY_CHUNK] == 0 or ints[pool + HAS_CACHE] == 0)
            )
        ):
            ints[engine + BLOCKED] = 1
    if num_decodes == 0 and num_prompts == 0:
        floats[engine + STEP_TIME] = 0.0
        return False
    floats[engine + STEP_TIME] = step_time(
        ints,
        floats,
        pool,
        num_decodes,
        floats[engine + CONTEXT],
        floats[engine + SQUARE],
        tokens,
        attention,
        num_prompts,
    )
    return True


@kernel_part
def skip_decodes(ints: Ints, floats: Floats, replica: int, engine: int, start: float, limit: float) -> float:
    """Run the steps of pure decode that change nothing else and end before ``limit``; return the end of the last.

    The same operations in the same order as :func:`step_time`, :func:`move_contexts` and :func:`grow_sequences`, on
    local variables: the compiler keeps those in registers, and a step takes nanoseconds.
    """
    pool, num_decodes = ints[replica + POOL], ints[engine + DECODES]
    time, bound, counter = start, limit, ints[engine + COUNTER]
    if ints[engine + BLOCKED] == 2 and ints[engine + WAITING] > 0:
        ready = floats[ints[engine + WAIT_HEAD] + READY]
        if ready < bound:
            bound = ready
    wheel, wheel_size = ints[engine + WHEEL_AT], ints[WHEEL_SIZE]
    slot = counter % wheel_size
    growth, stride, has_growth = ints[engine + GROWTH_AT], ints[pool + STRIDE], ints[pool + RESERVES] == 0
    key = -counter % stride
    available, taken = ints[engine + FREE] + ints[engine + EVICTABLE], 0

    num_tokens, count = num_decodes * (1 + ints[pool + SPECULATION]), ints[pool + NUM_TOKENS]
    index = locate(floats, ints[pool + TOKENS_AT], count, num_tokens, ints[pool + TOKEN_HINT])
    is_graph = num_tokens <= floats[pool + MAX_GRAPH]
    row = index + count if is_graph else index + 3 * count
    fixed = floats[row] + (num_tokens - floats[index]) * floats[row + count] + floats[pool + LATENCY]
    host = floats[pool + HOST] + floats[pool + HOST_SEQUENCE] * num_decodes
    if not is_graph and host < floats[pool + EAGER_HOST]:
        host = floats[pool + EAGER_HOST]
    is_hidden = ints[pool + IS_HIDDEN] == 1
    skew = floats[pool + SKEW] if num_decodes > 1 else 0.0

    context_sum, square_sum, cross = floats[engine + CONTEXT], floats[engine + SQUARE], floats[engine + CROSS]
    rates, rate_square = floats[engine + RATES], floats[engine + RATE_SQUARE]
    first, count = ints[pool + CONTEXTS_AT], ints[pool + NUM_CONTEXTS]
    decode_row = ints[pool + DECODE_AT] + 2 * count * num_decodes - first
    index = locate(floats, first, count, context_sum / num_decodes, ints[pool + CONTEXT_HINT])
    low, high = floats[index], floats[index + 1]
    value, slope = floats[decode_row + index], floats[decode_row + index + count]
    per_token, visible = floats[pool + PER_TOKEN], floats[replica + STREAM_FREE]
    busy = floats[engine + DECODE_BUSY]
    while time < bound and ints[wheel + slot] < 0:
        need = ints[growth + key] if has_growth else 0
        if need > available:
            break
        context = context_sum / num_decodes
        while context >= high and index < first + count - 2:
            index += 1
            low, high = high, floats[index + 1]
            value, slope = floats[decode_row + index], floats[decode_row + index + count]
        beyond = context - low
        if beyond < 0.0:
            beyond = 0.0
        decode = value + beyond * slope
        if skew > 0.0:
            variance = square_sum / num_decodes - context * context
            if variance > 0.0:
                decode *= 1.0 + skew * math.sqrt(variance) / context
        device = fixed + decode
        duration = device + host
        if is_hidden:
            duration = host if host > device else device
        end = time + duration
        if end >= limit:
            break
        available -= need
        taken += need
        square_sum += 2.0 * cross + rate_square
        cross += rate_square
        context_sum += rates
        counter += 1
        slot = slot + 1 if slot + 1 < wheel_size else 0
        key = key - 1 if key > 0 else stride - 1
        busy += end - time
        time = end
        if per_token > 0.0:
            if visible < end:
                visible = end
            visible += per_token * rates
    ints[STEPS_RUN] += counter - ints[engine + COUNTER]
    if ints[pool + PATIENCE] > 0:
        ints[replica + WAITED] = (ints[replica + WAITED] + counter - ints[engine + COUNTER]) % ints[
            pool + PATIENCE
        ]
    ints[engine + COUNTER] = counter
    if taken > 0:
        take_blocks(ints, engine, taken)
    floats[engine + CONTEXT], floats[engine + SQUARE], floats[engine + CROSS] = context_sum, square_sum, cross
    floats[replica + STREAM_FREE] = visible
    floats[engine + DECODE_BUSY] = busy
    return time
