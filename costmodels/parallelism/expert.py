"""Expert parallelism: the all-to-all that takes tokens to their experts and back, and what stays exposed."""

from __future__ import annotations

import numpy as np

from meshwright.costmodels.collectives import GroupPlacement, all_to_all_time, collective_time
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.cases import LayerCases
from meshwright.costmodels.layers.experts import expert_load, routed_rows
from meshwright.costmodels.plan_columns import FloatColumn
from meshwright.simcore.domain.model import MoeSpec

__all__ = ["combine_time", "dispatch_time", "exposed_exchange_time", "remote_copies"]

# Number formats whose operands are dispatched as they are multiplied, and bytes per element with their scales: an
# fp32 per 128 elements, or as many bytes in MX blocks (DeepEP; DeepSeek-V3, arXiv 2412.19437, section 3.3.3).
_NARROW_DISPATCH, _NARROW_BYTES = ("fp8", "fp8_block", "mxfp8"), 1.0 + 4.0 / 128.0


def dispatch_time(context: CostContext, cases: LayerCases) -> FloatColumn:
    """Return the seconds of one dispatch of a layer's tokens to their experts.

    Every rank sends ``tokens x top_k`` rows over the ep ranks of its group, which are ``etp`` apart; the most
    loaded rank receives the imbalance more. With etp > 1 the rows are then gathered over the etp ranks.
    An engine that deduplicates (DeepEP, arXiv 2412.19437 section 3.2.1) sends a token once to each node and from
    there over the scale-up links once to each rank, where that is faster; otherwise every (token, expert) pair
    travels. Such an engine also dispatches in fp8 where the experts multiply in fp8, forward their inputs and
    backward the gradients of their outputs.
    """
    is_narrow = context.deduplicates_dispatch and context.workload.precision in _NARROW_DISPATCH
    return _exchange_time(context, cases, _NARROW_BYTES if is_narrow else context.element_bytes)


def combine_time(context: CostContext, cases: LayerCases) -> FloatColumn:
    """Return the seconds of bringing the experts' outputs back, 16 bits each: a dispatch the other way round."""
    return _exchange_time(context, cases, context.element_bytes)


def _exchange_time(context: CostContext, cases: LayerCases, element_bytes: float) -> FloatColumn:
    model, cluster, calibration = context.model, context.cluster, context.calibration
    moe = model.moe
    assert moe is not None
    efficiency = context.software.inter_node_efficiency
    # Every chunk pays the latency of an exchange of its own.
    rows = routed_rows(context, cases, moe) * expert_load(context, cases) / cases.expert_overlap
    group = context.place_group(cases.ep, cases.etp)
    num_bytes = rows * element_bytes * model.hidden_size
    exchange = all_to_all_time(num_bytes, group, cluster, calibration, efficiency)
    if context.deduplicates_dispatch:
        once = num_bytes / moe.top_k
        received = once * _distinct_places(moe, cases.ep)
        across = once * _remote_nodes(context, cases, group, moe)
        forwarded = all_to_all_time(received, group, cluster, calibration, efficiency, across)
        exchange = np.minimum(exchange, forwarded)
    inner = context.place_group(cases.etp, np.ones_like(cases.etp))
    gather = collective_time("all_gather", num_bytes * cases.etp, inner, cluster, calibration, efficiency)
    return (exchange + gather) * cases.expert_overlap


def _remote_nodes(
    context: CostContext, cases: LayerCases, group: GroupPlacement, moe: MoeSpec
) -> FloatColumn:
    """Return the number of other nodes a token is sent to: stated for its ep, else that of uniform routing.

    What is stated is of ranks side by side: tensor parallel experts (etp > 1) spread a group over more nodes.
    """
    uniform = remote_copies(moe, group)
    degrees, places = np.unique(cases.ep, return_inverse=True)
    known = [context.workload.remote_nodes_at(int(ep)) for ep in degrees]
    stated = np.array([np.nan if each is None else each for each in known])[places].reshape(cases.ep.shape)
    copies: FloatColumn = np.where((cases.etp == 1.0) & ~np.isnan(stated), stated, uniform)
    return copies


def remote_copies(moe: MoeSpec, group: GroupPlacement) -> FloatColumn:
    """Return the expected number of other nodes a token is sent to under uniform routing.

    The distinct nodes its experts sit on, of which one in N is its own.
    """
    nodes = group.num_nodes
    copies: FloatColumn = _distinct_places(moe, nodes) * (nodes - 1.0) / nodes
    return copies


def _distinct_places(moe: MoeSpec, places: FloatColumn) -> FloatColumn:
    """Return on how many of the ranks (or nodes) that share the experts a token's own sit, under uniform routing.

    ``top_k`` independent choices among the N' places a token may reach: ``N' (1 - (1 - 1/N')^k)``. Group-limited
    routing bounds N': ``t`` of ``g`` groups touch ``N (1 - C(g - g/N, t) / C(g, t))`` of N places that hold g/N
    groups each, and N t/g of more places than groups.
    """
    groups, chosen = float(moe.num_expert_groups), moe.top_k_groups
    missed = np.ones_like(places)
    for draw in range(chosen):
        missed = missed * np.maximum(groups - groups / places - draw, 0.0) / (groups - draw)
    reachable = np.where(places < groups, places * (1.0 - missed), places * chosen / groups)
    reachable = np.maximum(1.0, reachable)
    distinct: FloatColumn = reachable * (1.0 - (1.0 - 1.0 / reachable) ** moe.top_k)
    return distinct


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
        One dispatch and one combine, all their chunks [s].
    compute : FloatColumn
        The experts' own time, all chunks [s].
    """
    degree = cases.expert_overlap
    total = np.maximum(exchange + compute / degree, compute + exchange / degree)
    exposed = np.where(degree > 1.0, total - compute, exchange)
    launch = context.calibration.gemm_curve(context.compute_precision).launch_time
    hidden = exchange - exposed
    # Launches of products and exchanges are in their times; the activation's are not.
    extra = context.software.expert_overlap_contention * hidden + (degree - 1.0) * launch
    return np.where(cases.ep * cases.etp > 1.0, exposed + extra, 0.0)
