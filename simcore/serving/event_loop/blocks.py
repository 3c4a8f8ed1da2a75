"""The blocks of the KV cache: free, held by requests, and cached parts of prompts that requests share."""

from __future__ import annotations

from meshwright.simcore.compiled import kernel_part
from meshwright.simcore.serving.event_loop.fields import (
    BLOCKS_AT,
    CACHE_AT,
    EVICTABLE,
    FINAL_SEGMENT,
    FIRST_SEGMENT,
    FREE,
    FRESHEST,
    NUM_SEGMENTS,
    PRIVATE,
    REFS,
    STALEST,
    Ints,
)

__all__ = [
    "append_segment",
    "matched_segments",
    "release_blocks",
    "share_prompt",
    "shared_blocks",
    "take_blocks",
    "unlink_segment",
]


@kernel_part
def matched_segments(ints: Ints, engine: int, request: int) -> int:
    """Return how many leading shared segments of a prompt the engine's cache holds."""
    first, count, cache = ints[request + FIRST_SEGMENT], 0, ints[engine + CACHE_AT]
    for index in range(first, first + ints[request + NUM_SEGMENTS]):
        if ints[cache + 3 * ints[index]] < 0:
            break
        count += 1
    return count


@kernel_part
def shared_blocks(ints: Ints, request: int, count: int) -> int:
    """Return the blocks of the first segments of a prompt."""
    first, blocks = ints[request + FIRST_SEGMENT], 0
    for index in range(first, first + count):
        blocks += ints[ints[BLOCKS_AT] + ints[index]]
    return blocks


@kernel_part
def unlink_segment(ints: Ints, engine: int, segment: int) -> None:
    """Take a segment out of the list of those that may be evicted."""
    cache = ints[engine + CACHE_AT]
    before, after = ints[cache + 3 * segment + 1], ints[cache + 3 * segment + 2]
    if before < 0:
        ints[engine + STALEST] = after
    else:
        ints[cache + 3 * before + 2] = after
    if after < 0:
        ints[engine + FRESHEST] = before
    else:
        ints[cache + 3 * after + 1] = before
    ints[engine + EVICTABLE] -= ints[ints[BLOCKS_AT] + segment]


@kernel_part
def append_segment(ints: Ints, engine: int, segment: int) -> None:
    """Let a segment that no request uses any more be evicted, after all others."""
    cache, fresh = ints[engine + CACHE_AT], ints[engine + FRESHEST]
    ints[cache + 3 * segment] = 0
    ints[cache + 3 * segment + 1] = fresh
    ints[cache + 3 * segment + 2] = -1
    if fresh < 0:
        ints[engine + STALEST] = segment
    else:
        ints[cache + 3 * fresh + 2] = segment
    ints[engine + FRESHEST] = segment
    ints[engine + EVICTABLE] += ints[ints[BLOCKS_AT] + segment]


@kernel_part
def take_blocks(ints: Ints, engine: int, count: int) -> None:
    """Take blocks, evicting the cached segments used least recently where none is free."""
    while ints[engine + FREE] < count:
        segment = ints[engine + STALEST]
        unlink_segment(ints, engine, segment)
        ints[ints[engine + CACHE_AT] + 3 * segment] = -1
        ints[engine + FREE] += ints[ints[BLOCKS_AT] + segment]
    ints[engine + FREE] -= count


@kernel_part
def release_blocks(ints: Ints, engine: int, request: int, is_final: bool) -> None:
    """Give back a request's blocks; what it shares, and with ``is_final`` its answer, stays cached."""
    cache, held = ints[engine + CACHE_AT], ints[request + PRIVATE]
    first, refs, final = ints[request + FIRST_SEGMENT], ints[request + REFS], ints[request + FINAL_SEGMENT]
    if is_final and final >= 0 and refs == ints[request + NUM_SEGMENTS] and ints[cache + 3 * final] < 0:
        held -= ints[ints[BLOCKS_AT] + final]
        append_segment(ints, engine, final)
    ints[engine + FREE] += held
    ints[request + PRIVATE] = 0
    ints[request + REFS] = 0
    # The deepest first: what others build on is evicted last.
    for index in range(first + refs - 1, first - 1, -1):
        segment = ints[index]
        ints[cache + 3 * segment] -= 1
        if ints[cache + 3 * segment] == 0:
            append_segment(ints, engine, segment)


@kernel_part
def share_prompt(ints: Ints, engine: int, request: int) -> None:
    """Turn the computed blocks of a prompt's shared segments into cached ones."""
    cache, first = ints[engine + CACHE_AT], ints[request + FIRST_SEGMENT]
    for index in range(first + ints[request + REFS], first + ints[request + NUM_SEGMENTS]):
        segment = ints[index]
        if ints[cache + 3 * segment] >= 0:
            break
        ints[cache + 3 * segment] = 1
        ints[request + PRIVATE] -= ints[ints[BLOCKS_AT] + segment]
        ints[request + REFS] += 1
