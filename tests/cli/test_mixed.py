"""Mixed clusters on the command line: what runs where is shown, what takes one kind of node refuses in one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.costmodels.context import cost_context
from meshwright.costmodels.prediction import predict
from meshwright.hardware_specs import resolve_cluster
from meshwright.planner.plan_file import PlanDocument, plan_document_text
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.workload import TrainingWorkload

CLUSTER = str(Path(__file__).parents[2] / "examples" / "mixed-cluster.yaml")
STAGED = ParallelPlan(
    dp=8, tp=2, pp=2, micro_batch_size=1, schedule="1f1b", sequence_parallel=True, layers_per_stage=(28, 12)
)
SHARED = replace(
    STAGED,
    layers_per_stage=(20, 20),
    device_mapping=DeviceMapping(rank_order="tp-cp-ep-pp-dp"),
    micro_batch_shares=(11,) * 4 + (5,) * 4,
)


@pytest.fixture
def written(folder):
    """Return the files of a plan with stages, and of one with replicas on islands."""
    workload = TrainingWorkload(global_batch_size=64, sequence_length=4096, precision="bf16")
    job = TrainingJob(
        model=load_model("llama-2-13b"),
        cluster=resolve_cluster(CLUSTER),
        workload=workload,
        software="megatron-core",
    )
    context = cost_context(job)
    for name, plan in (("staged.yaml", STAGED), ("shared.yaml", SHARED)):
        document = PlanDocument(job=job, plan=plan)
        (folder / name).write_text(plan_document_text(document, context, predict(context, plan)))
    return folder


def test_what_runs_where_is_printed(meshwright, written):
    for verb in ("simulate", "explain"):
        outcome = meshwright(verb, "staged.yaml")
        assert outcome.code == 0, outcome.stderr
        assert "16 x h100-sxm-80 + 16 x a100-sxm-80" in " ".join(outcome.stdout.split())
        assert "stage 0 (28 layers) on dgx-h100, stage 1 (12 layers) on dgx-a100." in outcome.stdout
        assert "Calibration: h100-sxm-80: " in outcome.stdout
        assert "; a100-sxm-80: " in outcome.stdout
        outcome = meshwright(verb, "shared.yaml")
        assert "replicas 4-7 on dgx-a100, 5 micro-batches each" in outcome.stdout


def test_kinds_are_shown_with_the_cluster(meshwright):
    outcome = meshwright("specs", "show", CLUSTER)
    assert "# 2 x dgx-a100: 8 GPUs a100-sxm-80, 8 NICs, 200 GB/s per node" in outcome.stdout
    assert "island ampere: 2 nodes of dgx-a100, 200 GB/s per node inside" in outcome.stdout


def test_megatron_takes_uneven_stages_and_refuses_unequal_replicas(meshwright, written):
    assert meshwright("export", "staged.yaml", "--to", "megatron", "--out", "bundle").code == 0
    assert "t*28|t*12" in (written / "bundle" / "args.sh").read_text().replace("E", "")
    outcome = meshwright("export", "shared.yaml", "--to", "megatron", "--out", "other")
    assert outcome.code == 2
    assert "micro_batch_shares give replicas 5 to 11 micro-batches" in outcome.stderr


def test_an_export_says_which_kind_each_node_must_be(meshwright, written):
    outcome = meshwright("export", "staged.yaml", "--to", "megatron", "--out", "bundle")
    assert "nodes 0-1 dgx-h100, nodes 2-3 dgx-a100." in outcome.stdout
    comment, *lines = (written / "bundle" / "node-order.txt").read_text().splitlines()
    assert comment.startswith("# Number the nodes by kind (NODE_RANK)")
    assert lines == ["0 dgx-h100", "1 dgx-h100", "2 dgx-a100", "3 dgx-a100"]
    outcome = meshwright(
        "export", "staged.yaml", "--to", "megatron", "--out", "pods", "--launcher", "kubernetes"
    )
    assert outcome.code == 2
    assert "which kind of node" in outcome.stderr
    assert not (written / "pods").exists()


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("whatif staged.yaml --set gpu.memory=40GB", "whatif"),
        ("explain staged.yaml --against pp=4", "explain --against"),
        ("simulate staged.yaml --contention", "simulate --contention"),
        ("run staged.yaml --dry-run", "run"),
        (f"place --model qwen3-30b-a3b --cluster {CLUSTER} --synthetic weak --out placed", "place"),
        (
            f"plan --serve --model llama-3.1-8b --cluster {CLUSTER} --rate 4/s --input-length 512 "
            "--output-length 64",
            "plan --serve",
        ),
        (f"specs export {CLUSTER} --to simai", "specs export"),
    ],
)
def test_what_takes_one_kind_refuses_in_one_sentence(meshwright, written, line, asked):
    outcome = meshwright(*line.split())
    assert outcome.code == 2
    assert (
        f"mixes dgx-h100 and dgx-a100, and {asked} takes one kind of node; name a cluster" in outcome.stderr
    )
    assert "e.g. dgx-h100:2" in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_jitter_needs_equal_replicas(meshwright, written):
    assert meshwright("simulate", "staged.yaml", "--jitter", "2%", "--seeds", "2").code == 0
    outcome = meshwright("simulate", "shared.yaml", "--jitter", "2%")
    assert outcome.code == 2
    assert "jitter is drawn over equal replicas" in outcome.stderr
