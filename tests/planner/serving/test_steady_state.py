"""Steady states against figures worked out by hand, and as bounds of the simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.planner.serving.candidates import (
    SchedulerChoices,
    prefill_columns,
    replica_columns,
    state_grid,
)
from meshwright.planner.serving.load_profile import load_profile
from meshwright.planner.serving.steady_state import (
    prefill_steady_state,
    replica_steady_state,
)
from meshwright.planner.serving.unit_simulation import profile_of_requests
from meshwright.simcore.domain.serving import LengthDistribution, ServingWorkload, Slo, SloLimit
from meshwright.simcore.serving.behaviour import EngineBehaviour, TransferLink
from meshwright.simcore.serving.metrics import summarize
from meshwright.simcore.serving.pool import ReplicaPool
from meshwright.simcore.serving.requests import generate_requests
from meshwright.simcore.serving.simulate import simulate, simulate_pools
from meshwright.simcore.serving.step_times import decode_step_time, interpolate


def state(table, profile, decodes, budget=2048.0, **changes):
    settings = {"policy": "chunked_prefill"} | changes
    return replica_steady_state(
        table, profile, num_decodes=np.array([float(decodes)]), budgets=np.array([float(budget)]), **settings
    )


def test_a_profile_weighs_requests_by_their_decode_steps():
    profile = load_profile(np.array([100.0, 300.0]), np.array([10.0, 30.0]))
    assert profile.mean_prompt == 200.0
    assert profile.mean_output == 20.0
    assert profile.decode_context == pytest.approx((10 * 105 + 30 * 315) / 40)
    assert profile.reserved_tokens == pytest.approx((10 * 110 + 30 * 330) / 40)


def test_the_rate_of_a_mixed_state_is_what_a_hand_count_gives(cases, fixed_load):
    # 10 sequences, 100 decode steps each: one request in ten steps, whose 1,000 tokens share one step with 10 others.
    table = cases.table()
    found = state(table, fixed_load, 10)
    context = 1000 + 101 / 2
    pure = 0.01 + 1e-5 * 10 + 1e-9 * 10 * context
    mixed = 0.01 + 1e-5 * 1010 + 1e-9 * 10 * context
    mean = 0.9 * pure + 0.1 * mixed
    assert found.rate[0, 0] == pytest.approx(10 / 100 / mean)
    # While a sequence decodes its 100 steps the 9 others bring a prompt each: 9 mixed steps and 91 pure ones.
    assert found.tpot[0, 0] == found.gap[0, 0] == pytest.approx(0.91 * pure + 0.09 * mixed)
    # Its own prompt shares a step with the 9 others.
    assert found.ttft[0, 0] == pytest.approx(0.01 + 1e-5 * 1009 + 1e-9 * 9 * context)


def test_a_sequence_alone_waits_for_no_prompt(cases, fixed_load):
    for policy in ("chunked_prefill", "prefill_first", "inflight"):
        found = state(cases.table(), fixed_load, 1, policy=policy, gap_statistics=("p50", "p99"))
        pure = 0.01 + 1e-5 + 1e-9 * (1000 + 101 / 2)
        assert found.tpot[0, 0] == pytest.approx(pure)
        assert found.late_gaps["p50"][0, 0] == found.late_gaps["p99"][0, 0] == pytest.approx(pure)
        assert found.ttft[0, 0] == pytest.approx(0.01 + 1e-5 * 1000)


def test_prompts_that_come_together_meet_none_of_each_others_sequences(cases, fixed_load):
    grouped = replace(fixed_load, comes_in_groups=True)
    context = 1000 + 101 / 2
    pure = 0.01 + 1e-5 * 10 + 1e-9 * 10 * context
    mixed = pure + 1e-5 * 1000
    # A step has room for 2,038 tokens beside 10 sequences: 1 + 2 x 2.038 prompts of one group, so that 4.924 of 10 remain.
    found = state(cases.table(), grouped, 10)
    assert found.tpot[0, 0] == pytest.approx(pure + 0.1 * 0.4924 * (mixed - pure))
    # Prompts that stop decoding are all computed before it goes on.
    assert state(cases.table(), grouped, 10, policy="prefill_first").tpot[0, 0] == pytest.approx(pure)


@pytest.mark.parametrize(
    ("statistic", "decodes", "tokens"),
    [
        # Of 100 steps 4 hold one of the 4 other prompts: more than the hundredth that the percentile leaves out, less than
        # the tenth. All prompts are equal, so every mixed step holds 1,000 tokens.
        ("p99", 5, 1000),
        ("p90", 5, 0),
        # 19 of 100 steps hold a prompt.
        ("p90", 20, 1000),
    ],
)
def test_a_percentile_of_gaps_is_a_mixed_step_where_more_than_its_tail_are(
    cases, fixed_load, statistic, decodes, tokens
):
    for policy in ("chunked_prefill", "inflight"):
        found = state(cases.table(), fixed_load, decodes, policy=policy, gap_statistics=(statistic,))
        step = 0.01 + 1e-5 * (decodes + tokens) + 1e-9 * decodes * (1000 + 101 / 2)
        assert found.late_gaps[statistic][0, 0] == pytest.approx(step)


def test_prompts_that_stop_decoding_add_their_whole_step(cases, fixed_load):
    found = state(cases.table(), fixed_load, 10, policy="prefill_first")
    context = 1000 + 101 / 2
    pure = 0.01 + 1e-5 * 10 + 1e-9 * 10 * context
    # Ten prompts in a full step of 2,048 tokens cost less than each alone: the bound takes the cheaper way.
    per_prompt = min(0.01 + 1e-5 * 1000, (0.01 + 1e-5 * 2048) * 1000 / 2048)
    assert found.rate[0, 0] == pytest.approx(10 / 100 / (pure + 0.1 * per_prompt))
    # Nine of ten prompts are those of others.
    assert found.tpot[0, 0] == pytest.approx(pure + 0.09 * per_prompt)


def test_a_step_lasts_as_long_as_that_of_any_rank_with_a_prompt(cases, fixed_load):
    """Eight ranks of ten sequences: 0.8 prompts a step, none of which shares a step but by coming in the same one."""
    one, eight = (state(cases.table(), fixed_load, 10, num_ranks=ranks) for ranks in (1, 8))
    pure = 0.01 + 1e-5 * 10 + 1e-9 * 10 * (1000 + 101 / 2)
    mixed = pure + 1e-5 * 1000
    step = 10 / 100 / eight.rate[0, 0]
    rate = 0.8 / step
    # A step has prompts after one without with the chance that any came during it, and ends a run of those likewise.
    follows, ends = 1 - np.exp(-rate * pure), np.exp(-rate * mixed)
    assert step == pytest.approx(pure + (mixed - pure) * follows / (follows + ends), rel=1e-3)
    assert pure + 0.1 * (mixed - pure) < step < pure + 0.8 * (mixed - pure)
    assert eight.rate[0, 0] < one.rate[0, 0]
    # Clients of a closed loop may bring all ranks their prompts at once.
    grouped = replace(fixed_load, comes_in_groups=True)
    assert state(cases.table(), grouped, 10, num_ranks=8).rate[0, 0] == one.rate[0, 0]


def test_a_state_whose_prompts_outgrow_the_budget_is_cut_to_one_that_lasts(cases, fixed_load):
    # Each sequence brings itself and 10 prompt tokens a step: 1,024 tokens are 93.1 sequences, and every step is full.
    found = state(cases.table(), fixed_load, 200, budget=1024)
    most = 1024 / 11
    step = 0.01 + 1e-5 * 1024 + 1e-9 * most * (1000 + 101 / 2)
    assert not found.lasts[0, 0]
    assert found.rate[0, 0] == pytest.approx(most / 100 / step)
    assert state(cases.table(), fixed_load, 20, budget=1024).lasts[0, 0]


def test_answers_too_short_to_keep_one_sequence_decoding_still_have_a_rate(cases):
    # Twelve steps of prompt before four of decoding: a quarter of a sequence decodes on average.
    profile = load_profile(np.full(4, 6000.0), np.full(4, 5.0))
    found = state(cases.table(per_context_token=0.0), profile, 1, budget=500)
    assert found.lasts[0, 0]
    assert found.rate[0, 0] == pytest.approx(found.num_decodes[0, 0] / 4 / (0.01 + 1e-5 * 500))
    assert found.num_decodes[0, 0] == pytest.approx(500 / (6000 / 4 + 1))


def test_pipeline_stages_multiply_the_rate_and_the_sequences(cases, fixed_load):
    one, two = (state(cases.table(stage_share=share), fixed_load, 10) for share in (1.0, 0.5))
    assert two.rate[0, 0] == pytest.approx(2.0 * one.rate[0, 0])
    assert two.num_decodes[0, 0] == 20.0
    assert two.tpot[0, 0] == one.tpot[0, 0]


def test_speculation_shortens_the_time_per_token_where_drafts_are_cheap(cases, fixed_load):
    table = cases.table(per_token=0.0)
    plain = state(table, fixed_load, 10)
    drafted = state(table, fixed_load, 10, num_speculative_tokens=3, tokens_per_step=2.5)
    assert drafted.tpot[0, 0] == pytest.approx(plain.tpot[0, 0] / 2.5, rel=0.01)


def test_a_decode_pool_prices_its_drafts_as_aggregated_replicas_do(cases, fixed_load):
    # 10 sequences and three drafts of each are 40 tokens of a step in either role.
    table = cases.table()
    drafts = {"num_speculative_tokens": 3, "tokens_per_step": 2.5}
    pure = 0.01 + 1e-5 * 40 + 1e-9 * 10 * (1000 + 101 / 2)
    decode = state(table, fixed_load, 10, role="decode", **drafts)
    assert decode.gap[0, 0] == pytest.approx(pure)
    assert decode.tpot[0, 0] == pytest.approx(pure / 2.5)
    assert decode_step_time(table, 10.0, 1000 + 101 / 2, 3) == pytest.approx(pure)
    aggregated = state(table, fixed_load, 10, gap_statistics=("p50",), **drafts)
    assert aggregated.late_gaps["p50"][0, 0] == pytest.approx(decode.gap[0, 0])
    # A step has room for 512 of 2,048 sequences with their drafts, whichever the role; in that one they all last.
    assert state(table, fixed_load, 512, role="decode", **drafts).lasts[0, 0]
    assert state(table, fixed_load, 512, role="decode", **drafts).rate[0, 0] > 0.0
    assert state(table, fixed_load, 513, role="decode", **drafts).num_decodes[0, 0] == 512.0
    assert not state(table, fixed_load, 513, **drafts).lasts[0, 0]


def test_decode_steps_of_separate_pools_do_the_work_of_aggregated_ones(cases):
    """In simulation too: equal batches with drafts take equal steps, wherever the prompts were computed."""
    workload = ServingWorkload(
        arrival="closed_loop",
        concurrency=6,
        num_requests=60,
        input_length=LengthDistribution(mean=400),
        output_length=LengthDistribution(mean=40),
    )
    requests = generate_requests(workload)
    table = cases.table(per_context_token=0.0)
    behaviour = EngineBehaviour(
        policy="chunked_prefill", max_num_sequences=16, max_num_batched_tokens=2048, num_speculative_tokens=3
    )
    link = TransferLink(bytes_per_token=1.0, bandwidth=1e12, latency=0.0)
    pools = [
        (ReplicaPool(table=table, behaviour=behaviour),),
        tuple(ReplicaPool(table=table, behaviour=behaviour, role=role) for role in ("prefill", "decode")),
    ]
    seconds = []
    for each, way in zip(pools, (None, link), strict=True):
        steps = simulate_pools(each, requests, link=way, is_recording=True).steps
        alone = (steps.prompt_tokens == 0) & (steps.num_decodes > 0)
        batch, took = steps.num_decodes[alone], (steps.end - steps.start)[alone]
        assert took == pytest.approx(0.01 + 1e-5 * 4 * batch)
        seconds.append({int(count): float(took[batch == count].mean()) for count in np.unique(batch)})
    shared = seconds[0].keys() & seconds[1].keys()
    assert len(shared) > 1
    assert all(seconds[0][count] == pytest.approx(seconds[1][count]) for count in shared)


def test_a_prefix_cache_leaves_the_rest_of_the_prompt(cases):
    cold = load_profile(np.full(4, 1000.0), np.full(4, 101.0))
    warm = load_profile(np.full(4, 1000.0), np.full(4, 101.0), np.full(4, 600.0))
    assert state(cases.table(), warm, 10).rate == state(cases.table(), cold, 10).rate
    cached = state(cases.table(), warm, 10, has_prefix_cache=True)
    assert cached.rate[0, 0] > state(cases.table(), cold, 10).rate[0, 0]


def test_a_prefill_replica_takes_what_full_steps_give(cases, fixed_load):
    rate, latency = prefill_steady_state(cases.table(), fixed_load, budgets=np.array([500.0, 4000.0]))
    assert rate[0] == pytest.approx(1 / (2 * (0.01 + 1e-5 * 500)))
    assert rate[1] == pytest.approx(4 / (0.01 + 1e-5 * 4000))
    assert latency[1] == pytest.approx(0.01 + 1e-5 * 1000)


def test_interpolation_goes_on_at_the_last_slope():
    points, values = np.array([1.0, 2.0, 4.0]), np.array([10.0, 20.0, 30.0])
    assert interpolate(points, values, np.array([0.5, 1.5, 3.0, 6.0])).tolist() == [10.0, 15.0, 25.0, 40.0]


@pytest.mark.parametrize("largest", [1, 7, 32, 33, 1024])
def test_the_grid_of_states_is_close_and_complete(largest):
    grid = state_grid(largest)
    assert grid[0] == 1.0
    assert grid[-1] == largest
    assert (grid[1:] / grid[:-1])[32:].max(initial=1.0) < 1.07


SLO = Slo(
    limits=(
        SloLimit(metric="ttft", statistic="p99", seconds=2.0),
        SloLimit(metric="tpot", statistic="p99", seconds=0.02),
    )
)


@pytest.mark.parametrize(
    ("tokens", "cap", "cause"),
    [(4_000, 256, 0), (1_000_000, 4, 2), (1_000_000, 1024, 4)],
    ids=["cache", "batch", "slo"],
)
def test_a_candidate_names_what_stops_it(cases, fixed_load, tokens, cap, cause):
    choices = SchedulerChoices(budgets=(2048,), max_num_sequences=(cap,))
    columns = replica_columns(0, cases.option(tokens=tokens), fixed_load, SLO, choices)
    assert columns.cause.tolist() == [cause]
    assert columns.rate[0] > 0.0


def test_limits_that_no_request_keeps_leave_no_rate(cases, fixed_load):
    tight = Slo(limits=(SloLimit(metric="tpot", statistic="mean", seconds=0.001),))
    choices = SchedulerChoices(budgets=(2048, 4096), max_num_sequences=(64, 128))
    assert not replica_columns(0, cases.option(), fixed_load, tight, choices).rate.any()
    early = Slo(limits=(SloLimit(metric="ttft", statistic="p99", seconds=0.001),))
    assert not prefill_columns(0, cases.option(), fixed_load, early, choices).rate.any()


@settings(max_examples=15, deadline=None)
@given(
    fixed=st.floats(0.002, 0.03),
    per_token=st.floats(1e-6, 5e-5),
    prompt=st.integers(50, 6000),
    answer=st.integers(5, 300),
    kind=st.sampled_from(["fixed", "lognormal"]),
    policy=st.sampled_from(["chunked_prefill", "prefill_first", "inflight"]),
    budget=st.sampled_from([512, 2048, 16384]),
    clients=st.integers(1, 16),
    ranks=st.sampled_from([1, 4]),
    is_closed=st.booleans(),
)
def test_no_simulation_beats_the_bound_of_the_limits_it_keeps(
    cases, fixed, per_token, prompt, answer, kind, policy, budget, clients, ranks, is_closed
):
    """With what a simulation came to as the limit, the bound must allow its rate."""
    if policy == "inflight":
        budget = 16384
    table = cases.table(fixed=fixed, per_token=per_token)
    lengths = [
        LengthDistribution(mean=mean, kind=kind, coefficient_of_variation=0.3) for mean in (prompt, answer)
    ]
    # Alone a request takes about so long; half of the rate of so many clients does not pile up.
    seconds = fixed * (answer + prompt / budget) + per_token * prompt
    clients *= ranks
    arrival = (
        {"arrival": "closed_loop", "concurrency": clients}
        if is_closed
        else {"arrival": "poisson", "rate": 0.5 / max(seconds / clients, seconds - fixed * answer)}
    )
    workload = ServingWorkload(**arrival, num_requests=300, input_length=lengths[0], output_length=lengths[1])
    requests = generate_requests(workload)
    profile = replace(profile_of_requests(requests), comes_in_groups=is_closed)
    behaviour = EngineBehaviour(
        policy=policy, max_num_sequences=16, max_num_batched_tokens=budget, attention_dp=ranks
    )
    metrics = summarize(simulate(table, behaviour, requests, is_recording=True))
    option = replace(cases.option(table=table, tokens=10**8, attention_dp=ranks), policy=policy)
    choices = SchedulerChoices(budgets=(budget,), max_num_sequences=(16,))
    for name in (
        "tpot_mean",
        "tpot_p99",
        "itl_mean",
        "itl_p90",
        "itl_p99",
        "ttft_mean",
        "ttft_p99",
        "e2e_p99",
    ):
        metric, statistic = name.split("_")
        limit = SloLimit(metric=metric, statistic=statistic, seconds=1.0)
        limit = replace(limit, seconds=1.001 * metrics.statistic(limit))
        columns = replica_columns(0, option, profile, Slo(limits=(limit,)), choices)
        assert metrics.requests_per_second <= 1.02 * columns.rate[0], name
