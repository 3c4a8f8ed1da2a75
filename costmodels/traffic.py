"""Which links of the fabric a plan's communications cross: the channels of its pipeline, data and expert parallelism.

What stays inside nodes takes its time whatever the network does. What leaves them is routed rank by rank: sends from a
stage to the next, rings of gradient reduction and parameter gather, exchanges inside operations whose groups span
nodes, and a checkpoint that is written meanwhile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.micro_batch import micro_batch_times
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.costmodels.stage import leading_per_stage, virtual_stage_parameters
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.rank_groups import RankGroup, rank_groups
from meshwright.simcore.network.channels import ChannelLinks, Channels
from meshwright.simcore.network.collectives import collective_phases
from meshwright.simcore.network.fabric import Fabric, UplinkRouting, cluster_fabric
from meshwright.simcore.schedules import SCHEDULES
from meshwright.simcore.training.contention import Exchange, IterationTraffic

__all__ = ["NetworkConditions", "PlanTraffic", "described_fabric", "plan_traffic"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Senders, receivers and relative sizes of flows, arrays of one length.
_Sizes = tuple[IntArray, IntArray, FloatArray]
# Weight in 16 bits, master weight and two moments in 32 bits: what a checkpoint holds of a parameter.
_CHECKPOINT_BYTES = 14.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConditions:
    """The network as it is, where it differs from what the cluster's description says.

    Parameters
    ----------
    fabric : Fabric
        Its links, slow and failed ones and other jobs' load included.
    checkpoint_bandwidth : float | None
        At which every node writes its part of a checkpoint through the fabric during the iteration; None writes none
        [B/s].
    """

    fabric: Fabric
    checkpoint_bandwidth: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanTraffic:
    """What a plan sends over the fabric.

    Parameters
    ----------
    traffic : IterationTraffic
        The channels, for the simulation.
    names : tuple[str, ...]
        Of the channels.
    fabric : Fabric
        What the numbers of links in ``traffic.channels`` refer to.
    """

    traffic: IterationTraffic
    names: tuple[str, ...]
    fabric: Fabric


def described_fabric(context: CostContext, routing: UplinkRouting = "adaptive", seed: int = 0) -> Fabric:
    """Return the network of the job's cluster; the cost models assume that every flow is spread over all cables.

    Raises
    ------
    SpecError
        If the nodes of the cluster differ.
    """
    context.cluster.require_one_kind("simulate --contention")
    efficiency = context.software.inter_node_efficiency
    return cluster_fabric(context.cluster, inter_efficiency=efficiency, routing=routing, seed=seed)


def plan_traffic(
    context: CostContext, plan: ParallelPlan, conditions: NetworkConditions | None = None
) -> PlanTraffic:
    """Return the channels of a plan on the hosts and GPUs of its mapping.

    Parameters
    ----------
    context : CostContext
        Job and software.
    plan : ParallelPlan
        Degrees, schedule, mapping.
    conditions : NetworkConditions | None
        The network as it is; None is as described.

    Raises
    ------
    SpecError
        If nodes differ, or a failed link cuts ranks off.
    """
    described = described_fabric(context)
    actual = described if conditions is None else conditions.fabric
    ranks = _Ranks(context, plan)
    flows = _Flows(described, ranks)
    schedule = SCHEDULES[plan.schedule]
    placement = schedule.placement(plan.pp, plan.vpp * schedule.num_model_copies)
    stage_of = np.empty(placement.size, dtype=np.int64)
    stage_of[placement] = np.arange(plan.pp)[:, np.newaxis]
    # Nothing follows the last virtual stage.
    hops = [*zip(stage_of[:-1].tolist(), stage_of[1:].tolist(), strict=True), (0, 0)]
    sends = np.array([flows.add_send(sender, receiver) for sender, receiver in hops])
    returns = np.array([flows.add_send(receiver, sender) for sender, receiver in hops])
    parameters = _stage_parameters(context, plan, placement.astype(np.int64))
    stages = range(plan.pp)
    reduce = np.array([flows.add_replicas("gradient reduction", s, parameters) for s in stages])
    gather = np.array([flows.add_replicas("parameter gather", s, parameters) for s in stages])
    exchanges = _exchanges(context, plan, ranks, flows, stage_of)
    written = 0.0
    if conditions is not None and conditions.checkpoint_bandwidth is not None:
        written = flows.add_checkpoint(parameters, conditions.checkpoint_bandwidth)
    links = [
        flows.on_links(fabric) for fabric in ((described,) if actual is described else (described, actual))
    ]
    channels = Channels(
        len(flows.names),
        links[0],
        described.capacity,
        links[-1],
        actual.capacity,
        np.array(flows.most_rate),
    )
    # A node writes through all its NICs at once.
    checkpoint_rate = described.shape.num_rails * channels.full_rate[-1:]
    traffic = IterationTraffic(
        channels=channels,
        activation=sends,
        gradient=returns,
        gather=gather[stage_of],
        reduce=reduce[stage_of],
        exchanges=exchanges,
        beside=((len(flows.names) - 1, written / float(checkpoint_rate[0])),) if written else (),
    )
    return PlanTraffic(traffic=traffic, names=tuple(flows.names), fabric=actual)


class _Ranks:
    """Where the ranks of a plan sit."""

    def __init__(self, context: CostContext, plan: ParallelPlan) -> None:
        mapping = plan.device_mapping or DeviceMapping()
        per_node = context.cluster.node.num_gpus
        numbers = np.arange(plan.num_gpus)
        node, local = numbers // per_node, numbers % per_node
        num_nodes = int(node.max()) + 1
        # A variant of a mapped plan may run on more hosts than were ordered: they are taken in their own order.
        is_ordered = len(mapping.host_order) >= num_nodes
        hosts = np.array(mapping.host_order if is_ordered else range(num_nodes), dtype=np.int64)
        orders = [
            mapping.gpus_of_node(each if len(mapping.gpu_orders) >= num_nodes else 0, per_node)
            for each in range(num_nodes)
        ]
        self.plan, self.order = plan, mapping.rank_order
        self.per_node = per_node
        #: GPU of each rank, in the numbering of the fabric.
        self.gpu: IntArray = hosts[node] * per_node + np.array(orders, dtype=np.int64)[node, local]
        inner = plan.tp * plan.cp
        stage, replica, rank = np.ogrid[: plan.pp, : plan.dp, :inner]
        if mapping.rank_order == "tp-cp-ep-pp-dp":
            number = (replica * plan.pp + stage) * inner + rank
        else:
            number = (stage * plan.dp + replica) * inner + rank
        #: Ranks of each stage, ``(pp, dp * cp * tp)``.
        self.of_stage: IntArray = number.reshape(plan.pp, -1)

    def groups(self, group: RankGroup, stage: int) -> IntArray:
        """Return the GPUs of a stage's groups, ``(num_groups, size)``."""
        groups = rank_groups(self.plan, group, self.order)
        gpus: IntArray = self.gpu[groups[np.isin(groups[:, 0], self.of_stage[stage])]]
        return gpus

    def shards(self, stage: int) -> IntArray:
        """Return the GPUs that share one copy of a stage's weights, ``(num_groups, size)``."""
        size = (self.plan.sharding_group or self.plan.dp) * self.plan.cp
        return self.groups("dp_cp", stage).reshape(-1, size)


class _Flows:
    """Flows of channels, gathered one channel after the other."""

    def __init__(self, fabric: Fabric, ranks: _Ranks) -> None:
        self._fabric, self._ranks = fabric, ranks
        self.names: list[str] = []
        self.most_rate: list[float] = []
        self._parts: dict[int, list[_Sizes]] = {}
        self._sends: dict[tuple[int, int], int] = {}
        self._written: tuple[int, FloatArray] | None = None

    def add_send(self, sender: int, receiver: int) -> int:
        """Return the channel from every rank of a stage to its peer in another."""
        if sender == receiver:
            return -1
        if (sender, receiver) not in self._sends:
            sources, destinations = (
                self._ranks.gpu[self._ranks.of_stage[each]] for each in (sender, receiver)
            )
            channel = self._add(
                f"send from stage {sender} to {receiver}", [(sources, destinations, np.ones(len(sources)))]
            )
            self._sends[sender, receiver] = channel
        return self._sends[sender, receiver]

    def add_replicas(self, name: str, stage: int, parameters: FloatArray) -> int:
        """Return the channel of a collective over a stage's replicas: rings, of experts and of everything else."""
        dense, expert = parameters[:, stage]
        parts = self._rings(self._ranks.groups("dp_cp", stage), dense)
        if expert > 0.0:
            parts += self._rings(self._ranks.groups("edp", stage), expert)
        return self._add(f"{name}, stage {stage}", parts)

    def add_exchange(self, name: str, stage: int, groups: IntArray, is_ring: bool) -> int:
        """Return the channel of a collective inside operations: rings, or all pairs of each group."""
        name = f"{name}, stage {stage}"
        if is_ring:
            return self._add(name, self._rings(groups, 1.0))
        sender, receiver = np.nonzero(~np.eye(groups.shape[1], dtype=bool))
        sources, destinations = groups[:, sender].ravel(), groups[:, receiver].ravel()
        return self._add(name, [(sources, destinations, np.ones(len(sources)))])

    def add_checkpoint(self, parameters: FloatArray, bandwidth: float) -> float:
        """Add the channel of a checkpoint; return what the node that holds most of it writes [B]."""
        shape, plan = self._fabric.shape, self._ranks.plan
        dense, expert = parameters / np.array([[plan.dp * plan.cp], [plan.expert_dp]])
        of_node = np.zeros(shape.num_nodes)
        for stage, ranks in enumerate(self._ranks.of_stage):
            np.add.at(of_node, self._ranks.gpu[ranks] // shape.gpus_per_node, dense[stage] + expert[stage])
        most = float(of_node.max())
        self.names.append("checkpoint")
        self.most_rate.append(bandwidth / shape.num_rails)
        self._written = (len(self.names) - 1, of_node / most)
        return _CHECKPOINT_BYTES * most

    def on_links(self, fabric: Fabric) -> ChannelLinks:
        """Return how many flows of each channel cross each link of a fabric."""
        found = [(channel, *_routed(fabric, parts)) for channel, parts in self._parts.items()]
        if self._written is not None:
            channel, share = self._written
            found.append((channel, *fabric.links_out(share)))
        links = [links for _, links, _ in found]
        return ChannelLinks(
            channel=np.repeat([channel for channel, _, _ in found], [len(each) for each in links]).astype(
                np.int64
            ),
            link=np.concatenate([np.zeros(0, dtype=np.int64), *links]),
            num_flows=np.concatenate([np.zeros(0), *(flows for _, _, flows in found)]),
        )

    def _rings(self, groups: IntArray, size: float) -> list[_Sizes]:
        per_node = self._fabric.shape.gpus_per_node
        nodes = groups // per_node
        if (nodes == nodes[:, :1]).all():
            return []
        return [
            (phase.sources, phase.destinations, phase.num_bytes)
            for gpus in groups
            for phase in collective_phases(self._fabric, "all_gather", "ring", gpus.tolist(), size)
        ]

    def _add(self, name: str, parts: list[_Sizes]) -> int:
        """Return the number of a new channel; -1 for one that stays inside nodes."""
        per_node = self._fabric.shape.gpus_per_node
        if not any(
            (sources // per_node != destinations // per_node).any() for sources, destinations, _ in parts
        ):
            return -1
        number = len(self.names)
        self.names.append(name)
        self.most_rate.append(math.inf)
        largest = max(float(size.max()) for _, _, size in parts)
        self._parts[number] = [(sources, to, size / largest) for sources, to, size in parts]
        return number


def _routed(fabric: Fabric, parts: list[_Sizes]) -> tuple[IntArray, FloatArray]:
    """Return the links that some flows cross, and the flows on each."""
    sources, destinations, sizes = (np.concatenate(column) for column in zip(*parts, strict=True))
    routes = fabric.routes(sources, destinations)
    flow, column = np.nonzero(routes >= 0)
    on_link = np.zeros(fabric.num_links)
    np.add.at(on_link, routes[flow, column], sizes[flow])
    links = np.flatnonzero(on_link).astype(np.int64)
    return links, on_link[links]


def _stage_parameters(context: CostContext, plan: ParallelPlan, placement: IntArray) -> FloatArray:
    """Return the trained parameters of one rank of each stage, dense and of experts, ``(2, pp)``."""
    columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
    rows = columns.take(np.zeros(placement.size, dtype=np.int64))
    held = virtual_stage_parameters(context, plan, rows)
    return np.stack([held.dense_trained[placement].sum(axis=1), held.expert_trained[placement].sum(axis=1)])


def _exchanges(
    context: CostContext, plan: ParallelPlan, ranks: _Ranks, flows: _Flows, stage_of: IntArray
) -> tuple[Exchange, ...]:
    """Return the communication inside operations of each axis whose groups leave their node."""
    if plan.layer_groups:
        return ()
    columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
    times = micro_batch_times(context, columns)
    copies = len(stage_of) // len(plan.layers_per_stage)
    layers = np.tile(np.array(plan.layers_per_stage, dtype=np.float64), copies)
    leading = np.tile(leading_per_stage(context, plan.layers_per_stage), copies)
    recomputed = np.minimum(layers, float(columns.recompute_layers[0]))
    axes: tuple[tuple[str, RankGroup | None, str, bool], ...] = (
        ("tp", "tp", "tensor parallel collectives", True),
        ("cp", "cp", "context parallel exchange", plan.cp_method != "ulysses"),
        ("ep", "ep", "expert exchange", False),
        ("dp", None, "sharded weights", True),
    )
    found = []
    for axis, group, name, is_ring in axes:
        forward, backward, repeated = (
            (layers - leading) * float(getattr(times.layer, part).get(axis, np.zeros(1))[0])
            + leading * float(getattr(times.dense_layer, part).get(axis, np.zeros(1))[0])
            for part in ("forward_axes", "backward_axes", "recompute_axes")
        )
        backward = backward + repeated * recomputed / np.maximum(layers, 1.0)
        if not (forward.any() or backward.any()):
            continue
        channel = np.array(
            [
                flows.add_exchange(
                    name, stage, ranks.shards(stage) if group is None else ranks.groups(group, stage), is_ring
                )
                for stage in range(plan.pp)
            ]
        )
        if (channel >= 0).any():
            found.append(Exchange(channel=channel[stage_of], forward_time=forward, backward_time=backward))
    return tuple(found)
