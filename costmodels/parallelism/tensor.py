"""Tensor parallelism: what Megatron's column and row splits send, and how much of it stays exposed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.collectives import Collective, collective_time
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.plan_columns import FloatColumn
from meshwright.costmodels.roofline import stream_time

__all__ = ["ExchangeTimes", "tensor_parallel_times"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExchangeTimes:
    """Exposed seconds before and behind one pair of a column-split and a row-split product.

    Without sequence parallelism ``gather`` is 0 and ``reduce`` an all-reduce; with it they are an all-gather and a
    reduce-scatter.
    """

    gather: FloatColumn
    reduce: FloatColumn

    @property
    def both(self) -> FloatColumn:
        """The pair [s]."""
        return self.gather + self.reduce


def tensor_parallel_times(
    context: CostContext,
    tp: FloatColumn,
    num_tokens: FloatColumn,
    sequence_parallel: NDArray[np.bool_],
    cover: FloatColumn,
    *,
    gathered_share: float = 1.0,
    gathered_width: float | None = None,
    is_backward: bool = False,
) -> ExchangeTimes:
    """Return the exposed collectives of one pair of split products in one direction (forward or backward).

    Without sequence parallelism an all-reduce behind them; with it an all-gather before and a reduce-scatter behind
    (Korthikanti et al. 2022, section 4.2.2). Ranks of a tensor parallel group are adjacent.

    Parameters
    ----------
    context : CostContext
        Job, calibration and software; ``async_tp`` among its features pipelines the collectives with their products.
    tp : FloatColumn
        Degree; 1 is free.
    num_tokens : FloatColumn
        Tokens of the micro-batch on one rank (before the sequence split).
    sequence_parallel : NDArray[np.bool_]
        Whether activations outside the products are split.
    cover : FloatColumn
        Matrix products the collectives may be pipelined with [s].
    gathered_share : float
        Width of what enters the split products over the hidden size: latent attention gathers its latents.
    gathered_width : float | None
        Bytes per gathered element; None is that of activations.
    is_backward : bool
        Which direction: the sum of input gradients writes what is scattered in the order it is sent.
    """
    software = context.software
    elements = num_tokens * context.model.hidden_size
    group = context.place_group(tp, np.ones_like(tp))

    def timed(collective: Collective, num_bytes: FloatColumn) -> FloatColumn:
        return collective_time(
            collective, num_bytes, group, context.cluster, context.calibration, software.inter_node_efficiency
        )

    summed = context.element_bytes * elements
    gathered = (gathered_width or context.element_bytes) * gathered_share * elements
    reduce = timed("all_reduce", summed)
    if gathered_share != 1.0:
        # Outputs are summed forward, gradients of what entered backward: the mean of both directions.
        reduce = 0.5 * (reduce + timed("all_reduce", gathered_share * summed))
    gather, scatter = timed("all_gather", gathered), timed("reduce_scatter", summed)
    # Only the split form can be pipelined with its products, over one scale-up domain, and never beyond them.
    overlap = np.where(tp <= context.cluster.node.num_gpus, _overlap(context), 0.0)
    # Gathers are not fused with products of one scale per row (pytorch issue 149990).
    fuses_gather = not context.scales_by_row
    split = gather + scatter if fuses_gather else scatter
    exposed = 1.0 - np.minimum(overlap, cover / np.maximum(split, np.finfo(np.float32).tiny))
    gather, scatter = gather * exposed if fuses_gather else gather, scatter * exposed
    if software.copies_gathered_sequence:
        is_pipelined = "async_tp" in context.features
        if not (is_pipelined and fuses_gather):
            gather = gather + _copy_time(context, tp, gathered)
        if not (is_pipelined or (is_backward and software.splits_projections)):
            scatter = scatter + _copy_time(context, tp, summed)
    return ExchangeTimes(
        gather=np.where(sequence_parallel, gather, 0.0), reduce=np.where(sequence_parallel, scatter, reduce)
    )


def _overlap(context: CostContext) -> float:
    """Return the share of the collectives that runs beside the products they are pipelined with."""
    if "no_overlap" in context.features:
        return 0.0
    software = context.software
    is_pipelined = "async_tp" in context.features
    return max(software.tp_overlap, software.async_tp_overlap) if is_pipelined else software.tp_overlap


def _copy_time(context: CostContext, tp: FloatColumn, num_bytes: FloatColumn) -> FloatColumn:
    """Return the seconds of reading and writing a whole tensor once; nothing without tensor parallelism."""
    calibration = context.calibration
    bandwidth = context.gpu.memory_bandwidth_bytes_per_second
    copied = stream_time(2.0 * num_bytes, bandwidth, calibration.memory_stream_efficiency)
    return np.where(tp > 1.0, copied, 0.0)
