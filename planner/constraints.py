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
from meshwright.costmodels.plan_columns import Offloads, PlanColumns, Recomputes, Schedules, Shardings
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

__all__ = ["CONSTRAINTS", "Constraint", "Mask", "apply_constraints"]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """A named predicate.

    Parameters
    ----------
    name : str
        Key of the report.
    sentence : str
        What it demands, for the user.
    holds : Callable[[CostContext, PlanColumns, SearchLimits], Mask]
        True where a plan satisfies it, shape ``(num_plans,)``.
    """

    name: str
    sentence: str
    holds: Callable[[CostContext, PlanColumns, SearchLimits], Mask]


def _user_limits(context: CostContext, columns: PlanColumns, limits: SearchLimits) -> Mask:
    return _within(columns, limits.allowed)


def _software(context: CostContext, columns: PlanColumns, limits: SearchLimits) -> Mask:
    supports = dict(context.software.supports)
    shardings = {"sharding": supports.pop("sharding")} if "sharding" in supports else {}
    # A single replica shards nothing, whatever the software would.
    keep = _within(columns, supports)
    keep &= _within(columns, shardings) | (columns.dp == 1)
    return keep


def _recompute(context: CostContext, columns: PlanColumns, limits: SearchLimits) -> Mask:
    saves = context.attention_kernel == "unfused" or context.software.selective_recompute == "operators"
    named = columns.recompute_modules > 0
    result: Mask = (columns.recompute != Recomputes.SELECTIVE) | (named | saves)
    if context.software.selective_recompute == "operators":
        # That software picks operators itself and takes no list.
        result &= ~named
    return result


def _target(context: CostContext, columns: PlanColumns, limits: SearchLimits) -> Mask:
    if limits.target is None:
        return np.ones(len(columns), dtype=np.bool_)
    return _within(columns, EXPORTERS[limits.target].search_limits)


def _within(columns: PlanColumns, allowed: Mapping[str, tuple[int | str | bool, ...]]) -> Mask:
    """Return where every named field has one of its allowed values."""
    keep: Mask = np.ones(len(columns), dtype=np.bool_)
    for key, values in allowed.items():
        known = _WORDS.get(key)
        codes = [known.index(str(value)) for value in values] if known else [int(value) for value in values]
        keep &= np.isin(getattr(columns, key), codes)
    return keep


def _tensor_parallel(context: CostContext, columns: PlanColumns, limits: SearchLimits) -> Mask:
    model = context.model
    groups = model.num_query_groups
    # Fewer key/value heads than ranks are replicated, in whole copies.
    shares_groups = (groups % columns.tp == 0) | (columns.tp % groups == 0)
    per_node = context.cluster.node.num_gpus
    fills_nodes = (per_node % columns.tp == 0) | (columns.tp % per_node == 0)
    result: Mask = (model.num_attention_heads % columns.tp == 0) & (model.ffn_hidden_size % columns.tp == 0)
    if model.moe is not None:
        result &= model.moe.shared_ffn_hidden_size % columns.tp == 0
    result &= shares_groups & fills_nodes
    return result


def _sequence_parallel(context: CostContext, columns: PlanColumns, limits: SearchLimits) -> Mask:
    result: Mask = ~columns.sequence_parallel | (context.workload.sequence_length % columns.tp == 0)
    return result


def _pipeline(context: CostContext, columns: PlanColumns, limits: SearchLimits) -> Mask:
    layers, stages = context.model.num_layers, columns.pp * columns.vpp
    result: Mask = (stages <= layers) | (stages == layers + 2)
    return result


def _context_parallel(context: CostContext, columns: PlanColumns, limits: SearchLimits) -> Mask:
    """Every rank has two parts of the sequence; all-to-all needs a key/value head for every rank it swaps with."""
    model = context.model
    result: Mask = (columns.cp == 1) | (context.workload.sequence_length % (2 * columns.cp) == 0)
    groups = model.num_query_groups if model.mla is None else model.num_attention_heads
    degree = head_exchange_degree(context, cases_of(columns))
    result &= (degree <= 1.0) | (groups % (columns.tp * degree) == 0)
    if context.attention_kernel == "unfused":
        result &= columns.cp == 1
    return result


def _expert_parallel(context: CostContext, columns: PlanColumns, limits: SearchLimits) -> Mask:
    """Experts divide over ep, their width over etp, both over a stage's ranks; tp with experts needs SP."""
    moe = context.model.moe
    if moe is None:
        has_none: Mask = (columns.ep == 1) & (columns.etp == 1)
        return has_none
    grid = columns.ep * columns.etp
    result: Mask = (moe.num_experts % columns.ep == 0) & ((columns.tp * columns.cp * columns.dp) % grid == 0)
    result &= moe.moe_ffn_hidden_size % columns.etp == 0
    # Without it every tensor parallel rank would route the same tokens (Megatron-Core refuses it).
    result &= (columns.tp == 1) | columns.sequence_parallel
    return result


def _offload(context: CostContext, columns: PlanColumns, limits: SearchLimits) -> Mask:
    """Weights leave the device only where ZeRO-3 gathers them layer by layer."""
    result: Mask = (columns.parameter_offload == Offloads.NONE) | (
        (columns.sharding >= Shardings.ZERO3) & (columns.pp == 1)
    )
    return result


def _batch(context: CostContext, columns: PlanColumns, limits: SearchLimits) -> Mask:
    result: Mask = context.workload.global_batch_size % (columns.dp * columns.micro_batch_size) == 0
    return result


def _interleaving(context: CostContext, columns: PlanColumns, limits: SearchLimits) -> Mask:
    is_interleaved = columns.schedule == Schedules.INTERLEAVED
    stages = columns.pp * columns.vpp
    layers = context.model.num_layers
    # Even chunks, or even but for embedding and loss at the ends.
    divides = (layers % stages == 0) | ((layers + 2) % stages == 0)
    groups = columns.num_micro_batches % columns.pp == 0
    result: Mask = ~is_interleaved | (divides & groups)
    return result


def _sharding(context: CostContext, columns: PlanColumns, limits: SearchLimits) -> Mask:
    if context.software.fsdp_keeps_parameters:
        return np.ones(len(columns), dtype=np.bool_)
    result: Mask = (columns.pp == 1) | (columns.sharding < Shardings.ZERO2)
    return result


def _memory(context: CostContext, columns: PlanColumns, limits: SearchLimits) -> Mask:
    result: Mask = peak_memory(context, columns) <= context.gpu.memory_bytes * (1.0 - limits.memory_headroom)
    return result


def _host_memory(context: CostContext, columns: PlanColumns, limits: SearchLimits) -> Mask:
    demand = host_needs(context, columns)
    return np.ones(len(columns), dtype=np.bool_) if demand is None else demand.fits


CONSTRAINTS: tuple[Constraint, ...] = (
    Constraint(name="user_limits", sentence="the values allowed under 'constraints'", holds=_user_limits),
    Constraint(name="software", sentence="the software generation has it", holds=_software),
    Constraint(
        name="recompute",
        sentence="selective recompute saves something (fused attention stores no scores)",
        holds=_recompute,
    ),
    Constraint(name="target", sentence="the export target can express the plan", holds=_target),
    Constraint(
        name="tensor_parallel",
        sentence="tp divides heads, MLP width and nodes, and shares key/value heads evenly",
        holds=_tensor_parallel,
    ),
    Constraint(name="sequence_parallel", sentence="tp divides the sequence", holds=_sequence_parallel),
    Constraint(
        name="context_parallel",
        sentence="2 x cp divides the sequence, and all-to-all swaps whole key/value heads",
        holds=_context_parallel,
    ),
    Constraint(
        name="expert_parallel",
        sentence="ep divides the experts, ep x etp the ranks of a stage; tp with experts needs sequence parallelism",
        holds=_expert_parallel,
    ),
    Constraint(
        name="offload",
        sentence="weights are offloaded only under ZeRO-3 without a pipeline",
        holds=_offload,
    ),
    Constraint(name="pipeline", sentence="every virtual stage but the ends holds a layer", holds=_pipeline),
    Constraint(name="batch", sentence="dp x micro-batch divides the global batch", holds=_batch),
    Constraint(
        name="interleaving",
        sentence="chunks divide the layers (embedding and loss counted or not), stages the micro-batches",
        holds=_interleaving,
    ),
    Constraint(
        name="sharding",
        sentence="ZeRO-2 and above do not go with a pipeline in this software",
        holds=_sharding,
    ),
    Constraint(name="memory", sentence="the fullest rank fits", holds=_memory),
    Constraint(
        name="host_memory", sentence="what is offloaded fits the node's memory and drives", holds=_host_memory
    ),
)


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
