"""Steady states against figures worked out by hand, and as bounds of the simulation."""

from __future__ import annotations

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
    accepted_per_step,
    prefill_steady_state,
    replica_steady_state,
)
from meshwright.planner.serving.step_times import interpolate
from meshwright.simcore.domain.serving import LengthDistribution, ServingWorkload, Slo, SloLimit
from meshwright.simcore.serving.behaviour import EngineBehaviour
from meshwright.simcore.serving.metrics import summarize
from meshwright.simcore.serving.requests import generate_requests
from meshwright.simcore.serving.simulate import simulate


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
    assert found.mixed_share[0, 0] == pytest.approx(0.1)
    assert found.tpot[0, 0] == pytest.approx(mean)
    assert found.rate[0, 0] == pytest.approx(10 / 100 / mean)
    assert found.ttft[0, 0] == pytest.approx(mixed)


def test_prompts_that_stop_decoding_add_their_whole_step(cases, fixed_load):
    found = state(cases.table(), fixed_load, 10, policy="prefill_first")
    context = 1000 + 101 / 2
    pure = 0.01 + 1e-5 * 10 + 1e-9 * 10 * context
    # Ten prompts in a full step of 2,048 tokens cost less than each alone: the bound takes the cheaper way.
    per_prompt = min(0.01 + 1e-5 * 1000, (0.01 + 1e-5 * 2048) * 1000 / 2048)
    assert found.tpot[0, 0] == pytest.approx(pure + 0.1 * per_prompt)


def test_a_state_whose_prompts_outgrow_the_budget_does_not_last(cases, fixed_load):
    assert state(cases.table(), fixed_load, 200, budget=1024).rate[0, 0] == 0.0
    assert state(cases.table(), fixed_load, 20, budget=1024).rate[0, 0] > 0.0


def test_pipeline_stages_multiply_the_rate_and_the_sequences(cases, fixed_load):
    one, two = (state(cases.table(stage_share=share), fixed_load, 10) for share in (1.0, 0.5))
    assert two.rate[0, 0] == pytest.approx(2.0 * one.rate[0, 0])
    assert two.num_decodes[0, 0] == 20.0
    assert two.tpot[0, 0] == one.tpot[0, 0]


def test_speculation_shortens_the_time_per_token_where_drafts_are_cheap(cases, fixed_load):
    table = cases.table(per_token=0.0)
    plain = state(table, fixed_load, 10)
    drafted = state(table, fixed_load, 10, num_speculative_tokens=3, acceptance_rate=0.8)
    assert accepted_per_step(3, 0.8) == pytest.approx(1 + 0.8 + 0.64 + 0.512)
    assert accepted_per_step(3, 1.0) == 4.0
    assert drafted.tpot[0, 0] == pytest.approx(plain.tpot[0, 0] / accepted_per_step(3, 0.8), rel=0.01)


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


@settings(max_examples=12, deadline=None)
@given(
    fixed=st.floats(0.002, 0.03),
    per_token=st.floats(1e-6, 5e-5),
    prompt=st.integers(50, 3000),
    answer=st.integers(20, 300),
    policy=st.sampled_from(["chunked_prefill", "prefill_first", "inflight"]),
)
def test_no_simulation_beats_the_bound_of_its_rate(cases, fixed, per_token, prompt, answer, policy):
    table = cases.table(fixed=fixed, per_token=per_token)
    profile = load_profile(np.full(4, float(prompt)), np.full(4, float(answer)))
    cap, budget = 16, 4096
    workload = ServingWorkload(
        arrival="closed_loop",
        concurrency=cap,
        num_requests=20 * cap,
        input_length=LengthDistribution(mean=prompt),
        output_length=LengthDistribution(mean=answer),
    )
    behaviour = EngineBehaviour(policy=policy, max_num_sequences=cap, max_num_batched_tokens=budget)
    metrics = summarize(simulate(table, behaviour, generate_requests(workload)))
    states = replica_steady_state(
        table, profile, num_decodes=np.arange(1.0, cap + 1), budgets=np.array([float(budget)]), policy=policy
    )
    assert metrics.requests_per_second <= 1.02 * states.rate.max()
