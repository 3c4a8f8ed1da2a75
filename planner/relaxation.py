"""When nothing fits: which single change would make a plan feasible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.errors import InfeasiblePlanError
from meshwright.planner.choices import choices_left
from meshwright.planner.constraints import constraint_sentences
from meshwright.planner.export import EXPORTERS
from meshwright.planner.feasibility import FeasiblePart, feasible_parts
from meshwright.planner.objectives import world_sizes
from meshwright.planner.space import SearchLimits, plan_of_row, space_blocks
from meshwright.simcore.domain.job import TrainingJob

__all__ = ["infeasible", "nearest_relaxations"]

# Clusters up to this many times the asked size are tried.
_MAX_GROWTH = 64
_SHORTEST_SEQUENCE = 512
# Plans that an export target is asked about at once.
_PLANS_AT_ONCE = 64


def infeasible(
    job: TrainingJob, context: CostContext, limits: SearchLimits, rejections: Mapping[str, int]
) -> InfeasiblePlanError:
    """Return the error of a search without a feasible plan: counts per constraint and what would help."""
    sentences = constraint_sentences()
    counts = "\n".join(
        f"  {count:>10,} rejected by {name} ({sentences[name]})"
        for name, count in rejections.items()
        if count
    )
    relaxations = [] if context.kinds else nearest_relaxations(job, context, limits)
    advice = (
        "; ".join(relaxations)
        if relaxations
        else "plan each kind of node alone to see what would help"
        if context.kinds
        else f"nothing tried helps, neither {_MAX_GROWTH} times the nodes nor shorter sequences nor fewer constraints"
    )
    return InfeasiblePlanError(
        f"no feasible plan for {job.model.name} on {job.cluster.id} ({job.cluster.num_gpus} GPUs)\n{counts}\n"
        f"  nearest: {advice}",
        rejections,
    )


def nearest_relaxations(job: TrainingJob, context: CostContext, limits: SearchLimits) -> list[str]:
    """Return single changes that make a plan feasible: another target, or the user's own restrictions first."""
    refusal = _most_common_refusal(job, context, limits)
    if refusal:
        return [f"fits without target {limits.target}, which says of most plans: {refusal}"]
    found = []
    for key, values in limits.allowed.items():
        others = {name: allowed for name, allowed in limits.allowed.items() if name != key}
        if _is_feasible(job, context, replace(limits, allowed=others)):
            listed = ", ".join(str(value) for value in values)
            found.append(f"fits without 'constraints.{key}: {listed}'")
    if limits.memory_headroom and _is_feasible(job, context, replace(limits, memory_headroom=0.0)):
        found.append(f"fits with less headroom than {limits.memory_headroom:.0%}")
    num_nodes = _nodes_needed(job, context, limits)
    if num_nodes:
        gpus = num_nodes * job.cluster.node.num_gpus
        found.append(f"fits on {gpus} GPUs ({num_nodes} x {job.cluster.node.id})")
    length = job.workload.sequence_length // 2
    while length >= _SHORTEST_SEQUENCE:
        shorter = replace(job, workload=replace(job.workload, sequence_length=length))
        if _is_feasible(shorter, replace(context, workload=shorter.workload), limits):
            found.append(f"fits with sequences of {length} tokens")
            break
        length //= 2
    return found


def _most_common_refusal(job: TrainingJob, context: CostContext, limits: SearchLimits) -> str:
    """Return what the target says of most of the first plans that fit without it; empty without one."""
    if limits.target is None:
        return ""
    free = replace(limits, target=None)
    for block in space_blocks(context, free, world_sizes("throughput", context)):
        for part in feasible_parts(context, choices_left(context, block, free, {}), free, {}):
            _, columns = part.plans(*(index[:_PLANS_AT_ONCE] for index in np.nonzero(part.fits)))
            plans = (plan_of_row(job, columns, row) for row in range(len(columns)))
            said = Counter(word for plan in plans for word in EXPORTERS[limits.target].unsupported(job, plan))
            if said:
                return said.most_common(1)[0][0]
    return ""


def _nodes_needed(job: TrainingJob, context: CostContext, limits: SearchLimits) -> int | None:
    """Return the fewest nodes above the asked ones that hold a plan, None up to the largest tried."""
    asked = job.cluster.num_nodes
    low, high = asked, asked * 2
    while not _fits_on(job, context, limits, high):
        low, high = high, high * 2
        if high > asked * _MAX_GROWTH:
            return None
    # Feasibility is not quite monotone (batches must divide), so the bracket is searched node by node
    # where it is small and by halving where it is not.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits_on(job, context, limits, middle) else (middle, high)
    return high


def _fits_on(job: TrainingJob, context: CostContext, limits: SearchLimits, num_nodes: int) -> bool:
    cluster = replace(job.cluster, num_nodes=num_nodes)
    return _is_feasible(replace(job, cluster=cluster), replace(context, cluster=cluster), limits)


def _is_feasible(job: TrainingJob, context: CostContext, limits: SearchLimits) -> bool:
    for block in space_blocks(context, limits, world_sizes("throughput", context)):
        for part in feasible_parts(context, choices_left(context, block, limits, {}), limits, {}):
            if limits.target is None or _can_export(job, part, limits.target):
                return True
    return False


def _can_export(job: TrainingJob, part: FeasiblePart, target: str) -> bool:
    """Return whether an export target can express one of the plans."""
    cells = np.nonzero(part.fits)
    for start in range(0, len(cells[0]), _PLANS_AT_ONCE):
        _, columns = part.plans(*(index[start : start + _PLANS_AT_ONCE] for index in cells))
        if any(
            not EXPORTERS[target].unsupported(job, plan_of_row(job, columns, row))
            for row in range(len(columns))
        ):
            return True
    return False
