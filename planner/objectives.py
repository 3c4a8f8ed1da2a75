"""What "best" means: a figure per plan, smaller is better, computed from its iteration time."""

from __future__ import annotations

from typing import Literal, get_args

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns
from meshwright.planner.axes import divisors

__all__ = ["OBJECTIVES", "Objective", "objective_values", "world_sizes"]

Objective = Literal["throughput", "cost", "energy"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)


def objective_values(objective: Objective, columns: PlanColumns, iteration_time: FloatColumn) -> FloatColumn:
    """Return what the search minimises, per plan.

    Throughput minimises the iteration time itself. Cost and energy of a step grow with the nodes in use, so
    both minimise GPU-seconds: every node of the cluster has one price and one power.
    """
    if objective == "throughput":
        return iteration_time
    num_gpus = columns.tp * columns.pp * columns.dp * columns.cp
    return iteration_time * num_gpus


def world_sizes(objective: Objective, context: CostContext) -> tuple[int, ...]:
    """Return the numbers of GPUs to search.

    For throughput all of them, and where that number has awkward factors (72, 104) the largest 2^k and 3 * 2^k
    below it: idle GPUs can be faster than a pipeline of 13 stages. For cost and energy any share of the nodes.
    """
    cluster = context.cluster
    if objective == "throughput":
        regular = [_largest(factor, cluster.num_gpus) for factor in (1, 3)]
        if cluster.num_gpus in regular:
            return (cluster.num_gpus,)
        return (cluster.num_gpus, *(size for size in regular if size))
    counts = {*divisors(cluster.num_nodes), *(2**k for k in range(cluster.num_nodes.bit_length()))}
    return tuple(nodes * cluster.node.num_gpus for nodes in sorted(counts) if nodes <= cluster.num_nodes)


def _largest(factor: int, limit: int) -> int:
    """Return the largest ``factor * 2**k`` up to a limit; 0 when there is none."""
    return 0 if limit < factor else factor * 2 ** ((limit // factor).bit_length() - 1)
