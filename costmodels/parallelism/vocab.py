"""Vocabulary parallelism over pipeline stages: every stage computes its slice of embedding and head."""

from __future__ import annotations

import numpy as np

from meshwright.costmodels.collectives import collective_time
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns, VocabParallels
from meshwright.costmodels.roofline import stream_time

__all__ = ["vocab_parallel_time"]

# Two fp32 products written, read, rescaled and written, their difference read once more.
_RESCALE_BYTES = 2.0 * 4.0 * 3.0 + 4.0 * 2.0


def vocab_parallel_time(
    context: CostContext, columns: PlanColumns, boundary_forward: FloatColumn, boundary_backward: FloatColumn
) -> tuple[FloatColumn, FloatColumn]:
    """Return what each virtual stage adds per micro-batch, forward and backward [s]; 0 without vocabulary parallelism.

    ``boundary_forward`` and ``boundary_backward`` are the seconds of embedding and head together, unsplit.
    A 1/pp slice of them, and an all-reduce of a rank's hidden activations over the stages: overlapped by half in vocab_1
    and vocab_2 (its barriers are scheduled apart), whole in interlaced (Yeung et al. 2024, arXiv 2411.05288). Where
    they are scheduled apart they are two passes of their own per micro-batch, each of which meets all stages at a
    barrier; vocab_2 saves one by rescaling two fp32 products of the hidden width afterwards, which costs more.
    """
    applies = columns.vocab_parallel >= VocabParallels.VOCAB_1
    if not applies.any():
        return np.zeros(len(columns)), np.zeros(len(columns))
    pp = columns.pp.astype(np.float64)
    tokens = columns.micro_batch_size * context.workload.sequence_length / columns.cp
    stride = (columns.tp * columns.cp * columns.dp).astype(np.float64)
    exchange = collective_time(
        "all_reduce",
        context.element_bytes
        * tokens
        / np.where(columns.sequence_parallel, columns.tp, 1)
        * context.model.hidden_size,
        context.place_group(pp, stride),
        context.cluster,
        context.calibration,
        context.software.inter_node_efficiency,
    )
    exchange = exchange * np.where(columns.vocab_parallel == VocabParallels.INTERLACED, 1.0, 0.5)
    # Each chunk of an interleaved stage carries its share of the stage's slice.
    chunks = pp * columns.vpp
    is_apart = columns.vocab_parallel < VocabParallels.INTERLACED
    passes = np.where(is_apart, context.software.vocab_pass_time, 0.0)
    rescaled = stream_time(
        _RESCALE_BYTES * tokens * context.model.hidden_size,
        context.gpu.memory_bandwidth_bytes_per_second,
        context.calibration.memory_stream_efficiency,
    )
    rescaled = np.where(columns.vocab_parallel == VocabParallels.VOCAB_2, rescaled, 0.0)
    forward = boundary_forward / chunks + passes / columns.vpp
    backward = boundary_backward / chunks + (exchange + passes + rescaled) / columns.vpp
    return np.where(applies, forward, 0.0), np.where(applies, backward, 0.0)
