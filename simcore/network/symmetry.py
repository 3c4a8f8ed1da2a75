"""Symmetric traffic, folded: flows that must progress alike become one entry, exactly.

Links and flows are coloured until every link of a colour carries the same number of flows of each colour and every
flow of a colour crosses the same colours of links (an equitable partition, found by colour refinement: Paige and
Tarjan, SIAM J. Comput. 1987). Max-min rates are unique, hence equal within a colour, and so is all that follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.network.fabric import Fabric, mixed_bits
from meshwright.simcore.network.flows import FlowSet

__all__ = ["FoldedFlows", "folded_flows"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoldedFlows:
    """Flows of one class each, and the class of every flow.

    Parameters
    ----------
    flows : FlowSet
        One entry per class, over one link per class of links.
    class_of : IntArray
        Entry that each original flow became, ``(num_flows,)``.
    """

    flows: FlowSet
    class_of: IntArray


def folded_flows(fabric: Fabric, routes: IntArray, num_bytes: FloatArray) -> FoldedFlows:
    """Fold flows that start together.

    Parameters
    ----------
    fabric : Fabric
        Gives the links' capacities and kinds.
    routes : IntArray
        Links of each flow, at least one each, unused places -1, ``(num_flows, longest)``.
    num_bytes : FloatArray
        Of each flow, ``(num_flows,)`` [B].

    Notes
    -----
    A class of ``k`` links of capacity ``c`` becomes one link of ``k c`` that all flows of the class cross, which
    leaves each flow's share what it was. Links of different kinds never share a class, so no flow crosses one twice.
    """
    used, compact = np.unique(routes, return_inverse=True)
    compact = compact.reshape(routes.shape)
    if used[0] < 0:
        used, compact = used[1:], compact - 1
    is_hop = compact >= 0
    owner, hops = np.nonzero(is_hop)[0], compact[is_hop]
    capacity = fabric.capacity[used]
    link_colour = mixed_bits(np.stack([fabric.kind[used].view(np.uint64), capacity.view(np.uint64)]), 1)
    flow_colour = mixed_bits(num_bytes.astype(np.float64).view(np.uint64)[None, :], 2)
    num_colours = 0
    while True:
        crossed, carried = np.zeros_like(flow_colour), np.zeros_like(link_colour)
        np.add.at(crossed, owner, mixed_bits(link_colour[None, hops], 3))
        np.add.at(carried, hops, mixed_bits(flow_colour[None, owner], 4))
        flow_colour = mixed_bits(np.stack([flow_colour, crossed]), 5)
        link_colour = mixed_bits(np.stack([link_colour, carried]), 6)
        found = len(np.unique(flow_colour)) + len(np.unique(link_colour))
        if found == num_colours:
            break
        num_colours = found
    _, first_flow, class_of = np.unique(flow_colour, return_index=True, return_inverse=True)
    _, first_link, link_class = np.unique(link_colour, return_index=True, return_inverse=True)
    rows = np.where(is_hop[first_flow], link_class[compact[first_flow]], -1)
    flows = FlowSet(
        capacity=capacity[first_link] * np.bincount(link_class),
        route_starts=np.concatenate([[0], np.cumsum((rows >= 0).sum(axis=1))]).astype(np.int64),
        route_links=rows[rows >= 0].astype(np.int64),
        num_bytes=num_bytes[first_flow].astype(np.float64),
        start=np.zeros(len(first_flow)),
        multiplicity=np.bincount(class_of).astype(np.float64),
    )
    return FoldedFlows(flows=flows, class_of=class_of.astype(np.int64))
