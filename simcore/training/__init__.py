"""Training iterations: costs in, simulated time and its causes out."""

from __future__ import annotations

from meshwright.simcore.training.attribution import IdleTime
from meshwright.simcore.training.costs import IterationCosts
from meshwright.simcore.training.iteration import (
    IterationResult,
    iteration_time,
    simulate_iteration,
    steady_state_period,
)

__all__ = [
    "IdleTime",
    "IterationCosts",
    "IterationResult",
    "iteration_time",
    "simulate_iteration",
    "steady_state_period",
]
