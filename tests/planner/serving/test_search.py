"""The search finds what simulating everything finds, and says why when there is nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from meshwright.errors import InfeasiblePlanError, SpecError
from meshwright.planner.serving import search
from meshwright.planner.serving.candidates import CAUSES
from meshwright.planner.serving.infeasible import infeasible_serving
from meshwright.planner.serving.limits import ServingLimits
from meshwright.planner.serving.load_profile import load_profile
from meshwright.planner.serving.load_search import LoadPoint
from meshwright.planner.serving.pairing import best_pairs
from meshwright.planner.serving.pareto import interactivity_front
from meshwright.planner.serving.ranking import rank_units, unit_of_row
from meshwright.planner.serving.replica_shapes import SHAPE_RULES, all_shapes, rule_numbers
from meshwright.planner.serving.search import search_units
from meshwright.planner.serving.sizing import Sizing
from meshwright.planner.serving.space import candidate_space, scheduler_choices, wanted_precisions
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.speculation import Acceptance


class Shrunk:
    """Every configuration keeps the limits up to a share of its bound that depends on its shape alone."""

    def __init__(self, space, units, request):
        self.capacity = {}
        for row in range(len(units)):
            unit = unit_of_row(request, space, units, row)
            self.capacity[unit.plan] = unit.load * self.share(unit.plan)
        self.num_runs = 0

    @staticmethod
    def share(plan):
        last = plan.pools[-1]
        return 0.95 - 0.02 * ((5 * last.tp + 3 * last.pp) % 7) - 0.03 * (len(plan.pools) - 1)

    def run(self, plan, load, clients, *, is_thorough=False):
        self.num_runs += 1
        over = load / self.capacity[plan]
        metrics = dict.fromkeys(("ttft_p99", "ttft_mean", "tpot_mean"), 0.001)
        return LoadPoint(load=load, rate=load, metrics={**metrics, "tpot_p99": 0.04 * over}, figures={})


def searched(cases, fixed_load, objective="goodput_per_gpu", demand=4.0, max_simulated=400, **flags):
    request = cases.request(objective=objective, **flags)
    space = candidate_space(request, fixed_load, cases.costs(), 8)
    sizing = Sizing(objective=objective, max_gpus=8, demand=demand, mean_output=fixed_load.mean_output)
    units = rank_units(space, sizing, is_closed_loop=False)
    simulator = Shrunk(space, units, request)
    outcome = search_units(request, sizing, space, simulator, lambda *_: None, max_simulated=max_simulated)
    return sizing, len(units), simulator, outcome


@pytest.mark.parametrize("objective", ["goodput_per_gpu", "throughput"])
def test_the_winner_is_the_best_of_all_configurations(cases, fixed_load, objective):
    sizing, num_units, simulator, outcome = searched(cases, fixed_load, objective)
    values = [
        float(sizing.values(np.array([load]), np.array([load]), np.array([plan.num_gpus]))[0])
        for plan, load in simulator.capacity.items()
    ]
    assert outcome.is_certified
    assert outcome.ranked[0].value == pytest.approx(max(values), rel=0.03)
    assert outcome.num_simulated < num_units
    found = [ranked.value for ranked in outcome.ranked]
    assert found == sorted(found, reverse=True)
    assert all(ranked.plan.num_gpus <= 8 for ranked in outcome.ranked)
    assert all(ranked.bracket.failing is None or ranked.bracket.spread <= 0.06 for ranked in outcome.ranked)


def test_what_is_left_unsimulated_shows_as_a_gap(cases, fixed_load, monkeypatch):
    monkeypatch.setattr(search, "_MAX_SIMULATED", 0)
    *_, outcome = searched(cases, fixed_load, max_simulated=1)
    winner = outcome.ranked[0]
    assert not outcome.is_certified
    assert outcome.highest_unsimulated > winner.value


def test_cost_takes_the_fewest_gpus_that_carry_the_load(cases, fixed_load):
    _, _, simulator, outcome = searched(cases, fixed_load, "cost", demand=9.0)
    fewest = min(
        int(np.ceil(9.0 / load)) * plan.num_gpus for plan, load in simulator.capacity.items() if load > 0.0
    )
    winner = outcome.ranked[0]
    assert winner.plan.num_gpus == fewest
    assert winner.point.load * winner.num_units >= 9.0 * 0.999


def test_the_cheapest_plan_is_reported_whatever_the_objective(cases, fixed_load):
    *_, simulator, outcome = searched(cases, fixed_load, "throughput", demand=4.0)
    fewest = min(int(np.ceil(4.0 / load)) * plan.num_gpus for plan, load in simulator.capacity.items())
    assert outcome.cheapest.plan.num_gpus == fewest


def test_without_simulation_the_bounds_rank(cases, fixed_load):
    request = cases.request()
    space = candidate_space(request, fixed_load, cases.costs(), 8)
    sizing = Sizing(objective="goodput_per_gpu", max_gpus=8, demand=4.0, mean_output=101.0)
    outcome = search_units(request, sizing, space, None, lambda *_: None, num_shapes=0)
    assert outcome.num_runs == 0
    assert outcome.ranked[0].value == pytest.approx(float(outcome.units.value[0]))
    assert not outcome.is_certified


def test_disaggregated_sides_are_matched_at_the_best_ratio():
    pairs = best_pairs(np.array([6.0]), np.array([1]), np.array([2.0]), np.array([1]), 8)
    # One prefill replica feeds three decode replicas; two such units fill eight GPUs.
    assert (pairs.num_prefill.tolist(), pairs.num_decode.tolist()) == ([1], [3])
    assert (pairs.rate.tolist(), pairs.num_gpus.tolist()) == ([6.0], [4])
    assert len(best_pairs(np.array([6.0]), np.array([8]), np.array([2.0]), np.array([1]), 8)) == 0


def test_a_demand_is_paired_on_the_fewest_gpus_with_more_or_less_to_spare():
    sides = (np.array([6.0]), np.array([1]), np.array([10.0]), np.array([2]), 64)
    pairs = best_pairs(*sides, demand=np.array([[9.0]]))
    found = list(zip(pairs.num_prefill.tolist(), pairs.num_decode.tolist(), strict=True))
    # 12 and 10 requests/s on 4 GPUs carry 9; should a fifth be lost, 12 and 20 on 6 do, and should a third, 18 and 20.
    assert sorted(found) == [(1, 1), (2, 1), (3, 2)]
    # What no ratio carries is paired to carry the most.
    pairs = best_pairs(*sides[:4], 8, demand=np.array([[1000.0]]))
    assert len(pairs) == 1


def test_the_front_holds_no_point_that_another_beats(cases, fixed_load):
    request = cases.request()
    space = candidate_space(request, fixed_load, cases.costs(), 8)
    front = interactivity_front(space, fixed_load, scheduler_choices(request, fixed_load), max_points=1000)
    user = [point.tokens_per_second_per_user for point in front]
    gpu = [point.tokens_per_second_per_gpu for point in front]
    assert len(front) > 3
    assert user == sorted(user, reverse=True)
    assert gpu == sorted(gpu)
    assert (
        len(interactivity_front(space, fixed_load, scheduler_choices(request, fixed_load), max_points=4)) <= 4
    )


def test_forced_drafts_leave_prefill_pools_and_the_front_counts_them(cases, fixed_load):
    request = cases.request()
    limits = ServingLimits(allowed={**request.limits.allowed, "num_speculative_tokens": (2,)})
    drafting = replace(request, limits=limits, acceptance=Acceptance(rate=1.0))
    space = candidate_space(drafting, fixed_load, cases.costs(), 8)
    assert space.prefill is not None
    # Budgets of decode pools hold the largest batch with its drafts.
    assert set(space.decode.budget.tolist()) == {4096}
    fastest = interactivity_front(space, fixed_load, scheduler_choices(drafting, fixed_load))[0]
    plain = candidate_space(request, fixed_load, cases.costs(), 8)
    slower = interactivity_front(plain, fixed_load, scheduler_choices(request, fixed_load))[0]
    # All drafts stand: three tokens in a step of little more than the time of one.
    ratio = fastest.tokens_per_second_per_user / slower.tokens_per_second_per_user
    assert ratio == pytest.approx(3.0, rel=0.02)
    assert fastest.option.num_speculative_tokens == 2


@pytest.mark.parametrize(
    ("engine", "precision", "degrees", "rule"),
    [
        ("vllm", "fp8_block", {"tp": 4, "pp": 1, "attention_dp": 4, "moe_tp": 8, "ep": 2}, "engine"),
        ("trtllm", "fp8_block", {"tp": 2, "pp": 1, "attention_dp": 4, "moe_tp": 1, "ep": 8}, "engine"),
        ("sglang", "fp8_block", {"tp": 1, "pp": 2, "attention_dp": 8, "moe_tp": 1, "ep": 8}, "engine"),
        ("vllm", "fp8_block", {"tp": 1, "pp": 1, "attention_dp": 32, "moe_tp": 32, "ep": 1}, "quantisation"),
        ("vllm", "bf16", {"tp": 16, "pp": 1, "attention_dp": 1, "moe_tp": 16, "ep": 1}, "tensor_parallel"),
        ("vllm", "bf16", {"tp": 1, "pp": 64, "attention_dp": 1, "moe_tp": 1, "ep": 1}, "pipeline"),
    ],
)
def test_a_shape_no_engine_launches_is_named_with_its_rule(cases, engine, precision, degrees, rule):
    cluster = cases.request(cluster="dgx-h200:8").job.cluster
    broken = rule_numbers(load_model("deepseek-v3"), cluster, engine, precision, degrees)
    assert [text.split(" ")[0] for text in broken] == [rule]


def test_rules_keep_what_is_published(cases):
    # DeepSeek-V3's own decode unit and the usual tp 8 x pp 2 of two nodes.
    cluster = cases.request(cluster="dgx-h200:8").job.cluster
    model = load_model("deepseek-v3")
    for degrees in (
        {"tp": 1, "pp": 1, "attention_dp": 32, "moe_tp": 1, "ep": 32},
        {"tp": 8, "pp": 2, "attention_dp": 1, "moe_tp": 8, "ep": 1},
    ):
        assert rule_numbers(model, cluster, "vllm", "fp8_block", degrees) == []
    shapes = all_shapes(model, cluster, cases.request().limits, 64)
    assert ((shapes.moe_tp * shapes.ep) == shapes.tp * shapes.attention_dp).all()
    assert (shapes.num_gpus <= 64).all()
    assert len({tuple(shapes.row(index).values()) for index in range(len(shapes))}) == len(shapes)
    assert {rule.name for rule in SHAPE_RULES} >= {"engine", "tensor_parallel"}


def failed(cases, profile, tokens_per_gpu=50_000, demand=4.0, **flags):
    request = cases.request(**flags)
    costs = cases.costs(tokens_per_gpu)
    space = candidate_space(request, profile, costs, 8)
    sizing = Sizing(objective="goodput_per_gpu", max_gpus=8, demand=demand, mean_output=profile.mean_output)
    units = rank_units(space, sizing, is_closed_loop=False) if not space.is_empty else None
    assert units is None or not len(units)
    return infeasible_serving(request, profile, sizing, space, costs, units)


def test_an_impossible_slo_names_the_closest_shape_and_what_binds(cases, fixed_load):
    error = failed(cases, fixed_load, slo={"tpot_p99": "1 ms"})
    assert isinstance(error, InfeasiblePlanError)
    # 4 ms and 16 ms over tp 8 of fixed time, and a sequence's own attention.
    assert "closest: vllm tp 8" in str(error)
    assert "tpot_p99 binds: ask for at least 6" in str(error)
    assert error.rejections["slo"] > 0


def test_a_limit_on_gaps_is_missed_by_the_value_it_was_held_against(cases):
    """A percentile of gaps is that of steps with the prompts of others; a request alone has only steps of its own."""
    # Every prompt of another is in one of 19 steps: more than the hundredth that a 99th percentile leaves out.
    short_answers = load_profile(np.full(10, 1000.0), np.full(10, 20.0))

    def aggregated(**flags):
        return replace(cases.request(**flags), limits=ServingLimits(allowed={"mode": ("aggregated",)}))

    # Steps of tp 8 take 4 ms + 16 ms / 8 = 6 ms, a sequence's own 3.5 us, and with a prompt 1,000 x 2.5 us more: a limit
    # of 7 ms is kept by a request alone, by no two; one of 5 ms by none.
    builders = SimpleNamespace(request=aggregated, costs=cases.costs)
    text = str(failed(builders, short_answers, slo={"itl_p99": "5 ms"}))
    reached, limit = re.search(r"itl_p99 ([0-9.]+) ms \(limit ([0-9.]+) ms\)", text).groups()
    assert (float(reached), float(limit)) == (6.0, 5.0)
    request = aggregated(slo={"itl_p99": "7 ms"})
    space = candidate_space(request, short_answers, cases.costs(), 8)
    assert {
        space.options[index].degrees["tp"] for index in space.aggregated.option[space.aggregated.rate > 0.0]
    } == {8}
    assert (space.aggregated.cause[space.aggregated.rate > 0.0] == len(CAUSES)).all()


def test_a_load_beyond_the_cluster_says_what_fits_and_what_is_needed(cases, fixed_load):
    text = str(failed(cases, fixed_load, demand=1e6))
    assert "rejected by demand" in text
    assert "of 1e+06 requests/s fit" in text


def test_a_model_that_does_not_fit_says_how_many_nodes_would(cases):
    profile = load_profile(np.full(4, 7000.0), np.full(4, 1500.0))
    text = str(failed(cases, profile, tokens_per_gpu=1000))
    assert "rejected by memory" in text
    assert "nearest: 2 nodes instead of 1" in text


def test_speculation_needs_an_acceptance_rate(cases, fixed_load, tmp_path):
    request = cases.request()
    assert scheduler_choices(request, fixed_load).num_speculative_tokens == (0,)
    limits = type(request.limits)(allowed={"num_speculative_tokens": (2,)})
    asked = type(request)(job=request.job, limits=limits)
    with pytest.raises(SpecError, match="acceptance_rate"):
        scheduler_choices(asked, fixed_load)
    with_rate = type(request)(job=request.job, acceptance=Acceptance(rate=0.7))
    assert scheduler_choices(with_rate, fixed_load).num_speculative_tokens == (0, 1, 2, 3, 4)


def test_a_measured_distribution_bounds_the_drafts_that_are_tried(cases, fixed_load):
    request = cases.request()
    measured = Acceptance(lengths=(0.3, 0.4, 0.3))
    drafts = scheduler_choices(type(request)(job=request.job, acceptance=measured), fixed_load)
    assert drafts.num_speculative_tokens == (0, 1, 2)
    long = Acceptance(lengths=(0.3, *(0.1,) * 7))
    drafts = scheduler_choices(type(request)(job=request.job, acceptance=long), fixed_load)
    assert drafts.num_speculative_tokens == (0, 1, 2, 3, 4, 7)
    limits = type(request.limits)(allowed={"num_speculative_tokens": (3,)})
    asked = type(request)(job=request.job, limits=limits, acceptance=measured)
    with pytest.raises(SpecError, match="list 4 probabilities, or draft at most 2"):
        scheduler_choices(asked, fixed_load)


def test_a_plan_states_the_distribution_of_its_own_draft(cases, fixed_load):
    request = replace(cases.request(), acceptance=Acceptance(lengths=(0.3, 0.4, 0.3)))
    space = candidate_space(request, fixed_load, cases.costs(), 8)
    sizing = Sizing(objective="goodput_per_gpu", max_gpus=8, demand=1.0, mean_output=fixed_load.mean_output)
    units = rank_units(space, sizing, is_closed_loop=False)
    stated = {
        pool.num_speculative_tokens: pool.acceptance_lengths
        for row in units.rows()
        for pool in unit_of_row(request, space, units, row).plan.pools
        if pool.role != "prefill"
    }
    assert stated == {0: (), 1: pytest.approx((0.3, 0.7)), 2: (0.3, 0.4, 0.3)}


def test_formats_the_device_lacks_are_refused(cases):
    free = type(cases.request())(job=cases.request().job)
    assert wanted_precisions(free) == (("bf16", "bf16"), ("fp8", "bf16"))
    for name, formats in (
        ("deepseek-v3", ("fp8_block",)),
        ("gpt-oss-120b", ("bf16",)),
        ("qwen3-30b-a3b", ("bf16", "fp8_block")),
    ):
        job = type(free.job)(model=load_model(name), cluster=free.job.cluster, workload=free.job.workload)
        assert tuple(precision for precision, _ in wanted_precisions(type(free)(job=job))) == formats
    with pytest.raises(SpecError, match="h100-sxm-80 has no units for nvfp4"):
        wanted_precisions(cases.request(precision="nvfp4"))
