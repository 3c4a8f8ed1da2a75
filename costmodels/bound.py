"""A closed-form lower bound of the iteration time, for many plans at once.

No schedule is needed: the first stage, the fullest inner stage and the last stage must each run all their
micro-batches, after the pipeline has filled up to them and before it has drained behind them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.cases import CASE_FIELDS
from meshwright.costmodels.micro_batch import (
    LayerCost,
    MicroBatchTimes,
    layers_backward,
    layers_forward,
    micro_batch_times,
)
from meshwright.costmodels.parallelism.data import sync_times
from meshwright.costmodels.parallelism.pipeline import blocks_on_send, stage_send_time
from meshwright.costmodels.parallelism.vocab import vocab_parallel_time
from meshwright.costmodels.parameters import RankParameters
from meshwright.costmodels.plan_columns import (
    ALL_LAYERS,
    LAYER_FIELDS,
    FloatColumn,
    IntColumn,
    Offloads,
    PlanColumns,
    Recomputes,
    Schedules,
    Shardings,
    Spread,
    VocabParallels,
)
from meshwright.costmodels.stage import (
    first_stage_parameters,
    fixed_time,
    leading_dense_layers,
    optimizer_time,
    overlaps,
)

__all__ = ["iteration_time_bound", "schedule_time_bound"]


# What one micro-batch costs depends on nothing else.
_MICRO_BATCH_FIELDS = (
    *CASE_FIELDS,
    *("dp", "pp", "recompute", "recompute_modules", "recomputes_all_layers"),
    *("per_batch_sharding", "per_batch_group", "secondary_group", "parameter_offload", "activation_offload"),
)
# What the stages run depends on nothing else.
_PATH_FIELDS = (
    *_MICRO_BATCH_FIELDS,
    *("vpp", "schedule", "vocab_parallel", "num_micro_batches", "recompute_layers", *LAYER_FIELDS),
)
_SYNC_FIELDS = (
    *("tp", "cp", "pp", "dp", "ep", "etp", "layers_first", "chunk_first", "schedule"),
    *("sharding", "sharding_group"),
)
_STEP_FIELDS = (*_SYNC_FIELDS, "optimizer_offload", "offload_share", "parameter_offload")


def iteration_time_bound(context: CostContext, columns: PlanColumns) -> FloatColumn:
    """Return a lower bound of the iteration time of many plans at once [s].

    Shape ``(num_plans,)``. Exact for equal stages and blocking or absent sends; never above the simulated
    time (tested), so a search may discard what it puts behind the best simulated plan.

    Plans that share what their stages run differ in a few sums: each part is worked out once for all plans that agree
    in what it depends on. Columns may be an open mesh.
    """
    rows, inverse = columns.distinct(*_STEP_FIELDS)
    parameters = _first_stage_parameters(context, rows)
    fixed = fixed_time(context, rows)
    # Enough for any copy to hide in where gradients leave the device: a bound may not count on less.
    step = (optimizer_time(context, rows, parameters, np.full(len(rows), np.inf)) + fixed)[inverse]
    few, spread = columns.thinned(*_PATH_FIELDS)
    paths = _paths(context, few)
    own, others = spread(paths.own), spread(paths.others)
    reduce, gather = (times[inverse] for times in _sync_times(context, rows))
    exposed = _exposed_sync_time(context, reduce, gather, spread(paths.window_in), spread(paths.window_out))
    return _longest(columns, own, others, exposed + step, step, fixed[inverse])


def schedule_time_bound(context: CostContext, columns: PlanColumns) -> FloatColumn:
    """Return what :func:`iteration_time_bound` never falls below, whatever is recomputed, sharded or offloaded [s].

    Only the pipeline of the plans' layers counts, without anything that comes once per iteration: a bound for all
    choices of memory at once. Columns may be an open mesh.
    """
    nothing = np.zeros_like(columns.dp)
    plain = replace(
        columns,
        recompute=nothing + Recomputes.NONE,
        recompute_modules=nothing,
        recompute_layers=nothing + ALL_LAYERS,
        sharding=nothing + Shardings.NONE,
        sharding_group=columns.dp,
        optimizer_offload=nothing + Offloads.NONE,
        parameter_offload=nothing + Offloads.NONE,
        activation_offload=nothing.astype(np.bool_),
    )
    paths, zero = _paths(context, plain), np.zeros(len(columns))
    return _longest(plain, paths.own, paths.others, zero, zero, zero)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Paths:
    """What stages run, and what is before and behind, but for what comes once per iteration; arrays of one shape [s].

    Parameters
    ----------
    own : FloatColumn
        All of the first stage's work; behind it comes all the first stage does once.
    others : FloatColumn
        The longest path through another stage, minus infinity where there is none.
    window_in, window_out : FloatColumn
        First forward and last backward of the first stage, beside which it gathers and reduces.
    """

    own: FloatColumn
    others: FloatColumn
    window_in: FloatColumn
    window_out: FloatColumn


def _longest(
    columns: PlanColumns,
    own: FloatColumn,
    others: FloatColumn,
    tail: FloatColumn,
    step: FloatColumn,
    fixed: FloatColumn,
) -> FloatColumn:
    """Return the longest path of each plan, ``own`` and ``others`` being those of :class:`_Paths` [s].

    ``tail`` is what the first stage adds once, ``step`` its part without synchronisation, ``fixed`` what every path adds.
    """
    # Every path but a zero-bubble stage's own ends at the first stage, with its reduction and optimizer.
    behind_own = np.where(_is_bent(columns), step, tail)
    behind_others = np.where(columns.schedule > Schedules.INTERLEAVED, fixed, tail)
    longest: FloatColumn = np.maximum(own + behind_own, others + behind_others)
    return longest


def _is_bent(columns: PlanColumns) -> NDArray[np.bool_]:
    """Return which plans put both ends of the model on the first of several stages."""
    bent: NDArray[np.bool_] = columns.has_both_ends & (columns.pp > 1)
    return bent


def _paths(context: CostContext, columns: PlanColumns) -> _Paths:
    few, spread = columns.thinned(*_MICRO_BATCH_FIELDS)
    times = _spread_times(micro_batch_times(context, few), spread)
    vpp = columns.vpp.astype(np.float64)
    batches = columns.num_micro_batches.astype(np.float64)
    send = _bound_send_time(context, columns)
    blocks = blocks_on_send(context, columns.vpp)
    blocking = np.where(blocks, send * vpp, 0.0)
    work = _StageWork(context, columns, times)

    first_forward, first_backward = work.of(columns.layers_first, is_first=True)
    middle_forward, middle_backward = work.of(columns.layers_middle)
    last_forward, last_backward = work.of(columns.layers_last, is_last=True)
    head_forward, head_backward = work.head()
    alone_forward, alone_backward = first_forward + head_forward, first_backward + head_backward
    # Interleaved stages send at every chunk but the wrap-around of the model's ends.
    wrap = np.maximum(blocking - send, 0.0)
    # A zero-bubble stage may end with weight gradients while the stages before it drain: no way out counted.
    is_split = columns.schedule > Schedules.INTERLEAVED
    ramp_in, ramp_out = work.first_chunk()
    ramp_in, ramp_out = ramp_in + send, ramp_out + send
    # The gradient's blocking send is part of the sending stage's own work already.
    counted = np.where(blocks, send, 0.0)
    cheapest = work.cheapest.layer
    # Of stages in between that recompute a part of their layers, the recomputed ones are not counted.
    recompute = np.where(columns.recomputes_all_layers, cheapest.recompute, 0.0)
    through = cheapest.forward + np.where(is_split, 0.0, cheapest.backward + recompute)
    sends_through = np.where(is_split, 1.0, 2.0) * send
    ramp_first = ramp_in + np.where(is_split, 0.0, ramp_out - counted)

    def on_the_way(layers: IntColumn, stage: IntColumn) -> FloatColumn:
        way: FloatColumn = layers * through + np.maximum(stage - 1.0, 0.0) * sends_through
        return way

    to_middle, to_last = (
        on_the_way(columns.chunk_before, columns.middle_latest),
        on_the_way(columns.chunk_between, columns.pp - 1),
    )
    first = first_forward + first_backward + blocking + wrap
    middle = middle_forward + middle_backward + 2.0 * blocking
    last = last_forward + last_backward + blocking + wrap
    has_stages = columns.pp > 1
    own = batches * np.where(has_stages, first, alone_forward + alone_backward)
    through_last = ramp_first + to_last + batches * last
    through_middle = ramp_first + to_middle + batches * middle
    others = np.where(columns.pp > 2, np.maximum(through_last, through_middle), through_last)
    others = np.where(has_stages, others, -np.inf)
    is_bent = _is_bent(columns)
    if is_bent.any():
        turn_forward, turn_backward = work.of(columns.layers_last)
        first = work.unhidden(alone_forward + alone_backward, columns.layers_first)
        turn = work.unhidden(turn_forward + turn_backward, columns.layers_last)
        inner = work.unhidden(middle_forward + middle_backward, columns.layers_middle)
        # With DualPipe micro-batches enter at both ends, half of them each, and the last stage mirrors the first.
        is_mirror = columns.schedule == Schedules.DUALPIPE
        passes = np.where(is_mirror, 0.5, 1.0) * batches
        start_middle = np.where(is_mirror, 0.0, ramp_in + to_middle)
        through_turn = np.where(is_mirror, passes * first, ramp_in + to_last + passes * turn)
        through_inner = np.where(columns.pp > 2, start_middle + passes * inner, 0.0)
        own = np.where(is_bent, passes * first, own)
        others = np.where(is_bent, np.maximum(through_inner, through_turn), others)
    return _Paths(
        own=own,
        others=others,
        # A blocking send is part of the operation the gather may run beside.
        window_in=np.where(has_stages, ramp_in - send + counted, alone_forward),
        window_out=np.where(has_stages, ramp_out - send, alone_backward),
    )


def _spread_times(times: MicroBatchTimes, spread: Spread) -> MicroBatchTimes:
    """Return the times of fewer plans as those of all."""

    def layer(cost: LayerCost) -> LayerCost:
        return replace(
            cost,
            forward=spread(cost.forward),
            backward=spread(cost.backward),
            recompute=spread(cost.recompute),
            forward_axes={"ep": spread(cost.forward_axes["ep"])},
            backward_axes={"ep": spread(cost.backward_axes["ep"])},
        )

    experts = layer(times.layer)
    return replace(
        times,
        layer=experts,
        dense_layer=experts if times.dense_layer is times.layer else layer(times.dense_layer),
        embedding_forward=spread(times.embedding_forward),
        embedding_backward=spread(times.embedding_backward),
        head_forward=spread(times.head_forward),
        head_backward=spread(times.head_backward),
    )


class _StageWork:
    """What stages of many plans run for one micro-batch."""

    def __init__(self, context: CostContext, columns: PlanColumns, times: MicroBatchTimes) -> None:
        self.columns, self.times = columns, times
        self.extra_forward, self.extra_backward = vocab_parallel_time(
            context, columns, times.boundary_forward, times.boundary_backward
        )
        self.contention = context.software.expert_overlap_contention
        self.has_ends = columns.vocab_parallel < VocabParallels.VOCAB_1
        in_all = leading_dense_layers(context)
        self.leading = np.minimum(in_all, columns.chunk_first).astype(np.float64)
        # Where the first chunk has no room for all leading layers, one behind it may be of either kind.
        self.cheapest = _cheapest_layer(times, in_all > columns.chunk_first)

    def of(
        self, layers: IntColumn, *, is_first: bool = False, is_last: bool = False
    ) -> tuple[FloatColumn, FloatColumn]:
        """Return forward and backward of a stage with some layers, all its chunks [s]."""
        columns, times = self.columns, self.times
        vpp = columns.vpp.astype(np.float64)
        held = layers.astype(np.float64)
        own = columns.chunk_first if is_first else columns.chunk_last if is_last else None
        kinds, leading = self.cheapest, self.leading if is_first else np.zeros(len(columns))
        recomputed = _recomputed_layers(columns, held, own)
        forward = layers_forward(kinds, held, leading) + self.extra_forward * vpp
        backward = layers_backward(kinds, held, leading, recomputed) + self.extra_backward * vpp
        if is_first:
            forward = forward + np.where(self.has_ends, times.embedding_forward, 0.0)
            backward = backward + np.where(self.has_ends, times.embedding_backward, 0.0)
        if is_last:
            head_forward, head_backward = self.head()
            forward, backward = forward + head_forward, backward + head_backward
        return forward, backward

    def head(self) -> tuple[FloatColumn, FloatColumn]:
        """Return forward and backward of the LM head where it is in one place [s]."""
        times = self.times
        return (
            np.where(self.has_ends, times.head_forward, 0.0),
            np.where(self.has_ends, times.head_backward, 0.0),
        )

    def first_chunk(self) -> tuple[FloatColumn, FloatColumn]:
        """Return forward and backward of the model's first virtual stage [s]."""
        columns, times = self.columns, self.times
        layers = columns.chunk_first.astype(np.float64)
        recomputed = np.minimum(columns.chunk_first, columns.recompute_layers)
        return (
            layers_forward(times, layers, self.leading)
            + self.extra_forward
            + np.where(self.has_ends, times.embedding_forward, 0.0),
            layers_backward(times, layers, self.leading, recomputed)
            + self.extra_backward
            + np.where(self.has_ends, times.embedding_backward, 0.0),
        )

    def unhidden(self, work: FloatColumn, layers: IntColumn) -> FloatColumn:
        """Return the work of a stage less what DualPipe hides of it at best [s].

        That is the expert exchange where the rest of the work is as long, and each second of it still slows the
        kernels beside it.
        """
        schedule, layer = self.columns.schedule, self.times.layer
        is_dual = (schedule == Schedules.DUALPIPE) | (schedule == Schedules.DUALPIPE_V)
        exchange = np.where(is_dual, layers * (layer.forward_axes["ep"] + layer.backward_axes["ep"]), 0.0)
        hidden = np.minimum(exchange, np.maximum(work - exchange, 0.0))
        result: FloatColumn = work - (1.0 - self.contention) * hidden
        return result


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
    some = np.where(_is_bent(columns), 0.0, some)
    recomputed: FloatColumn = np.where(columns.recompute_layers >= ALL_LAYERS, layers, some)
    return recomputed


def _cheapest_layer(times: MicroBatchTimes, may_be_dense: NDArray[np.bool_]) -> MicroBatchTimes:
    """Return times in which a layer behind the first chunk costs the least of its two kinds, where it may be either."""
    if not may_be_dense.any():
        return times
    layer, dense = times.layer, times.dense_layer

    def least(name: str) -> FloatColumn:
        mine = getattr(layer, name)
        smaller: FloatColumn = np.where(may_be_dense, np.minimum(mine, getattr(dense, name)), mine)
        return smaller

    least_layer = replace(
        layer, forward=least("forward"), backward=least("backward"), recompute=least("recompute")
    )
    return replace(times, layer=least_layer)


def _bound_send_time(context: CostContext, columns: PlanColumns) -> FloatColumn:
    """Return the least a stage-to-stage message can take [s].

    Every edge crosses nodes only where stages are whole nodes; elsewhere a bound may not count on it.
    """
    rows, inverse = columns.distinct("tp", "cp", "dp", "pp", "micro_batch_size", "sequence_parallel")
    return stage_send_time(context, rows, context.ranks.least_hops(rows))[inverse]


def _first_stage_parameters(context: CostContext, rows: PlanColumns) -> RankParameters:
    """Return the parameters of the first stage, of which nothing is counted that may be another kind of layer."""
    # Chunks behind the first count as nothing where leading dense layers, of other size, may be among them.
    may_be_dense = leading_dense_layers(context) > rows.chunk_first
    return first_stage_parameters(context, rows, np.where(may_be_dense, rows.chunk_first, rows.layers_first))


def _sync_times(context: CostContext, columns: PlanColumns) -> tuple[FloatColumn, FloatColumn]:
    """Return the first stage's reduction and gather, of which some may be exposed [s]."""
    rows, inverse = columns.distinct(*_SYNC_FIELDS)
    # Without overlap a stage waits for all its chunks; with it only the first chunk's must be exposed.
    whole = _first_stage_parameters(context, rows)
    chunk = first_stage_parameters(context, rows, rows.chunk_first)
    reduces, gathers = (chunk if overlap else whole for overlap in overlaps(context))
    times = sync_times(context, rows, reduces)
    gather = (times if gathers is reduces else sync_times(context, rows, gathers)).parameter_gather
    return times.gradient_reduce[inverse], gather[inverse]


def _exposed_sync_time(
    context: CostContext,
    reduce: FloatColumn,
    gather: FloatColumn,
    window_in: FloatColumn,
    window_out: FloatColumn,
) -> FloatColumn:
    """Return what the first stage's reduction and gather expose [s].

    Of the overlapped shares, what exceeds the first forward or the last backward of the first chunk (``window_in``,
    ``window_out``) is exposed too.
    """
    overlap_reduce, overlap_gather = overlaps(context)
    exposed = reduce * (1.0 - overlap_reduce) + np.maximum(reduce * overlap_reduce - window_out, 0.0)
    exposed = exposed + gather * (1.0 - overlap_gather)
    result: FloatColumn = exposed + np.maximum(gather * overlap_gather - window_in, 0.0)
    return result
