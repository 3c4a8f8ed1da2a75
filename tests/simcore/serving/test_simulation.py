"""Small cases whose answer can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from serving_deployments import LINK, behaviour, split_pools, step_table, table_of

from meshwright.errors import InfeasiblePlanError, SpecError
from meshwright.simcore.domain.serving import POLICIES
from meshwright.simcore.domain.speculation import Acceptance
from meshwright.simcore.serving.behaviour import EngineBehaviour
from meshwright.simcore.serving.pool import ReplicaPool
from meshwright.simcore.serving.requests import closed_loop_requests
from meshwright.simcore.serving.simulate import simulate, simulate_pools
from meshwright.simcore.serving.step_table import StepTable


def extended(values: np.float64, points: NDArray[np.float64], times: NDArray[np.float64]) -> float:
    """Read a table by hand: linear, beyond the end at the last slope."""
    index = int(np.clip(np.searchsorted(points, values, side="right") - 1, 0, len(points) - 2))
    slope = (times[index + 1] - times[index]) / (points[index + 1] - points[index])
    return float(times[index] + (values - points[index]) * slope)


def expected_step(
    table: StepTable, contexts: list[int], chunks: list[tuple[int, int]], per_sequence: int = 1
) -> float:
    """Return the time of a step by the formula of StepTable: decode contexts, and chunks of (past, length)."""
    count = len(contexts)
    tokens = count * per_sequence + sum(length for _, length in chunks)
    is_graph = not chunks and tokens <= table.max_graph_tokens
    times = table.graph_token_time if is_graph else table.eager_token_time
    device = extended(np.float64(tokens), table.token_counts, times) + table.step_latency
    if contexts:
        mean = np.float64(np.mean(contexts))
        by_batch = np.array(
            [extended(mean, table.decode_contexts, row) for row in table.decode_attention_time]
        )
        decode = extended(np.float64(count), table.decode_batch_sizes, by_batch)
        decode *= 1.0 + table.decode_skew * np.std(contexts) / mean
        device += decode * (table.mixed_decode_factor if chunks else 1.0)
    for past, length in chunks:
        for end, sign in ((past + length, 1.0), (past, -1.0)):
            device += sign * extended(np.float64(end), table.prompt_lengths, table.prefill_attention_time)
    host = table.host_time + table.host_time_per_sequence * (count + len(chunks))
    if not is_graph:
        host = max(host, table.eager_host_time + table.host_time_per_prompt * len(chunks))
    return max(device, host) if table.is_host_hidden else device + host


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("is_hidden", [True, False])
def test_a_request_alone_takes_the_time_of_its_steps(policy: str, is_hidden: bool) -> None:
    table = step_table(is_host_hidden=is_hidden)
    result = simulate(table, behaviour(policy=policy), table_of((1.0, 600, 40)))
    splits = policy in ("chunked_prefill", "prefill_first", "split_fuse")
    chunks = [(0, 256), (256, 256), (512, 88)] if splits else [(0, 600)]
    prefill = sum(expected_step(table, [], [chunk]) for chunk in chunks)
    decode = sum(expected_step(table, [600 + step], []) for step in range(1, 40))
    assert result.scheduled_time[0] == 1.0
    assert result.first_token_time[0] == pytest.approx(1.0 + prefill, rel=1e-12)
    assert result.finish_time[0] == pytest.approx(1.0 + prefill + decode, rel=1e-12)
    assert result.prefill_time[0] == pytest.approx(prefill, rel=1e-12)


def test_two_requests_share_steps_and_their_contexts_differ() -> None:
    table = step_table()
    requests = table_of((0.0, 100, 3), (0.0, 300, 3))
    result = simulate(table, behaviour(max_num_batched_tokens=512), requests)
    first = expected_step(table, [], [(0, 100), (0, 300)])
    second = expected_step(table, [101, 301], [])
    third = expected_step(table, [102, 302], [])
    np.testing.assert_allclose(result.first_token_time, first, rtol=1e-12)
    np.testing.assert_allclose(result.finish_time, first + second + third, rtol=1e-12)


def test_chunks_fill_what_decoding_leaves_of_the_budget() -> None:
    table = step_table()
    requests = table_of((0.0, 100, 9), (1e-6, 300, 2))
    result = simulate(table, behaviour(), requests)
    first = expected_step(table, [], [(0, 100)])
    second = expected_step(table, [101], [(0, 255)])
    third = expected_step(table, [102], [(255, 45)])
    assert result.first_token_time[1] == pytest.approx(first + second + third, rel=1e-12)


def test_prompts_first_stop_decoding() -> None:
    table = step_table()
    result = simulate(
        table, behaviour(policy="prefill_first"), table_of((0.0, 100, 2), (1e-6, 300, 2)), is_recording=True
    )
    assert result.steps is not None
    np.testing.assert_array_equal(result.steps.num_decodes, [0, 0, 0, 2])
    np.testing.assert_array_equal(result.steps.prompt_tokens, [100, 256, 44, 0])


def test_an_engine_that_polls_takes_a_prompt_in_at_its_next_look() -> None:
    requests = table_of((0.0, 100, 40), (1e-6, 100, 2))
    result = simulate(step_table(), behaviour(prompt_wait_steps=5), requests, is_recording=True)
    assert result.steps is not None
    # The second prompt just misses the first step; the engine looks again after it, then every fifth step.
    np.testing.assert_array_equal(result.steps.prompt_tokens[:3], [100, 100, 0])
    late = table_of((0.0, 100, 40), (0.012, 100, 2))
    result = simulate(step_table(), behaviour(prompt_wait_steps=5), late, is_recording=True)
    assert result.steps is not None
    np.testing.assert_array_equal(np.flatnonzero(result.steps.prompt_tokens), [0, 6])


def test_attention_ranks_begin_prompts_together_or_when_their_patience_ends() -> None:
    def first_tokens(*late: float) -> NDArray[np.float64]:
        requests = table_of((0.0, 100, 60), (0.0, 100, 60), *((time, 100, 3) for time in late))
        held = behaviour(prompt_wait_steps=20, attention_dp=2)
        return simulate(step_table(), held, requests).first_token_time[2:]

    plain = simulate(
        step_table(),
        behaviour(attention_dp=2),
        table_of((0.0, 100, 60), (0.0, 100, 60), (0.02, 100, 3)),
    ).first_token_time[2]
    (alone,) = first_tokens(0.02)
    together = first_tokens(0.02, 0.03)
    assert together[0] == together[1]
    assert plain < together[0] < alone


def test_a_static_batch_waits_for_its_longest_answer() -> None:
    requests = table_of((0.0, 50, 30), (0.0, 50, 3), (1e-6, 50, 3))
    result = simulate(step_table(), behaviour(policy="static", max_num_sequences=2), requests)
    assert result.finish_time[1] < result.finish_time[0]
    assert result.scheduled_time[2] == result.finish_time[0]


def test_an_overlapped_step_hands_over_its_tokens_when_the_next_one_has_been_started() -> None:
    table = step_table()
    plain = simulate(table, behaviour(), table_of((0.0, 200, 3)))
    alone = simulate(table, behaviour(overlaps_steps=True), table_of((0.0, 200, 3)))
    # A step of a graph is started long before the one before it ends: tokens come as if the host took no time.
    assert alone.first_token_time[0] == plain.first_token_time[0]
    assert alone.finish_time[0] == plain.finish_time[0]
    # The host of a step with prompts starts its kernels one by one, and hands over the first's token only after those of
    # the second; that of the second waits for a step of a graph to be started.
    host = 10.0 * plain.first_token_time[0]
    slow = replace(table, eager_host_time=host, host_time_per_prompt=0.1 * host)
    late = simulate(slow, behaviour(overlaps_steps=True), table_of((0.0, 200, 3), (0.5 * host, 200, 3)))
    shown = 2.0 * 1.1 * host
    graph = table.host_time + 2 * table.host_time_per_sequence
    np.testing.assert_allclose(late.first_token_time, [shown, shown + graph], rtol=1e-12)
    np.testing.assert_allclose(late.scheduled_time, [0.0, 1.1 * host], rtol=1e-12)


def test_the_front_end_serves_one_request_at_a_time() -> None:
    settings = behaviour(serial_time_per_request=0.5, fixed_time_per_request=0.25)
    result = simulate(step_table(), settings, table_of((0.0, 10, 1), (0.1, 10, 1)))
    np.testing.assert_allclose(result.scheduled_time, [0.75, 1.25])


def test_sending_tokens_caps_throughput() -> None:
    requests = closed_loop_requests(concurrency=8, num_requests=80, input_length=10, output_length=100)
    settings = behaviour(stream_time_per_token=0.002, max_num_sequences=8)
    result = simulate(step_table(), settings, requests)
    assert result.output_length.sum() / result.finish_time.max() == pytest.approx(500.0, rel=0.02)


def test_a_request_waits_behind_the_tokens_being_sent() -> None:
    requests = table_of((0.0, 10, 3), (0.3, 10, 1))
    alone, sending = (
        simulate(step_table(), behaviour(stream_time_per_token=seconds), requests) for seconds in (0.0, 0.5)
    )
    assert alone.scheduled_time[1] == pytest.approx(0.3)
    assert sending.scheduled_time[1] >= 3 * 0.5


def test_a_slot_too_few_keeps_one_client_waiting() -> None:
    requests = closed_loop_requests(concurrency=4, num_requests=80, input_length=64, output_length=50)
    free, tight = (simulate(step_table(), behaviour(max_num_sequences=n), requests) for n in (4, 3))

    def waiting(result: object) -> float:
        queue = (result.scheduled_time - result.arrival_time).sum()  # type: ignore[attr-defined]
        return float(queue / result.finish_time.max())  # type: ignore[attr-defined]

    assert waiting(free) < 0.05
    assert waiting(tight) == pytest.approx(1.0, abs=0.1)


def test_clients_of_a_closed_loop_have_one_request_each() -> None:
    requests = closed_loop_requests(
        concurrency=6, num_requests=60, input_length=100, output_length=40, ratio=0.8, seed=3
    )
    result = simulate(step_table(), behaviour(burst_spread=0.02), requests)
    np.testing.assert_allclose(np.sort(result.arrival_time)[:3], [0.0, 0.02, 0.04])
    moments = np.concatenate([result.arrival_time, result.finish_time])
    changes = np.repeat([1, -1], 60)
    # Where a client's answer ends its next request begins: count the end first.
    order = np.lexsort((changes, moments))
    assert np.cumsum(changes[order]).max() == 6


def test_ranks_of_attention_data_parallelism_wait_for_the_fullest() -> None:
    table, requests = step_table(), table_of((0.0, 100, 5), (0.0, 200, 5))
    result = simulate(table, behaviour(attention_dp=2), requests)
    first = max(expected_step(table, [], [(0, length)]) for length in (100, 200))
    rest = sum(
        max(expected_step(table, [length + step], []) for length in (100, 200)) for step in range(1, 5)
    )
    np.testing.assert_allclose(result.finish_time, first + rest, rtol=1e-12)
    assert set(result.engine) == {0, 1}


def test_micro_batches_of_a_pipeline_follow_each_other() -> None:
    table, requests = step_table(stage_share=0.75), table_of((0.0, 100, 5), (0.0, 100, 5))
    result = simulate(table, behaviour(pipeline_stages=2), requests)
    alone = simulate(table, behaviour(), table_of((0.0, 100, 5)))
    np.testing.assert_allclose(result.finish_time, 2 * 0.75 * alone.finish_time[0], rtol=1e-12)


def test_a_full_cache_preempts_the_newest_and_recomputes_it() -> None:
    requests = table_of((0.0, 64, 60), (1e-6, 64, 60))
    result = simulate(step_table(), behaviour(num_kv_blocks=12), requests)
    np.testing.assert_array_equal(result.num_preemptions, [0, 1])
    ample = simulate(step_table(), behaviour(), requests)
    assert result.finish_time[1] > ample.finish_time[1]
    reserving = simulate(step_table(), behaviour(num_kv_blocks=12, policy="inflight"), requests)
    assert reserving.num_preemptions.sum() == 0
    assert reserving.scheduled_time[1] == reserving.finish_time[0]


def test_accepted_drafts_shorten_answers() -> None:
    requests = table_of((0.0, 64, 41))
    every = behaviour(num_speculative_tokens=3, acceptance=Acceptance(rate=1.0))
    assert simulate(step_table(), every, requests).num_steps == 1 + 10
    none = behaviour(num_speculative_tokens=3, acceptance=Acceptance(lengths=(1.0,)))
    result = simulate(step_table(), none, requests)
    assert result.num_steps == 1 + 40
    table = step_table()
    decode = sum(expected_step(table, [64 + step], [], per_sequence=4) for step in range(1, 41))
    assert result.finish_time[0] - result.first_token_time[0] == pytest.approx(decode, rel=1e-12)


def test_mean_accepted_length_follows_its_distribution() -> None:
    many = table_of(*((0.0, 16, 2001) for _ in range(4)))
    by_rate = behaviour(num_speculative_tokens=4, acceptance=Acceptance(rate=0.6), num_kv_blocks=1000)
    by_lengths = replace(by_rate, acceptance=Acceptance(lengths=(0.3, 0.1, 0.1, 0.0, 0.5)))
    for settings, mean in ((by_rate, (1 - 0.6**5) / 0.4), (by_lengths, 3.3)):
        assert settings.tokens_per_step == pytest.approx(mean)
        result = simulate(step_table(), settings, many)
        assert result.num_steps == pytest.approx(2000 / mean, rel=0.06)
        other = simulate(step_table(), settings, many, seed=1)
        assert np.any(other.finish_time != result.finish_time)


def test_a_cached_prefix_is_not_computed_again() -> None:
    shared = {
        "segment_offset": np.array([0, 1, 2, 2]),
        "segment": np.array([0, 0]),
        "segment_end": np.array([100]),
    }
    requests = table_of((0.0, 150, 2), (5.0, 150, 2), (9.0, 150, 2), **shared)
    result = simulate(step_table(), behaviour(has_prefix_cache=True), requests)
    np.testing.assert_array_equal(result.cached_tokens, [0, 96, 0])
    table = step_table()
    assert result.first_token_time[1] == pytest.approx(5.0 + expected_step(table, [], [(96, 54)]), rel=1e-12)
    # A prompt that needs every block drives the cached ones out.
    pushed = table_of(
        (0.0, 150, 2), (3.0, 250, 2), (5.0, 150, 2), **(shared | {"segment_offset": np.array([0, 1, 1, 2])})
    )
    full = simulate(step_table(), behaviour(has_prefix_cache=True, num_kv_blocks=16), pushed)
    assert full.cached_tokens.sum() == 0


def test_a_prefix_aware_router_keeps_a_group_together() -> None:
    count = 40
    requests = table_of(
        *((0.3 * row, 150, 4) for row in range(count)),
        segment_offset=np.arange(count + 1),
        segment=np.arange(count) % 4,
        segment_end=np.full(4, 96),
    )
    settings = behaviour(has_prefix_cache=True)
    aware, turns, least = (
        simulate(step_table(), settings, requests, num_replicas=3, router=router)
        for router in ("prefix_aware", "round_robin", "least_loaded")
    )
    assert aware.cached_tokens.sum() == (count - 4) * 96
    assert turns.cached_tokens.sum() == (count - 12) * 96
    np.testing.assert_array_equal(turns.replica, np.arange(count) % 3)
    # Nothing overlaps, so the least loaded replica always is the first.
    assert set(least.replica) == {0}


def test_the_least_loaded_router_counts_what_is_under_way() -> None:
    requests = table_of((0.0, 50, 400), (0.1, 50, 2), (0.2, 50, 2), (1.0, 50, 2))
    result = simulate(step_table(), behaviour(), requests, num_replicas=2)
    np.testing.assert_array_equal(result.replica, [0, 1, 1, 1])


def test_transfers_of_a_prefill_replica_queue_for_its_link() -> None:
    pools = split_pools(behaviour(), behaviour())
    requests = table_of((0.0, 100, 3), (0.0, 100, 3), (0.0, 100, 3))
    result = simulate_pools(pools, requests, link=LINK)
    each = 100 * LINK.bytes_per_token / LINK.bandwidth
    np.testing.assert_allclose(
        np.sort(result.transfer_time), LINK.latency + each * np.array([1, 1, 2]), rtol=1e-9
    )
    np.testing.assert_allclose(
        result.first_token_time, result.prefill_end_time + result.transfer_time, rtol=1e-12
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "chunked_prefil"}, "did you mean 'chunked_prefill'"),
        ({"max_num_sequences": 0}, "max_num_sequences must be at least 1"),
        ({"watermark": 1.5}, "watermark is a share"),
        ({"burst_spread": -1.0}, "burst_spread must not be below 0"),
    ],
)
def test_a_behaviour_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        EngineBehaviour(**change)  # type: ignore[arg-type]  # on purpose


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(
        InfeasiblePlanError, match=r"request 1 of 3000 \+ 10 tokens does not fit the KV cache of 1920"
    ):
        simulate(step_table(), behaviour(), table_of((0.0, 10, 10), (0.0, 3000, 10)))
    pools = split_pools(behaviour(), behaviour())
    with pytest.raises(SpecError, match="link between them"):
        simulate_pools(pools, table_of((0.0, 10, 10)))
    with pytest.raises(SpecError, match="static batching"):
        simulate_pools(split_pools(behaviour(policy="static"), behaviour()), table_of((0.0, 9, 9)), link=LINK)
    with pytest.raises(SpecError, match="one aggregated pool"):
        simulate_pools(pools[:1], table_of((0.0, 10, 10)), link=LINK)
    with pytest.raises(SpecError, match="unknown router"):
        ReplicaPool(table=step_table(), behaviour=behaviour(), router="random")  # type: ignore[arg-type]
