"""A pool of equal replicas to simulate."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.errors import SpecError, did_you_mean
from meshwright.simcore.domain.serving import PoolRole, RouterName
from meshwright.simcore.serving.behaviour import EngineBehaviour
from meshwright.simcore.serving.routers import ROUTERS
from meshwright.simcore.serving.step_table import StepTable

__all__ = ["ReplicaPool"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPool:
    """Equal replicas: what a step costs, how they schedule, and what they do.

    Parameters
    ----------
    table : StepTable
        Time of one step, read with the fullest engine's counts.
    behaviour : EngineBehaviour
        Scheduler, KV cache and front end.
    num_replicas : int
        Replicas.
    role : PoolRole
        ``aggregated``, or ``prefill`` and ``decode`` side by side.
    router : RouterName
        How requests choose a replica.
    """

    table: StepTable
    behaviour: EngineBehaviour
    num_replicas: int = 1
    role: PoolRole = "aggregated"
    router: RouterName = "least_loaded"

    def __post_init__(self) -> None:
        if self.num_replicas < 1:
            raise SpecError(f"pool: num_replicas must be at least 1, not {self.num_replicas}")
        if self.router not in ROUTERS:
            raise SpecError(
                f"pool: unknown router '{self.router}'{did_you_mean(self.router, tuple(ROUTERS)) or '.'} "
                f"Known: {', '.join(ROUTERS)}."
            )
