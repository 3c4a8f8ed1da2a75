"""Arrivals to come, as a binary heap."""

from __future__ import annotations

from meshwright.simcore.compiled import kernel_part
from meshwright.simcore.serving.event_loop.fields import EVENTS_AT, HEAP, Floats, Ints

__all__ = ["pop_event", "push_event"]


@kernel_part
def push_event(ints: Ints, floats: Floats, time: float, request: int) -> None:
    """Add an arrival to come to the binary heap, ordered by time and then by request."""
    base = ints[EVENTS_AT]
    index = ints[HEAP]
    ints[HEAP] = index + 1
    while index > 0:
        parent = (index - 1) >> 1
        if floats[base + parent] < time or (floats[base + parent] == time and ints[base + parent] < request):
            break
        floats[base + index] = floats[base + parent]
        ints[base + index] = ints[base + parent]
        index = parent
    floats[base + index] = time
    ints[base + index] = request


@kernel_part
def pop_event(ints: Ints, floats: Floats) -> int:
    """Take the earliest arrival to come from the heap and return its request."""
    base = ints[EVENTS_AT]
    size = ints[HEAP] - 1
    ints[HEAP] = size
    result: int = ints[base + 0]
    time, request = floats[base + size], ints[base + size]
    index = 0
    child = 1
    while child < size:
        other = child + 1
        if other < size and (
            floats[base + other] < floats[base + child]
            or (floats[base + other] == floats[base + child] and ints[base + other] < ints[base + child])
        ):
            child = other
        if time < floats[base + child] or (time == floats[base + child] and request < ints[base + child]):
            break
        floats[base + index] = floats[base + child]
        ints[base + index] = ints[base + child]
        index = child
        child = 2 * index + 1
    floats[base + index] = time
    ints[base + index] = request
    return result
