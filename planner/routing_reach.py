"""What a training job's experts can come to on every number of ranks, from recorded routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from meshwright.errors import SpecError
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.planner.placement.job import moe_layer_indices
from meshwright.planner.placement.layout import (
    PlacementReach,
    capacity_drop,
    placement_reach,
    sampled_routing,
)
from meshwright.planner.placement.routing import split_held_out
from meshwright.planner.placement.routing_files import read_routing
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.workload import ExpertRouting

__all__ = ["ReachedRouting", "reached_routing"]

_CAPACITY_FACTORS = (1.0, 1.1, 1.25, 1.5, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachedRouting:
    """Imbalance and traffic by number of ranks, and what a report says of them, one sentence each.

    An entry's ``capacity_factor`` drops no more than was allowed and beats the imbalance of its ep.
    """

    by_ep: tuple[ExpertRouting, ...]
    notes: tuple[str, ...]


def reached_routing(
    path: Path,
    model: ModelSpec,
    cluster: ClusterSpec,
    *,
    deduplicates_dispatch: bool,
    max_token_drop: float | None = None,
    sequence_length: int = 4096,
) -> ReachedRouting:
    """Return what a placement without copies reaches for every number of ranks that divides the experts.

    Training has no redundant slots: an expert's weights and gradients have one home. Balance is the objective where
    every (token, expert) pair travels; where a token goes once to each node, traffic is too, and it is returned.

    Parameters
    ----------
    path : Path
        Routing data as :func:`meshwright.planner.placement.routing_files.read_routing` takes it.
    model, cluster : ModelSpec, ClusterSpec
        A mixture-of-experts model and the machines.
    deduplicates_dispatch : bool
        Whether a token travels once to each node (:attr:`meshwright.costmodels.context.CostContext`).
    max_token_drop : float | None
        Share of the (token, expert) pairs that a capacity factor may drop; None wants no capacity.
    sequence_length : int
        Tokens that fill an expert's buffer together: those of a micro-batch of one sequence.

    Raises
    ------
    SpecError
        If the model has no experts, or the file is bad or of another model.
    """
    moe = model.moe
    if moe is None:
        raise SpecError(
            f"routing: model {model.name} has no experts; leave the routing data out, or choose a "
            "mixture-of-experts model"
        )
    routing = read_routing(path, moe.num_experts, moe_layer_indices(model), model.num_layers)
    reaches = [
        placement_reach(
            model,
            cluster,
            ep,
            routing=routing,
            dispatch="deduplicated" if deduplicates_dispatch else "full",
        )
        for ep in range(2, moe.num_experts + 1)
        if moe.num_experts % ep == 0
    ]
    by_ep = tuple(
        _entry(each, knows_traffic=deduplicates_dispatch and routing.num_tokens > 0) for each in reaches
    )
    sentences = [_sentence(path, by_ep, cluster.num_gpus)]
    if max_token_drop is not None:
        judge = split_held_out(sampled_routing(routing))[1] or routing
        drops = {each: capacity_drop(judge, moe.top_k, each, sequence_length) for each in _CAPACITY_FACTORS}
        by_ep, sentence = _with_capacities(drops, by_ep, max_token_drop, cluster.num_gpus)
        sentences.append(sentence)
    return ReachedRouting(by_ep=by_ep, notes=(*sentences, *routing.notes))


def _with_capacities(
    drops: Mapping[float, float], by_ep: Sequence[ExpertRouting], max_token_drop: float, num_gpus: int
) -> tuple[tuple[ExpertRouting, ...], str]:
    """Return the entries with the capacity factor of each ep on which one pays, and what to say of it.

    Every buffer is filled to its capacity: a rank computes the factor times the mean with it, its imbalance without.
    Experts keep one buffer each whatever ep, so that all share the smallest factor that drops few enough.
    """
    allowed = [factor for factor, drop in drops.items() if drop <= max_token_drop]
    if not allowed:
        least = max(drops)
        return tuple(by_ep), (
            f"Capacity: even a factor of {least:g} drops {drops[least]:.1%} of the tokens, more than the "
            f"{max_token_drop:.1%} allowed; none is planned with."
        )
    factor = min(allowed)
    entries = tuple(
        replace(each, capacity_factor=factor) if each.imbalance > factor else each for each in by_ep
    )
    gains = [str(each.ep) for each in entries if each.capacity_factor and each.ep <= num_gpus]
    where = f"on ep {', '.join(gains)}; planned with there" if gains else "nowhere; none is planned with"
    return entries, (
        f"Capacity: a factor of {factor:g} drops {drops[factor]:.1%} of the tokens and computes less than the "
        f"busiest rank does {where}."
    )


def _entry(reach: PlacementReach, *, knows_traffic: bool) -> ExpertRouting:
    return ExpertRouting(
        ep=reach.ep,
        imbalance=min(max(1.0, reach.imbalance), float(reach.ep)),
        remote_nodes_per_token=reach.remote_nodes_per_token if knows_traffic else None,
    )


def _sentence(path: Path, by_ep: Sequence[ExpertRouting], num_gpus: int) -> str:
    reached = ", ".join(f"{each.imbalance:.3g} (ep {each.ep})" for each in by_ep if each.ep <= num_gpus)
    return (
        f"Routing data {path.name}: the busiest expert rank gets {reached or 'all'} times the mean, as a placement of "
        "the experts without copies reaches; such a placement has to be made ('meshwright place')."
    )
