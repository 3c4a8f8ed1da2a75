"""Collectives of machines that nobody measured: what NCCL's own constants make of a data sheet.

Every link reaches the share of its nominal bandwidth that its protocol leaves. A ring passes the slowest link, NVLink
switches of Hopper and later reduce in flight (:mod:`meshwright.costmodels.nvls`), a pair of a mesh owns one of its links,
and GPUs that meet on PCIe pass through host memory.
"""

from __future__ import annotations

from collections.abc import Mapping

from meshwright.costmodels.calibration import CollectiveCurve
from meshwright.costmodels.nvls import in_switch_gain
from meshwright.hardware_specs.specs import NodeSpec

__all__ = ["NIC_SHARE", "data_sheet_collectives", "link_share"]

# Share of the nominal bandwidth that each link's protocol leaves. NVLinks, PCIe and NICs: bandwidth of a link in
# NCCL's topology search (NVIDIA/nccl, src/graph/topo.h: 18 of 20, 20 of 25, 20 of 25, 20.6 of 25 and 40.1 of 50 GB/s,
# 12 of 15.75, 12 of 12.5); xGMI: 48 of 64 GB/s (AMD, "Understanding RCCL bandwidth and xGMI performance", 2025).
_SHARES: Mapping[str, float] = {
    "nvlink1": 0.9,
    "nvlink2": 0.8,
    "nvlink3": 0.8,
    "nvlink4": 0.824,
    "nvlink5": 0.802,
    "xgmi": 0.75,
    "pcie": 0.762,
}
NIC_SHARE = 0.96
# Start of a collective, a step between two GPUs, and in-switch reduction [s] (NVIDIA/nccl, src/graph/tuning.cc:
# baseLat and hwLat of the Simple protocol, which carries large messages).
_START, _NVLINK_STEP, _PCIE_STEP, _IN_SWITCH = 8.4e-6, 3.4e-6, 5.7e-6, 25e-6
# Latency and transfer blend as they do between nodes.
_EXPONENT = 0.8
# Share of the host's memory bandwidth that copies reach: 347 of 396 GB/s (nvbandwidth, ml-engineering).
_HOST_COPY = 0.88
_STEPS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}


def link_share(kind: str) -> float:
    """Return the share of a link's nominal bandwidth that transfers reach; a network's for kinds not known here."""
    known = (share for name, share in _SHARES.items() if kind.startswith(name))
    return next(known, NIC_SHARE)


def data_sheet_collectives(node: NodeSpec) -> Mapping[str, CollectiveCurve]:
    """Return the curves of collectives inside a node, from its data sheet alone.

    Parameters
    ----------
    node : NodeSpec
        GPUs, their links and, where they meet on PCIe, the memory of the host.

    Returns
    -------
    Mapping[str, CollectiveCurve]
        ``all_reduce``, ``all_gather``, ``reduce_scatter`` and ``all_to_all`` of 2, 4, ... ranks.
    """
    sizes = tuple(float(2**power) for power in range(1, 11) if 2**power <= max(2, node.num_gpus))
    return {collective: _curve(node, collective, sizes) for collective in _STEPS}


def _curve(node: NodeSpec, collective: str, sizes: tuple[float, ...]) -> CollectiveCurve:
    step = _NVLINK_STEP if node.gpu.scale_up is not None else _PCIE_STEP
    latency, efficiency = [], []
    for size in sizes:
        share = _ring_share(node, size)
        steps = 1.0 if collective == "all_to_all" else _STEPS[collective] * (size - 1.0)
        seconds = _START + steps * step
        gain = in_switch_gain(node.intra_link.kind, size) if collective == "all_reduce" else 0.0
        if node.topology == "switch" and gain > 1.0:
            share, seconds = gain * share, _IN_SWITCH
        latency.append(seconds)
        efficiency.append(share)
    return CollectiveCurve(
        ranks=sizes,
        latency=tuple(latency),
        link_efficiency=tuple(efficiency),
        exponent=(_EXPONENT,) * len(sizes),
    )


def _ring_share(node: NodeSpec, size: float) -> float:
    """Return the bandwidth of rings over some GPUs of a node, as a share of one GPU's link."""
    link = node.intra_link
    share = link_share(link.kind)
    if node.topology == "mesh":
        # Rings use the direct links among themselves only: one for a pair, all of them for all.
        return share * min(1.0, (size - 1.0) / max(1, node.num_gpus - 1))
    host = node.host
    if node.topology != "pcie" or host is None or host.memory_bandwidth_bytes_per_second is None:
        return share
    # Peers without access to each other write to the memory of their socket, of which each owns a share, and read again.
    staged = _HOST_COPY * host.memory_bandwidth_bytes_per_second / (2.0 * node.num_gpus)
    return min(share, staged / link.bandwidth_bytes_per_second)
