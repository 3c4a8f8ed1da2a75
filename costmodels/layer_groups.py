"""Times and memory of layer-wise plans: stages whose groups of layers run under strategies of their own.

A stage takes as long as its layers, the changes of layout between its groups (from and back to the layout in
which stages pass activations on) and the embedding or head at the ends. Its ranks synchronise gradients once per
iteration per group of ranks that hold parameters alike: layers of equal tp and sharding together, with embedding
and head where those match the plan's own. A rank holds the states and stored activations of all its layers, and
what the neediest layer needs while it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.layer_strategies import (
    boundary_memory,
    boundary_parameters_per_stage,
    group_sync_times,
    relayout_times,
    require_equal_layers,
    stage_rows,
    strategy_memory,
    strategy_times,
    without_layers,
)
from meshwright.costmodels.memory import MemoryColumns, layer_activations
from meshwright.costmodels.parameters import RankParameters
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns
from meshwright.simcore.domain.layer_groups import LayerGroup, groups_by_stage, uniform_plan
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.training.costs import IterationCosts

__all__ = ["layer_group_costs", "layer_group_memory"]

_Layout = tuple[int, bool]


def layer_group_costs(context: CostContext, plan: ParallelPlan) -> IterationCosts:
    """Return what one iteration of a layer-wise plan costs, per stage, ready to be simulated.

    Raises
    ------
    SpecError
        If the batch does not divide into micro-batches, or the layers of the model differ.
    """
    require_equal_layers(context)
    strategies = _strategies(plan)
    columns = _columns(context, plan, strategies)
    counts = _counts(plan, strategies)
    times = strategy_times(context, columns)
    ends = iteration_costs(context, without_layers(plan))
    changes_forward, changes_backward = _relayouts(context, plan)
    reduce, gather, optimizer = _synchronisation(context, plan, strategies, columns, counts)
    return replace(
        ends,
        forward_time=ends.forward_time + counts @ times.forward + changes_forward,
        backward_time=ends.backward_time + counts @ times.backward + changes_backward,
        weight_gradient_time=ends.weight_gradient_time + counts @ times.weight_gradient,
        forward_communication_time=ends.forward_communication_time
        + counts @ times.forward_communication
        + changes_forward,
        backward_communication_time=ends.backward_communication_time
        + counts @ times.backward_communication
        + changes_backward,
        gradient_reduce_time=reduce,
        parameter_gather_time=gather,
        optimizer_time=optimizer,
    )


def layer_group_memory(context: CostContext, plan: ParallelPlan) -> MemoryColumns:
    """Return the memory breakdown of every stage of a layer-wise plan, shape ``(pp,)``.

    Raises
    ------
    SpecError
        If the batch does not divide into micro-batches, or the layers of the model differ.
    """
    require_equal_layers(context)
    strategies = _strategies(plan)
    counts = _counts(plan, strategies)
    layer = strategy_memory(context, _columns(context, plan, strategies), plan.pp)
    index = np.arange(plan.pp)
    has_embedding, has_head = (index == 0).astype(np.float64), (index == plan.pp - 1).astype(np.float64)
    ends = boundary_memory(
        context, stage_rows(context, plan), index.astype(np.float64), has_embedding, has_head
    )
    # The neediest of a stage's layers, or its embedding or head.
    running = np.where(counts > 0, layer.working, -1.0)
    neediest = running.argmax(axis=1)
    is_layer = running[index, neediest] >= ends.working
    held = ends.held
    return MemoryColumns(
        weights=held.weights + counts @ layer.weights,
        gradients=held.gradients + counts @ layer.gradients,
        optimizer_states=held.optimizer_states + counts @ layer.optimizer_states,
        activations=held.activations + (counts * layer.activations.T).sum(axis=1),
        working_set=held.working_set
        + counts @ layer.unsharded
        + np.where(is_layer, layer.working_set[neediest], ends.working_set),
        logits=held.logits,
        communication=held.communication + np.where(is_layer, layer.buffer[neediest], ends.buffer),
        framework=held.framework,
    )


def _strategies(plan: ParallelPlan) -> tuple[LayerGroup, ...]:
    """Return the distinct strategies of a plan, each as a group of one layer."""
    return tuple(dict.fromkeys(replace(group, num_layers=1) for group in plan.layer_groups))


def _columns(context: CostContext, plan: ParallelPlan, strategies: Sequence[LayerGroup]) -> PlanColumns:
    plans = [uniform_plan(plan, strategy) for strategy in strategies]
    return PlanColumns.from_plans(plans, context.workload.global_batch_size)


def _counts(plan: ParallelPlan, strategies: Sequence[LayerGroup]) -> FloatColumn:
    """Return the layers of each strategy on each stage, shape ``(pp, num_strategies)``."""
    counts = np.zeros((plan.pp, len(strategies)))
    for stage, groups in enumerate(groups_by_stage(plan)):
        for group in groups:
            counts[stage, strategies.index(replace(group, num_layers=1))] += group.num_layers
    return counts


def _relayouts(context: CostContext, plan: ParallelPlan) -> tuple[FloatColumn, FloatColumn]:
    """Return the changes of layout of each stage per micro-batch, forward and backward, shape ``(pp,)`` [s]."""
    ends: _Layout = (plan.tp, plan.sequence_parallel)
    routes = [
        [ends, *((group.tp, group.sequence_parallel) for group in groups), ends]
        for groups in groups_by_stage(plan)
    ]
    layouts = list(dict.fromkeys(layout for route in routes for layout in route))
    times = relayout_times(context, plan, layouts)

    def walked(route: Sequence[_Layout]) -> float:
        return float(sum(times[layouts.index(a), layouts.index(b)] for a, b in pairwise(route)))

    return (
        np.array([walked(route) for route in routes]),
        np.array([walked(route[::-1]) for route in routes]),
    )


def _synchronisation(
    context: CostContext,
    plan: ParallelPlan,
    strategies: Sequence[LayerGroup],
    columns: PlanColumns,
    counts: FloatColumn,
) -> tuple[FloatColumn, FloatColumn, FloatColumn]:
    """Return gradient reduction, parameter gather and optimizer step of each stage, shape ``(pp,)`` [s].

    Groups of ranks synchronise one after the other on the stage's communication stream.
    """
    layer = layer_activations(context, columns).parameters
    ends = boundary_parameters_per_stage(context, plan)
    total = np.zeros((plan.pp, 3))
    is_own = np.array([(s.tp, s.sharding) == (plan.tp, plan.sharding) for s in strategies])
    held = _stacked(layer, counts * is_own) + ends
    total += group_sync_times(context, stage_rows(context, plan), held)
    others = dict.fromkeys(
        (s.tp, s.sharding) for s, owned in zip(strategies, is_own, strict=True) if not owned
    )
    for pair in others:
        members = np.array([(s.tp, s.sharding) == pair for s in strategies])
        rows = np.full(plan.pp, np.flatnonzero(members)[0])
        total += group_sync_times(context, columns.take(rows), _stacked(layer, counts * members))
    reduce, gather, optimizer = total.T
    return reduce, gather, optimizer


def _stacked(layer: RankParameters, counts: FloatColumn) -> RankParameters:
    """Return the parameters of so many layers of each strategy, per stage."""
    return RankParameters(**{f.name: counts @ getattr(layer, f.name) for f in fields(layer)})
