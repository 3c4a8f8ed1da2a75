"""What a plan must satisfy: named predicates over columns, each of which counts what it rejects.

The order is the order of the report: a plan is counted by the first constraint that rejects it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.cases import cases_of
from meshwright.costmodels.memory import host_needs, peak_memory
from meshwright.costmodels.parallelism.context import head_exchange_degree
from meshwright.costmodels.plan_columns import (
    ALL_LAYERS,
    V_SHAPED,
    Offloads,
    PlanColumns,
    Recomputes,
    Schedules,
    Shardings,
)
from meshwright.planner.export import EXPORTERS
from meshwright.planner.space import SearchLimits
from meshwright.simcore.domain.plan import (
    CP_METHODS,
    OFFLOADS,
    RECOMPUTES,
    SCHEDULES_KNOWN,
    SHARDINGS,
    VOCAB_PARALLELS,
)

__all__ = [
    "CONSTRAINTS",
    "HOST_MEMORY",
    "MEMORY",
    "RULES",
    "Condition",
    "Constraint",
    "Mask",
    "allowed_memory",
    "apply_constraints",
    "constraint_sentences",
]

# Column codes of the fields that are words.
_WORDS = {
    "cp_method": CP_METHODS,
    "optimizer_offload": OFFLOADS,
    "parameter_offload": OFFLOADS,
    "recompute": RECOMPUTES,
    "schedule": SCHEDULES_KNOWN,
    "sharding": SHARDINGS,
    "vocab_parallel": VOCAB_PARALLELS,
}

Mask = NDArray[np.bool_]


# True where a plan satisfies it. Columns may be an open mesh: the mask then has the dimensions it depends on.
Condition = Callable[[CostContext, PlanColumns], Mask]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """A named predicate.

    Parameters
    ----------
    name : str
        Key of the report.
    sentence : str
        What it demands, for the user.
    conditions : Callable[[CostContext, SearchLimits], tuple[Condition, ...]]
        All must hold. The fewer columns each reads, the faster a whole space is searched.
    """

    name: str
    sentence: str
    conditions: Callable[[CostContext, SearchLimits], tuple[Condition, ...]]

    def holds(self, context: CostContext, columns: PlanColumns, limits: SearchLimits) -> Mask:
        """Return where plans satisfy it, shape ``(num_plans,)``."""
        keep: Mask = np.ones(len(columns), dtype=np.bool_)
        for condition in self.conditions(context, limits):
            keep &= condition(context, columns)
        return keep


def _always(*conditions: Condition) -> Callable[[CostContext, SearchLimits], tuple[Condition, ...]]:
    """Return the conditions of a constraint that does not depend on what the user asked for."""
    return lambda context, limits: conditions


def _user_limits(context: CostContext, limits: SearchLimits) -> tuple[Condition, ...]:
    return _within(limits.allowed)


def _software(context: CostContext, limits: SearchLimits) -> tuple[Condition, ...]:
    # What the user names is taken as available: a fork may have what its generation lacks.
    supports = {key: values for key, values in context.software.supports.items() if key not in limits.allowed}
    shardings = supports.pop("sharding", None)
    if shardings is None:
        return _within(supports)
    (is_listed,) = _within({"sharding": shardings})

    def is_listed_or_alone(context: CostContext, columns: PlanColumns) -> Mask:
        # A single replica shards nothing, whatever the software would.
        keep: Mask = is_listed(context, columns) | (columns.dp * columns.cp == 1)
        return keep

    return (*_within(supports), is_listed_or_alone)


def _target(context: CostContext, limits: SearchLimits) -> tuple[Condition, ...]:
    return () if limits.target is None else _within(EXPORTERS[limits.target].search_limits)


def _within(allowed: Mapping[str, tuple[int | str | bool, ...]]) -> tuple[Condition, ...]:
    """Return the conditions that every named field has one of its allowed values."""

    def condition(key: str, values: tuple[int | str | bool, ...]) -> Condition:
        known = _WORDS.get(key)
        codes = [known.index(str(value)) for value in values] if known else [int(value) for value in values]

        def is_allowed(context: CostContext, columns: PlanColumns) -> Mask:
            keep: Mask = np.isin(getattr(columns, key), codes)
            # One rank exchanges nothing, whatever the method.
            return keep | (columns.cp == 1) if key == "cp_method" else keep

        return is_allowed

    return tuple(condition(key, values) for key, values in allowed.items())


def _recompute(context: CostContext, columns: PlanColumns) -> Mask:
    saves = context.attention_kernel == "unfused" or context.software.selective_recompute == "operators"
    named = columns.recompute_modules > 0
    result: Mask = (columns.recompute != Recomputes.SELECTIVE) | (named | saves)
    if not context.software.has_recompute_modules:
        result &= ~named
    return result


def _recompute_layers(context: CostContext, columns: PlanColumns) -> Mask:
    result: Mask = columns.recompute_layers > 0
    return result


def _tensor_parallel(context: CostContext, columns: PlanColumns) -> Mask:
    model = context.model
    groups = model.num_query_groups
    # Fewer key/value heads than ranks are replicated, in whole copies.
    shares_groups = (groups % columns.tp == 0) | (columns.tp % groups == 0)
    per_node = context.cluster.node.num_gpus
    fills_nodes = (per_node % columns.tp == 0) | (columns.tp % per_node == 0)
    result: Mask = (model.num_attention_heads % columns.tp == 0) & (model.ffn_hidden_size % columns.tp == 0)
    if model.moe is not None:
        result = result & (model.moe.shared_ffn_hidden_size % columns.tp == 0)
    keep: Mask = result & shares_groups & fills_nodes
    return keep


def _sequence_parallel(context: CostContext, columns: PlanColumns) -> Mask:
    result: Mask = ~columns.sequence_parallel | (context.workload.sequence_length % columns.tp == 0)
    return result


def _pipeline(context: CostContext, columns: PlanColumns) -> Mask:
    layers, stages = context.model.num_layers, columns.pp * columns.vpp
    result: Mask = (stages <= layers) | (stages == layers + 2)
    return result


def _context_parallel(context: CostContext, columns: PlanColumns) -> Mask:
    """Every rank has two parts of the sequence; all-to-all needs a key/value head for every rank it swaps with."""
    model = context.model
    result: Mask = (columns.cp == 1) | (context.workload.sequence_length % (2 * columns.cp) == 0)
    groups = model.num_query_groups if model.mla is None else model.num_attention_heads
    degree = head_exchange_degree(context, cases_of(columns))
    result = result & ((degree <= 1.0) | (groups % (columns.tp * degree) == 0))
    if context.attention_kernel == "unfused":
        result = result & (columns.cp == 1)
    return result


def _expert_parallel(context: CostContext, columns: PlanColumns) -> Mask:
    """Experts divide over ep, their width over etp, both over a stage's ranks; tp with experts needs SP."""
    moe = context.model.moe
    if moe is None:
        has_none: Mask = (columns.ep == 1) & (columns.etp == 1)
        return has_none
    grid = columns.ep * columns.etp
    result: Mask = (moe.num_experts % columns.ep == 0) & ((columns.tp * columns.cp * columns.dp) % grid == 0)
    # Without it every tensor parallel rank would route the same tokens (Megatron-Core refuses it).
    routes_once = (columns.tp == 1) | columns.sequence_parallel
    keep: Mask = result & (moe.moe_ffn_hidden_size % columns.etp == 0) & routes_once
    return keep


def _offload(context: CostContext, columns: PlanColumns) -> Mask:
    """Weights leave the device only where ZeRO-3 gathers them layer by layer."""
    result: Mask = (columns.parameter_offload == Offloads.NONE) | (
        (columns.sharding >= Shardings.ZERO3) & (columns.pp == 1)
    )
    return result


def _activation_offload(context: CostContext, columns: PlanColumns) -> Mask:
    """The copies of a layer's activations are priced for layers that all keep the same."""
    result: Mask = ~columns.activation_offload | (columns.recompute_layers >= ALL_LAYERS)
    return result


def _batch(context: CostContext, columns: PlanColumns) -> Mask:
    result: Mask = context.workload.global_batch_size % (columns.dp * columns.micro_batch_size) == 0
    return result


def _interleaving(context: CostContext, columns: PlanColumns) -> Mask:
    is_interleaved = columns.schedule == Schedules.INTERLEAVED
    stages = columns.pp * columns.vpp
    layers = context.model.num_layers
    # Even chunks, or even but for embedding and loss at the ends.
    divides = (layers % stages == 0) | ((layers + 2) % stages == 0)
    groups = columns.num_micro_batches % columns.pp == 0
    result: Mask = ~is_interleaved | (divides & groups)
    return result


def _sharding(context: CostContext, columns: PlanColumns) -> Mask:
    if context.software.fsdp_keeps_parameters:
        return np.ones(len(columns), dtype=np.bool_)
    result: Mask = (columns.pp == 1) | (columns.sharding < Shardings.ZERO2)
    return result


def _schedule(context: CostContext, columns: PlanColumns) -> Mask:
    """What the schedules' own checks demand (meshwright.simcore.schedules), for many plans at once."""
    stages, chunks, batches = columns.pp, columns.vpp, columns.num_micro_batches
    schedule = columns.schedule
    is_interleaved = schedule == Schedules.INTERLEAVED
    is_v = np.isin(schedule, [SCHEDULES_KNOWN.index(name) for name in V_SHAPED])
    is_dual = schedule == Schedules.DUALPIPE
    has_chunks = np.where(is_interleaved, (stages > 1) & (chunks > 1), chunks == 1)
    has_chunks = np.where(is_v, (stages > 1) & (chunks == 2), has_chunks)
    is_even = (stages % 2 == 0) & (batches % 2 == 0)
    keep: Mask = (
        has_chunks
        & ((schedule != Schedules.NONE) | (stages == 1))
        & (~is_interleaved | (batches % stages == 0))
        & (~is_dual | is_even)
        & (~(is_dual | (schedule == Schedules.DUALPIPE_V)) | (batches >= 2 * stages))
    )
    return keep


def _memory(context: CostContext, limits: SearchLimits) -> tuple[Condition, ...]:
    allowed = allowed_memory(context, limits)
    return (lambda context, columns: peak_memory(context, columns) <= allowed,)


def _host_memory(context: CostContext, columns: PlanColumns) -> Mask:
    demand = host_needs(context, columns)
    return np.ones(len(columns), dtype=np.bool_) if demand is None else demand.fits


def allowed_memory(context: CostContext, limits: SearchLimits) -> float:
    """Return the bytes a rank may hold: what the device reports less the headroom asked for."""
    return context.gpu.memory_bytes * (1.0 - limits.memory_headroom)


MEMORY = Constraint(name="memory", sentence="the fullest rank fits", conditions=_memory)
HOST_MEMORY = Constraint(
    name="host_memory",
    sentence="what is offloaded fits the node's memory and drives",
    conditions=_always(_host_memory),
)
RULES: tuple[Constraint, ...] = (
    Constraint(
        name="user_limits", sentence="the values allowed under 'constraints'", conditions=_user_limits
    ),
    Constraint(name="software", sentence="the software generation has it", conditions=_software),
    Constraint(
        name="recompute",
        sentence="selective recompute saves something (fused attention stores no scores), and a share of the layers "
        "is a number of its own",
        conditions=_always(_recompute, _recompute_layers),
    ),
    Constraint(name="target", sentence="the export target can express the plan", conditions=_target),
    Constraint(
        name="tensor_parallel",
        sentence="tp divides heads, MLP width and nodes, and shares key/value heads evenly",
        conditions=_always(_tensor_parallel),
    ),
    Constraint(
        name="sequence_parallel",
        sentence="tp divides the sequence",
        conditions=_always(_sequence_parallel),
    ),
    Constraint(
        name="context_parallel",
        sentence="2 x cp divides the sequence, and all-to-all swaps whole key/value heads",
        conditions=_always(_context_parallel),
    ),
    Constraint(
        name="expert_parallel",
        sentence="ep divides the experts, ep x etp the ranks of a stage; tp with experts needs sequence parallelism",
        conditions=_always(_expert_parallel),
    ),
    Constraint(
        name="offload",
        sentence="weights are offloaded only under ZeRO-3 without a pipeline, activations with all layers recomputed "
        "or none",
        conditions=_always(_offload, _activation_offload),
    ),
    Constraint(
        name="pipeline",
        sentence="every virtual stage but the ends holds a layer",
        conditions=_always(_pipeline),
    ),
    Constraint(
        name="batch",
        sentence="dp x micro-batch divides the global batch",
        conditions=_always(_batch),
    ),
    Constraint(
        name="interleaving",
        sentence="chunks divide the layers (embedding and loss counted or not), stages the micro-batches",
        conditions=_always(_interleaving),
    ),
    Constraint(
        name="schedule",
        sentence="the schedule exists for these stages, chunks and micro-batches",
        conditions=_always(_schedule),
    ),
    Constraint(
        name="sharding",
        sentence="ZeRO-2 and above do not go with a pipeline in this software",
        conditions=_always(_sharding),
    ),
)
"""Constraints that read a few columns each; those of memory, which read most, follow."""
CONSTRAINTS: tuple[Constraint, ...] = (*RULES, MEMORY, HOST_MEMORY)


_ISLANDS = "every stage, or every replica, lies on one island of a mixed cluster"


def constraint_sentences() -> dict[str, str]:
    """Return what every constraint demands, by the name under which reports count what it rejects."""
    return {**{constraint.name: constraint.sentence for constraint in CONSTRAINTS}, "islands": _ISLANDS}


def apply_constraints(
    context: CostContext, columns: PlanColumns, limits: SearchLimits, rejections: dict[str, int]
) -> PlanColumns:
    """Return the plans that satisfy every constraint, and add to the count of those each rejected.

    Parameters
    ----------
    context : CostContext
        Job and software.
    columns : PlanColumns
        Candidates.
    limits : SearchLimits
        The user's restrictions.
    rejections : dict[str, int]
        Rejected plans per constraint name; added to in place.
    """
    for constraint in CONSTRAINTS:
        keep = constraint.holds(context, columns, limits)
        rejections[constraint.name] = rejections.get(constraint.name, 0) + int(len(columns) - keep.sum())
        if not keep.all():
            columns = columns.take(keep)
    return columns
