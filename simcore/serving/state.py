"""The tables that the event loop of :mod:`meshwright.simcore.serving.event_loop` runs on, from what the user gave."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.compiled import for_kernel
from meshwright.simcore.serving.behaviour import TransferLink
from meshwright.simcore.serving.event_loop import fields
from meshwright.simcore.serving.policies import BATCHING_POLICIES
from meshwright.simcore.serving.pool import ReplicaPool
from meshwright.simcore.serving.requests import RequestTable
from meshwright.simcore.serving.routers import ROUTERS
from meshwright.simcore.serving.step_table import StepTable

__all__ = ["ServingState", "engines_per_replica", "max_sequences"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
ScalarT = TypeVar("ScalarT", bound=np.generic)
# Slots of the wheel of decode steps to come; longer answers go round more than once.
_WHEEL_SIZE = 4096
_ROLES = {"aggregated": fields.AGGREGATED, "prefill": fields.PREFILL, "decode": fields.DECODE}


class ServingState:
    """The two arrays of one run, and where the records in them begin.

    Parameters
    ----------
    pools : tuple[ReplicaPool, ...]
        What serves.
    requests : RequestTable
        What is served.
    link : TransferLink | None
        Between two pools.
    decode_steps, rate : NDArray
        Of each request: decode steps after the first token, and mean tokens of one of them.
    can_skip : bool
        Whether runs of pure decode may be skipped through.
    record_size : int
        Steps kept before the kernel returns for the caller to take them; 0 keeps none.
    """

    def __init__(
        self,
        pools: tuple[ReplicaPool, ...],
        requests: RequestTable,
        link: TransferLink | None,
        decode_steps: IntArray,
        rate: FloatArray,
        can_skip: bool,
        record_size: int,
    ) -> None:
        pool_of = np.repeat(np.arange(len(pools)), [pool.num_replicas for pool in pools])
        width = np.array([engines_per_replica(pool) for pool in pools])[pool_of]
        self._num_requests, num_engines = requests.num_requests, int(width.sum())
        clients, roots = requests.concurrency, requests.roots
        has_sessions = bool(np.any(requests.successor >= 0))
        has_feedback = clients > 0 or has_sessions or len(pools) == 2
        segment, blocks = _segment_tables(requests, pools[0].behaviour.block_size)
        points, places = _grids(pools)
        wheel_size = min(_WHEEL_SIZE, int(decode_steps.max()) + 2)
        growth_size = max(_stride(pool) for pool in pools)

        # Regions of both arrays come first, then those of one.
        place = fields.POOLS_AT + fields.POOL_STRIDE * len(pools)
        self.replica_base, place = place, place + fields.REPLICA_STRIDE * len(pool_of)
        self.engine_base, place = place, place + fields.ENGINE_STRIDE * num_engines
        self.request_base, place = place, place + fields.REQUEST_STRIDE * self._num_requests
        events, place = place, place + (self._num_requests if has_feedback else 0) + 1
        self._record, place = place, place + fields.RECORD_STRIDE * record_size
        grids = place
        roots_at, place = place, place + len(roots)
        segments_at, place = place, place + len(segment)
        blocks_at, place = place, place + len(blocks)
        growth_at, place = place, place + growth_size * num_engines
        wheel_at, place = place, place + wheel_size * num_engines
        cache_at, place = place, place + 3 * len(blocks) * num_engines
        ints, floats = np.zeros(place, dtype=np.int64), np.zeros(grids + len(points))

        for row, value in (
            (fields.NUM_ROOTS, len(roots)),
            (fields.IS_CLOSED, clients > 0),
            (fields.HAS_FEEDBACK, has_feedback),
            (fields.CAN_SKIP, can_skip and record_size == 0),
            (fields.RECORD_SIZE, record_size),
            (fields.RECORD_AT, self._record),
            (fields.EVENTS_AT, events),
            (fields.ROOTS_AT, roots_at),
            (fields.BLOCKS_AT, blocks_at),
            (fields.REPLICAS_AT, self.replica_base),
            (fields.NUM_REPLICAS, len(pool_of)),
            (fields.WHEEL_SIZE, wheel_size),
        ):
            ints[row] = int(value)
        for index, pool in enumerate(pools):
            here = slice(fields.POOLS_AT + fields.POOL_STRIDE * index, None)
            first = int(np.argmax(pool_of == index))
            ints[here][fields.FIRST_OF_POOL] = self.replica_base + fields.REPLICA_STRIDE * first
            _fill_pool(ints[here], floats[here], pool, places[index] + grids, link)
        floats[grids:] = points
        _fill_replicas(self, ints, floats, pool_of, width)
        engines = ints[self.engine_base :][: fields.ENGINE_STRIDE * num_engines].reshape(num_engines, -1)
        engines[:, fields.GROWTH_AT] = growth_at + growth_size * np.arange(num_engines)
        engines[:, fields.WHEEL_AT] = wheel_at + wheel_size * np.arange(num_engines)
        engines[:, fields.CACHE_AT] = cache_at + 3 * len(blocks) * np.arange(num_engines)
        engines[:, fields.FREE] = np.repeat(
            [pool.behaviour.num_kv_blocks for pool in pools],
            [pool.num_replicas * engines_per_replica(pool) for pool in pools],
        )
        ints[wheel_at:] = -1
        ints[segments_at : segments_at + len(segment)] = segment
        ints[blocks_at : blocks_at + len(blocks)] = blocks
        handles = self.request_base + fields.REQUEST_STRIDE * np.arange(self._num_requests)
        ints[roots_at : roots_at + len(roots)] = handles[roots]
        _fill_requests(self, ints, floats, requests, decode_steps, rate, segments_at)
        if clients > 0:
            first = min(clients, len(roots))
            # Ascending times are a heap already.
            ints[events : events + first] = handles[roots[:first]]
            floats[events : events + first] = np.arange(first) * pools[0].behaviour.burst_spread
            ints[fields.HEAP] = ints[fields.NEXT_ROOT] = first
        self.ints: IntArray = for_kernel(ints)
        self.floats: FloatArray = for_kernel(floats)

    def engine_records(self, values: NDArray[ScalarT]) -> NDArray[ScalarT]:
        """Return the engines' part of one of the arrays, one row each."""
        return values[self.engine_base : self.request_base].reshape(-1, fields.ENGINE_STRIDE)

    def replica_records(self, values: NDArray[ScalarT]) -> NDArray[ScalarT]:
        """Return the replicas' part of one of the arrays, one row each."""
        return values[self.replica_base : self.engine_base].reshape(-1, fields.REPLICA_STRIDE)

    def request_records(self, values: NDArray[ScalarT]) -> NDArray[ScalarT]:
        """Return the requests' part of one of the arrays, one row each."""
        end = self.request_base + fields.REQUEST_STRIDE * self._num_requests
        return values[self.request_base : end].reshape(-1, fields.REQUEST_STRIDE)

    def take_record(self) -> tuple[IntArray, FloatArray]:
        """Return the steps recorded since the last call, one row each, the engine as its index."""
        end = self._record + fields.RECORD_STRIDE * int(self.ints[fields.RECORDED])
        self.ints[fields.RECORDED] = 0
        ints = np.array(self.ints[self._record : end], dtype=np.int64).reshape(-1, fields.RECORD_STRIDE)
        ints[:, fields.RECORD_ENGINE] = self.engine_index(ints[:, fields.RECORD_ENGINE])
        return ints, np.array(self.floats[self._record : end]).reshape(-1, fields.RECORD_STRIDE)

    def engine_index(self, handle: IntArray) -> IntArray:
        """Return which engine begins at a place of the arrays."""
        return (handle - self.engine_base) // fields.ENGINE_STRIDE


def max_sequences(pool: ReplicaPool) -> int:
    """Return the most sequences an engine runs: a mixed step must hold all that decode within its token budget."""
    behaviour = pool.behaviour
    policy = BATCHING_POLICIES[behaviour.policy]
    if not (policy.mixes_phases and policy.has_token_budget):
        return behaviour.max_num_sequences
    within = behaviour.max_num_batched_tokens // (1 + behaviour.num_speculative_tokens)
    return max(1, min(behaviour.max_num_sequences, within))


def _grid(points: FloatArray, *columns: FloatArray) -> list[FloatArray]:
    """Return grid points, and each column followed by its slopes; the last slope goes on beyond the grid."""
    rows = [points]
    for column in columns:
        slopes = np.diff(column) / np.diff(points)
        rows += [column, np.append(slopes, slopes[-1])]
    return rows


def _decode_rows(table: StepTable, most: int) -> FloatArray:
    """Return decode attention and its slopes over context, for every batch size from 0 to ``most``."""
    sizes, times = table.decode_batch_sizes, table.decode_attention_time
    wanted = np.arange(most + 1, dtype=np.float64)
    low = np.clip(np.searchsorted(sizes, wanted, side="right") - 1, 0, len(sizes) - 2)
    share = ((wanted - sizes[low]) / (sizes[low + 1] - sizes[low]))[:, np.newaxis]
    rows = np.maximum(times[low] + share * (times[low + 1] - times[low]), 0.0)
    rows[0] = 0.0
    slopes = np.diff(rows, axis=1) / np.diff(table.decode_contexts)
    return np.concatenate([rows, slopes, slopes[:, -1:]], axis=1)


def _fill_pool(
    ints: IntArray, floats: FloatArray, pool: ReplicaPool, places: IntArray, link: TransferLink | None
) -> None:
    table, behaviour, router = pool.table, pool.behaviour, ROUTERS[pool.router]
    policy = BATCHING_POLICIES[behaviour.policy]
    splits, reserves = behaviour.splits_prompts, behaviour.reserves_output
    pace = behaviour.tokens_per_step
    has_cache = behaviour.has_prefix_cache and pool.role != "decode"
    for row, value in (
        (fields.TOKENS_AT, places[0]),
        (fields.TOKEN_HINT, places[0]),
        (fields.PROMPTS_AT, places[1]),
        (fields.PROMPT_HINT, places[1]),
        (fields.CONTEXTS_AT, places[2]),
        (fields.CONTEXT_HINT, places[2]),
        (fields.DECODE_AT, places[3]),
        (fields.NUM_TOKENS, len(table.token_counts)),
        (fields.NUM_PROMPTS, len(table.prompt_lengths)),
        (fields.NUM_CONTEXTS, len(table.decode_contexts)),
        (fields.MAX_SEQUENCES, max_sequences(pool)),
        (fields.REPLICAS_OF_POOL, pool.num_replicas),
        (fields.BUDGET, behaviour.max_num_batched_tokens),
        (fields.BLOCK, behaviour.block_size),
        (fields.STRIDE, _stride(pool)),
        (fields.WATERMARK, int(behaviour.watermark * behaviour.num_kv_blocks)),
        (fields.MIXES, policy.mixes_phases),
        (fields.SPLITS, policy.splits_prompts if splits is None else splits),
        (fields.HAS_BUDGET, policy.has_token_budget),
        (fields.RESERVES, policy.reserves_output if reserves is None else reserves),
        (fields.BY_CHUNK, policy.allocates_by_chunk),
        (fields.FILLS_EMPTY, policy.fills_only_when_empty),
        (fields.OVERLAPS, behaviour.overlaps_steps),
        (fields.SPECULATION, behaviour.num_speculative_tokens),
        (fields.HAS_CACHE, has_cache),
        (fields.ROLE, _ROLES[pool.role]),
        (fields.IS_HIDDEN, table.is_host_hidden),
        (fields.MICRO_BATCHES, behaviour.pipeline_stages),
        (fields.PATIENCE, behaviour.prompt_wait_steps),
        (fields.BALANCES, router.balances_load),
        (fields.FOLLOWS, router.follows_prefix and has_cache),
    ):
        ints[row] = int(value)
    for row, number in (
        (fields.SERIAL, behaviour.serial_time_per_request),
        (fields.FIXED, behaviour.fixed_time_per_request),
        (fields.PER_TOKEN, behaviour.stream_time_per_token),
        (fields.SKEW, table.decode_skew),
        (fields.MIXED_DECODE, table.mixed_decode_factor),
        (fields.LATENCY, table.step_latency),
        (fields.HOST, table.host_time),
        (fields.HOST_SEQUENCE, table.host_time_per_sequence),
        (fields.HOST_PROMPT, table.host_time_per_prompt),
        (fields.EAGER_HOST, table.eager_host_time),
        (fields.MAX_GRAPH, table.max_graph_tokens),
        (fields.STAGE_SHARE, table.stage_share),
        (fields.CACHED_SHARE, 0.0 if has_cache else behaviour.cached_prompt_share),
        (fields.PACE, pace),
        (fields.MAX_DIFFERENCE, router.max_load_difference),
        (fields.MAX_RATIO, router.max_load_ratio),
    ):
        floats[row] = number
    if link is not None:
        floats[fields.LINK_LATENCY] = link.latency
        floats[fields.LINK_PER_TOKEN] = link.bytes_per_token / link.bandwidth


def _segment_tables(requests: RequestTable, block_size: int) -> tuple[IntArray, IntArray]:
    """Return the segments that requests begin with, and the whole blocks each segment adds to those before it."""
    ends, segment, offset = requests.segment_end, requests.segment, requests.segment_offset
    starts = np.zeros(len(ends), dtype=np.int64)
    if len(offset):
        previous = np.append(0, ends[segment])[:-1] if len(segment) else segment
        previous[offset[:-1][offset[:-1] < len(segment)]] = 0
        starts[segment] = previous
    if len(requests.final_segment):
        final = requests.final_segment
        owners = np.flatnonzero(final >= 0)
        last = offset[owners + 1] - 1
        is_first = offset[owners + 1] == offset[owners]
        starts[final[owners]] = np.where(is_first, 0, np.append(ends[segment], 0)[last])
    return segment, ends // block_size - starts // block_size


def engines_per_replica(pool: ReplicaPool) -> int:
    """Return how many schedulers step together in a replica."""
    return pool.behaviour.attention_dp * pool.behaviour.pipeline_stages


def _stride(pool: ReplicaPool) -> int:
    """Return the decode steps in which a sequence fills a block."""
    return max(1, int(pool.behaviour.block_size / pool.behaviour.tokens_per_step))


def _grids(pools: tuple[ReplicaPool, ...]) -> tuple[FloatArray, IntArray]:
    """Return the step tables of all pools in one array, and where each one's four parts begin."""
    parts: list[FloatArray] = []
    places = np.zeros((len(pools), 4), dtype=np.int64)
    size = 0
    for index, pool in enumerate(pools):
        table = pool.table
        for number, group in enumerate(
            (
                _grid(table.token_counts, table.graph_token_time, table.eager_token_time),
                _grid(table.prompt_lengths, table.prefill_attention_time),
                [table.decode_contexts],
                [_decode_rows(table, max_sequences(pool)).ravel()],
            )
        ):
            places[index, number] = size
            parts += group
            size += sum(len(part) for part in group)
    return np.concatenate(parts).astype(np.float64), places


def _fill_replicas(
    state: ServingState, ints: IntArray, floats: FloatArray, pool_of: IntArray, width: IntArray
) -> None:
    replicas = state.replica_records(ints)
    replicas[:, fields.POOL] = fields.POOLS_AT + fields.POOL_STRIDE * pool_of
    replicas[:, fields.NUM_ENGINES] = width
    replicas[:, fields.REPLICA_INDEX] = np.arange(len(pool_of))
    engines = state.engine_records(ints)
    size = fields.ENGINE_STRIDE
    base = state.engine_base
    replicas[:, fields.FIRST_ENGINE] = base + size * (np.cumsum(width) - width)
    state.replica_records(floats)[:, fields.NEXT] = np.inf
    engines[:, fields.REPLICA] = np.repeat(
        state.replica_base + fields.REPLICA_STRIDE * np.arange(len(pool_of)), width
    )
    engines[:, fields.INDEX] = np.arange(len(engines))
    for row in (
        fields.WAIT_HEAD,
        fields.WAIT_TAIL,
        fields.PARTIAL,
        fields.DONE_HEAD,
        fields.NEWEST,
        fields.PENDING_HEAD,
        fields.STALEST,
        fields.FRESHEST,
    ):
        engines[:, row] = -1


def _fill_requests(
    state: ServingState,
    ints: IntArray,
    floats: FloatArray,
    requests: RequestTable,
    decode_steps: IntArray,
    rate: FloatArray,
    segments_at: int,
) -> None:
    rows, times = state.request_records(ints), state.request_records(floats)
    rows[:, fields.PROMPT] = requests.input_length
    rows[:, fields.OUTPUT] = requests.output_length
    rows[:, fields.STEPS] = decode_steps
    rows[:, fields.SUCCESSOR] = -1
    rows[:, fields.FINAL_SEGMENT] = -1
    rows[:, fields.FIRST_CACHED] = -1
    if len(requests.successor):
        places = state.request_base + fields.REQUEST_STRIDE * requests.successor
        rows[:, fields.SUCCESSOR] = np.where(requests.successor >= 0, places, -1)
    if len(requests.final_segment):
        rows[:, fields.FINAL_SEGMENT] = requests.final_segment
    if len(requests.segment_offset):
        rows[:, fields.FIRST_SEGMENT] = segments_at + requests.segment_offset[:-1]
        rows[:, fields.NUM_SEGMENTS] = np.diff(requests.segment_offset)
    for row in (fields.SCHEDULED, fields.PREFILLED, fields.FIRST_TOKEN, fields.FINISH):
        times[:, row] = -1.0
    times[:, fields.ARRIVAL] = requests.arrival_time
    times[:, fields.RATE] = rate
    if len(requests.think_time):
        times[:, fields.THINK] = requests.think_time
