"""What is worth a choice: plans that no other beats in time, money and memory at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meshwright.planner.search.non_dominated import non_dominated
from meshwright.planner.search.simulation import SimulatedPlan, without_noise

__all__ = ["pareto_front"]


def pareto_front(simulated: Sequence[SimulatedPlan]) -> list[int]:
    """Return the plans no other of them beats in iteration time, dollars per iteration and memory, fastest first.

    Every node has one price, so dollars grow with GPU-seconds. Of plans that are equal in all three the first stays.

    Parameters
    ----------
    simulated : Sequence[SimulatedPlan]
        Plans, best first.
    """
    if not simulated:
        return []
    seconds = np.array([entry.seconds for entry in simulated])
    gpus = np.array([entry.plan.num_gpus for entry in simulated])
    memory = np.array([entry.memory for entry in simulated])
    values = np.column_stack([without_noise(each) for each in (seconds, seconds * gpus, memory)])
    front = non_dominated(np.zeros(len(simulated), dtype=np.int64), values)
    return [int(index) for index in front[np.argsort(seconds[front], kind="stable")]]
