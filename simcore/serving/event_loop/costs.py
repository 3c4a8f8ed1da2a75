"""What one step of an engine costs, read from the step tables."""
# ruff: noqa: PLR1730 - calls of max() and min() halve the speed of plain Python

from __future__ import annotations

import math

from meshwright.simcore.compiled import kernel_part
from meshwright.simcore.serving.event_loop.fields import (
    CONTEXT_HINT,
    CONTEXTS_AT,
    DECODE_AT,
    EAGER_HOST,
    HOST,
    HOST_PROMPT,
    HOST_SEQUENCE,
    IS_HIDDEN,
    LATENCY,
    MAX_GRAPH,
    MIXED_DECODE,
    NUM_CONTEXTS,
    NUM_PROMPTS,
    NUM_TOKENS,
    OVERLAPS,
    PROMPT_HINT,
    PROMPTS_AT,
    SKEW,
    SPECULATION,
    STEP_HOST,
    TOKEN_HINT,
    TOKENS_AT,
    Floats,
    Ints,
)

__all__ = ["host_time", "locate", "prompt_attention", "step_time", "token_time"]


@kernel_part
def locate(floats: Floats, first: int, count: int, value: float, hint: int) -> int:
    """Return the index of the grid interval that holds ``value``, walking from the last one found."""
    index = hint
    last = first + count - 2
    while index < last and floats[index + 1] <= value:
        index += 1
    while index > first and floats[index] > value:
        index -= 1
    return index


@kernel_part
def prompt_attention(ints: Ints, floats: Floats, pool: int, length: float) -> float:
    """Return the attention time of one whole prompt of this length [s]."""
    first, count = ints[pool + PROMPTS_AT], ints[pool + NUM_PROMPTS]
    index = locate(floats, first, count, length, ints[pool + PROMPT_HINT])
    ints[pool + PROMPT_HINT] = index
    time: float = floats[index + count] + (length - floats[index]) * floats[index + 2 * count]
    return time


@kernel_part
def token_time(ints: Ints, floats: Floats, pool: int, num_tokens: int, is_graph: bool) -> float:
    """Return the device time of a step but for attention over the cache [s]."""
    count = ints[pool + NUM_TOKENS]
    index = locate(floats, ints[pool + TOKENS_AT], count, num_tokens, ints[pool + TOKEN_HINT])
    ints[pool + TOKEN_HINT] = index
    row = index + count if is_graph else index + 3 * count
    time: float = floats[row] + (num_tokens - floats[index]) * floats[row + count] + floats[pool + LATENCY]
    return time


@kernel_part
def host_time(floats: Floats, pool: int, num_sequences: int, num_prompts: int, is_graph: bool) -> float:
    """Return the host time of a step [s]."""
    time: float = floats[pool + HOST] + floats[pool + HOST_SEQUENCE] * num_sequences
    if not is_graph:
        eager = floats[pool + EAGER_HOST] + floats[pool + HOST_PROMPT] * num_prompts
        if time < eager:
            time = eager
    return time


@kernel_part
def step_time(
    ints: Ints,
    floats: Floats,
    engine: int,
    pool: int,
    num_decodes: int,
    context_sum: float,
    square_sum: float,
    prompt_tokens: int,
    attention: float,
    num_prompts: int,
) -> float:
    """Return the time of one step [s] by the formula of StepTable, of its device alone where steps overlap."""
    num_tokens = num_decodes * (1 + ints[pool + SPECULATION]) + prompt_tokens
    is_graph = prompt_tokens == 0 and num_tokens <= floats[pool + MAX_GRAPH]
    device = token_time(ints, floats, pool, num_tokens, is_graph) + attention
    if num_decodes > 0:
        context = context_sum / num_decodes
        first, count = ints[pool + CONTEXTS_AT], ints[pool + NUM_CONTEXTS]
        index = locate(floats, first, count, context, ints[pool + CONTEXT_HINT])
        ints[pool + CONTEXT_HINT] = index
        beyond = context - floats[index]
        if beyond < 0.0:
            beyond = 0.0
        row = ints[pool + DECODE_AT] + 2 * count * num_decodes + index - first
        decode = floats[row] + beyond * floats[row + count]
        skew = floats[pool + SKEW]
        if skew > 0.0 and num_decodes > 1:
            variance = square_sum / num_decodes - context * context
            if variance > 0.0:
                decode *= 1.0 + skew * math.sqrt(variance) / context
        if prompt_tokens > 0:
            decode *= floats[pool + MIXED_DECODE]
        device += decode
    host = host_time(floats, pool, num_decodes + num_prompts, num_prompts, is_graph)
    floats[engine + STEP_HOST] = host
    if ints[pool + OVERLAPS] == 1:
        return device
    if ints[pool + IS_HIDDEN] == 0:
        return device + host
    return host if host > device else device
