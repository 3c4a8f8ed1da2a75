"""What holds for every policy, arrival and router."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from serving_deployments import FIELDS, LINK, behaviour, split_pools, step_table, workload

from meshwright.simcore import compiled as compiled_module
from meshwright.simcore.domain.serving import POLICIES
from meshwright.simcore.serving import event_loop
from meshwright.simcore.serving.event_loop import fields
from meshwright.simcore.serving.policies import BATCHING_POLICIES
from meshwright.simcore.serving.pool import ReplicaPool
from meshwright.simcore.serving.requests import RequestTable, generate_requests
from meshwright.simcore.serving.simulate import ServingResult, simulate, simulate_pools
from meshwright.simcore.serving.state import ServingState

SCENARIOS: dict[str, tuple[dict[str, object], dict[str, object], dict[str, object]]] = {
    # Workload, behaviour and simulation of each.
    "open": ({}, {"watermark": 0.02}, {"num_replicas": 2, "router": "round_robin"}),
    "burst": ({"rate": 1000.0}, {"overlaps_steps": True}, {}),
    "closed": (
        {"arrival": "closed_loop", "concurrency": 12},
        {"serial_time_per_request": 0.002, "fixed_time_per_request": 0.01, "burst_spread": 0.003},
        {},
    ),
    "sessions": (
        {"num_turns": 3, "prefix_length": 40, "num_prefix_groups": 2, "num_requests": 90},
        {"has_prefix_cache": True, "num_kv_blocks": 200},
        {"num_replicas": 2, "router": "prefix_aware"},
    ),
    "ranks": (
        {"arrival": "gamma", "burstiness": 2.0},
        {"attention_dp": 2, "pipeline_stages": 2, "overlaps_steps": True, "stream_time_per_token": 1e-4},
        {},
    ),
    "speculation": ({}, {"num_speculative_tokens": 3, "cached_prompt_share": 0.3}, {}),
}
CASES = [(name, policy) for name in SCENARIOS for policy in POLICIES]


def parts(name: str, policy: str) -> tuple[RequestTable, dict[str, object], dict[str, object]]:
    load, engine, run = SCENARIOS[name]
    return generate_requests(workload(**load), 5), {"policy": policy, **engine}, run


def serve(name: str, policy: str, **options: object) -> ServingResult:
    requests, engine, run = parts(name, policy)
    return simulate(step_table(), behaviour(**engine), requests, **(run | options))  # type: ignore[arg-type]


def assert_equal(first: ServingResult, second: ServingResult) -> None:
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field), field)


def assert_sound(result: ServingResult, requests: RequestTable) -> None:
    marks = ("arrival_time", "scheduled_time", "prefill_end_time", "first_token_time", "finish_time")
    for earlier, later in pairwise(marks):
        assert np.all(getattr(result, earlier) <= getattr(result, later)), (earlier, later)
    assert np.all(np.isfinite(result.finish_time))
    assert np.all(result.scheduled_time < result.prefill_end_time)
    has_more = requests.output_length > 1
    assert np.all(result.first_token_time[has_more] < result.finish_time[has_more])


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_every_request_is_served_once_and_in_order_of_cause(name: str, policy: str) -> None:
    requests, _, _ = parts(name, policy)
    result = serve(name, policy)
    assert_sound(result, requests)
    successor = requests.successor[requests.successor >= 0]
    before = np.flatnonzero(requests.successor >= 0)
    np.testing.assert_array_equal(result.arrival_time[successor], result.finish_time[before])


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_skipping_changes_nothing_and_runs_repeat(name: str, policy: str) -> None:
    result = serve(name, policy)
    assert_equal(result, serve(name, policy))
    assert_equal(result, serve(name, policy, is_skipping=False))
    assert_equal(result, serve(name, policy, is_recording=True))


@pytest.mark.parametrize(("name", "policy"), CASES[::5])
def test_compiled_and_plain_python_give_the_same_bits(
    name: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = serve(name, policy)
    monkeypatch.setattr(compiled_module, "has_compiler", lambda: False)
    monkeypatch.setattr(event_loop, "run", event_loop.run.__wrapped__)  # type: ignore[attr-defined]
    assert_equal(fast, serve(name, policy))


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_tokens_are_conserved_and_limits_kept(name: str, policy: str) -> None:
    requests, engine, _ = parts(name, policy)
    result, settings = serve(name, policy, is_recording=True), behaviour(**engine)
    steps = result.steps
    assert steps is not None
    assert np.all(steps.start < steps.end)
    assert np.all((steps.num_decodes > 0) | (steps.prompt_tokens > 0))
    assert steps.num_decodes.max() <= settings.max_num_sequences
    computed, needed = steps.prompt_tokens.sum(), (requests.input_length - result.cached_tokens).sum()
    emitted = steps.num_decodes.sum() + steps.num_first_tokens.sum()
    if result.num_preemptions.sum() == 0:
        assert computed == needed
        assert steps.num_first_tokens.sum() == requests.num_requests
        if settings.num_speculative_tokens == 0:
            assert emitted == requests.output_length.sum()
    else:
        assert computed > needed
        if settings.num_speculative_tokens == 0:
            # A recomputed prompt yields its next token too, unless it was taken back before it was whole.
            assert emitted == requests.output_length.sum()
    if BATCHING_POLICIES[settings.policy].has_token_budget:
        tokens = steps.prompt_tokens + steps.num_decodes * (1 + settings.num_speculative_tokens)
        longest = settings.max_num_batched_tokens
        if not BATCHING_POLICIES[settings.policy].splits_prompts:
            longest += int(requests.input_length.max())
        assert tokens.max() <= longest
    assert not np.any((steps.num_decodes > 0) & (steps.prompt_tokens > 0)) or (
        BATCHING_POLICIES[settings.policy].mixes_phases
    )


def held_blocks(state: ServingState, engine: int, num_segments: int) -> int:
    """Return the blocks of an engine that are free, cached or held by a request."""
    ints = np.asarray(state.ints)
    record = state.engine_records(ints)[engine]
    handle = state.engine_base + fields.ENGINE_STRIDE * engine
    pool = ints[ints[record[fields.REPLICA] + fields.POOL] :]
    blocks_at, total = ints[fields.BLOCKS_AT], record[fields.FREE]
    for row in state.request_records(ints):
        if row[fields.ENGINE] != handle:
            continue
        total += row[fields.PRIVATE]
        if row[fields.PHASE] == fields.DECODING and pool[fields.RESERVES] == 0:
            last = record[fields.COUNTER] - (0 if record[fields.IS_DECODING] else 1)
            key, stride = row[fields.KEY], pool[fields.STRIDE]
            total += (last + key) // stride - (row[fields.ENTRY] - 1 + key) // stride
    for segment in range(num_segments):
        if ints[record[fields.CACHE_AT] + 3 * segment] >= 0:
            total += ints[blocks_at + segment]
    return int(total)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["burst", "sessions"])
def test_blocks_are_conserved_at_every_moment(name: str, policy: str) -> None:
    requests, engine, _ = parts(name, policy)
    settings = behaviour(**engine)
    steps = requests.output_length - 1
    state = ServingState(
        (ReplicaPool(table=step_table(), behaviour=settings),),
        requests,
        None,
        steps,
        np.ones(len(steps)),
        False,
        64,
    )
    moments = 0
    while event_loop.run(state.ints, state.floats) == 1:
        state.take_record()
        assert held_blocks(state, 0, len(requests.segment_end)) == settings.num_kv_blocks
        moments += 1
    assert moments > 10
    assert held_blocks(state, 0, len(requests.segment_end)) == settings.num_kv_blocks
    record = state.engine_records(np.asarray(state.ints))[0]
    assert record[fields.RUNNING] == record[fields.WAITING] == record[fields.DECODES] == 0
    assert record[fields.FREE] + record[fields.EVICTABLE] == settings.num_kv_blocks


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "static"])
@pytest.mark.parametrize("arrival", ["poisson", "closed_loop"])
def test_pools_hand_every_request_over_once(policy: str, arrival: str) -> None:
    requests = generate_requests(workload(arrival=arrival, concurrency=7), 5)
    lagging = behaviour(policy=policy, overlaps_steps=True, stream_time_per_token=1e-4)
    pools = split_pools(behaviour(policy=policy), lagging)
    result = simulate_pools(pools, requests, link=LINK)
    assert_sound(result, requests)
    assert_equal(result, simulate_pools(pools, requests, link=LINK, is_skipping=False))
    has_more = requests.output_length > 1
    assert set(result.prefill_replica) == {0, 1}
    assert np.all(result.replica[has_more] == 2)
    alone = requests.input_length * LINK.bytes_per_token / LINK.bandwidth + LINK.latency
    assert np.all(result.transfer_time[has_more] >= alone[has_more] * (1 - 1e-9))
    assert np.all(result.transfer_time[~has_more] == 0.0)
