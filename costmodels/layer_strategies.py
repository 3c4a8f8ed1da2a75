"""What one layer costs under each of several strategies, and what changing between them costs.

The pieces layer-wise plans are made of. Every figure comes from the formulas of uniform plans, so that a plan
whose groups are all alike costs what the uniform plan costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.collectives import collective_time
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.memory import LayerActivations, MemoryColumns, layer_activations, stage_memory
from meshwright.costmodels.micro_batch import micro_batch_times
from meshwright.costmodels.parallelism.data import sync_times
from meshwright.costmodels.parameters import RankParameters, no_parameters
from meshwright.costmodels.plan_columns import FloatColumn, IntColumn, PlanColumns
from meshwright.costmodels.stage import leading_dense_layers, optimizer_time, virtual_stage_parameters
from meshwright.errors import SpecError
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = [
    "BoundaryMemory",
    "StrategyMemory",
    "StrategyTimes",
    "boundary_memory",
    "boundary_parameters_per_stage",
    "group_sync_times",
    "relayout_times",
    "require_equal_layers",
    "stage_rows",
    "strategy_memory",
    "strategy_times",
    "without_layers",
]


def require_equal_layers(context: CostContext) -> None:
    """Raise when the layers of the model differ, so that a layer's cost depends on its place.

    Raises
    ------
    SpecError
        If dense layers lead a mixture-of-experts model.
    """
    leading = leading_dense_layers(context)
    if leading:
        raise SpecError(
            f"layer-wise plans need layers that are all alike; {context.model.name} begins with {leading} dense "
            "layers before its mixture-of-experts layers: plan it uniformly"
        )


def without_layers(plan: ParallelPlan) -> ParallelPlan:
    """Return the plan with embedding and head alone."""
    return replace(plan, layers_per_stage=(0,) * plan.pp, layer_groups=())


def stage_rows(context: CostContext, plan: ParallelPlan) -> PlanColumns:
    """Return a plan without its layers, one row per stage."""
    columns = PlanColumns.from_plans([without_layers(plan)], context.workload.global_batch_size)
    rows: IntColumn = np.zeros(plan.pp, dtype=np.int64)
    return columns.take(rows)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StrategyTimes:
    """One layer and micro-batch under each strategy; arrays of shape ``(num_strategies,)`` [s].

    ``backward`` includes recompute; ``*_communication`` is the exposed communication in the figure of that name.
    """

    forward: FloatColumn
    backward: FloatColumn
    weight_gradient: FloatColumn
    forward_communication: FloatColumn
    backward_communication: FloatColumn


def strategy_times(context: CostContext, columns: PlanColumns) -> StrategyTimes:
    """Return the times of one layer, each strategy given as the uniform plan that uses it throughout."""
    layer = micro_batch_times(context, columns).layer
    return StrategyTimes(
        forward=layer.forward,
        backward=layer.backward + layer.recompute,
        weight_gradient=layer.weight_gradient,
        forward_communication=layer.forward_communication,
        backward_communication=layer.backward_communication + layer.recompute_communication,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StrategyMemory:
    """Bytes of one layer on one rank under each strategy.

    Parameters
    ----------
    weights, gradients, optimizer_states : FloatColumn
        Its states, shape ``(num_strategies,)`` [B].
    unsharded : FloatColumn
        Gathered weights and unreduced gradients it keeps between micro-batches, same shape [B].
    activations : FloatColumn
        What it stores for all micro-batches in flight, by stage, shape ``(num_strategies, num_stages)`` [B].
    working_set, buffer : FloatColumn
        What it needs while it runs: recomputation and gathered weights; gathered sequence-parallel activations.
        Shape ``(num_strategies,)`` [B].
    """

    weights: FloatColumn
    gradients: FloatColumn
    optimizer_states: FloatColumn
    unsharded: FloatColumn
    activations: FloatColumn
    working_set: FloatColumn
    buffer: FloatColumn

    @property
    def kept(self) -> FloatColumn:
        """All that a layer keeps, by stage, shape ``(num_strategies, num_stages)`` [B]."""
        states = self.weights + self.gradients + self.optimizer_states + self.unsharded
        result: FloatColumn = states[:, np.newaxis] + self.activations
        return result

    @property
    def working(self) -> FloatColumn:
        """All that a layer needs while it runs, shape ``(num_strategies,)`` [B]."""
        return self.working_set + self.buffer


def strategy_memory(context: CostContext, columns: PlanColumns, num_stages: int) -> StrategyMemory:
    """Return the memory of one layer, each strategy given as the uniform plan that uses it throughout."""
    activations = layer_activations(context, columns)
    one, nothing = np.ones(len(columns)), np.zeros(len(columns))

    def measured(
        held: LayerActivations, layers: FloatColumn, part: PlanColumns, stage: FloatColumn
    ) -> MemoryColumns:
        none = np.zeros(len(part))
        return stage_memory(context, part, held, stage, layers, none, none)

    with_layer = measured(activations, one, columns, nothing)
    # Nothing but what a running layer needs, and nothing but what the root unit does.
    running = measured(activations, nothing, columns, nothing)
    root = measured(_without_layer(activations), nothing, columns, nothing)
    alone = replace(columns, pp=np.ones_like(columns.pp))
    strategy = np.repeat(np.arange(len(columns)), num_stages)
    stage = np.tile(np.arange(num_stages, dtype=np.float64), len(columns))
    stored = measured(activations.take(strategy), np.ones(len(strategy)), columns.take(strategy), stage)
    return StrategyMemory(
        weights=with_layer.weights,
        gradients=with_layer.gradients,
        optimizer_states=with_layer.optimizer_states,
        unsharded=with_layer.working_set - running.working_set,
        activations=stored.activations.reshape(len(columns), num_stages),
        working_set=running.working_set - root.working_set,
        # A single stage sends nothing: what is left is the sequence-parallel buffer.
        buffer=measured(activations, nothing, alone, nothing).communication,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BoundaryMemory:
    """Embedding, head and everything else that no layer holds; arrays of one shape.

    Parameters
    ----------
    held : MemoryColumns
        Always there, ``communication`` without the buffer below [B].
    working_set, buffer : FloatColumn
        What embedding or head need while they run [B].
    """

    held: MemoryColumns
    working_set: FloatColumn
    buffer: FloatColumn

    @property
    def working(self) -> FloatColumn:
        """All that embedding or head need while they run [B]."""
        return self.working_set + self.buffer


def boundary_memory(
    context: CostContext,
    columns: PlanColumns,
    stage: FloatColumn,
    has_embedding: FloatColumn,
    has_head: FloatColumn,
) -> BoundaryMemory:
    """Return what stages hold besides layers: embedding and head, logits, send buffers, the framework.

    Parameters
    ----------
    context : CostContext
        Job and software.
    columns : PlanColumns
        Plans whose own strategy embedding and head use.
    stage, has_embedding, has_head : FloatColumn
        As for :func:`meshwright.costmodels.memory.stage_memory`.
    """
    activations = layer_activations(context, columns)
    nothing = np.zeros(len(columns))
    held = stage_memory(
        context, columns, _without_layer(activations), stage, nothing, has_embedding, has_head
    )
    strategy = strategy_memory(context, columns, 1)
    # Multi-token prediction puts layers of the plan's own strategy behind the last one.
    runs_layer = has_head if context.model.num_mtp_layers else nothing
    return BoundaryMemory(
        held=replace(held, communication=held.communication - strategy.buffer),
        working_set=runs_layer * strategy.working_set,
        buffer=np.maximum(has_embedding, has_head) * strategy.buffer,
    )


def boundary_parameters_per_stage(context: CostContext, plan: ParallelPlan) -> RankParameters:
    """Return the parameters of embedding and head on one rank of each stage, shape ``(num_stages,)``."""
    return virtual_stage_parameters(context, without_layers(plan), stage_rows(context, plan))


def group_sync_times(
    context: CostContext, columns: PlanColumns, parameters: RankParameters
) -> NDArray[np.float64]:
    """Return gradient reduction, parameter gather and optimizer step of ranks that hold parameters alike.

    Parameters
    ----------
    context : CostContext
        Job and software.
    columns : PlanColumns
        Uniform plans; their tp and sharding decide.
    parameters : RankParameters
        What one rank holds under that strategy, shape ``(num_plans,)``.

    Returns
    -------
    NDArray[np.float64]
        Shape ``(num_plans, 3)``; 0 for ranks that hold nothing [s].
    """
    sync = sync_times(context, columns, parameters)
    # Nothing is offloaded, so the step waits for no gradient on its way to the host.
    steps = optimizer_time(context, columns, parameters, np.zeros(len(columns)))
    times = np.column_stack([sync.gradient_reduce, sync.parameter_gather, steps])
    result: NDArray[np.float64] = np.where(parameters.total[:, np.newaxis] > 0.0, times, 0.0)
    return result


def relayout_times(
    context: CostContext, plan: ParallelPlan, layouts: Sequence[tuple[int, bool]]
) -> NDArray[np.float64]:
    """Return the seconds of handing activations from one layout to another, shape ``(num_layouts, num_layouts)``.

    A layout is (tp, sequence parallel): every tensor parallel group holds its own sequences, whole on each rank or
    split over them along the sequence. Groups nest, so the larger of two holds the sequences of both. Who holds
    them whole only slices; otherwise the larger group gathers what is missing and slices. With context
    parallelism another tp moves the parts of a sequence too, so all cp ranks gather. A gradient goes the other way.
    Where a chain through a third layout is faster, it is taken.

    Parameters
    ----------
    context : CostContext
        Job, calibration and software.
    plan : ParallelPlan
        Ranks of a stage, cp and micro-batch.
    layouts : Sequence[tuple[int, bool]]
        Tensor parallel degree and whether the sequence is split over it.
    """
    tp = np.array([degree for degree, _ in layouts], dtype=np.float64)
    is_split = np.array([split and degree > 1 for degree, split in layouts])
    source, target = (axis.reshape(-1) for axis in np.indices((len(tp), len(tp))))
    larger = np.maximum(tp[source], tp[target])
    # Tensor parallel ranks are adjacent and cp ranks lie behind them: another tp puts them elsewhere.
    moved = np.where(tp[source] != tp[target], float(plan.cp), 1.0)
    sequences = plan.dp * plan.micro_batch_size * larger / (plan.tp * plan.dp)
    tokens = sequences * context.workload.sequence_length / plan.cp * moved
    num_bytes = context.element_bytes * tokens * context.model.hidden_size
    # Ranks of a group that hold the same are one source.
    copies = np.where(is_split[source], 1.0, tp[source])
    gather = collective_time(
        "all_gather",
        num_bytes,
        context.place_group(larger * moved / copies, copies),
        context.cluster,
        context.calibration,
        context.software.inter_node_efficiency,
    )
    is_held = (source == target) | (~is_split[source] & (tp[source] >= tp[target]) & (moved == 1.0))
    times: NDArray[np.float64] = np.where(is_held, 0.0, gather).reshape(len(tp), len(tp))
    for via in range(len(tp)):
        times = np.minimum(times, times[:, [via]] + times[[via]])
    return times


def _without_layer(activations: LayerActivations) -> LayerActivations:
    """Return the same layer as if it neither recomputed nor held parameters."""
    nothing = np.zeros_like(activations.recomputed)
    return replace(activations, recomputed=nothing, parameters=no_parameters(len(nothing)))
