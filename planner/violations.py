"""Why one plan cannot run: the first constraint it violates, with the numbers that clash."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.memory import peak_memory
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.errors import SpecError
from meshwright.planner.constraints import CONSTRAINTS
from meshwright.planner.space import SearchLimits
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.schedules import SCHEDULES
from meshwright.units import format_quantity

__all__ = ["Violation", "find_violation"]

_DEGREES = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A constraint that a plan violates.

    Parameters
    ----------
    constraint : str
        Name in :data:`meshwright.planner.constraints.CONSTRAINTS`; ``cluster`` or ``schedule`` for what the search
        never proposes.
    sentence : str
        What the constraint demands.
    numbers : str
        The plan's own numbers against it.
    """

    constraint: str
    sentence: str
    numbers: str

    @property
    def text(self) -> str:
        """Constraint, demand and numbers in one clause."""
        return f"by constraint '{self.constraint}' ({self.sentence}): {self.numbers}"


def find_violation(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> Violation | None:
    """Return the first constraint that a plan violates, in the order of the report; None when it can run.

    Parameters
    ----------
    context : CostContext
        Job and software; the job may be another than the one the plan was made for.
    plan : ParallelPlan
        Any plan, layers that cannot be spread included (``layers_per_stage`` all zero).
    limits : SearchLimits
        Restrictions; ``memory_headroom`` is the share of memory that must stay free.
    """
    cluster = context.cluster
    if plan.num_gpus > cluster.num_gpus:
        return Violation(
            constraint="cluster",
            sentence="the plan's GPUs exist",
            numbers=f"it needs {plan.num_gpus} GPUs, the cluster has {cluster.num_gpus}",
        )
    batch = context.workload.global_batch_size
    per_step = plan.dp * plan.micro_batch_size
    # One micro-batch builds the columns of any plan; what the batch really gives follows, as in the search.
    columns = PlanColumns.from_plans([plan], per_step)
    columns = replace(columns, num_micro_batches=np.array([max(1, batch // per_step)], dtype=np.int64))
    for constraint in CONSTRAINTS:
        if not constraint.holds(context, columns, limits).all():
            numbers = _NUMBERS.get(constraint.name, _degrees)
            return Violation(
                constraint=constraint.name,
                sentence=constraint.sentence,
                numbers=numbers(context, plan, columns, limits),
            )
    try:
        SCHEDULES[plan.schedule].check(plan.pp, plan.vpp, batch // per_step)
    except KeyError:
        return Violation(
            constraint="schedule", sentence="the schedule can be simulated", numbers=f"{plan.schedule} cannot"
        )
    except SpecError as error:
        return Violation(
            constraint="schedule", sentence="the schedule exists for these numbers", numbers=str(error)
        )
    return None


_Numbers = Callable[[CostContext, ParallelPlan, PlanColumns, SearchLimits], str]


def _degrees(context: CostContext, plan: ParallelPlan, columns: PlanColumns, limits: SearchLimits) -> str:
    degrees = ", ".join(f"{name} {getattr(plan, name)}" for name in _DEGREES if getattr(plan, name) > 1)
    return f"the plan has {degrees or 'one GPU'} with sharding {plan.sharding}, recompute {plan.recompute}"


def _tensor_parallel(
    context: CostContext, plan: ParallelPlan, columns: PlanColumns, limits: SearchLimits
) -> str:
    model = context.model
    return (
        f"tp {plan.tp} against {model.num_attention_heads} heads, {model.num_query_groups} key/value heads, MLP width "
        f"{model.ffn_hidden_size} and {context.cluster.node.num_gpus} GPUs per node"
    )


def _sequence_parallel(
    context: CostContext, plan: ParallelPlan, columns: PlanColumns, limits: SearchLimits
) -> str:
    return f"tp {plan.tp} against {context.workload.sequence_length} tokens"


def _pipeline(context: CostContext, plan: ParallelPlan, columns: PlanColumns, limits: SearchLimits) -> str:
    stages = plan.pp * plan.vpp
    return f"pp {plan.pp} x vpp {plan.vpp} = {stages} virtual stages for {context.model.num_layers} layers"


def _batch(context: CostContext, plan: ParallelPlan, columns: PlanColumns, limits: SearchLimits) -> str:
    per_step = plan.dp * plan.micro_batch_size
    return (
        f"dp {plan.dp} x micro-batch {plan.micro_batch_size} = {per_step} sequences, the global batch is "
        f"{context.workload.global_batch_size}"
    )


def _interleaving(
    context: CostContext, plan: ParallelPlan, columns: PlanColumns, limits: SearchLimits
) -> str:
    return (
        f"pp {plan.pp} x vpp {plan.vpp} = {plan.pp * plan.vpp} chunks for {context.model.num_layers} layers, "
        f"{int(columns.num_micro_batches[0])} micro-batches for {plan.pp} stages"
    )


def _sharding(context: CostContext, plan: ParallelPlan, columns: PlanColumns, limits: SearchLimits) -> str:
    return f"sharding {plan.sharding} with pp {plan.pp} in {context.software.id}"


def _recompute(context: CostContext, plan: ParallelPlan, columns: PlanColumns, limits: SearchLimits) -> str:
    return f"recompute {plan.recompute} with {context.attention_kernel} attention in {context.software.id}"


def _software(context: CostContext, plan: ParallelPlan, columns: PlanColumns, limits: SearchLimits) -> str:
    clashes = [
        f"{name} {_word(getattr(plan, name))} (it has {', '.join(_word(value) for value in values)})"
        for name, values in context.software.supports.items()
        if getattr(plan, name) not in values
    ]
    return f"{context.software.id} lacks {' and '.join(clashes)}"


def _user_limits(context: CostContext, plan: ParallelPlan, columns: PlanColumns, limits: SearchLimits) -> str:
    clashes = [
        f"{name} {_word(getattr(plan, name))} (allowed: {', '.join(_word(value) for value in values)})"
        for name, values in limits.allowed.items()
        if getattr(plan, name) not in values
    ]
    return " and ".join(clashes)


def _memory(context: CostContext, plan: ParallelPlan, columns: PlanColumns, limits: SearchLimits) -> str:
    needed = float(peak_memory(context, columns)[0])
    usable = context.gpu.memory_bytes
    allowed = usable * (1.0 - limits.memory_headroom)
    kept = f", {limits.memory_headroom:.0%} of them to stay free" if limits.memory_headroom else ""
    return f"it needs {_gib(needed)}, {_gib(usable)} are usable{kept}: {_gib(needed - allowed)} too much"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 / 100 else format_quantity(num_bytes, "bytes")


def _word(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


_NUMBERS: Mapping[str, _Numbers] = {
    "user_limits": _user_limits,
    "software": _software,
    "recompute": _recompute,
    "tensor_parallel": _tensor_parallel,
    "sequence_parallel": _sequence_parallel,
    "pipeline": _pipeline,
    "batch": _batch,
    "interleaving": _interleaving,
    "sharding": _sharding,
    "memory": _memory,
}
