"""Prefill pools on other GPUs than the rest: both sides are searched, placed, priced and written."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.errors import SpecError
from meshwright.planner.export.vllm import VllmExporter
from meshwright.planner.serving.costs import JobCosts
from meshwright.planner.serving.deployment import transfer_link
from meshwright.planner.serving.infeasible import infeasible_serving
from meshwright.planner.serving.job_file import ServingFlags, read_serving_request
from meshwright.planner.serving.pairing import best_pairs
from meshwright.planner.serving.plan_file import ServingPlanDocument, read_serving_plan, serving_plan_text
from meshwright.planner.serving.ranking import rank_units, unit_of_row
from meshwright.planner.serving.run import serve_plan
from meshwright.planner.serving.running_costs import plan_dollars_per_million_tokens, plan_phase_watts
from meshwright.planner.serving.sizing import Sizing
from meshwright.planner.serving.space import candidate_space
from meshwright.simcore.domain.serving import ServingPlan, ServingPool

FLAGS = {
    "model": "llama-3.1-8b",
    "cluster": "dgx-h200:1",
    "prefill_cluster": "l40s-8:2",
    "rate": "4 /s",
    "input_length": 400,
    "output_length": 40,
    "engine": "vllm",
    "precision": "bf16",
    "slo": {"ttft_p99": "2 s"},
}
PLAN = ServingPlan(
    engine="vllm", pools=(ServingPool(role="prefill", num_replicas=9), ServingPool(role="decode", tp=2))
)


def request_of(**changes):
    return read_serving_request(None, ServingFlags(**(FLAGS | changes)))


class RememberedSides:
    """Costs that note which roles were priced; a replica of the other cluster takes twice the time."""

    def __init__(self, cases):
        self.cases, self.roles = cases, []

    def kv_cache_tokens(self, plan, pool):
        return 50_000 * pool.gpus_per_replica

    def step_table(self, plan, pool):
        self.roles.append(pool.role)
        return self.cases.table(fixed=0.02 if pool.role == "prefill" else 0.01)


def test_each_side_is_searched_on_its_own_cluster(cases, fixed_load):
    request, costs = request_of(), RememberedSides(cases)
    space = candidate_space(request, fixed_load, costs, 8)
    assert set(costs.roles) == {"prefill", "decode"}
    own = np.array([option.is_prefill_only for option in space.options])
    assert own[space.prefill.option].all()
    assert not own[space.decode.option].any()
    assert not own[space.aggregated.option].any()
    sizing = Sizing(
        objective="goodput_per_gpu", max_gpus=8, demand=1.0, mean_output=101.0, max_prefill_gpus=16
    )
    units = rank_units(space, sizing, is_closed_loop=False)
    pairs = np.flatnonzero(units.prefill >= 0)
    assert len(pairs)
    # Two nodes of eight GPUs prefill, one decodes: some unit takes more of either side than the other has.
    assert (units.prefill_gpus[pairs] <= 16).all()
    assert ((units.num_gpus - units.prefill_gpus)[pairs] <= 8).all()
    assert units.num_gpus.max() > 8
    plan = unit_of_row(request, space, units, int(pairs[0])).plan
    assert plan.pools[0].num_gpus == units.prefill_gpus[pairs[0]]


def test_the_fuller_side_decides_how_many_units_there_is_room_for():
    sizing = Sizing(objective="goodput_per_gpu", max_gpus=8, demand=1.0, mean_output=1.0, max_prefill_gpus=16)
    gpus, first = np.array([6, 6, 3]), np.array([4, 2, 0])
    assert sizing.room(gpus, first).tolist() == [4, 2, 2]
    assert sizing.total_gpus == 24
    pairs = best_pairs(np.array([1.0]), np.array([1]), np.array([2.0]), np.array([1]), 8, None, 16)
    assert (pairs.num_prefill.tolist(), pairs.num_decode.tolist()) == ([2], [1])


def test_pools_are_placed_linked_and_priced_where_they_run():
    job = request_of().job
    assert [job.cluster_of(pool.role).gpu.id for pool in PLAN.pools] == ["l40s", "h200-sxm-141"]
    link = transfer_link(job, PLAN, JobCosts(job))
    # One replica of one L40S sends to one of two H200: what the slower side's NICs take.
    sides = (job.prefill_cluster.node.nic_bandwidth_per_gpu, 2 * job.cluster.node.nic_bandwidth_per_gpu)
    assert link.bandwidth == pytest.approx(min(sides))
    priced = [
        replace(cluster.node, price_dollars_per_hour=price)
        for cluster, price in ((job.cluster, 36.0), (job.prefill_cluster, 8.0))
    ]
    job = replace(
        job,
        cluster=replace(job.cluster, node=priced[0]),
        prefill_cluster=replace(job.prefill_cluster, node=priced[1]),
    )
    # Two GPUs of eight at 36 $/h and nine at 1 $/h each: 18 $/h is half a cent a second.
    assert plan_dollars_per_million_tokens(job, PLAN, 1000.0) == pytest.approx(5.0)
    watts = plan_phase_watts(job, PLAN, ((1.0, 0.0), (0.0, 1.0)))
    assert list(watts) == ["prompts", "decoding", "idle"]
    assert watts["idle"] == 0.0
    prefill = job.prefill_cluster.node
    assert watts["prompts"] == pytest.approx(prefill.power_watts / prefill.num_gpus * 9 / 11)


def test_a_plan_on_two_clusters_is_written_read_served_and_exported(tmp_path):
    job = request_of().job
    job = replace(job, workload=replace(job.workload, num_requests=50))
    path = tmp_path / "plan.yaml"
    path.write_text(serving_plan_text(ServingPlanDocument(job=job, plan=PLAN), {}, {}, ()))
    document = read_serving_plan(path)
    assert document.job.prefill_cluster == job.prefill_cluster
    assert document.plan == PLAN
    run = serve_plan(document, JobCosts(document.job))
    assert run.result.transfer_time.min() > 0.0
    assert VllmExporter().unsupported(document.job, PLAN) == ()
    crowded = replace(PLAN, pools=(replace(PLAN.pools[0], num_replicas=17), PLAN.pools[1]))
    assert "17 GPUs but the cluster has 16" in VllmExporter().unsupported(document.job, crowded)[0]
    path.write_text(path.read_text().replace("num_replicas: 9", "num_replicas: 17"))
    with pytest.raises(SpecError, match="its prefill pool needs 17 GPUs, but the cluster has 16"):
        read_serving_plan(path)


def test_calibration_and_constants_of_both_kinds_are_named(tmp_path):
    job = request_of(prefill_cluster="dgx-b200:2").job
    costs = JobCosts(job)
    identities = costs.calibration_identities(PLAN)
    assert list(identities) == ["calibration", "prefill_calibration"]
    assert "h200" in identities["calibration"]["id"]
    assert "b200" in identities["prefill_calibration"]["id"]
    prefill, decode = costs.calibration_notes(PLAN)
    assert prefill.startswith("prefill pool: b200-sxm-180")
    assert decode.startswith("decode pool: h200-sxm-141")
    assert all(note.startswith(("prefill pool: ", "decode pool: ")) for note in costs.certainty_notes(PLAN))
    path = tmp_path / "plan.yaml"
    document = ServingPlanDocument(job=job, plan=PLAN)
    path.write_text(serving_plan_text(document, {}, identities, costs.certainty_notes(PLAN)))
    assert read_serving_plan(path).plan == PLAN
    # On one cluster both pools have the same, said once.
    alike = JobCosts(replace(job, prefill_cluster=None))
    assert list(alike.calibration_identities(PLAN)) == ["calibration"]
    assert len(alike.calibration_notes(PLAN)) == 1
    assert not any("pool: " in note for note in alike.certainty_notes(PLAN))


@pytest.mark.parametrize(
    ("role", "says"),
    [("decode", "2 nodes of cluster instead of 1"), ("prefill", "without constraint 'mode'")],
)
def test_a_side_on_which_nothing_fits_is_named(cases, fixed_load, role, says):
    # vLLM cannot decode apart with a pipeline, which two nodes take.
    request = request_of(engine="sglang", prefill_cluster="l40s-8:1")
    request = replace(request, limits=replace(request.limits, allowed={"mode": ("disaggregated",)}))

    class OneSide(RememberedSides):
        """A replica of one role needs two nodes."""

        def kv_cache_tokens(self, plan, pool):
            return 0 if pool.role == role and pool.gpus_per_replica < 16 else 50_000

    costs = OneSide(cases)
    space = candidate_space(request, fixed_load, costs, 8)
    assert space.options
    assert space.is_empty
    sizing = Sizing(objective="goodput_per_gpu", max_gpus=8, demand=1.0, mean_output=101.0)
    error = infeasible_serving(request, fixed_load, sizing, space, costs)
    assert says in str(error)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("constraints: {mode: aggregated}", "prefill_cluster: goes with disaggregated plans"),
        ("constraints: {max_gpus: 4}", "max_gpus does not say of which cluster"),
        ("prefill_cluster: dgx-h300:1", "prefill_cluster: unknown node 'dgx-h300'"),
        ("engine: trtllm\nprefill_cluster: mi300x-8:1", "mi300x is made by amd"),
    ],
)
def test_what_does_not_go_with_two_clusters_is_one_message(tmp_path, text, says):
    path = tmp_path / "job.yaml"
    path.write_text(f"schema_version: 1\nkind: serving\n{text}\n")
    own = "prefill_cluster" in text or "engine" in text
    flags = {**FLAGS, "engine": None if "engine" in text else "vllm"}
    flags["prefill_cluster"] = None if own else FLAGS["prefill_cluster"]
    with pytest.raises(SpecError, match=says):
        read_serving_request(path, ServingFlags(**flags))
