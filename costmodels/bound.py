"""A closed-form lower bound of the iteration time, for many plans at once.

No schedule is needed: the first stage, the fullest inner stage and the last stage must each run all their
micro-batches, after the pipeline has filled up to them and before it has drained behind them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.micro_batch import (
    MicroBatchTimes,
    layers_backward,
    layers_forward,
    micro_batch_times,
)
from meshwright.costmodels.parallelism.data import sync_times
from meshwright.costmodels.parallelism.pipeline import blocks_on_send, stage_send_time
from meshwright.costmodels.parallelism.vocab import vocab_parallel_time
from meshwright.costmodels.plan_columns import (
    ALL_LAYERS,
    FloatColumn,
    IntColumn,
    PlanColumns,
    Schedules,
    VocabParallels,
)
from meshwright.costmodels.stage import (
    first_stage_parameters,
    fixed_time,
    leading_dense_layers,
    optimizer_time,
    overlaps,
)

__all__ = ["iteration_time_bound"]


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
    blocks = blocks_on_send(context, columns.vpp)
    blocking = np.where(blocks, send * vpp, 0.0)
    extra_forward, extra_backward = vocab_parallel_time(
        context, columns, times.boundary_forward, times.boundary_backward
    )
    vocab = columns.vocab_parallel >= VocabParallels.VOCAB_1

    leading = np.minimum(leading_dense_layers(context), columns.chunk_first).astype(np.float64)
    cheapest = _cheapest_layer(times, leading_dense_layers(context) > int(columns.chunk_first.min(initial=0)))
    no_layers = np.zeros(len(columns))

    def stage(layers: FloatColumn, is_first: bool, is_last: bool) -> tuple[FloatColumn, FloatColumn]:
        own = columns.chunk_first if is_first else columns.chunk_last if is_last else None
        recomputed = _recomputed_layers(columns, layers, own)
        kinds = times if is_first else cheapest
        forward = layers_forward(kinds, layers, leading if is_first else no_layers) + extra_forward * vpp
        backward = (
            layers_backward(kinds, layers, leading if is_first else no_layers, recomputed)
            + extra_backward * vpp
        )
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
    wrap = np.maximum(blocking - send, 0.0)
    first = first_forward + first_backward + blocking + wrap
    middle = middle_forward + middle_backward + 2.0 * blocking
    last = last_forward + last_backward + blocking + wrap
    embedding_in = np.where(vocab, 0.0, times.embedding_forward)
    embedding_out = np.where(vocab, 0.0, times.embedding_backward)
    chunk_first = columns.chunk_first.astype(np.float64)
    ramp_in = layers_forward(times, chunk_first, leading) + extra_forward + embedding_in + send
    ramp_out = (
        layers_backward(times, chunk_first, leading, np.minimum(chunk_first, columns.recompute_layers))
        + extra_backward
        + embedding_out
        + send
    )
    # A zero-bubble stage may end with weight gradients while the stages before it drain: no way out counted.
    is_split = columns.schedule > Schedules.INTERLEAVED
    # The gradient's blocking send is part of the sending stage's own work already.
    counted = np.where(blocks, send, 0.0)
    out_first = np.where(is_split, 0.0, ramp_out - counted)
    # Of stages in between that recompute a part of their layers, the recomputed ones are not counted.
    recompute = np.where(columns.recompute_layers >= ALL_LAYERS, cheapest.layer.recompute, 0.0)
    through = cheapest.layer.forward + np.where(is_split, 0.0, cheapest.layer.backward + recompute)
    sends_through = np.where(is_split, 1.0, 2.0) * send
    ramp_first = ramp_in + out_first
    ramp_middle = (
        ramp_first + columns.chunk_before * through + _stages_between(columns.middle_latest) * sends_through
    )
    ramp_last = ramp_first + columns.chunk_between * through + _stages_between(columns.pp - 1) * sends_through
    rows, inverse = columns.distinct(
        *("tp", "cp", "pp", "vpp", "dp", "ep", "etp"),
        *("sharding", "sharding_group", "layers_first", "chunk_first"),
        *("schedule", "optimizer_offload", "offload_share", "parameter_offload"),
    )
    # A blocking send is part of the operation the gather may run beside.
    window_in = np.where(pp > 1.0, ramp_in - send + counted, alone_forward)
    window_out = np.where(pp > 1.0, ramp_out - send, alone_backward)
    # Enough for any copy to hide in where gradients leave the device: a bound may not count on less.
    tail = _tail_time(context, rows, inverse, window_in, window_out)
    # Every path but a zero-bubble stage's own ends at the first stage, with its reduction and optimizer.
    last_tail = np.where(is_split, fixed_time(context, columns), tail)
    bound = np.maximum(batches * first + tail, ramp_last + batches * last + last_tail)
    through_middle = ramp_middle + batches * middle + last_tail
    bound = np.where(pp > 2.0, np.maximum(bound, through_middle), bound)
    bound = np.where(pp > 1.0, bound, batches * (alone_forward + alone_backward) + tail)
    is_bent = columns.has_both_ends & (columns.pp > 1)
    if is_bent.any():
        turn_forward, turn_backward = stage(columns.layers_last.astype(np.float64), False, False)
        stages = (
            alone_forward + alone_backward,
            middle_forward + middle_backward,
            turn_forward + turn_backward,
        )
        step = (
            optimizer_time(
                context,
                rows,
                first_stage_parameters(context, rows, rows.layers_first),
                np.full(len(rows), np.inf),
            )
            + fixed_time(context, rows)
        )[inverse]
        bound = np.where(is_bent, _bent_bound(columns, times, stages, step), bound)
    return bound


def _recomputed_layers(columns: PlanColumns, layers: FloatColumn, own: IntColumn | None) -> FloatColumn:
    """Return how many of a stage's layers are recomputed at least.

    ``own`` is the chunk at the model's end; the others of a stage differ by one layer. On a V, whose two chunks may
    be both, some of the layers count as none.
    """
    held = np.zeros(len(columns)) if own is None else own.astype(np.float64)
    others = columns.vpp - (0.0 if own is None else 1.0)
    per_chunk = (layers - held) / np.maximum(others, 1.0)
    some = np.minimum(columns.recompute_layers, held) + others * np.minimum(
        columns.recompute_layers, np.floor(per_chunk)
    )
    some = np.where(columns.has_both_ends & (columns.pp > 1), 0.0, some)
    recomputed: FloatColumn = np.where(columns.recompute_layers >= ALL_LAYERS, layers, some)
    return recomputed


def _bent_bound(
    columns: PlanColumns,
    times: MicroBatchTimes,
    stages: tuple[FloatColumn, FloatColumn, FloatColumn],
    step: FloatColumn,
) -> FloatColumn:
    """Return the bound of schedules that put both ends of the model on the first stage [s].

    The slowest stage runs all its micro-batches and a step follows; filling and draining are filled with weight
    gradients at best. DualPipe gives each of its two chunks half of them, and hides the expert exchange at best.

    Parameters
    ----------
    columns : PlanColumns
        Plans.
    times : MicroBatchTimes
        Of one micro-batch.
    stages : tuple[FloatColumn, FloatColumn, FloatColumn]
        First, fullest inner and last stage: both chunks, forward and backward [s].
    step : FloatColumn
        Optimizer step of the first stage and the fixed time [s].
    """
    is_dual = (columns.schedule == Schedules.DUALPIPE) | (columns.schedule == Schedules.DUALPIPE_V)
    exchange = times.layer.forward_axes["ep"] + times.layer.backward_axes["ep"]
    passes = np.where(columns.schedule == Schedules.DUALPIPE, 0.5, 1.0)
    slowest = np.zeros(len(columns))
    layers = (columns.layers_first, columns.layers_middle, columns.layers_last)
    for work, held in zip(stages, layers, strict=True):
        hidden = np.where(is_dual, held * exchange, 0.0)
        slowest = np.maximum(slowest, np.maximum(work - hidden, 0.0))
    return columns.num_micro_batches * passes * slowest + np.where(is_dual, 0.0, step)


def _cheapest_layer(times: MicroBatchTimes, is_mixed: bool) -> MicroBatchTimes:
    """Return times in which a layer behind the first stage costs the least of its two kinds, where it may be either."""
    if not is_mixed:
        return times
    layer, dense = times.layer, times.dense_layer
    least = replace(
        layer,
        forward=np.minimum(layer.forward, dense.forward),
        backward=np.minimum(layer.backward, dense.backward),
        recompute=np.minimum(layer.recompute, dense.recompute),
    )
    return replace(times, layer=least)


def _stages_between(stage: IntColumn) -> FloatColumn:
    """Return how many stages stand between the first and another."""
    between: FloatColumn = np.maximum(stage - 1.0, 0.0)
    return between


def _bound_send_time(context: CostContext, columns: PlanColumns) -> FloatColumn:
    """Return the least a stage-to-stage message can take [s].

    Every edge crosses nodes only where stages are whole nodes; elsewhere a bound may not count on it.
    """
    rows, inverse = columns.distinct("tp", "cp", "dp", "pp", "micro_batch_size", "sequence_parallel")
    crosses = (rows.tp * rows.cp * rows.dp >= context.cluster.node.num_gpus).astype(np.float64)
    return stage_send_time(context, rows, crosses)[inverse]


def _tail_time(
    context: CostContext,
    rows: PlanColumns,
    inverse: IntColumn,
    window_in: FloatColumn,
    window_out: FloatColumn,
) -> FloatColumn:
    """Return what the first stage adds once: synchronisation, its optimizer step, and the fixed time [s].

    Of the overlapped shares, what exceeds the first forward or the last backward of the first chunk
    (``window_in``, ``window_out``) is exposed too.

    Parameters
    ----------
    context : CostContext
        Job and software.
    rows, inverse : PlanColumns, IntColumn
        Distinct plans, and the distinct one of each plan.
    window_in, window_out : FloatColumn
        First forward and last backward of the first stage, of every plan [s].
    """
    parameters = first_stage_parameters(context, rows, rows.layers_first)
    overlap_reduce, overlap_gather = overlaps(context)
    # Without overlap a stage waits for all its chunks; with it only the first chunk's must be exposed.
    chunk = first_stage_parameters(context, rows, rows.chunk_first)
    reduce = sync_times(context, rows, chunk if overlap_reduce else parameters).gradient_reduce[inverse]
    gather = sync_times(context, rows, chunk if overlap_gather else parameters).parameter_gather[inverse]
    exposed = reduce * (1.0 - overlap_reduce) + np.maximum(reduce * overlap_reduce - window_out, 0.0)
    exposed += gather * (1.0 - overlap_gather) + np.maximum(gather * overlap_gather - window_in, 0.0)
    step = optimizer_time(context, rows, parameters, np.full(len(rows), np.inf))
    return exposed + (step + fixed_time(context, rows))[inverse]
