"""Compiled exchanges of experts between the ranks of one layer under a cap on their load."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.compiled import compiled

__all__ = ["polish_layer", "swap_gains"]


@compiled
def swap_gains(
    gain: NDArray[np.float64],
    load: NDArray[np.float64],
    rank_of: NDArray[np.int64],
    num_ranks: int,
    cap: float,
) -> int:
    """Repair ranks above the cap at the least loss, then exchange pairs while that gains; return the exchanges.

    Parameters
    ----------
    gain : NDArray[np.float64]
        Value of each expert on each rank, ``(num_experts, num_ranks)``.
    load : NDArray[np.float64]
        Of each expert.
    rank_of : NDArray[np.int64]
        Rank of each expert, changed in place.
    num_ranks : int
        Ranks.
    cap : float
        Load of a rank after an exchange at most, unless the exchange lowers the heavier of the two.
    """
    num_experts = len(load)
    total = np.zeros(num_ranks)
    for expert in range(num_experts):
        total[rank_of[expert]] += load[expert]
    exchanges = 0
    for _ in range(4 * num_experts):
        heavy = np.argmax(total)
        if total[heavy] <= cap * (1.0 + 1e-12):
            break
        best = -1e300
        best_first = -1
        best_second = -1
        for first in range(num_experts):
            if rank_of[first] != heavy:
                continue
            for second in range(num_experts):
                other = rank_of[second]
                shift = load[first] - load[second]
                if other == heavy or shift <= 0.0:
                    continue
                after = max(total[heavy] - shift, total[other] + shift)
                if after >= total[heavy] * (1.0 - 1e-12) or total[other] + shift > max(cap, total[other]):
                    continue
                change = gain[first, other] + gain[second, heavy] - gain[first, heavy] - gain[second, other]
                # Loss per load taken off; load below the cap is worth nothing.
                relief = min(shift, total[heavy] - cap)
                score = change / relief if change < 0.0 else change + relief
                if score > best:
                    best = score
                    best_first = first
                    best_second = second
        if best_first < 0:
            # No partner below the cap: any exchange that lowers the heavier of the two.
            lowest = total[heavy] * (1.0 - 1e-12)
            for first in range(num_experts):
                if rank_of[first] != heavy:
                    continue
                for second in range(num_experts):
                    other = rank_of[second]
                    shift = load[first] - load[second]
                    if other == heavy or shift <= 0.0:
                        continue
                    after = max(total[heavy] - shift, total[other] + shift)
                    if after < lowest:
                        lowest = after
                        best_first = first
                        best_second = second
        if best_first < 0:
            break
        other = rank_of[best_second]
        shift = load[best_first] - load[best_second]
        total[heavy] -= shift
        total[other] += shift
        rank_of[best_first] = other
        rank_of[best_second] = heavy
        exchanges += 1
    limit = max(cap, total.max()) * (1.0 + 1e-12)
    for _ in range(50):
        moved = 0
        for first in range(num_experts):
            here = rank_of[first]
            best = 1e-9
            best_second = -1
            for second in range(num_experts):
                there = rank_of[second]
                if there == here:
                    continue
                change = gain[first, there] + gain[second, here] - gain[first, here] - gain[second, there]
                if change <= best:
                    continue
                shift = load[first] - load[second]
                if total[here] - shift > limit or total[there] + shift > limit:
                    continue
                best = change
                best_second = second
            if best_second >= 0:
                there = rank_of[best_second]
                shift = load[first] - load[best_second]
                total[here] -= shift
                total[there] += shift
                rank_of[first] = there
                rank_of[best_second] = here
                moved += 1
        exchanges += moved
        if moved == 0:
            break
    return exchanges


@compiled
def polish_layer(
    gain: NDArray[np.float64],
    load: NDArray[np.float64],
    rank_of: NDArray[np.int64],
    num_ranks: int,
    cap: float,
) -> int:
    """Rotate three experts over three ranks while that gains and the cap holds; return the rotations.

    For each expert only its best other rank is tried as the target, then every way to close the rotation.
    """
    num_experts = len(load)
    total = np.zeros(num_ranks)
    for expert in range(num_experts):
        total[rank_of[expert]] += load[expert]
    limit = max(cap, total.max()) * (1.0 + 1e-12)
    rotations = 0
    for first in range(num_experts):
        here = rank_of[first]
        there = here
        for rank in range(num_ranks):
            if rank != here and (there == here or gain[first, rank] > gain[first, there]):
                there = rank
        if there == here or gain[first, there] <= gain[first, here]:
            continue
        best = 1e-9
        best_second = -1
        best_third = -1
        for second in range(num_experts):
            if rank_of[second] != there:
                continue
            if total[there] + load[first] - load[second] > limit:
                continue
            base = gain[first, there] - gain[first, here] - gain[second, there]
            for third in range(num_experts):
                beyond = rank_of[third]
                if beyond in (here, there):
                    continue
                change = base + gain[second, beyond] + gain[third, here] - gain[third, beyond]
                if change <= best:
                    continue
                if total[beyond] + load[second] - load[third] > limit:
                    continue
                if total[here] + load[third] - load[first] > limit:
                    continue
                best = change
                best_second = second
                best_third = third
        if best_second >= 0:
            beyond = rank_of[best_third]
            total[there] += load[first] - load[best_second]
            total[beyond] += load[best_second] - load[best_third]
            total[here] += load[best_third] - load[first]
            rank_of[first] = there
            rank_of[best_second] = beyond
            rank_of[best_third] = here
            rotations += 1
    return rotations
