"""What a request must bring, and what an answer must admit."""

from __future__ import annotations

from meshwright.errors import SpecError
from meshwright.planner.placement.evaluation import Measures
from meshwright.planner.placement.request import PlacementRequest

__all__ = ["answer_warnings", "check_request"]

_GAP_WARNING = 0.01
_MIN_TOKENS = 16_384


def check_request(request: PlacementRequest) -> None:
    """Raise when the routing data cannot serve the objective.

    Raises
    ------
    SpecError
        One sentence: what is missing, and which objective would do.
    """
    routing = request.routing
    needs_tokens = request.objective in ("traffic", "joint") and request.dispatch == "deduplicated"
    if needs_tokens and routing.tokens is None:
        raise SpecError(
            f"{routing.origin}: objective {request.objective} with deduplicated dispatch needs a trace of tokens, not "
            "sums; record one, or use --objective balance"
        )
    if request.is_grouping_tokens:
        _check_grouping(request)
    elif request.objective in ("traffic", "joint") and request.dispatch == "full":
        raise SpecError(
            f"objective {request.objective}: without deduplication every (token, expert) pair travels wherever experts "
            "sit; only their balance can be improved: use --objective balance or active"
        )
    if request.objective in ("traffic", "joint") and request.dispatch == "coherent":
        if routing.tokens is None and routing.transitions is None:
            raise SpecError(f"{routing.origin}: coherent dispatch needs a trace or transition counts")
        if routing.num_layers < 2:
            raise SpecError(
                f"{routing.origin}: coherent dispatch needs at least two mixture-of-experts layers"
            )
        if request.num_slots != routing.num_experts:
            raise SpecError("coherent dispatch keeps one copy of each expert; leave out redundant experts")


def _check_grouping(request: PlacementRequest) -> None:
    routing = request.routing
    if request.objective not in ("traffic", "joint") or request.dispatch == "coherent":
        raise SpecError(
            "grouping of tokens goes with the objectives traffic and joint, and with deduplicated or full dispatch, not "
            f"with {request.objective} and {request.dispatch}"
        )
    if routing.tokens is None or routing.num_layers < 2:
        raise SpecError(
            f"{routing.origin}: grouping needs a trace of tokens over at least two mixture-of-experts layers; what a "
            "token needs is foretold from the layer before"
        )
    if request.num_ranks < 2:
        raise SpecError("grouping of tokens needs at least two expert parallel ranks")


def answer_warnings(
    request: PlacementRequest, solved: Measures, held_out: Measures | None
) -> tuple[str, ...]:
    """Return what forbids or limits a claim about a placement, one sentence each."""
    routing = request.routing
    result = list(routing.notes)
    if routing.is_synthetic:
        result.append("synthetic routing: no gain is claimed; record a trace of your own requests")
    if held_out is None:
        result.append(
            "nothing was held out to judge with: the figures are those of the data solved with, no gain is claimed"
        )
    else:
        pairs = (
            ("imbalance", solved.imbalance, held_out.imbalance),
            ("nodes per token", solved.nodes_per_token, held_out.nodes_per_token),
            ("locality", solved.locality, held_out.locality),
        )
        for name, before, after in pairs:
            if before and after and abs(after / before - 1.0) > _GAP_WARNING:
                result.append(
                    f"{name} is {after:.4g} on held-out tokens and {before:.4g} on those solved with "
                    f"({abs(after / before - 1.0):.1%} apart): the placement is fitted to its trace; record more tokens"
                )
    if routing.tokens is not None and not routing.is_synthetic and routing.num_tokens < _MIN_TOKENS:
        result.append(
            f"{routing.num_tokens:,} tokens are few: below {_MIN_TOKENS:,} per layer traffic gains are mostly overfitting"
        )
    if request.is_grouping_tokens:
        result.append(
            "tokens grouped are a possibility, not a setting: the engine must hand tokens out anew after attention "
            "(shuffled reduce-scatter, arXiv 2503.04398)"
        )
    elif request.objective in ("traffic", "joint") and request.dispatch == "deduplicated":
        if request.num_nodes == 1:
            result.append("all ranks share one node: only balance was improved")
        elif request.num_slots > routing.num_experts:
            result.append(
                "the engine must prefer the copy on the token's own node (SGLang: --ep-dispatch-algorithm static)"
            )
    return tuple(result)
