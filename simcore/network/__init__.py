"""Flow-level network: what transfers that share links take from each other, and collectives over a cluster's links."""

from meshwright.simcore.network.channels import ChannelLinks, Channels
from meshwright.simcore.network.collectives import (
    collective_flow_time,
    collective_phases,
    concurrent_flow_times,
)
from meshwright.simcore.network.fabric import Fabric, FabricShape, cluster_fabric
from meshwright.simcore.network.flows import FlowSet, FlowTimes, simulate_flows

__all__ = [
    "ChannelLinks",
    "Channels",
    "Fabric",
    "FabricShape",
    "FlowSet",
    "FlowTimes",
    "cluster_fabric",
    "collective_flow_time",
    "collective_phases",
    "concurrent_flow_times",
    "simulate_flows",
]
