"""Compute of the executor on this machine's processor against its prediction, both in CPU time and interleaved.

Rounds alternate one pass of the profiler's matrix products and copies with steps of small models, all in this process
on one thread, so that a neighbour who comes and goes slows both. Compared is the CPU time of forward and backward, as
the median over all rounds, on models that no calibration has seen: once with a calibration of the profile alone, and
once with constants of the software fitted to steps of four other models on top of it (``calibrate --from runs``).

Run: python benchmarks/executor.py [--rounds 3] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshwright.profiler.executor.launch import KEEPS_PAGES

if any(os.environ.get(name) != value for name, value in KEEPS_PAGES.items()):
    # What the workers of a run are started with; the C library reads it when a process begins.
    os.environ.update({**KEEPS_PAGES, "OMP_NUM_THREADS": "1"})
    os.execv(sys.executable, [sys.executable, *sys.argv])

import torch
from torch import distributed

from meshwright.costmodels.breakdown import iteration_breakdown
from meshwright.costmodels.calibration_writing import calibration_text
from meshwright.costmodels.context import cost_context
from meshwright.costmodels.prediction import predict
from meshwright.hardware_specs.catalog import load_gpu, resolve_cluster
from meshwright.profiler.device import Device, discover_device
from meshwright.profiler.executor.evidence import append_row, measured_row
from meshwright.profiler.executor.recording import Recorder, StepRecord
from meshwright.profiler.executor.report import RankReport, merge_reports
from meshwright.profiler.executor.worker import execute
from meshwright.profiler.fitting.calibrate import calibrate
from meshwright.profiler.fitting.software import fit_software, software_documents
from meshwright.profiler.measured_runs import read_measured_runs
from meshwright.profiler.profile import run_profile
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.store import read_measurements
from meshwright.simcore.domain.execution import Execution
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.plan import ParallelPlan, Recompute
from meshwright.simcore.domain.workload import TrainingWorkload

SOFTWARE = "meshwright-executor"
COMPUTE = ("compute", "recompute", "embedding and head")
PHASES = ("forward", "backward")
# Thirty shapes are the least an operator is fitted to.
POINTS = {"gemm": 45, "gemm_dgrad": 30, "gemm_wgrad": 30, "copies": 6}
# What a loop over one product and one copy cannot tell: how products do among other work, and element-wise kernels.
CONSTANTS = ("sustained_clock.bf16", "elementwise_factor")
GOAL = 0.20


@dataclass(frozen=True)
class Case:
    """A small training job on one process: layers, widths, tokens, recompute."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    sequence: int
    micro_batch: int
    num_micro_batches: int = 2
    recompute: Recompute = "none"

    @property
    def label(self) -> str:
        """Name in the table."""
        return (
            f"{self.layers} x {self.hidden}, ffn {self.ffn}, heads {self.heads}/{self.kv_heads}, "
            f"{self.micro_batch} x {self.sequence}, {self.recompute}"
        )

    @property
    def model(self) -> ModelSpec:
        """The transformer."""
        return ModelSpec(
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

    @property
    def plan(self) -> ParallelPlan:
        """One process."""
        return ParallelPlan(
            dp=1,
            micro_batch_size=self.micro_batch,
            schedule="none",
            recompute=self.recompute,
            layers_per_stage=(self.layers,),
        )

    @property
    def workload(self) -> TrainingWorkload:
        """Tokens of a step."""
        return TrainingWorkload(
            global_batch_size=self.micro_batch * self.num_micro_batches,
            sequence_length=self.sequence,
            precision="fp32",
        )


FITTED = (
    Case(2, 256, 1024, 4, 4, 1024, 256, 1),
    Case(2, 384, 1536, 6, 6, 1024, 128, 2),
    Case(1, 512, 1024, 8, 8, 3072, 256, 1),
    Case(2, 320, 896, 5, 5, 2048, 64, 1),
)
HELD_OUT = (
    Case(4, 256, 768, 4, 4, 2048, 128, 4),
    Case(4, 256, 768, 4, 2, 2048, 128, 1),
    Case(2, 512, 1536, 8, 8, 2048, 128, 2),
    Case(3, 384, 1024, 6, 6, 4096, 256, 1),
    Case(2, 256, 768, 4, 4, 2048, 512, 1),
    Case(2, 256, 768, 4, 1, 2048, 256, 2, recompute="full"),
    Case(2, 768, 2048, 12, 4, 1024, 128, 1, num_micro_batches=1),
)


def main() -> None:
    """Measure, predict and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="passes of the profile, and of the steps")
    parser.add_argument("--keep", type=Path, help="existing folder for the measurements and the calibration")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        steps = measure(folder, options.rounds)
        host = fit_profile(folder)
        report("profile alone", steps, (host,))
        stack = fit_steps(folder, steps, host)
        report("profile and the steps of four other models", steps, (host, stack))
    print(f"{time.perf_counter() - begin:.0f} s, load average {os.getloadavg()[0]:.1f} at the end")


def measure(folder: Path, rounds: int) -> dict[Case, list[StepRecord]]:
    """Alternate passes of the profile with steps of every case."""
    device = discover_device("cpu")
    steps: dict[Case, list[StepRecord]] = {case: [] for case in (*FITTED, *HELD_OUT)}
    store = distributed.FileStore(str(folder / "meeting"), 1)
    distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    for index in range(rounds):
        profile(folder / "host.jsonl", device, index)
        for case in steps:
            steps[case] += run_steps(case)
    distributed.destroy_process_group()
    return steps


def profile(path: Path, device: Device, index: int) -> None:
    """Measure every shape once more."""
    settings = ProfileSettings(
        points=POINTS, precisions=("fp32",), suites=("gemm", "copies"), num_passes=index + 1
    )
    run_profile(path, device, settings)


def run_steps(case: Case, num_steps: int = 2) -> list[StepRecord]:
    """Run a few steps after one that warms up."""
    execution = Execution(
        model=case.model,
        plan=case.plan,
        workload=case.workload,
        device="cpu",
        num_steps=num_steps,
        num_warmup_steps=1,
    )
    recorder = Recorder(0, None, torch.device("cpu"))
    execute(execution, recorder)
    return recorder.steps[1:]


def fit_profile(folder: Path) -> Path:
    """Return the calibration of what was profiled."""
    measurements = read_measurements([folder / "host.jsonl"])
    result = calibrate(measurements, load_gpu(measurements.gpu), name="host")
    path = folder / "host.calibration.json"
    path.write_text(calibration_text(result.document), encoding="utf-8")
    return path


def fit_steps(folder: Path, steps: Mapping[Case, list[StepRecord]], host: Path) -> Path:
    """Return the calibration of the software, fitted to some of the steps as to any table of measured runs."""
    table = folder / "runs.csv"
    table.unlink(missing_ok=True)
    for case in FITTED:
        # What is not compared is taken as predicted, so that it moves nothing.
        rest = sum(prediction(case, (host,)).values()) - predicted_compute(case, (host,))
        seconds = statistics.median(compute_times(steps[case])) + rest
        rank = RankReport(rank=0, stage=0, device="cpu", step_seconds=(seconds,))
        append_row(table, measured_row(job_of(case), case.plan, merge_reports([rank]), "fitted"))
    fit = fit_software(read_measured_runs(table), SOFTWARE, constants=CONSTANTS, calibration_paths=(host,))
    moved = {**fit.constants, **{f"clock {gpu}": dict(each) for gpu, each in fit.sustained_clock.items()}}
    print(f"fitted to {fit.num_rows} models: {moved}; left-out error {fit.error_left_out.mean:.1%}")
    path = folder / "stack.calibration.json"
    path.write_text(calibration_text(software_documents(fit, table, "stack")[0]), encoding="utf-8")
    return path


def job_of(case: Case) -> TrainingJob:
    """Return the job of a case on one process of this host."""
    return TrainingJob(
        model=case.model,
        cluster=resolve_cluster("cpu-host-1:1"),
        workload=case.workload,
        software=SOFTWARE,
    )


def prediction(case: Case, calibrations: Sequence[Path]) -> Mapping[str, float]:
    """Return the predicted seconds of a step by group of terms."""
    context = cost_context(job_of(case), calibration_paths=calibrations)
    return iteration_breakdown(context, case.plan, predict(context, case.plan).iteration).grouped(0)


def predicted_compute(case: Case, calibrations: Sequence[Path]) -> float:
    """Return the predicted seconds of forward and backward."""
    grouped = prediction(case, calibrations)
    return sum(grouped[group] for group in COMPUTE)


def compute_times(records: Sequence[StepRecord]) -> list[float]:
    """Return the CPU seconds of forward and backward of each step."""
    return [sum(record.phase_cpu_seconds[phase] for phase in PHASES) for record in records]


def report(title: str, steps: Mapping[Case, list[StepRecord]], calibrations: Sequence[Path]) -> None:
    """Print predicted against measured of every model that was held out."""
    print(f"{title:<62} predicted  measured     error  CV of steps")
    errors = []
    for case in HELD_OUT:
        times = compute_times(steps[case])
        predicted, measured = predicted_compute(case, calibrations), statistics.median(times)
        errors.append(predicted / measured - 1.0)
        spread = statistics.stdev(times) / statistics.fmean(times)
        print(
            f"{case.label:<62} {1e3 * predicted:6.1f} ms {1e3 * measured:6.1f} ms"
            f"  {errors[-1]:+8.1%}  {spread:8.1%}"
        )
    sizes = [abs(error) for error in errors]
    print(
        f"{sum(size <= GOAL for size in sizes)} of {len(sizes)} within {GOAL:.0%}; mean error"
        f" {statistics.fmean(sizes):.1%}, median {statistics.median(errors):+.1%}, largest {max(sizes):.1%}"
    )


if __name__ == "__main__":
    main()
