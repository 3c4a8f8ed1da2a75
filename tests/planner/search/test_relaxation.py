from __future__ import annotations

import re
from dataclasses import replace

import pytest
from search_cases import make_request, run

from meshwright.costmodels.context import CostContext, cost_context
from meshwright.errors import InfeasiblePlanError
from meshwright.planner.relaxation import infeasible
from meshwright.planner.search import SearchRequest
from meshwright.planner.space import SearchLimits, space_blocks


def infeasible_error(request: SearchRequest) -> InfeasiblePlanError:
    with pytest.raises(InfeasiblePlanError) as caught:
        run(request)
    return infeasible(request.job, request.context, request.limits, caught.value.rejections)


def is_feasible(request: SearchRequest) -> bool:
    try:
        return bool(run(replace(request, num_plans=1)).ranked)
    except InfeasiblePlanError:
        return False


def with_nodes(request: SearchRequest, num_nodes: int) -> SearchRequest:
    job = replace(request.job, cluster=replace(request.job.cluster, num_nodes=num_nodes))
    return replace(request, job=job, context=cost_context(job))


# Nothing leaves the device.
RESIDENT: dict[str, tuple[int | str | bool, ...]] = {
    "optimizer_offload": ("none",),
    "activation_offload": (False,),
}


def test_a_model_that_is_too_large_is_refused_with_counts_and_the_cluster_it_needs() -> None:
    # 175e9 parameters x 18 bytes are 3.1 TB; eight 80 GB devices hold 0.68 TB.
    request = make_request("gpt3-175b", batch=64, length=2048, limits=SearchLimits(allowed=RESIDENT))
    error = infeasible_error(request)
    assert error.exit_code == 3
    assert error.rejections["memory"] > 0
    num_candidates = sum(len(block) for block in space_blocks(request.context, request.limits, (8,)))
    assert sum(error.rejections.values()) == num_candidates
    assert f"{error.rejections['memory']:,} rejected by memory (the fullest rank fits)" in str(error)
    fits_on = re.search(r"fits on (\d+) GPUs \((\d+) x dgx-h100\)", str(error))
    assert fits_on is not None
    num_nodes = int(fits_on[2])
    assert int(fits_on[1]) == 8 * num_nodes
    assert is_feasible(with_nodes(request, num_nodes))
    assert not is_feasible(with_nodes(request, num_nodes - 1))


def test_a_limit_in_the_way_is_named_and_lifting_it_helps() -> None:
    request = make_request(limits=SearchLimits(allowed={"tp": (5,), "recompute": ("full",)}))
    error = infeasible_error(request)
    assert "fits without 'constraints.tp: 5'" in str(error)
    assert "constraints.recompute" not in str(error)
    lifted = SearchLimits(allowed={"recompute": ("full",)})
    assert is_feasible(replace(request, limits=lifted))


def test_a_headroom_in_the_way_is_named_and_lowering_it_helps() -> None:
    limits = SearchLimits(allowed=RESIDENT, memory_headroom=0.6)
    request = make_request("llama-3-70b", "dgx-h100:2", limits=limits)
    error = infeasible_error(request)
    assert "fits with less headroom than 60%" in str(error)
    assert is_feasible(replace(request, limits=SearchLimits(allowed=RESIDENT)))


def test_a_sequence_in_the_way_is_shortened_to_one_that_fits() -> None:
    limits = SearchLimits(allowed={**RESIDENT, "cp": (1,)})
    request = make_request("llama-3-8b", "a10g-8:1", length=131_072, batch=8, limits=limits)
    error = infeasible_error(request)
    shorter = [
        length for length in (65_536, 32_768, 16_384, 8192, 4096) if f"of {length} tokens" in str(error)
    ]
    assert len(shorter) == 1
    assert is_feasible(_with_length(request, shorter[0]))
    assert not is_feasible(_with_length(request, 2 * shorter[0]))


def _with_length(request: SearchRequest, length: int) -> SearchRequest:
    job = replace(request.job, workload=replace(request.job.workload, sequence_length=length))
    context: CostContext = cost_context(job)
    return replace(request, job=job, context=context)
