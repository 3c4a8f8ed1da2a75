"""Why an iteration takes as long as it does: its terms, and the sentence that names the largest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meshwright.costmodels.breakdown import Breakdown, iteration_breakdown
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.flops import FlopsConvention
from meshwright.costmodels.prediction import Prediction, predict
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.workload import TrainingWorkload
from meshwright.units import format_quantity

__all__ = ["Explanation", "explain_plan", "memory_reason", "time_reason"]

# Work that every plan has to do somewhere; all else is a loss that a plan may avoid.
_USEFUL = ("compute", "embedding and head")
# Losses below this share of the iteration are not worth a clause.
_SMALLEST_SHARE = 0.01
_MOST_CLAUSES = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Explanation:
    """A plan under one context, its prediction and where its time goes."""

    context: CostContext
    plan: ParallelPlan
    prediction: Prediction
    breakdown: Breakdown


def explain_plan(context: CostContext, plan: ParallelPlan, flops: FlopsConvention = "causal") -> Explanation:
    """Return the prediction of a plan with its terms.

    Raises
    ------
    SpecError
        If the batch does not divide or the schedule cannot run the plan.
    """
    prediction = predict(context, plan, flops)
    breakdown = iteration_breakdown(context, plan, prediction.iteration)
    return Explanation(context=context, plan=plan, prediction=prediction, breakdown=breakdown)


def time_reason(explanation: Explanation) -> str:
    """Return one sentence: how much of the critical stage's time is work, and what the largest losses are made of."""
    breakdown = explanation.breakdown
    groups = breakdown.grouped(breakdown.busiest_stage)
    seconds = breakdown.iteration_time
    useful = sum(groups[name] for name in _USEFUL) / seconds
    losses = sorted(
        (name for name in groups if name not in _USEFUL and groups[name] >= _SMALLEST_SHARE * seconds),
        key=lambda name: -groups[name],
    )[:_MOST_CLAUSES]
    where = (
        "one stage"
        if breakdown.num_stages == 1
        else f"stage {breakdown.busiest_stage}, the busiest of {breakdown.num_stages},"
    )
    start = f"{where} computes the model for {useful:.1%} of {seconds:.4g} s"
    if not losses:
        return f"{start}; no other term takes {_SMALLEST_SHARE:.0%}."
    clauses = [f"{name} {groups[name] / seconds:.1%} ({_CAUSES[name](explanation)})" for name in losses]
    return f"{start}; the largest losses are {'; '.join(clauses)}."


def memory_reason(explanation: Explanation) -> str:
    """Return one sentence: how full the fullest stage is, and what fills it most."""
    prediction = explanation.prediction
    uses = prediction.memory.row(prediction.fullest_stage)
    largest = max(uses, key=lambda name: uses[name])
    needed, usable = prediction.peak_memory_bytes, prediction.usable_memory_bytes
    fits = (
        f"{prediction.memory_headroom:.1%} stay free"
        if needed <= usable
        else f"DOES NOT FIT, {format_quantity(needed - usable, 'bytes', 3)} too much"
    )
    return (
        f"stage {prediction.fullest_stage} is the fullest with {format_quantity(needed, 'bytes', 4)} of "
        f"{format_quantity(usable, 'bytes', 4)}: {fits}; {largest.replace('_', ' ')} take the most, "
        f"{format_quantity(uses[largest], 'bytes', 3)}."
    )


def _activation_bytes(explanation: Explanation) -> str:
    """Return the hidden activations of one micro-batch on one rank, as text."""
    context, plan = explanation.context, explanation.plan
    tokens = plan.micro_batch_size * context.workload.sequence_length / plan.cp
    return format_quantity(context.element_bytes * tokens * context.model.hidden_size, "bytes", 3)


def _num_micro_batches(workload: TrainingWorkload, plan: ParallelPlan) -> int:
    return plan.num_micro_batches(workload.global_batch_size)


def _recompute(explanation: Explanation) -> str:
    plan = explanation.plan
    if plan.recompute == "selective":
        return "selective: " + (" and ".join(plan.recompute_modules) or "the software's own choice")
    if plan.recompute_layers is None:
        return "every layer runs forward twice"
    return f"{plan.recompute_layers} layers of each virtual stage run forward twice"


def _tensor_parallel(explanation: Explanation) -> str:
    return (
        f"every layer exchanges its {_activation_bytes(explanation)} of activations over "
        f"{explanation.plan.tp} ranks"
    )


def _context_parallel(explanation: Explanation) -> str:
    plan = explanation.plan
    return f"{plan.cp_method} attention over {plan.cp} ranks"


def _expert_parallel(explanation: Explanation) -> str:
    plan, moe = explanation.plan, explanation.context.model.moe
    copies = f"each token to {moe.top_k} experts" if moe is not None else "tokens"
    return f"{copies} over {plan.ep} ranks"


def _data_parallel(explanation: Explanation) -> str:
    plan, breakdown = explanation.plan, explanation.breakdown
    terms = breakdown.stage(breakdown.busiest_stage)
    ranks = plan.dp * plan.cp
    if terms["sharded_data_parallel"] > terms["gradient_reduce"] + terms["parameter_gather"]:
        return (
            f"{plan.sharding} gathers weights and reduces gradients over {ranks} ranks on every micro-batch"
        )
    parts = [
        f"{format_quantity(terms[name], 'seconds', 3)} {words}"
        for name, words in (
            ("gradient_reduce", "to reduce gradients"),
            ("parameter_gather", "to gather weights"),
        )
        if terms[name] > 0.0
    ]
    return f"{' and '.join(parts)} over {ranks} ranks"


def _offload(explanation: Explanation) -> str:
    return "stored activations or weights travel to host memory and back"


def _sends(explanation: Explanation) -> str:
    plan = explanation.plan
    count = _num_micro_batches(explanation.context.workload, plan)
    return f"{count} micro-batches each way through {plan.pp * plan.vpp} virtual stages, in front of compute"


def _bubble(explanation: Explanation) -> str:
    plan, breakdown = explanation.plan, explanation.breakdown
    terms = breakdown.stage(breakdown.busiest_stage)
    causes = ("warm_up", "activation_wait", "gradient_wait", "cool_down", "optimizer_barrier")
    largest = max(causes, key=lambda name: terms[name])
    count = _num_micro_batches(explanation.context.workload, plan)
    return f"most of it {largest.replace('_', ' ')}; {plan.pp} stages share {count} micro-batches"


def _optimizer(explanation: Explanation) -> str:
    plan = explanation.plan
    shares = f"states shared by {plan.dp * plan.cp} ranks" if plan.sharding != "none" else "states not shared"
    return f"{shares}, sharding {plan.sharding}"


def _fixed(explanation: Explanation) -> str:
    return f"once per iteration in {explanation.context.software.id}"


_CAUSES: Mapping[str, Callable[[Explanation], str]] = {
    "recompute": _recompute,
    "tensor parallel": _tensor_parallel,
    "context parallel": _context_parallel,
    "expert parallel": _expert_parallel,
    "data parallel": _data_parallel,
    "offload": _offload,
    "pipeline sends": _sends,
    "pipeline bubble": _bubble,
    "optimizer": _optimizer,
    "fixed": _fixed,
}
