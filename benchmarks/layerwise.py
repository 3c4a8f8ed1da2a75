"""What layer-wise plans gain where memory is tight, and how long the search for them takes.

    python benchmarks/layerwise.py

The first job is the one Galvatron's search engine (Hetu-Galvatron cea12ff) was timed on: Llama-2-7B, sequences of
2048, global batch 64, 8 GPUs with 38 GB each; 50 layer strategies, 122 tasks, 163.7 CPU-seconds of its C++ dynamic
program over a 1 MB grid of memory. Ours reads no profile: every strategy is costed from the catalog as well. CPU-seconds
of one process, compiled kernels warm (a first search runs before the clock starts).

Each job is searched three times: against all uniform plans; without offload, which layer-wise plans go without; and
without schedules of several chunks per stage either. Layer-wise plans have no offload and one chunk in all three.
"""

from __future__ import annotations

import time
from dataclasses import replace

from meshwright.costmodels.context import cost_context
from meshwright.errors import InfeasiblePlanError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.search import SEARCHES, SearchRequest, SearchResult
from meshwright.planner.space import SearchLimits
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.layer_groups import layer_groups_text
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.workload import TrainingWorkload
from meshwright.simcore.schedules import SCHEDULES

# Model, cluster, global batch, sequence length.
JOBS = (
    ("llama-2-7b", "dgx-a100-40:1", 64, 2048),
    ("llama-2-7b", "rtx-4090-8:1", 32, 4096),
    ("llama-3-8b", "rtx-4090-8:1", 16, 4096),
    ("llama-3-8b", "dgx-a100-40:1", 16, 8192),
    ("llama-2-13b", "dgx-a100-40:1", 64, 4096),
    ("llama-3-70b", "dgx-a100-40:8", 256, 8192),
)
# 38 of 40 GB for the first job, and a usual reserve for the others.
HEADROOM = 0.05
WITHOUT_OFFLOAD = {
    "optimizer_offload": ("none",),
    "parameter_offload": ("none",),
    "activation_offload": (False,),
}
# One chunk per stage, as layer-wise plans have.
ONE_CHUNK = {**WITHOUT_OFFLOAD, "schedule": ("none", "1f1b")}


def request_of(job: tuple[str, str, int, int]) -> SearchRequest:
    """Return the search of a job."""
    model, cluster, batch, length = job
    training = TrainingJob(
        model=load_model(model),
        cluster=resolve_cluster(cluster),
        workload=TrainingWorkload(global_batch_size=batch, sequence_length=length),
        software="megatron-core",
    )
    return SearchRequest(
        job=training, context=cost_context(training), limits=SearchLimits(memory_headroom=HEADROOM)
    )


def searched(request: SearchRequest, name: str) -> tuple[SearchResult | None, float]:
    """Return what a search found and its CPU-seconds."""
    begin = time.process_time()
    try:
        result = SEARCHES[name].run(request, lambda doing, done, total: None)
    except InfeasiblePlanError:
        return None, time.process_time() - begin
    return result, time.process_time() - begin


def words(plan: ParallelPlan) -> str:
    """Return a plan in words."""
    if plan.layer_groups:
        return layer_groups_text(plan)
    return (
        f"tp {plan.tp} cp {plan.cp} pp {plan.pp} vpp {plan.vpp} dp {plan.dp} {plan.schedule}, {plan.sharding}, recompute "
        f"{plan.recompute}, offload {plan.optimizer_offload}, activations {'out' if plan.activation_offload else 'kept'}"
    )


def report(
    job: tuple[str, str, int, int], kind: str, allowed: dict[str, tuple[int | str | bool, ...]]
) -> None:
    """Print one job under one kind of restriction."""
    request = request_of(job)
    request = replace(request, limits=replace(request.limits, allowed=allowed))
    uniform, uniform_seconds = searched(request, "exhaustive")
    layered, seconds = searched(request, "layerwise")
    print(f"{' '.join(map(str, job))}, {kind}")
    if layered is None:
        print("  nothing fits")
        return
    winner = layered.ranked[0]
    if uniform is None:
        print("  no uniform plan fits")
    else:
        best = uniform.ranked[0].prediction.iteration_time
        gain = best / winner.prediction.iteration_time - 1.0
        print(f"  uniform     {best:9.4f} s  {uniform_seconds:6.2f} CPU-s  {words(uniform.ranked[0].plan)}")
        print(f"  gain        {gain:9.2%}")
    print(
        f"  layer-wise  {winner.prediction.iteration_time:9.4f} s  {seconds - uniform_seconds:6.2f} CPU-s more"
        f"  {words(winner.plan)}\n  {layered.notes[0]} Certified: {layered.is_certified}"
    )


if __name__ == "__main__":
    searched(request_of(JOBS[0]), "layerwise")
    everything = {"schedule": tuple(SCHEDULES)}
    for each in JOBS:
        report(each, "all uniform plans", dict(everything))
        report(each, "no offload", dict(WITHOUT_OFFLOAD))
        report(each, "no offload, one chunk per stage", dict(ONE_CHUNK))
