"""What unequal links between nodes make of a plan's sends and data parallel collectives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.hardware_specs.topology import ClusterTopology, LinkMatrix
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.schedules import SCHEDULES
from meshwright.simcore.training.costs import IterationCosts

__all__ = ["LinkFactors", "flat_bandwidth", "link_factors", "with_link_factors"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinkFactors:
    """How much longer transfers between nodes take than over the flat fabric, at least 1.

    Parameters
    ----------
    hop : FloatArray
        Sends from a stage to another in the pipeline whose hops take longest together, ``(num_stages, num_stages)``.
    ring : FloatArray
        Data parallel collectives of each stage, whose slowest link sets the pace, ``(num_stages,)``.
    """

    hop: FloatArray
    ring: FloatArray


def flat_bandwidth(context: CostContext) -> float:
    """Return the bandwidth between two nodes that the flat model assumes: what a measurement would show [B/s]."""
    node = context.cluster.node
    bandwidth = node.num_nics * node.nic.bandwidth_bytes_per_second
    topology = context.cluster.topology
    is_measured = topology is not None and topology.matrix is not None
    # Described links are data-sheet figures, of which collectives reach the same share as of the node's own NICs.
    return bandwidth * (context.software.inter_node_efficiency if is_measured else 1.0)


def link_factors(context: CostContext, plan: ParallelPlan) -> LinkFactors | None:
    """Return the factors of a plan on its hosts; None where the fabric is flat.

    Tensor, context and expert parallel exchanges that leave a node, and gathers of ZeRO-3 within the layers, are left
    as the flat model has them.
    """
    cluster = context.cluster
    if cluster.topology is None:
        return None
    bandwidth = _links(cluster).bandwidth.copy()
    np.fill_diagonal(bandwidth, np.inf)
    # A hop goes forward with activations and back with gradients: the slower direction counts.
    slowdown = np.maximum(1.0, flat_bandwidth(context) / np.minimum(bandwidth, bandwidth.T))
    hosts = _hosts(plan, cluster)
    columns = np.unique(hosts, axis=1)
    path = slowdown[columns[:-1], columns[1:]].sum(axis=0)
    slowest = columns[:, int(np.argmax(path))]
    hop = slowdown[slowest[:, None], slowest[None, :]]
    # Stages, data parallel ranks, ranks of one replica.
    rings = hosts.reshape(plan.pp, plan.dp * plan.cp, plan.tp)
    ring = slowdown[rings, np.roll(rings, -1, axis=1)].max(axis=(1, 2))
    return LinkFactors(hop=hop, ring=ring)


def with_link_factors(context: CostContext, plan: ParallelPlan, costs: IterationCosts) -> IterationCosts:
    """Return a plan's costs with its sends and data parallel collectives as long as its hosts make them."""
    factors = link_factors(context, plan)
    if factors is None:
        return costs
    placement = SCHEDULES[plan.schedule].placement(costs.num_stages, costs.num_chunks)
    stage_of = np.empty(placement.size, dtype=np.int64)
    stage_of[placement] = np.arange(costs.num_stages)[:, np.newaxis]
    return replace(
        costs,
        send_time=costs.send_time * factors.hop[stage_of, np.roll(stage_of, -1)],
        gradient_reduce_time=costs.gradient_reduce_time * factors.ring[stage_of],
        parameter_gather_time=costs.parameter_gather_time * factors.ring[stage_of],
    )


def _hosts(plan: ParallelPlan, cluster: ClusterSpec) -> NDArray[np.int64]:
    """Return the host of every rank, ``(pp, dp * cp * tp)``, ranks of a stage in Megatron's order."""
    mapping = plan.device_mapping or DeviceMapping()
    inner = plan.tp * plan.cp
    stage, replica, rank = np.ogrid[: plan.pp, : plan.dp, :inner]
    if mapping.rank_order == "tp-cp-ep-pp-dp":
        number = (replica * plan.pp + stage) * inner + rank
    else:
        number = (stage * plan.dp + replica) * inner + rank
    node = (number // cluster.node.num_gpus).reshape(plan.pp, -1)
    # A variant of a mapped plan may run on more hosts than were ordered: they are taken in their own order.
    is_ordered = len(mapping.host_order) > int(node.max())
    order = np.array(mapping.host_order if is_ordered else range(int(node.max()) + 1), dtype=np.int64)
    hosts: NDArray[np.int64] = order[node]
    return hosts


def _links(cluster: ClusterSpec) -> LinkMatrix:
    topology = cluster.topology or ClusterTopology()
    bandwidth = cluster.node.num_nics * cluster.node.nic.bandwidth_bytes_per_second
    return _pair_links(topology, cluster.num_nodes, bandwidth, cluster.fabric.latency)


@lru_cache(maxsize=4)
def _pair_links(topology: ClusterTopology, num_nodes: int, bandwidth: float, latency: float) -> LinkMatrix:
    """Return the links of all pairs, kept: a search asks for them with every plan it simulates."""
    return topology.pair_links(num_nodes, bandwidth, latency)
