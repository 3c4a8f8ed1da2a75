"""The certificates of an answer: each bounds what the objective asked for, on the tokens it was solved with."""

from __future__ import annotations

import numpy as np

from meshwright.planner.placement.certificates import Certificate, packing_bound
from meshwright.planner.placement.chain import chain_weight
from meshwright.planner.placement.chain_bounds import chain_bound
from meshwright.planner.placement.chain_partitions import best_partitions, lightest_partitions, num_partitions
from meshwright.planner.placement.evaluation import layer_chain_weights, rank_loads, remote_nodes
from meshwright.planner.placement.request import PlacementRequest
from meshwright.planner.placement.routing import RoutingData, token_transitions
from meshwright.planner.placement.spread_bounds import remote_bound
from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = ["certify"]

_MAX_PARTITIONS = 500


def certify(
    request: PlacementRequest, placement: ExpertPlacement, routing: RoutingData
) -> tuple[Certificate, ...]:
    """Return what the placement reaches on the tokens it was solved with, and bounds of every other placement.

    Every value is recomputed from tokens and slots.
    """
    result = []
    loads = rank_loads(placement, routing.loads, "random")
    bounds = [packing_bound(each, placement.num_slots, placement.num_ranks) for each in routing.loads]
    floor_method = "mean load, heaviest copy, lightest neighbours"
    is_small = num_partitions(routing.num_experts, placement.num_ranks) <= _MAX_PARTITIONS
    if is_small and placement.num_slots == placement.num_experts:
        bounds = list(lightest_partitions(routing.loads, placement.num_ranks))
        floor_method = "all partitions"
    mean = loads.mean(axis=1)
    result.append(
        Certificate(
            quantity="heaviest rank over the mean (copies share evenly), mean over layers",
            value=float((loads.max(axis=1) / mean).mean()),
            bound=float((np.asarray(bounds) / mean).mean()),
            method=floor_method,
        )
    )
    if request.dispatch == "coherent" and routing.num_layers > 1:
        transitions = routing.transitions
        if transitions is None and routing.tokens is not None:
            transitions = token_transitions(routing.tokens, routing.num_experts)
        if transitions is not None and placement.num_slots == placement.num_experts:
            kept = layer_chain_weights(placement, transitions)
            total = float(transitions.sum())
            if is_small:
                free = np.full(routing.num_layers, np.inf)
                best = best_partitions(transitions, routing.loads, placement.num_ranks, free)
                bound = chain_weight(transitions, best)
                method = "all partitions, whatever their imbalance"
            else:
                bound = chain_bound(transitions, placement.num_ranks, kept)
                method = "b-matching and spectrum per pair of layers"
            result.append(
                Certificate(
                    quantity="transitions that stay on a rank, share",
                    value=float(kept.sum()) / total,
                    bound=bound / total,
                    method=method,
                    is_maximum=True,
                )
            )
    elif request.dispatch == "deduplicated" and routing.tokens is not None and request.num_nodes > 1:
        _, remote = remote_nodes(placement, routing.tokens, request.choice, request.seed)
        floors = [
            remote_bound(tokens, routing.num_experts, placement.num_slots, request.num_nodes)
            for tokens in routing.tokens
        ]
        result.append(
            Certificate(
                quantity="remote nodes per token, mean over layers",
                value=float(remote.mean()),
                bound=float(np.mean(floors)),
                method="co-activation spectrum"
                if placement.num_slots == placement.num_experts
                else "share at home",
            )
        )
    return tuple(result)
