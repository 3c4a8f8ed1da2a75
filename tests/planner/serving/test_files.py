"""Serving jobs and plans as files: what is read, what is refused and where, and what is written is read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import SpecError
from meshwright.hardware_specs.spec_writing import dump_yaml
from meshwright.hardware_specs.yaml_document import parse_yaml
from meshwright.planner.serving.job_file import ServingFlags, read_serving_request
from meshwright.planner.serving.plan_file import (
    ServingPlanDocument,
    is_serving_plan,
    read_serving_plan,
    serving_plan_text,
)
from meshwright.planner.serving.workload_section import (
    SLO_NAMES,
    slo_limit,
    slo_mapping,
    slo_of_section,
    workload_mapping,
    workload_of_section,
)
from meshwright.simcore.domain.serving import (
    ENGINES,
    ROUTERS,
    LengthDistribution,
    ServingPlan,
    ServingPool,
    ServingWorkload,
    Slo,
)

JOB = """\
schema_version: 1
kind: serving
model: llama-3.1-8b
cluster: {node: dgx-h100, count: 1}
workload:
  arrival: poisson
  rate: 4 /s
  input_length: 1024
  output_length: {mean: 128, kind: lognormal, coefficient_of_variation: 0.5}
slo: {ttft_p99: 2 s, tpot_p99: 50 ms}
engine: vllm
objective: cost
constraints: {tp: [1, 2], precision: fp8, mode: aggregated, max_gpus: 4}
"""


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def test_a_job_file_says_everything(job):
    request = read_serving_request(job, ServingFlags())
    workload = request.job.workload
    assert (workload.arrival, workload.rate, workload.input_length.mean) == ("poisson", 4.0, 1024.0)
    assert workload.output_length == LengthDistribution(
        mean=128, kind="lognormal", coefficient_of_variation=0.5
    )
    assert {limit.name: limit.seconds for limit in request.job.slo.limits} == {
        "ttft_p99": 2.0,
        "tpot_p99": 0.05,
    }
    assert (request.engines, request.objective, request.limits.max_gpus) == (("vllm",), "cost", 4)
    assert request.limits.allowed == {"tp": (1, 2), "precision": ("fp8",), "mode": ("aggregated",)}


def test_flags_win_over_the_job_file(job):
    flags = ServingFlags(
        cluster="dgx-h200:2",
        concurrency=8,
        input_length=10,
        engine="sglang",
        precision="bf16",
        objective="throughput",
        slo={"tpot_p99": "20ms", "e2e_p95": "9 s"},
    )
    request = read_serving_request(job, flags)
    workload = request.job.workload
    assert (workload.arrival, workload.concurrency, workload.rate) == ("closed_loop", 8, 0.0)
    assert (workload.input_length.mean, workload.output_length.mean) == (10.0, 128.0)
    assert {limit.name: limit.seconds for limit in request.job.slo.limits} == {
        "ttft_p99": 2.0,
        "tpot_p99": 0.02,
        "e2e_p95": 9.0,
    }
    assert (request.engines, request.objective) == (("sglang",), "throughput")
    assert request.limits.allowed["precision"] == ("bf16",)
    assert request.job.cluster.num_gpus == 16


def test_flags_alone_describe_a_job():
    flags = ServingFlags(
        model="deepseek-v3", cluster="dgx-h200:8", requests="azure.csv", slo={"ttft_p99": "2s"}
    )
    request = read_serving_request(None, flags)
    assert (request.job.workload.arrival, request.job.workload.requests_file) == ("trace", "azure.csv")
    assert request.engines == ENGINES


def test_a_request_file_beside_the_job_is_found(job, tmp_path):
    (tmp_path / "mine.jsonl").write_text("")
    text = JOB.replace(JOB[JOB.index("  arrival") : JOB.index("slo")], "  requests: mine.jsonl\n")
    job.write_text(text)
    workload = read_serving_request(job, ServingFlags()).job.workload
    assert (workload.arrival, workload.requests_file) == ("trace", str(tmp_path / "mine.jsonl"))
    job.write_text(text.replace("mine.jsonl", "mine.jsonl\n  rate: 2 /s"))
    workload = read_serving_request(job, ServingFlags()).job.workload
    assert (workload.arrival, workload.rate) == ("poisson", 2.0)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("kind: serving", "kind: training", r"job\.yaml:2: kind: flags of a serving job"),
        (
            "schema_version: 1",
            "schema_version: 2",
            r"job\.yaml:1: schema_version: this release reads version 1",
        ),
        ("  rate: 4 /s", "  rate: 4", r"job\.yaml:7: workload\.rate"),
        ("  rate: 4 /s", "  rate: 0 /s", r"job\.yaml:6: workload: workload\.rate must be above 0"),
        (
            "  rate: 4 /s",
            "  rate: 4 /s\n  concurrency: 3",
            r"job\.yaml:8: workload\.concurrency: poisson arrivals have no",
        ),
        (
            "arrival: poisson",
            "arrival: closed_loop",
            r"job\.yaml:7: workload\.rate: closed_loop arrivals have no rate",
        ),
        (
            "arrival: poisson",
            "arrival: poison",
            r"job\.yaml:6: workload\.arrival: unknown arrival 'poison'; did you mean",
        ),
        ("  rate: 4 /s\n", "", r"workload\.rate must be above 0"),
        ("  input_length: 1024\n", "", r"input_length and output_length are needed"),
        ("input_length: 1024", "input_length: 0", r"job\.yaml:8: workload\.input_length"),
        ("input_length: 1024", "input_lenght: 1024", r"unknown key"),
        ("kind: lognormal", "kind: normal", r"unknown kind 'normal'"),
        (
            "coefficient_of_variation: 0.5",
            "coefficient_of_variation: 0",
            r"job\.yaml:9: workload\.output_length",
        ),
        ("ttft_p99: 2 s", "ttft_p98: 2 s", r"job\.yaml:10: slo\.ttft_p98: unknown limit; did you mean"),
        ("ttft_p99: 2 s", "ttft_p99: 2", r"job\.yaml:10: slo\.ttft_p99"),
        ("ttft_p99: 2 s", "ttft_p99: 0 s", r"job\.yaml:10: slo\.ttft_p99: .*above 0"),
        ("engine: vllm", "engine: vlm", r"job\.yaml:11: engine: unknown engine 'vlm'; did you mean 'vllm'"),
        ("objective: cost", "objective: energy", r"job\.yaml:12: objective"),
        ("tp: [1, 2]", "tp: [0]", r"job\.yaml:13: constraints\.tp: list whole numbers of at least 1"),
        ("tp: [1, 2]", "tq: 1", r"job\.yaml:13: constraints\.tq: unknown key"),
        ("precision: fp8", "precision: fp9", r"constraints\.precision: unknown value 'fp9'; did you mean"),
        ("max_gpus: 4", "max_gpus: 0", r"constraints\.max_gpus"),
        ("engine: vllm", "engine: vllm\nacceptance_rate: 1.5", r"job\.yaml:12: acceptance_rate: is a chance"),
        (
            "engine: vllm",
            "engine: vllm\nacceptance_lengths: [0.3, 0.4, 0.2]",
            r"job\.yaml:12: acceptance_lengths: list the probabilities .* 0\.3, 0\.4, 0\.2 sum to 0\.9",
        ),
        (
            "engine: vllm",
            "engine: vllm\nacceptance_lengths: [1.2, -0.2]",
            r"acceptance_lengths: .*none below 0",
        ),
        (
            "engine: vllm",
            "acceptance_rate: 0.5\nacceptance_lengths: [0.3, 0.7]",
            r"job\.yaml:12: acceptance_lengths: .*remove one of them",
        ),
        ("engine: vllm", "engine_version: 0.12.0", r"job\.yaml:11: engine_version: goes with"),
        ("model: llama-3.1-8b", "model: llama-3.1-8c", r"job\.yaml:3: model: unknown model"),
    ],
)
def test_a_mistake_is_refused_with_its_place(job, old, new, says):
    assert old in JOB
    job.write_text(JOB.replace(old, new, 1))
    with pytest.raises(SpecError, match=says):
        read_serving_request(job, ServingFlags())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"rate": "4"}, "--rate: '4' has no unit"),
        ({"rate": "4 /s", "concurrency": 2}, "--rate and --concurrency"),
        ({"rate": "4 /s", "output_length": None}, "no --output-length"),
        ({}, "no load"),
        ({"requests": "a.csv"}, "a.csv has lengths of its own"),
        ({"rate": "4 /s", "slo": {"ttft_p99": "2"}}, "--ttft-p99: '2' has no unit"),
        ({"rate": "4 /s", "engine": "tgi"}, "engine: unknown value 'tgi'"),
        ({"rate": "4 /s", "precision": "fp7"}, "precision: unknown value 'fp7'"),
        ({"rate": "4 /s", "model": None}, "no model"),
        ({"rate": "4 /s", "cluster": None}, "no cluster"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, says):
    base = {"model": "llama-3.1-8b", "cluster": "dgx-h100:1", "input_length": 10, "output_length": 10}
    with pytest.raises(SpecError, match=says):
        read_serving_request(None, ServingFlags(**(base | flags)))


LENGTHS = st.builds(
    LengthDistribution,
    mean=st.integers(1, 100_000).map(float),
    kind=st.sampled_from(["fixed", "uniform_ratio", "lognormal"]),
    ratio=st.sampled_from([0.0, 0.8, 1.0]),
    coefficient_of_variation=st.sampled_from([0.3, 1.0]),
)
DRAWN = {
    "input_length": LENGTHS,
    "output_length": LENGTHS,
    "num_requests": st.integers(1, 10**6),
    "prefix_length": st.integers(0, 500),
    "num_prefix_groups": st.integers(1, 9),
    "num_turns": st.integers(1, 9),
}
WORKLOADS = st.one_of(
    st.builds(ServingWorkload, arrival=st.just("poisson"), rate=st.floats(1e-3, 1e3), **DRAWN),
    st.builds(
        ServingWorkload,
        arrival=st.just("gamma"),
        rate=st.floats(1e-3, 1e3),
        burstiness=st.floats(0.1, 9.0),
        **DRAWN,
    ),
    st.builds(ServingWorkload, arrival=st.just("closed_loop"), concurrency=st.integers(1, 999), **DRAWN),
    st.just(ServingWorkload(arrival="trace", requests_file="a.csv")),
)


@given(workload=WORKLOADS)
def test_a_written_workload_is_read_back(workload):
    text = dump_yaml({"workload": workload_mapping(workload)})
    assert workload_of_section(parse_yaml(text, "a.yaml").section("workload")) == workload


@given(limits=st.dictionaries(st.sampled_from(SLO_NAMES), st.floats(1e-6, 1e3), min_size=1))
def test_a_written_slo_is_read_back(limits):
    slo = Slo(limits=tuple(slo_limit(name, seconds) for name, seconds in limits.items()))
    assert slo_of_section(parse_yaml(dump_yaml({"slo": slo_mapping(slo)}), "a.yaml").section("slo")) == slo


def acceptance(drafted, *, is_measured):
    if not drafted:
        return {}
    return {"acceptance_lengths": (0.25, 0.75)} if is_measured else {"acceptance_rate": 0.6}


POOL = st.builds(
    lambda tp, pp, replicas, sequences, budget, cache, drafted, tokens: {
        "tp": tp,
        "pp": pp,
        "num_replicas": replicas,
        "max_num_sequences": sequences,
        "max_num_batched_tokens": budget,
        "has_prefix_cache": cache,
        "num_speculative_tokens": drafted,
        **acceptance(drafted, is_measured=cache),
        "kv_cache_tokens": tokens,
    },
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
    st.integers(1, 2),
    st.integers(1, 999),
    st.integers(1, 9999),
    st.booleans(),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(16, 10**6)),
)


@settings(max_examples=30, deadline=None)
@given(
    pools=st.one_of(
        POOL.map(lambda pool: (ServingPool(**pool),)),
        st.tuples(POOL, POOL).map(
            lambda pair: (
                ServingPool(role="prefill", **(pair[0] | {"tp": 1, "pp": 1})),
                ServingPool(role="decode", **(pair[1] | {"pp": 1})),
            )
        ),
    ),
    engine=st.sampled_from(ENGINES),
    router=st.sampled_from(ROUTERS),
)
def test_a_written_plan_is_read_back(tmp_path_factory, cases, pools, engine, router):
    request = cases.request()
    plan = ServingPlan(engine=engine, router=router, pools=pools, precision="fp8", kv_precision="fp8")
    document = ServingPlanDocument(job=request.job, plan=plan, origin=request.origin)
    text = serving_plan_text(
        document, {"load": 1.0}, {"calibration": {"id": "a"}}, ["vllm, default: everything"]
    )
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    path.write_text(text)
    assert is_serving_plan(path)
    read = read_serving_plan(path)
    assert (read.job, read.plan) == (document.job, document.plan)
    assert set(yaml.safe_load(text)["origin"]) == {"model", "cluster", "model_sha256", "cluster_sha256"}


@pytest.fixture
def plan_file(tmp_path, cases) -> Path:
    request = cases.request()
    plan = ServingPlan(engine="vllm", pools=(ServingPool(tp=2, num_replicas=2),))
    document = ServingPlanDocument(job=request.job, plan=plan, origin=request.origin)
    path = tmp_path / "plan.yaml"
    path.write_text(serving_plan_text(document, {}, {}, []))
    return path


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("kind: serving_plan", "kind: serving", "expected a serving plan"),
        ("schema_version: 1", "schema_version: 9", "this release reads version 1"),
        ("num_replicas: 2", "num_replicas: 5", "its pools need 10 GPUs, but the cluster has 8"),
        ("tp: 2", "tp: 3", "tp 3 does not divide 32 attention heads"),
        ("tp: 2", "tpp: 2", "unknown key"),
        ("role: aggregated", "role: decode", "one aggregated pool, or a prefill pool and then a decode pool"),
        ("pp: 1", "pp: 0", "pool.pp must be at least 1"),
        ("pp: 1", "pp: 1\n    ep: 2", "ep 2 x moe_tp 1 for a model without experts"),
        ("policy: chunked_prefill", "policy: chunked", "unknown policy 'chunked'"),
        ("engine: vllm", "engine: tgi", "unknown engine 'tgi'"),
        ("router: least_loaded", "router: fastest", "unknown router"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan_file, old, new, says):
    text = plan_file.read_text()
    assert old in text
    plan_file.write_text(text.replace(old, new, 1))
    with pytest.raises(SpecError, match=says):
        read_serving_plan(plan_file)
