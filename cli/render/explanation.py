"""What ``explain`` shows: terms, bars, memory, the sentences why, and the forced plan."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console

from meshwright.cli.render.console import stdout_console
from meshwright.cli.render.plans import FLOPS_WORDS, memory_table
from meshwright.cli.render.terms import (
    byte_cells,
    difference_table,
    memory_bar,
    second_cells,
    stage_bars,
    terms_table,
)
from meshwright.costmodels.prediction import Prediction
from meshwright.planner.difference import memory_differences, speed_sentence, term_differences
from meshwright.planner.explanation import Explanation, memory_reason, time_reason
from meshwright.planner.kinds_text import machines_text, placement_sentence, stages_by_kind
from meshwright.planner.plan_file import PlanDocument, prediction_mapping
from meshwright.planner.reasons import degrees_text
from meshwright.planner.whatif import Outcome
from meshwright.simcore.domain.layer_groups import layer_groups_text
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = [
    "explanation_mapping",
    "interval_sentence",
    "outcome_mapping",
    "plan_phrase",
    "print_explanation",
]


def explanation_mapping(
    document: PlanDocument, explanation: Explanation, variant: ParallelPlan | None, outcome: Outcome | None
) -> dict[str, object]:
    """Return the explanation as plain data, with the forced plan where one was asked for."""
    breakdown, context = explanation.breakdown, explanation.context
    mapping: dict[str, object] = {
        "kind": "training_explanation",
        "model": document.job.model.name,
        "cluster": document.job.cluster.id,
        "software": document.job.software,
        "calibration": dict(context.calibration_identity),
        "plan": asdict(document.plan),
        "prediction": prediction_mapping(explanation.prediction),
        "interval_widths": dict(explanation.prediction.interval_widths),
        "busiest_stage": breakdown.busiest_stage,
        "seconds_per_stage": [breakdown.stage(stage) for stage in range(breakdown.num_stages)],
        "time_reason": time_reason(explanation),
        "memory_reason": memory_reason(explanation),
    }
    if document.job.cluster.is_mixed:
        mapping["runs_on"] = stages_by_kind(document.job, document.plan)
    if variant is not None and outcome is not None:
        against: dict[str, object] = {"plan": asdict(variant), **outcome_mapping(outcome)}
        if outcome.explanation is not None:
            against["difference_seconds"] = {
                each.name: each.change for each in term_differences(explanation, outcome.explanation)
            }
            against["reason"] = speed_sentence(explanation, outcome.explanation, "the forced plan")
        mapping["against"] = against
    return mapping


def outcome_mapping(outcome: Outcome) -> dict[str, object]:
    """Return prediction and terms of an outcome, or the constraint in its way, as plain data."""
    if outcome.explanation is None:
        violation = outcome.violation
        return {
            "prediction": None,
            "violation": None if violation is None else asdict(violation),
            "advice": outcome.advice or None,
        }
    breakdown = outcome.explanation.breakdown
    return {
        "prediction": prediction_mapping(outcome.explanation.prediction),
        "busiest_stage": breakdown.busiest_stage,
        "seconds_of_busiest_stage": breakdown.stage(breakdown.busiest_stage),
        "violation": None,
        "advice": None,
    }


def print_explanation(
    document: PlanDocument,
    explanation: Explanation,
    variant: ParallelPlan | None,
    outcome: Outcome | None,
    flops: str,
) -> None:
    """Print the terms of every stage, the memory, the sentences why, and the forced plan where asked."""
    console = stdout_console()
    prediction, job = explanation.prediction, document.job
    console.print(
        f"{job.model.name} on {machines_text(job.cluster, document.plan)}: {plan_phrase(document.plan)}",
        style="bold",
        soft_wrap=True,
    )
    console.print(
        f"{prediction.iteration_time:.4g} s per iteration, "
        f"{prediction.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, MFU {prediction.mfu:.1%} ({FLOPS_WORDS[flops]}).",
        soft_wrap=True,
    )
    console.print(interval_sentence(prediction), soft_wrap=True)
    if job.cluster.is_mixed:
        console.print(placement_sentence(job, document.plan), soft_wrap=True)
    console.print(terms_table(explanation.breakdown))
    console.print(stage_bars(explanation.breakdown, console.width), soft_wrap=True)
    console.print(f"Why: {time_reason(explanation)}\n", soft_wrap=True)
    console.print(memory_table(prediction))
    console.print(memory_bar(prediction, console.width), soft_wrap=True)
    console.print(f"Memory: {memory_reason(explanation)}", soft_wrap=True)
    if variant is not None and outcome is not None:
        _print_variant(console, explanation, variant, outcome)
    console.print(f"Calibration: {explanation.context.calibration_text}.", soft_wrap=True)


def _print_variant(
    console: Console, explanation: Explanation, variant: ParallelPlan, outcome: Outcome
) -> None:
    console.print(f"\nAgainst {plan_phrase(variant)}:", style="bold", soft_wrap=True)
    if variant == explanation.plan:
        console.print("That is this plan.")
        return
    if outcome.explanation is None:
        reason = outcome.violation.text if outcome.violation is not None else outcome.advice
        console.print(f"It cannot run, {reason}.", soft_wrap=True)
        return
    times = term_differences(explanation, outcome.explanation)
    memory = memory_differences(explanation.prediction, outcome.explanation.prediction)
    names = ("this plan", "forced plan")
    console.print(difference_table("Time of the busiest stage", names, times, second_cells(times)))
    console.print(difference_table("Memory of the fullest stage", names, memory, byte_cells(memory)))
    console.print(
        f"Why: {speed_sentence(explanation, outcome.explanation, 'the forced plan')}", soft_wrap=True
    )


def plan_phrase(plan: ParallelPlan) -> str:
    """Return degrees and choices of a plan in one line."""
    modules = f" ({'+'.join(plan.recompute_modules)})" if plan.recompute_modules else ""
    group = f" in groups of {plan.sharding_group}" if plan.sharding_group else ""
    choices = [
        plan.schedule if plan.pp > 1 else "",
        f"micro-batch {plan.micro_batch_size}",
        "sequence parallel" if plan.sequence_parallel else "",
        f"recompute {plan.recompute}{modules}" if plan.recompute != "none" else "",
        f"sharding {plan.sharding}{group}" if plan.sharding != "none" else "",
        f"vocabulary {plan.vocab_parallel}" if plan.vocab_parallel != "none" else "",
        f"optimizer on {plan.optimizer_offload}" if plan.optimizer_offload != "none" else "",
        f"weights on {plan.parameter_offload}" if plan.parameter_offload != "none" else "",
        "activations offloaded" if plan.activation_offload else "",
        layer_groups_text(plan),
    ]
    return ", ".join([degrees_text(plan), *(choice for choice in choices if choice)])


def interval_sentence(prediction: Prediction) -> str:
    """Return the 80 % interval and what it rests on."""
    parts = sorted(prediction.interval_widths.items(), key=lambda item: -item[1])
    causes = ", ".join(f"{name} {width:.1%}" for name, width in parts)
    return (
        f"80 % interval: {prediction.low:.4g} to {prediction.high:.4g} s. It rests on: {prediction.basis}; "
        f"half-widths by cause, which add up in squares: {causes}."
    )
