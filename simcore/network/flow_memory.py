"""The records that the max-min kernels work on, in one array of integers and one of floats.

A record is named by its address, the same in both arrays: ``floats[flow + RATE]``, ``ints[link + HEAD]``. The first
two fields of flows and links serve the heaps alike.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BOTTLENECK",
    "CAPACITY",
    "DECIDED",
    "ENDS",
    "ENTRIES_AT",
    "FIRST_HOP",
    "FLOW",
    "HEAD",
    "HOP_STRIDE",
    "IS_STALE",
    "KEY",
    "LAST_HOP",
    "LEFT",
    "LEVEL",
    "LEVELS",
    "LINK",
    "NEXT",
    "OWNER",
    "PLACE",
    "PREVIOUS",
    "RATE",
    "RELEASE",
    "RELEASED",
    "SEEN",
    "SINCE",
    "SIZE",
    "SWEEP",
    "USAGE",
    "Floats",
    "Ints",
    "flow_memory",
]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Header: how often rates were solved; a heap of links by level and one of flows by end.
SWEEP, LEVELS, ENDS, _HEADER = 0, 1, 3, 5
SIZE, ENTRIES_AT = 0, 1
# Both flows and links: place in their heap or -1; what it is sorted by.
PLACE = 0
KEY = 0
# Flows, integers: hop records, the link that sets the rate or -1, sweeps in which the rate was decided, released; who
# the flow belongs to.
FIRST_HOP, LAST_HOP, BOTTLENECK, DECIDED, RELEASED, OWNER, _FLOW_STRIDE = 1, 2, 3, 4, 5, 6, 7
# Flows, floats: the key is the end at the present rate; rate, volume left at a time.
RATE, LEFT, SINCE = 1, 2, 3
# Links, integers: first hop record of the flows on it or -1, sweep that touched it, whether its level may be higher.
HEAD, SEEN, IS_STALE, _LINK_STRIDE = 1, 2, 3, 4
# Links, floats: the key is the lesser of the level at which it saturates and that at which it used to.
CAPACITY, LEVEL, RELEASE = 1, 2, 3
# Hops: flow and link, neighbours in the link's list; what a unit of the flow's rate takes from the link.
FLOW, LINK, NEXT, PREVIOUS, HOP_STRIDE = 0, 1, 2, 3, 4
USAGE = 0


def flow_memory(
    capacity: Floats, route_starts: Ints, route_links: Ints, usage: Floats
) -> tuple[Ints, Floats, Ints]:
    """Return integers and floats of flows that have not begun, and the address of each flow.

    Parameters
    ----------
    capacity : Floats
        Of each link, ``(num_links,)``.
    route_starts, route_links : Ints
        Links of each flow, as :class:`~meshwright.simcore.network.flows.FlowSet` has them.
    usage : Floats
        What a unit of the flow's rate takes from the link, per entry of ``route_links``.
    """
    num_links, num_flows, num_hops = len(capacity), len(route_starts) - 1, len(route_links)
    links_at = _HEADER
    flows_at = links_at + num_links * _LINK_STRIDE
    hops_at = flows_at + num_flows * _FLOW_STRIDE
    levels_at = hops_at + num_hops * HOP_STRIDE
    ends_at = levels_at + num_links
    ints = np.full(ends_at + num_flows, -1, dtype=np.int64)
    floats = np.zeros(levels_at)
    ints[:_HEADER] = [0, 0, levels_at, 0, ends_at]
    links = links_at + np.arange(num_links, dtype=np.int64) * _LINK_STRIDE
    flows = flows_at + np.arange(num_flows, dtype=np.int64) * _FLOW_STRIDE
    hops = hops_at + np.arange(num_hops, dtype=np.int64) * HOP_STRIDE
    floats[links + CAPACITY] = capacity
    ints[flows + FIRST_HOP] = hops_at + route_starts[:-1] * HOP_STRIDE
    ints[flows + LAST_HOP] = hops_at + route_starts[1:] * HOP_STRIDE
    ints[hops + FLOW] = np.repeat(flows, np.diff(route_starts))
    ints[hops + LINK] = links[route_links]
    floats[hops + USAGE] = usage
    return ints, floats, flows
