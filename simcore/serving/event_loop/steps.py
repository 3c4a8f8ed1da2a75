"""Steps of an engine: formed and completed."""
# ruff: noqa: PLR1730 - calls of max() and min() halve the speed of plain Python

from __future__ import annotations

from meshwright.simcore.compiled import kernel_part
from meshwright.simcore.serving.event_loop.admission import (
    admit_request,
    admit_transferred,
    compute_chunk,
    continue_prompt,
)
from meshwright.simcore.serving.event_loop.blocks import release_blocks, share_prompt
from meshwright.simcore.serving.event_loop.costs import step_time
from meshwright.simcore.serving.event_loop.events import push_event
from meshwright.simcore.serving.event_loop.fields import (
    AFTER,
    BLOCKED,
    BUDGET,
    BY_CHUNK,
    CONTEXT,
    COUNTER,
    DECODE,
    DECODE_BUSY,
    DECODES,
    DEVICE_FREE,
    DONE,
    DONE_COUNT,
    DONE_HEAD,
    ENTRY,
    FILLS_EMPTY,
    FIRST_TOKEN,
    FRONT_FREE,
    HAS_BUDGET,
    HAS_CACHE,
    HELD,
    IS_DECODING,
    LINK,
    LINK_FREE,
    LINK_LATENCY,
    LINK_PER_TOKEN,
    LIVE,
    LOAD,
    MAX_SEQUENCES,
    MIXES,
    NO_BUDGET,
    OVERLAPS,
    PARTIAL,
    PER_TOKEN,
    PHASE,
    PREFILL,
    PREFILLED,
    PROMPT,
    PROMPT_BUSY,
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
    ROLE,
    RUNNING,
    SPECULATION,
    SQUARE,
    STEP_START,
    STEP_TIME,
    STEP_TOKENS,
    STEPS,
    TRANSFER,
    TRANSFERRED,
    WAIT_HEAD,
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

__all__ = ["complete_decode", "complete_step", "form_step", "next_prompt", "send_to_decode", "what_blocks"]


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
def complete_step(ints: Ints, floats: Floats, engine: int, pool: int, now: float) -> None:
    """Apply what a step brings; where steps overlap, the device may run it for a while yet."""
    replica = ints[engine + REPLICA]
    end = floats[replica + DEVICE_FREE] if ints[pool + OVERLAPS] == 1 else now
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
    visible = now
    if floats[replica + FRONT_FREE] > now:
        visible = floats[replica + FRONT_FREE]
    if floats[pool + PER_TOKEN] > 0.0:
        tokens = 1.0 * ints[engine + DONE_COUNT]
        if ints[engine + IS_DECODING] == 1:
            tokens += floats[engine + RATES]
        visible += floats[pool + PER_TOKEN] * tokens
        floats[replica + FRONT_FREE] = visible
    if ints[pool + OVERLAPS] == 1:
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
    if ints[pool + OVERLAPS] == 0:
        show_tokens(ints, floats, engine, visible)


@kernel_part
def next_prompt(
    ints: Ints, floats: Floats, engine: int, pool: int, now: float, budget: int, is_first: bool
) -> int:
    """Admit the request that waits longest; return its tokens that the step computes, 0 where it may not enter."""
    request = ints[engine + WAIT_HEAD]
    if ints[engine + RUNNING] >= ints[pool + MAX_SEQUENCES] or floats[request + READY] > now:
        return 0
    if ints[request + PHASE] == TRANSFERRED:
        return 0
    return admit_request(ints, floats, engine, pool, now, budget, is_first)


@kernel_part
def what_blocks(ints: Ints, floats: Floats, engine: int, pool: int, now: float) -> int:
    """Return 2 where the waiting prompt is not ready, 1 where it stays out until a sequence ends, else 0."""
    if floats[ints[engine + WAIT_HEAD] + READY] > now:
        return 2
    if ints[engine + HELD] != 0:
        return 0
    if ints[engine + RUNNING] >= ints[pool + MAX_SEQUENCES]:
        return 1
    # What decoding needs next, or evicts, may let a request in that had no room before.
    if ints[pool + ROLE] != DECODE and (ints[pool + BY_CHUNK] == 0 or ints[pool + HAS_CACHE] == 0):
        return 1
    return 0


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
    while may_fill and budget > 0 and ints[engine + WAITING] > 0 and ints[engine + PARTIAL] < 0:
        request = ints[engine + WAIT_HEAD]
        length = next_prompt(ints, floats, engine, pool, now, budget, num_prompts == 0)
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
        ints[engine + BLOCKED] = (
            2 if ints[engine + WAITING] == 0 else what_blocks(ints, floats, engine, pool, now)
        )
    if num_decodes == 0 and num_prompts == 0:
        floats[engine + STEP_TIME] = 0.0
        return False
    floats[engine + STEP_TIME] = step_time(
        ints,
        floats,
        engine,
        pool,
        num_decodes,
        floats[engine + CONTEXT],
        floats[engine + SQUARE],
        tokens,
        attention,
        num_prompts,
    )
    return True
