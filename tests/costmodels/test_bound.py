from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.costmodels.bound import iteration_time_bound, schedule_time_bound
from meshwright.costmodels.context import CostContext, cost_context
from meshwright.costmodels.iteration import iteration_costs, uniform_costs
from meshwright.costmodels.memory import peak_memory
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.costmodels.software import list_software
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import (
    CP_METHODS,
    RECOMPUTE_MODULES,
    RECOMPUTES,
    VOCAB_PARALLELS,
    ParallelPlan,
    partition_layers,
    partition_with_ends,
)
from meshwright.simcore.domain.workload import TrainingWorkload
from meshwright.simcore.schedules import SCHEDULES
from meshwright.simcore.training.costs import IterationCosts
from meshwright.simcore.training.iteration import iteration_time

# Any-to-any NVLink, a mesh whose pairs own one link, PCIe without NVLink, one rack as one domain.
NODES = ["dgx-h100", "hgx-h800", "mi300x-8", "l40s-8", "gb200-nvl72"]
MODELS = ["llama-3-8b", "gpt3-175b", "gpt2-xl", "gemma-2-2b", "mixtral-8x7b", "deepseek-v3"]
TWO_CHUNKS = ("zb_v", "v_half", "v_min", "dualpipe_v")


@dataclass(frozen=True)
class Case:
    """A plan and the job it runs."""

    context: CostContext
    plan: ParallelPlan

    @property
    def columns(self) -> PlanColumns:
        return PlanColumns.from_plans([self.plan], self.context.workload.global_batch_size)

    @property
    def seconds(self) -> float:
        return iteration_time(iteration_costs(self.context, self.plan), self.plan.schedule)


@st.composite
def pipelines(draw: st.DrawFn) -> dict[str, object]:
    """Draw stages, schedule, chunks, layers and micro-batches for which the schedule exists."""
    pp = draw(st.sampled_from([1, 2, 3, 4, 5, 8]))
    schedule = draw(st.sampled_from(sorted(set(SCHEDULES) - {"none"}))) if pp > 1 else "none"
    batches = draw(st.integers(1, 9))
    vpp = 2 if schedule in TWO_CHUNKS else 1
    if schedule == "interleaved_1f1b":
        vpp, batches = draw(st.sampled_from([2, 3])), pp * draw(st.integers(1, 3))
    elif schedule == "dualpipe":
        pp += pp % 2
        batches = 2 * (pp + draw(st.integers(0, 4)))
    elif schedule == "dualpipe_v":
        batches = 2 * pp + draw(st.integers(0, 7))
    stages = pp * vpp
    num_layers = stages * draw(st.integers(1, 3)) + draw(st.integers(0, stages - 1))
    layers = partition_layers(num_layers, stages)
    if stages > 2 and draw(st.booleans()):
        even = num_layers // stages
        ends = [draw(st.integers(0, even + 1)) for _ in range(2)]
        if num_layers - sum(ends) >= stages - 2:
            layers = partition_with_ends(num_layers, stages, *ends)
    return {"pp": pp, "vpp": vpp, "schedule": schedule, "layers_per_stage": layers, "batches": batches}


def levers(draw: st.DrawFn, dp: int, ranks: int, pipeline: dict[str, object]) -> dict[str, object]:
    """Draw recompute, sharding, offload and vocabulary parallelism."""
    words = ["none", "zero1", "zero2", "zero3", *(["hsdp"] if dp % 2 == 0 else [])]
    sharding = draw(st.sampled_from(words)) if ranks > 1 else "none"
    recompute = draw(st.sampled_from(RECOMPUTES))
    names_modules = recompute == "selective" and draw(st.booleans())
    offload = draw(st.sampled_from(["none", "none", "cpu"]))
    gathers = sharding in ("zero3", "hsdp") and offload != "none"
    spreads = pipeline["schedule"] in ("gpipe", "1f1b", "interleaved_1f1b")
    return {
        "sharding": sharding,
        "sharding_group": 2 if sharding == "hsdp" else None,
        "recompute": recompute,
        "recompute_modules": tuple(draw(st.sets(st.sampled_from(RECOMPUTE_MODULES))))
        if names_modules
        else (),
        "recompute_layers": draw(st.sampled_from([None, 1, 2])) if recompute == "full" else None,
        "optimizer_offload": offload,
        "optimizer_offload_fraction": draw(st.sampled_from([0.25, 1.0])),
        "parameter_offload": "cpu" if gathers and draw(st.booleans()) else "none",
        "activation_offload": draw(st.booleans()),
        "vocab_parallel": draw(st.sampled_from(VOCAB_PARALLELS)) if spreads else "none",
    }


def experts(draw: st.DrawFn, model: ModelSpec, tp: int, ranks: int) -> dict[str, int]:
    """Draw a grid of expert ranks."""
    if model.moe is None:
        return {}
    etp = draw(st.sampled_from([d for d in (1, 2, 4) if tp % d == 0]))
    grids = [d for d in range(1, 65) if model.moe.num_experts % d == 0 and ranks % (d * etp) == 0]
    return {"etp": etp, "ep": draw(st.sampled_from(grids)), "expert_overlap": draw(st.sampled_from([1, 2]))}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a job and a plan that uses any of the levers there are."""
    pipeline = draw(pipelines())
    batches = int(str(pipeline.pop("batches")))
    model = load_model(draw(st.sampled_from(MODELS)))
    tp, cp, dp = (draw(st.sampled_from(degrees)) for degrees in ([1, 2, 4, 8], [1, 1, 2, 4], [1, 2, 3, 16]))
    plan = ParallelPlan(
        dp=dp,
        tp=tp,
        cp=cp,
        cp_method=draw(st.sampled_from(CP_METHODS)),  # type: ignore[arg-type]  # a word of the list
        sequence_parallel=tp > 1 and draw(st.booleans()),
        micro_batch_size=draw(st.sampled_from([1, 2, 4])),
        **experts(draw, model, tp, tp * cp * dp),
        **levers(draw, dp, dp * cp, pipeline),
        **pipeline,  # type: ignore[arg-type]  # drawn for these fields
    )
    moe = model.moe
    if moe is not None:
        # Leading dense layers may end inside the first chunk or reach beyond it.
        moe = replace(moe, num_dense_layers=draw(st.integers(0, min(4, plan.num_layers - 1))))
    node = draw(st.sampled_from(NODES))
    per_node = 72 if node.endswith("72") else 8
    job = TrainingJob(
        model=replace(model, num_layers=plan.num_layers, moe=moe),
        cluster=resolve_cluster(f"{node}:{-(-plan.num_gpus // per_node)}"),
        workload=TrainingWorkload(
            global_batch_size=dp * plan.micro_batch_size * batches,
            sequence_length=draw(st.sampled_from([512, 4096])),
        ),
        software=draw(st.sampled_from(list_software())),
    )
    features = draw(st.sets(st.sampled_from(["eager", "async_tp", "no_overlap"])))
    return Case(cost_context(job, features=frozenset(features)), plan)


@settings(max_examples=500, deadline=None)
@given(case=cases())
def test_no_bound_is_above_the_simulated_time(case: Case) -> None:
    bound = float(iteration_time_bound(case.context, case.columns)[0])
    relaxed = float(schedule_time_bound(case.context, case.columns)[0])
    assert relaxed <= bound * (1 + 1e-12)
    assert bound <= case.seconds * (1 + 1e-9)


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_a_schedule_alone_takes_no_longer_than_with_what_comes_on_top(case: Case) -> None:
    """The simulated schedule of a plan without sharding and offload bounds all plans that differ in those."""
    plain = replace(
        case.plan,
        sharding="none",
        sharding_group=None,
        optimizer_offload="none",
        parameter_offload="none",
        activation_offload=False,
    )
    costs = iteration_costs(case.context, plain)
    nothing = np.zeros_like(costs.forward_time)
    alone = replace(
        costs,
        gradient_reduce_time=nothing,
        parameter_gather_time=nothing,
        optimizer_time=np.zeros_like(costs.optimizer_time),
    )
    assert iteration_time(alone, plain.schedule) <= case.seconds * (1 + 1e-12)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"recompute": "none", "recompute_modules": (), "recompute_layers": None},
    "recomputed": {"recompute": "full", "recompute_modules": ()},
    "resident": {"activation_offload": False, "optimizer_offload": "none"},
    "moved": {"activation_offload": True, "optimizer_offload": "cpu"},
    "whole": {"sharding": "none", "sharding_group": None, "parameter_offload": "none"},
    "zero1": {"sharding": "zero1", "sharding_group": None, "parameter_offload": "none"},
    "zero3": {"sharding": "zero3", "sharding_group": None, "parameter_offload": "none"},
    "fetched": {"sharding": "zero3", "sharding_group": None, "parameter_offload": "cpu"},
    "gathered": {"cp_method": "all_gather"},
}


@settings(max_examples=100, deadline=None)
@given(case=cases(), changes=st.lists(st.sampled_from(sorted(VARIANTS)), min_size=1, max_size=3))
def test_plans_cost_together_what_they_cost_alone(case: Case, changes: list[str]) -> None:
    plans = [case.plan, *(replace(case.plan, **VARIANTS[name]) for name in changes)]
    together = uniform_costs(case.context, plans)
    batch = case.context.workload.global_batch_size
    columns = PlanColumns.from_plans(plans, batch)
    bounds, peaks = iteration_time_bound(case.context, columns), peak_memory(case.context, columns)
    for plan, costs, bound, peak in zip(plans, together, bounds, peaks, strict=True):
        alone = iteration_costs(case.context, plan)
        for name in IterationCosts.__slots__:
            assert np.array_equal(getattr(costs, name), getattr(alone, name)), name
        one = PlanColumns.from_plans([plan], batch)
        assert bound == iteration_time_bound(case.context, one)[0]
        assert peak == peak_memory(case.context, one)[0]


def test_unrelated_plans_do_not_move_a_bound() -> None:
    """A model with leading dense layers: whether they fit the first chunk is asked of every plan by itself."""
    model = load_model("deepseek-v3")
    job = TrainingJob(
        model=replace(model, num_layers=12),
        cluster=resolve_cluster("hgx-h800:4"),
        workload=TrainingWorkload(global_batch_size=64, sequence_length=4096),
        software="megatron-core",
    )
    context = cost_context(job)
    plans = [
        ParallelPlan(
            dp=32 // pp,
            pp=pp,
            ep=32 // pp,
            micro_batch_size=1,
            schedule="1f1b",
            layers_per_stage=partition_layers(12, pp),
        )
        for pp in (2, 4, 8)
    ]
    together = iteration_time_bound(context, PlanColumns.from_plans(plans, 64))
    for plan, bound in zip(plans, together, strict=True):
        assert bound == iteration_time_bound(context, PlanColumns.from_plans([plan], 64))[0]
