"""The life of a request in an engine: running, decoding, preempted, done."""

from __future__ import annotations

import math

from meshwright.simcore.compiled import kernel_part
from meshwright.simcore.serving.event_loop.blocks import release_blocks, take_blocks
from meshwright.simcore.serving.event_loop.events import push_event
from meshwright.simcore.serving.event_loop.fields import (
    AFTER,
    BEFORE,
    BLOCK,
    BLOCKED,
    COMPUTED,
    CONTEXT,
    COUNTER,
    CROSS,
    DECODES,
    DECODING,
    DONE,
    ENTRY,
    EVICTABLE,
    FINISH,
    FINISHED,
    FIRST_TOKEN,
    FREE,
    GROWTH_AT,
    HAS_CACHE,
    IS_CLOSED,
    KEY,
    LINK,
    LOAD,
    NEWER,
    NEWEST,
    NEXT_ROOT,
    NUM_ROOTS,
    OLDER,
    PACE,
    PARTIAL,
    PENDING,
    PENDING_HEAD,
    PHASE,
    POOL,
    PREEMPTIONS,
    PREFILLING,
    PRIVATE,
    PROMPT,
    QUEUED,
    RATE,
    RATE_SQUARE,
    RATES,
    REPLICA,
    RESERVES,
    ROOTS_AT,
    RUNNING,
    SCHEDULED,
    SQUARE,
    STEPS,
    STRIDE,
    SUCCESSOR,
    THINK,
    WAIT_HEAD,
    WAIT_TAIL,
    WAITING,
    WHEEL_AT,
    WHEEL_SIZE,
    Floats,
    Ints,
)

__all__ = [
    "clear_batch",
    "enter_decode",
    "enter_running",
    "finish_request",
    "grow_sequences",
    "leave_decode",
    "leave_running",
    "move_contexts",
    "note_token",
    "preempt_newest",
    "show_tokens",
]


@kernel_part
def note_token(ints: Ints, engine: int, request: int) -> None:
    """Remember that the client is to see a first or a last token."""
    ints[request + PENDING] = ints[engine + PENDING_HEAD]
    ints[engine + PENDING_HEAD] = request


@kernel_part
def show_tokens(ints: Ints, floats: Floats, engine: int, visible: float) -> None:
    """Let clients see the tokens of the last step: first tokens, last tokens, and the requests they cause."""
    request = ints[engine + PENDING_HEAD]
    ints[engine + PENDING_HEAD] = -1
    while request >= 0:
        following = ints[request + PENDING]
        if floats[request + FIRST_TOKEN] < 0.0:
            floats[request + FIRST_TOKEN] = visible
        if ints[request + PHASE] == DONE:
            floats[request + FINISH] = visible
            ints[FINISHED] += 1
            successor = ints[request + SUCCESSOR]
            if successor >= 0:
                push_event(ints, floats, visible + floats[successor + THINK], successor)
            elif ints[IS_CLOSED] == 1 and ints[NEXT_ROOT] < ints[NUM_ROOTS]:
                push_event(ints, floats, visible, ints[ints[ROOTS_AT] + ints[NEXT_ROOT]])
                ints[NEXT_ROOT] += 1
        request = following


@kernel_part
def enter_running(ints: Ints, floats: Floats, engine: int, request: int, now: float) -> None:
    """Move the first waiting request to the running ones."""
    ints[engine + WAIT_HEAD] = ints[request + LINK]
    ints[engine + WAITING] -= 1
    if ints[engine + WAITING] == 0:
        ints[engine + WAIT_TAIL] = -1
    newest = ints[engine + NEWEST]
    ints[request + OLDER] = newest
    ints[request + NEWER] = -1
    if newest >= 0:
        ints[newest + NEWER] = request
    ints[engine + NEWEST] = request
    ints[engine + RUNNING] += 1
    ints[request + PHASE] = PREFILLING
    if floats[request + SCHEDULED] < 0.0:
        floats[request + SCHEDULED] = now


@kernel_part
def leave_running(ints: Ints, engine: int, request: int) -> None:
    """Take a request out of the engine's list of running ones."""
    older, newer = ints[request + OLDER], ints[request + NEWER]
    if older >= 0:
        ints[older + NEWER] = newer
    if newer >= 0:
        ints[newer + OLDER] = older
    else:
        ints[engine + NEWEST] = older
    ints[engine + RUNNING] -= 1


@kernel_part
def enter_decode(ints: Ints, floats: Floats, engine: int, request: int, pool: int) -> None:
    """Let a request whose prompt is computed and first token emitted decode from the next step on."""
    counter = ints[engine + COUNTER]
    ints[request + PHASE] = DECODING
    ints[request + ENTRY] = counter
    rate = floats[request + RATE]
    context = ints[request + PROMPT] + 1.0
    floats[engine + CONTEXT] += context
    floats[engine + SQUARE] += context * context
    floats[engine + RATES] += rate
    floats[engine + RATE_SQUARE] += rate * rate
    floats[engine + CROSS] += context * rate
    ints[engine + DECODES] += 1
    if ints[pool + RESERVES] == 0:
        block, stride = ints[pool + BLOCK], ints[pool + STRIDE]
        left = -ints[request + PROMPT] % block
        until = math.ceil(left / floats[pool + PACE]) if stride != block else left
        key = (-until - counter) % stride
        ints[request + KEY] = key
        ints[ints[engine + GROWTH_AT] + key] += 1
    slot = ints[engine + WHEEL_AT] + (counter + ints[request + STEPS] - 1) % ints[WHEEL_SIZE]
    other = ints[slot]
    ints[request + BEFORE] = -1
    ints[request + AFTER] = other
    if other >= 0:
        ints[other + BEFORE] = request
    ints[slot] = request


@kernel_part
def leave_decode(ints: Ints, floats: Floats, engine: int, request: int, pool: int) -> None:
    """Undo :func:`enter_decode`, and count the blocks the request took while it decoded as its own."""
    counter, entry = ints[engine + COUNTER], ints[request + ENTRY]
    rate = floats[request + RATE]
    context = ints[request + PROMPT] + 1.0 + rate * (counter - entry)
    floats[engine + CONTEXT] -= context
    floats[engine + SQUARE] -= context * context
    floats[engine + RATES] -= rate
    floats[engine + RATE_SQUARE] -= rate * rate
    floats[engine + CROSS] -= context * rate
    ints[engine + DECODES] -= 1
    if ints[engine + DECODES] == 0:
        for row in range(5):
            floats[engine + row] = 0.0
    if ints[pool + RESERVES] == 0:
        stride, key = ints[pool + STRIDE], ints[request + KEY]
        ints[ints[engine + GROWTH_AT] + key] -= 1
        ints[request + PRIVATE] += (counter - 1 + key) // stride - (entry - 1 + key) // stride
    before, after = ints[request + BEFORE], ints[request + AFTER]
    if before >= 0:
        ints[before + AFTER] = after
    else:
        ints[ints[engine + WHEEL_AT] + (entry + ints[request + STEPS] - 1) % ints[WHEEL_SIZE]] = after
    if after >= 0:
        ints[after + BEFORE] = before


@kernel_part
def finish_request(ints: Ints, engine: int, request: int) -> None:
    """Free what a request holds that has its last token."""
    ints[request + PHASE] = DONE
    leave_running(ints, engine, request)
    pool = ints[ints[engine + REPLICA] + POOL]
    release_blocks(ints, engine, request, ints[pool + HAS_CACHE] == 1)
    ints[ints[engine + REPLICA] + LOAD] -= 1
    ints[engine + BLOCKED] = 0


@kernel_part
def clear_batch(ints: Ints, floats: Floats, engine: int, pool: int) -> None:
    """End a static batch: every place becomes free at once."""
    while ints[engine + NEWEST] >= 0:
        request = ints[engine + NEWEST]
        if ints[request + STEPS] > 0:
            leave_decode(ints, floats, engine, request, pool)
        leave_running(ints, engine, request)
        release_blocks(ints, engine, request, ints[pool + HAS_CACHE] == 1)
        ints[ints[engine + REPLICA] + LOAD] -= 1
    ints[engine + BLOCKED] = 0


@kernel_part
def preempt_newest(ints: Ints, floats: Floats, engine: int, pool: int) -> None:
    """Take all blocks from the request admitted last; it waits first in line to be recomputed."""
    request = ints[engine + NEWEST]
    if ints[request + PHASE] == DECODING:
        num_steps = ints[engine + COUNTER] - ints[request + ENTRY]
        leave_decode(ints, floats, engine, request, pool)
        ints[request + PROMPT] += int(floats[request + RATE] * num_steps + 0.5) + 1
        ints[request + STEPS] -= num_steps + 1
    else:
        ints[engine + PARTIAL] = -1
    leave_running(ints, engine, request)
    release_blocks(ints, engine, request, False)
    ints[request + COMPUTED] = 0
    ints[request + PHASE] = QUEUED
    ints[request + PREEMPTIONS] += 1
    ints[request + LINK] = ints[engine + WAIT_HEAD]
    ints[engine + WAIT_HEAD] = request
    if ints[engine + WAITING] == 0:
        ints[engine + WAIT_TAIL] = request
    ints[engine + WAITING] += 1


@kernel_part
def grow_sequences(ints: Ints, floats: Floats, engine: int, pool: int) -> bool:
    """Take the blocks that decoding sequences need for their next tokens; return whether any was preempted."""
    is_preempting = False
    if ints[pool + RESERVES] == 0:
        key = -ints[engine + COUNTER] % ints[pool + STRIDE]
        key += ints[engine + GROWTH_AT]
        available = ints[engine + FREE] + ints[engine + EVICTABLE]
        while ints[key] > available and ints[engine + RUNNING] > 1:
            preempt_newest(ints, floats, engine, pool)
            is_preempting = True
            available = ints[engine + FREE] + ints[engine + EVICTABLE]
        if ints[key] > available:
            # One request alone fits. With speculation its blocks are an estimate by the mean pace, here too many.
            ints[ints[engine + NEWEST] + PRIVATE] -= ints[key]
            return is_preempting
        take_blocks(ints, engine, ints[key])
    return is_preempting


@kernel_part
def move_contexts(floats: Floats, engine: int) -> None:
    """Let every decoding sequence grow by its rate."""
    square = floats[engine + RATE_SQUARE]
    floats[engine + SQUARE] += 2.0 * floats[engine + CROSS] + square
    floats[engine + CROSS] += square
    floats[engine + CONTEXT] += floats[engine + RATES]
