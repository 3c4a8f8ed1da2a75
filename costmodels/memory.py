"""Device memory of one rank, by what fills it: a breakdown per pipeline stage, for many plans at once.

Stored activations follow Korthikanti et al. 2022 (section 4) generalised to grouped queries and gated MLPs:
their 10 + 24/t + 5as/(ht), 34/t and 2 bytes per token and hidden unit come out for a GPT layer (tested).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.held_memory import (
    LayerActivations,
    held_activations,
    held_states,
    is_away,
    layer_activation_bytes,
    layer_activations,
    layer_kinds,
)
from meshwright.costmodels.layers.cases import CASE_FIELDS
from meshwright.costmodels.parallelism.offload_memory import HostDemand, host_demand
from meshwright.costmodels.plan_columns import (
    V_SHAPED,
    FloatColumn,
    PlanColumns,
    Schedules,
    stage_layers,
)
from meshwright.costmodels.stage import leading_dense_layers, leading_per_stage
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = [
    "LayerActivations",
    "MemoryColumns",
    "MemoryShare",
    "activation_share",
    "host_needs",
    "layer_activation_bytes",
    "layer_activations",
    "peak_memory",
    "plan_memory",
    "stage_memory",
    "state_share",
]

# What each share depends on; the layers are those of the stages that may be the fullest.
_STAGE_FIELDS = (
    *("pp", "vpp", "schedule", "vocab_parallel", "layers_first", "layers_second", "layers_middle"),
    *("layers_last", "middle_earliest", "chunk_first"),
)
_ACTIVATION_FIELDS = (
    *(*CASE_FIELDS, *_STAGE_FIELDS, "num_micro_batches", "activation_offload"),
    *("recompute", "recompute_modules", "recompute_layers"),
)
_STATE_FIELDS = (
    *("tp", "cp", "dp", "ep", "etp", *_STAGE_FIELDS, "sharding", "sharding_group", "secondary_group"),
    *("optimizer_offload", "offload_share", "parameter_offload"),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemoryColumns:
    """Bytes of one rank by use; arrays of one shape, ``(num_plans,)`` or ``(num_stages,)``.

    ``working_set`` is what the layer at work holds beyond its stored activations (gradients, what it recomputes) and
    what FSDP holds gathered.
    """

    weights: FloatColumn
    gradients: FloatColumn
    optimizer_states: FloatColumn
    activations: FloatColumn
    working_set: FloatColumn
    logits: FloatColumn
    communication: FloatColumn
    framework: FloatColumn

    @property
    def total(self) -> FloatColumn:
        """Sum of all uses [B]."""
        result = np.zeros_like(self.weights)
        for use in fields(self):
            result += getattr(self, use.name)
        return result

    def row(self, index: int) -> dict[str, float]:
        """Return one entry as a mapping of use to bytes."""
        return {f.name: float(getattr(self, f.name)[index]) for f in fields(self)}


def stage_memory(
    context: CostContext,
    columns: PlanColumns,
    activations: LayerActivations,
    stage: FloatColumn,
    layers: FloatColumn,
    has_embedding: FloatColumn,
    has_head: FloatColumn,
    leading: FloatColumn | None = None,
) -> MemoryColumns:
    """Return the memory of one stage per plan.

    Parameters
    ----------
    context : CostContext
        Job and software.
    columns : PlanColumns
        Plans.
    activations : LayerActivations
        What one layer stores and needs while it is recomputed.
    stage : FloatColumn
        Physical stage of each entry, 0 is the first.
    layers : FloatColumn
        Layers of that stage, all chunks.
    has_embedding, has_head : FloatColumn
        1.0 where the stage holds the embedding, the LM head.
    leading : FloatColumn | None
        How many of the layers are the dense ones that lead a mixture-of-experts model; None is none.
    """
    leading = np.zeros(len(columns)) if leading is None else leading
    states = held_states(context, columns, activations.kinds, layers, leading, has_embedding, has_head)
    held = held_activations(context, columns, activations, stage, layers, leading, has_head)
    return MemoryColumns(
        weights=states.weights,
        gradients=states.gradients,
        optimizer_states=states.optimizer_states,
        activations=held.in_flight,
        working_set=held.recomputed + states.staging + states.unsharded,
        logits=held.logits,
        communication=held.communication,
        framework=np.full(len(columns), context.software.framework_bytes),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemoryShare:
    """What one kind of use takes of a rank and of its host; a plan's memory is the sum of its two shares.

    Parameters
    ----------
    stages : FloatColumn
        Device bytes of the stages that may be the fullest, shape ``(num_stages, num_plans)``: first and last, where
        there are any the fullest inner one, and where it differs the second.
    host, nvme : FloatColumn
        What the first stage keeps in host memory and on drives, shape ``(num_plans,)`` [B].
    """

    stages: FloatColumn
    host: FloatColumn
    nvme: FloatColumn


def activation_share(context: CostContext, columns: PlanColumns) -> MemoryShare:
    """Return what grows with the micro-batch: activations, what recomputing holds, logits and messages."""
    activations = layer_activations(context, columns)
    stages = _candidate_stages(context, columns)
    held = held_activations(
        context, columns, activations, stages.index, stages.layers, stages.leading, stages.has_head
    )
    return MemoryShare(
        stages=held.in_flight + held.recomputed + held.logits + held.communication,
        host=held.host[0],
        nvme=np.zeros(len(columns)),
    )


def state_share(context: CostContext, columns: PlanColumns) -> MemoryShare:
    """Return what the parameters take, sharded or not, wherever they rest, and the framework."""
    stages = _candidate_stages(context, columns)
    held = held_states(
        context,
        columns,
        layer_kinds(context, columns),
        stages.layers,
        stages.leading,
        stages.has_embedding,
        stages.has_head,
    )
    total = held.weights + held.gradients + held.optimizer_states + held.staging + held.unsharded
    return MemoryShare(stages=total + context.software.framework_bytes, host=held.host[0], nvme=held.nvme[0])


def host_needs(context: CostContext, columns: PlanColumns) -> HostDemand | None:
    """Return what offload asks of a node's memory and drives, by its first stage; None where nothing is offloaded.

    Raises
    ------
    SpecError
        If the node does not say what it has.
    """
    if not (is_away(columns).any() or columns.activation_offload.any()):
        return None
    activations, states = activation_share(context, columns), state_share(context, columns)
    return host_demand(context, activations.host + states.host, activations.nvme + states.nvme)


def peak_memory(context: CostContext, columns: PlanColumns) -> FloatColumn:
    """Return the bytes of the fullest rank of each plan, shape ``(num_plans,)``.

    The first stage holds the embedding and the most micro-batches, the second the most of those without it,
    the earliest of the fullest inner stages the most layers, the last one head and logits. Inner stages
    differ by at most one layer and hold fewer micro-batches the later they come, so one of the four is the
    fullest.
    """
    of_batch, spread_activations = columns.thinned(*_ACTIVATION_FIELDS)
    of_parameters, spread_states = columns.thinned(*_STATE_FIELDS)
    activations = spread_activations(activation_share(context, of_batch).stages)
    stages = activations + spread_states(state_share(context, of_parameters).stages)
    peak: FloatColumn = stages.max(axis=0) * (1.0 + context.software.fragmentation)
    return peak


def plan_memory(context: CostContext, plan: ParallelPlan) -> MemoryColumns:
    """Return the memory breakdown of every physical stage of one plan, shape ``(pp,)``.

    On a mixed cluster that of the replica whose GPU a stage fills the most.
    """
    if context.kinds:
        # Plans on several kinds of node are made of plans on one: that module builds on this one.
        from meshwright.costmodels.mixed import mixed_memory

        return mixed_memory(context, plan).memory
    if plan.layer_groups:
        # Layer-wise plans are made of uniform ones: that module builds on this one.
        from meshwright.costmodels.layer_groups import layer_group_memory

        return layer_group_memory(context, plan)
    columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
    stages = columns.take(np.zeros(plan.pp, dtype=np.int64))
    layers = np.array(stage_layers(plan.layers_per_stage, plan.pp, plan.schedule), dtype=np.float64)
    index = np.arange(plan.pp, dtype=np.float64)
    is_first, is_last = index == 0, index == plan.pp - 1
    has_embedding, has_head = is_first.astype(np.float64), is_last.astype(np.float64)
    if plan.schedule in V_SHAPED:
        has_head = has_embedding
    elif plan.schedule == "dualpipe":
        has_embedding = has_head = (is_first | is_last).astype(np.float64)
    activations = layer_activations(context, stages)
    of_virtual_stages = [int(count) for count in leading_per_stage(context, plan.layers_per_stage)]
    leading = np.array(stage_layers(of_virtual_stages, plan.pp, plan.schedule), dtype=np.float64)
    return stage_memory(context, stages, activations, index, layers, has_embedding, has_head, leading)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _CandidateStages:
    """Stages that may be the fullest; arrays of shape ``(num_stages, num_plans)``."""

    index: FloatColumn
    layers: FloatColumn
    leading: FloatColumn
    has_embedding: FloatColumn
    has_head: FloatColumn


def _candidate_stages(context: CostContext, columns: PlanColumns) -> _CandidateStages:
    """Return first and last stage, where there are inner ones the fullest of them and, where it differs, the second."""
    none, one = np.zeros(len(columns)), np.ones(len(columns))
    both = columns.has_both_ends
    # The last stage of DualPipe mirrors the first, that of a V is the turn.
    is_mirror = columns.schedule == Schedules.DUALPIPE
    last_embedding = np.where((columns.pp == 1) | is_mirror, 1.0, 0.0)
    last_head = np.where(both & (columns.pp > 1) & ~is_mirror, 0.0, 1.0)
    inner = columns.pp > 2
    index, layers = [none, columns.pp - 1.0], [columns.layers_first, columns.layers_last]
    embedding, head = [one, last_embedding], [both.astype(np.float64), last_head]
    # Leading dense layers that the first chunk has no room for count as the fuller kind elsewhere.
    of_first = np.minimum(leading_dense_layers(context), columns.chunk_first).astype(np.float64)
    leading = [of_first, np.where((columns.pp == 1) | is_mirror, of_first, 0.0)]
    of_inner = np.where(inner, 0.0, of_first)
    if inner.any():
        # Elsewhere this is the first stage without its ends, which is never fuller than with them.
        index.append(np.where(inner, columns.middle_earliest, 0.0))
        layers.append(np.where(inner, columns.layers_middle, columns.layers_first))
    is_uneven = inner & (columns.layers_second != columns.layers_middle)
    if is_uneven.any():
        index.append(np.where(inner, 1.0, 0.0))
        layers.append(np.where(inner, columns.layers_second, columns.layers_first))
    more = len(index) - 2
    return _CandidateStages(
        index=_stacked(index),
        layers=_stacked(layers),
        leading=_stacked([*leading, *[of_inner] * more]),
        has_embedding=_stacked([*embedding, *[none] * more]),
        has_head=_stacked([*head, *[none] * more]),
    )


def _stacked(arrays: Sequence[NDArray[np.number[Any]]]) -> FloatColumn:
    return np.stack(np.broadcast_arrays(*arrays)).astype(np.float64)
