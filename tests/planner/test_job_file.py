from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.job_file import JobFlags, PlanRequest, read_request
from meshwright.simcore.domain.model_catalog import load_model

TEXT = """\
schema_version: 1
kind: training
model: llama-3-8b
cluster: {node: dgx-h100, count: 2}
workload:
  global_batch_size: 64
  sequence_length: 8192
  precision: fp8
software: torchtitan
objective: cost
constraints: {target: megatron, memory_headroom: 5 %, tp: [1, 2, 4], recompute: full, schedule: [1f1b, none]}
"""
FLAGS = JobFlags(
    model="llama-2-7b",
    cluster="dgx-a100:3",
    global_batch_size=128,
    sequence_length=4096,
    precision="fp16",
    software="megatron-2021",
    objective="energy",
    target="deepspeed",
)


def read(folder: Path, text: str = TEXT, flags: JobFlags | None = None) -> PlanRequest:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return read_request(path, flags or JobFlags())


def test_a_job_file_says_everything(tmp_path: Path) -> None:
    request = read(tmp_path)
    assert request.job.model == load_model("llama-3-8b")
    assert request.job.cluster == resolve_cluster("dgx-h100:2")
    workload = request.job.workload
    assert (workload.global_batch_size, workload.sequence_length, workload.precision) == (64, 8192, "fp8")
    assert (request.job.software, request.objective) == ("torchtitan", "cost")
    limits = request.limits
    assert limits.allowed == {"tp": (1, 2, 4), "recompute": ("full",), "schedule": ("1f1b", "none")}
    assert (limits.memory_headroom, limits.target) == (0.05, "megatron")
    assert request.origin == {"model": "llama-3-8b", "cluster": "inline"}


def test_flags_alone_say_everything() -> None:
    request = read_request(None, FLAGS)
    assert request.job.model == load_model("llama-2-7b")
    assert request.job.cluster == resolve_cluster("dgx-a100:3")
    assert request.job.workload.global_batch_size == 128
    assert (request.job.software, request.objective) == ("megatron-2021", "energy")
    assert request.limits.target == "deepspeed"
    assert request.origin == {"model": "llama-2-7b", "cluster": "dgx-a100:3"}


@pytest.mark.parametrize("name", ["global_batch_size", "sequence_length", "precision"])
def test_a_flag_of_the_workload_wins_over_the_file(tmp_path: Path, name: str) -> None:
    value = getattr(FLAGS, name)
    plain = read(tmp_path).job.workload
    flagged = read(tmp_path, flags=replace(JobFlags(), **{name: value})).job.workload
    assert flagged == replace(plain, **{name: value})


def test_what_is_not_named_has_a_default(tmp_path: Path) -> None:
    flags = replace(FLAGS, precision=None, software=None, objective=None, target=None)
    request = read_request(None, flags)
    assert request.job.workload.precision == "bf16"
    assert request.job.software == "megatron-core"
    assert request.objective == "throughput"
    assert (request.limits.allowed, request.limits.memory_headroom, request.limits.target) == ({}, 0.05, None)
    short = "\n".join(
        line for line in TEXT.splitlines() if line.split(":")[0] not in ("software", "objective")
    )
    assert read(tmp_path, short).job.software == "megatron-core"


@pytest.mark.parametrize("name", ["model", "cluster", "global_batch_size", "sequence_length"])
def test_what_has_no_default_is_asked_for_by_its_flag(name: str) -> None:
    with pytest.raises(SpecError, match=f"--{name.replace('_', '-')}"):
        read_request(None, replace(FLAGS, **{name: None}))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("software:", "sofware:", r"job\.yaml:9: sofware: unknown key; did you mean 'software'\?"),
        ("precision: fp8", "precison: fp8", r"job\.yaml:8: workload\.precison: unknown key; did you mean"),
        ("tp: [", "tpp: [", r"job\.yaml:11: constraints\.tpp: unknown key; did you mean 'tp'\?"),
        ("count: 2", "cuont: 2", r"job\.yaml:4: cluster\.cuont: unknown key; did you mean 'count'\?"),
        ("precision: fp8", "precision: fp9", r"job\.yaml:8: workload\.precision: .*'fp9'"),
        ("torchtitan", "torchtitn", r"job\.yaml:9: software: .*did you mean 'torchtitan'\?"),
        (
            "dgx-h100",
            "dgx-h10O",
            r"job\.yaml:4: cluster\.node: unknown node 'dgx-h10O'; did you mean 'dgx-h100'",
        ),
        (
            "recompute: full",
            "recompute: ful",
            r"job\.yaml:11: constraints\.recompute: .*did you mean 'full'\?",
        ),
        ("[1, 2, 4]", "[0]", r"job\.yaml:11: constraints\.tp: list whole numbers above zero"),
        ("[1, 2, 4]", "[]", r"job\.yaml:11: constraints\.tp: list whole numbers above zero"),
        ("[1, 2, 4]", "two", r"job\.yaml:11: constraints\.tp: expected a whole number"),
        ("5 %", "-5 %", r"job\.yaml:11: constraints\.memory_headroom: '-5 %'"),
        ("5 %", "5", r"job\.yaml:11: constraints\.memory_headroom"),
        ("global_batch_size: 64", "global_batch_size: -64", r"job\.yaml:6: workload\.global_batch_size"),
        ("kind: training", "kind: serving", r"job\.yaml:2: kind: expected a training job"),
        (
            "schema_version: 1",
            "schema_version: 2",
            r"job\.yaml:1: schema_version: this release reads version 1",
        ),
        ("objective: cost", "objective: costs", r"objective: unknown value 'costs'; did you mean 'cost'\?"),
        ("target: megatron", "target: megatrn", r"unknown target 'megatrn'; did you mean 'megatron'\?"),
        ("llama-3-8b", "llama-3-8x", r"unknown model 'llama-3-8x'; did you mean"),
        ("5 %", "120 %", r"memory_headroom must be 0 % to below 100 %"),
    ],
)
def test_a_mistake_is_refused_where_it_stands(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(SpecError, match=message):
        read(tmp_path, TEXT.replace(old, new, 1))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"model": "llama-2-7x"}, "unknown model 'llama-2-7x'"),
        ({"cluster": "dgx-a100:0"}, "the number of nodes is '0'"),
        ({"precision": "fp9"}, "unknown precision 'fp9'"),
        ({"software": "megatron"}, "unknown software 'megatron'; did you mean 'megatron-"),
        ({"objective": "speed"}, "objective: unknown value 'speed'"),
        ({"target": "megatrn"}, "unknown target 'megatrn'; did you mean 'megatron'"),
        ({"global_batch_size": 0}, "global_batch_size must be at least 1, not 0"),
    ],
)
def test_a_wrong_flag_is_refused(flag: dict[str, str | int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_request(None, replace(FLAGS, **flag))  # type: ignore[arg-type]  # fields of JobFlags


def test_models_and_clusters_can_be_files_beside_the_job(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("schema_version: 1\nnode: dgx-a100\ncount: 5\n", encoding="utf-8")
    text = TEXT.replace("cluster: {node: dgx-h100, count: 2}", "cluster: mine.yaml")
    request = read(tmp_path, text)
    assert request.job.cluster.num_gpus == 40
    assert request.origin["cluster"] == "mine.yaml"


def test_a_model_can_be_written_out(tmp_path: Path) -> None:
    model = load_model("llama-3-8b")
    sizes = {
        f.name: getattr(model, f.name)
        for f in fields(model)
        if isinstance(getattr(model, f.name), bool | int)
    }
    lines = "\n".join(f"  {name}: {str(value).lower()}" for name, value in sizes.items())
    text = TEXT.replace("model: llama-3-8b\n", f"model:\n  name: mine\n{lines}\n")
    request = read(tmp_path, text)
    assert request.job.model == replace(model, name="mine")
    assert request.origin["model"] == "inline"


@pytest.mark.parametrize("text", ["", "[]", "a: [", "kind: training", "\x00"])
def test_what_is_no_job_file_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError, match=r"job\.yaml"):
        read(tmp_path, text)


def test_a_missing_job_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file"):
        read_request(tmp_path / "nothing.yaml", JobFlags())
    with pytest.raises(SpecError, match="is a directory"):
        read_request(tmp_path, JobFlags())
