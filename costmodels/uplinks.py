"""How much of the uplinks of tiers one communication of a plan fills: the flows that leave a group of nodes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["UplinkTier", "Uplinks"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UplinkTier:
    """The groups of one tier.

    Parameters
    ----------
    group : IntArray
        Group of each host, ``(num_hosts,)``.
    capacity : FloatArray
        What a group's uplinks carry, each way, in flat nodes' worth: its hosts over the oversubscription up to here,
        ``(num_groups,)``.
    """

    group: IntArray
    capacity: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Uplinks:
    """The uplinks of all tiers that carry less than their nodes send.

    Parameters
    ----------
    tiers : Sequence[UplinkTier]
        Lowest first.
    gpus_per_node : int
        GPUs of a node; each sends with an equal share of its NICs.
    num_planes : int
        Parts of every uplink that data of different rails does not share; 1 where rails meet in the leaf.

    Notes
    -----
    A flow that alone takes its GPU's share of the NICs takes as many times as long as all flows of the communication
    ask more of the fullest uplink on its way than that carries: the time of
    :class:`meshwright.simcore.network.fabric.Fabric` for the communication without others, spread over all cables.
    """

    tiers: Sequence[UplinkTier]
    gpus_per_node: int
    num_planes: int

    def flows(self, source: IntArray, destination: IntArray, gpu: IntArray) -> FloatArray:
        """Return how much longer flows that run at once take, at least 1; arguments and result of one shape.

        Parameters
        ----------
        source, destination : IntArray
            Hosts of each flow.
        gpu : IntArray
            GPU of a host on whose rail it crosses the network.
        """
        longest = np.ones(source.shape)
        plane = self._plane(gpu)
        for tier in self.tiers:
            out, into = tier.group[source], tier.group[destination]
            leaves = out != into
            for end in (out, into):
                filled = self._filled(tier, end[leaves], plane[leaves], np.ones(int(leaves.sum())))
                longest[leaves] = np.maximum(longest[leaves], filled[end[leaves], plane[leaves]])
        return longest

    def alone(self) -> FloatArray:
        """Return how much longer one flow takes that has all uplinks to itself, ``(num_hosts, num_hosts)``."""
        longest = np.ones((len(self.tiers[0].group),) * 2)
        for tier in self.tiers:
            filled = self.num_planes / (self.gpus_per_node * tier.capacity)[tier.group]
            leaves = tier.group[:, np.newaxis] != tier.group
            longest = np.where(leaves, np.maximum(longest, np.maximum.outer(filled, filled)), longest)
        return longest

    def exchange(self, hosts: IntArray, gpus: IntArray, ranks_per_node: float) -> float:
        """Return how much longer all-to-alls that run at once take, at least 1.

        Parameters
        ----------
        hosts, gpus : IntArray
            Of the members of every group, ``(num_groups, size)``.
        ranks_per_node : float
            Members on one node, to whom nothing crosses the network.
        """
        size = hosts.shape[1]
        if size <= ranks_per_node:
            return 1.0
        longest = 1.0
        for tier in self.tiers:
            member_of = tier.group[hosts]
            near = _equal_in_row(member_of)
            # Of what a member sends over its NICs, the part for members of other groups of the tier.
            share = (size - near) / (size - ranks_per_node)
            filled = self._filled(tier, member_of.ravel(), self._plane(gpus).ravel(), share.ravel())
            longest = max(longest, float(filled.max()))
        return longest

    def _filled(self, tier: UplinkTier, group: IntArray, plane: IntArray, share: FloatArray) -> FloatArray:
        """Return what is asked of each uplink over what it carries, ``(num_groups, num_planes)``."""
        num_groups = len(tier.capacity)
        asked = np.bincount(
            group * self.num_planes + plane, weights=share, minlength=num_groups * self.num_planes
        ).reshape(num_groups, self.num_planes)
        shares: FloatArray = tier.capacity[:, np.newaxis] * self.gpus_per_node / self.num_planes
        filled: FloatArray = asked / shares
        return filled

    def _plane(self, gpu: IntArray) -> IntArray:
        plane: IntArray = gpu * self.num_planes // self.gpus_per_node
        return plane


def _equal_in_row(values: IntArray) -> FloatArray:
    """Return how many values of its row equal each, itself included, ``(num_rows, num_columns)``."""
    row = np.arange(len(values))[:, np.newaxis]
    _, inverse, counts = np.unique(
        row * (int(values.max()) + 1) + values, return_inverse=True, return_counts=True
    )
    equal: FloatArray = counts[np.reshape(inverse, values.shape)].astype(np.float64)
    return equal
