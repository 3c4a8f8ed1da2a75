"""What a placement would reach for other numbers of ranks and of redundant slots: what a plan's search may ask.

Instead of uniform routing, a plan can assume the imbalance and the traffic that a placement of its model reaches, on
a trace of the user's or, labelled as such, on drawn routing. Few layers stand for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.parallelism.dispatch import capacity_rows, dropped_rows
from meshwright.errors import SpecError
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.planner.placement.request import Dispatch, PlacementRequest
from meshwright.planner.placement.routing import RoutingData, token_loads
from meshwright.planner.placement.solving import solve_placement
from meshwright.planner.placement.synthetic import draw_routing
from meshwright.simcore.domain.expert_placement import ExpertPlacement
from meshwright.simcore.domain.model import ModelSpec

__all__ = ["PlacementReach", "capacity_drop", "placement_reach", "sampled_routing"]

_DRAWN_LAYERS, _DRAWN_TOKENS = 2, 8192
# What is read of the user's routing: evenly spaced, enough to stand for all.
_SAMPLED_LAYERS, _SAMPLED_TOKENS = 8, 65_536
_MAX_BATCHES = 16


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
    is_synthetic : bool
        From drawn routing: good for planning, no claim about the model.
    """

    ep: int
    redundant_experts: int
    imbalance: float
    remote_nodes_per_token: float | None
    is_synthetic: bool


def placement_reach(
    model: ModelSpec,
    cluster: ClusterSpec,
    ep: int,
    redundant_experts: int = 0,
    *,
    routing: RoutingData | None = None,
    dispatch: Dispatch = "deduplicated",
    seed: int = 0,
) -> PlacementReach:
    """Return the imbalance and traffic that the placement of a model reaches.

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
        routing = sampled_routing(routing)
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
    return PlacementReach(
        ep=ep,
        redundant_experts=redundant_experts,
        imbalance=measures.imbalance,
        remote_nodes_per_token=measures.remote_nodes_per_token,
        is_synthetic=routing.is_synthetic,
    )


def sampled_routing(
    routing: RoutingData,
    num_layers: int = _SAMPLED_LAYERS,
    num_tokens: int = _SAMPLED_TOKENS,
    *,
    is_consecutive: bool = False,
) -> RoutingData:
    """Return evenly spaced layers and tokens of routing data; transitions between layers apart mean nothing.

    With ``is_consecutive`` the layers in the middle follow each other, and transitions between them are kept.
    """
    layers = _evenly(routing.num_layers, num_layers)
    transitions = None
    if is_consecutive:
        first = (routing.num_layers - len(layers)) // 2
        layers = np.arange(first, first + len(layers))
        if routing.transitions is not None:
            transitions = routing.transitions[layers[:-1]]
    loads, tokens = routing.loads[layers], None
    if routing.tokens is not None:
        tokens = routing.tokens[np.ix_(layers, _evenly(routing.num_tokens, num_tokens))]
        loads = token_loads(tokens, routing.num_experts)
    return replace(
        routing,
        loads=loads,
        tokens=tokens,
        transitions=transitions,
        windows=None if routing.windows is None else routing.windows[:, layers],
    )


def _evenly(size: int, most: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(np.int64))


def capacity_drop(
    routing: RoutingData, top_k: int, factor: float, batch: int, placement: ExpertPlacement | None = None
) -> float:
    """Return the share of (token, expert) pairs that a capacity factor drops in batches of consecutive tokens.

    Parameters
    ----------
    routing : RoutingData
        A trace; of sums, the whole is one batch.
    top_k : int
        Experts of a token.
    factor : float
        Rows of a slot's buffer over those of the mean slot.
    batch : int
        Tokens of a batch: buffers are kept per sender, so that of one rank.
    placement : ExpertPlacement | None
        Copies share an expert's tokens evenly; None is one slot for each expert.
    """
    if routing.tokens is None:
        total = float(routing.loads[0].sum()) / top_k
        shares = _dropped(routing.loads, total, top_k, factor, placement)
    else:
        batch = min(batch, routing.num_tokens)
        starts = range(0, routing.num_tokens - batch + 1, batch)[:_MAX_BATCHES]
        shares = [
            share
            for start in starts
            for share in _dropped(
                token_loads(routing.tokens[:, start : start + batch], routing.num_experts),
                batch,
                top_k,
                factor,
                placement,
            )
        ]
    return float(np.mean(shares))


def _dropped(
    loads: NDArray[np.float64],
    num_tokens: float,
    top_k: int,
    factor: float,
    placement: ExpertPlacement | None,
) -> list[float]:
    """Return the share dropped of each layer."""
    if placement is not None:
        counts = [np.bincount(slots, minlength=placement.num_experts) for slots in placement.slots]
        loads = np.asarray(
            [(load / count)[slots] for load, count, slots in zip(loads, counts, placement.slots, strict=True)]
        )
    capacity = capacity_rows(num_tokens, top_k, loads.shape[1], factor)
    return [dropped_rows(each, capacity) for each in loads]
