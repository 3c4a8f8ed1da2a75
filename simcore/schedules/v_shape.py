"""What ZB-V, V-Half and V-Min share: a building block that repeats every 6 units, run as early as memory allows.

The model goes there and back over the stages, so that early virtual stages, which keep activations long, sit
with late ones, which keep them briefly; how fast the block descends and ascends sets how long, and with that
the memory [Qi 2024b, "Pipeline Parallelism with Controllable Memory", arXiv 2405.15362]. Each operation of a
block takes one unit: the order is that of equal times, whatever the times it is run with.

Repeating the block leaves bubbles at both ends. They are filled by running operations before their turn: the
remaining pattern is always a way to finish within the limit, and an operation may only run early where it
stays one. So no stage ever waits for memory in a circle, however tight the limit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.compiled import compiled, for_kernel, from_kernel, kernel_output
from meshwright.simcore.schedules.base import FORWARD, StageOperations
from meshwright.simcore.schedules.placement import v_placement

__all__ = [
    "building_block",
    "lay_out_pattern",
    "run_pattern_early",
    "v_shaped_operations",
    "worked_out_operations",
]


def building_block(
    num_stages: int, steps: tuple[int, int, int, int], pauses: tuple[int, int] = (0, 0)
) -> NDArray[np.int32]:
    """Return when the first micro-batch's operations start on each stage, shape ``(num_stages, 4)`` [units].

    The columns are the forward down the stages (chunk 0), the forward back up (chunk 1), the input gradient
    down (chunk 1) and the input gradient back up (chunk 0).

    Parameters
    ----------
    num_stages : int
        Pipeline stages.
    steps : tuple[int, int, int, int]
        Units from one stage to the next on each of the four ways.
    pauses : tuple[int, int]
        Units without progress before each of the last two ways, which keep the operations of different
        micro-batches from falling on the same unit.
    """
    down, up = np.arange(num_stages), np.arange(num_stages)[::-1]
    last = num_stages - 1
    second = steps[0] * last + 1
    third = second + steps[1] * last + 1 + pauses[0]
    fourth = third + steps[2] * last + 1 + pauses[1]
    ways = (steps[0] * down, second + steps[1] * up, third + steps[2] * down, fourth + steps[3] * up)
    return np.stack(ways, axis=1).astype(np.int32)


def v_shaped_operations(
    block: NDArray[np.int32], num_micro_batches: int, limit: int, draining_chunk: int
) -> StageOperations:
    """Return the operations of a repeated building block, each as early as the pattern and memory allow.

    Only the two ends are worked out: between them every stage repeats the same six operations.

    Parameters
    ----------
    block : NDArray[np.int32]
        What :func:`building_block` returns; the units of a stage differ modulo 6.
    num_micro_batches : int
        Micro-batches.
    limit : int
        Most activations that live on a stage at once, at least what the pattern needs.
    draining_chunk : int
        Chunk after whose last forward a stage runs weight gradients only while it has nothing else to do.
    """
    num_stages = len(block)
    # From the first forward of this micro-batch on, stages repeat themselves until the last two enter: the
    # tests compare with the whole of longer iterations.
    steady = 2 * num_stages
    num_repeats = max(num_micro_batches - (steady + 2), 0)
    kind, micro_batch, chunk = worked_out_operations(
        block, num_micro_batches - num_repeats, limit, draining_chunk
    )
    if num_repeats:
        is_cut = (kind == FORWARD) & (micro_batch == steady) & (chunk == 0)
        position = np.arange(6 * num_micro_batches)
        repeat = np.clip((position - is_cut.argmax(axis=1)[:, np.newaxis]) // 6, 0, num_repeats)
        source = position - 6 * repeat
        kind = np.take_along_axis(kind, source, axis=1)
        chunk = np.take_along_axis(chunk, source, axis=1)
        micro_batch = np.take_along_axis(micro_batch, source, axis=1) + repeat.astype(np.int32)
    return StageOperations(kind=kind, micro_batch=micro_batch, chunk=chunk, placement=v_placement(num_stages))


def worked_out_operations(
    block: NDArray[np.int32], num_micro_batches: int, limit: int, draining_chunk: int
) -> tuple[NDArray[np.int8], NDArray[np.int32], NDArray[np.int32]]:
    """Return kind, micro-batch and chunk of every operation, shape ``(num_stages, 6 * num_micro_batches)``.

    The same as :func:`v_shaped_operations`, without its short cut.
    """
    num_stages = len(block)
    horizon = int(block.max()) + 6 * num_micro_batches + 6
    weight_turn = kernel_output(2 * num_stages * num_micro_batches, 0, np.int32)
    live = kernel_output(num_stages * horizon, 0, np.int32)
    first_turn = for_kernel(block.ravel())
    lay_out_pattern(first_turn, num_micro_batches, weight_turn, live)
    size = 6 * num_stages * num_micro_batches
    kind = kernel_output(size, 0, np.int8)
    micro_batch, chunk = kernel_output(size, 0, np.int32), kernel_output(size, 0, np.int32)
    run_pattern_early(
        first_turn,
        weight_turn,
        live,
        limit,
        draining_chunk,
        kernel_output(4 * num_stages * num_micro_batches, horizon, np.int32),
        kernel_output(2 * num_stages * num_micro_batches, 0, np.int32),
        kind,
        micro_batch,
        chunk,
    )
    shape = num_stages, 6 * num_micro_batches
    return (
        from_kernel(kind, np.int8).reshape(shape),
        from_kernel(micro_batch, np.int32).reshape(shape),
        from_kernel(chunk, np.int32).reshape(shape),
    )


@compiled
def lay_out_pattern(
    first_turn: NDArray[np.int32],
    num_micro_batches: int,
    weight_turn: NDArray[np.int32],
    live: NDArray[np.int32],
) -> None:
    """Write the units of each stage's weight gradients, the free ones, and how many activations live when.

    ``first_turn`` has four units per stage, ``weight_turn`` two per stage and micro-batch, in the order of
    the input gradients; ``live`` holds the activations after each unit, stage by stage.
    """
    num_stages = len(first_turn) // 4
    horizon = len(live) // num_stages
    for stage in range(num_stages):
        num_live = num_gradients = num_weights = 0
        for unit in range(horizon):
            is_free = True
            for way in range(4):
                since = unit - first_turn[4 * stage + way]
                if since >= 0 and since % 6 == 0 and since < 6 * num_micro_batches:
                    is_free = False
                    if way < 2:
                        num_live += 1
                    else:
                        num_gradients += 1
            if is_free and num_weights < num_gradients:
                weight_turn[2 * num_micro_batches * stage + num_weights] = unit
                num_weights += 1
                num_live -= 1
            live[stage * horizon + unit] = num_live


@compiled
def run_pattern_early(
    first_turn: NDArray[np.int32],
    weight_turn: NDArray[np.int32],
    live: NDArray[np.int32],
    limit: int,
    draining_chunk: int,
    end: NDArray[np.int32],
    gradients: NDArray[np.int32],
    kind: NDArray[np.int8],
    micro_batch: NDArray[np.int32],
    chunk: NDArray[np.int32],
) -> None:
    """Write each stage's operations when all take one unit and each runs as early as it safely can.

    Among the operations that could start, a stage takes the one whose turn in the pattern comes first. A
    forward may run before its turn only where the activations from now until then stay below ``limit``.

    ``end`` (four per stage and micro-batch) holds when forwards and input gradients have ended, at first the
    horizon; ``gradients`` is scratch for the input gradients of each stage in the order they ran; ``live`` is
    that of :func:`lay_out_pattern` and is kept up to date. Kinds are written out because kernels see only
    arguments.
    """
    num_stages = len(first_turn) // 4
    horizon = len(live) // num_stages
    num_micro_batches = len(end) // len(first_turn)
    num_started = [0] * len(first_turn)
    num_weights = [0] * num_stages
    num_live = [0] * num_stages
    remaining = len(kind)
    time = 0
    while remaining > 0:
        for stage in range(num_stages):
            chosen, turn = -1, horizon
            for way in range(4):
                series = 4 * stage + way
                batch = num_started[series]
                slot = first_turn[series] + 6 * batch
                if batch == num_micro_batches or slot >= turn:
                    continue
                place = series * num_micro_batches + batch
                if way > 0 and end[place - num_micro_batches] > time:
                    continue
                if way % 2 == 0 and stage > 0 and end[place - 4 * num_micro_batches] > time:
                    continue
                if way % 2 == 1 and stage < num_stages - 1 and end[place + 4 * num_micro_batches] > time:
                    continue
                if way < 2:
                    fits = num_live[stage] < limit
                    for unit in range(stage * horizon + time, stage * horizon + slot):
                        if live[unit] >= limit:
                            fits = False
                            break
                    if not fits:
                        continue
                chosen, turn = way, slot
            weight = num_weights[stage]
            if weight < num_started[4 * stage + 2] + num_started[4 * stage + 3]:
                slot = weight_turn[2 * num_micro_batches * stage + weight]
                is_draining = num_started[4 * stage + draining_chunk] == num_micro_batches
                if chosen < 0 or (slot < turn and not is_draining):
                    chosen, turn = 4, slot
            if chosen < 0:
                continue

            done = num_weights[stage]
            for way in range(4):
                done += num_started[4 * stage + way]
            operation = 6 * num_micro_batches * stage + done
            change = 0
            if chosen == 4:
                gradient = gradients[2 * num_micro_batches * stage + weight]
                kind[operation] = 3
                micro_batch[operation] = gradient // 2
                chunk[operation] = gradient % 2
                num_weights[stage] += 1
                change = -1
            else:
                series = 4 * stage + chosen
                batch = num_started[series]
                kind[operation] = 0 if chosen < 2 else 2
                micro_batch[operation] = batch
                chunk[operation] = 1 if chosen in (1, 2) else 0
                end[series * num_micro_batches + batch] = time + 1
                if chosen < 2:
                    change = 1
                else:
                    queued = num_started[4 * stage + 2] + num_started[4 * stage + 3]
                    gradients[2 * num_micro_batches * stage + queued] = 2 * batch + chunk[operation]
                num_started[series] += 1
            if change != 0:
                num_live[stage] += change
                for unit in range(stage * horizon + time, stage * horizon + turn):
                    live[unit] += change
            remaining -= 1
        time += 1
