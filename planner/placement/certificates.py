"""Bounds no placement can beat, and the gap of an answer to them.

Every figure here is recomputed from the routing data and the finished placement, never taken from a solver.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.placement.eplb import replica_counts

__all__ = ["Certificate", "packing_bound"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What was reached, what cannot be beaten, and how far apart the two are.

    Parameters
    ----------
    quantity : str
        What is bounded, with its unit.
    value : float
        Of the answer, recomputed.
    bound : float
        No placement of the same slots has a better one.
    method : str
        Where the bound comes from.
    is_maximum : bool
        The quantity is to be large (locality) instead of small (load, nodes).
    """

    quantity: str
    value: float
    bound: float
    method: str
    is_maximum: bool = False

    @property
    def gap(self) -> float:
        """Distance to the bound over the bound; 0 is proven optimal."""
        distance = self.bound - self.value if self.is_maximum else self.value - self.bound
        return max(0.0, distance) / self.bound if self.bound > 0.0 else 0.0

    @property
    def is_sound(self) -> bool:
        """Whether the answer respects its bound; false would be a bug in one of the two."""
        slack = 1e-9 * max(1.0, abs(self.bound))
        return self.value <= self.bound + slack if self.is_maximum else self.value >= self.bound - slack


def packing_bound(loads: NDArray[np.float64], num_slots: int, num_ranks: int) -> float:
    """Return a load that the heaviest rank has at least, copies sharing their expert's load evenly.

    The largest of: the mean; the heaviest copy under the counts that make it lightest; and, for as many heavy
    experts as there are, what must sit beside it: without redundant slots, the heaviest expert and the
    ``num_slots / num_ranks - 1`` lightest ones.
    """
    mean = float(loads.sum()) / num_ranks
    per_rank = num_slots // num_ranks
    heaviest = float((loads / replica_counts(loads, num_slots)).max())
    bound = max(mean, heaviest)
    if num_slots == len(loads):
        lightest = np.sort(loads)[: per_rank - 1]
        bound = max(bound, float(loads.max() + lightest.sum()))
    return bound
