"""Plans on clusters of several kinds of node: each stage and each replica costed with the context of its own GPUs.

Two ways to run such a cluster are priced, and their combinations: pipeline stages on different kinds, and data parallel
replicas on different kinds, which may take different numbers of micro-batches. Replicas whose stages lie on the same
kinds, with as many micro-batches, form a group that is simulated once; the slowest group makes the iteration, since
all wait for the reduction of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.iteration import uniform_costs
from meshwright.costmodels.memory import MemoryColumns, plan_memory
from meshwright.costmodels.plan_columns import FloatColumn
from meshwright.errors import SpecError
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.schedules import SCHEDULES
from meshwright.simcore.training.costs import IterationCosts
from meshwright.simcore.training.iteration import iteration_time

__all__ = [
    "ReplicaGroup",
    "StageMemory",
    "gpus_of_kinds",
    "mixed_costs",
    "mixed_memory",
    "replica_groups",
    "slowest_group",
    "stages_of_virtual",
    "with_batch",
]

# Arrays of virtual stages that every rank of a stage waits for, whatever its own kind.
_SHARED_BY_STAGE = ("gradient_reduce_time", "parameter_gather_time")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaGroup:
    """Data parallel replicas that run alike.

    Parameters
    ----------
    kinds : tuple[int, ...]
        Place in ``ClusterSpec.kinds`` of what each stage runs on, ``pp`` long.
    replicas : tuple[int, ...]
        Data parallel ranks.
    num_micro_batches : int
        What each of them runs per iteration.
    """

    kinds: tuple[int, ...]
    replicas: tuple[int, ...]
    num_micro_batches: int


def replica_groups(
    cluster: ClusterSpec, plan: ParallelPlan, global_batch_size: int
) -> tuple[ReplicaGroup, ...]:
    """Return the groups of replicas of a plan on a mixed cluster, in the order of their first replica.

    Raises
    ------
    SpecError
        If the ranks that share a layer (tensor, context or expert parallel) lie on different kinds of node, layer
        groups are asked for, or the batch does not divide.
    """
    if plan.layer_groups:
        raise SpecError(
            f"cluster {cluster.id} is mixed: groups of layers (layer_groups) are priced on one kind of node only; plan "
            "with --search exhaustive"
        )
    kinds = _kinds_of_ranks(cluster, plan)
    if (kinds != kinds[:, :, :1]).any():
        stage, replica, _ = np.argwhere(kinds != kinds[:, :, :1])[0]
        raise SpecError(
            f"cluster {cluster.id}: the tp x cp = {plan.tp * plan.cp} ranks that share the layers of stage {stage} of "
            f"replica {replica} lie on different kinds of node; choose tp x cp that divides the GPUs of every island"
        )
    of_replica = kinds[:, :, 0].T
    _check_experts(cluster, plan, of_replica)
    shares = plan.micro_batch_shares or (plan.num_micro_batches(global_batch_size),) * plan.dp
    if plan.micro_batch_shares:
        plan.num_micro_batches(global_batch_size)
    members: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for replica, (row, share) in enumerate(zip(of_replica.tolist(), shares, strict=True)):
        members.setdefault((tuple(row), share), []).append(replica)
    return tuple(
        ReplicaGroup(kinds=row, replicas=tuple(replicas), num_micro_batches=share)
        for (row, share), replicas in members.items()
    )


def _kinds_of_ranks(cluster: ClusterSpec, plan: ParallelPlan) -> NDArray[np.int64]:
    """Return the kind of node of every rank, ``(pp, dp, tp * cp)``."""
    if plan.num_gpus > cluster.num_gpus:
        raise SpecError(
            f"the plan needs {plan.num_gpus} GPUs, but cluster {cluster.id} has {cluster.num_gpus}"
        )
    mapping = plan.device_mapping or DeviceMapping()
    inner = plan.tp * plan.cp
    stage, replica, rank = np.ogrid[: plan.pp, : plan.dp, :inner]
    if mapping.rank_order == "tp-cp-ep-pp-dp":
        number = (replica * plan.pp + stage) * inner + rank
    else:
        number = (stage * plan.dp + replica) * inner + rank
    node = number // cluster.node.num_gpus
    order = np.array(mapping.host_order or range(cluster.num_nodes), dtype=np.int64)
    if int(order.max()) >= cluster.num_nodes:
        raise SpecError(
            f"device_mapping.host_order names node {order.max()}, but cluster {cluster.id} has nodes 0 to "
            f"{cluster.num_nodes - 1}"
        )
    if int(node.max()) >= len(order):
        raise SpecError(
            f"device_mapping.host_order must name {int(node.max()) + 1} of the {cluster.num_nodes} nodes of cluster "
            f"{cluster.id}, from 0"
        )
    kinds: NDArray[np.int64] = np.array(cluster.kind_of_node, dtype=np.int64)[order[node]]
    return kinds


def _check_experts(cluster: ClusterSpec, plan: ParallelPlan, of_replica: NDArray[np.int64]) -> None:
    """Refuse expert parallel groups whose all-to-all would hold replicas of different kinds together."""
    ranks = plan.ep * plan.etp
    inner = plan.tp * plan.cp
    if ranks <= inner:
        return
    span = ranks // inner
    groups = of_replica.reshape(-1, span, plan.pp) if plan.dp % span == 0 else of_replica[np.newaxis]
    shares = np.array(plan.micro_batch_shares or (1,) * plan.dp).reshape(len(groups), -1)
    if (groups != groups[:, :1]).any() or (shares != shares[:, :1]).any():
        raise SpecError(
            f"cluster {cluster.id}: the ep x etp = {ranks} ranks that share experts lie on replicas of different kinds of "
            "node, or with different numbers of micro-batches; lower ep or put whole stages on one kind"
        )


def gpus_of_kinds(cluster: ClusterSpec, plan: ParallelPlan) -> tuple[int, ...]:
    """Return how many GPUs of each kind a plan uses."""
    counts = np.bincount(_kinds_of_ranks(cluster, plan).reshape(-1), minlength=len(cluster.kinds))
    return tuple(int(count) for count in counts)


def mixed_costs(context: CostContext, plans: Sequence[ParallelPlan]) -> list[IterationCosts]:
    """Return what one iteration of each plan costs the slowest of its replicas.

    Raises
    ------
    SpecError
        As :func:`replica_groups`.
    """
    batches = [replica_groups(context.cluster, plan, context.workload.global_batch_size) for plan in plans]
    priced = _priced(context, plans, batches)
    return [
        max(
            (_composed(plan, group, groups, priced[index]) for group in groups),
            key=lambda costs, plan=plan, groups=groups: (  # type: ignore[misc]  # bound now
                iteration_time(costs, plan.schedule) if len(groups) > 1 else 0.0
            ),
        )
        for index, (plan, groups) in enumerate(zip(plans, batches, strict=True))
    ]


def slowest_group(context: CostContext, plan: ParallelPlan) -> ReplicaGroup:
    """Return the group of replicas that the iteration waits for."""
    groups = replica_groups(context.cluster, plan, context.workload.global_batch_size)
    if len(groups) == 1:
        return groups[0]
    parts = _priced(context, [plan], [groups])[0]
    return max(groups, key=lambda group: iteration_time(_composed(plan, group, groups, parts), plan.schedule))


_Parts = dict[tuple[int, int], IterationCosts]


def _priced(
    context: CostContext, plans: Sequence[ParallelPlan], batches: Sequence[Sequence[ReplicaGroup]]
) -> list[_Parts]:
    """Return the costs of each plan as if it ran on one kind throughout, by kind and number of micro-batches."""
    parts: list[_Parts] = [{} for _ in plans]
    asked: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for index, groups in enumerate(batches):
        batch = plans[index].dp * plans[index].micro_batch_size
        wanted = {(kind, group.num_micro_batches) for group in groups for kind in group.kinds}
        for kind, share in sorted(wanted):
            asked.setdefault((kind, share * batch), []).append((index, share))
    for (kind, batch), members in asked.items():
        own = with_batch(context.kinds[kind], batch)
        costs = uniform_costs(own, [replace(plans[index], micro_batch_shares=()) for index, _ in members])
        for (index, share), each in zip(members, costs, strict=True):
            parts[index][kind, share] = each
    return parts


def with_batch(context: CostContext, global_batch_size: int) -> CostContext:
    """Return a context in which every replica takes an equal share of another batch."""
    if context.workload.global_batch_size == global_batch_size:
        return context
    return replace(context, workload=replace(context.workload, global_batch_size=global_batch_size))


def _composed(
    plan: ParallelPlan, group: ReplicaGroup, groups: Sequence[ReplicaGroup], parts: _Parts
) -> IterationCosts:
    """Return the costs of one group: of each stage those of its kind, and what it shares with other replicas."""
    own = {kind: parts[kind, group.num_micro_batches] for kind in sorted(set(group.kinds))}
    first = own[group.kinds[0]]
    if len(own) == 1 and len(groups) == 1:
        return first
    stage_of = stages_of_virtual(plan, first)
    kind_of = np.array(group.kinds)[stage_of]

    def picked(select: Callable[[IterationCosts], FloatColumn], of: NDArray[np.int64]) -> FloatColumn:
        result = select(first).copy()
        for kind, costs in own.items():
            result[of == kind] = select(costs)[of == kind]
        return result

    arrays = {
        each.name: picked(lambda costs, name=each.name: getattr(costs, name), kind_of)  # type: ignore[misc]  # bound now
        for each in fields(first)
        if isinstance(getattr(first, each.name), np.ndarray) and each.name != "optimizer_time"
    }
    arrays["optimizer_time"] = picked(lambda costs: costs.optimizer_time, np.array(group.kinds))
    # A send takes what the slower end takes.
    arrays["send_time"] = np.maximum(
        arrays["send_time"], picked(lambda costs: costs.send_time, np.roll(kind_of, -1))
    )
    for other in groups:
        # Ranks of a stage on other kinds reduce, gather and step together with these.
        theirs = np.array(other.kinds)
        for kind in set(other.kinds):
            costs = parts[kind, other.num_micro_batches]
            for name in _SHARED_BY_STAGE:
                shared = np.where(theirs[stage_of] == kind, getattr(costs, name), 0.0)
                arrays[name] = np.maximum(arrays[name], shared)
            steps = np.where(theirs == kind, costs.optimizer_time, 0.0)
            arrays["optimizer_time"] = np.maximum(arrays["optimizer_time"], steps)
    return replace(
        first,
        **arrays,  # type: ignore[arg-type]  # arrays of the fields they are named after
        is_send_blocking=any(costs.is_send_blocking for costs in own.values()),
        gradient_reduce_overlap=min(costs.gradient_reduce_overlap for costs in own.values()),
        parameter_gather_overlap=min(costs.parameter_gather_overlap for costs in own.values()),
        fixed_time=max(costs.fixed_time for costs in own.values()),
    )


def stages_of_virtual(plan: ParallelPlan, costs: IterationCosts) -> NDArray[np.int64]:
    """Return the physical stage of each virtual stage, copy after copy."""
    placement = SCHEDULES[plan.schedule].placement(costs.num_stages, costs.num_chunks)
    stage_of = np.empty(placement.size, dtype=np.int64)
    stage_of[placement] = np.arange(costs.num_stages)[:, np.newaxis]
    return stage_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageMemory:
    """Memory of every stage of a plan on a mixed cluster, on the kind that it fills the most.

    Parameters
    ----------
    memory : MemoryColumns
        Breakdown, shape ``(pp,)`` [B].
    needed, usable : FloatColumn
        What a rank takes, fragments included, and what its GPU reports, shape ``(pp,)`` [B].
    """

    memory: MemoryColumns
    needed: FloatColumn
    usable: FloatColumn


def mixed_memory(context: CostContext, plan: ParallelPlan) -> StageMemory:
    """Return the memory of every stage of a plan, by the GPU that it fills the most."""
    groups = replica_groups(context.cluster, plan, context.workload.global_batch_size)
    rows: list[tuple[MemoryColumns, FloatColumn, FloatColumn, NDArray[np.bool_]]] = []
    for group in groups:
        batch = group.num_micro_batches * plan.dp * plan.micro_batch_size
        for kind in sorted(set(group.kinds)):
            own = with_batch(context.kinds[kind], batch)
            memory = plan_memory(own, replace(plan, micro_batch_shares=()))
            needed = memory.total * (1.0 + own.software.fragmentation)
            rows.append(
                (memory, needed, np.full(plan.pp, own.gpu.memory_bytes), np.array(group.kinds) == kind)
            )
    fill = np.array([np.where(is_own, needed / usable, -1.0) for _, needed, usable, is_own in rows])
    fullest, stages = fill.argmax(axis=0), np.arange(plan.pp)

    def picked(values: Sequence[FloatColumn]) -> FloatColumn:
        result: FloatColumn = np.array(values)[fullest, stages]
        return result

    return StageMemory(
        memory=MemoryColumns(
            **{f.name: picked([getattr(row[0], f.name) for row in rows]) for f in fields(MemoryColumns)}
        ),
        needed=picked([row[1] for row in rows]),
        usable=picked([row[2] for row in rows]),
    )
