"""Plans as the simulator takes them, what they cost to run, and what long contexts cost."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from meshwright.errors import InfeasiblePlanError, SpecError, UnsupportedByTargetError
from meshwright.planner.serving.costs import JobCosts
from meshwright.planner.serving.deployment import (
    check_engine_runs,
    policy_note,
    replica_pools,
    transfer_link,
    with_policy,
)
from meshwright.planner.serving.long_context import CONTEXT_LENGTHS, long_context_rows
from meshwright.planner.serving.plan_file import ServingPlanDocument
from meshwright.planner.serving.run import serve_plan
from meshwright.planner.serving.running_costs import (
    dollars_per_million_tokens,
    joules_per_token,
    watts_per_gpu,
)
from meshwright.planner.serving.unit_simulation import (
    JobSimulator,
    first_requests,
    profile_of_requests,
    trace_rate,
)
from meshwright.simcore.domain.serving import ServingPlan, ServingPool
from meshwright.simcore.serving.requests import RequestTable


@pytest.fixture(scope="module")
def job(cases):
    return cases.request(concurrency=8, rate=None, input_length=200, output_length=20).job


@pytest.fixture(scope="module")
def costs(job):
    return JobCosts(job)


def plan_of(*pools, **changes):
    return ServingPlan(**({"engine": "vllm", "pools": pools or (ServingPool(tp=2),)} | changes))


def test_a_pipeline_shares_slots_and_cache_between_its_micro_batches(costs):
    plan = plan_of(ServingPool(pp=2, max_num_sequences=64, kv_cache_tokens=3200))
    (pool,) = replica_pools(plan, costs)
    assert (pool.behaviour.max_num_sequences, pool.behaviour.num_kv_blocks) == (32, 100)
    assert pool.table.stage_share == 0.5


def test_requests_pass_one_front_end_and_one_link(job, costs):
    plan = plan_of(ServingPool(role="prefill", tp=2), ServingPool(role="decode", tp=2))
    first, second = replica_pools(plan, costs)
    assert first.behaviour.fixed_time_per_request > 0.0
    assert second.behaviour.fixed_time_per_request == second.behaviour.serial_time_per_request == 0.0
    link = transfer_link(job, plan, costs)
    # Llama-3.1-8B: 32 layers of 8 heads of 128, keys and values, 2 bytes; one node, so NVLink carries it.
    assert link.bytes_per_token == 32 * 2 * 8 * 128 * 2
    assert link.bandwidth == 2 * job.cluster.node.intra_link.bandwidth_bytes_per_second
    assert transfer_link(job, plan_of(), costs) is None


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (plan_of(ServingPool(policy="prefill_first")), "policy prefill_first"),
        (plan_of(ServingPool(policy="orca"), engine="trtllm"), "policy orca"),
        (plan_of(ServingPool(attention_dp=2)), "attention_dp 2"),
        (plan_of(ServingPool(tp=16)), "tp 16"),
    ],
)
def test_an_engine_that_cannot_express_the_plan_is_named(job, plan, says):
    with pytest.raises(UnsupportedByTargetError, match=f"{plan.engine} cannot express this plan: .*{says}"):
        check_engine_runs(job, plan)
    check_engine_runs(job, plan_of())


def test_another_policy_reaches_every_pool_and_is_named(job, costs):
    pair = plan_of(ServingPool(role="prefill", tp=2), ServingPool(role="decode", tp=2))
    assert policy_note(pair) is None
    changed = with_policy(pair, "orca")
    assert {pool.behaviour.policy for pool in replica_pools(changed, costs)} == {"orca"}
    assert policy_note(changed).startswith("policy orca is not what vllm does")
    with pytest.raises(
        SpecError, match=r"static batching .* cannot hand requests from a prefill to a decode"
    ):
        with_policy(pair, "static")


def test_a_stated_cache_must_fit_beside_the_weights(job, costs):
    plan = plan_of(ServingPool(tp=2, kv_cache_tokens=100_000_000))
    with pytest.raises(InfeasiblePlanError, match="kv_cache_tokens 100,000,000 do not fit"):
        serve_plan(ServingPlanDocument(job=job, plan=plan), costs)


def test_equal_seeds_serve_equally_and_the_shares_of_time_add_up(job, costs):
    document = ServingPlanDocument(
        job=replace(job, workload=replace(job.workload, num_requests=200)), plan=plan_of()
    )
    one, two = serve_plan(document, costs), serve_plan(document, costs)
    assert np.array_equal(one.result.finish_time, two.result.finish_time)
    assert one.metrics.ttft == two.metrics.ttft
    assert 0.0 < one.prompt_share + one.decode_share <= 1.0
    assert one.violations == ()
    split = one.metrics.ttft_split
    parts = split.queue + split.prefill + split.transfer + split.interference
    assert parts == pytest.approx(one.metrics.ttft.mean)


def test_a_load_is_the_trace_stretched_in_time(job, costs):
    trace = RequestTable(
        arrival_time=np.arange(0.0, 300.0),
        input_length=np.full(300, 100),
        output_length=np.full(300, 20),
    )
    open_job = replace(job, workload=replace(job.workload, arrival="poisson", rate=1.0, concurrency=0))
    simulator = JobSimulator(open_job, costs, trace=trace)
    assert trace_rate(trace) == 1.0
    slow, fast = (simulator.run(plan_of(), load, clients=2.0) for load in (0.5, 200.0))
    assert (slow.load, fast.load, slow.rate) == (0.5, 200.0, 0.5)
    assert slow.is_stable
    assert fast.metrics["tpot_p99"] > slow.metrics["tpot_p99"]
    assert profile_of_requests(trace).mean_prompt == 100.0


@pytest.mark.parametrize("clients", [16, 48])
def test_clients_in_step_finish_as_many_requests_as_a_long_run_says(job, costs, clients):
    """Equal requests finish together, so that a count over a window depends on where the window begins."""
    plan = plan_of(ServingPool(max_num_sequences=64))
    point = JobSimulator(job, costs).run(plan, clients, clients=clients)
    workload = replace(job.workload, concurrency=clients, num_requests=200 * clients)
    long_run = serve_plan(
        ServingPlanDocument(job=replace(job, workload=workload), plan=plan), costs
    ).metrics.requests_per_second
    assert point.rate == pytest.approx(long_run, rel=0.03)


def test_the_first_requests_of_a_table_keep_their_shared_parts():
    table = RequestTable(
        arrival_time=np.arange(3.0),
        input_length=np.array([100, 200, 300]),
        output_length=np.array([1, 2, 3]),
        segment_offset=np.array([0, 1, 1, 2]),
        segment=np.array([0, 0]),
        segment_end=np.array([64]),
    )
    cut = first_requests(table, 2)
    assert (cut.input_length.tolist(), cut.segment_offset.tolist(), cut.segment.tolist()) == (
        [100, 200],
        [0, 1, 1],
        [0],
    )
    assert first_requests(table, 3) is table
    sessions = replace(table, successor=np.array([1, -1, -1]))
    assert first_requests(sessions, 2) is sessions
    assert profile_of_requests(table).mean_cached == pytest.approx(128 / 3)


def test_dollars_and_joules_follow_from_price_power_and_rate(job):
    cluster = job.cluster
    node = replace(cluster.node, price_dollars_per_hour=36.0, power_watts=8 * 1000.0)
    cluster = replace(cluster, node=node)
    # 4 of 8 GPUs of a 36 $/h node: 18 $/h is half a cent a second.
    assert dollars_per_million_tokens(cluster, 4, 1000.0) == pytest.approx(5.0)
    assert dollars_per_million_tokens(cluster, 4, 0.0) is None
    beside = 1000.0 - cluster.gpu.power_watts
    assert watts_per_gpu(cluster, 1.0, 0.0) == pytest.approx(1000.0)
    assert watts_per_gpu(cluster, 0.0, 0.0) == pytest.approx(beside + 0.15 * cluster.gpu.power_watts)
    assert watts_per_gpu(cluster, 0.0, 1.0) < watts_per_gpu(cluster, 0.5, 0.5) < 1000.0
    assert joules_per_token(500.0, 4, 1000.0) == pytest.approx(2.0)
    assert joules_per_token(500.0, 4, 0.0) is None


def test_the_four_costs_of_a_context_grow_and_the_swap_is_two_copies(job, costs):
    pool = ServingPool(tp=2)
    rows = long_context_rows(job, plan_of(pool), pool, costs)
    assert [row.context for row in rows] == list(CONTEXT_LENGTHS)
    assert (CONTEXT_LENGTHS[0], CONTEXT_LENGTHS[-1]) == (4096, 10_000_000)
    for name in ("kv_bytes", "prefill_time", "decode_time", "swap_time"):
        values = [getattr(row, name) for row in rows]
        assert all(after > before for before, after in pairwise(values)), name
    assert all(row.concurrency * row.context == pytest.approx(rows[0].concurrency * 4096) for row in rows)
    link = job.cluster.node.host_link_bandwidth_per_gpu
    assert rows[0].swap_time == pytest.approx(2.0 * rows[0].kv_bytes / 2 / link)
    assert [row.is_beyond_model for row in rows] == [context > 131072 for context in CONTEXT_LENGTHS]
    # Beyond the measured prompts attention grows with nearly the square of the length.
    assert rows[-1].prefill_time / rows[-2].prefill_time > 1.7 * (10_000_000 / 4_194_304)
