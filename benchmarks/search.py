"""Print how fast the plan search is, how much memory it takes, and whether it finds the optimum.

    python benchmarks/search.py [--jobs 500]

Three parts. The whole space of large questions, each in a process of its own, start and report included: plans counted,
those that fit, schedules simulated, whether the winner is certified, wall and CPU seconds, peak memory. Then the closed
forms alone: how many plans a core scores in a second when the bound of the time and the peak memory of every plan that
the rules leave are worked out, none skipped. Then random small jobs whose every feasible plan is simulated: the search
must return the same ranking.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from meshwright.costmodels.bound import iteration_time_bound
from meshwright.costmodels.context import CostContext, cost_context
from meshwright.costmodels.memory import activation_share, peak_memory, state_share
from meshwright.errors import InfeasiblePlanError
from meshwright.planner.choices import choices_left
from meshwright.planner.job_file import JobFlags, PlanRequest, read_request
from meshwright.planner.space import SearchLimits, space_blocks
from meshwright.planner.space_block import SpaceBlock, concatenate
from meshwright.simcore.schedules import SCHEDULES

ROOT = Path(__file__).resolve().parent.parent
# Blocks up to this many plans are scored as one mesh, larger ones by slices of that many.
_LARGEST_MESH = 2_000_000
# Rows scored one by one.
_NUM_ROWS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A job to plan, by flags of ``meshwright plan``."""

    name: str
    model: str
    cluster: str
    global_batch_size: int
    sequence_length: int
    software: str = "megatron-core"
    precision: str = "bf16"

    @property
    def flags(self) -> dict[str, object]:
        """What the command line is told."""
        return {
            "model": self.model,
            "cluster": self.cluster,
            "global_batch_size": self.global_batch_size,
            "sequence_length": self.sequence_length,
            "software": self.software,
            "precision": self.precision,
        }


QUESTIONS = (
    Question(
        name="Llama 3 70B, 64 H100",
        model="llama-3-70b",
        cluster="dgx-h100:8",
        global_batch_size=1024,
        sequence_length=8192,
    ),
    Question(
        name="GPT-3 175B, 1,024 A100, megatron-2023",
        model="gpt3-175b",
        cluster="dgx-a100:128",
        global_batch_size=1536,
        sequence_length=2048,
        software="megatron-2023",
    ),
    Question(
        name="GPT-3 175B, 1,024 A100, megatron-core",
        model="gpt3-175b",
        cluster="dgx-a100:128",
        global_batch_size=1536,
        sequence_length=2048,
    ),
    Question(
        name="GPT 1T, 16,384 H100",
        model="gpt-1t",
        cluster="dgx-h100:2048",
        global_batch_size=4096,
        sequence_length=2048,
    ),
    Question(
        name="Llama 3.1 405B, 16,384 H100",
        model="llama-3.1-405b",
        cluster="dgx-h100:2048",
        global_batch_size=2048,
        sequence_length=8192,
    ),
    Question(
        name="DeepSeek-V3, 2,048 H800, fp8",
        model="deepseek-v3",
        cluster="hgx-h800:256",
        global_batch_size=15_360,
        sequence_length=4096,
        precision="fp8",
    ),
)


def whole_search(question: Question) -> None:
    """Plan a question in a process of its own and print what it took."""
    flags = [
        part for key, value in question.flags.items() for part in (f"--{key.replace('_', '-')}", str(value))
    ]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "meshwright", "plan", *flags, "--out", folder, "--quiet", "--json"]
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ) as child:
            assert child.stdout is not None
            report = json.loads(child.stdout.read())
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - started
    certified = "certified" if report["is_certified"] else "NOT certified"
    winner = report["plans"][0]["prediction"]["iteration_time_seconds"]
    print(
        f"{question.name:<40} {report['num_candidates']:>14,} plans {report['num_feasible']:>12,} fit"
        f" {report['num_simulated']:>5} simulated, {certified}; {wall:6.1f} s wall"
        f" {usage.ru_utime + usage.ru_stime:6.1f} s CPU {usage.ru_maxrss / 1024:5.0f} MiB; winner {winner:.4g} s",
        flush=True,
    )


def closed_forms(question: Question) -> None:
    """Score every plan that the rules leave, all schedules among them, and print the rates."""
    request, context = resolved(question)
    limits = SearchLimits(
        allowed={"schedule": tuple(SCHEDULES)}, memory_headroom=request.limits.memory_headroom
    )
    num_plans, seconds, pieces, num_space = 0, 0.0, [], 0
    rng = np.random.default_rng(0)
    for block in space_blocks(context, limits, (context.cluster.num_gpus,)):
        num_space += len(block)
        choices = choices_left(context, block, limits, {})
        if not len(choices):
            continue
        left = block.restricted({name: np.flatnonzero(choices.joint((name,))) for name in block.axes})
        for part in slices(left):
            started = time.process_time()
            mesh = part.mesh(tuple(part.axes))
            memory = (activation_share(context, mesh).stages + state_share(context, mesh).stages).max(axis=0)
            bound = iteration_time_bound(context, mesh)
            seconds += time.process_time() - started
            assert np.broadcast_shapes(memory.shape, bound.shape) == part.shape
            num_plans += len(part)
        pieces.append(left.columns(np.sort(rng.integers(0, len(left), 4096))))
    rows = concatenate(pieces)
    rows = rows.take(np.sort(rng.choice(len(rows), min(_NUM_ROWS, len(rows)), replace=False)))
    started = time.process_time()
    peak_memory(context, rows)
    iteration_time_bound(context, rows)
    row_seconds = time.process_time() - started
    print(
        f"{question.name:<40} {num_plans:>12,} of {num_space:,} plans: {num_plans / seconds / 1e6:.2f} million a second"
        f" per core; {len(rows):,} plans picked at random, one row each: {len(rows) / row_seconds / 1e6:.2f} million",
        flush=True,
    )


def slices(block: SpaceBlock) -> list[SpaceBlock]:
    """Return a block in parts that are small enough to hold, cut along its layouts."""
    num_layouts = len(block.axes["layout"])
    step = max(1, math.floor(num_layouts * min(1.0, _LARGEST_MESH / len(block))))
    return [
        block.restricted({"layout": np.arange(start, min(start + step, num_layouts))})
        for start in range(0, num_layouts, step)
    ]


def resolved(question: Question) -> tuple[PlanRequest, CostContext]:
    request = read_request(None, JobFlags(**question.flags))  # type: ignore[arg-type]  # flags by their names
    return request, cost_context(request.job)


def optimality(num_jobs: int) -> None:
    """Search random small jobs and simulate all of their plans."""
    cases = search_cases()
    num_feasible = num_searched = num_equal = num_refused = seed = 0
    seconds = 0.0
    while num_searched < num_jobs:
        request = cases.random_request(seed)
        best, count, rejections = cases.brute_force(seed)
        seed += 1
        started = time.process_time()
        try:
            result = cases.run(request)
        except InfeasiblePlanError as error:
            num_refused += not count and error.rejections == rejections
            continue
        seconds += time.process_time() - started
        num_searched += 1
        num_feasible += count
        found = cases.winning_values(request, result)
        num_equal += (
            result.is_certified
            and result.num_feasible == count
            and result.rejections == rejections
            and np.allclose(found, best[: request.num_plans], rtol=1e-9, atol=0.0)
        )
    print(
        f"optimality: {num_equal} of {num_searched} random jobs ranked as by simulating all of their {num_feasible:,} "
        f"plans, counts of every constraint included; {seconds / num_searched:.2f} s CPU a search; "
        f"{num_refused} of {seed - num_searched} other jobs rightly refused"
    )


def search_cases() -> ModuleType:
    """Return the random jobs of the tests."""
    path = ROOT / "tests" / "planner" / "search" / "search_cases.py"
    spec = importlib.util.spec_from_file_location("search_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=500, help="random small jobs compared with brute force")
    options = parser.parse_args()
    for question in QUESTIONS:
        whole_search(question)
    for question in QUESTIONS[:4]:
        closed_forms(question)
    optimality(options.jobs)


if __name__ == "__main__":
    main()
