"""Runs of steps of pure decode, skipped through."""
# ruff: noqa: PLR1730 - calls of max() and min() halve the speed of plain Python

from __future__ import annotations

import math

from meshwright.simcore.compiled import kernel_part
from meshwright.simcore.serving.event_loop.blocks import take_blocks
from meshwright.simcore.serving.event_loop.costs import host_time, locate, token_time
from meshwright.simcore.serving.event_loop.fields import (
    BLOCKED,
    CONTEXT,
    CONTEXT_HINT,
    CONTEXTS_AT,
    COUNTER,
    CROSS,
    DECODE_AT,
    DECODE_BUSY,
    DECODES,
    DEVICE_FREE,
    EVICTABLE,
    FREE,
    FRONT_FREE,
    GROWTH_AT,
    IS_HIDDEN,
    MAX_GRAPH,
    NUM_CONTEXTS,
    OVERLAPS,
    PATIENCE,
    PER_TOKEN,
    POOL,
    RATE_SQUARE,
    RATES,
    READY,
    RESERVES,
    SKEW,
    SPECULATION,
    SQUARE,
    STEPS_RUN,
    STRIDE,
    WAIT_HEAD,
    WAITED,
    WAITING,
    WHEEL_AT,
    WHEEL_SIZE,
    Floats,
    Ints,
)

__all__ = ["count_steps", "last_start", "skip_decodes"]


@kernel_part
def last_start(ints: Ints, floats: Floats, engine: int, limit: float) -> float:
    """Return when the last step of pure decode may start: before ``limit``, and before a waiting prompt is ready."""
    if ints[engine + BLOCKED] == 2 and ints[engine + WAITING] > 0:
        ready: float = floats[ints[engine + WAIT_HEAD] + READY]
        if ready < limit:
            return ready
    return limit


@kernel_part
def count_steps(ints: Ints, replica: int, engine: int, num_steps: int) -> None:
    """Count steps of pure decode that were skipped through."""
    patience = ints[ints[replica + POOL] + PATIENCE]
    ints[STEPS_RUN] += num_steps
    ints[engine + COUNTER] += num_steps
    if patience > 0:
        ints[replica + WAITED] = (ints[replica + WAITED] + num_steps) % patience


@kernel_part
def skip_decodes(ints: Ints, floats: Floats, replica: int, engine: int, start: float, limit: float) -> float:
    """Run the steps of pure decode that change nothing else and end before ``limit``; return the end of the last.

    The same operations in the same order as :func:`step_time`, :func:`move_contexts` and :func:`grow_sequences`, on
    local variables: the compiler keeps those in registers, and a step takes nanoseconds.
    """
    pool, num_decodes = ints[replica + POOL], ints[engine + DECODES]
    time, bound, counter = start, last_start(ints, floats, engine, limit), ints[engine + COUNTER]
    wheel, wheel_size = ints[engine + WHEEL_AT], ints[WHEEL_SIZE]
    slot = counter % wheel_size
    growth, stride, has_growth = ints[engine + GROWTH_AT], ints[pool + STRIDE], ints[pool + RESERVES] == 0
    key = -counter % stride
    available, taken = ints[engine + FREE] + ints[engine + EVICTABLE], 0

    num_tokens = num_decodes * (1 + ints[pool + SPECULATION])
    is_graph = num_tokens <= floats[pool + MAX_GRAPH]
    fixed = token_time(ints, floats, pool, num_tokens, is_graph)
    host = host_time(floats, pool, num_decodes, 0, is_graph)
    is_hidden = ints[pool + IS_HIDDEN] == 1
    skew = floats[pool + SKEW] if num_decodes > 1 else 0.0

    context_sum, square_sum, cross = floats[engine + CONTEXT], floats[engine + SQUARE], floats[engine + CROSS]
    rates, rate_square = floats[engine + RATES], floats[engine + RATE_SQUARE]
    first, count = ints[pool + CONTEXTS_AT], ints[pool + NUM_CONTEXTS]
    decode_row = ints[pool + DECODE_AT] + 2 * count * num_decodes - first
    index = locate(floats, first, count, context_sum / num_decodes, ints[pool + CONTEXT_HINT])
    low, high = floats[index], floats[index + 1]
    value, slope = floats[decode_row + index], floats[decode_row + index + count]
    per_token, visible = floats[pool + PER_TOKEN], floats[replica + FRONT_FREE]
    busy, overlaps, free = (
        floats[engine + DECODE_BUSY],
        ints[pool + OVERLAPS] == 1,
        floats[replica + DEVICE_FREE],
    )
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
        begin, until = time, time + duration
        end = until
        if overlaps:
            end = time + host
            if free > time:
                begin = free
            until = begin + device
            if until < end:
                until = end
            if end < free:
                end = free
        if end >= limit:
            break
        free = until
        available -= need
        taken += need
        square_sum += 2.0 * cross + rate_square
        cross += rate_square
        context_sum += rates
        counter += 1
        slot = slot + 1 if slot + 1 < wheel_size else 0
        key = key - 1 if key > 0 else stride - 1
        busy += until - begin
        time = end
        if per_token > 0.0:
            if visible < end:
                visible = end
            visible += per_token * rates
    count_steps(ints, replica, engine, counter - ints[engine + COUNTER])
    if taken > 0:
        take_blocks(ints, engine, taken)
    floats[engine + CONTEXT], floats[engine + SQUARE], floats[engine + CROSS] = context_sum, square_sum, cross
    floats[replica + FRONT_FREE] = visible
    floats[engine + DECODE_BUSY] = busy
    if overlaps:
        floats[replica + DEVICE_FREE] = free
    return time
