"""Expert parallelism: the all-to-all that takes tokens to their experts and back, and what stays exposed."""

from __future__ import annotations

import numpy as np

from meshwright.costmodels.collectives import GroupPlacement, all_to_all_time, collective_time, place_group
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.cases import LayerCases
from meshwright.costmodels.layers.experts import expert_load, routed_rows
from meshwright.costmodels.plan_columns import FloatColumn
from meshwright.simcore.domain.model import MoeSpec

__all__ = ["dispatch_time", "exposed_exchange_time", "remote_copies"]


def dispatch_time(context: CostContext, cases: LayerCases) -> FloatColumn:
    """Return the seconds of one dispatch of a layer's tokens to their experts (a combine takes as long).

    Every rank sends ``tokens x top_k`` rows over the ep ranks of its group, which are ``etp`` apart; the most
    loaded rank receives the imbalance more. With etp > 1 the rows are then gathered over the etp ranks.
    Across nodes an engine that deduplicates (DeepEP, arXiv 2412.19437 section 3.2.1) sends a token once to each
    node and forwards it there over the scale-up links; otherwise every (token, expert) pair travels.
    """
    model, cluster, calibration = context.model, context.cluster, context.calibration
    moe = model.moe
    assert moe is not None
    efficiency = context.software.inter_node_efficiency
    row_bytes = context.element_bytes * model.hidden_size
    rows = routed_rows(context, cases, moe) * expert_load(context, cases)
    group = place_group(cases.ep, cases.etp, cluster.node.num_gpus)
    num_bytes = rows * row_bytes
    across = None
    if context.deduplicates_dispatch:
        across = num_bytes / moe.top_k * remote_copies(moe, group)
    exchange = all_to_all_time(num_bytes, group, cluster, calibration, efficiency, across)
    inner = place_group(cases.etp, np.ones_like(cases.etp), cluster.node.num_gpus)
    gather = collective_time("all_gather", num_bytes * cases.etp, inner, cluster, calibration, efficiency)
    return exchange + gather


def remote_copies(moe: MoeSpec, group: GroupPlacement) -> FloatColumn:
    """Return the expected number of other nodes a token is sent to under uniform routing.

    ``top_k`` independent choices among the nodes a token may reach (group-limited routing bounds them):
    ``N' (1 - (1 - 1/N')^k)`` distinct nodes, of which one in N is its own.
    """
    nodes = group.num_nodes
    reachable = np.maximum(1.0, nodes * moe.top_k_groups / moe.num_expert_groups)
    distinct = reachable * (1.0 - (1.0 - 1.0 / reachable) ** moe.top_k)
    copies: FloatColumn = distinct * (nodes - 1.0) / nodes
    return copies


def exposed_exchange_time(
    context: CostContext, cases: LayerCases, exchange: FloatColumn, compute: FloatColumn
) -> FloatColumn:
    """Return what dispatch and combine add to a layer in one direction [s].

    Cut into d chunks (Tutel's degree, arXiv 2206.03382, section 3.3), dispatch, experts and combine form a flow
    shop in which both exchanges share the network: the longer of network and experts, and the first and the last
    chunk of the other. Communication kernels hold a share of the SMs while they run beside the experts.

    Parameters
    ----------
    context : CostContext
        Job and software.
    cases : LayerCases
        Layer shapes; ``expert_overlap`` is d.
    exchange : FloatColumn
        One dispatch, or one combine [s].
    compute : FloatColumn
        The experts' own time [s].
    """
    degree = cases.expert_overlap
    total = np.maximum(2.0 * exchange + compute / degree, compute + 2.0 * exchange / degree)
    exposed = np.where(degree > 1.0, total - compute, 2.0 * exchange)
    launch = context.calibration.gemm_curve(context.compute_precision).launch_time
    hidden = 2.0 * exchange - exposed
    extra = context.software.expert_overlap_contention * hidden + 2.0 * (degree - 1.0) * launch
    return np.where(cases.ep * cases.etp > 1.0, exposed + extra, 0.0)
