"""Context parallelism: how ranks that split a sequence bring keys and values to their queries."""

from __future__ import annotations

import numpy as np

from meshwright.costmodels.collectives import all_to_all_time, collective_time, send_time
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.cases import LayerCases
from meshwright.costmodels.plan_columns import CpMethods, FloatColumn

__all__ = ["context_parallel_times", "head_exchange_degree"]


def context_parallel_times(
    context: CostContext, cases: LayerCases, forward: FloatColumn, backward: FloatColumn
) -> tuple[FloatColumn, FloatColumn]:
    """Return the exposed exchange of one layer, forward and backward [s]; 0 for one rank.

    Parameters
    ----------
    context : CostContext
        Job, calibration and software.
    cases : LayerCases
        Layer shapes with their method.
    forward, backward : FloatColumn
        Attention core, behind which a ring hides its sends [s].

    Notes
    -----
    Ring (arXiv 2310.01889): cp - 1 steps that each pass a block of keys and values on beside the attention of the
    block before; backward passes their gradients as well. All-to-all (Ulysses, arXiv 2309.14509): queries, keys and
    values swap sequence for heads before the core and its output after it, forward and backward; with fewer
    key/value heads than ranks every rank receives a copy of one. All-gather
    (Llama 3, arXiv 2407.21783, section 3.3.2): keys and values are gathered before the core, their gradients
    scattered after it. Hierarchical: all-to-all among the ranks of a node, a ring of such groups across nodes.
    """
    if not (cases.cp > 1.0).any():
        nothing = np.zeros_like(cases.cp)
        return nothing, nothing
    model, cluster, calibration = context.model, context.cluster, context.calibration
    efficiency = context.software.inter_node_efficiency
    per_node = cluster.node.num_gpus
    tokens = cases.num_tokens(context.workload.sequence_length)
    element = context.element_bytes
    value_dim = float(model.head_dim if model.mla is None else model.mla.v_head_dim)
    # MLA expands its latent to every head before the core.
    groups = cases.held_query_groups(model) if model.mla is None else model.num_attention_heads / cases.tp
    heads = model.num_attention_heads / cases.tp
    inner = head_exchange_degree(context, cases)
    outer = cases.cp / inner
    key_value_bytes = element * tokens * np.maximum(groups, inner) * (model.head_dim + value_dim)
    # Ring steps between neighbours of the outer group, ``tp * inner`` ranks apart.
    crosses = (cases.tp * cases.cp > per_node).astype(np.float64)
    # All-to-all inside leaves each rank the block of its whole inner group for 1/inner of the heads.
    whole = context.place_group(cases.cp, cases.tp)
    slowdown = np.where(crosses > 0.0, whole.ring.across, whole.ring.inside)
    step = send_time(key_value_bytes, crosses, cluster, efficiency, slowdown)
    steps = outer - 1.0
    ring_forward = steps * np.maximum(step - forward / outer, 0.0)
    ring_backward = steps * np.maximum(2.0 * step - backward / outer, 0.0)
    ring_forward, ring_backward = (np.where(outer > 1.0, part, 0.0) for part in (ring_forward, ring_backward))

    inside = context.place_group(inner, cases.tp)
    swapped = sum(
        all_to_all_time(num_bytes, inside, cluster, calibration, efficiency)
        for num_bytes in (
            key_value_bytes + element * tokens * heads * model.head_dim,
            element * tokens * heads * value_dim,
        )
    )
    gathered_bytes = cases.cp * element * tokens * groups * (model.head_dim + value_dim)
    gather = collective_time("all_gather", gathered_bytes, whole, cluster, calibration, efficiency)
    scatter = collective_time("reduce_scatter", gathered_bytes, whole, cluster, calibration, efficiency)
    is_gather = cases.cp_method == CpMethods.ALL_GATHER
    return (
        np.where(cases.cp > 1.0, np.where(is_gather, gather, ring_forward + swapped), 0.0),
        np.where(cases.cp > 1.0, np.where(is_gather, gather + scatter, ring_backward + swapped), 0.0),
    )


def head_exchange_degree(context: CostContext, cases: LayerCases) -> FloatColumn:
    """Return the ranks that swap sequence for heads: all for ulysses, those of a node for hierarchical, else 1."""
    on_node = np.maximum(1.0, np.floor(context.cluster.node.num_gpus / cases.tp))
    local = np.gcd(cases.cp.astype(np.int64), on_node.astype(np.int64)).astype(np.float64)
    degree = np.where(cases.cp_method == CpMethods.ULYSSES, cases.cp, 1.0)
    result: FloatColumn = np.where(cases.cp_method == CpMethods.HIERARCHICAL, local, degree)
    return result
