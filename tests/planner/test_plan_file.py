from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from meshwright.costmodels.context import cost_context
from meshwright.costmodels.prediction import predict
from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.plan_file import PlanDocument, plan_document_text, read_plan
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan, partition_layers
from meshwright.simcore.domain.workload import TrainingWorkload


def make_document(
    model: str = "llama-3-8b", cluster: str = "dgx-h100:2", software: str = "megatron-core", **changes: object
) -> PlanDocument:
    spec = load_model(model)
    job = TrainingJob(
        model=spec,
        cluster=resolve_cluster(cluster),
        workload=TrainingWorkload(global_batch_size=64, sequence_length=2048),
        software=software,
    )
    pp, vpp = int(str(changes.get("pp", 1))), int(str(changes.get("vpp", 1)))
    defaults: dict[str, object] = {
        "dp": 8,
        "micro_batch_size": 2,
        "schedule": "none" if pp == 1 else "interleaved_1f1b" if vpp > 1 else "1f1b",
        "layers_per_stage": partition_layers(spec.num_layers, pp * vpp),
    }
    plan = ParallelPlan(**(defaults | changes))  # type: ignore[arg-type]  # keywords are checked by the class
    return PlanDocument(job=job, plan=plan, origin={"model": model, "cluster": cluster})


DOCUMENTS = {
    "plain": make_document(),
    "sharded": make_document(dp=16, sharding="hsdp", sharding_group=8, recompute="full"),
    "interleaved": make_document(dp=2, tp=2, pp=4, vpp=2, sequence_parallel=True, sharding="zero1"),
    "uneven": make_document("llama-3.1-405b", "dgx-h100:8", dp=1, tp=8, pp=8),
    "vocabulary": make_document(
        "gpt3-175b", dp=1, tp=4, pp=4, vocab_parallel="vocab_2", recompute="selective"
    ),
    "windowed": make_document("gemma-2-9b", "aws-p5:2", "torchtitan", sharding="zero3"),
    "amd": make_document("mistral-7b", "mi300x-8:2", dp=16),
    "rack": make_document("llama-3-70b", "gb200-nvl72:1", dp=8, tp=8, sharding="zero1"),
    "alibi": make_document("mpt-7b", "dgx-a100-superpod", "llm-foundry-fsdp1", sharding="zero3"),
    "whole model file": make_document("bloom-176b", "frontier:64", dp=8, tp=8, pp=5),
}


def text_of(document: PlanDocument) -> str:
    context = cost_context(document.job)
    return plan_document_text(document, context, predict(context, document.plan))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(text_of(DOCUMENTS["interleaved"]), encoding="utf-8")
    return path


def read(folder: Path, text: str) -> PlanDocument:
    path = folder / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return read_plan(path)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_written_is_read_back_equal(name: str, tmp_path: Path) -> None:
    document = DOCUMENTS[name]
    found = read(tmp_path, text_of(document))
    assert found.job == document.job
    assert found.plan == document.plan
    assert {key: found.origin[key] for key in document.origin} == document.origin


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_plan_that_was_read_is_written_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    text = text_of(DOCUMENTS[name])
    assert text_of(read(tmp_path, text)) == text


@pytest.mark.parametrize("name", ["plain", "interleaved", "rack"])
def test_a_plan_that_was_read_predicts_the_same(name: str, tmp_path: Path) -> None:
    document = DOCUMENTS[name]
    found = read(tmp_path, text_of(document))
    before, after = (predict(cost_context(d.job), d.plan) for d in (document, found))
    assert before.iteration_time == after.iteration_time
    assert before.peak_memory_bytes == after.peak_memory_bytes


def test_a_plan_file_says_what_it_is_and_what_it_predicts(path: Path) -> None:
    document = DOCUMENTS["interleaved"]
    context = cost_context(document.job)
    prediction = predict(context, document.plan)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert (content["kind"], content["schema_version"]) == ("training_plan", 1)
    assert content["written_by"] == "meshwright"
    assert content["prediction"]["iteration_time_seconds"] == prediction.iteration_time
    assert content["prediction"]["peak_memory_bytes"] == prediction.peak_memory_bytes
    assert sum(content["prediction"]["memory_bytes"].values()) == pytest.approx(prediction.peak_memory_bytes)
    assert content["calibration"]["id"] == "h100-sxm-80.vllm+h100-sxm-80"


def test_the_hashes_name_the_model_and_the_cluster() -> None:
    origins = {name: yaml.safe_load(text_of(document))["origin"] for name, document in DOCUMENTS.items()}
    same, other = origins["plain"], origins["amd"]
    assert same["model_sha256"] == origins["sharded"]["model_sha256"]
    assert same["cluster_sha256"] == origins["sharded"]["cluster_sha256"]
    assert same["model_sha256"] != other["model_sha256"]
    assert same["cluster_sha256"] != other["cluster_sha256"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  num_layers: 32\n", "  num_layers: 33\n", r"adds up to 32, but the model has 33 layers"),
        ("  dp: 2\n", "  dp: 4\n", r"needs tp x cp x dp x pp = 32 GPUs, but the cluster has 16"),
        ("  tp: 2\n", "  tp: 1\n", r"sequence_parallel needs tp > 1"),
        ("global_batch_size: 64", "global_batch_size: 65", r"plan: global_batch_size 65 is not a multiple"),
        ("  vpp: 2\n", "  vpp: 4\n", r"names 8 virtual stages, but pp x vpp is 4 x 4 = 16"),
        ("  vpp: 2\n", "  vpp: 0\n", r"plan\.yaml:\d+: plan\.vpp: must be at least 1"),
        ("schedule: interleaved_1f1b", "schedule: interleaved", r"plan\.schedule: .*'interleaved_1f1b'"),
        ("schedule: interleaved_1f1b", "schedule: gpipe", r"does not go with vpp 2"),
        ("sharding: zero1", "shardin: zero1", r"plan\.shardin: unknown key; did you mean 'sharding'\?"),
        ("software: megatron-core", "software: megatron-cor", r"software: .*did you mean 'megatron-core'\?"),
        (
            "written_by: meshwright",
            "writen_by: meshwright",
            r"writen_by: unknown key; did you mean 'written_by'",
        ),
        ("kind: training_plan", "kind: training", r"plan it first: 'meshwright plan'"),
        ("kind: training_plan", "kind: recipe", r"expected a plan file \(kind: training_plan\), not recipe"),
        ("schema_version: 1", "schema_version: 9", r"this release reads version 1"),
        ("  dp: 2\n", "", r"plan\.dp: is required"),
    ],
)
def test_a_plan_that_does_not_fit_its_job_is_refused_where_it_stands(
    path: Path, old: str, new: str, message: str
) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(SpecError, match=r"plan\.yaml:\d+: ") as caught:
        read_plan(path)
    assert caught.match(message)


def test_heads_that_tp_does_not_divide_are_refused(tmp_path: Path) -> None:
    document = make_document(dp=1, tp=5)
    with pytest.raises(SpecError, match="tp 5 does not divide 32 attention heads"):
        read(tmp_path, text_of(document))


def test_a_prediction_is_for_people_and_never_read(path: Path) -> None:
    before = read_plan(path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    del content["prediction"], content["calibration"], content["origin"]
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    after = read_plan(path)
    assert after == replace(before, origin={})


@pytest.mark.parametrize("text", ["", "[1]", "a: [", "hello", "kind: training_plan\n"])
def test_what_is_no_plan_file_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError, match=r"plan\.yaml"):
        read(tmp_path, text)
