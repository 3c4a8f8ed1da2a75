"""Why one plan cannot run: the first constraint it violates, with the numbers that clash."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.memory import plan_memory
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.errors import SpecError
from meshwright.planner.constraints import CONSTRAINTS
from meshwright.planner.space import SearchLimits
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.schedules import SCHEDULES
from meshwright.units import format_quantity

__all__ = ["Violation", "find_violation", "tolerated_constraints"]

_DECISIVE = frozenset({"cluster", "batch", "schedule", "pipeline", "memory", "host_memory"})

_DEGREES = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A constraint that a plan violates.

    Parameters
    ----------
    constraint : str
        Name in :data:`meshwright.planner.constraints.CONSTRAINTS`; ``cluster`` for more GPUs than there are.
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


def find_violation(
    context: CostContext,
    plan: ParallelPlan,
    limits: SearchLimits,
    tolerated: frozenset[str] = frozenset(),
) -> Violation | None:
    """Return the first constraint that a plan violates, in the order of the report; None when it can run.

    Parameters
    ----------
    context : CostContext
        Job and software; the job may be another than the one the plan was made for.
    plan : ParallelPlan
        Any plan, layers that cannot be spread included (``layers_per_stage`` all zero).
    limits : SearchLimits
        Restrictions; ``memory_headroom`` is the share of memory that must stay free.
    tolerated : frozenset[str]
        Constraints that may be violated: see :func:`tolerated_constraints`.
    """
    return next(
        (each for each in _violations(context, plan, limits) if each.constraint not in tolerated), None
    )


def tolerated_constraints(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> frozenset[str]:
    """Return the constraints that a plan violates though its user runs it: those that only steer the search.

    What decides whether it runs at all is never among them: GPUs, batch, schedule and memory.
    """
    names = (violation.constraint for violation in _violations(context, plan, limits))
    return frozenset(names) - _DECISIVE


def _violations(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> Iterator[Violation]:
    cluster = context.cluster
    if plan.num_gpus > cluster.num_gpus:
        yield Violation(
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
        if constraint.name == "memory":
            fits = _needed_memory(context, plan) <= _allowed_memory(context, limits)
        else:
            fits = bool(constraint.holds(context, columns, limits).all())
        if not fits:
            numbers = _NUMBERS.get(constraint.name, _degrees)
            yield Violation(
                constraint=constraint.name,
                sentence=constraint.sentence,
                numbers=numbers(context, plan, limits),
            )


def _needed_memory(context: CostContext, plan: ParallelPlan) -> float:
    """Return the bytes of the fullest rank, exactly as the prediction of the plan counts them."""
    if context.workload.global_batch_size % (plan.dp * plan.micro_batch_size):
        # The batch is in the way already; memory needs one that divides.
        return 0.0
    return float(plan_memory(context, plan).total.max()) * (1.0 + context.software.fragmentation)


def _allowed_memory(context: CostContext, limits: SearchLimits) -> float:
    return context.gpu.memory_bytes * (1.0 - limits.memory_headroom)


_Numbers = Callable[[CostContext, ParallelPlan, SearchLimits], str]


def _degrees(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> str:
    degrees = ", ".join(f"{name} {getattr(plan, name)}" for name in _DEGREES if getattr(plan, name) > 1)
    return f"the plan has {degrees or 'one GPU'} with sharding {plan.sharding}, recompute {plan.recompute}"


def _tensor_parallel(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> str:
    model = context.model
    return (
        f"tp {plan.tp} against {model.num_attention_heads} heads, {model.num_query_groups} key/value heads, MLP width "
        f"{model.ffn_hidden_size} and {context.cluster.node.num_gpus} GPUs per node"
    )


def _sequence_parallel(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> str:
    return f"tp {plan.tp} against {context.workload.sequence_length} tokens"


def _pipeline(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> str:
    stages = plan.pp * plan.vpp
    return f"pp {plan.pp} x vpp {plan.vpp} = {stages} virtual stages for {context.model.num_layers} layers"


def _batch(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> str:
    per_step = plan.dp * plan.micro_batch_size
    return (
        f"dp {plan.dp} x micro-batch {plan.micro_batch_size} = {per_step} sequences, the global batch is "
        f"{context.workload.global_batch_size}"
    )


def _interleaving(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> str:
    return (
        f"pp {plan.pp} x vpp {plan.vpp} = {plan.pp * plan.vpp} chunks for {context.model.num_layers} layers, "
        f"{_num_micro_batches(context, plan)} micro-batches for {plan.pp} stages"
    )


def _sharding(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> str:
    return f"sharding {plan.sharding} with pp {plan.pp} in {context.software.id}"


def _recompute(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> str:
    return f"recompute {plan.recompute} with {context.attention_kernel} attention in {context.software.id}"


def _software(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> str:
    clashes = [
        f"{name} {_word(getattr(plan, name))} (it has {', '.join(_word(value) for value in values)})"
        for name, values in context.software.supports.items()
        if getattr(plan, name) not in values
    ]
    return f"{context.software.id} lacks {' and '.join(clashes) or _degrees(context, plan, limits)}"


def _user_limits(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> str:
    clashes = [
        f"{name} {_word(getattr(plan, name))} (allowed: {', '.join(_word(value) for value in values)})"
        for name, values in limits.allowed.items()
        if getattr(plan, name) not in values
    ]
    return " and ".join(clashes)


def _num_micro_batches(context: CostContext, plan: ParallelPlan) -> int:
    return max(1, context.workload.global_batch_size // (plan.dp * plan.micro_batch_size))


def _context_parallel(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> str:
    return (
        f"cp {plan.cp} ({plan.cp_method}) with tp {plan.tp} against {context.workload.sequence_length} tokens and "
        f"{context.model.num_query_groups} key/value heads, {context.attention_kernel} attention"
    )


def _expert_parallel(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> str:
    moe = context.model.moe
    experts = f"{moe.num_experts} experts" if moe is not None else "a model without experts"
    sequence = "with" if plan.sequence_parallel else "without"
    return (
        f"ep {plan.ep} x etp {plan.etp} against {experts} and tp x cp x dp = {plan.tp * plan.cp * plan.dp} ranks; "
        f"tp {plan.tp} {sequence} sequence parallelism"
    )


def _schedule(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> str:
    schedule = SCHEDULES[plan.schedule]
    try:
        schedule.check(plan.pp, plan.vpp * schedule.num_model_copies, _num_micro_batches(context, plan))
    except SpecError as error:
        return str(error)
    return _degrees(context, plan, limits)


def _offload(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> str:
    return f"parameter_offload {plan.parameter_offload} with sharding {plan.sharding} and pp {plan.pp}"


def _memory(context: CostContext, plan: ParallelPlan, limits: SearchLimits) -> str:
    needed, usable = _needed_memory(context, plan), context.gpu.memory_bytes
    kept = f", {limits.memory_headroom:.0%} of them to stay free" if limits.memory_headroom else ""
    too_much = needed - _allowed_memory(context, limits)
    return f"it needs {_gib(needed)}, {_gib(usable)} are usable{kept}: {_gib(too_much)} too much"


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
    "context_parallel": _context_parallel,
    "expert_parallel": _expert_parallel,
    "offload": _offload,
    "schedule": _schedule,
    "memory": _memory,
}
