"""Print how fast the plan search is, how much memory it takes, and whether it finds the optimum.

    python benchmarks/search.py [--jobs 500]

Three parts. The whole space of large questions, each in a process of its own, start and report included: plans counted,
those that fit, schedules simulated, whether the winner is certified, wall and CPU seconds, peak memory. Then the closed
forms alone: how many plans a core scores in a second when the bound of the time and the peak memory of every plan that
the rules leave are worked out, none skipped. Plans that the rules reject do not count, though some of them are scored
with the others; how many is said too. Then random small jobs whose every feasible plan is simulated: the search must
return the same ranking.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.bound import iteration_time_bound
from meshwright.costmodels.context import CostContext, cost_context
from meshwright.costmodels.memory import peak_memory
from meshwright.errors import InfeasiblePlanError
from meshwright.planner.axes import Axis
from meshwright.planner.choices import Choices, choices_left
from meshwright.planner.job_file import JobFlags, PlanRequest, read_request
from meshwright.planner.space import SearchLimits, space_blocks
from meshwright.planner.space_block import SpaceBlock
from meshwright.simcore.schedules import SCHEDULES

ROOT = Path(__file__).resolve().parent.parent
# Plans that are scored as one mesh.
_MESH_PLANS = 250_000
# Axes whose options are the same for all degrees.
_SHARED_AXES = ("recompute", "offload")
# Of as many the fastest counts, as it was disturbed the least.
_NUM_PASSES = 3
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
    blocks = list(space_blocks(context, limits, (context.cluster.num_gpus,)))
    choices = [each for each in (choices_left(context, block, limits, {}) for block in blocks) if len(each)]
    num_left, whole = sum(map(len, choices)), joined(choices)
    seconds = min(scoring_time(context, whole) for _ in range(_NUM_PASSES))
    rows = whole.columns(np.sort(np.random.default_rng(0).integers(0, len(whole), _NUM_ROWS)))
    started = time.process_time()
    peak_memory(context, rows)
    iteration_time_bound(context, rows)
    row_seconds = time.process_time() - started
    print(
        f"{question.name:<40} {num_left:>12,} of {sum(map(len, blocks)):,} plans, {len(whole):,} scored in "
        f"{seconds:.2f} s: {num_left / seconds / 1e6:.2f} million a second per core; {len(rows):,} plans picked at "
        f"random, one row each: {len(rows) / row_seconds / 1e6:.2f} million",
        flush=True,
    )


def scoring_time(context: CostContext, block: SpaceBlock) -> float:
    """Score every plan of a block and return the CPU seconds that took."""
    started = time.process_time()
    for part in slices(block):
        mesh = part.mesh(tuple(part.axes))
        memory, bound = peak_memory(context, mesh), iteration_time_bound(context, mesh)
        assert np.broadcast_shapes(memory.shape, bound.shape) == part.shape
    return time.process_time() - started


def joined(choices: Sequence[Choices]) -> SpaceBlock:
    """Return a product that holds all plans that are left of some blocks, and some that are not.

    The axes that depend on no degree stay; all else that is left of the blocks becomes the last axis.
    """
    same = [name for name, axis in choices[0].block.axes.items() if name in _SHARED_AXES]
    alive = {name: np.any([each.joint((name,)) for each in choices], axis=0) for name in same}
    axes = {
        name: choices[0].block.restricted({name: np.flatnonzero(alive[name])}).axes[name] for name in same
    }
    columns: dict[str, list[NDArray[np.generic]]] = {}
    for each in choices:
        others = tuple(name for name in each.block.axes if name not in same)
        options = np.argwhere(each.joint(others)).T
        for name, degree in each.block.degrees.items():
            columns.setdefault(name, []).append(np.full(options.shape[1], degree))
        for name, chosen in zip(others, options, strict=True):
            for column, values in each.block.axes[name].columns.items():
                columns.setdefault(column, []).append(values[chosen])
    last = Axis(columns={name: np.concatenate(parts) for name, parts in columns.items()})
    return replace(choices[0].block, degrees={}, axes={**axes, "others": last})


def slices(block: SpaceBlock) -> Iterator[SpaceBlock]:
    """Yield a block in parts that the caches hold, cut along its last axis."""
    *_, (name, axis) = block.axes.items()
    num_parts = max(1, round(len(block) / _MESH_PLANS))
    for part in np.array_split(np.arange(len(axis)), num_parts):
        yield block.restricted({name: part})


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
    for question in QUESTIONS[:5]:
        closed_forms(question)
    optimality(options.jobs)


if __name__ == "__main__":
    main()
