"""Plans on hosts with unequal links: the layouts that say which links each group of ranks uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.rank_layout import BestHosts, HostRanks
from meshwright.costmodels.uplinks import Uplinks, UplinkTier
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.hardware_specs.topology import ClusterTopology, LinkMatrix
from meshwright.simcore.domain.device_mapping import RANK_ORDERS, DeviceMapping
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.schedules import SCHEDULES
from meshwright.simcore.training.costs import IterationCosts

__all__ = [
    "best_hosts",
    "costs_on_hosts",
    "flat_bandwidth",
    "gpu_slowdown",
    "host_ranks",
    "host_slowdown",
    "lies_apart",
    "on_best_hosts",
    "on_hosts",
    "own_slowdown",
    "stage_contexts",
    "uplinks",
    "with_stages",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def flat_bandwidth(context: CostContext) -> float:
    """Return the bandwidth between two nodes that the flat model assumes: what a measurement would show [B/s]."""
    node = context.cluster.node
    bandwidth = node.num_nics * node.nic.bandwidth_bytes_per_second
    topology = context.cluster.topology
    is_measured = topology is not None and topology.matrix is not None
    # Described links are data-sheet figures, of which collectives reach the same share as of the node's own NICs.
    return bandwidth * (context.software.inter_node_efficiency if is_measured else 1.0)


def host_slowdown(context: CostContext) -> FloatArray:
    """Return how much longer a transfer between two hosts takes when all hosts send at once, ``(num_nodes, num_nodes)``.

    Over its time on the flat fabric: at least 1, and 1 on the diagonal. A hop goes forward with activations and back
    with gradients: of a link's two directions the slower counts.
    """
    return _slowdown(context, context.cluster.topology)


def own_slowdown(context: CostContext) -> FloatArray:
    """Return the same for a GPU's transfer that has the uplinks of all tiers to itself; measured links share none."""
    topology = context.cluster.topology
    slowdown = _slowdown(context, None if topology is None else _without_tiers(topology))
    shared = uplinks(context)
    return slowdown if shared is None else np.maximum(slowdown, shared.alone())


def _slowdown(context: CostContext, topology: ClusterTopology | None) -> FloatArray:
    bandwidth = _links(context.cluster, topology).bandwidth.copy()
    np.fill_diagonal(bandwidth, np.inf)
    slowdown: FloatArray = np.maximum(1.0, flat_bandwidth(context) / np.minimum(bandwidth, bandwidth.T))
    return slowdown


def uplinks(context: CostContext) -> Uplinks | None:
    """Return the uplinks that carry less than their nodes send; None without.

    Their capacity is that of :class:`meshwright.simcore.network.fabric.Fabric`.
    """
    cluster = context.cluster
    topology = cluster.topology
    if topology is None or topology.matrix is not None:
        return None
    of_node = np.full(cluster.num_nodes, flat_bandwidth(context))
    island = topology.island_of_node(cluster.num_nodes)
    for number, each in enumerate(topology.islands):
        if each.bandwidth is not None:
            of_node[island == number] = each.bandwidth
    tiers, passed = [], of_node / flat_bandwidth(context)
    for tier in topology.tiers:
        passed = passed / tier.oversubscription
        group = np.arange(cluster.num_nodes) // tier.nodes_per_group
        if (passed < 1.0).any():
            capacity = np.bincount(group, weights=passed).astype(np.float64)
            tiers.append(UplinkTier(group=group, capacity=capacity))
    if not tiers:
        return None
    node = cluster.node
    planes = min(node.num_nics, node.num_gpus) if cluster.fabric.is_rail_optimized else 1
    return Uplinks(tiers=tuple(tiers), gpus_per_node=node.num_gpus, num_planes=planes)


def gpu_slowdown(cluster: ClusterSpec) -> FloatArray | None:
    """Return the time between two GPUs of a node over that of the node's usual link; None where all are alike.

    Below 1 where a pair has a faster link of its own, such as an NVLink bridge in a PCIe server.
    """
    links = None if cluster.topology is None else cluster.topology.gpu_links
    if links is None:
        return None
    bandwidth = np.array(links)
    np.fill_diagonal(bandwidth, np.inf)
    usual = cluster.node.intra_link.bandwidth_bytes_per_second
    slowdown: FloatArray = usual / np.minimum(bandwidth, bandwidth.T)
    np.fill_diagonal(slowdown, 1.0)
    return slowdown


def host_ranks(context: CostContext, plan: ParallelPlan) -> HostRanks:
    """Return where the ranks of a plan sit on the hosts and GPUs of its device mapping."""
    cluster, mapping = context.cluster, plan.device_mapping or DeviceMapping()
    per_node, inner = cluster.node.num_gpus, plan.tp * plan.cp
    is_turned = mapping.rank_order != RANK_ORDERS[0]
    stage, replica, rank = np.ogrid[: plan.pp, : plan.dp, :inner]
    number = (replica * plan.pp + stage if is_turned else stage * plan.dp + replica) * inner + rank
    number = number.reshape(plan.pp, -1)
    node = number // per_node
    num_nodes = int(node.max()) + 1
    # A variant of a mapped plan may run on more hosts than were ordered: they are taken in their own order.
    is_ordered = len(mapping.host_order) >= num_nodes
    order = np.array(mapping.host_order if is_ordered else range(num_nodes), dtype=np.int64)
    rows = len(mapping.gpu_orders) if len(mapping.gpu_orders) >= num_nodes else 1
    # Nor may it use as many GPUs of a node.
    has_gpus = bool(mapping.gpu_orders) and len(mapping.gpu_orders[0]) == min(per_node, plan.num_gpus)
    gpus = np.array(mapping.gpu_orders[:rows] if has_gpus else [range(per_node)], dtype=np.int64)
    return HostRanks(
        hosts=order[node],
        gpus=gpus[node if len(gpus) > 1 else 0, number % per_node],
        stage=None,
        gpus_per_node=per_node,
        replica_ranks=inner,
        replica_stride=inner * plan.pp if is_turned else inner,
        slowdown=own_slowdown(context),
        uplinks=uplinks(context),
        gpu_slowdown=gpu_slowdown(cluster),
    )


def lies_apart(context: CostContext, plan: ParallelPlan) -> bool:
    """Return whether the ranks of a plan do anything but fill equal nodes in Megatron's default order.

    False in a context that has a layout already.
    """
    if context.layout is not None:
        return False
    mapping = plan.device_mapping
    is_turned = mapping is not None and mapping.rank_order != RANK_ORDERS[0]
    return is_turned or context.cluster.topology is not None


def on_hosts(context: CostContext, plan: ParallelPlan) -> CostContext:
    """Return the context in which groups of a plan use the links of its hosts, the worst of all stages."""
    if not lies_apart(context, plan):
        return context
    return replace(context, layout=host_ranks(context, plan))


def costs_on_hosts(
    context: CostContext,
    plans: Sequence[ParallelPlan],
    price: Callable[[CostContext, list[ParallelPlan]], list[IterationCosts]],
) -> list[IterationCosts]:
    """Return the costs of plans, every stage with the links of its own hosts.

    ``price`` returns the costs of plans with the links of one stage for all: each stage takes its own part. Stages on
    equal links are priced once, and plans whose ranks lie alike together.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, plan in enumerate(plans):
        alike.setdefault((plan.pp, plan.dp, plan.tp * plan.cp, plan.device_mapping), []).append(index)
    found: dict[int, IterationCosts] = {}
    for members in alike.values():
        chosen = [plans[index] for index in members]
        parts = [(own, price(of_stages, chosen)) for own, of_stages in stage_contexts(context, chosen[0])]
        for place, index in enumerate(members):
            of_stages = {stage: costs[place] for own, costs in parts for stage in own}
            found[index] = with_stages(plans[index], of_stages[0], of_stages)
    return [found[index] for index in range(len(plans))]


def stage_contexts(context: CostContext, plan: ParallelPlan) -> list[tuple[list[int], CostContext]]:
    """Return the contexts in which groups use the links of some stages of a plan, each with these stages.

    Layer-wise plans are priced as a whole, with the worst of all stages; so is a context that has a layout.
    """
    if not lies_apart(context, plan) or plan.layer_groups:
        return [(list(range(plan.pp)), on_hosts(context, plan))]
    ranks = host_ranks(context, plan)
    stages: dict[bytes, list[int]] = {}
    for stage in range(plan.pp):
        stages.setdefault(_link_signature(ranks, stage), []).append(stage)
    return [(own, replace(context, layout=replace(ranks, stage=own[0]))) for own in stages.values()]


def with_stages(
    plan: ParallelPlan, costs: IterationCosts, of_stages: Mapping[int, IterationCosts]
) -> IterationCosts:
    """Return costs in which some stages take what they take in others; sends stay."""
    placement = SCHEDULES[plan.schedule].placement(costs.num_stages, costs.num_chunks)
    arrays = {
        each.name: getattr(costs, each.name).copy()
        for each in fields(costs)
        if isinstance(getattr(costs, each.name), np.ndarray) and each.name != "send_time"
    }
    for stage, own in of_stages.items():
        for name, values in arrays.items():
            rows = np.array([stage]) if name == "optimizer_time" else placement[stage]
            values[rows] = getattr(own, name)[rows]
    return replace(costs, **arrays)


def _link_signature(ranks: HostRanks, stage: int) -> bytes:
    """Return what tells stages with different links apart."""
    hosts, where = np.unique(ranks.hosts[stage], return_inverse=True)
    first_seen = np.argsort(np.unique(where, return_index=True)[1])
    # Hosts in the order in which the ranks meet them.
    rank_of = np.argsort(first_seen)
    links = ranks.slowdown[np.ix_(hosts[first_seen], hosts[first_seen])]
    parts: list[NDArray[Any]] = [links, rank_of[where], ranks.gpus[stage]]
    for tier in () if ranks.uplinks is None else ranks.uplinks.tiers:
        group = tier.group[hosts[first_seen]]
        parts += [group[:, np.newaxis] == group, tier.capacity[group]]
    return b"".join(part.tobytes() for part in parts)


def best_hosts(context: CostContext, *, may_turn: bool) -> BestHosts:
    """Return what no placement on the hosts can beat.

    Parameters
    ----------
    context : CostContext
        Job; its cluster has a topology.
    may_turn : bool
        Whether plans may number pipeline stages before replicas.

    Notes
    -----
    A ring over k hosts lies within a part of the cluster that links no slower than its slowest connect, and each of
    them has two such links (one where two hosts form it): its slowdown is at least that at which a part of k hosts
    first hangs together, and the k-th smallest of the hosts' second best links. In an all-to-all over k hosts each
    exchanges with its k - 1 nearest at best, and the k-th best of the hosts is one of the group or better. Uplinks of
    tiers slow what one GPU's flow alone would fill: who spreads over groups of nodes leaves room in each.
    """
    slowdown = own_slowdown(context)
    num_hosts = len(slowdown)
    links = slowdown + np.diag(np.full(num_hosts, np.inf))
    ring, exchange = np.ones(num_hosts + 1), np.ones(num_hosts + 1)
    if num_hosts > 1:
        nearest = np.sort(links, axis=1)[:, :-1]
        means = np.cumsum(nearest, axis=1) / np.arange(1, num_hosts)
        exchange[2:] = [
            np.partition(means[:, size - 2], size - 1)[size - 1] for size in range(2, num_hosts + 1)
        ]
        ring[2:] = _least_connected(slowdown)
        ring[3:] = np.maximum(ring[3:], np.sort(nearest[:, min(1, num_hosts - 2)])[2:])
    between_gpus = gpu_slowdown(context.cluster)
    inside = (
        1.0 if between_gpus is None else float(between_gpus[~np.eye(len(between_gpus), dtype=bool)].min())
    )
    return BestHosts(
        gpus_per_node=context.cluster.node.num_gpus,
        ring=ring,
        exchange=exchange,
        hop=1.0 if num_hosts < 2 else float(links.min()),
        inside=min(1.0, inside),
        may_turn=may_turn,
    )


def on_best_hosts(context: CostContext, *, may_turn: bool) -> CostContext:
    """Return the context in which plans cost what they cost at least, whatever hosts, GPUs and order they are given."""
    return replace(context, layout=best_hosts(context, may_turn=may_turn))


def _least_connected(slowdown: FloatArray) -> FloatArray:
    """Return the least slowdown of links that connect k hosts, for every k from 2, ``(num_hosts - 1,)``."""
    # Imported late: few clusters have a topology.
    from scipy.sparse.csgraph import minimum_spanning_tree

    num_hosts = len(slowdown)
    tree = minimum_spanning_tree(slowdown).tocoo()
    least = np.full(num_hosts + 1, np.inf)
    part, members = np.arange(num_hosts), {host: [host] for host in range(num_hosts)}
    largest = 1
    for edge in np.argsort(tree.data, kind="stable"):
        one, two = part[tree.row[edge]], part[tree.col[edge]]
        moved = members.pop(two)
        part[moved] = one
        members[one].extend(moved)
        if len(members[one]) > largest:
            least[largest + 1 : len(members[one]) + 1] = tree.data[edge]
            largest = len(members[one])
    return least[2:]


@lru_cache(maxsize=4)
def _without_tiers(topology: ClusterTopology) -> ClusterTopology:
    return replace(topology, tiers=())


def _links(cluster: ClusterSpec, topology: ClusterTopology | None) -> LinkMatrix:
    bandwidth = cluster.node.num_nics * cluster.node.nic.bandwidth_bytes_per_second
    return _pair_links(topology or ClusterTopology(), cluster.num_nodes, bandwidth, cluster.fabric.latency)


@lru_cache(maxsize=4)
def _pair_links(topology: ClusterTopology, num_nodes: int, bandwidth: float, latency: float) -> LinkMatrix:
    """Return the links of all pairs, kept: a search asks for them with every plan it simulates."""
    return topology.pair_links(num_nodes, bandwidth, latency)
