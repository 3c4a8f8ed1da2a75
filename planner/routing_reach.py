"""What a training job's experts can come to on every number of ranks, from recorded routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meshwright.errors import SpecError
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.planner.placement.job import moe_layer_indices
from meshwright.planner.placement.layout import PlacementReach, placement_reach
from meshwright.planner.placement.routing_files import read_routing
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.workload import ExpertRouting

__all__ = ["ReachedRouting", "reached_routing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachedRouting:
    """Imbalance and traffic by number of ranks, and what a report says of them, one sentence each."""

    by_ep: tuple[ExpertRouting, ...]
    notes: tuple[str, ...]


def reached_routing(
    path: Path, model: ModelSpec, cluster: ClusterSpec, *, deduplicates_dispatch: bool
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
    return ReachedRouting(by_ep=by_ep, notes=(_sentence(path, by_ep, cluster.num_gpus), *routing.notes))


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
