"""From a request to an answer: candidates by the methods that fit the dispatch, judged, certified and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.planner.placement.answer_certificates import certify
from meshwright.planner.placement.answer_checks import answer_warnings, check_request
from meshwright.planner.placement.balance import balance_slots, level_over_windows
from meshwright.planner.placement.chain import (
    alternate_often,
    joint_chain,
    ranks_of_slots,
    relabel_chain,
    slots_of_ranks,
)
from meshwright.planner.placement.chain_partitions import (
    best_partitions,
    best_priced_partitions,
    num_partitions,
)
from meshwright.planner.placement.distinct import copies_apart
from meshwright.planner.placement.eplb import eplb_slots
from meshwright.planner.placement.evaluation import (
    Measures,
    ReplicaChoice,
    fresh_imbalance,
    imbalance,
    measure,
    moved_slots,
    rank_loads,
)
from meshwright.planner.placement.exact import exact_balance, exact_chain, exact_replicated_balance
from meshwright.planner.placement.migration import keep_in_place
from meshwright.planner.placement.request import PlacementAnswer, PlacementRequest
from meshwright.planner.placement.routing import RoutingData, split_held_out, token_transitions
from meshwright.planner.placement.spread import spread_slots
from meshwright.planner.placement.token_groups import SpeculativeGrouping, TokenGroups, speculative_grouping
from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = ["solve_placement"]

Progress = Callable[[str, int, int], None]

# How far a node may exceed the mean: where traffic alone counts, and at least, for exchanges need some room.
_TRAFFIC_SLACK, _LEAST_SLACK = 0.03, 0.005
_MAX_PARTITIONS = 500
# Experts times ranks up to which an integer program may be asked for.
_MAX_BINARIES = 256
# Random starts of a chain help where a layer has few experts.
_FEW_EXPERTS, _SMALL_STARTS = 24, 40
# Slots per rank from which a joint chain starts from affinity; below, from balance.
_ROOM_FOR_AFFINITY = 4
# Tightenings of the cap of a joint chain, and how far above its slack the expectation may end.
_CAP_ROUNDS, _CAP_STEP = 6, 0.0015
# The same of placements that spread tokens over few nodes.
_SPREAD_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Candidate:
    method: str
    placement: ExpertPlacement


def solve_placement(
    request: PlacementRequest, progress: Progress = lambda *_: None, *, certificates: bool = True
) -> PlacementAnswer:
    """Return the best placement found, with EPLB's beside it, bounds, and what forbids a claim.

    Parameters
    ----------
    request : PlacementRequest
        The problem.
    progress : Progress
        Told of each phase.
    certificates : bool
        Compute the bounds, which may take longer than the placement.

    Raises
    ------
    SpecError
        If the routing data cannot serve the objective.
    """
    check_request(request)
    solve_with, judge_with = split_held_out(request.routing, request.held_out_share)
    baseline = _wrap(request, _eplb(request, solve_with))
    candidates = [*_candidates(request, solve_with, progress), _Candidate(method="EPLB", placement=baseline)]
    if request.has_copies_apart:
        candidates = [
            replace(each, placement=copies_apart(each.placement, solve_with.loads)) for each in candidates
        ]
    best = _choose(request, candidates, solve_with)
    placement = best.placement
    if request.current is not None:
        placement = keep_in_place(placement, request.current, is_chained=request.dispatch == "coherent")

    judge = solve_with if judge_with is None else judge_with
    solved = _measured(request, placement, solve_with)
    held_out = None if judge_with is None else _measured(request, placement, judge_with)
    baseline_solved = _measured(request, baseline, solve_with, "random")
    return PlacementAnswer(
        placement=placement,
        baseline=baseline,
        method=best.method,
        solved=solved,
        baseline_solved=baseline_solved,
        held_out=held_out,
        baseline_held_out=None if judge_with is None else _measured(request, baseline, judge_with, "random"),
        baseline_nearest=_measured(request, baseline, judge) if request.choice == "nearest" else None,
        certificates=certify(request, placement, solve_with) if certificates else (),
        warnings=answer_warnings(request, solved, held_out),
        moved_slots=None if request.current is None else moved_slots(request.current, placement),
        grouping=_grouping(request, placement, solve_with, judge) if request.is_grouping_tokens else None,
    )


def _grouping(
    request: PlacementRequest, placement: ExpertPlacement, learn_from: RoutingData, judge: RoutingData
) -> SpeculativeGrouping:
    assert learn_from.tokens is not None
    assert judge.tokens is not None
    return speculative_grouping(
        placement,
        learn_from.tokens,
        judge.tokens,
        is_deduplicated=request.dispatch == "deduplicated",
        choice=request.choice,
        seed=request.seed,
    )


def _grouped_fresh(
    request: PlacementRequest, placement: ExpertPlacement, routing: RoutingData
) -> TokenGroups:
    """Return what grouping comes to inside the tokens solved with: tables of one half, judged on the other."""
    learn_from, judge = split_held_out(routing, 0.5)
    return _grouping(request, placement, learn_from, judge or learn_from).grouped


def _measured(
    request: PlacementRequest,
    placement: ExpertPlacement,
    routing: RoutingData,
    choice: ReplicaChoice | None = None,
) -> Measures:
    return measure(
        placement,
        routing,
        choice=choice or request.choice,
        active_batch=request.active_batch,
        with_chain=request.dispatch == "coherent",
        seed=request.seed,
    )


def _wrap(request: PlacementRequest, slots: NDArray[np.int64]) -> ExpertPlacement:
    return ExpertPlacement(
        slots=slots,
        num_experts=request.routing.num_experts,
        num_ranks=request.num_ranks,
        ranks_per_node=request.ranks_per_node,
    )


def _eplb(request: PlacementRequest, routing: RoutingData) -> NDArray[np.int64]:
    return eplb_slots(
        routing.loads, request.num_slots, request.num_groups, request.num_nodes, request.num_ranks
    )


def _candidates(request: PlacementRequest, routing: RoutingData, progress: Progress) -> list[_Candidate]:
    """Return placements to choose from, by objective and dispatch."""
    if request.solver in ("highs", "cbc"):
        return [_by_integer_program(request, routing)]
    if request.objective == "active":
        return [_active(request, routing)]
    if request.objective == "balance":
        return _balanced(request, routing)
    if request.dispatch == "coherent":
        return _chained(request, routing)
    if request.num_nodes == 1 and not request.is_grouping_tokens:
        return _balanced(request, routing)
    result = []
    slack = request.imbalance_slack
    for _ in range(_SPREAD_ROUNDS):
        spread = _spread(request, routing, slack, progress)
        result.append(spread)
        excess = 0.0 if request.objective == "traffic" else _excess(request, spread.placement, routing)
        if excess <= request.imbalance_slack + _CAP_STEP:
            return result
        slack -= excess - request.imbalance_slack
    return [*result, *_balanced(request, routing)]


def _is_level(request: PlacementRequest, placement: ExpertPlacement, routing: RoutingData) -> bool:
    """Return whether a placement is expected to stay near EPLB's imbalance on fresh tokens."""
    return _excess(request, placement, routing) <= request.imbalance_slack + _CAP_STEP


def _excess(request: PlacementRequest, placement: ExpertPlacement, routing: RoutingData) -> float:
    """Return how far a placement's imbalance is expected to lie above EPLB's on fresh tokens."""
    baseline = _wrap(request, _eplb(request, routing))
    theirs = fresh_imbalance(baseline, routing, "random", request.seed)
    ours = fresh_imbalance(placement, routing, request.choice, request.seed)
    if request.is_grouping_tokens:
        ours = max(ours, float(_grouped_fresh(request, placement, routing).imbalance.mean()))
    return ours - theirs


def _balanced(request: PlacementRequest, routing: RoutingData) -> list[_Candidate]:
    is_grouped = request.dispatch == "deduplicated" and request.top_groups < request.num_groups
    slots = balance_slots(
        routing.loads,
        request.num_slots,
        request.num_ranks,
        num_groups=request.num_groups if is_grouped else 1,
        num_nodes=request.num_nodes if is_grouped else 1,
        seed=request.seed,
    )
    result = [_Candidate(method="LPT, exchanges and count moves", placement=_wrap(request, slots))]
    if routing.windows is not None and len(routing.windows) > 1:
        robust = [
            level_over_windows(routing.windows[:, layer], each, request.num_ranks)
            for layer, each in enumerate(slots)
        ]
        result.append(
            _Candidate(method="exchanges over windows of time", placement=_wrap(request, np.asarray(robust)))
        )
    return result


def _by_integer_program(request: PlacementRequest, routing: RoutingData) -> _Candidate:
    """Return the placement of the solver the user insists on.

    Raises
    ------
    SpecError
        If the instance is too large, or the objective is none the solver is given.
    """
    if request.objective == "balance":
        if routing.num_experts * request.num_ranks > _MAX_BINARIES:
            raise SpecError(
                f"--solver {request.solver}: {routing.num_experts} experts on {request.num_ranks} ranks are too many "
                "for integer programming; use --solver auto, which certifies its answer too"
            )
        solved = []
        for loads in routing.loads:
            if request.num_slots == routing.num_experts:
                answer = exact_balance(loads, request.num_ranks, solver=request.solver)
            else:
                answer = exact_replicated_balance(
                    loads, request.num_slots, request.num_ranks, solver=request.solver
                )
            solved.append(answer)
        slots = np.concatenate([each.slots for each in solved])
    elif request.objective == "traffic" and request.dispatch == "coherent":
        solved = [exact_chain(_transitions(routing), request.num_ranks, solver=request.solver)]
        slots = solved[0].slots
    else:
        raise SpecError(
            f"--solver {request.solver}: integer programming serves --objective balance, and traffic with coherent "
            "dispatch; use --solver auto"
        )
    proof = "proven" if all(each.is_proven for each in solved) else "time limit reached, not proven"
    return _Candidate(
        method=f"integer program, {solved[0].solver} ({proof})", placement=_wrap(request, slots)
    )


def _active(request: PlacementRequest, routing: RoutingData) -> _Candidate:
    """Return the placement that evens out the expected distinct active experts of a decode batch."""
    batch = float(request.active_batch)

    def share(loads: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
        # A token chooses the copy with probability p / n; a batch of B misses it with (1 - p / n)^B.
        chance = np.minimum(loads / loads.sum() * request.top_k, 1.0) / counts
        result: NDArray[np.float64] = 1.0 - (1.0 - chance) ** batch
        return result

    slots = balance_slots(routing.loads, request.num_slots, request.num_ranks, share=share, seed=request.seed)
    return _Candidate(method="LPT and exchanges on activity", placement=_wrap(request, slots))


def _spread(
    request: PlacementRequest, routing: RoutingData, imbalance_slack: float, progress: Progress
) -> _Candidate:
    assert routing.tokens is not None
    slack = np.full(routing.num_layers, _TRAFFIC_SLACK)
    if request.objective == "joint":
        reached = imbalance(rank_loads(_wrap(request, _eplb(request, routing)), routing.loads))
        slack = np.maximum(_LEAST_SLACK, reached - 1.0 + imbalance_slack - _LEAST_SLACK)
    slots = spread_slots(
        routing.tokens,
        routing.loads,
        request.num_slots,
        request.num_ranks,
        request.ranks_per_home,
        slack=slack,
        num_groups=request.num_groups,
        seed=request.seed,
        progress=lambda done: progress("layers placed", done, routing.num_layers),
    )
    return _Candidate(
        method="experts together by token, copies near their tokens", placement=_wrap(request, slots)
    )


def _transitions(routing: RoutingData) -> NDArray[np.float64]:
    if routing.transitions is not None:
        return routing.transitions
    assert routing.tokens is not None
    return token_transitions(routing.tokens, routing.num_experts)


def _chained(request: PlacementRequest, routing: RoutingData) -> list[_Candidate]:
    transitions, num_ranks = _transitions(routing), request.num_ranks
    is_small = num_partitions(routing.num_experts, num_ranks) <= _MAX_PARTITIONS
    if request.objective == "joint":
        return [
            _joint_chain(request, routing, transitions, is_small=is_small and request.solver != "heuristic")
        ]
    if is_small and request.solver != "heuristic":
        free = np.full(routing.num_layers, np.inf)
        ranks = best_partitions(transitions, routing.loads, num_ranks, free)
        return [_Candidate(method="all partitions (exact)", placement=_wrap(request, slots_of_ranks(ranks)))]
    starts = _SMALL_STARTS if routing.num_experts <= _FEW_EXPERTS else 0
    ranks = alternate_often(transitions, num_ranks, starts, request.seed)
    return [_Candidate(method="alternating assignment", placement=_wrap(request, slots_of_ranks(ranks)))]


def _joint_chain(
    request: PlacementRequest, routing: RoutingData, transitions: NDArray[np.float64], *, is_small: bool
) -> _Candidate:
    """Return a chain under a cap on imbalance, tightened until fresh tokens are expected to keep it.

    Experts that belong together share a rank, whose load then varies more from one sample of tokens to the next: a
    cap held on the trace is not held on other tokens.
    """
    num_ranks = request.num_ranks
    reached = rank_loads(_wrap(request, _eplb(request, routing)), routing.loads)
    start = np.empty((0, 0), dtype=np.int64)
    if is_small:
        name = "all partitions, imbalance priced"
    elif request.num_slots // num_ranks >= _ROOM_FOR_AFFINITY:
        name = "alternating assignment, then exchanges under a cap"
        start = alternate_often(transitions, num_ranks, 0, request.seed)
    else:
        name = "balance, then exchanges under a cap"
        balanced = balance_slots(routing.loads, request.num_slots, num_ranks, seed=request.seed)
        start = ranks_of_slots(relabel_chain(transitions, balanced, num_ranks), num_ranks)
    slack = request.imbalance_slack
    best: tuple[float, ExpertPlacement] | None = None
    for _ in range(_CAP_ROUNDS):
        if is_small:
            limit = float(imbalance(reached).mean()) + slack
            ranks = best_priced_partitions(transitions, routing.loads, num_ranks, limit)
        else:
            caps = reached.max(axis=1) + slack * reached.mean(axis=1)
            ranks = joint_chain(transitions, routing.loads, num_ranks, caps, start)
        named = relabel_chain(transitions, slots_of_ranks(ranks), num_ranks)
        placement = _wrap(request, named)
        excess = _excess(request, placement, routing)
        if best is None or excess < best[0]:
            best = (excess, placement)
        if excess <= request.imbalance_slack + _CAP_STEP:
            break
        slack -= excess - request.imbalance_slack
    assert best is not None
    return _Candidate(method=name, placement=best[1])


def _choose(
    request: PlacementRequest,
    candidates: list[_Candidate],
    routing: RoutingData,
) -> _Candidate:
    """Return the best candidate on the tokens solved with; a joint one must stay near EPLB's imbalance."""

    def load(each: _Candidate) -> float:
        return float(imbalance(rank_loads(each.placement, routing.loads, request.choice)).mean())

    if request.objective == "active":
        return candidates[0]
    if request.objective == "balance":
        if routing.windows is not None:
            values = [_measured(request, each.placement, routing) for each in candidates]
            scores = [
                each.imbalance if each.window_imbalance is None else each.window_imbalance for each in values
            ]
        else:
            scores = [load(each) for each in candidates]
        return candidates[_first_best(scores)]
    measured = [_measured(request, each.placement, routing) for each in candidates]
    if request.is_grouping_tokens:
        grouped = [_grouped_fresh(request, each.placement, routing) for each in candidates]
        is_once = request.dispatch == "deduplicated"
        traffic = [float((each.remote_nodes if is_once else -each.local_pairs).mean()) for each in grouped]
    elif request.dispatch == "coherent":
        traffic = [-(each.locality or 0.0) for each in measured]
    else:
        traffic = [each.remote_nodes_per_token or 0.0 for each in measured]
    if request.objective == "traffic":
        return candidates[_first_best(traffic)]
    is_level = [_is_level(request, each.placement, routing) for each in candidates]
    if any(is_level):
        return candidates[_first_best(np.where(is_level, traffic, np.inf).tolist())]
    return candidates[_first_best([each.imbalance for each in measured])]


def _first_best(scores: list[float]) -> int:
    """Return the first score that is least but for rounding: ours come before EPLB's."""
    limit = min(scores)
    return next(index for index, each in enumerate(scores) if each <= limit + 1e-9 * abs(limit))
