"""Plans that ask what a placement of the experts reaches on the user's routing data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshwright.costmodels.context import cost_context
from meshwright.costmodels.prediction import predict
from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.changes import CHANGES
from meshwright.planner.difference import field_differences
from meshwright.planner.job_file import JobFlags, PlanRequest, read_request
from meshwright.planner.placement.layout import placement_reach
from meshwright.planner.placement.routing_files import read_routing
from meshwright.planner.placement.synthetic import draw_routing
from meshwright.planner.plan_file import PlanDocument, plan_document_text, read_plan
from meshwright.planner.routing_reach import reached_routing
from meshwright.planner.scenario import Scenario
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan, partition_layers
from meshwright.simcore.domain.workload import ExpertRouting, TrainingWorkload

MODEL, CLUSTER = load_model("mixtral-8x7b"), resolve_cluster("dgx-h100:2")
JOB = """\
schema_version: 1
kind: training
model: mixtral-8x7b
cluster: dgx-h100:2
workload:
  global_batch_size: 64
  sequence_length: 4096
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("routing")
    drawn = draw_routing(MODEL.num_layers, 8, 2, 2000, 0)
    np.savez(path / "trace.npz", tokens=drawn.tokens)
    rows = "\n".join(",".join(f"{load:g}" for load in loads) for loads in drawn.loads)
    (path / "loads.csv").write_text(rows + "\n")
    return path


def read(folder: Path, extra: str = "", flags: JobFlags | None = None) -> PlanRequest:
    path = folder / "job.yaml"
    path.write_text(JOB + extra, encoding="utf-8")
    return read_request(path, flags or JobFlags())


def test_every_degree_has_what_its_placement_reaches(folder: Path) -> None:
    reached = reached_routing(folder / "trace.npz", MODEL, CLUSTER, deduplicates_dispatch=False)
    assert [each.ep for each in reached.by_ep] == [2, 4, 8]
    routing = read_routing(folder / "trace.npz", 8, tuple(range(MODEL.num_layers)), MODEL.num_layers)
    for each in reached.by_ep:
        assert (
            each.imbalance
            == placement_reach(MODEL, CLUSTER, each.ep, routing=routing, dispatch="full").imbalance
        )
    # One expert a rank: no placement changes what the sampled layers' own loads say of the held-out half.
    layers = np.unique(np.linspace(0, MODEL.num_layers - 1, 8).round().astype(int))
    held_out = routing.tokens[layers, 1000:]
    shares = [np.bincount(tokens.ravel(), minlength=8) for tokens in held_out]
    expected = np.mean([loads.max() / loads.mean() for loads in shares])
    assert reached.by_ep[-1].imbalance == pytest.approx(expected, rel=1e-12)
    assert "ep 8" in reached.notes[0]


def test_traffic_is_known_where_tokens_go_once_to_each_node(folder: Path) -> None:
    model, small = load_model("mixtral-8x7b"), resolve_cluster("dgx-h100:4")
    nodes_of_4 = replace(small, node=replace(small.node, num_gpus=4))
    known = reached_routing(folder / "trace.npz", model, nodes_of_4, deduplicates_dispatch=True).by_ep
    assert [each.remote_nodes_per_token for each in known][:2] == [0.0, 0.0]
    assert 0.0 < known[2].remote_nodes_per_token < 1.0
    sums = reached_routing(folder / "loads.csv", model, nodes_of_4, deduplicates_dispatch=True).by_ep
    assert {each.remote_nodes_per_token for each in sums} == {None}


def test_job_file_and_flag_name_the_data(folder: Path) -> None:
    plain = read(folder)
    assert plain.job.workload.routing_by_ep == ()
    assert plain.notes == ()
    of_file = read(folder, "  routing: trace.npz\n")
    of_flag = read(folder, "  routing: nothing.npz\n", JobFlags(routing=folder / "trace.npz"))
    assert of_file.job == of_flag.job
    assert len(of_file.job.workload.routing_by_ep) == 3
    assert "trace.npz" in of_file.notes[0]
    deep = read(folder, "  routing: trace.npz\nfeatures: [deepep]\n").job.workload
    assert deep.routing_by_ep[0].remote_nodes_per_token == 0.0


@pytest.mark.parametrize(
    ("extra", "flags", "message"),
    [
        ("  routing: trace.npz\n  routing_imbalance: 1.2\n", {}, r"job\.yaml:9: workload\.routing_imbalance: .*leave out"),
        ("  routing: nothing.npz\n", {}, r"nothing\.npz: no such file"),
        ("  routing: trace.npz\n", {"model": "llama-3-8b"}, "llama-3-8b has no experts"),
        ("  routing: trace.npz\n", {"model": "qwen3-30b-a3b"}, "another model"),
        ("  routing_by_ep: [{ep: 1, imbalance: 1}]\n", {}, "routing_by_ep.*at least 2"),
        ("  routing_by_ep: [{ep: 2, imbalance: 3}]\n", {}, "imbalance of ep 2 .* 1 to 2, not 3"),
        ("  routing_by_ep: [{ep: 4, imbalance: 1}, {ep: 2, imbalance: 1}]\n", {}, "ascending"),
        ("  routing_by_ep: [{ep: 4, imbalence: 1}]\n", {}, "imbalance"),
        ("  routing_imbalance: 1.5\n  routing_by_ep: [{ep: 4, imbalance: 1}]\n", {}, "not both"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(
    folder: Path, extra: str, flags: dict[str, str], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        read(folder, extra, JobFlags(**flags))  # type: ignore[arg-type]  # fields of JobFlags


@pytest.fixture
def document() -> PlanDocument:
    table = (
        ExpertRouting(ep=2, imbalance=1.01),
        ExpertRouting(ep=8, imbalance=1.375, remote_nodes_per_token=0.75),
    )
    workload = TrainingWorkload(global_batch_size=64, sequence_length=4096, routing_by_ep=table)
    plan = ParallelPlan(
        dp=16,
        ep=8,
        micro_batch_size=1,
        schedule="none",
        sharding="zero1",
        layers_per_stage=partition_layers(MODEL.num_layers, 1),
    )
    job = TrainingJob(model=MODEL, cluster=CLUSTER, workload=workload, software="megatron-core")
    return PlanDocument(job=job, plan=plan)


def test_plan_files_keep_it(document: PlanDocument, tmp_path: Path) -> None:
    context = cost_context(document.job)
    prediction = predict(context, document.plan)
    path = tmp_path / "plan.yaml"
    path.write_text(plan_document_text(document, context, prediction))
    again = read_plan(path)
    assert again.job == document.job
    assert predict(cost_context(again.job), again.plan).iteration_time == prediction.iteration_time


def test_a_stated_imbalance_takes_its_place_in_what_if(document: PlanDocument) -> None:
    changed = CHANGES["workload.routing_imbalance"].write(Scenario(job=document.job), 1.5)
    assert changed.job.workload.routing_by_ep == ()
    times = [predict(cost_context(job), document.plan).iteration_time for job in (document.job, changed.job)]
    assert times[1] > times[0]


def test_a_difference_names_the_ep(document: PlanDocument) -> None:
    workload = replace(document.job.workload, routing_by_ep=document.job.workload.routing_by_ep[:1])
    other = replace(document, job=replace(document.job, workload=workload))
    found = {each.key: (each.first, each.second) for each in field_differences(document, other)}
    assert found == {
        "routing_by_ep.8.ep": (8, None),
        "routing_by_ep.8.imbalance": (1.375, None),
        "routing_by_ep.8.remote_nodes_per_token": (0.75, None),
    }
