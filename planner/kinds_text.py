"""Which machines a plan runs on, in words; of mixed clusters, which stages and replicas run on which kind of node."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from meshwright.costmodels.mixed import ReplicaGroup, gpus_of_kinds, replica_groups
from meshwright.costmodels.plan_columns import stage_layers
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = [
    "machines_text",
    "node_order_sentence",
    "node_order_text",
    "placement_sentence",
    "stages_by_kind",
]


def machines_text(cluster: ClusterSpec, plan: ParallelPlan | None = None) -> str:
    """Return number and name of the GPUs of a plan, or of the whole cluster: ``64 x h100-sxm-80``.

    Examples
    --------
    >>> from meshwright.hardware_specs import resolve_cluster
    >>> machines_text(resolve_cluster("dgx-h100:2"))
    '16 x h100-sxm-80'
    """
    if not cluster.is_mixed:
        return f"{cluster.num_gpus if plan is None else plan.num_gpus} x {cluster.gpu.id}"
    per_node = cluster.node.num_gpus
    held = np.bincount(cluster.kind_of_node, minlength=len(cluster.kinds)) * per_node
    counts: Sequence[int] = held.tolist() if plan is None else gpus_of_kinds(cluster, plan)
    return " + ".join(
        f"{count} x {kind.gpu.id}" for kind, count in zip(cluster.kinds, counts, strict=True) if count
    )


def stages_by_kind(job: TrainingJob, plan: ParallelPlan) -> list[dict[str, object]]:
    """Return what runs where on a mixed cluster as plain data: for each group of replicas the node of each stage."""
    return [
        {
            "replicas": list(group.replicas),
            "micro_batches": group.num_micro_batches,
            "node_of_stage": [job.cluster.kinds[kind].id for kind in group.kinds],
        }
        for group in replica_groups(job.cluster, plan, job.workload.global_batch_size)
    ]


def placement_sentence(job: TrainingJob, plan: ParallelPlan) -> str:
    """Return which stages and replicas run on which kind of node; empty on clusters of one kind."""
    if not job.cluster.is_mixed:
        return ""
    groups = replica_groups(job.cluster, plan, job.workload.global_batch_size)
    if len(groups) == 1:
        return f"Runs on: {_stages_text(job.cluster, plan, groups[0])}."
    return f"Runs on: {'; '.join(_group_text(job.cluster, plan, group) for group in groups)}."


def node_order_sentence(cluster: ClusterSpec, plan: ParallelPlan) -> str:
    """Return which kind each node of the launch must be, in the order of NODE_RANK; empty on clusters of one kind.

    A launcher that numbers nodes otherwise would run stages on GPUs they were not planned for.
    """
    if not cluster.is_mixed:
        return ""
    ids = _kind_ids(cluster, plan)
    parts = [
        f"{_range_text('node', list(members))} {kind}"
        for kind, members in itertools.groupby(range(len(ids)), key=ids.__getitem__)
    ]
    return (
        f"Number the nodes by kind (NODE_RANK), or stages run on other GPUs than planned: {', '.join(parts)}."
    )


def node_order_text(cluster: ClusterSpec, plan: ParallelPlan) -> str:
    """Return the same as lines for a file of an export: each NODE_RANK and the kind its node must be."""
    lines = [f"{node} {kind}" for node, kind in enumerate(_kind_ids(cluster, plan))]
    return "\n".join([f"# {node_order_sentence(cluster, plan)}", *lines, ""])


def _kind_ids(cluster: ClusterSpec, plan: ParallelPlan) -> list[str]:
    """Return the kind that each node of the launch must be."""
    mapping = plan.device_mapping or DeviceMapping()
    nodes = range(-(-plan.num_gpus // cluster.node.num_gpus))
    return [cluster.kinds[cluster.kind_of_node[mapping.host_of_node(node)]].id for node in nodes]


def _group_text(cluster: ClusterSpec, plan: ParallelPlan, group: ReplicaGroup) -> str:
    count = group.num_micro_batches
    share = f"{count} micro-batch{'es' if count > 1 else ''} each"
    if len(set(group.kinds)) == 1:
        where = f"on {cluster.kinds[group.kinds[0]].id}"
    else:
        where = _stages_text(cluster, plan, group)
    return f"{_range_text('replica', group.replicas)} {where}, {share}"


def _stages_text(cluster: ClusterSpec, plan: ParallelPlan, group: ReplicaGroup) -> str:
    layers = stage_layers(plan.layers_per_stage, plan.pp, plan.schedule)
    parts = []
    for kind, members in itertools.groupby(range(plan.pp), key=lambda stage: group.kinds[stage]):
        stages = list(members)
        held = "+".join(str(layers[stage]) for stage in stages)
        parts.append(f"{_range_text('stage', stages)} ({held} layers) on {cluster.kinds[kind].id}")
    return ", ".join(parts)


def _range_text(word: str, numbers: Sequence[int]) -> str:
    """Return consecutive numbers in short: ``stages 0-3``."""
    if len(numbers) == 1:
        return f"{word} {numbers[0]}"
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{word}s {numbers[0]}-{numbers[-1]}"
    return f"{word}s {', '.join(str(number) for number in numbers)}"
