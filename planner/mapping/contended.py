"""How long plans take where they are placed, once their communications share the links of the fabric."""

from __future__ import annotations

from collections.abc import Iterable

from meshwright.costmodels.contention import simulate_contention
from meshwright.costmodels.context import CostContext
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["ContendedTimes"]


class ContendedTimes:
    """Iteration times with contention, each simulated once.

    Parameters
    ----------
    context : CostContext
        Job; its cluster describes a fabric, see :meth:`is_known`.
    """

    def __init__(self, context: CostContext) -> None:
        self._context = context
        self._known: dict[ParallelPlan, float] = {}

    @staticmethod
    def is_known(context: CostContext) -> bool:
        """Return whether a cluster says which links its nodes share: measured pairs do not."""
        topology = context.cluster.topology
        return topology is not None and topology.matrix is None and not context.kinds

    def seconds(self, plan: ParallelPlan) -> float:
        """Return the iteration time of a plan on the hosts of its mapping [s]."""
        if plan not in self._known:
            self._known[plan] = simulate_contention(self._context, plan).contended_time
        return self._known[plan]

    def fastest(self, placements: Iterable[ParallelPlan]) -> ParallelPlan:
        """Return the fastest of some placements of a plan, the first of equals."""
        return min(placements, key=self.seconds)
