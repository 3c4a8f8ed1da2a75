"""Serve requests on replicas of an engine, event by event, and keep what every request went through."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import InfeasiblePlanError, SpecError
from meshwright.simcore.compiled import from_kernel
from meshwright.simcore.domain.serving import RouterName
from meshwright.simcore.serving import event_loop
from meshwright.simcore.serving.behaviour import EngineBehaviour, TransferLink
from meshwright.simcore.serving.event_loop import fields
from meshwright.simcore.serving.pool import ReplicaPool
from meshwright.simcore.serving.prefill import prefill_time
from meshwright.simcore.serving.requests import RequestTable
from meshwright.simcore.serving.state import ServingState, engines_per_replica
from meshwright.simcore.serving.step_table import StepTable

__all__ = ["ServingResult", "StepRecord", "simulate", "simulate_pools"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
_RECORD_ROWS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepRecord:
    """Every engine step of a simulation, in order of their ends, one entry each.

    Parameters
    ----------
    start, end : NDArray[np.float64]
        When it ran [s].
    engine : NDArray[np.int64]
        Which engine ran it, as numbered in :class:`ServingResult`.
    num_decodes, prompt_tokens, num_first_tokens : NDArray[np.int64]
        Sequences decoded, prompt tokens computed, and prompts completed.
    """

    start: FloatArray
    end: FloatArray
    engine: IntArray
    num_decodes: IntArray
    prompt_tokens: IntArray
    num_first_tokens: IntArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingResult:
    """What every request went through; arrays are ``(num_requests,)`` unless stated.

    Parameters
    ----------
    arrival_time : NDArray[np.float64]
        When the client sent it [s].
    scheduled_time : NDArray[np.float64]
        Start of the first step that held a part of it [s].
    prefill_end_time : NDArray[np.float64]
        End of the step that computed the last of its prompt, for the first time [s].
    first_token_time, finish_time : NDArray[np.float64]
        When the client saw the first and the last token [s].
    transfer_time : NDArray[np.float64]
        Of its KV cache between pools, waiting for the link included; 0 where there is none [s].
    prefill_time : NDArray[np.float64]
        What its prompt takes on an engine with nothing else to do [s].
    input_length, output_length : NDArray[np.int64]
        Prompt and answer [tokens].
    cached_tokens : NDArray[np.int64]
        Prompt tokens found in the prefix cache, over all times it was admitted.
    num_preemptions : NDArray[np.int64]
        Times it lost its KV cache.
    engine, replica : NDArray[np.int64]
        Where it ended; numbered through the pools.
    prefill_engine, prefill_replica : NDArray[np.int64]
        Where it started: the same but for prefill and decode pools.
    prompt_step_time, decode_step_time : NDArray[np.float64]
        Time each engine spent in steps with prompt tokens, and in steps of decoding alone, ``(num_engines,)`` [s].
    num_steps : int
        Steps run; engines that step together count once.
    steps : StepRecord | None
        All of them, where asked for.
    """

    arrival_time: FloatArray
    scheduled_time: FloatArray
    prefill_end_time: FloatArray
    first_token_time: FloatArray
    finish_time: FloatArray
    transfer_time: FloatArray
    prefill_time: FloatArray
    input_length: IntArray
    output_length: IntArray
    cached_tokens: IntArray
    num_preemptions: IntArray
    engine: IntArray
    replica: IntArray
    prefill_engine: IntArray
    prefill_replica: IntArray
    prompt_step_time: FloatArray
    decode_step_time: FloatArray
    num_steps: int
    steps: StepRecord | None = None

    @property
    def num_requests(self) -> int:
        """Requests served."""
        return len(self.arrival_time)


def simulate(
    table: StepTable,
    behaviour: EngineBehaviour,
    requests: RequestTable,
    *,
    num_replicas: int = 1,
    router: RouterName = "least_loaded",
    seed: int = 0,
    is_recording: bool = False,
    is_skipping: bool = True,
) -> ServingResult:
    """Serve requests on equal replicas that prefill and decode; see :func:`simulate_pools`."""
    pool = ReplicaPool(table=table, behaviour=behaviour, num_replicas=num_replicas, router=router)
    return simulate_pools((pool,), requests, seed=seed, is_recording=is_recording, is_skipping=is_skipping)


def simulate_pools(
    pools: tuple[ReplicaPool, ...],
    requests: RequestTable,
    *,
    link: TransferLink | None = None,
    seed: int = 0,
    is_recording: bool = False,
    is_skipping: bool = True,
) -> ServingResult:
    """Serve requests and return what each went through.

    Time is exact to rounding: compiled and plain Python give the same bits, and so do runs with and without
    skipping through steps of pure decode.

    Parameters
    ----------
    pools : tuple[ReplicaPool, ...]
        One aggregated pool, or a prefill pool and a decode pool.
    requests : RequestTable
        What to serve.
    link : TransferLink | None
        Between the pools; needed for two.
    seed : int
        Of the drafted tokens that are accepted.
    is_recording : bool
        Keep every step; runs through each one by one.
    is_skipping : bool
        False runs every step through the scheduler: slower, same result.

    Raises
    ------
    SpecError
        If pools and link do not match.
    InfeasiblePlanError
        If a request does not fit the KV cache of an engine.
    """
    _check_pools(pools, requests, link)
    steps, rate = _decode_steps(pools[-1].behaviour, requests.output_length, seed)
    size = _RECORD_ROWS if is_recording else 0
    state = ServingState(pools, requests, link, steps, rate, is_skipping, size)
    recorded = []
    while event_loop.run(state.ints, state.floats) == 1:
        recorded.append(state.take_record())
    recorded.append(state.take_record())
    return _result(state, pools, requests, _step_record(recorded) if is_recording else None)


def _check_pools(pools: tuple[ReplicaPool, ...], requests: RequestTable, link: TransferLink | None) -> None:
    roles = tuple(pool.role for pool in pools)
    if roles not in (("aggregated",), ("prefill", "decode")):
        raise SpecError(
            f"pools must be one aggregated pool, or a prefill pool and a decode pool, not {roles}"
        )
    if len(pools) == 2 and link is None:
        raise SpecError("prefill and decode pools need the link between them")
    for pool in pools:
        behaviour = pool.behaviour
        if behaviour.policy == "static" and len(pools) == 2:
            raise SpecError(
                f"the {pool.role} pool: static batching ends a batch as a whole and cannot hand requests over"
            )
        # A prefill pool hands a request over before its answer grows.
        lengths = requests.input_length + (0 if pool.role == "prefill" else requests.output_length)
        row = int(np.argmax(lengths))
        if -(-lengths[row] // behaviour.block_size) > behaviour.num_kv_blocks:
            raise InfeasiblePlanError(
                f"the {pool.role} pool: request {row} of {requests.input_length[row]} + "
                f"{requests.output_length[row]} tokens does not fit the KV cache of "
                f"{behaviour.num_kv_blocks * behaviour.block_size} tokens of one engine; split the model over more GPUs, "
                "raise kv_cache_tokens where the plan states it, or serve shorter requests",
                {"memory": 1},
            )


def _decode_steps(
    behaviour: EngineBehaviour, output_length: IntArray, seed: int
) -> tuple[IntArray, FloatArray]:
    """Return decode steps after the first token, and mean tokens of each, per request."""
    left = output_length - 1
    if behaviour.num_speculative_tokens == 0:
        return left, np.ones(len(left))
    generator = np.random.default_rng(seed)
    chances = np.cumsum(behaviour.step_token_probabilities)
    steps = np.zeros(len(left), dtype=np.int64)
    open_rows, missing = np.flatnonzero(left > 0), left[left > 0]
    while len(open_rows):
        steps[open_rows] += 1
        drawn = np.searchsorted(chances, generator.random(len(open_rows)) * chances[-1], side="right")
        missing = missing - 1 - np.minimum(drawn, len(chances) - 1)
        is_open = missing > 0
        open_rows, missing = open_rows[is_open], missing[is_open]
    return steps, np.where(steps > 0, left / np.maximum(steps, 1), 1.0)


def _step_record(recorded: list[tuple[IntArray, FloatArray]]) -> StepRecord:
    ints = np.concatenate([part[0] for part in recorded])
    floats = np.concatenate([part[1] for part in recorded])
    order = np.lexsort((ints[:, fields.RECORD_ENGINE], floats[:, fields.RECORD_END]))
    ints, floats = ints[order], floats[order]
    return StepRecord(
        start=floats[:, fields.RECORD_START],
        end=floats[:, fields.RECORD_END],
        engine=ints[:, fields.RECORD_ENGINE],
        num_decodes=ints[:, fields.RECORD_DECODES],
        prompt_tokens=ints[:, fields.RECORD_PROMPT_TOKENS],
        num_first_tokens=ints[:, fields.RECORD_FIRST_TOKENS],
    )


def _result(
    state: ServingState,
    pools: tuple[ReplicaPool, ...],
    requests: RequestTable,
    steps: StepRecord | None,
) -> ServingResult:
    all_ints = from_kernel(state.ints, np.int64)
    rows = state.request_records(all_ints)
    all_floats = from_kernel(state.floats, np.float64)
    times, engines = state.request_records(all_floats), state.engine_records(all_floats)
    replicas = np.repeat(
        np.arange(sum(pool.num_replicas for pool in pools)),
        [engines_per_replica(pool) for pool in pools for _ in range(pool.num_replicas)],
    )

    # Copies: views would keep the tables of the whole run alive.
    def ints(field: int) -> IntArray:
        return rows[:, field].copy()

    def floats(field: int) -> FloatArray:
        return times[:, field].copy()

    engine = state.engine_index(rows[:, fields.ENGINE])
    first_engine = state.engine_index(rows[:, fields.FIRST_ENGINE_OF])
    return ServingResult(
        arrival_time=floats(fields.ARRIVAL),
        scheduled_time=floats(fields.SCHEDULED),
        prefill_end_time=floats(fields.PREFILLED),
        first_token_time=floats(fields.FIRST_TOKEN),
        finish_time=floats(fields.FINISH),
        transfer_time=floats(fields.TRANSFER),
        prefill_time=prefill_time(pools[0], requests.input_length, ints(fields.FIRST_CACHED)),
        input_length=requests.input_length,
        output_length=requests.output_length,
        cached_tokens=ints(fields.CACHED),
        num_preemptions=ints(fields.PREEMPTIONS),
        engine=engine,
        replica=replicas[engine],
        prefill_engine=first_engine,
        prefill_replica=replicas[first_engine],
        prompt_step_time=engines[:, fields.PROMPT_BUSY].copy(),
        decode_step_time=engines[:, fields.DECODE_BUSY].copy(),
        num_steps=int(all_ints[fields.STEPS_RUN]),
        steps=steps,
    )
