"""The iteration of a plan when its communications share the links of its cluster."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.traffic import NetworkConditions, PlanTraffic, plan_traffic
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.training.contention import ContendedIteration, contended_iteration, slowed_costs
from meshwright.simcore.training.iteration import iteration_time

__all__ = ["ContentionOutcome", "simulate_contention"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ContentionOutcome:
    """A plan's iteration with contention and what it meets where.

    Parameters
    ----------
    alone_time : float
        The iteration if no communication met another, on the network as described, slow ranks included [s].
    iteration : ContendedIteration
        The iteration with contention.
    traffic : PlanTraffic
        Its channels and links, by name.
    """

    alone_time: float
    iteration: ContendedIteration
    traffic: PlanTraffic

    @property
    def contended_time(self) -> float:
        """One optimizer step with contention [s]."""
        return self.iteration.result.iteration_time

    @property
    def slowdown(self) -> float:
        """By how much contention lengthens the iteration, as a share."""
        return self.contended_time / self.alone_time - 1.0


def simulate_contention(
    context: CostContext,
    plan: ParallelPlan,
    conditions: NetworkConditions | None = None,
    slow_ranks: tuple[tuple[int, float], ...] = (),
) -> ContentionOutcome:
    """Return the iteration of a plan with contention.

    Parameters
    ----------
    context : CostContext
        Job and software.
    plan : ParallelPlan
        Degrees, schedule, mapping.
    conditions : NetworkConditions | None
        The network as it is; None is as described.
    slow_ranks : tuple[tuple[int, float], ...]
        Ranks, counted tp first, then cp, dp, pp, and how many times as long they compute. Their stage is as slow as the
        slowest of them, in the replica that all others wait for.

    Raises
    ------
    SpecError
        As :func:`~meshwright.costmodels.traffic.plan_traffic` does.
    """
    traffic = plan_traffic(context, plan, conditions)
    costs = iteration_costs(context, plan)
    if slow_ranks:
        slowness = np.ones(plan.pp)
        ranks = np.array([rank for rank, _ in slow_ranks])
        np.maximum.at(slowness, ranks // (plan.num_gpus // plan.pp), [factor for _, factor in slow_ranks])
        costs = slowed_costs(costs, plan.schedule, slowness)
    return ContentionOutcome(
        alone_time=iteration_time(costs, plan.schedule),
        iteration=contended_iteration(costs, plan.schedule, traffic.traffic),
        traffic=traffic,
    )
