"""Plans under changed machines, and how much each property matters."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.changes import apply_changes, parse_change
from meshwright.planner.scenario import Scenario, scenario_context
from meshwright.planner.sensitivity import LEVERS, sensitivities
from meshwright.planner.space import SearchLimits
from meshwright.planner.whatif import Question, TrainingSubject, answer, figure_change, given_plan
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.workload import TrainingWorkload

MODEL = load_model("llama-3.2-1b")
PLAN = ParallelPlan(
    dp=4,
    tp=2,
    micro_batch_size=2,
    schedule="none",
    sharding="zero1",
    sequence_parallel=True,
    layers_per_stage=(MODEL.num_layers,),
)
# A space of some hundred plans: what is asked is not how well the search searches.
QUESTION = Question(
    limits=SearchLimits(
        allowed={"tp": (1, 2), "pp": (1,), "cp": (1,), "recompute": ("none",), "optimizer_offload": ("none",)}
    )
)


def silent(phase: str, done: int, total: int) -> None:
    pass


def subject(plan):
    return TrainingSubject(plan=plan, question=QUESTION, progress=silent)


@pytest.fixture(scope="module")
def today():
    return Scenario(
        job=TrainingJob(
            model=MODEL,
            cluster=resolve_cluster("l4-8:1"),
            workload=TrainingWorkload(global_batch_size=16, sequence_length=1024),
            software="megatron-core",
        )
    )


def changed(scenario, *texts):
    return apply_changes(scenario, [parse_change(text) for text in texts])


def test_the_best_plan_is_at_least_as_fast_as_the_given_one(today):
    given, best = answer(today, subject(PLAN))
    assert best.explanation.prediction.iteration_time <= given.explanation.prediction.iteration_time
    assert given.explanation.plan == PLAN


def test_a_plan_that_no_longer_fits_has_a_violation_and_no_time(today):
    small = changed(today, "gpu.memory=8GiB")
    given, best = answer(small, subject(PLAN))
    assert given.explanation is None
    assert given.violation.constraint == "memory"
    assert best.explanation.prediction.peak_memory_bytes <= 8 * 2**30


def test_when_nothing_fits_the_nearest_change_is_named(today):
    given, best = answer(changed(today, "gpu.memory=2GiB"), subject(PLAN))
    assert given.violation.constraint == "memory"
    assert best.explanation is None
    assert best.advice


def test_more_nodes_leave_the_plan_alone_and_help_the_best(today):
    given, best = answer(changed(today, "cluster.nodes=2"), subject(PLAN))
    same = given_plan(scenario_context(today), PLAN, QUESTION)
    assert given.explanation.prediction.iteration_time == same.explanation.prediction.iteration_time
    assert best.explanation.plan.num_gpus == 16


def test_fewer_gpus_than_the_plan_needs_stop_it(today):
    wide = replace(PLAN, dp=8, micro_batch_size=1)
    outcome = given_plan(scenario_context(today), wide, QUESTION)
    assert outcome.violation.constraint == "cluster"


def test_another_batch_may_stop_the_plan(today):
    outcome = given_plan(scenario_context(changed(today, "workload.global_batch_size=20")), PLAN, QUESTION)
    assert outcome.violation.constraint == "batch"


@pytest.fixture(scope="module")
def table(today):
    return sensitivities(today, subject(PLAN))


def test_effects_come_largest_first_and_are_changes_of_the_given_plan(table):
    sizes = [effect.largest for effect in table.effects]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 0.0
    for effect in table.effects:
        changes = [abs(figure_change(table.today, each) or 0.0) for each in (effect.low, effect.high)]
        assert effect.largest == max(changes)


def test_speeds_help_and_latencies_hurt(table):
    by_name = {effect.lever.name: effect for effect in table.effects}
    for name in ("peak FLOP/s", "memory bandwidth", "intra-node bandwidth"):
        assert figure_change(table.today, by_name[name].low) > 0.0, name
        assert figure_change(table.today, by_name[name].high) <= 0.0, name
    fixed = by_name["fixed time per iteration"]
    assert figure_change(table.today, fixed.low) < 0.0 < figure_change(table.today, fixed.high)
    assert figure_change(table.today, by_name["inter-node bandwidth"].low) == pytest.approx(0.0)


def test_only_memory_is_planned_again_unless_all_are_asked_for(table):
    searched = {effect.lever.name for effect in table.effects if effect.best_low is not None}
    assert searched == {"GPU memory"}
    assert table.best_today.explanation is not None


def test_the_host_link_is_no_lever_of_its_own_where_gpus_talk_over_it(table):
    assert {lever.name for lever in LEVERS} - {effect.lever.name for effect in table.effects} == {
        "host link bandwidth"
    }


def test_every_lever_is_searched_when_asked(today, monkeypatch):
    import meshwright.planner.sensitivity as module

    monkeypatch.setattr(module, "LEVERS", LEVERS[:2])
    result = sensitivities(today, subject(PLAN), factor=1.25, searches_all=True)
    assert all(effect.best_low is not None and effect.best_high is not None for effect in result.effects)


def test_memory_that_stops_the_plan_changes_the_winner(today):
    full = replace(PLAN, sharding="none", tp=1, dp=8, sequence_parallel=False)
    result = sensitivities(today, subject(full), factor=2.5)
    memory = next(effect for effect in result.effects if effect.lever.name == "GPU memory")
    assert memory.low.violation.constraint == "memory"
    assert memory.high.explanation is not None
    assert memory.best_low.explanation.plan.sharding != "none"


@pytest.mark.parametrize("factor", [1.0, 0.5, -2.0, 11.0])
def test_a_factor_that_moves_nothing_or_too_much_is_refused(today, factor):
    with pytest.raises(SpecError) as caught:
        sensitivities(today, subject(PLAN), factor=factor)
    assert "must lie above 1 and up to 10" in str(caught.value)
