"""Where an iteration's time goes: terms of every pipeline stage that add up to the iteration time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.micro_batch import micro_batch_times
from meshwright.costmodels.mixed import slowest_group, stages_of_virtual, with_batch
from meshwright.costmodels.parallelism.vocab import vocab_parallel_time
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns, Shardings
from meshwright.costmodels.stage import leading_per_stage
from meshwright.costmodels.topology import lies_apart, stage_contexts
from meshwright.simcore.domain.layer_groups import groups_by_stage, uniform_plan
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.schedules import BACKWARD, FORWARD, INPUT_GRADIENT
from meshwright.simcore.training.attribution import IdleTime
from meshwright.simcore.training.iteration import IterationResult

__all__ = ["GROUPS", "TERMS", "Breakdown", "iteration_breakdown"]

GROUPS: Mapping[str, tuple[str, ...]] = {
    "compute": ("compute",),
    "recompute": ("recompute",),
    "embedding and head": ("embedding_and_head",),
    "tensor parallel": ("tensor_parallel", "layout_change"),
    "context parallel": ("context_parallel",),
    "expert parallel": ("expert_parallel",),
    "data parallel": ("sharded_data_parallel", "parameter_gather", "gradient_reduce"),
    "offload": ("offload_copies",),
    "pipeline sends": ("pipeline_send", "vocabulary_exchange"),
    "pipeline bubble": ("warm_up", "activation_wait", "gradient_wait", "cool_down", "optimizer_barrier"),
    "optimizer": ("optimizer",),
    "fixed": ("fixed",),
}
"""Terms by what a user can change; in the order they are shown."""

TERMS: tuple[str, ...] = tuple(term for terms in GROUPS.values() for term in terms)
"""Every term. Those of the bubble, ``parameter_gather``, ``gradient_reduce`` and ``fixed`` are idle time of the compute
stream; the others are work or exposed communication on it."""

_AXES = {
    "tp": "tensor_parallel",
    "cp": "context_parallel",
    "ep": "expert_parallel",
    "dp": "sharded_data_parallel",
    "offload": "offload_copies",
}
# Terms of one operation; sends are added where they hold the compute stream.
_WORK = (
    "compute",
    "recompute",
    "embedding_and_head",
    *_AXES.values(),
    "layout_change",
    "vocabulary_exchange",
)
# What a forward and a backward that run jointly hide, in the order in which it is taken off.
_HIDDEN_FIRST = ("expert_parallel", "tensor_parallel", "context_parallel", "sharded_data_parallel", "compute")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Breakdown:
    """One iteration by stage and term.

    Parameters
    ----------
    iteration_time : float
        One optimizer step [s].
    terms : Mapping[str, FloatColumn]
        Seconds of each of :data:`TERMS`, shape ``(num_stages,)``; of every stage they add up to ``iteration_time``.
    busiest_stage : int
        Stage with the most work: the critical one.
    """

    iteration_time: float
    terms: Mapping[str, FloatColumn]
    busiest_stage: int

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return len(self.terms["compute"])

    def stage(self, stage: int) -> dict[str, float]:
        """Return every term of one stage [s]."""
        return {term: float(values[stage]) for term, values in self.terms.items()}

    def grouped(self, stage: int) -> dict[str, float]:
        """Return the groups of one stage, in the order of :data:`GROUPS` [s]."""
        terms = self.stage(stage)
        return {group: sum(terms[term] for term in members) for group, members in GROUPS.items()}


def iteration_breakdown(context: CostContext, plan: ParallelPlan, result: IterationResult) -> Breakdown:
    """Return where the time of a simulated iteration goes.

    Parameters
    ----------
    context : CostContext
        Job and software.
    plan : ParallelPlan
        The plan.
    result : IterationResult
        Its simulation under the same context.

    Notes
    -----
    Work and exposed communication of each virtual stage come from the cost model and are counted once per operation
    that ran; sends are those that hold the compute stream. What schedules that run a forward and a backward jointly
    hide is taken off the communication it hides. Idle time is attributed by the simulation.
    """
    forward, backward = _virtual_stage_terms(context, plan, result)
    if result.costs.is_send_blocking:
        send = result.costs.send_time.copy()
        # Nothing is sent from one copy of the model to the next.
        send.reshape(result.operations.num_model_copies, -1)[:, -1] = 0.0
        forward["pipeline_send"] = send
        backward["pipeline_send"] = np.concatenate([[0.0], send[:-1]])
    forwards, backwards = _operation_counts(result)
    nothing = np.zeros(result.costs.num_stages)
    terms = {term: nothing.copy() for term in TERMS}
    for counts, per_operation in ((forwards, forward), (backwards, backward)):
        for term, seconds in per_operation.items():
            terms[term] = terms[term] + counts @ seconds
    terms["optimizer"] = result.costs.optimizer_time.copy()
    _take_off_hidden(terms, result)
    for cause in fields(IdleTime):
        terms[cause.name] = getattr(result.idle_time, cause.name).copy()
    return Breakdown(
        iteration_time=result.iteration_time, terms=terms, busiest_stage=int(result.busy_time.argmax())
    )


def _virtual_stage_terms(
    context: CostContext, plan: ParallelPlan, result: IterationResult
) -> tuple[dict[str, FloatColumn], dict[str, FloatColumn]]:
    """Return the terms of one micro-batch's forward and backward, shape ``(pp * vpp * copies,)`` each [s]."""
    if context.kinds:
        return _mixed_terms(context, plan, result)
    if lies_apart(context, plan):
        return _terms_on_hosts(context, plan, result)
    num_virtual = len(result.costs.forward_time)
    forward = {term: np.zeros(num_virtual) for term in _WORK}
    backward = {term: np.zeros(num_virtual) for term in _WORK}
    for part, layers, leading in _layer_parts(context, plan, result.operations.num_model_copies):
        _add_layers(context, part, layers, leading, forward, backward)
    _add_boundary(context, plan, forward, backward)
    if plan.layer_groups:
        # Between groups of layers nothing but the change of layout communicates.
        for terms, inside in (
            (forward, result.costs.forward_communication_time),
            (backward, result.costs.backward_communication_time),
        ):
            terms["layout_change"] = inside - sum(terms[term] for term in _AXES.values())
    return forward, backward


def _terms_on_hosts(
    context: CostContext, plan: ParallelPlan, result: IterationResult
) -> tuple[dict[str, FloatColumn], dict[str, FloatColumn]]:
    """Return the terms of each virtual stage with the links of its stage's hosts."""
    stage_of = stages_of_virtual(plan, result.costs)
    num_virtual = len(result.costs.forward_time)
    sides: tuple[dict[str, FloatColumn], dict[str, FloatColumn]] = ({}, {})
    for stages, own in stage_contexts(context, plan):
        is_own = np.isin(stage_of, stages)
        for side, terms in zip(sides, _virtual_stage_terms(own, plan, result), strict=True):
            for term, seconds in terms.items():
                side.setdefault(term, np.zeros(num_virtual))[is_own] = seconds[is_own]
    return sides


def _mixed_terms(
    context: CostContext, plan: ParallelPlan, result: IterationResult
) -> tuple[dict[str, FloatColumn], dict[str, FloatColumn]]:
    """Return the terms of the slowest replica, of each virtual stage those on the kind of node that runs it."""
    group = slowest_group(context, plan)
    kind_of = np.array(group.kinds)[stages_of_virtual(plan, result.costs)]
    alike = replace(plan, micro_batch_shares=())
    batch = group.num_micro_batches * plan.dp * plan.micro_batch_size
    by_kind = {
        kind: _virtual_stage_terms(with_batch(context.kinds[kind], batch), alike, result)
        for kind in sorted(set(group.kinds))
    }
    forward, backward = (
        {
            term: np.select(
                [kind_of == kind for kind in by_kind], [terms[side][term] for terms in by_kind.values()]
            )
            for term in _WORK
        }
        for side in (0, 1)
    )
    return forward, backward


def _layer_parts(
    context: CostContext, plan: ParallelPlan, copies: int
) -> Iterator[tuple[ParallelPlan, FloatColumn, FloatColumn]]:
    """Yield uniform plans with the layers of each virtual stage that run so, and the leading dense ones of them."""
    if not plan.layer_groups:
        layers = np.array(plan.layers_per_stage * copies, dtype=np.float64)
        yield plan, layers, np.tile(leading_per_stage(context, plan.layers_per_stage), copies)
        return
    for stage, groups in enumerate(groups_by_stage(plan)):
        for group in groups:
            layers = np.zeros(plan.pp)
            layers[stage] = group.num_layers
            yield uniform_plan(plan, group), layers, np.zeros(plan.pp)


def _add_layers(
    context: CostContext,
    plan: ParallelPlan,
    layers: FloatColumn,
    leading: FloatColumn,
    forward: dict[str, FloatColumn],
    backward: dict[str, FloatColumn],
) -> None:
    """Add some layers of each virtual stage, of which the first ``leading`` are a MoE model's dense ones."""
    columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
    times = micro_batch_times(context, columns)
    for count, cost in ((layers - leading, times.layer), (leading, times.dense_layer)):
        forward["compute"] += count * (cost.forward - cost.forward_communication)
        backward["compute"] += count * (cost.backward - cost.backward_communication)
        for terms, axes in ((forward, cost.forward_axes), (backward, cost.backward_axes)):
            for axis, seconds in axes.items():
                terms[_AXES[axis]] += count * seconds
    recomputed = np.minimum(layers, float(columns.recompute_layers[0]))
    dense = np.minimum(leading, recomputed)
    for count, cost in ((recomputed - dense, times.layer), (dense, times.dense_layer)):
        backward["recompute"] += count * (cost.recompute - cost.recompute_communication)
        for axis, seconds in cost.recompute_axes.items():
            backward[_AXES[axis]] += count * seconds


def _add_boundary(
    context: CostContext,
    plan: ParallelPlan,
    forward: dict[str, FloatColumn],
    backward: dict[str, FloatColumn],
) -> None:
    """Add embedding and head: on the first and last virtual stage, or a slice on each with vocabulary parallelism."""
    columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
    times = micro_batch_times(context, columns)
    if plan.vocab_parallel in ("vocab_1", "vocab_2", "interlaced"):
        # The slices carry the boundary's own communication too; only the exchange over stages stands apart.
        nothing = np.zeros(len(columns))
        slices = vocab_parallel_time(context, columns, times.boundary_forward, times.boundary_backward)
        exchanges = vocab_parallel_time(context, columns, nothing, nothing)
        for terms, part, exchange in zip((forward, backward), slices, exchanges, strict=True):
            terms["embedding_and_head"] += part[0] - exchange[0]
            terms["vocabulary_exchange"] += exchange[0]
        return
    # Without sharding only tensor parallelism is left of the embedding's communication.
    unsharded = replace(columns, sharding=np.full_like(columns.sharding, Shardings.NONE))
    split = float(micro_batch_times(context, unsharded).embedding_communication[0])
    # The ends of every copy of the model.
    first = slice(0, None, len(plan.layers_per_stage))
    last = slice(len(plan.layers_per_stage) - 1, None, len(plan.layers_per_stage))
    forward["tensor_parallel"][first] += split
    forward["sharded_data_parallel"][first] += times.embedding_communication[0] - split
    backward["sharded_data_parallel"][first] += times.root_backward_communication[0]
    backward["tensor_parallel"][last] += times.head_communication[0]
    ends = forward["embedding_and_head"], backward["embedding_and_head"]
    ends[0][first] += times.embedding_forward[0] - times.embedding_communication[0]
    ends[0][last] += times.head_forward[0]
    ends[1][first] += times.embedding_backward[0] - times.root_backward_communication[0]
    ends[1][last] += times.head_backward[0] - times.head_communication[0]


def _operation_counts(result: IterationResult) -> tuple[FloatColumn, FloatColumn]:
    """Return how often each stage ran each virtual stage forward and backward, per stage and virtual stage."""
    operations = result.operations
    virtual = np.take_along_axis(operations.placement, operations.chunk, axis=1)
    counts = []
    for is_counted in (
        operations.kind == FORWARD,
        (operations.kind == BACKWARD) | (operations.kind == INPUT_GRADIENT),
    ):
        count = np.zeros((operations.num_stages, len(result.costs.forward_time)))
        stage = np.broadcast_to(np.arange(operations.num_stages)[:, None], virtual.shape)
        np.add.at(count, (stage[is_counted], virtual[is_counted]), 1.0)
        counts.append(count)
    return counts[0], counts[1]


def _take_off_hidden(terms: dict[str, FloatColumn], result: IterationResult) -> None:
    """Take off what operations that run jointly hide, communication first."""
    if result.operations.is_overlapped is None:
        return
    hidden = np.maximum(sum(terms.values()) - result.busy_time, 0.0)
    for term in _HIDDEN_FIRST:
        taken = np.minimum(terms[term], hidden)
        terms[term] = terms[term] - taken
        hidden = hidden - taken
