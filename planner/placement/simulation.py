"""Seconds of a mixture-of-experts layer under a placement: experts of the busiest rank, dispatch, combine, overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.calibration import DeviceCalibration
from meshwright.costmodels.calibration_choice import load_device_calibration, read_device_calibrations
from meshwright.costmodels.parallelism.dispatch import (
    LinkRates,
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
from meshwright.planner.placement.request import PlacementAnswer
from meshwright.planner.placement.routing import RoutingData, split_held_out, token_transitions
from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = ["LayerTimes", "layer_times", "simulate_layers"]

_DEGREES = (1, 2, 4, 8)
# Dispatch in FP8 with an fp32 scale per 128 elements, combine in BF16 (DeepEP, README).
_DISPATCH_BYTES, _COMBINE_BYTES = 1.0 + 4.0 / 128.0, 2.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTimes:
    """Seconds of each layer, ``(num_layers,)``; ``layer`` overlaps them in ``degree`` chunks."""

    experts: NDArray[np.float64]
    dispatch: NDArray[np.float64]
    combine: NDArray[np.float64]
    layer: NDArray[np.float64]
    degree: int


def simulate_layers(
    job: PlacementJob, answer: PlacementAnswer, tokens_per_gpu: int, calibrations: Sequence[Path] = ()
) -> dict[str, object]:
    """Return mean layer times of EPLB's placement and of ours on the tokens that judge.

    Parameters
    ----------
    job : PlacementJob
        Model, machines and request.
    answer : PlacementAnswer
        Both placements.
    tokens_per_gpu : int
        Tokens of each rank in one batch.
    calibrations : Sequence[Path]
        The user's calibration files; the built-in one of the device without any.

    Returns
    -------
    dict[str, object]
        ``tokens_per_gpu``, ``calibration``, and per placement the mean seconds of experts, dispatch, combine and
        layer, with the best degree of overlap.
    """
    request = job.request
    solve_with, judge_with = split_held_out(request.routing, request.held_out_share)
    routing = judge_with or solve_with
    node = job.cluster.node
    calibration = (
        read_device_calibrations(calibrations, node.gpu, node)
        if calibrations
        else load_device_calibration(node.gpu, node)
    )
    cases: list[tuple[str, ExpertPlacement, ReplicaChoice]] = [("EPLB, any copy", answer.baseline, "random")]
    if request.choice == "nearest":
        cases.append(("EPLB, nearest copy", answer.baseline, "nearest"))
    cases.append(("this placement", answer.placement, request.choice))
    placements = {}
    for name, placement, choice in cases:
        times = layer_times(job, placement, routing, choice, tokens_per_gpu, calibration)
        placements[name] = {
            "experts": float(times.experts.mean()),
            "dispatch": float(times.dispatch.mean()),
            "combine": float(times.combine.mean()),
            "layer": float(times.layer.mean()),
            "overlap_degree": times.degree,
        }
    return {"tokens_per_gpu": tokens_per_gpu, "calibration": calibration.id, "placements": placements}


def layer_times(
    job: PlacementJob,
    placement: ExpertPlacement,
    routing: RoutingData,
    choice: ReplicaChoice,
    tokens_per_gpu: int,
    calibration: DeviceCalibration,
) -> LayerTimes:
    """Return the seconds of each layer; layers end with a barrier, so that each has its own busiest rank."""
    rates = link_rates(job.cluster)
    moe = job.model.moe
    assert moe is not None
    pairs = tokens_per_gpu * placement.num_ranks * moe.top_k
    scaled = routing.loads * (pairs / routing.loads.sum(axis=1, keepdims=True))
    loads = rank_loads(placement, scaled, choice)
    experts = np.asarray(
        [
            _experts_time(job, placement, layer, scaled[layer], loads[layer], calibration)
            for layer in range(len(loads))
        ]
    )
    dispatch, combine = (
        _exchange_times(job, placement, routing, choice, tokens_per_gpu, loads, element, rates)
        for element in (_DISPATCH_BYTES, _COMBINE_BYTES)
    )
    best: tuple[float, int, NDArray[np.float64]] | None = None
    for degree in _DEGREES:
        layer = np.asarray(
            [
                overlapped_layer_time(*each, rates.latency, degree)
                for each in zip(dispatch, experts, combine, strict=True)
            ]
        )
        if best is None or layer.sum() < best[0]:
            best = (float(layer.sum()), degree, layer)
    assert best is not None
    return LayerTimes(experts=experts, dispatch=dispatch, combine=combine, layer=best[2], degree=best[1])


def _experts_time(
    job: PlacementJob,
    placement: ExpertPlacement,
    layer: int,
    pairs: NDArray[np.float64],
    loads: NDArray[np.float64],
    calibration: DeviceCalibration,
) -> float:
    """Return the seconds of the slowest rank: products over its rows in whole tiles, weights of its active slots."""
    moe, model = job.model.moe, job.model
    assert moe is not None
    slots = placement.slots[layer]
    counts = np.bincount(slots, minlength=placement.num_experts)
    share = (pairs / counts)[slots].reshape(placement.num_ranks, -1)
    share = share * (loads / np.maximum(share.sum(axis=1), 1e-300))[:, None]
    rows = tiled_rows(share).sum(axis=1)
    active = (1.0 - np.exp(-share)).sum(axis=1)
    width, hidden = float(moe.moe_ffn_hidden_size), float(model.hidden_size)
    gemm = calibration.gemm("bf16")
    total = np.zeros(placement.num_ranks)
    for n, k in ((width * (2.0 if model.is_gated_mlp else 1.0), hidden), (hidden, width)):
        num_bytes = 2.0 * (active * n * k + loads * (n + k))
        product = gemm_time(
            np.maximum(rows, 1.0),
            np.full_like(rows, n),
            np.full_like(rows, k),
            num_bytes,
            replace(gemm, residual=None),
            calibration.clock("bf16"),
        )
        total += product
    return float(total.max())


def _exchange_times(
    job: PlacementJob,
    placement: ExpertPlacement,
    routing: RoutingData,
    choice: ReplicaChoice,
    tokens_per_gpu: int,
    loads: NDArray[np.float64],
    element_bytes: float,
    rates: LinkRates,
) -> NDArray[np.float64]:
    """Return the seconds of one exchange of each layer."""
    moe, request, hidden = job.model.moe, job.request, job.model.hidden_size
    assert moe is not None
    num_ranks, per_node = placement.num_ranks, placement.ranks_per_node
    # The busiest receiver: of ranks where pairs travel one by one, of nodes where a token crosses once.
    heat = loads.max(axis=1) / loads.mean(axis=1)
    if request.dispatch == "deduplicated" and routing.tokens is not None:
        nodes = loads.reshape(len(loads), -1, per_node).sum(axis=2)
        heat = nodes.max(axis=1) / nodes.mean(axis=1)
        together, remote = remote_nodes(placement, routing.tokens, choice, request.seed)
        ranks = _ranks_reached(placement, routing.tokens)
        traffic = [
            deduplicated_traffic(tokens_per_gpu, hidden, element_bytes, away, reached, near)
            for away, reached, near in zip(remote, ranks, together, strict=True)
        ]
    elif request.dispatch == "coherent":
        traffic = [
            coherent_traffic(tokens_per_gpu, hidden, element_bytes, moe.top_k, kept, num_ranks, per_node)
            for kept in _localities(placement, routing)
        ]
    else:
        traffic = [full_traffic(tokens_per_gpu, hidden, element_bytes, moe.top_k, num_ranks, per_node)] * len(
            loads
        )
    return np.asarray(
        [exchange_time(each, rates, float(hot)) for each, hot in zip(traffic, heat, strict=True)]
    )


def _ranks_reached(placement: ExpertPlacement, tokens: NDArray[np.int16]) -> NDArray[np.float64]:
    """Return the distinct ranks a token reaches: every rank taken as a node of its own, copies drawn."""
    sample = tokens[:, :2048]
    single = ExpertPlacement(
        slots=placement.slots,
        num_experts=placement.num_experts,
        num_ranks=placement.num_ranks,
        ranks_per_node=1,
    )
    return remote_nodes(single, sample, "random")[0]


def _localities(placement: ExpertPlacement, routing: RoutingData) -> NDArray[np.float64]:
    """Return the share of each layer's pairs that were on their rank already; the first layer has none."""
    transitions: Mapping[int, NDArray[np.float64]] | NDArray[np.float64] | None = routing.transitions
    if transitions is None and routing.tokens is not None:
        transitions = token_transitions(routing.tokens, routing.num_experts)
    assert isinstance(transitions, np.ndarray)
    kept = layer_chain_weights(placement, transitions) / transitions.sum(axis=(1, 2))
    return np.concatenate([[0.0], kept])
