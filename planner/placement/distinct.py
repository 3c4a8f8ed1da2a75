"""Copies of an expert on different ranks, for engines whose ranks hold each expert once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = ["copies_apart"]


def copies_apart(placement: ExpertPlacement, loads: NDArray[np.float64]) -> ExpertPlacement:
    """Return the placement with second copies on a rank exchanged against experts of other ranks.

    Each exchange is the one that leaves the heavier of both ranks lightest.

    Parameters
    ----------
    placement : ExpertPlacement
        Any placement.
    loads : NDArray[np.float64]
        Load of each expert, ``(num_layers, num_experts)``; copies share it evenly.
    """
    rows = [
        _apart(slots.copy(), load, placement.num_ranks)
        for slots, load in zip(placement.slots, loads, strict=True)
    ]
    return replace(placement, slots=np.asarray(rows))


def _apart(slots: NDArray[np.int64], load: NDArray[np.float64], num_ranks: int) -> NDArray[np.int64]:
    share = load / np.bincount(slots, minlength=len(load))
    rank_of = np.arange(len(slots)) // (len(slots) // num_ranks)
    held = np.zeros((num_ranks, len(load)), dtype=np.int64)
    np.add.at(held, (rank_of, slots), 1)
    total = np.bincount(rank_of, weights=share[slots], minlength=num_ranks)
    for slot in range(len(slots)):
        rank, expert = rank_of[slot], slots[slot]
        if held[rank, expert] < 2:
            continue
        difference = share[expert] - share[slots]
        heavier = np.maximum(total[rank] - difference, total[rank_of] + difference)
        fits = (held[rank_of, expert] == 0) & (held[rank, slots] == 0)
        other = int(np.argmin(np.where(fits, heavier, np.inf)))
        if not fits[other]:
            continue
        there, given = rank_of[other], slots[other]
        for place, out, into in ((rank, expert, given), (there, given, expert)):
            held[place, out] -= 1
            held[place, into] += 1
        total[rank] -= difference[other]
        total[there] += difference[other]
        slots[slot], slots[other] = given, expert
    return slots
