"""Recorded routing in serving plans: copies are tried where it says what they are worth, and priced with it."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.placement.synthetic import draw_routing
from meshwright.planner.serving.answer import answer_request
from meshwright.planner.serving.expert_routing import ServedRouting
from meshwright.planner.serving.job_file import ServingFlags, read_serving_request
from meshwright.planner.serving.limits import ServingLimits
from meshwright.planner.serving.replica_shapes import all_shapes
from meshwright.simcore.domain.model_catalog import load_model

CLUSTER = resolve_cluster("dgx-h100:1")
MIXTRAL = load_model("mixtral-8x7b")


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("routing") / "trace.npz"
    np.savez(path, tokens=draw_routing(32, 8, 2, 2000, 0).tokens)
    return path


def flags(**more):
    return ServingFlags(
        model="mixtral-8x7b",
        cluster="dgx-h100:1",
        rate="2 /s",
        input_length=512,
        output_length=64,
        engine="sglang",
        precision="bf16",
        slo={"ttft_p99": "4s"},
        **more,
    )


def test_copies_lower_the_imbalance_of_the_busiest_rank(trace):
    routing = ServedRouting(trace, MIXTRAL, CLUSTER)
    assert routing.imbalance(8, 8) < routing.imbalance(8, 0)
    assert 1.0 <= routing.imbalance(8, 8) <= 8.0
    assert routing.name == "trace.npz"
    with pytest.raises(SpecError, match="has no experts"):
        ServedRouting(trace, load_model("llama-3.1-8b"), CLUSTER)
    with pytest.raises(SpecError, match="another model"):
        ServedRouting(trace, load_model("qwen3-30b-a3b"), CLUSTER)


def test_copies_are_tried_with_routing_or_where_asked_for():
    def copies(has_routing, **allowed):
        limits = ServingLimits(allowed=allowed)
        shapes = all_shapes(MIXTRAL, CLUSTER, limits, 8, has_routing=has_routing)
        return {(int(ep), int(more)) for ep, more in zip(shapes.ep, shapes.redundant_experts, strict=True)}

    assert {more for _, more in copies(False)} == {0}
    assert copies(True) == {(1, 0), (2, 0), (2, 2), (4, 0), (4, 4), (8, 0), (8, 8)}
    assert {more for _, more in copies(False, redundant_experts=(0, 16))} == {0, 16}


def test_a_plan_carries_the_imbalance_it_was_priced_with(trace):
    request = read_serving_request(None, flags(routing=trace))
    answer = answer_request(request, num_shapes=0)
    pools = [pool for ranked in answer.outcome.ranked for pool in ranked.plan.pools if pool.ep > 1]
    assert pools
    assert {pool.redundant_experts for pool in pools} > {0}
    for pool in pools:
        assert pool.expert_imbalance == request.routing.imbalance(pool.ep, pool.redundant_experts)
    plain = answer_request(read_serving_request(None, flags()), num_shapes=0)
    for ranked in plain.outcome.ranked:
        assert all(pool.expert_imbalance is None for pool in ranked.plan.pools)


def test_a_job_file_names_routing_beside_it(trace, tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text(
        "schema_version: 1\nkind: serving\nmodel: mixtral-8x7b\ncluster: {node: dgx-h100, count: 1}\n"
        "workload: {arrival: poisson, rate: 2 /s, input_length: 512, output_length: 64}\n"
        "constraints: {redundant_experts: [0, 8]}\nrouting: trace.npz\n"
    )
    with pytest.raises(SpecError, match="no such file"):
        read_serving_request(job, ServingFlags())
    (tmp_path / "trace.npz").write_bytes(trace.read_bytes())
    assert read_serving_request(job, ServingFlags()).routing.name == "trace.npz"
