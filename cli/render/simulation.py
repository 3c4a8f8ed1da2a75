"""What ``simulate`` shows: the figures, where the time goes, the timeline, the memory."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from meshwright.cli.render.console import make_table, stdout_console
from meshwright.cli.render.contention import contention_mapping, print_contention
from meshwright.cli.render.jitter import jitter_mapping, print_jitter
from meshwright.cli.render.plans import FLOPS_WORDS, memory_table
from meshwright.costmodels.contention import ContentionOutcome
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.prediction import Prediction
from meshwright.planner.kinds_text import machines_text, placement_sentence
from meshwright.planner.plan_file import PlanDocument, prediction_mapping
from meshwright.planner.reasons import degrees_text
from meshwright.simcore.timeline import timeline_text
from meshwright.simcore.training.iteration import IterationResult, steady_state_period
from meshwright.simcore.training.jitter import JitterResult

__all__ = ["print_simulation", "simulation_mapping"]


def simulation_mapping(
    document: PlanDocument,
    context: CostContext,
    prediction: Prediction,
    jittered: JitterResult | None,
    contended: ContentionOutcome | None,
) -> dict[str, object]:
    """Return the simulation as plain data, with what jitter and contention do to it where that was asked."""
    mapping: dict[str, object] = {
        "kind": "training_simulation",
        "model": document.job.model.name,
        "cluster": document.job.cluster.id,
        "software": document.job.software,
        "calibration": dict(context.calibration_identity),
        "plan": asdict(document.plan),
        "prediction": prediction_mapping(prediction),
        "idle_seconds_all_stages": prediction.iteration.idle_time.totals(),
        "busy_seconds_per_stage": prediction.iteration.busy_time.tolist(),
    }
    if jittered is not None:
        mapping["jitter"] = jitter_mapping(jittered)
    if contended is not None:
        mapping["contention"] = contention_mapping(contended)
    return mapping


def print_simulation(
    document: PlanDocument,
    context: CostContext,
    prediction: Prediction,
    jittered: JitterResult | None,
    contended: ContentionOutcome | None,
    flops: str,
    written: list[str],
) -> None:
    """Print figures, time attribution, timeline, memory, and what jitter and contention do where that was asked."""
    console = stdout_console()
    result, job, plan = prediction.iteration, document.job, document.plan
    figures = make_table(
        f"{job.model.name} on {machines_text(job.cluster, plan)}: {degrees_text(plan)}, "
        f"{plan.schedule}, recompute {plan.recompute}, sharding {plan.sharding}",
        (("figure", False), ("value", True)),
    )
    figures.add_row("iteration time", f"{prediction.iteration_time:.4g} s")
    figures.add_row(f"80 % interval, {prediction.basis}", f"{prediction.low:.4g} to {prediction.high:.4g} s")
    figures.add_row("tokens/s/GPU", f"{prediction.tokens_per_second_per_gpu:,.0f}")
    figures.add_row(f"MFU ({FLOPS_WORDS[flops]})", f"{prediction.mfu:.1%}")
    figures.add_row("HFU", f"{prediction.hfu:.1%}")
    figures.add_row("bubble of the worst stage", f"{result.bubble_fraction:.1%}")
    period = steady_state_period(result.costs, result.schedule)
    figures.add_row("period of consecutive iterations without a barrier", f"{period:.4g} s")
    figures.add_row("exposed communication of the worst stage", f"{result.exposed_communication_time:.4g} s")
    if prediction.dollars_per_trillion_tokens is not None:
        figures.add_row("rent per trillion tokens", f"{prediction.dollars_per_trillion_tokens:,.0f} $")
    figures.add_row("energy, at most", f"{prediction.joules_per_token:.3g} J/token")
    console.print(figures)
    if job.cluster.is_mixed:
        console.print(placement_sentence(job, plan), soft_wrap=True)
    shown = result if contended is None else contended.iteration.result
    words = "Where the time goes" if contended is None else "Where the time goes, with contention"
    console.print(_attribution(words, shown))
    console.print(timeline_text(shown, width=min(console.width, 120)), markup=False)
    console.print(memory_table(prediction))
    fits = "fits" if prediction.memory_headroom >= 0 else "DOES NOT FIT"
    console.print(
        f"{fits}: {prediction.memory_headroom:.0%} of the usable memory stays free on the fullest rank "
        f"(stage {prediction.fullest_stage})."
    )
    if jittered is not None:
        print_jitter(console, jittered)
    if contended is not None:
        print_contention(console, contended)
    console.print(f"Calibration: {context.calibration_text}.", soft_wrap=True)
    for line in written:
        console.print(f"Wrote {line}", soft_wrap=True, markup=False)


def _attribution(title: str, result: IterationResult) -> Table:
    """Table of where the time of first, busiest and last stage goes."""
    stages = sorted({0, int(result.busy_time.argmax()), len(result.busy_time) - 1})
    table = make_table(title, (("", False), *((f"stage {stage}", True) for stage in stages)))
    table.add_row("busy", *(f"{result.busy_time[stage]:.4g} s" for stage in stages))
    for cause in result.idle_time.totals():
        values = getattr(result.idle_time, cause)
        if values.any():
            table.add_row(cause.replace("_", " "), *(f"{values[stage]:.4g} s" for stage in stages))
    return table
