"""Tensor parallelism: what Megatron's column and row splits send, and how much of it stays exposed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.collectives import Collective, collective_time
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.plan_columns import FloatColumn

__all__ = ["tensor_parallel_time"]


def tensor_parallel_time(
    context: CostContext,
    tp: FloatColumn,
    num_tokens: FloatColumn,
    sequence_parallel: NDArray[np.bool_],
    cover: FloatColumn,
    num_pairs: float | None = None,
    gathered_share: float = 1.0,
) -> FloatColumn:
    """Return the exposed seconds of one layer's collectives in one direction (forward or backward).

    Without sequence parallelism an all-reduce after attention and one after the MLP; with it an all-gather
    before and a reduce-scatter after each (Korthikanti et al. 2022, section 4.2.2). A parallel block has one
    pair. Ranks of a tensor parallel group are adjacent.

    Parameters
    ----------
    context : CostContext
        Job, calibration and software; ``async_tp`` among its features hides part of the time.
    tp : FloatColumn
        Degree; 1 is free.
    num_tokens : FloatColumn
        Tokens of the micro-batch on one rank (before the sequence split).
    sequence_parallel : NDArray[np.bool_]
        Whether activations outside the products are split.
    cover : FloatColumn
        Matrix products of the layer the collectives may be pipelined with [s].
    num_pairs : float | None
        Collective pairs; None asks the model (2, or 1 with a parallel block).
    gathered_share : float
        Width of what enters the split products over the hidden size: latent attention gathers its latents.

    Returns
    -------
    FloatColumn
        Time [s].
    """
    software = context.software
    pairs = num_pairs if num_pairs is not None else (1.0 if context.model.has_parallel_block else 2.0)
    num_bytes = context.element_bytes * num_tokens * context.model.hidden_size
    group = context.place_group(tp, np.ones_like(tp))
    efficiency = software.inter_node_efficiency

    def timed(collective: Collective, share: float) -> FloatColumn:
        return collective_time(
            collective, share * num_bytes, group, context.cluster, context.calibration, efficiency
        )

    reduce = timed("all_reduce", 1.0)
    if gathered_share != 1.0:
        # Outputs are summed forward, gradients of what entered backward: the mean of both directions.
        reduce = 0.5 * (reduce + timed("all_reduce", gathered_share))
    gather, scatter = timed("all_gather", gathered_share), timed("reduce_scatter", 1.0)
    overlap = software.tp_overlap
    if "async_tp" in context.features:
        overlap = max(overlap, software.async_tp_overlap)
    if "no_overlap" in context.features:
        overlap = 0.0
    # Only the split form can be pipelined with its products, over one scale-up domain, and never beyond them.
    split = gather + scatter
    hidden = np.where(tp <= context.cluster.node.num_gpus, np.minimum(overlap * split, cover / pairs), 0.0)
    return pairs * np.where(sequence_parallel, split - hidden, reduce)
