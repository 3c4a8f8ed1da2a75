"""Layer-wise plans: groups of consecutive layers of one pipeline stage that run under a strategy of their own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal, get_args

from meshwright.errors import SpecError, did_you_mean

if TYPE_CHECKING:
    from meshwright.simcore.domain.plan import ParallelPlan

__all__ = [
    "GROUP_RECOMPUTES",
    "GROUP_SHARDINGS",
    "GroupRecompute",
    "GroupSharding",
    "LayerGroup",
    "check_layer_groups",
    "groups_by_stage",
    "layer_groups_text",
    "uniform_plan",
]

GroupSharding = Literal["none", "zero1", "zero2", "zero3"]
GroupRecompute = Literal["none", "selective", "full"]
GROUP_SHARDINGS: tuple[str, ...] = get_args(GroupSharding)
GROUP_RECOMPUTES: tuple[str, ...] = get_args(GroupRecompute)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Consecutive layers that share a strategy.

    The ranks of a stage, ``tp * cp * dp`` of the plan, are the same for all its groups; a group with another tp
    has another dp. The sequences that all replicas of a stage run at once, ``dp * micro_batch_size`` of the plan,
    are fixed too: a group's replica takes ``dp * micro_batch_size / group's dp`` of them.

    Parameters
    ----------
    num_layers : int
        Transformer layers of the group.
    tp : int
        Tensor parallel ranks; divides the ranks of the stage over cp.
    sequence_parallel : bool
        Megatron SP in these layers. Needs tp > 1.
    sharding : GroupSharding
        What data parallel ranks share of these layers' states.
    recompute : GroupRecompute
        What these layers recompute.
    recompute_modules : tuple[str, ...]
        What selective recomputes; empty is the software's own choice.
    """

    num_layers: int
    tp: int = 1
    sequence_parallel: bool = False
    sharding: GroupSharding = "none"
    recompute: GroupRecompute = "none"
    recompute_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_layers", "tp"):
            if getattr(self, name) < 1:
                raise SpecError(f"plan.layer_groups: {name} must be at least 1, not {getattr(self, name)}")
        for name, known in (("sharding", GROUP_SHARDINGS), ("recompute", GROUP_RECOMPUTES)):
            value = getattr(self, name)
            if value not in known:
                raise SpecError(
                    f"plan.layer_groups: {name}: unknown value '{value}'{did_you_mean(value, known) or '.'} "
                    f"Known: {', '.join(known)}."
                )
        if self.sequence_parallel and self.tp == 1:
            raise SpecError("plan.layer_groups: sequence_parallel needs tp > 1 (it splits over those ranks)")

    @property
    def text(self) -> str:
        """The group in a few words, such as ``20 x tp 4 sp zero1 none``."""
        sequence = " sp" if self.sequence_parallel else ""
        modules = f"({'+'.join(self.recompute_modules)})" if self.recompute_modules else ""
        return f"{self.num_layers} x tp {self.tp}{sequence} {self.sharding} {self.recompute}{modules}"


def groups_by_stage(plan: ParallelPlan) -> tuple[tuple[LayerGroup, ...], ...]:
    """Return the groups of each pipeline stage; empty tuples for a plan without groups.

    Raises
    ------
    SpecError
        If a group crosses the end of a stage, or the groups do not hold exactly the plan's layers.
    """
    if not plan.layer_groups:
        return ((),) * plan.pp
    remaining = list(plan.layer_groups)
    stages = []
    for stage, num_layers in enumerate(plan.layers_per_stage):
        held: list[LayerGroup] = []
        while remaining and sum(group.num_layers for group in held) < num_layers:
            held.append(remaining.pop(0))
        total = sum(group.num_layers for group in held)
        if total != num_layers:
            raise SpecError(
                f"plan.layer_groups: stage {stage} holds {num_layers} layers, but groups end after {total} of them: "
                "let a group end with every stage"
            )
        stages.append(tuple(held))
    if remaining:
        raise SpecError(
            f"plan.layer_groups hold {sum(group.num_layers for group in plan.layer_groups)} layers, but "
            f"layers_per_stage adds up to {plan.num_layers}"
        )
    return tuple(stages)


def check_layer_groups(plan: ParallelPlan) -> None:
    """Check the groups of a plan against its stages, ranks and micro-batch; a plan without groups passes.

    Raises
    ------
    SpecError
        Names the group and what does not fit.
    """
    if not plan.layer_groups:
        return
    if plan.vpp > 1 or plan.vocab_parallel != "none":
        raise SpecError(
            "plan.layer_groups go with vpp 1 and vocab_parallel none, not with "
            f"vpp {plan.vpp} and vocab_parallel {plan.vocab_parallel}"
        )
    if plan.recompute_layers is not None or plan.recompute_modules:
        raise SpecError(
            "plan.layer_groups state the recompute of their layers: leave out recompute_layers and recompute_modules"
        )
    if plan.optimizer_offload != "none" or plan.parameter_offload != "none" or plan.activation_offload:
        raise SpecError(
            "plan.layer_groups go without offload: set optimizer, parameter and activation offload to none"
        )
    if plan.schedule not in ("none", "gpipe", "1f1b"):
        raise SpecError(f"plan.layer_groups go with schedule none, gpipe or 1f1b, not with {plan.schedule}")
    groups_by_stage(plan)
    ranks, sequences = plan.tp * plan.dp, plan.dp * plan.micro_batch_size
    for group in plan.layer_groups:
        if ranks % group.tp:
            raise SpecError(
                f"plan.layer_groups: tp {group.tp} does not divide the {ranks} ranks of a stage (tp x dp)"
            )
        replicas = ranks // group.tp
        if sequences % replicas:
            raise SpecError(
                f"plan.layer_groups: tp {group.tp} makes {replicas} replicas, which do not share the {sequences} "
                "sequences of dp x micro_batch_size evenly"
            )
        # Whatever else does not go together does not in a uniform plan either.
        uniform_plan(plan, group)


def uniform_plan(plan: ParallelPlan, group: LayerGroup) -> ParallelPlan:
    """Return the plan whose layers, embedding and head all run as the group does, on the same ranks and sequences.

    Raises
    ------
    SpecError
        If the group does not fit the ranks and the micro-batch of the plan.
    """
    dp = plan.tp * plan.dp // group.tp
    return dataclasses.replace(
        plan,
        tp=group.tp,
        dp=dp,
        micro_batch_size=plan.dp * plan.micro_batch_size // dp,
        sequence_parallel=group.sequence_parallel,
        sharding=group.sharding,
        sharding_group=None,
        secondary_group=None,
        recompute=group.recompute,
        recompute_modules=group.recompute_modules,
        recompute_layers=None,
        layer_groups=(),
    )


def layer_groups_text(plan: ParallelPlan) -> str:
    """Return the groups of a plan in words, equal neighbouring stages together; empty without groups."""
    if not plan.layer_groups:
        return ""
    words = [" + ".join(group.text for group in groups) or "no layers" for groups in groups_by_stage(plan)]
    if plan.pp == 1:
        return words[0]
    parts = []
    first = 0
    for text, run in groupby(words):
        last = first + len(list(run)) - 1
        stages = f"stage {first}" if last == first else f"stages {first}-{last}"
        parts.append(f"{stages}: {text}")
        first = last + 1
    return "; ".join(parts)
