"""Why the winner wins, in a sentence a user can check against the table."""

from __future__ import annotations

from meshwright.planner.objectives import Objective
from meshwright.planner.search.base import RankedPlan, SearchResult
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["degrees_text", "winning_reason"]


def degrees_text(plan: ParallelPlan) -> str:
    """Return the degrees of a plan in one short phrase.

    Degrees of 1 are left out. The tp of a layer-wise plan are those of its groups.
    """
    if plan.layer_groups:
        tp = "/".join(str(degree) for degree in sorted({group.tp for group in plan.layer_groups}))
        stages = f" x pp {plan.pp}" if plan.pp > 1 else ""
        return f"layer-wise tp {tp}{stages} on {plan.num_gpus} GPUs"
    parts = [
        f"{axis} {getattr(plan, axis)}"
        for axis in ("tp", "pp", "vpp", "cp", "dp", "ep", "etp")
        if getattr(plan, axis) > 1
    ]
    return " x ".join(parts) or "one GPU"


def winning_reason(result: SearchResult, objective: Objective = "throughput") -> str:
    """Return one or two sentences: what the winner does better than the best plan with other degrees."""
    winner = result.ranked[0]
    rival = result.rival
    certificate = (
        "no other plan of the space can beat it: the bound of every plan not simulated is above its time"
        if result.is_certified
        else f"plans beyond the {result.num_simulated} simulated have lower bounds, so the optimum is not certified"
    )
    if rival is None:
        return f"{degrees_text(winner.plan)} is the only combination of degrees among the plans simulated; {certificate}."
    gain = _value(rival, objective) / _value(winner, objective) - 1.0
    better = "faster" if objective == "throughput" else "cheaper in GPU time"
    others = "uniform plan" if winner.plan.layer_groups else "plan with other degrees"
    margin = f"is {gain:.1%} {better} than" if gain >= 0.0005 else "ties with"
    return (
        f"{degrees_text(winner.plan)} {margin} the best {others} "
        f"({degrees_text(rival.plan)}): {_difference(winner, rival, objective)}; {certificate}."
    )


def _value(ranked: RankedPlan, objective: Objective) -> float:
    """Return what the objective minimises: seconds, or GPU-seconds for cost and energy."""
    return ranked.seconds * _weight(ranked, objective)


def _weight(ranked: RankedPlan, objective: Objective) -> float:
    return 1.0 if objective == "throughput" else float(ranked.plan.num_gpus)


def _difference(winner: RankedPlan, rival: RankedPlan, objective: Objective) -> str:
    """Name the parts of the rival's iteration that grow most and what the winner pays for it."""
    unit = "s" if objective == "throughput" else "GPU-s"
    mine, other = _weight(winner, objective), _weight(rival, objective)
    gaps = {name: _parts(rival)[name] * other - part * mine for name, part in _parts(winner).items()}
    threshold = 0.002 * _value(winner, objective)
    less = sorted((name for name in gaps if gaps[name] > threshold), key=lambda name: -gaps[name])[:2]
    more = sorted((name for name in gaps if -gaps[name] > threshold), key=lambda name: gaps[name])[:2]
    said = (
        " and ".join(f"{gaps[name]:.2g} {unit} less {name}" for name in less) or "every part is within 0.2 %"
    )
    if more:
        said += ", for " + " and ".join(f"{-gaps[name]:.2g} {unit} more {name}" for name in more)
    return said


def _parts(ranked: RankedPlan) -> dict[str, float]:
    """Split the busiest stage's iteration into compute, exposed communication, waiting for others and contention [s]."""
    result = ranked.prediction.iteration
    stage = int(result.busy_time.argmax())
    idle = result.idle_time
    communication = float(result.stage_exposed_communication_time[stage])
    waits = (idle.warm_up, idle.activation_wait, idle.gradient_wait, idle.cool_down, idle.optimizer_barrier)
    bubble = float(sum(wait[stage] for wait in waits))
    compute = result.iteration_time - communication - bubble - float(idle.fixed[stage])
    return {
        "compute": compute,
        "exposed communication": communication,
        "pipeline bubble": bubble,
        "contention": ranked.seconds - ranked.prediction.iteration_time,
    }
