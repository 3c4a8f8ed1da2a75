"""Pipeline parallelism: what a stage sends to the next."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.collectives import collective_time, send_time
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.plan_columns import FloatColumn, IntColumn, PlanColumns
from meshwright.costmodels.rank_layout import Hops

__all__ = ["blocks_on_send", "stage_send_time"]


def stage_send_time(context: CostContext, columns: PlanColumns, hops: Hops) -> FloatColumn:
    """Return the seconds of one micro-batch's activation from a stage to the next (the gradient's way back too).

    Every rank sends its share to its peer through its own NIC. With scatter-gather or sequence parallelism
    the share is 1/tp; without sequence parallelism the receivers then gather it over NVLink (Narayanan et
    al. 2021, section 4.1).
    """
    tp = columns.tp.astype(np.float64)
    tokens = columns.micro_batch_size * context.workload.sequence_length / columns.cp
    full = context.element_bytes * tokens * context.model.hidden_size
    is_split = columns.sequence_parallel | (context.software.has_scatter_gather & (columns.tp > 1))
    sent = send_time(
        np.where(is_split, full / tp, full),
        hops.crosses_nodes,
        context.cluster,
        context.software.inter_node_efficiency,
        hops.slowdown,
    )
    group = context.place_group(tp, np.ones_like(tp))
    gather = collective_time(
        "all_gather",
        full,
        group,
        context.cluster,
        context.calibration,
        context.software.inter_node_efficiency,
    )
    needs_gather = is_split & ~columns.sequence_parallel
    return np.where(columns.pp > 1, sent + np.where(needs_gather, gather, 0.0), 0.0)


def blocks_on_send(context: CostContext, vpp: IntColumn) -> NDArray[np.bool_]:
    """Return whether sends hold the compute stream; interleaved schedules of newer software overlap theirs."""
    blocks = np.full(vpp.shape, context.software.is_send_blocking)
    return blocks & ~((vpp > 1) & context.software.overlaps_interleaved_sends)
