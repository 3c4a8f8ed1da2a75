"""From a plan to what its iteration costs: the arrays that are simulated, and the closed-form bound.

Both come from the same per-layer times. The bound needs no schedule: the first stage, the fullest middle
stage and the last stage must each run all their micro-batches, after the pipeline has filled up to them and
before it has drained behind them. For equal stages it is exact for GPipe, 1F1B and interleaved 1F1B.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layer import BoundaryTimes, LayerCases, LayerTimes, boundary_times, layer_times
from meshwright.costmodels.parallelism.data import FsdpTimes, fsdp_times, shard_ranks, sync_times
from meshwright.costmodels.parallelism.pipeline import edge_crosses_nodes, stage_send_time
from meshwright.costmodels.parallelism.vocab import vocab_parallel_time
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns, Recomputes, Schedules, Shardings
from meshwright.costmodels.roofline import stream_time
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.training.costs import IterationCosts

__all__ = ["MicroBatchTimes", "iteration_costs", "iteration_time_bound", "micro_batch_times"]

# Fused Adam on 16-bit weights: gradient 4 read, three fp32 states 12 read and 12 written, weight 2 written.
_OPTIMIZER_BYTES = 30.0
# Gradient norm and clipping read the gradients once more.
_NORM_BYTES = 4.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatchTimes:
    """One micro-batch: what one layer, the embedding and the head take; arrays of shape ``(num_plans,)`` [s].

    ``*_communication`` is the exposed communication contained in the figure of the same name.
    """

    layer_forward: FloatColumn
    layer_backward: FloatColumn
    layer_weight_gradient: FloatColumn
    layer_forward_communication: FloatColumn
    layer_backward_communication: FloatColumn
    embedding_forward: FloatColumn
    embedding_backward: FloatColumn
    head_forward: FloatColumn
    head_backward: FloatColumn
    head_weight_gradient: FloatColumn
    boundary_communication: FloatColumn


def micro_batch_times(context: CostContext, columns: PlanColumns) -> MicroBatchTimes:
    """Return the times of one micro-batch, recompute and FSDP exposure included."""
    layer, boundary = _gathered_times(context, columns)
    is_full = columns.recompute == Recomputes.FULL
    is_selective = columns.recompute == Recomputes.SELECTIVE
    recompute = np.where(is_selective, layer.selective_recompute, np.where(is_full, layer.forward, 0.0))
    recompute_communication = np.where(
        is_selective, layer.selective_communication, np.where(is_full, layer.forward_communication, 0.0)
    )
    forward = layer.forward + layer.forward_communication
    backward = layer.backward + recompute + layer.backward_communication + recompute_communication
    model = context.model
    fsdp = fsdp_times(context, columns, model.num_layer_parameters, forward, backward)
    root = _root_fsdp_times(context, columns)
    embedding_forward = boundary.embedding_forward + boundary.embedding_communication + root.forward
    return MicroBatchTimes(
        layer_forward=forward + fsdp.forward,
        layer_backward=backward + fsdp.backward,
        layer_weight_gradient=layer.weight_gradient,
        layer_forward_communication=layer.forward_communication + fsdp.forward,
        layer_backward_communication=layer.backward_communication + recompute_communication + fsdp.backward,
        embedding_forward=embedding_forward,
        embedding_backward=boundary.embedding_backward + root.backward,
        head_forward=boundary.head_forward,
        head_backward=boundary.head_backward + boundary.head_communication,
        head_weight_gradient=boundary.head_weight_gradient,
        boundary_communication=boundary.embedding_communication
        + boundary.head_communication
        + root.forward
        + root.backward,
    )


def iteration_time_bound(context: CostContext, columns: PlanColumns) -> FloatColumn:
    """Return a lower bound of the iteration time of many plans at once [s].

    Shape ``(num_plans,)``. Exact for equal stages and blocking or absent sends; never above the simulated
    time (tested), so a search may discard what it puts behind the best simulated plan.
    """
    times = micro_batch_times(context, columns)
    pp = columns.pp.astype(np.float64)
    vpp = columns.vpp.astype(np.float64)
    batches = columns.num_micro_batches.astype(np.float64)
    send = _bound_send_time(context, columns)
    blocking = send * vpp if context.software.is_send_blocking else np.zeros_like(send)
    extra_forward, extra_backward = vocab_parallel_time(context, columns, times)
    vocab = columns.vocab_parallel >= 2

    def stage(layers: FloatColumn, is_first: bool, is_last: bool) -> tuple[FloatColumn, FloatColumn]:
        forward = layers * times.layer_forward + extra_forward * vpp
        backward = layers * times.layer_backward + extra_backward * vpp
        if is_first:
            forward = forward + np.where(vocab, 0.0, times.embedding_forward)
            backward = backward + np.where(vocab, 0.0, times.embedding_backward)
        if is_last:
            forward = forward + np.where(vocab, 0.0, times.head_forward)
            backward = backward + np.where(vocab, 0.0, times.head_backward)
        return forward, backward

    first_forward, first_backward = stage(columns.layers_first.astype(np.float64), True, False)
    middle_forward, middle_backward = stage(columns.layers_middle.astype(np.float64), False, False)
    last_forward, last_backward = stage(columns.layers_last.astype(np.float64), False, True)
    alone_forward, alone_backward = stage(columns.layers_first.astype(np.float64), True, True)
    # Interleaved stages send at every chunk but the wrap-around of the model's ends.
    first = first_forward + first_backward + blocking + np.maximum(blocking - send, 0.0)
    middle = middle_forward + middle_backward + 2.0 * blocking
    last = last_forward + last_backward + blocking + np.maximum(blocking - send, 0.0)
    embedding_in = np.where(vocab, 0.0, times.embedding_forward)
    embedding_out = np.where(vocab, 0.0, times.embedding_backward)
    ramp_in = (first_forward - embedding_in) / vpp + embedding_in + send
    ramp_out = (first_backward - embedding_out) / vpp + embedding_out + send
    # A zero-bubble stage may end with weight gradients while the stages before it drain: no way out counted.
    is_split = (columns.schedule == Schedules.ZB_H1) | (columns.schedule == Schedules.ZB_H2)
    # The gradient's blocking send is part of the sending stage's own work already.
    counted = send if context.software.is_send_blocking else np.zeros_like(send)
    out_first = np.where(is_split, 0.0, ramp_out - counted)
    through = times.layer_forward + np.where(is_split, 0.0, times.layer_backward)
    sends_through = np.where(is_split, 1.0, 2.0) * send
    between = context.model.num_layers - columns.layers_first - columns.layers_last
    # Unequal middle stages: the fullest may come right after the first, so no other counts before it.
    before = np.where(between == (columns.pp - 2) * columns.layers_middle, between - columns.layers_middle, 0)
    ramp_first = ramp_in + out_first
    ramp_middle = ramp_first + before * through / vpp + np.where(before > 0, pp - 3.0, 0.0) * sends_through
    ramp_last = ramp_first + between * through / vpp + np.maximum(pp - 2.0, 0.0) * sends_through
    rows, inverse = columns.distinct(
        "tp", "cp", "pp", "vpp", "dp", "sharding", "sharding_group", "layers_first"
    )
    tail = _tail_time(context, rows)[inverse]
    # Every path but a zero-bubble stage's own ends at the first stage, with its reduction and optimizer.
    last_tail = np.where(is_split, _fixed_time(context, columns), tail)
    bound = np.maximum(batches * first + tail, ramp_last + batches * last + last_tail)
    through_middle = ramp_middle + batches * middle + last_tail
    bound = np.where(pp > 2.0, np.maximum(bound, through_middle), bound)
    return np.where(pp > 1.0, bound, batches * (alone_forward + alone_backward) + tail)


def _bound_send_time(context: CostContext, columns: PlanColumns) -> FloatColumn:
    """Return the least a stage-to-stage message can take [s].

    Every edge crosses nodes only where stages are whole nodes; elsewhere a bound may not count on it.
    """
    rows, inverse = columns.distinct("tp", "cp", "dp", "pp", "micro_batch_size", "sequence_parallel")
    crosses = (rows.tp * rows.cp * rows.dp >= context.cluster.node.num_gpus).astype(np.float64)
    return stage_send_time(context, rows, crosses)[inverse]


def _tail_time(context: CostContext, columns: PlanColumns) -> FloatColumn:
    """Exposed reduction and gather of the first stage, its optimizer step, and what comes once."""
    parameters = _stage_parameters(context, columns, columns.layers_first.astype(np.float64))
    overlap_reduce, overlap_gather = _overlaps(context)
    # Without overlap a stage waits for all its chunks; with it only the first chunk's rest must be exposed.
    chunk = _stage_parameters(context, columns, columns.layers_first / columns.vpp)
    reduce = sync_times(context, columns, chunk if overlap_reduce else parameters).gradient_reduce
    gather = sync_times(context, columns, chunk if overlap_gather else parameters).parameter_gather
    exposed = reduce * (1.0 - overlap_reduce) + gather * (1.0 - overlap_gather)
    return exposed + _optimizer_time(context, columns, parameters) + _fixed_time(context, columns)


def iteration_costs(context: CostContext, plan: ParallelPlan) -> IterationCosts:
    """Return what one iteration of a plan costs, per virtual stage, ready to be simulated.

    Raises
    ------
    SpecError
        If the batch does not divide into the plan's micro-batches.
    """
    columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
    times = micro_batch_times(context, columns)
    num_virtual = plan.pp * plan.vpp
    layers = np.array(plan.layers_per_stage, dtype=np.float64)
    is_first, is_last = np.zeros(num_virtual), np.zeros(num_virtual)
    is_first[0], is_last[-1] = 1.0, 1.0
    if plan.vocab_parallel in ("vocab_1", "vocab_2", "interlaced"):
        is_first[0], is_last[-1] = 0.0, 0.0
    extra_forward, extra_backward = vocab_parallel_time(context, columns, times)
    forward = (
        layers * times.layer_forward[0]
        + is_first * times.embedding_forward[0]
        + is_last * times.head_forward[0]
        + extra_forward[0]
    )
    backward = (
        layers * times.layer_backward[0]
        + is_first * times.embedding_backward[0]
        + is_last * times.head_backward[0]
        + extra_backward[0]
    )
    stride = plan.tp * plan.cp * plan.dp
    crosses = edge_crosses_nodes(num_virtual, plan.pp, stride, context.cluster.node.num_gpus)
    edges = columns.take(np.zeros(num_virtual, dtype=np.int64))
    send = stage_send_time(context, edges, crosses)
    send[-1] = 0.0
    parameters = _virtual_stage_parameters(context, plan)
    overlap_reduce, overlap_gather = _overlaps(context)
    by_chunk = parameters.reshape(plan.vpp, plan.pp)
    reduced, gathered = (
        parameters if overlap else _on_first_chunk(by_chunk) for overlap in (overlap_reduce, overlap_gather)
    )
    stage_columns = columns.take(np.zeros(plan.pp, dtype=np.int64))
    return IterationCosts(
        num_stages=plan.pp,
        num_chunks=plan.vpp,
        num_micro_batches=int(columns.num_micro_batches[0]),
        forward_time=forward,
        backward_time=backward,
        weight_gradient_time=layers * times.layer_weight_gradient[0]
        + is_last * times.head_weight_gradient[0],
        forward_communication_time=layers * times.layer_forward_communication[0],
        backward_communication_time=layers * times.layer_backward_communication[0],
        send_time=send,
        is_send_blocking=context.software.is_send_blocking,
        gradient_reduce_time=sync_times(context, edges, reduced).gradient_reduce,
        gradient_reduce_overlap=overlap_reduce,
        parameter_gather_time=sync_times(context, edges, gathered).parameter_gather,
        parameter_gather_overlap=overlap_gather,
        optimizer_time=_optimizer_time(context, stage_columns, by_chunk.sum(axis=0)),
        fixed_time=float(_fixed_time(context, columns)[0]),
    )


def _on_first_chunk(by_chunk: FloatColumn) -> FloatColumn:
    """Put a stage's parameters on its first chunk, the last to finish backward and the first to run forward.

    Without overlap frameworks synchronise a stage once, after all its chunks (``by_chunk`` is (vpp, pp)).
    """
    moved = np.zeros_like(by_chunk)
    moved[0] = by_chunk.sum(axis=0)
    return moved.reshape(-1)


def _gathered_times(context: CostContext, columns: PlanColumns) -> tuple[LayerTimes, BoundaryTimes]:
    """Cost the distinct (tp, cp, micro-batch, SP) cases once and hand every plan its case."""
    rows, inverse = columns.distinct("tp", "cp", "micro_batch_size", "sequence_parallel")
    cases = LayerCases(
        tp=rows.tp.astype(np.float64),
        cp=rows.cp.astype(np.float64),
        micro_batch_size=rows.micro_batch_size.astype(np.float64),
        sequence_parallel=rows.sequence_parallel,
    )
    layer, boundary = layer_times(context, cases), boundary_times(context, cases)
    return (
        LayerTimes(**{f.name: getattr(layer, f.name)[inverse] for f in fields(layer)}),
        BoundaryTimes(**{f.name: getattr(boundary, f.name)[inverse] for f in fields(boundary)}),
    )


def _root_fsdp_times(context: CostContext, columns: PlanColumns) -> FsdpTimes:
    """FSDP's root unit (embedding and head): its gather precedes all compute, its reduction follows it."""
    parameters = context.model.num_embedding_parameters + context.model.num_head_parameters
    nothing = np.zeros(len(columns))
    return fsdp_times(context, columns, parameters, nothing, nothing)


def _stage_parameters(context: CostContext, columns: PlanColumns, layers: FloatColumn) -> FloatColumn:
    """Parameters of the first stage on one rank; with one stage the head is there too."""
    model = context.model
    parameters = layers * model.num_layer_parameters + model.num_embedding_parameters
    parameters = parameters + np.where(columns.pp == 1, model.num_head_parameters, 0.0)
    return parameters / columns.tp


def _virtual_stage_parameters(context: CostContext, plan: ParallelPlan) -> FloatColumn:
    model = context.model
    parameters = np.array(plan.layers_per_stage, dtype=np.float64) * model.num_layer_parameters
    parameters[0] += model.num_embedding_parameters
    # A tied head on another stage keeps a copy of the embedding.
    copies = plan.pp > 1 and model.has_tied_embeddings
    parameters[-1] += model.num_embedding_parameters if copies else model.num_head_parameters
    result: FloatColumn = parameters / plan.tp
    return result


def _optimizer_time(context: CostContext, columns: PlanColumns, num_parameters: FloatColumn) -> FloatColumn:
    """Seconds of the fused Adam step on this rank's share of the states."""
    shards = np.where(columns.sharding == Shardings.NONE, 1.0, shard_ranks(columns))
    num_bytes = (_OPTIMIZER_BYTES + _NORM_BYTES) * num_parameters / shards
    return stream_time(
        num_bytes, context.gpu.memory_bandwidth_bytes_per_second, context.calibration.memory_stream_efficiency
    )


def _fixed_time(context: CostContext, columns: PlanColumns) -> FloatColumn:
    """Fixed time of the software, and the tied embedding's sum between first and last stage."""
    fixed = np.full(len(columns), context.software.fixed_time)
    if not context.model.has_tied_embeddings:
        return fixed
    num_bytes = context.software.gradient_bytes * context.model.num_embedding_parameters / columns.tp
    nic = context.cluster.node.nic_bandwidth_per_gpu * context.software.inter_node_efficiency
    link = context.cluster.node.intra_link.bandwidth_bytes_per_second * context.software.inter_node_efficiency
    spans = columns.tp * columns.cp * columns.dp * columns.pp > context.cluster.node.num_gpus
    return fixed + np.where(columns.pp > 1, num_bytes / np.where(spans, nic, link), 0.0)


def _overlaps(context: CostContext) -> tuple[float, float]:
    software, features = context.software, context.features
    if "no_overlap" in features:
        return 0.0, 0.0
    # A run that names the switch has it on, whatever its generation's default.
    reduce = max(software.gradient_reduce_overlap, 0.9 if "overlap_grad_reduce" in features else 0.0)
    gather = max(software.parameter_gather_overlap, 0.9 if "overlap_param_gather" in features else 0.0)
    return reduce, gather
