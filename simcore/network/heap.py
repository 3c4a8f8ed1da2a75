"""A binary heap of records that know their place, so that any of them can move or leave."""

from __future__ import annotations

from meshwright.simcore.compiled import kernel_part
from meshwright.simcore.network.flow_memory import ENTRIES_AT, KEY, PLACE, SIZE, Floats, Ints

__all__ = ["put_record", "take_record"]


@kernel_part
def put_record(ints: Ints, floats: Floats, heap: int, record: int, key: float) -> None:
    """Put a record where its new key belongs, whether the heap holds it already or not."""
    index = ints[record + PLACE]
    if index < 0:
        index = ints[heap + SIZE]
        ints[heap + SIZE] = index + 1
    elif key > floats[record + KEY]:
        floats[record + KEY] = key
        sink(ints, floats, heap, record, index)
        return
    floats[record + KEY] = key
    rise(ints, floats, heap, record, index)


@kernel_part
def take_record(ints: Ints, floats: Floats, heap: int, record: int) -> None:
    """Take a record out of the heap that holds it."""
    index = ints[record + PLACE]
    size = ints[heap + SIZE] - 1
    ints[heap + SIZE] = size
    ints[record + PLACE] = -1
    if index == size:
        return
    last = ints[ints[heap + ENTRIES_AT] + size]
    if floats[last + KEY] > floats[record + KEY]:
        sink(ints, floats, heap, last, index)
    else:
        rise(ints, floats, heap, last, index)


@kernel_part
def rise(ints: Ints, floats: Floats, heap: int, record: int, index: int) -> None:
    """Put a record at a free place, or higher up."""
    base, key = ints[heap + ENTRIES_AT], floats[record + KEY]
    while index > 0:
        above = (index - 1) >> 1
        other = ints[base + above]
        if floats[other + KEY] <= key:
            break
        ints[base + index] = other
        ints[other + PLACE] = index
        index = above
    ints[base + index] = record
    ints[record + PLACE] = index


@kernel_part
def sink(ints: Ints, floats: Floats, heap: int, record: int, index: int) -> None:
    """Put a record at a free place, or lower down."""
    base, size, key = ints[heap + ENTRIES_AT], ints[heap + SIZE], floats[record + KEY]
    child = 2 * index + 1
    while child < size:
        other = ints[base + child]
        if child + 1 < size and floats[ints[base + child + 1] + KEY] < floats[other + KEY]:
            child += 1
            other = ints[base + child]
        if floats[other + KEY] >= key:
            break
        ints[base + index] = other
        ints[other + PLACE] = index
        index = child
        child = 2 * index + 1
    ints[base + index] = record
    ints[record + PLACE] = index
