"""Weighted max-min rates, kept up to date as flows begin and end: only what an event changes is computed again.

Progressive filling raises all rates together; a link that saturates at a level fixes the flows on it that are not
fixed yet. After an event the filling is repeated, but only on links that carry a flow whose rate turned out
different: all others saturate at the level they did before. A link touched so is looked at twice at most levels,
both in a heap: where it saturates now, and where it used to, for from there on its old flows go on rising and touch
their other links. Levels come out of the heap in rising order, hence what was decided below stays decided.
"""
# ruff: noqa: PLR1730 - a call of max() halves the speed of plain Python

from __future__ import annotations

import math

from meshwright.simcore.compiled import kernel_part
from meshwright.simcore.network.flow_memory import (
    BOTTLENECK,
    CAPACITY,
    DECIDED,
    ENDS,
    ENTRIES_AT,
    FIRST_HOP,
    FLOW,
    HEAD,
    HOP_STRIDE,
    IS_STALE,
    KEY,
    LAST_HOP,
    LEFT,
    LEVEL,
    LEVELS,
    LINK,
    NEXT,
    PLACE,
    PREVIOUS,
    RATE,
    RELEASE,
    RELEASED,
    SEEN,
    SINCE,
    SIZE,
    SWEEP,
    USAGE,
    Floats,
    Ints,
)
from meshwright.simcore.network.heap import put_record, take_record

__all__ = ["begin_flow", "end_flow", "next_end", "solve_rates"]

# Levels this close are one: summing the same rates in another order must not count as a change.
SAME = 2.0**-43


@kernel_part
def begin_flow(ints: Ints, floats: Floats, flow: int, volume: float, now: float) -> None:
    """Let a flow join its links; its rate is 0 until the next :func:`solve_rates`."""
    floats[flow + RATE] = 0.0
    floats[flow + LEFT] = volume
    floats[flow + SINCE] = now
    ints[flow + BOTTLENECK] = -1
    ints[flow + RELEASED] = ints[SWEEP]
    for hop in range(ints[flow + FIRST_HOP], ints[flow + LAST_HOP], HOP_STRIDE):
        link = ints[hop + LINK]
        head = ints[link + HEAD]
        ints[hop + PREVIOUS] = -1
        ints[hop + NEXT] = head
        if head >= 0:
            ints[head + PREVIOUS] = hop
        ints[link + HEAD] = hop
        touch(ints, floats, link, 0.0)


@kernel_part
def end_flow(ints: Ints, floats: Floats, flow: int) -> None:
    """Let a flow leave its links."""
    take_record(ints, floats, ENDS, flow)
    for hop in range(ints[flow + FIRST_HOP], ints[flow + LAST_HOP], HOP_STRIDE):
        link, before, after = ints[hop + LINK], ints[hop + PREVIOUS], ints[hop + NEXT]
        if before >= 0:
            ints[before + NEXT] = after
        else:
            ints[link + HEAD] = after
        if after >= 0:
            ints[after + PREVIOUS] = before
        touch(ints, floats, link, 0.0)


@kernel_part
def next_end(ints: Ints, floats: Floats) -> float:
    """Return when the next flow ends at present rates; infinity without flows."""
    if ints[ENDS + SIZE] == 0:
        return math.inf
    end: float = floats[ints[ints[ENDS + ENTRIES_AT]] + KEY]
    return end


@kernel_part
def solve_rates(ints: Ints, floats: Floats, now: float) -> None:
    """Make the rates of all flows max-min fair again after flows began and ended; close this sweep."""
    while ints[LEVELS + SIZE] > 0:
        link = ints[ints[LEVELS + ENTRIES_AT]]
        if ints[link + IS_STALE] == 1:
            find_level(ints, floats, link)
        elif floats[link + RELEASE] < floats[link + LEVEL] * (1.0 - SAME):
            release_flows(ints, floats, link)
        else:
            take_record(ints, floats, LEVELS, link)
            saturate(ints, floats, link, now)
    ints[SWEEP] += 1


@kernel_part
def touch(ints: Ints, floats: Floats, link: int, level: float) -> None:
    """Have a link's level found anew; it lies no lower than ``level``."""
    ints[link + SEEN] = ints[SWEEP]
    ints[link + IS_STALE] = 1
    if ints[link + PLACE] < 0 or floats[link + KEY] > level:
        put_record(ints, floats, LEVELS, link, level)


@kernel_part
def find_level(ints: Ints, floats: Floats, link: int) -> None:
    """Find where a touched link saturates if undecided flows keep their rates at most, and where it used to.

    Flows that it held back itself, and released ones, have no such limit. Those whose limit is below the level are
    found by raising it from below: it settles after a few passes.
    """
    sweep, level = ints[SWEEP], floats[link + KEY]
    release, load = -1.0, 0.0
    num_held, num_free = -1, 0
    while True:
        room, demand, held = floats[link + CAPACITY], 0.0, 0
        hop = ints[link + HEAD]
        while hop >= 0:
            flow, usage = ints[hop + FLOW], floats[hop + USAGE]
            rate = floats[flow + RATE]
            if ints[flow + DECIDED] == sweep:
                room -= usage * rate
            elif ints[flow + RELEASED] == sweep:
                demand += usage
                num_free += 1
            elif ints[flow + BOTTLENECK] == link:
                demand += usage
                num_free += 1
                if rate > release:
                    release = rate
            elif rate < level:
                room -= usage * rate
                held += 1
            else:
                demand += usage
                load += usage * rate
            hop = ints[hop + NEXT]
        if demand <= 0.0 or (num_free == 0 and load <= room + SAME * floats[link + CAPACITY]):
            level = math.inf
            break
        is_settled = held == num_held or room <= level * demand
        if room > level * demand:
            level = room / demand
        if is_settled:
            break
        num_held, load = held, 0.0
    ints[link + IS_STALE] = 0
    floats[link + LEVEL] = level
    floats[link + RELEASE] = release if release >= 0.0 else math.inf
    key = floats[link + RELEASE]
    if level < key:
        key = level
    if key < math.inf:
        put_record(ints, floats, LEVELS, link, key)
    else:
        take_record(ints, floats, LEVELS, link)


@kernel_part
def release_flows(ints: Ints, floats: Floats, link: int) -> None:
    """Let the flows that a link used to hold back rise above their old rates, on their other links too."""
    sweep, level = ints[SWEEP], floats[link + RELEASE]
    hop = ints[link + HEAD]
    while hop >= 0:
        flow = ints[hop + FLOW]
        if (
            ints[flow + BOTTLENECK] == link
            and ints[flow + DECIDED] != sweep
            and ints[flow + RELEASED] != sweep
        ):
            ints[flow + RELEASED] = sweep
            for other in range(ints[flow + FIRST_HOP], ints[flow + LAST_HOP], HOP_STRIDE):
                if ints[other + LINK] != link:
                    touch(ints, floats, ints[other + LINK], level)
        hop = ints[hop + NEXT]
    floats[link + RELEASE] = math.inf
    if floats[link + LEVEL] < math.inf:
        put_record(ints, floats, LEVELS, link, floats[link + LEVEL])
    else:
        take_record(ints, floats, LEVELS, link)


@kernel_part
def saturate(ints: Ints, floats: Floats, link: int, now: float) -> None:
    """Decide the rates of the flows that reach the level at which a link is full."""
    sweep, level = ints[SWEEP], floats[link + LEVEL]
    least = level * (1.0 - SAME)
    hop = ints[link + HEAD]
    while hop >= 0:
        flow = ints[hop + FLOW]
        if ints[flow + DECIDED] != sweep and (
            ints[flow + RELEASED] == sweep or ints[flow + BOTTLENECK] == link or floats[flow + RATE] >= least
        ):
            decide_rate(ints, floats, flow, link, now)
        hop = ints[hop + NEXT]


@kernel_part
def decide_rate(ints: Ints, floats: Floats, flow: int, link: int, now: float) -> None:
    """Fix a flow's rate at a link's level, and tell the other links it crosses."""
    sweep, level, rate = ints[SWEEP], floats[link + LEVEL], floats[flow + RATE]
    ints[flow + DECIDED] = sweep
    ints[flow + BOTTLENECK] = link
    is_changed = level > rate * (1.0 + SAME) or level < rate * (1.0 - SAME)
    if is_changed:
        left = floats[flow + LEFT] - rate * (now - floats[flow + SINCE])
        if left < 0.0:
            left = 0.0
        floats[flow + LEFT] = left
        floats[flow + SINCE] = now
        floats[flow + RATE] = level
        put_record(ints, floats, ENDS, flow, now + left / level)
    for hop in range(ints[flow + FIRST_HOP], ints[flow + LAST_HOP], HOP_STRIDE):
        other = ints[hop + LINK]
        if ints[other + SEEN] == sweep:
            # Its level can only be higher than was thought: it will be asked when it comes up.
            ints[other + IS_STALE] = 1
        elif is_changed:
            touch(ints, floats, other, level)
