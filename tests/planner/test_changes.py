"""Keys of ``whatif --set``: what they read, what they change, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.costmodels.prediction import predict
from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import load_gpu
from meshwright.planner.changes import CHANGES, apply_changes, parse_change
from meshwright.planner.plan_file import read_plan
from meshwright.planner.scenario import Scenario, scenario_context

PLAN = Path(__file__).resolve().parents[2] / "examples" / "llama-3-70b-interleaved.plan.yaml"


@pytest.fixture(scope="module")
def document():
    return read_plan(PLAN)


@pytest.fixture
def today(document):
    return Scenario(job=document.job)


def changed(scenario: Scenario, *texts: str) -> Scenario:
    return apply_changes(scenario, [parse_change(text) for text in texts])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpu.memory", "'gpu.memory': write KEY=VALUE"),
        ("=5", "'=5': write KEY=VALUE"),
        ("gpu.memory=", "'gpu.memory=': write KEY=VALUE"),
        ("gpu.memroy=80GiB", "unknown key 'gpu.memroy'; did you mean 'gpu.memory'? Known: cluster, "),
        ("gpu.memory=80", "gpu.memory: '80' has no unit; write for example '80 GiB'"),
        ("gpu.memory=80TB/s", "gpu.memory: '80TB/s': unknown unit 'TB/s' for bytes"),
        ("gpu.memory=lots", "gpu.memory: 'lots' is not a quantity"),
        ("fabric.bandwidth=-4Gbit/s", "not negative"),
        ("cluster.nodes=2.5", "cluster.nodes: expected a whole number from 1"),
        ("cluster.nodes=0", "cluster.nodes: expected a whole number from 1"),
        ("software.tp_overlap=half", "software.tp_overlap: expected a plain number"),
        ("software.host_launch_latency=3", "software.host_launch_latency: '3' has no unit"),
    ],
)
def test_a_mistake_in_a_change_is_named(text, says):
    with pytest.raises(SpecError) as caught:
        parse_change(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (("gpu.memory=0GiB",), "gpu.memory: memory_bytes must be a finite number above zero"),
        (("gpu=h10O",), "gpu: unknown GPU 'h10O'"),
        (("cluster=dgx-h10:8",), "cluster: "),
        (("software=megatron",), "software: unknown software 'megatron'"),
        (("gpu.mxfp8=1PFLOP/s",), "gpu.mxfp8: h100-sxm-80 has no mxfp8 units"),
        (("workload.precision=bf61",), "workload.precision: workload.precision: unknown precision 'bf61'"),
        (("fabric.oversubscription=0.5",), "fabric.oversubscription: oversubscription must be 1"),
        (("node.link_latency=0us",), "node.link_latency: must be above zero"),
        (("software.inter_node_efficiency=0",), "software.inter_node_efficiency: must be above zero"),
        (("gpu.memory=80GiB", "gpu.memory=90GiB"), "gpu.memory is given twice"),
    ],
)
def test_an_impossible_value_names_its_key(today, texts, says):
    with pytest.raises(SpecError) as caught:
        changed(today, *texts)
    assert says in str(caught.value)


@pytest.mark.parametrize("key", CHANGES)
def test_writing_what_was_read_changes_no_prediction(document, today, key):
    change = CHANGES[key]
    value = change.read(today)
    if value is None:
        pytest.skip("the job has none")
    same = change.write(today, value)
    plain = predict(scenario_context(today), document.plan)
    again = predict(scenario_context(same), document.plan)
    assert again.iteration_time == pytest.approx(plain.iteration_time, rel=1e-12)
    assert again.peak_memory_bytes == plain.peak_memory_bytes


def test_values_print_with_their_unit(today):
    shown = {key: change.format(change.read(today)) for key, change in CHANGES.items()}
    assert shown["gpu.memory"] == "79.65 GiB"
    assert shown["fabric.bandwidth"] == "50 GB/s"
    assert shown["cluster.nodes"] == "8"
    assert shown["node.link_latency"] == "1 us"
    assert shown["software.tp_overlap"] == "0.35"
    assert shown["workload.lora_rank"] == "none"


@pytest.mark.parametrize(
    ("text", "is_faster"),
    [
        ("gpu.bf16=2PFLOP/s", True),
        ("gpu.memory_bandwidth=6.7TB/s", True),
        ("node.link_bandwidth=900GB/s", True),
        ("fabric.bandwidth=800Gbit/s", True),
        ("node.link_latency=0.5us", True),
        ("software.fixed_time=50ms", True),
        ("gpu.bf16=500TFLOP/s", False),
        ("fabric.bandwidth=100Gbit/s", False),
        ("fabric.oversubscription=2", False),
        ("node.link_latency=4us", False),
        ("software.host_launch_latency=1ms", False),
        ("workload.sequence_length=16384", False),
    ],
)
def test_faster_parts_make_the_plan_faster_and_slower_ones_slower(document, today, text, is_faster):
    before = predict(scenario_context(today), document.plan).iteration_time
    after = predict(scenario_context(changed(today, text)), document.plan).iteration_time
    assert (after < before) == is_faster
    assert after != before


def test_whole_parts_are_exchanged_before_their_numbers(today):
    both = changed(today, "gpu.memory=100GiB", "gpu=h200-sxm-141")
    assert both.gpu.id == "h200-sxm-141"
    assert both.gpu.memory_bytes == 100 * 2**30
    assert scenario_context(both).calibration.id.startswith("h200-sxm-141")


def test_an_exchanged_gpu_is_calibrated_and_a_changed_one_is_a_prior(today):
    assert scenario_context(changed(today, "gpu=h200-sxm-141")).calibration.basis == "calibrated"
    assert scenario_context(changed(today, "gpu.memory=141GiB")).calibration.basis == "calibrated"
    faster = scenario_context(changed(today, "gpu.bf16=2PFLOP/s")).calibration
    assert faster.basis == "prior of the same generation"


def test_an_exchanged_gpu_predicts_what_a_cluster_of_it_does(document, today):
    exchanged = predict(scenario_context(changed(today, "gpu=h200-sxm-141")), document.plan)
    node = replace(document.job.cluster.node, gpu=load_gpu("h200-sxm-141"))
    cluster = replace(document.job.cluster, node=node)
    real = predict(scenario_context(Scenario(job=replace(document.job, cluster=cluster))), document.plan)
    assert exchanged.iteration_time == real.iteration_time


def test_a_constant_of_the_users_calibration_is_read(document, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "schema_version: 2\nkind: calibration\ngpu: h100-sxm-80\n"
        "software:\n  megatron-core:\n    fixed_time: 0.25\n    source: 'estimate: for a test'\n"
    )
    scenario = Scenario(job=document.job, calibration_paths=(mine,))
    assert CHANGES["software.fixed_time"].read(scenario) == 0.25
