"""The compiled loop under :mod:`meshwright.simcore.network.flows`."""
# ruff: noqa: PLR1730 - a call of min() halves the speed of plain Python

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.compiled import compiled

__all__ = ["run_flows"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@compiled
def run_flows(
    capacity: FloatArray,
    route_starts: IntArray,
    route_links: IntArray,
    flow_of: IntArray,
    num_bytes: FloatArray,
    begin: FloatArray,
    multiplicity: FloatArray,
    order: IntArray,
    finish: FloatArray,
    head: IntArray,
    following: IntArray,
    preceding: IntArray,
) -> int:
    """Run flows to their end; return how often rates were computed.

    ``order`` sorts the flows by ``begin``. ``finish`` (zeros) receives the result. ``head`` (-1 per link),
    ``following`` and ``preceding`` (-1 per hop) link the hops of the active flows of each link; hop ``h`` is an
    index into ``route_links`` and belongs to flow ``flow_of[h]``.
    """
    num_flows, num_links = len(num_bytes), len(capacity)
    infinity = np.inf
    left = [0.0] * num_flows
    rate = [0.0] * num_flows
    new_rate = [0.0] * num_flows
    since = [0.0] * num_flows
    end = [infinity] * num_flows
    place = [-1] * num_flows
    active = [0] * num_flows
    num_active = 0
    flow_mark = [-1] * num_flows
    link_mark = [-1] * num_links
    found_links = [0] * num_links
    found_flows = [0] * num_flows
    room = [0.0] * num_links
    demand = [0.0] * num_links
    touched = [0] * num_links
    key = [0.0] * num_links
    entry = [0] * num_links
    next_arrival = 0
    num_solves = 0
    while next_arrival < num_flows or num_active > 0:
        # The time of the next event: a begin or the earliest end.
        now = infinity
        if next_arrival < num_flows:
            now = begin[order[next_arrival]]
        for index in range(num_active):
            if end[active[index]] < now:
                now = end[active[index]]
        num_touched = 0
        # Ends at that time: hops leave their links.
        index = 0
        while index < num_active:
            flow = active[index]
            if end[flow] > now:
                index += 1
                continue
            finish[flow] = now
            end[flow] = infinity
            num_active -= 1
            active[index] = active[num_active]
            place[active[index]] = index
            for hop in range(route_starts[flow], route_starts[flow + 1]):
                link = route_links[hop]
                if preceding[hop] >= 0:
                    following[preceding[hop]] = following[hop]
                else:
                    head[link] = following[hop]
                if following[hop] >= 0:
                    preceding[following[hop]] = preceding[hop]
                if link_mark[link] != num_solves:
                    link_mark[link] = num_solves
                    touched[num_touched] = link
                    num_touched += 1
        # Begins at that time: hops join their links. A flow without bytes ends at once.
        while next_arrival < num_flows and begin[order[next_arrival]] <= now:
            flow = order[next_arrival]
            next_arrival += 1
            if num_bytes[flow] <= 0.0:
                finish[flow] = now
                continue
            left[flow] = num_bytes[flow]
            rate[flow] = 0.0
            since[flow] = now
            active[num_active] = flow
            place[flow] = num_active
            num_active += 1
            for hop in range(route_starts[flow], route_starts[flow + 1]):
                link = route_links[hop]
                preceding[hop] = -1
                following[hop] = head[link]
                if head[link] >= 0:
                    preceding[head[link]] = hop
                head[link] = hop
                if link_mark[link] != num_solves:
                    link_mark[link] = num_solves
                    touched[num_touched] = link
                    num_touched += 1
        # The component of links and flows around the touched links.
        num_found_links, num_found_flows = num_touched, 0
        for index in range(num_touched):
            found_links[index] = touched[index]
        index = 0
        while index < num_found_links:
            link = found_links[index]
            index += 1
            room[link] = capacity[link]
            demand[link] = 0.0
            hop = head[link]
            while hop >= 0:
                flow = flow_of[hop]
                demand[link] += multiplicity[flow]
                if flow_mark[flow] != num_solves:
                    flow_mark[flow] = num_solves
                    found_flows[num_found_flows] = flow
                    num_found_flows += 1
                    new_rate[flow] = -1.0
                    for other in range(route_starts[flow], route_starts[flow + 1]):
                        if link_mark[route_links[other]] != num_solves:
                            link_mark[route_links[other]] = num_solves
                            found_links[num_found_links] = route_links[other]
                            num_found_links += 1
                hop = following[hop]
        # Progressive filling: the link with the least room per flow fixes its flows, until all are fixed. Shares only
        # grow on the way, so a heap of links whose entries may be too small finds the least one.
        size = 0
        for index in range(num_found_links):
            link = found_links[index]
            if demand[link] > 0.0:
                key[size], entry[size] = room[link] / demand[link], link
                size += 1
        for root in range(size // 2 - 1, -1, -1):
            at, value, link = root, key[root], entry[root]
            child = 2 * at + 1
            while child < size:
                if child + 1 < size and key[child + 1] < key[child]:
                    child += 1
                if key[child] >= value:
                    break
                key[at], entry[at] = key[child], entry[child]
                at, child = child, 2 * child + 1
            key[at], entry[at] = value, link
        num_open = num_found_flows
        while num_open > 0:
            link, least = entry[0], key[0]
            share = room[link] / demand[link] if demand[link] > 0.0 else infinity
            if share == least:
                hop = head[link]
                while hop >= 0:
                    flow = flow_of[hop]
                    if new_rate[flow] < 0.0:
                        new_rate[flow] = least
                        num_open -= 1
                        for other in range(route_starts[flow], route_starts[flow + 1]):
                            crossed = route_links[other]
                            room[crossed] = max(0.0, room[crossed] - least * multiplicity[flow])
                            demand[crossed] -= multiplicity[flow]
                    hop = following[hop]
                # What rounding left of the demand belongs to no flow.
                demand[link] = 0.0
                share = infinity
            # The link goes down to where its share, or the end of its use, belongs.
            at, child = 0, 1
            while child < size:
                if child + 1 < size and key[child + 1] < key[child]:
                    child += 1
                if key[child] >= share:
                    break
                key[at], entry[at] = key[child], entry[child]
                at, child = child, 2 * child + 1
            key[at], entry[at] = share, link
        for index in range(num_found_flows):
            flow = found_flows[index]
            if new_rate[flow] != rate[flow]:
                left[flow] = max(0.0, left[flow] - rate[flow] * (now - since[flow]))
                rate[flow] = new_rate[flow]
                since[flow] = now
                end[flow] = now + left[flow] / new_rate[flow]
        num_solves += 1
    return num_solves
