"""The event loop: arrivals and replicas in order of time."""
# ruff: noqa: PLR1730 - calls of max() and min() halve the speed of plain Python

from __future__ import annotations

import math

from meshwright.simcore.compiled import compiled, kernel_part
from meshwright.simcore.serving.event_loop.blocks import matched_segments
from meshwright.simcore.serving.event_loop.events import pop_event
from meshwright.simcore.serving.event_loop.fields import (
    ARRIVAL,
    BALANCES,
    BLOCKED,
    CAN_SKIP,
    DECODES,
    DEVICE_FREE,
    ENGINE,
    ENGINE_STRIDE,
    EVENTS_AT,
    FIRST_ENGINE,
    FIRST_ENGINE_OF,
    FIRST_OF_POOL,
    FIRST_TOKEN,
    FIXED,
    FOLLOWS,
    FRONT_FREE,
    HAS_FEEDBACK,
    HEAP,
    HELD,
    IS_BUSY,
    IS_CLOSED,
    LINK,
    LOAD,
    MAX_DIFFERENCE,
    MAX_RATIO,
    MAX_SEQUENCES,
    MICRO_BATCHES,
    NEXT,
    NEXT_ROOT,
    NUM_ENGINES,
    NUM_REPLICAS,
    NUM_ROOTS,
    OVERLAPS,
    PATIENCE,
    PENDING_HEAD,
    PHASE,
    POOL,
    POOL_STRIDE,
    POOLS_AT,
    READY,
    RECORD_SIZE,
    RECORDED,
    REPLICA_STRIDE,
    REPLICAS_AT,
    REPLICAS_OF_POOL,
    ROOTS_AT,
    RUNNING,
    SERIAL,
    STAGE_SHARE,
    STEP_HOST,
    STEP_START,
    STEP_TIME,
    STEP_TOKENS,
    STEPS_RUN,
    TRANSFERRED,
    TURN,
    WAIT_HEAD,
    WAIT_TAIL,
    WAITED,
    WAITING,
    Floats,
    Ints,
)
from meshwright.simcore.serving.event_loop.sequences import show_tokens
from meshwright.simcore.serving.event_loop.skipping import skip_decodes
from meshwright.simcore.serving.event_loop.steps import complete_step, form_step

__all__ = ["advance", "chosen_replica", "deliver", "form_steps", "hold_prompts", "run", "start_step"]


@kernel_part
def hold_prompts(ints: Ints, floats: Floats, replica: int, first: int, num_ranks: int, now: float) -> None:
    """Let new prompts wait while all ranks decode, until ``PATIENCE`` steps have gone by.

    Several ranks begin sooner: when each has a prompt. One rank looks again right after a step of prompts.
    """
    pool = ints[replica + POOL]
    all_prompts, all_decode = num_ranks > 1 or ints[first + STEP_TOKENS] > 0, True
    for engine in range(first, first + num_ranks * ENGINE_STRIDE, ENGINE_STRIDE):
        if ints[engine + DECODES] == 0:
            all_decode = False
        if (
            ints[engine + WAITING] == 0
            or floats[ints[engine + WAIT_HEAD] + READY] > now
            or ints[engine + RUNNING] >= ints[pool + MAX_SEQUENCES]
        ):
            all_prompts = all_prompts and num_ranks == 1
    ints[replica + WAITED] += 1
    is_held = all_decode and not all_prompts and ints[replica + WAITED] < ints[pool + PATIENCE]
    if not is_held:
        ints[replica + WAITED] = 0
    for engine in range(first, first + num_ranks * ENGINE_STRIDE, ENGINE_STRIDE):
        ints[engine + HELD] = is_held


@kernel_part
def start_step(ints: Ints, floats: Floats, replica: int, now: float, duration: float, host: float) -> None:
    """Set when a step that begins now ends, and when the next one may be formed.

    Where steps overlap, the host forms and starts a step while the device runs the one before, then handles the tokens
    of that one, and only then looks at its queue again: the next step is formed when its own work is done and the
    device has ended the step before.
    """
    ints[replica + IS_BUSY] = 1
    if ints[ints[replica + POOL] + OVERLAPS] == 0:
        floats[replica + STEP_START] = now
        floats[replica + NEXT] = now + duration
        return
    start, ready = floats[replica + DEVICE_FREE], now + host
    floats[replica + NEXT] = start if start > ready else ready
    if start < now:
        start = now
    floats[replica + STEP_START] = start
    floats[replica + DEVICE_FREE] = start + duration if start + duration > ready else ready


@kernel_part
def form_steps(ints: Ints, floats: Floats, replica: int, now: float) -> None:
    """Let the engines of a replica form their next steps together, or let it sleep."""
    pool, first = ints[replica + POOL], ints[replica + FIRST_ENGINE]
    count, micro_batches = ints[replica + NUM_ENGINES], ints[pool + MICRO_BATCHES]
    num_ranks = count // micro_batches
    is_busy, longest, total, host, wake = False, 0.0, 0.0, 0.0, math.inf
    for micro_batch in range(micro_batches):
        widest = 0.0
        start = first + micro_batch * num_ranks * ENGINE_STRIDE
        if ints[pool + PATIENCE] > 0:
            hold_prompts(ints, floats, replica, start, num_ranks, now)
        for engine in range(start, start + num_ranks * ENGINE_STRIDE, ENGINE_STRIDE):
            if form_step(ints, floats, engine, pool, now):
                is_busy = True
                if floats[engine + STEP_TIME] > widest:
                    widest = floats[engine + STEP_TIME]
                # Ranks and pipeline stages have a process each.
                if floats[engine + STEP_HOST] > host:
                    host = floats[engine + STEP_HOST]
            elif ints[engine + WAITING] > 0:
                ready = floats[ints[engine + WAIT_HEAD] + READY]
                if ready < wake:
                    wake = ready
        total += widest
        if widest > longest:
            longest = widest
    if is_busy:
        ints[STEPS_RUN] += 1
        total *= floats[pool + STAGE_SHARE]
        start_step(ints, floats, replica, now, total if total > longest else longest, host)
        return
    if floats[replica + DEVICE_FREE] > now:
        # What the device still runs is handled before the engine looks for requests again.
        ints[replica + IS_BUSY] = 1
        floats[replica + NEXT] = floats[replica + DEVICE_FREE]
        return
    ints[replica + IS_BUSY] = 0
    floats[replica + NEXT] = wake
    visible = floats[replica + FRONT_FREE]
    if visible < now:
        visible = now
    for engine in range(first, first + count * ENGINE_STRIDE, ENGINE_STRIDE):
        show_tokens(ints, floats, engine, visible)


@kernel_part
def advance(ints: Ints, floats: Floats, replica: int, limit: float) -> bool:
    """Run a replica through all that happens to it before ``limit``; return False where the record is full."""
    pool, first, count = ints[replica + POOL], ints[replica + FIRST_ENGINE], ints[replica + NUM_ENGINES]
    while floats[replica + NEXT] < limit:
        now = floats[replica + NEXT]
        if ints[RECORD_SIZE] > 0 and ints[RECORDED] + count > ints[RECORD_SIZE]:
            return False
        if ints[replica + IS_BUSY] == 1:
            for engine in range(first, first + count * ENGINE_STRIDE, ENGINE_STRIDE):
                if floats[engine + STEP_TIME] > 0.0:
                    complete_step(ints, floats, engine, pool, now)
                else:
                    visible = floats[replica + FRONT_FREE]
                    show_tokens(ints, floats, engine, visible if visible > now else now)
            # Answers cause requests: nothing may be skipped past the first of those.
            if ints[HEAP] > 0 and floats[ints[EVENTS_AT]] < limit:
                limit = floats[ints[EVENTS_AT]]
            if (
                ints[CAN_SKIP] == 1
                and count == 1
                and ints[first + BLOCKED] > 0
                and ints[first + DECODES] > 0
                and ints[first + PENDING_HEAD] < 0
            ):
                now = skip_decodes(ints, floats, replica, first, now, limit)
        form_steps(ints, floats, replica, now)
        if ints[HEAP] > 0 and floats[ints[EVENTS_AT]] < limit:
            limit = floats[ints[EVENTS_AT]]
    return True


@kernel_part
def chosen_replica(ints: Ints, floats: Floats, pool: int, request: int) -> int:
    """Return the replica that the router sends a request to."""
    first: int = ints[pool + FIRST_OF_POOL]
    count: int = ints[pool + REPLICAS_OF_POOL]
    if count == 1:
        return first
    if ints[pool + BALANCES] == 0:
        turn: int = ints[pool + TURN]
        ints[pool + TURN] = (turn + 1) % count
        return first + turn * REPLICA_STRIDE
    least = first
    most = ints[first + LOAD]
    for replica in range(first + REPLICA_STRIDE, first + count * REPLICA_STRIDE, REPLICA_STRIDE):
        if ints[replica + LOAD] < ints[least + LOAD]:
            least = replica
        if ints[replica + LOAD] > most:
            most = ints[replica + LOAD]
    if ints[pool + FOLLOWS] == 0 or (
        most - ints[least + LOAD] > floats[pool + MAX_DIFFERENCE]
        and most > floats[pool + MAX_RATIO] * ints[least + LOAD]
    ):
        return least
    longest = 0
    chosen = least
    for replica in range(first, first + count * REPLICA_STRIDE, REPLICA_STRIDE):
        start = ints[replica + FIRST_ENGINE]
        length = 0
        for engine in range(start, start + ints[replica + NUM_ENGINES] * ENGINE_STRIDE, ENGINE_STRIDE):
            matched = matched_segments(ints, engine, request)
            if matched > length:
                length = matched
        if length > longest or (length == longest and ints[replica + LOAD] < ints[chosen + LOAD]):
            longest = length
            chosen = replica
    return chosen


@kernel_part
def deliver(ints: Ints, floats: Floats, request: int, time: float) -> None:
    """Send a request that arrives at ``time`` through a front end into the queue of an engine."""
    if ints[request + PHASE] == TRANSFERRED:
        pool = POOLS_AT + POOL_STRIDE
        floats[request + FIRST_TOKEN] = time
        replica = chosen_replica(ints, floats, pool, request)
        ready = time
    else:
        pool = POOLS_AT
        floats[request + ARRIVAL] = time
        replica = chosen_replica(ints, floats, pool, request)
        # One event loop reads requests and streams tokens: a backlog of either keeps the other waiting.
        ready = floats[replica + FRONT_FREE]
        if ready < time:
            ready = time
        ready += floats[pool + SERIAL]
        floats[replica + FRONT_FREE] = ready
        ready += floats[pool + FIXED]
    floats[request + READY] = ready
    first = ints[replica + FIRST_ENGINE]
    engine, longest = first, -1
    for other in range(first, first + ints[replica + NUM_ENGINES] * ENGINE_STRIDE, ENGINE_STRIDE):
        if ints[other + WAITING] + ints[other + RUNNING] < ints[engine + WAITING] + ints[engine + RUNNING]:
            engine = other
    if ints[pool + FOLLOWS] == 1:
        for other in range(first, first + ints[replica + NUM_ENGINES] * ENGINE_STRIDE, ENGINE_STRIDE):
            matched = matched_segments(ints, other, request)
            if matched > longest or (matched == longest and other == engine):
                longest = matched
        if matched_segments(ints, engine, request) < longest:
            for other in range(first, first + ints[replica + NUM_ENGINES] * ENGINE_STRIDE, ENGINE_STRIDE):
                if matched_segments(ints, other, request) == longest:
                    engine = other
    ints[request + ENGINE] = engine
    if pool == POOLS_AT:
        ints[request + FIRST_ENGINE_OF] = engine
    ints[request + LINK] = -1
    if ints[engine + WAITING] == 0:
        ints[engine + WAIT_HEAD] = request
        ints[engine + BLOCKED] = 0
    else:
        ints[ints[engine + WAIT_TAIL] + LINK] = request
    ints[engine + WAIT_TAIL] = request
    ints[engine + WAITING] += 1
    ints[replica + LOAD] += 1
    if ints[replica + IS_BUSY] == 0 and ready < floats[replica + NEXT]:
        floats[replica + NEXT] = ready


@compiled
def run(ints: Ints, floats: Floats) -> int:
    """Run until every request is done; return 0, or 1 when the record of steps is full and is to be emptied first.

    After a return of 1 the caller stores the ``ints[RECORDED]`` steps, sets the number to 0 and calls again.
    """
    first = ints[REPLICAS_AT]
    last = first + ints[NUM_REPLICAS] * REPLICA_STRIDE
    while True:
        arrival, is_root = math.inf, False
        if ints[IS_CLOSED] == 0 and ints[NEXT_ROOT] < ints[NUM_ROOTS]:
            arrival, is_root = floats[ints[ints[ROOTS_AT] + ints[NEXT_ROOT]] + ARRIVAL], True
        if ints[HEAP] > 0 and floats[ints[EVENTS_AT]] < arrival:
            arrival, is_root = floats[ints[EVENTS_AT]], False
        if ints[HAS_FEEDBACK] == 0:
            for replica in range(first, last, REPLICA_STRIDE):
                if floats[replica + NEXT] < arrival and not advance(ints, floats, replica, arrival):
                    return 1
        else:
            earliest, second, chosen = math.inf, math.inf, -1
            for replica in range(first, last, REPLICA_STRIDE):
                time = floats[replica + NEXT]
                if time < earliest:
                    second = earliest
                    earliest = time
                    chosen = replica
                elif time < second:
                    second = time
            if earliest < arrival:
                # What this replica does may bring forward an arrival, never behind the clock of another one.
                # Of equals the first goes first, and then only through this one moment.
                bound = second if second > earliest else earliest * (1.0 + 1e-15) + 1e-300
                if not advance(ints, floats, chosen, bound if bound < arrival else arrival):
                    return 1
                continue
        if is_root:
            request = ints[ints[ROOTS_AT] + ints[NEXT_ROOT]]
            ints[NEXT_ROOT] += 1
        elif ints[HEAP] > 0:
            request = pop_event(ints, floats)
        else:
            return 0
        deliver(ints, floats, request, arrival)
