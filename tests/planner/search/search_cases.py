"""Searches the tests of this folder share: small jobs, random ones with every lever, and brute force."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from meshwright.costmodels.context import cost_context
from meshwright.costmodels.iteration import uniform_costs
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.constraints import apply_constraints
from meshwright.planner.objectives import Objective, objective_values, world_sizes
from meshwright.planner.search import SEARCHES, SearchRequest, SearchResult
from meshwright.planner.space import SearchLimits, enumerate_space, plan_of_row
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import CP_METHODS, RECOMPUTES, SHARDINGS
from meshwright.simcore.domain.workload import TrainingWorkload
from meshwright.simcore.schedules import SCHEDULES
from meshwright.simcore.training.iteration import iteration_time

__all__ = ["brute_force", "brute_force_of", "make_request", "random_request", "run", "winning_values"]


def make_request(
    model: str = "llama-3-8b",
    cluster: str = "dgx-h100:1",
    *,
    batch: int = 16,
    length: int = 4096,
    num_layers: int | None = None,
    gpus_per_node: int = 8,
    software: str = "megatron-core",
    objective: Objective = "throughput",
    num_plans: int = 10,
    limits: SearchLimits | None = None,
) -> SearchRequest:
    machines = resolve_cluster(cluster)
    machines = replace(machines, node=replace(machines.node, num_gpus=gpus_per_node))
    spec = load_model(model)
    job = TrainingJob(
        model=replace(spec, num_layers=num_layers or spec.num_layers),
        cluster=machines,
        workload=TrainingWorkload(global_batch_size=batch, sequence_length=length),
        software=software,
    )
    return SearchRequest(
        job=job,
        context=cost_context(job),
        limits=limits or SearchLimits(),
        objective=objective,
        num_plans=num_plans,
    )


def run(request: SearchRequest) -> SearchResult:
    return SEARCHES["exhaustive"].run(request, lambda doing, done, total: None)


@functools.cache
def brute_force(seed: int) -> tuple[list[float], int, dict[str, int]]:
    """Return the objective of every feasible plan of a random job, best first, their number, and the rejections.

    Every constraint is evaluated on every row, and every feasible plan is simulated.
    """
    return brute_force_of(random_request(seed))


def brute_force_of(request: SearchRequest) -> tuple[list[float], int, dict[str, int]]:
    """Return what :func:`brute_force` does, of a request."""
    rejections: dict[str, int] = {}
    values: list[float] = []
    worlds = world_sizes(request.objective, request.context)
    for columns in enumerate_space(request.context, request.limits, worlds):
        feasible = apply_constraints(request.context, columns, request.limits, rejections)
        plans = [plan_of_row(request.job, feasible, row) for row in range(len(feasible))]
        if plans:
            costs = uniform_costs(request.context, plans)
            seconds = [iteration_time(each, plan.schedule) for each, plan in zip(costs, plans, strict=True)]
            values += objective_values(request.objective, feasible, np.array(seconds)).tolist()
    return sorted(values), len(values), rejections


def winning_values(request: SearchRequest, result: SearchResult) -> list[float]:
    plans = [entry.plan for entry in result.ranked]
    columns = PlanColumns.from_plans(plans, request.job.workload.global_batch_size)
    seconds = np.array([entry.prediction.iteration_time for entry in result.ranked])
    return [float(value) for value in objective_values(request.objective, columns, seconds)]


def some(rng: np.random.Generator, words: Sequence[str], most: int) -> tuple[str, ...]:
    return tuple(str(word) for word in rng.choice(words, int(rng.integers(1, most + 1)), replace=False))


def random_request(seed: int) -> SearchRequest:
    """Return a small job whose every feasible plan can be simulated, with every lever in some of them."""
    rng = np.random.default_rng(seed)
    node = str(rng.choice(["dgx-h100", "dgx-a100", "l40s-8", "mi300x-8", "gb200-nvl72"]))
    allowed: dict[str, tuple[int | str | bool, ...]] = {
        "schedule": ("none", *some(rng, sorted(set(SCHEDULES) - {"none"}), 3)),
        "recompute": some(rng, RECOMPUTES, 2),
        "sharding": ("none", *some(rng, SHARDINGS[1:], 2)),
        "cp_method": some(rng, CP_METHODS, 2),
        "optimizer_offload": ("none", *some(rng, ("cpu",), 1)) if rng.random() < 0.4 else ("none",),
        "parameter_offload": ("none", "cpu") if rng.random() < 0.3 else ("none",),
        "activation_offload": (False, True) if rng.random() < 0.3 else (False,),
        "micro_batch_size": (1, 2) if rng.random() < 0.5 else (1, 4),
    }
    request = make_request(
        str(
            rng.choice(["llama-3-8b", "gpt2-xl", "llama-2-7b", "mixtral-8x7b", "mixtral-8x7b", "deepseek-v3"])
        ),
        f"{node}:{2 if seed % 2 else 1}",
        batch=int(rng.choice([4, 8, 12, 16])),
        length=int(rng.choice([512, 4096, 8192])),
        num_layers=int(rng.choice([4, 4, 5, 6, 7, 8])),
        gpus_per_node=int(rng.choice([1, 2, 4])) if seed % 2 else int(rng.choice([2, 4, 8])),
        software=str(rng.choice(["megatron-core", "megatron-2023", "torchtitan", "llm-foundry-fsdp1"])),
        objective="cost" if seed % 5 == 0 else "throughput",
        limits=SearchLimits(allowed=allowed),
        num_plans=int(rng.choice([1, 3, 10])),
    )
    moe = request.job.model.moe
    if moe is None:
        return request
    # Four small experts instead of 256, so that they fit, behind a dense layer or two.
    fewer = replace(
        moe,
        num_experts=4,
        top_k=2,
        num_expert_groups=1,
        top_k_groups=1,
        num_dense_layers=min(2, moe.num_dense_layers),
    )
    job = replace(request.job, model=replace(request.job.model, moe=fewer))
    return replace(request, job=job, context=cost_context(job))
