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
from meshwright.planner.routing_reach import ReachedRouting, reached_routing
from meshwright.planner.scenario import Scenario
from meshwright.planner.space import space_blocks
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


def test_a_capacity_is_planned_with_on_each_ep_where_it_beats_the_imbalance(folder: Path) -> None:
    model, cluster = load_model("mixtral-8x7b"), resolve_cluster("dgx-h100:1")
    tokens = np.random.default_rng(0).permuted(np.tile(np.arange(8), (32, 4000, 1)), axis=2)[..., :2]
    np.savez(folder / "even.npz", tokens=tokens)
    # One expert takes most of the tokens: every rank that holds it is far above the mean.
    np.savez(folder / "hot.npz", tokens=np.where(tokens == 1, 0, tokens))

    def reached(name: str, share: float) -> ReachedRouting:
        return reached_routing(
            folder / name,
            model,
            cluster,
            deduplicates_dispatch=False,
            max_token_drop=share,
            sequence_length=500,
        )

    none, some, much = (reached("even.npz", share) for share in (0.0, 0.02, 0.9))
    assert factors(none) == {2: None, 4: None, 8: None}
    assert factors(some) == factors(none)  # ranks are level: padding to 1.1 would cost more
    assert "none is planned with" in some.notes[1]
    hot = reached("hot.npz", 0.6)
    assert factors(hot) == {2: 1.0, 4: 1.0, 8: 1.0}
    assert "on ep 2, 4, 8; planned with there" in hot.notes[1]
    assert all(each.imbalance > 1.0 for each in hot.by_ep)
    assert factors(much) == factors(hot)
    of_file = read(folder, "  routing: trace.npz\n  max_token_drop: 0.9\n").job.workload
    assert {of_file.capacity_at(ep) for ep in (2, 4, 8)} == {1.0}
    assert of_file.capacity_at(1) is None


def test_a_capacity_pays_on_the_ep_that_balances_badly_alone(folder: Path) -> None:
    # Half of the pairs go to experts 0 and 1: two ranks are level with one each, a rank of one expert gets twice the mean.
    rng = np.random.default_rng(0)
    tokens = np.stack([rng.integers(0, 2, (32, 4000)), rng.integers(2, 8, (32, 4000))], axis=2)
    np.savez(folder / "pair.npz", tokens=tokens)
    reached = reached_routing(
        folder / "pair.npz",
        load_model("mixtral-8x7b"),
        resolve_cluster("dgx-h100:1"),
        deduplicates_dispatch=False,
        max_token_drop=0.24,
        sequence_length=500,
    )
    assert reached.by_ep[0].imbalance < 1.1 < reached.by_ep[1].imbalance < reached.by_ep[2].imbalance
    assert factors(reached) == {2: None, 4: 1.1, 8: 1.1}
    assert "on ep 4, 8; planned with there" in reached.notes[1]


def factors(reached: ReachedRouting) -> dict[int, float | None]:
    return {each.ep: each.capacity_factor for each in reached.by_ep}


def test_chunks_of_the_exchange_are_tried_where_the_routing_is_known(folder: Path) -> None:
    def tried(extra: str, flags: JobFlags | None = None) -> tuple[set[int], bool]:
        request = read(folder, extra, flags)
        context = cost_context(request.job)
        blocks = space_blocks(context, request.limits, (8,))
        degrees = {int(each) for block in blocks for each in block.axes["overlap"].columns["expert_overlap"]}
        return degrees, any(note.startswith("Overlap:") for note in request.notes)

    routing = "  routing: trace.npz\n"
    assert tried("") == ({1}, False)
    assert tried(routing) == ({1, 2, 4, 8}, True)
    assert tried(routing + "constraints:\n  expert_overlap: [1, 2]\n") == ({1, 2}, False)
    assert not tried(routing, JobFlags(target="megatron"))[1]


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
        ("  routing_by_ep: [{ep: 4, imbalance: 1, capacity_factor: 0}]\n", {}, "capacity factor of ep 4 .* above 0"),
        ("  max_token_drop: 0.1\n", {}, "max_token_drop.*needs recorded routing"),
        ("  routing: trace.npz\n  max_token_drop: 2\n", {}, "0 to below 1, not 2"),
        ("  routing: trace.npz\n  max_token_drop: 0.1\n  expert_capacity_factor: 2\n", {}, "leave out it or"),
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
        ExpertRouting(ep=8, imbalance=1.375, remote_nodes_per_token=0.75, capacity_factor=1.25),
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
        "routing_by_ep.8.capacity_factor": (1.25, None),
    }
