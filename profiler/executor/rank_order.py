"""Where each rank stands on the axes of a plan: tp fastest, then cp, dp, pp slowest (Megatron's order)."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["Coordinates", "coordinates"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    """Where a rank stands on each axis."""

    pp: int
    dp: int
    cp: int
    tp: int


def coordinates(plan: ParallelPlan, rank: int) -> Coordinates:
    """Return where a global rank stands.

    Examples
    --------
    >>> plan = ParallelPlan(dp=2, tp=2, pp=2, micro_batch_size=1, schedule="1f1b", layers_per_stage=(1, 1))
    >>> coordinates(plan, 5)
    Coordinates(pp=1, dp=0, cp=0, tp=1)
    """
    rest, tp = divmod(rank, plan.tp)
    rest, cp = divmod(rest, plan.cp)
    pp, dp = divmod(rest, plan.dp)
    return Coordinates(pp=pp, dp=dp, cp=cp, tp=tp)
