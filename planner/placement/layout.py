"""What a placement would reach for other numbers of ranks and of redundant slots: what a plan's search may ask.

Instead of uniform routing, a plan can assume the imbalance and the traffic that a placement of its model reaches, on
a trace of the user's or, labelled as such, on drawn routing. Few layers stand for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.calibration import DeviceCalibration
from meshwright.costmodels.parallelism.dispatch import capacity_rows, dropped_rows
from meshwright.errors import SpecError
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.planner.placement.engines import ENGINES, layer_table
from meshwright.planner.placement.job import PlacementJob, moe_layer_indices
from meshwright.planner.placement.request import Dispatch, PlacementRequest
from meshwright.planner.placement.routing import RoutingData, split_held_out, token_loads
from meshwright.planner.placement.simulation import layer_times
from meshwright.planner.placement.solving import solve_placement
from meshwright.planner.placement.synthetic import draw_routing
from meshwright.simcore.domain.model import ModelSpec

__all__ = ["PlacementReach", "best_layout", "capacity_drop", "placement_reach"]

_DRAWN_LAYERS, _DRAWN_TOKENS = 2, 8192
# What is read of the user's routing: evenly spaced, enough to stand for all.
_SAMPLED_LAYERS, _SAMPLED_TOKENS = 8, 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementReach:
    """What a placement reaches on held-out tokens; means over the sampled layers.

    Parameters
    ----------
    ep, redundant_experts : int
        Expert parallel ranks and redundant slots.
    imbalance : float
        Heaviest rank over the mean.
    remote_nodes_per_token : float | None
        Nodes other than its own that a token reaches.
    layer_seconds : float | None
        Dispatch, experts and combine at the best degree of overlap; None without a calibration [s].
    overlap_degree : int
        That degree.
    is_synthetic : bool
        From drawn routing: good for planning, no claim about the model.
    """

    ep: int
    redundant_experts: int
    imbalance: float
    remote_nodes_per_token: float | None
    layer_seconds: float | None
    overlap_degree: int
    is_synthetic: bool


def placement_reach(
    model: ModelSpec,
    cluster: ClusterSpec,
    ep: int,
    redundant_experts: int = 0,
    *,
    routing: RoutingData | None = None,
    dispatch: Dispatch = "deduplicated",
    tokens_per_gpu: int = 4096,
    calibration: DeviceCalibration | None = None,
    seed: int = 0,
) -> PlacementReach:
    """Return the imbalance, traffic and layer time that the placement of a model reaches.

    Parameters
    ----------
    model, cluster : ModelSpec, ClusterSpec
        A mixture-of-experts model and the machines.
    ep, redundant_experts : int
        Expert parallel ranks and redundant slots.
    routing : RoutingData | None
        A trace or loads, of which evenly spaced layers and tokens stand for all; drawn with weak affinity when None.
    dispatch : Dispatch
        How the engine sends tokens.
    tokens_per_gpu : int
        Tokens of each rank in one batch.
    calibration : DeviceCalibration | None
        Prices the layer when given.
    seed : int
        Of drawn routing and of exchanges.

    Raises
    ------
    SpecError
        If the model has no experts, or its slots do not divide by the ranks.
    """
    moe = model.moe
    if moe is None:
        raise SpecError(f"model {model.name} has no experts; only mixture-of-experts models have a placement")
    if routing is None:
        routing = draw_routing(
            _DRAWN_LAYERS,
            moe.num_experts,
            moe.top_k,
            _DRAWN_TOKENS,
            seed,
            None,
            moe.num_expert_groups,
            moe.top_k_groups,
        )
    else:
        routing = _sampled(routing)
    # Where ranks do not fill nodes, the smallest part of a group on a node counts, as in the cost model.
    ranks_per_node = gcd(ep, cluster.node.num_gpus)
    has_traffic = dispatch == "deduplicated" and routing.tokens is not None and ep > ranks_per_node
    request = PlacementRequest(
        routing=routing,
        num_slots=moe.num_experts + redundant_experts,
        num_ranks=ep,
        ranks_per_node=ranks_per_node,
        objective="joint" if has_traffic else "balance",
        dispatch=dispatch,
        num_groups=moe.num_expert_groups,
        top_groups=moe.top_k_groups,
        top_k=moe.top_k,
        seed=seed,
    )
    answer = solve_placement(request, certificates=False)
    measures = answer.held_out or answer.solved
    seconds, degree = None, 1
    if calibration is not None:
        layers = moe_layer_indices(model)
        job = PlacementJob(
            model=model,
            cluster=cluster,
            engine=ENGINES["sglang"],
            table=layer_table(model.num_layers, layers, moe.num_experts, ep, ranks_per_node),
            request=request,
        )
        judge = split_held_out(routing, request.held_out_share)[1] or routing
        times = layer_times(job, answer.placement, judge, request.choice, tokens_per_gpu, calibration)
        seconds, degree = float(times.layer.mean()), times.degree
    return PlacementReach(
        ep=ep,
        redundant_experts=redundant_experts,
        imbalance=measures.imbalance,
        remote_nodes_per_token=measures.remote_nodes_per_token,
        layer_seconds=seconds,
        overlap_degree=degree,
        is_synthetic=routing.is_synthetic,
    )


def _sampled(routing: RoutingData) -> RoutingData:
    """Return evenly spaced layers and tokens of routing data; transitions between layers apart mean nothing."""
    layers = _evenly(routing.num_layers, _SAMPLED_LAYERS)
    loads, tokens = routing.loads[layers], None
    if routing.tokens is not None:
        tokens = routing.tokens[np.ix_(layers, _evenly(routing.num_tokens, _SAMPLED_TOKENS))]
        loads = token_loads(tokens, routing.num_experts)
    return replace(
        routing,
        loads=loads,
        tokens=tokens,
        transitions=None,
        windows=None if routing.windows is None else routing.windows[:, layers],
    )


def _evenly(size: int, most: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(np.int64))


def best_layout(
    model: ModelSpec,
    cluster: ClusterSpec,
    calibration: DeviceCalibration,
    *,
    ep: Sequence[int],
    redundant_experts: Sequence[int],
    routing: RoutingData | None = None,
    dispatch: Dispatch = "deduplicated",
    tokens_per_gpu: int = 4096,
    seed: int = 0,
) -> tuple[PlacementReach, ...]:
    """Return the reach of every number of ranks with every number of redundant slots that divide, fastest layer first.

    Raises
    ------
    SpecError
        If no combination divides.
    """
    moe = model.moe
    num_experts = 0 if moe is None else moe.num_experts
    cases = [
        (ranks, extra)
        for ranks in ep
        for extra in redundant_experts
        if (num_experts + extra) % ranks == 0
        and ranks <= cluster.num_gpus
        and num_experts + extra <= num_experts * ranks
    ]
    if not cases:
        raise SpecError(
            f"model {model.name}: no pair of ep and redundant experts asked for divides its {num_experts} experts"
        )
    reached = [
        placement_reach(
            model,
            cluster,
            ranks,
            extra,
            routing=routing,
            dispatch=dispatch,
            tokens_per_gpu=tokens_per_gpu,
            calibration=calibration,
            seed=seed,
        )
        for ranks, extra in cases
    ]
    return tuple(sorted(reached, key=lambda each: (each.layer_seconds or np.inf, each.redundant_experts)))


def capacity_drop(routing: RoutingData, top_k: int, factor: float, batch: int) -> float:
    """Return the share of (token, expert) pairs that a capacity factor drops in batches of consecutive tokens.

    Parameters
    ----------
    routing : RoutingData
        A trace; of sums, the whole is one batch.
    top_k : int
        Experts of a token.
    factor : float
        Rows of an expert's buffer over the mean.
    batch : int
        Tokens of a batch.
    """
    if routing.tokens is None:
        total = float(routing.loads[0].sum()) / top_k
        capacity = capacity_rows(total, top_k, routing.num_experts, factor)
        return float(np.mean([dropped_rows(loads, capacity) for loads in routing.loads]))
    batch = min(batch, routing.num_tokens)
    capacity = capacity_rows(batch, top_k, routing.num_experts, factor)
    shares = [
        dropped_rows(loads, capacity)
        for start in range(0, routing.num_tokens - batch + 1, batch)
        for loads in token_loads(routing.tokens[:, start : start + batch], routing.num_experts)
    ]
    return float(np.mean(shares))
