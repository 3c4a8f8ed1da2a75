"""Flow-level network: what transfers that share links take from each other."""

from meshwright.simcore.network.flows import FlowSet, FlowTimes, simulate_flows

__all__ = ["FlowSet", "FlowTimes", "simulate_flows"]
