"""Export targets as constraints of the search for a serving plan."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.errors import InfeasiblePlanError, SpecError
from meshwright.planner.export import SERVING_EXPORTERS
from meshwright.planner.serving.infeasible import infeasible_serving
from meshwright.planner.serving.load_profile import load_profile
from meshwright.planner.serving.ranking import rank_units, unit_of_row
from meshwright.planner.serving.sizing import Sizing
from meshwright.planner.serving.space import candidate_space
from meshwright.planner.serving.target import target_sentence, without_refused

LONG = load_profile(np.full(10, 4000.0), np.full(10, 101.0))


def ranked(cases, **flags):
    request = cases.request(**{"input_length": 4000, "slo": {"ttft_p99": "5 s"}} | flags)
    space = candidate_space(request, LONG, cases.costs(), 8)
    sizing = Sizing(objective="goodput_per_gpu", max_gpus=8, demand=1.0, mean_output=101.0)
    units = rank_units(space, sizing, is_closed_loop=False)
    return request, space, sizing, units, without_refused(units, request, space)


def test_what_the_exporter_refuses_is_left_out_and_counted(cases):
    request, space, _, units, kept = ranked(cases, engine="trtllm", target="tensorrt-llm")
    exporter = SERVING_EXPORTERS["tensorrt-llm"]
    refused = [
        bool(exporter.unsupported(request.job, unit_of_row(request, space, units, row).plan))
        for row in units.rows()
    ]
    assert 0 < sum(refused) < len(units)
    assert sum(kept.refused.values()) == sum(refused) == len(units) - len(kept)
    assert kept.value.tolist() == units.value[~np.array(refused)].tolist()
    # A step of 4,096 tokens does not hold the longest request and what a chat template adds.
    (reason, *_) = kept.refused
    assert "max_num_batched_tokens" in reason
    assert f"{kept.refused[reason]:,} x {reason.rstrip('.')}" in target_sentence("tensorrt-llm", kept.refused)


def test_without_a_target_nothing_is_refused(cases):
    *_, units, kept = ranked(cases, engine="trtllm")
    assert kept is units


def test_a_target_that_refuses_everything_says_why(cases):
    request, space, sizing, _, kept = ranked(cases, engine="trtllm", target="kubernetes")
    assert not len(kept)
    error = infeasible_serving(request, LONG, sizing, space, cases.costs(), kept)
    assert isinstance(error, InfeasiblePlanError)
    assert error.rejections["target"] == sum(kept.refused.values())
    assert "rejected by target (kubernetes can express it: " in str(error)
    assert "the plan is for engine 'trtllm'" in str(error)


def test_a_target_chooses_its_engine(cases):
    assert cases.request(engine=None, target="tensorrt-llm").engines == ("trtllm",)
    assert len(cases.request(engine=None, target="dynamo").engines) == 3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"target": "vlm"}, "did you mean 'vllm'"),
        ({"target": "megatron"}, "'megatron' runs training plans; known for serving: dynamo"),
        ({"target": "sglang"}, "target: sglang serves engine sglang, not vllm"),
        (
            {"engine": "trtllm", "cluster": "mi300x-8:1"},
            "runs on NVIDIA GPUs only, and mi300x is made by amd",
        ),
    ],
)
def test_a_target_or_engine_that_cannot_be_is_one_message(cases, flags, says):
    with pytest.raises(SpecError, match=says):
        cases.request(**flags)
