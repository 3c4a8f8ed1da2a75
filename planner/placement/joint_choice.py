"""Expert parallel ranks, redundant slots, capacity factor and degree of overlap, chosen together by layer time.

Each pair of ranks and slots is placed and priced on held-out tokens of a few layers that stand for all; capacity and
overlap follow from the placement. Every rank has the same tokens whatever the choice, so that times compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from meshwright.costmodels.calibration import DeviceCalibration
from meshwright.errors import InfeasiblePlanError, SpecError
from meshwright.planner.placement.job import PlacementJob, with_layout
from meshwright.planner.placement.layer_times import fastest, layer_times
from meshwright.planner.placement.layout import capacity_drop, sampled_routing
from meshwright.planner.placement.request import PlacementAnswer
from meshwright.planner.placement.routing import RoutingData, split_held_out
from meshwright.planner.placement.solving import solve_placement
from meshwright.units import format_change

__all__ = ["ChoiceLimits", "JointChoice", "LayoutCandidate", "choose_layout"]

Progress = Callable[[str, int, int], None]

# Layers and tokens that stand for all while candidates are compared.
_LAYERS, _TOKENS = 3, 32_768
# Redundant slots of a rank that are tried, beyond those that let the slots divide.
_EXTRA_SLOTS = (0, 1, 2, 4)
_CAPACITY_FACTORS = (1.0, 1.25, 1.5, 2.0)
# Times this close are one time to the model: the candidate with less memory wins.
_RESOLUTION = 0.01
# Share of the device that weights may take; caches and activations need the rest.
_WEIGHTS_SHARE = 0.8
_WEIGHT_BYTES = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceLimits:
    """What a choice may try.

    Parameters
    ----------
    ep : int | None
        The one number of ranks allowed; None tries every one that fills nodes or divides one.
    redundant_experts : int | None
        The one number of redundant experts allowed; None tries a few per rank.
    capacity_factors : tuple[float, ...]
        Capacity factors tried beside dropping nothing.
    max_token_drop : float
        Share of the (token, expert) pairs that a capacity may drop; 0 drops none.
    tokens_per_gpu : int
        Tokens of each rank in one batch.
    """

    ep: int | None = None
    redundant_experts: int | None = None
    capacity_factors: tuple[float, ...] = _CAPACITY_FACTORS
    max_token_drop: float = 0.0
    tokens_per_gpu: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutCandidate:
    """One choice, priced; means over the sampled layers.

    Parameters
    ----------
    ep, redundant_experts, slots_per_rank : int
        Ranks, redundant slots of all ranks, and slots of one.
    capacity_factor : float | None
        Rows of a slot's buffer over the mean slot; None drops nothing.
    overlap_degree : int
        Chunks that dispatch, experts and combine overlap in.
    layer_seconds, experts_seconds, dispatch_seconds, combine_seconds : float
        Of one forward pass of a layer [s].
    imbalance : float
        Heaviest rank over the mean.
    remote_nodes_per_token : float | None
        Nodes other than its own that a token reaches.
    token_drop : float
        Share of the (token, expert) pairs dropped.
    weight_bytes : float
        Weights of one rank in 16 bits: its slots of every layer and everything but experts [B].
    obstacle : str
        Why it cannot be chosen; empty where it can.
    """

    ep: int
    redundant_experts: int
    slots_per_rank: int
    capacity_factor: float | None
    overlap_degree: int
    layer_seconds: float
    experts_seconds: float
    dispatch_seconds: float
    combine_seconds: float
    imbalance: float
    remote_nodes_per_token: float | None
    token_drop: float
    weight_bytes: float
    obstacle: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JointChoice:
    """The winner, every candidate by layer time, and why.

    Parameters
    ----------
    best : LayoutCandidate
        The fastest allowed; of those within the model's resolution the one with least memory.
    candidates : tuple[LayoutCandidate, ...]
        All that were priced, each at its best degree of overlap, fastest first.
    reasons : tuple[str, ...]
        One sentence each.
    """

    best: LayoutCandidate
    candidates: tuple[LayoutCandidate, ...]
    reasons: tuple[str, ...]


def choose_layout(
    job: PlacementJob,
    calibration: DeviceCalibration,
    limits: ChoiceLimits | None = None,
    progress: Progress = lambda *_: None,
) -> JointChoice:
    """Return the best ranks, slots, capacity and overlap of a job.

    Parameters
    ----------
    job : PlacementJob
        Model, machines, dispatch and routing data; its ranks and slots are replaced.
    calibration : DeviceCalibration
        Prices products.
    limits : ChoiceLimits | None
        What may be tried; everything when None.
    progress : Progress
        Told of each pair of ranks and slots.

    Raises
    ------
    SpecError
        If no pair of ranks and slots divides.
    InfeasiblePlanError
        If the weights fit on no candidate.
    """
    limits = limits or ChoiceLimits()
    pairs = list(_pairs(job, limits))
    if not pairs:
        raise SpecError(
            f"--choose: no number of ranks up to {job.cluster.num_gpus} fills nodes of {job.cluster.node.num_gpus} GPUs "
            f"and divides {job.request.routing.num_experts} experts with the redundant ones asked for"
        )
    is_chained = job.request.dispatch == "coherent" or job.request.is_grouping_tokens
    routing = sampled_routing(job.request.routing, _LAYERS, _TOKENS, is_consecutive=is_chained)
    candidates: list[LayoutCandidate] = []
    for done, (ep, redundant) in enumerate(pairs):
        progress("layouts priced", done, len(pairs))
        candidates += _priced(with_layout(job, ep, redundant, routing), limits, calibration)
    candidates.sort(key=lambda each: (each.layer_seconds, each.weight_bytes))
    allowed = [each for each in candidates if not each.obstacle]
    if not allowed:
        raise InfeasiblePlanError(
            f"--choose: {candidates[0].obstacle} for every number of ranks and slots; take more or larger GPUs, or "
            "allow a larger --max-token-drop",
            {"memory": len(candidates)},
        )
    near = [each for each in allowed if each.layer_seconds <= allowed[0].layer_seconds * (1.0 + _RESOLUTION)]
    best = min(near, key=lambda each: (each.weight_bytes, each.layer_seconds))
    return JointChoice(best=best, candidates=tuple(candidates), reasons=_reasons(best, allowed, candidates))


def _pairs(job: PlacementJob, limits: ChoiceLimits) -> Iterator[tuple[int, int]]:
    """Yield every pair of ranks and redundant experts whose slots divide."""
    experts, per_node = job.request.routing.num_experts, job.cluster.node.num_gpus
    sizes: Sequence[int] = range(2, job.cluster.num_gpus + 1) if limits.ep is None else (limits.ep,)
    for ep in sizes:
        fills = ep % per_node == 0 and job.cluster.num_gpus % ep == 0 if ep > per_node else per_node % ep == 0
        if limits.ep is None and not fills:
            continue
        if limits.redundant_experts is not None:
            extras: Sequence[int] = (limits.redundant_experts,)
        elif job.request.dispatch == "coherent":
            extras = (0,)
        else:
            extras = tuple(-experts % ep + each * ep for each in _EXTRA_SLOTS)
        for extra in extras:
            if (experts + extra) % ep == 0 and experts + extra <= experts * ep:
                yield ep, extra


def _priced(
    job: PlacementJob, limits: ChoiceLimits, calibration: DeviceCalibration
) -> Iterator[LayoutCandidate]:
    """Yield one candidate per capacity, each at its best degree of overlap."""
    request = job.request
    # The objective of the whole job may need more nodes or ranks than this candidate has.
    if request.num_nodes == 1 and request.dispatch == "deduplicated" and not request.is_grouping_tokens:
        request = replace(request, objective="balance")
        job = replace(job, request=request)
    answer = solve_placement(request, certificates=False)
    judge = split_held_out(request.routing, request.held_out_share)[1] or request.routing
    weights = weight_bytes(job)
    room = _WEIGHTS_SHARE * job.cluster.node.gpu.memory_bytes
    for factor in (None, *limits.capacity_factors):
        drop = 0.0
        if factor is not None:
            drop = capacity_drop(judge, request.top_k, factor, limits.tokens_per_gpu, answer.placement)
        obstacle = ""
        if weights > room:
            obstacle = f"weights of {weights / 1e9:,.0f} GB exceed {room / 1e9:,.0f} GB"
        elif drop > limits.max_token_drop:
            obstacle = f"drops {drop:.1%} of the tokens"
        yield _candidate(job, answer, judge, limits, calibration, factor, drop, weights, obstacle)


def _candidate(
    job: PlacementJob,
    answer: PlacementAnswer,
    judge: RoutingData,
    limits: ChoiceLimits,
    calibration: DeviceCalibration,
    factor: float | None,
    drop: float,
    weights: float,
    obstacle: str,
) -> LayoutCandidate:
    request, measures = job.request, answer.held_out or answer.solved
    times = fastest(
        layer_times(
            job,
            answer.placement,
            judge,
            request.choice,
            limits.tokens_per_gpu,
            calibration,
            capacity_factor=factor,
            groups=None if answer.grouping is None else answer.grouping.grouped,
        )
    )
    remote = measures.remote_nodes_per_token
    if answer.grouping is not None and answer.grouping.is_of_nodes:
        remote = float(answer.grouping.grouped.remote_nodes.mean())
    return LayoutCandidate(
        ep=request.num_ranks,
        redundant_experts=request.num_slots - request.routing.num_experts,
        slots_per_rank=answer.placement.slots_per_rank,
        capacity_factor=factor,
        overlap_degree=times.degree,
        layer_seconds=float(times.layer.mean()),
        experts_seconds=float(times.experts.mean()),
        dispatch_seconds=float(times.dispatch.mean()),
        combine_seconds=float(times.combine.mean()),
        imbalance=measures.imbalance,
        remote_nodes_per_token=remote,
        token_drop=drop,
        weight_bytes=weights,
        obstacle=obstacle,
    )


def weight_bytes(job: PlacementJob) -> float:
    """Return the weights of one rank in 16 bits, experts in its slots and everything else whole [B]."""
    model, request = job.model, job.request
    moe = model.moe
    assert moe is not None
    layers, each = len(job.table.moe_layers), model.num_expert_parameters
    others = model.num_main_parameters - layers * moe.num_experts * each
    return _WEIGHT_BYTES * (others + layers * request.num_slots / request.num_ranks * each)


def _reasons(
    best: LayoutCandidate, allowed: Sequence[LayoutCandidate], candidates: Sequence[LayoutCandidate]
) -> tuple[str, ...]:
    """Return why the best is best: against the fastest, against each choice left out, and what was ruled out."""
    reasons = []
    fastest_allowed = allowed[0]
    if fastest_allowed != best:
        reasons.append(
            f"{_name(fastest_allowed)} is {format_change(fastest_allowed.layer_seconds / best.layer_seconds - 1.0)} in time, within "
            f"the {_RESOLUTION:.0%} the model tells apart, and holds {fastest_allowed.weight_bytes / 1e9:,.1f} GB of "
            f"weights instead of {best.weight_bytes / 1e9:,.1f} GB"
        )
    others = [each for each in allowed if each.ep != best.ep]
    if others and others[0] != fastest_allowed:
        reasons.append(f"{_against(best, others[0])}: the best of any other number of ranks")
    plain = [
        each for each in allowed if each.ep == best.ep and each.redundant_experts < best.redundant_experts
    ]
    if plain:
        reasons.append(f"{_against(best, plain[0])}: the best with fewer slots")
    ruled = [each for each in candidates if each.obstacle and each.layer_seconds < best.layer_seconds]
    if ruled:
        reasons.append(f"faster, but not allowed: {_name(ruled[0])} ({ruled[0].obstacle})")
    return tuple(reasons)


def _against(best: LayoutCandidate, other: LayoutCandidate) -> str:
    return f"{_name(other)} takes {format_change(other.layer_seconds / best.layer_seconds - 1.0)} time"


def _name(each: LayoutCandidate) -> str:
    capacity = "" if each.capacity_factor is None else f", capacity {each.capacity_factor:g}"
    return f"ep {each.ep} with {each.redundant_experts} redundant{capacity}"
