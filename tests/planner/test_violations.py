"""The constraint in a plan's way, with the numbers that clash."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.costmodels.context import CostContext, cost_context
from meshwright.costmodels.prediction import predict
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.constraints import CONSTRAINTS
from meshwright.planner.space import SearchLimits
from meshwright.planner.violations import find_violation, tolerated_constraints
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan, can_partition, partition_layers
from meshwright.simcore.domain.workload import TrainingWorkload

FREE = SearchLimits()


def make_context(
    model: str = "llama-3-8b",
    cluster: str = "dgx-h100:2",
    *,
    batch: int = 48,
    length: int = 2048,
    software: str = "megatron-core",
) -> CostContext:
    job = TrainingJob(
        model=load_model(model),
        cluster=resolve_cluster(cluster),
        workload=TrainingWorkload(global_batch_size=batch, sequence_length=length),
        software=software,
    )
    return cost_context(job)


def make_plan(num_layers: int = 32, **changes: object) -> ParallelPlan:
    pp, vpp = int(str(changes.get("pp", 1))), int(str(changes.get("vpp", 1)))
    stages = pp * vpp
    can = can_partition(num_layers, stages)
    defaults: dict[str, object] = {
        "dp": 1,
        "micro_batch_size": 1,
        "schedule": "none" if pp == 1 else "interleaved_1f1b" if vpp > 1 else "1f1b",
        "layers_per_stage": partition_layers(num_layers, stages) if can else (0,) * stages,
    }
    return ParallelPlan(**(defaults | changes))  # type: ignore[arg-type]  # keywords are checked by the class


# Constraint, job, plan, and what its numbers must say.
CASES = [
    ("cluster", {}, {"dp": 32}, "it needs 32 GPUs, the cluster has 16"),
    ("software", {"software": "llm-foundry-fsdp1"}, {"tp": 2, "dp": 8}, "llm-foundry-fsdp1 lacks tp 2"),
    ("recompute", {}, {"dp": 8, "tp": 2, "recompute": "selective"}, "recompute selective with flash_3"),
    ("tensor_parallel", {}, {"tp": 3}, "tp 3 against 32 heads, 8 key/value heads, MLP width 14336"),
    (
        "sequence_parallel",
        {"length": 2047},
        {"tp": 2, "sequence_parallel": True},
        "tp 2 against 2047 tokens",
    ),
    ("context_parallel", {"length": 2047}, {"cp": 2}, "cp 2 (ring) with tp 1 against 2047 tokens"),
    ("expert_parallel", {}, {"dp": 2, "ep": 2}, "ep 2 x etp 1 against a model without experts"),
    ("expert_parallel", {"model": "mixtral-8x7b"}, {"dp": 16, "ep": 16}, "ep 16 x etp 1 against 8 experts"),
    ("pipeline", {}, {"pp": 4, "vpp": 12, "dp": 4}, "pp 4 x vpp 12 = 48 virtual stages for 32 layers"),
    ("batch", {}, {"dp": 10}, "dp 10 x micro-batch 1 = 10 sequences, the global batch is 48"),
    (
        "interleaving",
        {},
        {"pp": 4, "vpp": 2, "dp": 2, "micro_batch_size": 4, "tp": 2},
        "pp 4 x vpp 2 = 8 chunks for 32 layers, 6 micro-batches for 4 stages",
    ),
    ("sharding", {}, {"pp": 2, "dp": 8, "sharding": "zero3"}, "sharding zero3 with pp 2 in megatron-core"),
    (
        "schedule",
        {"model": "llama-3.2-1b"},
        {"pp": 4, "dp": 4, "schedule": "dualpipe", "micro_batch_size": 4},
        "'dualpipe' needs an even number of micro-batches",
    ),
]


@pytest.mark.parametrize(
    ("name", "job", "fields", "says"), CASES, ids=[f"{case[0]} {case[2]}" for case in CASES]
)
def test_the_first_constraint_in_the_way_is_named_with_its_numbers(name, job, fields, says):
    context = make_context(**job)
    # What a user names is taken as available, so that the rules of a schedule are asked, not the software's list.
    named = SearchLimits(allowed={"schedule": (fields["schedule"],)}) if "schedule" in fields else FREE
    violation = find_violation(context, make_plan(context.model.num_layers, **fields), named)
    assert violation is not None
    assert violation.constraint == name
    assert says in violation.numbers
    assert violation.text.startswith(f"by constraint '{name}' (")


def test_a_plan_that_runs_violates_nothing():
    assert find_violation(make_context(), make_plan(dp=4, tp=4), FREE) is None


def test_memory_says_how_much_too_much_it_needs():
    context = make_context("llama-3-70b", "dgx-h100:1", batch=8)
    plan = make_plan(80, tp=8)
    needed = predict(context, plan).peak_memory_bytes
    for headroom in (0.0, 0.1):
        violation = find_violation(context, plan, SearchLimits(memory_headroom=headroom))
        assert violation is not None
        assert violation.constraint == "memory"
        too_much = (needed - (1.0 - headroom) * context.gpu.memory_bytes) / 2**30
        assert violation.numbers.endswith(f": {too_much:.2f} GiB too much")
        assert f"it needs {needed / 2**30:.2f} GiB" in violation.numbers


def test_memory_is_that_of_the_layers_where_the_plan_puts_them():
    context = make_context("llama-3-70b", "dgx-h100:4", batch=32)
    even = make_plan(80, tp=8, pp=4)
    lopsided = replace(even, layers_per_stage=(8, 8, 8, 56))
    assert find_violation(context, even, FREE) is None
    violation = find_violation(context, lopsided, FREE)
    assert violation is not None
    assert violation.constraint == "memory"


def test_what_only_steers_the_search_is_tolerated_and_what_decides_is_not():
    context = make_context()
    plan = make_plan(dp=10, recompute="selective", sharding="zero1")
    tolerated = tolerated_constraints(context, plan, FREE)
    assert tolerated == {"recompute"}
    violation = find_violation(context, plan, FREE, tolerated)
    assert violation is not None
    assert violation.constraint == "batch"
    assert find_violation(context, replace(plan, dp=8), FREE, tolerated) is None


def test_user_limits_count():
    limits = SearchLimits(allowed={"tp": (1, 2)})
    violation = find_violation(make_context(), make_plan(tp=4), limits)
    assert violation is not None
    assert (violation.constraint, violation.numbers) == ("user_limits", "tp 4 (allowed: 1, 2)")


def test_every_constraint_has_numbers_of_its_own_but_those_of_targets_and_hosts():
    from meshwright.planner.violations import _NUMBERS

    assert {constraint.name for constraint in CONSTRAINTS} - set(_NUMBERS) <= {"target", "host_memory"}
