"""Print the speed and memory figures of the README, each measured here and now.

    python benchmarks/figures.py [--calculon CHECKOUT]

With a checkout of https://github.com/calculon-ai/calculon the same GPT-3 175B question is put to it in the
same run, so that the ratio does not depend on the machine. Run from an environment that has Meshwright.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GPT3 = (
    "--model",
    "gpt3-175b",
    "--cluster",
    "dgx-a100:128",
    "--global-batch-size",
    "1536",
    "--sequence-length",
    "2048",
    "--software",
    "megatron-2023",
)
# Calculon's own no-offload space for this question (its execution generator, counted with --dont-run).
CALCULON_PLANS = 1_693_208
# Plans of each set of degrees that the closed forms are timed on.
_SAMPLE = 10_000
# Times Calculon's evaluator on random members of that space, and reports evaluations per second.
_CALCULON = """
import json, logging, random, sys, time
sys.path.insert(0, sys.argv[1])
import calculon
from calculon.llm import Llm
log = logging.getLogger(); log.setLevel(logging.WARNING)
app = Llm.Application(json.load(open(sys.argv[1] + "/models/gpt3-175B.json")))
system = calculon.System(json.load(open(sys.argv[1] + "/systems/a100_80g.json")))
base = json.load(open(sys.argv[1] + "/examples/3072_t4_p64_d12_mbs4_full.json"))
rng, done, started = random.Random(0), 0, time.process_time()
while time.process_time() - started < 10:
    t, p = rng.choice([1, 2, 4, 8]), rng.choice([1, 2, 4, 8, 16, 32])
    d = 1024 // (t * p)
    micro = rng.choice([1, 2, 4])
    if 1536 % (d * micro):
        continue
    config = dict(base, num_procs=1024, tensor_par=t, pipeline_par=p, data_par=d, batch_size=1536,
                  microbatch_size=micro, activation_recompute=rng.choice(["full", "attn_only", "none"]))
    try:
        model = Llm(app, log)
        model.compile(system, Llm.Execution.from_json(config))
        model.run(system)
    except Llm.Error:
        pass
    done += 1
print(json.dumps(done / (time.process_time() - started)))
"""


def main() -> None:
    """Measure and print every figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--calculon", type=Path)
    options = parser.parse_args()
    print(
        f"closed-form plans scored      {closed_form_rate():14,.0f} per second on one core (bound and memory)"
    )
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "task_graph.py")], check=True, env=environment()
    )
    with tempfile.TemporaryDirectory() as scratch:
        cold = environment() | {"NUMBA_CACHE_DIR": str(Path(scratch) / "numba")}
        example = (
            "plan",
            str(ROOT / "examples" / "llama-3-70b-64xh100.yaml"),
            "--out",
            str(Path(scratch) / "plans"),
        )
        report("plan of the README example, first", example, cold)
        for _ in range(2):
            report("plan of the README example, after", example, cold)
        report("meshwright --help", ("--help",), cold)
        out = Path(scratch) / "gpt3"
        seconds = report("GPT-3 175B on 1,024 A100", ("plan", *GPT3, "--out", str(out)), cold)
        found = json.loads((out / "report.json").read_text())
    candidates = found["num_candidates"]
    print(
        f"  {candidates:,} plans, {found['num_feasible']:,} feasible, {found['num_simulated']} simulated exactly, "
        f"optimum certified: {found['is_certified']}"
    )
    if options.calculon:
        rate = float(
            subprocess.run(
                [sys.executable, "-c", _CALCULON, str(options.calculon)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        ours = candidates / seconds
        print(
            f"Calculon beside us            {rate:14,.1f} plans per second on one core; Meshwright {ours:,.0f} from "
            f"start to report: {ours / rate:,.0f} times. Its no-offload space of {CALCULON_PLANS:,} would take "
            f"{CALCULON_PLANS / rate / 3600:.1f} h."
        )


def environment() -> dict[str, str]:
    """Return the environment of child processes: one core's worth of threads, this checkout importable."""
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH", ""))))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def report(name: str, arguments: tuple[str, ...], env: dict[str, str]) -> float:
    """Run one command and print its wall seconds and peak memory; return the seconds."""
    program = (
        "import resource, subprocess, sys, time; t = time.perf_counter(); "
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); "
        "print(time.perf_counter() - t, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    child = subprocess.run(
        [sys.executable, "-c", program, sys.executable, "-m", "meshwright", *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=env,
    )
    seconds, kibibytes = (float(value) for value in child.stdout.split())
    print(f"{name:<36} {seconds:8.2f} s   peak {kibibytes / 1024:6.0f} MiB")
    return seconds


def closed_form_rate() -> float:
    """Return how many plans of the GPT-3 space are scored per CPU second: time bound and peak memory of each."""
    import numpy as np

    sys.path.insert(0, str(ROOT / "src"))
    from meshwright.costmodels.bound import iteration_time_bound
    from meshwright.costmodels.context import cost_context
    from meshwright.costmodels.memory import peak_memory
    from meshwright.hardware_specs.catalog import resolve_cluster
    from meshwright.planner.space import SearchLimits, space_blocks
    from meshwright.simcore.domain.job import TrainingJob
    from meshwright.simcore.domain.model_catalog import load_model
    from meshwright.simcore.domain.workload import TrainingWorkload

    job = TrainingJob(
        model=load_model("gpt3-175b"),
        cluster=resolve_cluster("dgx-a100:128"),
        software="megatron-2023",
        workload=TrainingWorkload(global_batch_size=1536, sequence_length=2048),
    )
    context = cost_context(job)
    rng = np.random.default_rng(0)
    whole = list(space_blocks(context, SearchLimits(), (job.cluster.num_gpus,)))
    # The space is too large to hold: as many plans of every set of degrees.
    blocks = [block.columns(np.sort(rng.integers(0, len(block), _SAMPLE))) for block in whole]
    best = 0.0
    for _ in range(3):
        started = time.process_time()
        for block in blocks:
            iteration_time_bound(context, block)
            peak_memory(context, block)
        best = max(best, sum(len(block) for block in blocks) / (time.process_time() - started))
    return best


if __name__ == "__main__":
    main()
