"""What the modules of the planned transformer are built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from meshwright.profiler.executor.linear import WeightGradients
from meshwright.profiler.executor.mesh import RankMesh
from meshwright.profiler.executor.offload import HeldActivations
from meshwright.profiler.executor.weights import Role, WeightSource
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["BuildContext", "recomputed", "recomputed_modules"]

# What selective recompute repeats when the plan names nothing (Korthikanti et al. 2022, section 5).
_DEFAULT_MODULES = ("core_attn",)


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Run a function whose activations are dropped and recomputed in backward, collectives and all.

    Recomputing stops nowhere early: what is sent again is the same whatever happens to be saved.
    """
    with set_checkpoint_early_stop(False):
        result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


def recomputed_modules(plan: ParallelPlan) -> tuple[str, ...]:
    """Return the parts of a layer that selective recompute repeats; none without it."""
    if plan.recompute != "selective":
        return ()
    return plan.recompute_modules or _DEFAULT_MODULES


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildContext:
    """Everything a module needs to know.

    Parameters
    ----------
    model, plan : ModelSpec, ParallelPlan
        What is built and how it is laid out.
    mesh : RankMesh
        Groups of this rank.
    source : WeightSource
        Draws weights.
    gradients : WeightGradients
        Takes weight gradients that are put off.
    held : HeldActivations | None
        Takes what layers keep for backward to the host; None leaves it.
    is_served : bool
        Forward passes alone, in which all ranks that share experts see all their tokens.
    """

    model: ModelSpec
    plan: ParallelPlan
    mesh: RankMesh
    source: WeightSource
    gradients: WeightGradients
    held: HeldActivations | None = None
    is_served: bool = False

    @property
    def scattered_role(self) -> Role:
        """Role of a parameter that works on tokens outside the split products."""
        return Role(is_partial=self.plan.sequence_parallel)

    def recompute(self, module: str, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Run a part of a layer, recomputed if selective recompute names it."""
        if module in recomputed_modules(self.plan):
            return recomputed(function, *arguments)
        return function(*arguments)
