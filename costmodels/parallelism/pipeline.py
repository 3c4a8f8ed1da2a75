"""Pipeline parallelism: what a stage sends to the next."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.collectives import collective_time, place_group, send_time
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.plan_columns import FloatColumn, IntColumn, PlanColumns

__all__ = ["blocks_on_send", "edge_crosses_nodes", "stage_send_time"]


def stage_send_time(context: CostContext, columns: PlanColumns, crosses_nodes: FloatColumn) -> FloatColumn:
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
        crosses_nodes,
        context.cluster,
        context.software.inter_node_efficiency,
    )
    group = place_group(tp, np.ones_like(tp), context.cluster.node.num_gpus)
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


def edge_crosses_nodes(
    stage_of: NDArray[np.int64], stage_stride: int, gpus_per_node: int
) -> NDArray[np.float64]:
    """Return, per virtual-stage edge ``i -> i + 1``, 1.0 where some sender and receiver sit on different nodes.

    Stages are blocks of ``stage_stride`` global ranks, one after the other; ``stage_of`` names the stage of each
    virtual stage, and the last edge goes back to the first. A pipeline is as slow as its slowest replica, so one
    crossing pair counts.
    """
    sender, receiver = stage_of, np.roll(stage_of, -1)
    first = np.minimum(sender, receiver) * stage_stride
    last = (np.maximum(sender, receiver) + 1) * stage_stride - 1
    crosses: NDArray[np.float64] = (first // gpus_per_node != last // gpus_per_node).astype(np.float64)
    return crosses
