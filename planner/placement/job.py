"""A placement as users ask for it: names, files and flags turned into a request."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.planner.placement.engines import ENGINES, Engine, read_placement
from meshwright.planner.placement.formats.tables import LayerTable
from meshwright.planner.placement.request import (
    DISPATCHES,
    OBJECTIVES,
    SOLVERS,
    Dispatch,
    PlacementObjective,
    PlacementRequest,
    SolverName,
)
from meshwright.planner.placement.routing import RoutingData
from meshwright.planner.placement.routing_files import read_loads, read_routing
from meshwright.planner.placement.synthetic import SyntheticRouting, draw_routing
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.model_catalog import load_model

__all__ = ["PlacementFlags", "PlacementJob", "moe_layer_indices", "read_placement_job", "with_layout"]

_STRONG = SyntheticRouting(topic_strength=3.0, persistence=0.9)
# Weights of experts rest in 16 bits unless the user knows better; only migration is priced with it.
_WEIGHT_BYTES = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementFlags:
    """What the user said; see ``meshwright place --help``. When choosing, ranks and slots are only where it starts."""

    model: str
    cluster: str
    routing: Path | None = None
    loads: Path | None = None
    synthetic: str | None = None
    synthetic_tokens: int = 16_384
    ep: int | None = None
    redundant_experts: int | None = None
    is_choosing: bool = False
    engine: str = "sglang"
    objective: str | None = None
    dispatch: str | None = None
    current: Path | None = None
    imbalance_slack: float = 0.0125
    active_batch: int = 128
    is_grouping_tokens: bool = False
    solver: str = "auto"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementJob:
    """The request, and the model, machines and engine it is for."""

    model: ModelSpec
    cluster: ClusterSpec
    engine: Engine
    table: LayerTable
    request: PlacementRequest


def moe_layer_indices(model: ModelSpec) -> tuple[int, ...]:
    """Return the index of each mixture-of-experts layer in the model."""
    moe = model.moe
    return () if moe is None else tuple(range(moe.num_dense_layers, model.num_layers, moe.layer_frequency))


def read_placement_job(flags: PlacementFlags) -> PlacementJob:
    """Return the job the flags describe, its routing data read and checked.

    Raises
    ------
    SpecError
        If a name is unknown, a file is bad, or the experts do not fit the ranks: what, where and how to fix it.
    """
    model, cluster = load_model(flags.model), resolve_cluster(flags.cluster)
    cluster.require_one_kind("place")
    moe = model.moe
    if moe is None:
        raise SpecError(f"model {model.name} has no experts; only mixture-of-experts models have a placement")
    engine = ENGINES[_known("--engine", flags.engine, ENGINES)]
    dispatch = _known("--dispatch", flags.dispatch or engine.dispatch, DISPATCHES)
    solver = _known("--solver", flags.solver, SOLVERS)
    num_ranks = flags.ep or cluster.num_gpus
    if num_ranks > cluster.num_gpus:
        raise SpecError(f"--ep {num_ranks} is more than the {cluster.num_gpus} GPUs of {cluster.id}")
    ranks_per_node = min(num_ranks, cluster.node.num_gpus)
    if num_ranks % ranks_per_node:
        raise SpecError(f"--ep {num_ranks} does not fill whole nodes of {ranks_per_node} GPUs")
    redundant = flags.redundant_experts or 0
    if flags.is_choosing and flags.redundant_experts is None:
        redundant = -moe.num_experts % num_ranks
    _check_slots(moe.num_experts, redundant, num_ranks)
    layers = moe_layer_indices(model)
    current = None
    table = LayerTable(
        num_model_layers=model.num_layers,
        moe_layers=layers,
        num_experts=moe.num_experts,
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
    )
    if flags.current is not None:
        current = read_placement(_read_text(flags.current), table, str(flags.current))
    routing = _routing(flags, model, layers)
    objective = flags.objective or _usual_objective(dispatch, routing, groups=flags.is_grouping_tokens)
    request = PlacementRequest(
        routing=routing,
        num_slots=moe.num_experts + redundant,
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        objective=cast("PlacementObjective", _known("--objective", objective, OBJECTIVES)),
        dispatch=cast("Dispatch", dispatch),
        num_groups=moe.num_expert_groups,
        top_groups=moe.top_k_groups,
        top_k=moe.top_k,
        imbalance_slack=flags.imbalance_slack,
        active_batch=flags.active_batch,
        is_grouping_tokens=flags.is_grouping_tokens,
        has_copies_apart=engine.has_copies_apart,
        current=current,
        expert_bytes=_WEIGHT_BYTES * model.num_expert_parameters,
        solver=cast("SolverName", solver),
        seed=flags.seed,
    )
    return PlacementJob(model=model, cluster=cluster, engine=engine, table=table, request=request)


def with_layout(
    job: PlacementJob, num_ranks: int, redundant_experts: int, routing: RoutingData
) -> PlacementJob:
    """Return the job on other numbers of ranks and slots, with routing data of the same layers or of some of them.

    A placement in use does not carry over to other ranks.
    """
    moe = job.model.moe
    assert moe is not None
    ranks_per_node = min(num_ranks, job.cluster.node.num_gpus)
    request = replace(
        job.request,
        routing=routing,
        num_slots=moe.num_experts + redundant_experts,
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        current=job.request.current if num_ranks == job.request.num_ranks else None,
    )
    table = replace(job.table, num_ranks=num_ranks, ranks_per_node=ranks_per_node)
    return replace(job, request=request, table=table)


def _known(flag: str, name: str, known: Collection[str]) -> str:
    if name not in known:
        guess = did_you_mean(name[:60], known) or "."
        raise SpecError(f"{flag}: unknown word '{name[:60]}'{guess} Known: {', '.join(known)}.")
    return name


def _check_slots(num_experts: int, redundant: int, num_ranks: int) -> None:
    """Raise before any file is read when the slots cannot be shared out."""
    if (num_experts + redundant) % num_ranks:
        more = -(num_experts + redundant) % num_ranks
        raise SpecError(
            f"{num_experts} experts and {redundant} redundant ones do not divide by {num_ranks} ranks; the next "
            f"number that does is --redundant-experts {redundant + more}"
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError):
        raise SpecError(f"{path}: cannot be read as UTF-8 text") from None


def _routing(flags: PlacementFlags, model: ModelSpec, layers: tuple[int, ...]) -> RoutingData:
    moe = model.moe
    assert moe is not None
    given = [flags.routing is not None, flags.loads is not None, flags.synthetic is not None]
    if sum(given) != 1:
        raise SpecError("give one of --routing FILE, --loads FILE, --synthetic weak|strong")
    if flags.routing is not None:
        return read_routing(flags.routing, moe.num_experts, layers, model.num_layers)
    if flags.loads is not None:
        return read_loads(flags.loads, moe.num_experts, layers, model.num_layers)
    return draw_routing(
        len(layers),
        moe.num_experts,
        moe.top_k,
        flags.synthetic_tokens,
        flags.seed,
        _STRONG if flags.synthetic == "strong" else None,
        moe.num_expert_groups,
        moe.top_k_groups,
    )


def _usual_objective(dispatch: str, routing: RoutingData, *, groups: bool) -> str:
    """Return what dispatch and data allow: joint where traffic is known and depends on the placement."""
    if groups or (dispatch == "deduplicated" and routing.tokens is not None):
        return "joint"
    if dispatch == "coherent" and (routing.tokens is not None or routing.transitions is not None):
        return "joint"
    return "balance"
