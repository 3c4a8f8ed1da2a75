"""How long plans take where they are placed, once their communications share the links of the fabric."""

from __future__ import annotations

from meshwright.costmodels.contention import simulate_contention
from meshwright.costmodels.context import CostContext
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["ContendedTimes"]


class ContendedTimes:
    """Iteration times without and with contention, each simulated once.

    Parameters
    ----------
    context : CostContext
        Job; its cluster describes a fabric, see :meth:`is_known`.
    """

    def __init__(self, context: CostContext) -> None:
        self._context = context
        self._known: dict[ParallelPlan, tuple[float, float]] = {}

    @staticmethod
    def is_known(context: CostContext) -> bool:
        """Return whether a cluster says which links its nodes share: measured pairs do not."""
        topology = context.cluster.topology
        return topology is not None and topology.matrix is None and not context.kinds

    def seconds(self, plan: ParallelPlan) -> tuple[float, float]:
        """Return the iteration time of a plan on the hosts of its mapping, and the same with contention [s]."""
        if plan not in self._known:
            outcome = simulate_contention(self._context, plan)
            self._known[plan] = outcome.alone_time, outcome.contended_time
        return self._known[plan]
