"""Compute and optimizer of the executor on this machine's processor against their predictions, in interleaved CPU time.

Worlds of one and of two processes, a thread each: all processes of a world take turns between a few seconds of the
profiler's matrix products, copies and optimizer steps and a few steps of a small model, so that a neighbour who comes
and goes, and the other process, slow both alike. Compared is the CPU time of the thread that computes, as the median
over all turns, with the prediction from a calibration of that world's own profile; nothing is fitted to steps.

Run: python benchmarks/executor.py [--rounds 3] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from meshwright.costmodels.breakdown import iteration_breakdown
from meshwright.costmodels.calibration_writing import calibration_text
from meshwright.costmodels.context import cost_context
from meshwright.costmodels.prediction import predict
from meshwright.hardware_specs.catalog import load_gpu, resolve_cluster
from meshwright.profiler.device import discover_device
from meshwright.profiler.executor.comparison import Comparison, compare
from meshwright.profiler.executor.launch import KEEPS_PAGES
from meshwright.profiler.executor.recording import Recorder
from meshwright.profiler.executor.report import RankReport, merge_reports
from meshwright.profiler.executor.worker import execute
from meshwright.profiler.fitting.calibrate import calibrate
from meshwright.profiler.profile import run_profile
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.store import read_measurements
from meshwright.simcore.domain.execution import Execution
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.workload import TrainingWorkload

# Thirty shapes are the least an operator is fitted to.
POINTS = {"gemm": 45, "gemm_dgrad": 30, "gemm_wgrad": 30, "copies": 6, "streaming": 5}
SUITES = ("gemm", "copies", "optimizer")
NUM_STEPS = 2
# Of the profile between two cases, and for what it lacks in the end.
SLICE_SECONDS, REST_SECONDS = 5.0, 600.0
TERMS = ("compute in CPU time", "optimizer in CPU time")
GOAL = 0.20


@dataclass(frozen=True, slots=True)
class Case:
    """A small training job: layers, widths, micro-batch and how it is laid out."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    sequence: int
    micro_batch: int
    layout: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 0

    @property
    def label(self) -> str:
        """Name in the table."""
        layout = ", ".join(f"{name} {value}" for name, value in self.layout.items() if name != "schedule")
        return (
            f"{self.layers} x {self.hidden}, ffn {self.ffn}, heads {self.heads}/{self.kv_heads}, "
            f"{self.micro_batch} x {self.sequence}{', ' if layout else ''}{layout}"
        )

    @property
    def plan(self) -> ParallelPlan:
        """Layout."""
        pp = self.layout.get("pp", 1)
        settings = {"dp": 1, "schedule": "none", **self.layout}
        return ParallelPlan(
            micro_batch_size=self.micro_batch, layers_per_stage=(self.layers // pp,) * pp, **settings
        )

    @property
    def job(self) -> TrainingJob:
        """Model, tokens of a step, and as many processes of this host as the plan needs."""
        model = ModelSpec(
            name="small",
            num_layers=self.layers,
            hidden_size=self.hidden,
            ffn_hidden_size=self.ffn,
            num_attention_heads=self.heads,
            num_query_groups=self.kv_heads,
            head_dim=self.hidden // self.heads,
            vocab_size=self.vocab,
            max_position_embeddings=2048,
            is_gated_mlp=True,
            has_tied_embeddings=False,
        )
        batch = self.batch or 2 * self.micro_batch * self.plan.dp
        workload = TrainingWorkload(global_batch_size=batch, sequence_length=self.sequence, precision="fp32")
        cluster = resolve_cluster("cpu-host-1:1")
        cluster = replace(cluster, node=replace(cluster.node, num_gpus=self.plan.num_gpus))
        return TrainingJob(model=model, cluster=cluster, workload=workload, software="meshwright-executor")


FULL = {"recompute": "full"}
PIPELINE = {"pp": 2, "schedule": "1f1b"}
CASES: Mapping[int, Sequence[Case]] = {
    1: (
        Case(4, 256, 768, 4, 4, 2048, 128, 4),
        Case(4, 256, 768, 4, 2, 2048, 128, 1),
        Case(2, 512, 1536, 8, 8, 2048, 128, 2),
        Case(3, 384, 1024, 6, 6, 4096, 256, 1),
        Case(2, 256, 768, 4, 4, 2048, 512, 1),
        Case(2, 256, 768, 4, 1, 2048, 256, 2, FULL),
        Case(2, 768, 2048, 12, 4, 1024, 128, 1, batch=1),
    ),
    2: (
        Case(4, 256, 768, 4, 2, 2048, 128, 2, {"dp": 2}),
        Case(2, 512, 1536, 8, 8, 2048, 128, 1, {"dp": 2, "sharding": "zero1", **FULL}),
        Case(4, 256, 768, 4, 2, 2048, 128, 2, {"dp": 2, "sharding": "zero3"}),
        Case(4, 256, 768, 4, 4, 2048, 128, 2, {"tp": 2}),
        Case(2, 512, 1536, 8, 8, 2048, 128, 2, {"tp": 2, "sequence_parallel": True}),
        Case(4, 256, 768, 4, 2, 2048, 128, 2, PIPELINE, batch=8),
        Case(4, 384, 1024, 6, 6, 1024, 256, 1, {**PIPELINE, **FULL}, batch=4),
    ),
}


def main() -> None:
    """Measure, predict and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns of each model, and passes of the profile"
    )
    parser.add_argument("--keep", type=Path, help="existing folder for the measurements and the calibrations")
    parser.add_argument("--rank", nargs=2, type=int, metavar=("RANK", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        measure(options.keep, options.rounds, *options.rank)
        return
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        for size in CASES:
            start(folder, options.rounds, size)
            report(folder, size)
    print(f"{time.perf_counter() - begin:.0f} s, load average {os.getloadavg()[0]:.1f} at the end")


def start(folder: Path, rounds: int, size: int) -> None:
    """Run the processes of a world to their end."""
    # What the workers of a run are started with.
    environment = {**os.environ, **KEEPS_PAGES, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, "--rounds", str(rounds), "--keep", str(folder), "--rank"]
    processes = [
        subprocess.Popen([*words, str(rank), str(size)], env=environment, stdout=subprocess.DEVNULL)
        for rank in range(size)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"a process of {size} failed")


def measure(folder: Path, rounds: int, rank: int, size: int) -> None:
    """Alternate slices of the profile with steps of every case, as one process; write what its steps took."""
    torch.set_num_threads(1)
    device = discover_device("cpu")
    store = distributed.FileStore(str(folder / f"meeting{size}"), size)
    distributed.init_process_group("gloo", rank=rank, world_size=size, store=store)
    steps: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    stages: dict[str, int] = {}
    path = folder / f"world{size}.{rank}.jsonl"
    for turn in range(rounds * len(CASES[size])):
        case = CASES[size][turn % len(CASES[size])]
        distributed.barrier()
        run_profile(path, device, settings(rounds, SLICE_SECONDS))
        distributed.barrier()
        recorder = Recorder(rank, None, torch.device("cpu"))
        mesh = execute(execution(case), recorder)
        stages[case.label] = mesh.at.pp
        mesh.destroy()
        steps[case.label] += [step.phase_cpu_seconds for step in recorder.steps[1:]]
    run_profile(path, device, settings(rounds, REST_SECONDS))
    distributed.destroy_process_group()
    written = {label: {"stage": stages[label], "steps": rows} for label, rows in steps.items()}
    (folder / f"steps{size}.{rank}.json").write_text(json.dumps(written), encoding="utf-8")


def settings(rounds: int, seconds: float) -> ProfileSettings:
    """Return the settings of a profile that ends, or pauses, after some seconds."""
    return ProfileSettings(
        points=POINTS, precisions=("fp32",), suites=SUITES, num_passes=rounds, max_seconds=seconds
    )


def execution(case: Case) -> Execution:
    """Return a few steps of a case after one that warms up."""
    job = case.job
    return Execution(
        model=job.model,
        plan=case.plan,
        workload=job.workload,
        device="cpu",
        num_steps=NUM_STEPS,
        num_warmup_steps=1,
    )


def report(folder: Path, size: int) -> None:
    """Print predicted against measured of every case of a world."""
    # All ranks did the same: the first one's measurements are a world's.
    measurements = read_measurements([folder / f"world{size}.0.jsonl"])
    calibration = folder / f"world{size}.calibration.json"
    result = calibrate(measurements, load_gpu(measurements.gpu), name=f"world{size}")
    calibration.write_text(calibration_text(result.document), encoding="utf-8")
    ranks = [json.loads((folder / f"steps{size}.{rank}.json").read_text()) for rank in range(size)]
    title = f"{size} process{'es' if size > 1 else ''}, predicted against measured"
    print(f"{title:<66} {'compute':>28} {'optimizer':>30}")
    errors: dict[str, list[float]] = {name: [] for name in TERMS}
    for case in CASES[size]:
        comparison = compared(case, [rank[case.label] for rank in ranks], calibration)
        cells = []
        for name in TERMS:
            term = comparison.term(name)
            error = term.predicted / term.measured - 1.0
            errors[name].append(error)
            cells.append(f"{1e3 * term.predicted:7.1f} {1e3 * term.measured:7.1f} ms {error:+7.1%}")
        print(f"{case.label:<66} {'    '.join(cells)}")
    for name, signed in errors.items():
        sizes = [abs(error) for error in signed]
        print(
            f"{name}: {sum(each <= GOAL for each in sizes)} of {len(sizes)} within {GOAL:.0%}; mean error"
            f" {statistics.fmean(sizes):.1%}, median {statistics.median(signed):+.1%}, largest {max(sizes):.1%}"
        )


def compared(case: Case, ranks: Sequence[Mapping[str, Any]], calibration: Path) -> Comparison:
    """Return what was predicted of a case beside what its ranks measured."""
    reports = []
    for number, rank in enumerate(ranks):
        phases = {name for step in rank["steps"] for name in step}
        reports.append(
            RankReport(
                rank=number,
                stage=rank["stage"],
                device="cpu",
                step_seconds=tuple(sum(step.values()) for step in rank["steps"]),
                phase_cpu_seconds={
                    name: tuple(step.get(name, 0.0) for step in rank["steps"]) for name in phases
                },
            )
        )
    context = cost_context(case.job, calibration_paths=(calibration,))
    prediction = predict(context, case.plan)
    breakdown = iteration_breakdown(context, case.plan, prediction.iteration)
    return compare(
        case.plan, prediction, breakdown, merge_reports(reports), device="cpu", is_same_device=True
    )


if __name__ == "__main__":
    main()
