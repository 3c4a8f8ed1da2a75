"""Seconds of a mixture-of-experts layer under a placement: the busiest rank's experts, dispatch, combine, overlap."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.calibration import DeviceCalibration
from meshwright.costmodels.parallelism.dispatch import (
    LinkRates,
    Traffic,
    capacity_rows,
    coherent_traffic,
    deduplicated_traffic,
    exchange_time,
    full_traffic,
    link_rates,
    overlapped_layer_time,
    tiled_rows,
)
from meshwright.costmodels.roofline import gemm_time
from meshwright.planner.placement.evaluation import (
    ReplicaChoice,
    layer_chain_weights,
    rank_loads,
    remote_nodes,
)
from meshwright.planner.placement.job import PlacementJob
from meshwright.planner.placement.routing import RoutingData, token_transitions
from meshwright.planner.placement.token_groups import TokenGroups
from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = [
    "COMBINE_BYTES",
    "DEGREES",
    "DISPATCH_BYTES",
    "LayerTimes",
    "experts_time",
    "fastest",
    "layer_times",
]

DEGREES = (1, 2, 4, 8)
# Dispatch in FP8 with an fp32 scale per 128 elements, combine in BF16 (DeepEP, README).
DISPATCH_BYTES, COMBINE_BYTES = 1.0 + 4.0 / 128.0, 2.0
_REACHED_SAMPLE = 2048


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTimes:
    """Seconds of each layer, ``(num_layers,)``; ``layer`` overlaps the parts in ``degree`` chunks.

    ``experts`` is the work of all chunks: smaller products fill tiles less and read the weights once each.
    """

    experts: NDArray[np.float64]
    dispatch: NDArray[np.float64]
    combine: NDArray[np.float64]
    layer: NDArray[np.float64]
    degree: int


def fastest(times: tuple[LayerTimes, ...]) -> LayerTimes:
    """Return the degree of overlap whose layers take least; of equals the smallest."""
    return min(times, key=lambda each: (float(each.layer.sum()), each.degree))


def layer_times(
    job: PlacementJob,
    placement: ExpertPlacement,
    routing: RoutingData,
    choice: ReplicaChoice,
    tokens_per_gpu: int,
    calibration: DeviceCalibration,
    *,
    capacity_factor: float | None = None,
    groups: TokenGroups | None = None,
    dispatch_bytes: float = DISPATCH_BYTES,
) -> tuple[LayerTimes, ...]:
    """Return the seconds of each layer for every degree of overlap, each layer with its own busiest rank.

    Parameters
    ----------
    job : PlacementJob
        Model, machines and dispatch.
    placement : ExpertPlacement
        Whose layers are those of ``routing``.
    routing : RoutingData
        Tokens or loads that judge.
    choice : ReplicaChoice
        How tokens choose among copies.
    tokens_per_gpu : int
        Tokens of each rank in one batch.
    calibration : DeviceCalibration
        Prices the products.
    capacity_factor : float | None
        Rows of a slot's buffer over the mean slot: every buffer travels and is computed whole whatever the routing
        (drop and pad, GShard, arXiv 2006.16668). Degrees must divide its rows (Tutel, arXiv 2206.03382). None drops
        nothing.
    groups : TokenGroups | None
        Tokens grouped by the experts they are expected to need; None leaves their home to chance.
    dispatch_bytes : float
        Of one element on its way to the experts [B].
    """
    moe = job.model.moe
    assert moe is not None
    rates = link_rates(job.cluster)
    num_layers = len(routing.loads)
    pairs = float(tokens_per_gpu * placement.num_ranks * moe.top_k)
    scaled = routing.loads * (pairs / routing.loads.sum(axis=1, keepdims=True))
    loads = rank_loads(placement, scaled, choice)
    degrees: tuple[int, ...] = DEGREES
    rows = [_slot_rows(placement, layer, scaled[layer], loads[layer]) for layer in range(num_layers)]
    if capacity_factor is None:
        heat = _heat(loads, placement.ranks_per_node if _travels_once(job, routing) else 1)
        traffic = {
            element: _traffic(job, placement, routing, choice, tokens_per_gpu, element, groups)
            for element in (dispatch_bytes, COMBINE_BYTES)
        }
    else:
        # Buffers are kept per sender, so that an all-to-all of equal parts carries them.
        own = capacity_rows(tokens_per_gpu, moe.top_k, placement.num_slots, capacity_factor)
        rows = [np.full_like(each, float(own * placement.num_ranks)) for each in rows]
        degrees = tuple(degree for degree in DEGREES if own % degree == 0)
        heat = np.ones(num_layers)
        padded = own * placement.num_slots / moe.top_k
        traffic = {
            element: [
                full_traffic(
                    padded,
                    job.model.hidden_size,
                    element,
                    moe.top_k,
                    placement.num_ranks,
                    placement.ranks_per_node,
                )
            ]
            * num_layers
            for element in (dispatch_bytes, COMBINE_BYTES)
        }
    dispatch, combine = (
        _exchange_times(traffic[element], rates, heat) for element in (dispatch_bytes, COMBINE_BYTES)
    )
    result = []
    for degree in degrees:
        experts = np.asarray([degree * experts_time(job, each / degree, calibration) for each in rows])
        layer = np.asarray(
            [
                overlapped_layer_time(*each, rates.latency, degree)
                for each in zip(dispatch, experts, combine, strict=True)
            ]
        )
        result.append(
            LayerTimes(experts=experts, dispatch=dispatch, combine=combine, layer=layer, degree=degree)
        )
    return tuple(result)


def _slot_rows(
    placement: ExpertPlacement, layer: int, pairs: NDArray[np.float64], loads: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the rows of each slot, ``(num_ranks, slots_per_rank)``, that sum up to the ranks' loads."""
    slots = placement.slots[layer]
    counts = np.bincount(slots, minlength=placement.num_experts)
    share = (pairs / counts)[slots].reshape(placement.num_ranks, -1)
    rows: NDArray[np.float64] = share * (loads / np.maximum(share.sum(axis=1), 1e-300))[:, None]
    return rows


def experts_time(job: PlacementJob, rows: NDArray[np.float64], calibration: DeviceCalibration) -> float:
    """Return the seconds of the slowest rank: products over its rows in whole tiles, weights of its active slots.

    Parameters
    ----------
    job : PlacementJob
        Model.
    rows : NDArray[np.float64]
        Rows of each slot, ``(num_ranks, slots_per_rank)``.
    calibration : DeviceCalibration
        Of the device.
    """
    moe, model = job.model.moe, job.model
    assert moe is not None
    tiled, loads = tiled_rows(rows).sum(axis=1), rows.sum(axis=1)
    active = (1.0 - np.exp(-rows)).sum(axis=1)
    width, hidden = float(moe.moe_ffn_hidden_size), float(model.hidden_size)
    gemm = replace(calibration.gemm("bf16"), residual=None)
    total = np.zeros(len(rows))
    for n, k in ((width * (2.0 if model.is_gated_mlp else 1.0), hidden), (hidden, width)):
        num_bytes = 2.0 * (active * n * k + loads * (n + k))
        total += gemm_time(
            np.maximum(tiled, 1.0),
            np.full_like(tiled, n),
            np.full_like(tiled, k),
            num_bytes,
            gemm,
            calibration.clock("bf16"),
        )
    return float(total.max())


def _travels_once(job: PlacementJob, routing: RoutingData) -> bool:
    """Return whether a token crosses once to each node, and the tokens are known that tell to how many."""
    return job.request.dispatch == "deduplicated" and routing.tokens is not None


def _heat(loads: NDArray[np.float64], together: int) -> NDArray[np.float64]:
    """Return the busiest receiver over the mean; so many ranks receive together."""
    received = loads.reshape(len(loads), -1, together).sum(axis=2)
    heat: NDArray[np.float64] = received.max(axis=1) / received.mean(axis=1)
    return heat


def _exchange_times(
    traffic: list[Traffic], rates: LinkRates, heat: NDArray[np.float64]
) -> NDArray[np.float64]:
    return np.asarray(
        [exchange_time(each, rates, float(hot)) for each, hot in zip(traffic, heat, strict=True)]
    )


def _traffic(
    job: PlacementJob,
    placement: ExpertPlacement,
    routing: RoutingData,
    choice: ReplicaChoice,
    tokens_per_gpu: int,
    element_bytes: float,
    groups: TokenGroups | None,
) -> list[Traffic]:
    """Return the bytes of one exchange of each layer."""
    moe, request, hidden = job.model.moe, job.request, job.model.hidden_size
    assert moe is not None
    num_ranks, per_node = placement.num_ranks, placement.ranks_per_node
    if _travels_once(job, routing):
        assert routing.tokens is not None
        together, remote = remote_nodes(placement, routing.tokens, choice, request.seed)
        if groups is not None:
            together, remote = groups.nodes, groups.remote_nodes
        ranks = _ranks_reached(placement, routing.tokens)
        return [
            deduplicated_traffic(tokens_per_gpu, hidden, element_bytes, away, reached, near)
            for away, reached, near in zip(remote, ranks, together, strict=True)
        ]
    if request.dispatch == "coherent":
        return [
            coherent_traffic(tokens_per_gpu, hidden, element_bytes, moe.top_k, kept, num_ranks, per_node)
            for kept in _localities(placement, routing)
        ]
    plain = full_traffic(tokens_per_gpu, hidden, element_bytes, moe.top_k, num_ranks, per_node)
    if groups is None:
        return [plain] * len(routing.loads)
    total = plain.between_nodes + plain.inside_node
    return [
        Traffic(between_nodes=total * (1.0 - share), inside_node=total * share)
        for share in groups.local_pairs
    ]


def _ranks_reached(placement: ExpertPlacement, tokens: NDArray[np.int16]) -> NDArray[np.float64]:
    """Return the distinct ranks a token reaches: every rank taken as a node of its own, copies drawn."""
    return remote_nodes(replace(placement, ranks_per_node=1), tokens[:, :_REACHED_SAMPLE], "random")[0]


def _localities(placement: ExpertPlacement, routing: RoutingData) -> NDArray[np.float64]:
    """Return the share of each layer's pairs that were on their rank already; the first layer has none."""
    transitions = routing.transitions
    if transitions is None and routing.tokens is not None:
        transitions = token_transitions(routing.tokens, routing.num_experts)
    assert transitions is not None
    kept = layer_chain_weights(placement, transitions) / transitions.sum(axis=(1, 2))
    return np.concatenate([[0.0], kept])
