"""What "best" means: a figure per plan, smaller is better, computed from its iteration time."""

from __future__ import annotations

from typing import Literal, get_args

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns
from meshwright.planner.space import divisors

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
    """Return the numbers of GPUs to search: all for throughput, any share of the nodes for cost and energy."""
    cluster = context.cluster
    if objective == "throughput":
        return (cluster.num_gpus,)
    return tuple(nodes * cluster.node.num_gpus for nodes in divisors(cluster.num_nodes))
