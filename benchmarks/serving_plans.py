"""Print how fast serving plans are found, and how far the closed-form ranking lies from the simulated one.

    python benchmarks/serving_plans.py [--repeat 3]

Two questions that were also put to AIConfigurator 0.12.0 on two cores: Qwen3-32B in fp8 on 32 x H200 with TensorRT-LLM
(its search took 14.7 s, 21.8 s with start-up), and DeepSeek-R1 on 64 x H200 with SGLang (213 s with start-up). Each runs
in a process of its own, start and report included: once ranked by the bounds alone, once with at least five shapes
simulated, each at the highest load that keeps both limits. AIConfigurator's limits are on means, and so are these.
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
from dataclasses import dataclass
from pathlib import Path

SHAPES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A serving job, by flags of ``meshwright plan --serve``, and a peer's time for it [s]."""

    name: str
    flags: tuple[str, ...]
    peer_seconds: float
    bounds_goal: float


QUESTIONS = (
    Question(
        name="Qwen3-32B fp8, 32 x H200, trtllm",
        flags=(
            *("--model", "qwen3-32b", "--cluster", "dgx-h200:4", "--engine", "trtllm", "--precision", "fp8"),
            *("--input-length", "4000", "--output-length", "1000", "--rate", "8 /s"),
            *("--ttft-mean", "2 s", "--tpot-mean", "30 ms"),
        ),
        peer_seconds=14.7,
        bounds_goal=2.0,
    ),
    Question(
        name="DeepSeek-R1 fp8_block, 64 x H200, sglang",
        flags=(
            *(
                "--model",
                "deepseek-r1",
                "--cluster",
                "dgx-h200:8",
                "--engine",
                "sglang",
                "--precision",
                "fp8_block",
            ),
            *("--input-length", "4096", "--output-length", "1024", "--rate", "8 /s"),
            *("--ttft-mean", "3 s", "--tpot-mean", "50 ms"),
        ),
        peer_seconds=213.0,
        bounds_goal=10.0,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One process: wall and CPU seconds, peak memory [B], and the report it wrote."""

    wall: float
    cpu: float
    memory: int
    report: dict[str, object]


def run(question: Question, shapes: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "meshwright", "plan", "--serve", *question.flags),
            *("--verify", str(shapes), "--out", folder, "--quiet"),
        ]
        # As where it is installed: compiled modules are kept from run to run.
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=kept) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - started
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit {process.returncode}")
        report = json.loads((Path(folder) / "report.json").read_text())
    return Run(wall=wall, cpu=usage.ru_utime + usage.ru_stime, memory=usage.ru_maxrss * 1024, report=report)


def best(runs: list[Run]) -> Run:
    """Return the run with the least CPU time: neighbours only ever add."""
    return min(runs, key=lambda each: each.cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the quickest counts [3]")
    repeat = parser.parse_args().repeat
    # The first run compiles and fills the kernel cache.
    run(QUESTIONS[0], SHAPES)
    for question in QUESTIONS:
        print(question.name)
        for label, shapes, goal in (("bounds", 0, question.bounds_goal), ("simulated", SHAPES, 30.0)):
            runs = [run(question, shapes) for _ in range(repeat)]
            chosen, report = best(runs), best(runs).report
            walls = statistics.median(each.wall for each in runs)
            print(
                f"  {label:<10} CPU {chosen.cpu:6.2f} s, wall {chosen.wall:6.2f} s (median {walls:.2f} s), without start-up "
                f"{min(float(str(each.report['search_seconds'])) for each in runs):.2f} s, "
                f"{chosen.memory / 2**20:.0f} MiB; goal {goal:g} s, AIConfigurator {question.peer_seconds:g} s; "
                f"{report['num_candidates']:,} configurations, {report['num_within_limits']:,} within the limits, "
                f"{report['num_simulated']} simulated in {report['num_runs']} runs"
                + (", certified" if report["is_certified"] else "")
            )
        plans = report["plans"]
        assert isinstance(plans, list)
        gaps = []
        for place, entry in enumerate(plans[:SHAPES], start=1):
            figures, plan = entry["prediction"], entry["plan"]
            gaps.append(figures["load"] / figures["load_bound"])
            pools = " + ".join(
                f"{pool['num_replicas']} x {pool['role']} tp {pool['tp']} pp {pool['pp']} attention_dp "
                f"{pool.get('attention_dp', 1)} ep {pool.get('ep', 1)}"
                for pool in plan["pools"]
            )
            print(
                f"  {place}. {figures['output_tokens_per_second_per_gpu']:7,.0f} tokens/s/GPU, "
                f"{figures['tokens_per_second_per_user']:5.1f} tokens/s/user, TTFT {figures['ttft_mean_seconds']:.2f} s: {pools}"
            )
        print(f"  simulated load over its bound: {min(gaps):.2f} to {max(gaps):.2f}")


if __name__ == "__main__":
    main()
