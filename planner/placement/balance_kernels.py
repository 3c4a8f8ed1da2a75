"""Compiled loops that move expert copies between ranks until no exchange lowers the heaviest rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.compiled import compiled

__all__ = ["level_ranks", "level_windows", "pack_descending"]


@compiled
def pack_descending(
    expert: NDArray[np.int64],
    load: NDArray[np.float64],
    order: NDArray[np.int64],
    num_ranks: int,
    members: NDArray[np.int64],
) -> None:
    """Longest processing time first with equal counts: write the copies of each rank, ``(num_ranks, slots)``.

    A rank that already has the expert is passed over while another one has room.
    """
    slots = members.shape[1]
    total = np.zeros(num_ranks)
    used = np.zeros(num_ranks, dtype=np.int64)
    for index in range(len(order)):
        copy = order[index]
        best = -1
        best_twin = True
        for rank in range(num_ranks):
            if used[rank] == slots:
                continue
            twin = False
            for place in range(used[rank]):
                if expert[members[rank, place]] == expert[copy]:
                    twin = True
                    break
            if best < 0 or (best_twin and not twin) or (best_twin == twin and total[rank] < total[best]):
                best = rank
                best_twin = twin
        members[best, used[best]] = copy
        used[best] += 1
        total[best] += load[copy]


@compiled
def level_ranks(
    expert: NDArray[np.int64],
    load: NDArray[np.float64],
    members: NDArray[np.int64],
    target: float,
    num_kicks: int,
    seed: int,
    allows_twins: bool,
) -> float:
    """Exchange copies between the heaviest rank and others while that lowers it; kick and repeat; return the maximum.

    Parameters
    ----------
    expert, load : NDArray
        Expert and load of each copy.
    members : NDArray[np.int64]
        Copies of each rank, ``(num_ranks, slots)``; changed in place, never to a heavier maximum.
    target : float
        A maximum that cannot or need not be improved on.
    num_kicks : int
        Rounds of random exchanges around the heaviest rank, each followed by a descent.
    seed : int
        Of the kicks.
    allows_twins : bool
        Let a rank hold two copies of an expert, which then serves two shares of its load.
    """
    num_ranks, slots = members.shape
    total = np.zeros(num_ranks)
    for rank in range(num_ranks):
        for place in range(slots):
            total[rank] += load[members[rank, place]]
    kept = members.copy()
    kept_maximum = total.max()
    state = seed % 2147483647 + 1
    for kick in range(num_kicks + 1):
        if kick > 0:
            # From the best so far, exchange a few random copies, the heaviest rank's first.
            for rank in range(num_ranks):
                total[rank] = 0.0
                for place in range(slots):
                    members[rank, place] = kept[rank, place]
                    total[rank] += load[kept[rank, place]]
            for step in range(3):
                state = state * 48271 % 2147483647
                first = np.argmax(total) if step == 0 else state % num_ranks
                state = state * 48271 % 2147483647
                second = state % num_ranks
                state = state * 48271 % 2147483647
                here = state % slots
                state = state * 48271 % 2147483647
                there = state % slots
                if first == second:
                    continue
                mine = members[first, here]
                theirs = members[second, there]
                twin = False
                for place in range(slots):
                    if place != there and expert[members[second, place]] == expert[mine]:
                        twin = True
                    if place != here and expert[members[first, place]] == expert[theirs]:
                        twin = True
                if twin and not allows_twins:
                    continue
                members[first, here] = theirs
                members[second, there] = mine
                total[first] += load[theirs] - load[mine]
                total[second] += load[mine] - load[theirs]
        while True:
            heavy = np.argmax(total)
            best = total[heavy] - 1e-12 * abs(total[heavy])
            if total[heavy] <= target:
                break
            best_here = -1
            best_rank = -1
            best_there = -1
            for rank in range(num_ranks):
                if rank == heavy or total[rank] >= best:
                    continue
                for here in range(slots):
                    mine = members[heavy, here]
                    for there in range(slots):
                        theirs = members[rank, there]
                        shift = load[mine] - load[theirs]
                        if shift <= 0.0:
                            continue
                        after = max(total[heavy] - shift, total[rank] + shift)
                        if after >= best:
                            continue
                        twin = False
                        for place in range(0 if allows_twins else slots):
                            if place != there and expert[members[rank, place]] == expert[mine]:
                                twin = True
                                break
                            if place != here and expert[members[heavy, place]] == expert[theirs]:
                                twin = True
                                break
                        if not twin:
                            best = after
                            best_here = here
                            best_rank = rank
                            best_there = there
            if best_rank < 0:
                break
            mine = members[heavy, best_here]
            theirs = members[best_rank, best_there]
            members[heavy, best_here] = theirs
            members[best_rank, best_there] = mine
            total[heavy] += load[theirs] - load[mine]
            total[best_rank] += load[mine] - load[theirs]
        maximum = total.max()
        if maximum < kept_maximum:
            kept_maximum = maximum
            for rank in range(num_ranks):
                for place in range(slots):
                    kept[rank, place] = members[rank, place]
        if kept_maximum <= target:
            break
    for rank in range(num_ranks):
        for place in range(slots):
            members[rank, place] = kept[rank, place]
    return float(kept_maximum)


@compiled
def level_windows(
    expert: NDArray[np.int64], load: NDArray[np.float64], members: NDArray[np.int64], num_rounds: int
) -> float:
    """Exchange copies while that lowers the mean over windows of the heaviest rank's load; return that mean.

    ``load`` is ``(num_windows, num_copies)``, each window normalised to a mean rank load of 1.
    """
    num_windows = load.shape[0]
    num_ranks, slots = members.shape
    total = np.zeros((num_windows, num_ranks))
    for rank in range(num_ranks):
        for place in range(slots):
            for window in range(num_windows):
                total[window, rank] += load[window, members[rank, place]]
    value = 0.0
    for window in range(num_windows):
        value += total[window].max()
    for _ in range(num_rounds):
        heat = np.zeros(num_ranks)
        for window in range(num_windows):
            heat[np.argmax(total[window])] += 1.0
        improved = False
        for heavy in np.argsort(-heat):
            if heat[heavy] == 0.0 or improved:
                break
            for here in range(slots):
                for rank in range(num_ranks):
                    if rank == heavy:
                        continue
                    for there in range(slots):
                        mine = members[heavy, here]
                        theirs = members[rank, there]
                        after = 0.0
                        for window in range(num_windows):
                            shift = load[window, mine] - load[window, theirs]
                            peak = max(total[window, heavy] - shift, total[window, rank] + shift)
                            for other in range(num_ranks):
                                if other not in (heavy, rank) and total[window, other] > peak:
                                    peak = total[window, other]
                            after += peak
                            if after >= value:
                                break
                        if after >= value * (1.0 - 1e-12):
                            continue
                        twin = False
                        for place in range(slots):
                            if place != there and expert[members[rank, place]] == expert[mine]:
                                twin = True
                            if place != here and expert[members[heavy, place]] == expert[theirs]:
                                twin = True
                        if twin:
                            continue
                        for window in range(num_windows):
                            shift = load[window, mine] - load[window, theirs]
                            total[window, heavy] -= shift
                            total[window, rank] += shift
                        members[heavy, here] = theirs
                        members[rank, there] = mine
                        value = after
                        improved = True
        if not improved:
            break
    return float(value / num_windows)
