"""What is asked of a placement, and what is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from meshwright.errors import SpecError
from meshwright.planner.placement.certificates import Certificate
from meshwright.planner.placement.evaluation import Measures, ReplicaChoice
from meshwright.planner.placement.routing import RoutingData
from meshwright.planner.placement.token_groups import SpeculativeGrouping
from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = [
    "DISPATCHES",
    "OBJECTIVES",
    "SOLVERS",
    "Dispatch",
    "PlacementAnswer",
    "PlacementObjective",
    "PlacementRequest",
    "SolverName",
]

PlacementObjective = Literal["balance", "traffic", "joint", "active"]
Dispatch = Literal["deduplicated", "full", "coherent"]
SolverName = Literal["auto", "heuristic", "highs", "cbc"]
OBJECTIVES: tuple[str, ...] = get_args(PlacementObjective)
DISPATCHES: tuple[str, ...] = get_args(Dispatch)
SOLVERS: tuple[str, ...] = get_args(SolverName)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementRequest:
    """A placement problem.

    Parameters
    ----------
    routing : RoutingData
        What is known of the tokens.
    num_slots, num_ranks, ranks_per_node : int
        Slots of all ranks, expert parallel ranks, and those of a node.
    objective : PlacementObjective
        ``balance``: the heaviest rank; ``traffic``: what the dispatch sends between nodes or ranks; ``joint``:
        traffic under a cap on imbalance; ``active``: distinct active experts of the busiest rank (decode).
    dispatch : Dispatch
        ``deduplicated``: a token travels once to each node (DeepEP normal, HybridEP); ``full``: once per expert
        (DeepEP low latency, NCCL all-to-all); ``coherent``: tokens stay where their last expert was (ExFlow).
    num_groups, top_groups : int
        Group-limited routing of the model.
    top_k : int
        Experts of a token.
    imbalance_slack : float
        How far above EPLB's imbalance a joint placement may go; 0.01 is one point.
    held_out_share : float
        Share of the tokens, the last ones, that judge and do not solve.
    active_batch : int
        Tokens of a decode batch over all ranks.
    is_grouping_tokens : bool
        Tokens are handed to the home where their next experts are expected (Speculative-MoE, arXiv 2503.04398), and
        experts that are chosen together share one.
    has_copies_apart : bool
        A rank holds an expert once at most.
    current : ExpertPlacement | None
        Placement in use: ranks are named so that few experts move.
    expert_bytes : float
        Weights of one expert [B]; prices migration.
    solver : SolverName
        ``auto`` takes exact methods where they are quick; ``highs`` and ``cbc`` insist on one.
    seed : int
        Of every random choice.
    """

    routing: RoutingData
    num_slots: int
    num_ranks: int
    ranks_per_node: int
    objective: PlacementObjective = "joint"
    dispatch: Dispatch = "deduplicated"
    num_groups: int = 1
    top_groups: int = 1
    top_k: int = 1
    imbalance_slack: float = 0.0125
    held_out_share: float = 0.5
    active_batch: int = 128
    is_grouping_tokens: bool = False
    has_copies_apart: bool = False
    current: ExpertPlacement | None = None
    expert_bytes: float = 0.0
    solver: SolverName = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        experts, slots, ranks = self.routing.num_experts, self.num_slots, self.num_ranks
        if ranks < 1 or self.ranks_per_node < 1 or ranks % self.ranks_per_node:
            raise SpecError(f"placement: {ranks} ranks do not divide into nodes of {self.ranks_per_node}")
        if slots < experts:
            raise SpecError(f"placement: {slots} slots cannot hold {experts} experts; add redundant experts")
        if slots % ranks:
            more = -slots % ranks
            raise SpecError(
                f"placement: {slots} slots ({experts} experts + {slots - experts} redundant) do not divide by {ranks} "
                f"ranks; the next redundant experts that do are {slots - experts + more}"
            )
        if slots > experts * ranks:
            raise SpecError(
                f"placement: {slots} slots are more than one copy of each of {experts} experts on {ranks} ranks"
            )
        if not 0.0 <= self.held_out_share < 1.0:
            raise SpecError(f"placement: the held-out share is 0 to below 1, not {self.held_out_share:g}")
        if not 0.0 <= self.imbalance_slack <= 10.0:
            raise SpecError(f"placement: the imbalance slack is 0 to 10, not {self.imbalance_slack:g}")

    @property
    def num_nodes(self) -> int:
        """Nodes the ranks fill."""
        return self.num_ranks // self.ranks_per_node

    @property
    def ranks_per_home(self) -> int:
        """Ranks among which a token costs nothing to move: those of a node, or one where all share a node."""
        return self.ranks_per_node if self.num_nodes > 1 else 1

    @property
    def choice(self) -> ReplicaChoice:
        """How tokens choose among copies: near ones where the dispatch pays for nodes, else any."""
        pays = self.dispatch == "deduplicated" or self.is_grouping_tokens
        return "nearest" if pays and self.objective in ("traffic", "joint") else "random"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementAnswer:
    """A placement with everything that speaks for and against it.

    Parameters
    ----------
    placement, baseline : ExpertPlacement
        Ours, and EPLB's for the same slots.
    method : str
        How the placement was found.
    solved, baseline_solved : Measures
        Of both on the tokens they were solved with.
    held_out, baseline_held_out : Measures | None
        Of both on the tokens kept back; None when there are none.
    baseline_nearest : Measures | None
        EPLB's placement where tokens take the nearest copy as they do with ours, on the tokens that judge; None
        where ours does not ask for that.
    certificates : tuple[Certificate, ...]
        What is reached and what cannot be beaten, on the tokens solved with.
    warnings : tuple[str, ...]
        What forbids or limits a claim, one sentence each.
    moved_slots : int | None
        Slots to be filled anew, coming from the current placement.
    grouping : SpeculativeGrouping | None
        What grouping the tokens that judge comes to; None where it was not asked for.
    """

    placement: ExpertPlacement
    baseline: ExpertPlacement
    method: str
    solved: Measures
    baseline_solved: Measures
    held_out: Measures | None
    baseline_held_out: Measures | None
    baseline_nearest: Measures | None
    certificates: tuple[Certificate, ...]
    warnings: tuple[str, ...]
    moved_slots: int | None = None
    grouping: SpeculativeGrouping | None = None
