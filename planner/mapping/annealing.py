"""The compiled search of host orders: swaps of two hosts, priced by the pipelines and rings they touch."""
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
    hop: FloatArray,
    ring: FloatArray,
    num_stages: int,
    num_columns: int,
    order: IntArray,
    best_order: IntArray,
    pipeline_time: FloatArray,
    ring_time: FloatArray,
    num_moves: int,
    first_temperature: float,
    last_temperature: float,
    seed: int,
) -> float:
    """Anneal ``order`` in place by ``num_moves`` priced swaps; return the cost of the best order met.

    ``pipeline_time`` and ``ring_time`` are room for one number per column and per stage; ``best_order`` receives the
    best order. Half of the swaps move a host of the slowest pipeline or ring, for no other can lower the maximum; a
    small share of the mean pipeline and ring tells orders with equal maxima apart. Temperatures fall
    geometrically and are shares of the cost.
    """
    num_hosts = len(order)
    num_slots = num_stages * num_columns
    tie = 0.02
    # Marsaglia's xorshift of 32 bits (2003, "Xorshift RNGs") runs alike compiled and not; its state is never 0.
    state = (seed * 2654435761 + 88675123) & 0xFFFFFFFF | 1
    for column in range(num_columns):
        total = 0.0
        for stage in range(num_stages - 1):
            total += hop[order[stage * num_columns + column], order[(stage + 1) * num_columns + column]]
        pipeline_time[column] = total
    for stage in range(num_stages):
        slowest = 0.0
        if num_columns > 1:
            for column in range(num_columns):
                after = column + 1 if column + 1 < num_columns else 0
                slowest = max(
                    slowest, ring[order[stage * num_columns + column], order[stage * num_columns + after]]
                )
        ring_time[stage] = slowest
    cost, energy = 0.0, 0.0
    best_cost, best_energy = np.inf, np.inf
    temperature = first_temperature
    cooling = (last_temperature / first_temperature) ** (1.0 / max(1, num_moves))
    worst_column, worst_stage = 0, 0
    is_first = True
    for _ in range(num_moves + 1):
        one, two = 0, 0
        if not is_first:
            state ^= (state << 13) & 0xFFFFFFFF
            state ^= state >> 17
            state ^= (state << 5) & 0xFFFFFFFF
            kind = state & 3
            state ^= (state << 13) & 0xFFFFFFFF
            state ^= state >> 17
            state ^= (state << 5) & 0xFFFFFFFF
            pick = state
            if kind == 0 and num_stages > 1:
                one = (pick % num_stages) * num_columns + worst_column
            elif kind == 1 and num_columns > 1:
                one = worst_stage * num_columns + pick % num_columns
            else:
                one = pick % num_slots
            state ^= (state << 13) & 0xFFFFFFFF
            state ^= state >> 17
            state ^= (state << 5) & 0xFFFFFFFF
            two = state % num_hosts
            if one == two:
                continue
            order[one], order[two] = order[two], order[one]
        column_one, column_two = one % num_columns, two % num_columns
        stage_one, stage_two = one // num_columns, two // num_columns
        old_pipeline_one, old_pipeline_two = pipeline_time[column_one], pipeline_time[column_two]
        old_ring_one = ring_time[stage_one]
        old_ring_two = ring_time[stage_two] if two < num_slots else 0.0
        if not is_first:
            for side in range(2):
                slot = one if side == 0 else two
                if slot >= num_slots or (side == 1 and column_two == column_one):
                    continue
                column = slot % num_columns
                total = 0.0
                for stage in range(num_stages - 1):
                    total += hop[
                        order[stage * num_columns + column], order[(stage + 1) * num_columns + column]
                    ]
                pipeline_time[column] = total
            for side in range(2):
                slot = one if side == 0 else two
                if slot >= num_slots or (side == 1 and stage_two == stage_one) or num_columns == 1:
                    continue
                start = slot - slot % num_columns
                slowest = ring[order[start + num_columns - 1], order[start]]
                for column in range(num_columns - 1):
                    link = ring[order[start + column], order[start + column + 1]]
                    if link > slowest:
                        slowest = link
                ring_time[slot // num_columns] = slowest
        slowest_pipeline, sum_pipelines, slowest_ring, sum_rings = 0.0, 0.0, 0.0, 0.0
        new_column, new_stage = 0, 0
        for column in range(num_columns):
            sum_pipelines += pipeline_time[column]
            if pipeline_time[column] > slowest_pipeline:
                slowest_pipeline, new_column = pipeline_time[column], column
        for stage in range(num_stages):
            sum_rings += ring_time[stage]
            if ring_time[stage] > slowest_ring:
                slowest_ring, new_stage = ring_time[stage], stage
        new_cost = slowest_pipeline + slowest_ring
        new_energy = new_cost + tie * (sum_pipelines / num_columns + sum_rings / num_stages)
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
            worst_column, worst_stage = new_column, new_stage
            if cost < best_cost or (cost == best_cost and energy < best_energy):
                best_cost, best_energy = cost, energy
                for slot in range(num_hosts):
                    best_order[slot] = order[slot]
        else:
            order[one], order[two] = order[two], order[one]
            pipeline_time[column_one] = old_pipeline_one
            ring_time[stage_one] = old_ring_one
            if two < num_slots:
                pipeline_time[column_two] = old_pipeline_two
                ring_time[stage_two] = old_ring_two
        is_first = False
    return best_cost
