from __future__ import annotations

import re
from dataclasses import replace

import pytest

from meshwright.costmodels.context import cost_context
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.reasons import degrees_text, winning_reason
from meshwright.planner.search import SEARCHES, RankedPlan, SearchRequest, SearchResult
from meshwright.planner.space import SearchLimits
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.workload import TrainingWorkload


@pytest.fixture(scope="module")
def result() -> SearchResult:
    job = TrainingJob(
        model=load_model("llama-3-8b"),
        cluster=resolve_cluster("dgx-h100:1"),
        workload=TrainingWorkload(global_batch_size=16, sequence_length=4096),
        software="megatron-core",
    )
    request = SearchRequest(job=job, context=cost_context(job), limits=SearchLimits(), num_plans=60)
    return SEARCHES["exhaustive"].run(request, lambda doing, done, total: None)


def shape(entry: RankedPlan) -> tuple[int, int, int]:
    return entry.plan.tp, entry.plan.pp, entry.plan.dp


def rival_of(result: SearchResult) -> RankedPlan:
    assert result.rival is not None
    return result.rival


def test_the_rival_is_the_best_ranked_plan_with_other_degrees(result: SearchResult) -> None:
    other = next(entry for entry in result.ranked if shape(entry) != shape(result.ranked[0]))
    assert rival_of(result).plan == other.plan


@pytest.mark.parametrize(
    ("degrees", "text"),
    [
        ({"dp": 1, "schedule": "none", "layers_per_stage": (4,)}, "one GPU"),
        ({"dp": 8, "schedule": "none", "layers_per_stage": (4,)}, "dp 8"),
        (
            {
                "dp": 2,
                "tp": 4,
                "pp": 2,
                "vpp": 2,
                "schedule": "interleaved_1f1b",
                "layers_per_stage": (1,) * 4,
            },
            "tp 4 x pp 2 x vpp 2 x dp 2",
        ),
    ],
)
def test_degrees_of_one_are_left_out(degrees: dict[str, object], text: str) -> None:
    plan = ParallelPlan(micro_batch_size=1, **degrees)  # type: ignore[arg-type]  # keywords checked by the class
    assert degrees_text(plan) == text


def test_the_reason_names_winner_rival_and_margin(result: SearchResult) -> None:
    winner, rival = result.ranked[0], rival_of(result)
    gain = rival.prediction.iteration_time / winner.prediction.iteration_time - 1
    sentence = winning_reason(result)
    assert sentence.startswith(f"{degrees_text(winner.plan)} is {gain:.1%} faster than the best plan with")
    assert f"({degrees_text(rival.plan)})" in sentence


def test_the_parts_of_the_reason_explain_the_margin(result: SearchResult) -> None:
    winner, rival = result.ranked[0], rival_of(result)
    margin = rival.prediction.iteration_time - winner.prediction.iteration_time
    sentence = winning_reason(result)
    less = sum(float(text) for text in re.findall(r"([\d.e-]+) s less", sentence))
    more = sum(float(text) for text in re.findall(r"([\d.e-]+) s more", sentence))
    # Two digits each, and parts below 0.2 % are not named.
    slack = 0.05 * (less + more) + 3 * 0.002 * winner.prediction.iteration_time
    assert less - more == pytest.approx(margin, abs=slack)


def test_the_certificate_is_only_claimed_when_it_holds(result: SearchResult) -> None:
    assert "no other plan of the space can beat it" in winning_reason(replace(result, is_certified=True))
    assert "the optimum is not certified" in winning_reason(replace(result, is_certified=False))


def test_plans_of_equal_time_tie(result: SearchResult) -> None:
    winner, rival = result.ranked[0], rival_of(result)
    tied = replace(result, rival=replace(rival, prediction=winner.prediction))
    sentence = winning_reason(tied)
    assert "ties with the best plan with other degrees" in sentence
    assert "every part is within 0.2 %" in sentence


def test_degrees_without_a_rival_are_not_called_faster(result: SearchResult) -> None:
    sentence = winning_reason(replace(result, rival=None))
    assert sentence.startswith(f"{degrees_text(result.ranked[0].plan)} is the only combination of degrees")
    assert "faster" not in sentence
