"""Time and memory of iterations in which every rank has its own jitter, on up to 131,072 ranks.

    python benchmarks/jitter.py [--seeds 100]

Llama 3.1 405B, tp 8 x pp 16, micro-batch 1, operations 2 %, ranks 1 %. Every case runs in a process of its own;
"start" is imports, cost model and graph, "first" the first iteration (kernels loaded from their cache, or compiled
where there is none), "iteration" the next one, and the peak that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# (name, dp, vpp, global batch)
CASES = (
    ("1f1b, 16 micro-batches", 128, 1, 2048),
    ("1f1b, 128 micro-batches", 128, 1, 16384),
    ("interleaved x 8, 16 micro-batches", 128, 8, 2048),
    ("interleaved x 8, 128 micro-batches", 128, 8, 16384),
    ("interleaved x 8, 16 micro-batches", 1024, 8, 16384),
)


def main() -> None:
    """Run every case in a child process, or one case as such a child."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--case", type=int)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(*CASES[options.case][1:], options.seeds)))
        return
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH", ""))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    for case, (name, *_) in enumerate(CASES):
        command = [sys.executable, __file__, "--case", str(case), "--seeds", str(options.seeds)]
        child = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        figures = json.loads(child.stdout)
        print(
            f"{figures['ranks']:8,d} ranks  {name:36s} {figures['operations']:10,d} operations  "
            f"start {figures['start']:5.2f} s  first {figures['first']:5.2f} s  "
            f"iteration {figures['iteration']:6.3f} s  {options.seeds} seeds {figures['seeds']:6.2f} s  "
            f"peak {figures['peak']:4.0f} MiB  slowdown {figures['slowdown']:.4f}",
            flush=True,
        )


def measure(dp: int, vpp: int, global_batch_size: int, num_seeds: int) -> dict[str, float]:
    """Return the figures of one case."""
    started = time.perf_counter()
    from meshwright.costmodels.context import cost_context
    from meshwright.costmodels.iteration import iteration_costs
    from meshwright.hardware_specs.catalog import resolve_cluster
    from meshwright.simcore.domain.job import TrainingJob
    from meshwright.simcore.domain.model_catalog import load_model
    from meshwright.simcore.domain.plan import ParallelPlan, partition_layers
    from meshwright.simcore.domain.workload import TrainingWorkload
    from meshwright.simcore.training.iteration import iteration_time
    from meshwright.simcore.training.jitter import Jitter, rank_groups, simulate_jitter

    model = load_model("llama-3.1-405b")
    plan = ParallelPlan(
        dp=dp,
        tp=8,
        pp=16,
        vpp=vpp,
        sequence_parallel=True,
        micro_batch_size=1,
        schedule="1f1b" if vpp == 1 else "interleaved_1f1b",
        sharding="zero1",
        layers_per_stage=partition_layers(model.num_layers, 16 * vpp),
    )
    job = TrainingJob(
        model=model,
        cluster=resolve_cluster(f"dgx-h100:{plan.num_gpus // 8}"),
        software="megatron-core",
        workload=TrainingWorkload(global_batch_size=global_batch_size, sequence_length=8192),
    )
    costs = iteration_costs(cost_context(job), plan)
    groups, jitter = rank_groups(plan), Jitter(operation_spread=0.02, rank_spread=0.01)
    jitter_free = iteration_time(costs, plan.schedule)
    marks = [time.perf_counter()]
    without = simulate_jitter(costs, plan.schedule, groups, Jitter(), num_seeds=1)
    assert without.iteration_time[0] == jitter_free
    marks.append(time.perf_counter())
    simulate_jitter(costs, plan.schedule, groups, jitter, num_seeds=1)
    marks.append(time.perf_counter())
    result = simulate_jitter(costs, plan.schedule, groups, jitter, num_seeds=num_seeds)
    marks.append(time.perf_counter())
    return {
        "ranks": plan.num_gpus,
        "operations": 2 * costs.num_micro_batches * plan.pp * plan.vpp * dp,
        "start": marks[0] - started,
        "first": marks[1] - marks[0],
        "iteration": marks[2] - marks[1],
        "seeds": marks[3] - marks[2],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0,
        "slowdown": result.slowdown,
    }


if __name__ == "__main__":
    main()
