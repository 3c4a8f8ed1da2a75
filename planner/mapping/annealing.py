"""The compiled search of host orders: swaps of two hosts, priced by the groups they touch."""
# ruff: noqa: PLR1730 - a call of max() halves the speed of plain Python

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.compiled import compiled

__all__ = ["anneal_order"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@compiled
def anneal_order(
    time: FloatArray,
    kind: IntArray,
    traffic_start: IntArray,
    group_start: IntArray,
    group_slots: IntArray,
    group_weight: FloatArray,
    slot_start: IntArray,
    slot_groups: IntArray,
    order: IntArray,
    best_order: IntArray,
    value: FloatArray,
    old_value: FloatArray,
    num_moves: int,
    first_temperature: float,
    last_temperature: float,
    seed: int,
) -> float:
    """Anneal ``order`` in place by ``num_moves`` priced swaps; return the cost of the best order met.

    The first eight arrays are those of :class:`meshwright.planner.mapping.problem.FlatProblem`; ``value`` and
    ``old_value`` are room for one number per group, ``best_order`` receives the best order. Half of the swaps move a
    host of the slowest group of some traffic, for no other can lower its maximum; a small share of the mean of its
    groups tells orders with equal maxima apart. Temperatures fall geometrically and are shares of the cost.
    """
    num_hosts, num_traffic = len(order), len(kind)
    num_groups = len(group_start) - 1
    tie = 0.02
    # Marsaglia's xorshift of 32 bits (2003, "Xorshift RNGs") runs alike compiled and not; its state is never 0.
    state = (seed * 2654435761 + 88675123) & 0xFFFFFFFF | 1
    cost, energy = 0.0, 0.0
    best_cost, best_energy = np.inf, np.inf
    temperature = first_temperature
    cooling = (last_temperature / first_temperature) ** (1.0 / max(1, num_moves))
    worst = np.zeros(num_traffic, dtype=np.int64)
    new_worst = np.zeros(num_traffic, dtype=np.int64)
    traffic_of = np.zeros(num_groups, dtype=np.int64)
    for each in range(num_traffic):
        for group in range(traffic_start[each], traffic_start[each + 1]):
            traffic_of[group] = each
    for step in range(num_moves + 1):
        is_first = step == 0
        one, two = 0, 0
        if not is_first:
            state ^= (state << 13) & 0xFFFFFFFF
            state ^= state >> 17
            state ^= (state << 5) & 0xFFFFFFFF
            choice = state
            state ^= (state << 13) & 0xFFFFFFFF
            state ^= state >> 17
            state ^= (state << 5) & 0xFFFFFFFF
            if choice & 1:
                group = worst[(choice >> 1) % num_traffic]
                start = group_start[group]
                one = group_slots[start + state % (group_start[group + 1] - start)]
            else:
                one = state % num_hosts
            state ^= (state << 13) & 0xFFFFFFFF
            state ^= state >> 17
            state ^= (state << 5) & 0xFFFFFFFF
            two = state % num_hosts
            if one == two:
                continue
            order[one], order[two] = order[two], order[one]
        first = 0 if is_first else slot_start[one]
        middle = num_groups if is_first else slot_start[one + 1]
        last = middle if is_first else middle + slot_start[two + 1] - slot_start[two]
        for place in range(first, last):
            if is_first:
                group = place
            elif place < middle:
                group = slot_groups[place]
            else:
                group = slot_groups[slot_start[two] + place - middle]
            old_value[group] = value[group]
        for place in range(first, last):
            if is_first:
                group = place
            elif place < middle:
                group = slot_groups[place]
            else:
                group = slot_groups[slot_start[two] + place - middle]
            each = traffic_of[group]
            start, stop = group_start[group], group_start[group + 1]
            total = 0.0
            if kind[each] == 2:
                for member in range(start, stop):
                    links = 0.0
                    host = order[group_slots[member]]
                    for other in range(start, stop):
                        if other != member:
                            links += time[each, host, order[group_slots[other]]]
                    if links > total:
                        total = links
                total /= stop - start - 1
            else:
                host = order[group_slots[start]]
                begin = host
                for member in range(start + 1, stop):
                    after = order[group_slots[member]]
                    link = time[each, host, after]
                    if kind[each] == 0:
                        total += link
                    elif link > total:
                        total = link
                    host = after
                if kind[each] == 1 and time[each, host, begin] > total:
                    total = time[each, host, begin]
            knee = group_weight[2, group]
            value[group] = group_weight[0, group] * total
            if total > knee:
                value[group] += group_weight[1, group] * (total - knee)
        new_cost, new_energy = 0.0, 0.0
        for each in range(num_traffic):
            slowest, together = 0.0, 0.0
            start, stop = traffic_start[each], traffic_start[each + 1]
            new_worst[each] = start
            for group in range(start, stop):
                together += value[group]
                if value[group] > slowest:
                    slowest = value[group]
                    new_worst[each] = group
            new_cost += slowest
            new_energy += slowest + tie * together / (stop - start)
        state ^= (state << 13) & 0xFFFFFFFF
        state ^= state >> 17
        state ^= (state << 5) & 0xFFFFFFFF
        chance = state / 4294967296.0
        temperature *= cooling
        if (
            is_first
            or new_energy <= energy
            or chance < np.exp((energy - new_energy) / (temperature * max(best_cost, 1e-300)))
        ):
            cost, energy = new_cost, new_energy
            for each in range(num_traffic):
                worst[each] = new_worst[each]
            if cost < best_cost or (cost == best_cost and energy < best_energy):
                best_cost, best_energy = cost, energy
                for slot in range(num_hosts):
                    best_order[slot] = order[slot]
        else:
            order[one], order[two] = order[two], order[one]
            for place in range(first, last):
                group = (
                    slot_groups[place] if place < middle else slot_groups[slot_start[two] + place - middle]
                )
                value[group] = old_value[group]
    return best_cost
