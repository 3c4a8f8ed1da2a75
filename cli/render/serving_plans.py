"""What ``plan`` shows and writes for a serving job: the ranked table, the front, what binds, plan files and report."""

from __future__ import annotations

import json
import math
from pathlib import Path

from rich.table import Table

from meshwright.cli.render.console import make_table, stdout_console
from meshwright.cli.render.serving_plan_table import load_text, plan_text, plans_table
from meshwright.planner.output_file import check_replaceable, is_our_json, is_our_yaml, replace_file
from meshwright.planner.serving.answer import ServingAnswer, plan_figures
from meshwright.planner.serving.infeasible import option_text
from meshwright.planner.serving.pareto import FrontPoint
from meshwright.planner.serving.plan_file import ServingPlanDocument, serving_plan_mapping, serving_plan_text
from meshwright.planner.serving.request_lengths import longest_request
from meshwright.planner.serving.search import is_closed_loop
from meshwright.planner.serving.target import target_sentence
from meshwright.planner.serving.workload_section import slo_mapping, workload_mapping
from meshwright.units import format_quantity

__all__ = [
    "failed_note",
    "print_serving_report",
    "serving_report_mapping",
    "write_serving_plans",
]

_OBJECTIVES = {
    "goodput_per_gpu": "output tokens/s/GPU within the limits",
    "cost": "fewest GPUs for the stated load",
    "throughput": "output tokens/s of the cluster within the limits",
}


def serving_report_mapping(answer: ServingAnswer, num_plans: int) -> dict[str, object]:
    """Return the report as plain data: what was asked, counts, ranking with figures, front, certainty."""
    request, outcome = answer.request, answer.outcome
    winner = outcome.ranked[0]
    return {
        "schema_version": 1,
        "written_by": "meshwright",
        "kind": "serving_report",
        **_asked_mapping(answer),
        **answer.costs.calibration_identities(winner.plan),
        "constants": list(answer.costs.certainty_notes(winner.plan)),
        "bounds_seconds": answer.bounds_seconds,
        "search_seconds": answer.seconds,
        "num_candidates": outcome.space.num_candidates,
        "num_within_limits": len(outcome.units),
        "num_simulated": outcome.num_simulated,
        "num_runs": outcome.num_runs,
        "is_certified": outcome.is_certified,
        "highest_unsimulated_bound": _finite(outcome.highest_unsimulated),
        "is_separated": outcome.is_separated,
        "rejections": _rejections(answer),
        **({"target": request.limits.target} if request.limits.target is not None else {}),
        **({"target_refusals": dict(outcome.units.refused)} if outcome.units.refused else {}),
        "binding": dict(outcome.binding),
        "plans": [
            {"plan": serving_plan_mapping(ranked.plan), "prediction": dict(plan_figures(answer, ranked))}
            for ranked in outcome.ranked[:num_plans]
        ],
        "pareto_front": [_front_mapping(point) for point in answer.front],
    }


def _asked_mapping(answer: ServingAnswer) -> dict[str, object]:
    """Return what was asked, its load, and the fewest GPUs that carry it."""
    request, cheapest = answer.request, answer.outcome.cheapest
    job = request.job
    return {
        "model": job.model.name,
        "cluster": job.cluster.id,
        **({} if job.prefill_cluster is None else {"prefill_cluster": job.prefill_cluster.id}),
        "num_gpus": answer.sizing.total_gpus,
        "objective": request.objective,
        "workload": workload_mapping(job.workload),
        "slo": slo_mapping(job.slo),
        "mean_input_tokens": answer.profile.mean_prompt,
        "mean_output_tokens": answer.profile.mean_output,
        "stated_load": answer.sizing.demand,
        "num_failed_requests_left_out": answer.num_failed,
        **(
            {}
            if cheapest is None
            else {
                "cheapest": {
                    "num_gpus": cheapest.plan.num_gpus,
                    "plan": serving_plan_mapping(cheapest.plan),
                }
            }
        ),
    }


def _front_mapping(point: FrontPoint) -> dict[str, object]:
    return {
        "tokens_per_second_per_user": point.tokens_per_second_per_user,
        "output_tokens_per_second_per_gpu": point.tokens_per_second_per_gpu,
        "ttft_seconds": point.ttft,
        "mode": point.mode,
        "engine": point.option.engine,
        "precision": point.option.precision,
        "degrees": dict(point.option.degrees),
        "num_speculative_tokens": point.option.num_speculative_tokens,
        "sequences_per_rank": point.num_decodes,
    }


def write_serving_plans(
    out: Path, answer: ServingAnswer, report: dict[str, object], num_plans: int, *, force: bool
) -> int:
    """Write ``1.yaml`` ... and ``report.json``; nothing is written when a file of somebody else's is in the way.

    Returns
    -------
    int
        Plans written.
    """
    request = answer.request
    texts = {
        out / f"{place}.yaml": serving_plan_text(
            ServingPlanDocument(job=request.job, plan=ranked.plan, origin=request.origin),
            plan_figures(answer, ranked),
            answer.costs.calibration_identities(ranked.plan),
            answer.costs.certainty_notes(ranked.plan),
        ).encode()
        for place, ranked in enumerate(answer.outcome.ranked[:num_plans], start=1)
    }
    for path in texts:
        check_replaceable(path, force=force, is_ours=is_our_yaml)
    check_replaceable(out / "report.json", force=force, is_ours=is_our_json)
    for path, content in texts.items():
        replace_file(path, content, force=force, is_ours=is_our_yaml)
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    replace_file(out / "report.json", text.encode(), force=force, is_ours=is_our_json)
    return len(texts)


def print_serving_report(answer: ServingAnswer, out: Path, num_plans: int, *, quiet: bool) -> None:
    """Print the ranked table, the front, what binds, the GPUs the load needs, and where the constants come from."""
    console = stdout_console()
    outcome, request = answer.outcome, answer.request
    console.print(_title(answer), style="bold", soft_wrap=True)
    shared, table = plans_table(answer, num_plans)
    if shared:
        console.print(shared, soft_wrap=True)
    console.print(table)
    console.print(
        "Pareto front by steady state, limits aside: tokens/s a user sees against tokens/s a GPU makes",
        style="bold",
    )
    console.print(_front_table(answer))
    winner = outcome.ranked[0]
    console.print(f"Why: {_reason(answer)}", soft_wrap=True)
    figures = plan_figures(answer, winner)
    binding = ", ".join(str(name) for name in figures["binding"]) or "nothing"  # type: ignore[attr-defined]
    console.print(
        f"Binds: {binding} stops the winner beyond {load_text(figures['load'])} {answer.load_unit}"
        + (f"; among all simulated: {_counts(outcome.binding)}" if outcome.binding else "")
        + ".",
        soft_wrap=True,
    )
    cheapest = outcome.cheapest
    if cheapest is not None:
        console.print(
            f"Cheapest for the stated load of {load_text(answer.sizing.demand)} {answer.load_unit}: "
            f"{cheapest.plan.num_gpus} GPU{'s' if cheapest.plan.num_gpus > 1 else ''} with {plan_text(cheapest.plan)}.",
            soft_wrap=True,
        )
    _print_search(answer, quiet=quiet)
    _print_notes(answer)
    written = min(num_plans, len(outcome.ranked))
    plans = f"{out}/1.yaml" if written == 1 else f"{out}/1.yaml to {out}/{written}.yaml"
    console.print(
        f"Wrote {plans} and {out}/report.json. Next: meshwright simulate {out}/1.yaml",
        soft_wrap=True,
    )
    if is_closed_loop(request):
        console.print(
            "Loads count clients of a closed loop over the whole deployment, requests that meet an empty system left out.",
            soft_wrap=True,
        )


def _print_search(answer: ServingAnswer, *, quiet: bool) -> None:
    """Print what was searched, and what each constraint rejected and demands."""
    console, outcome, request = stdout_console(), answer.outcome, answer.request
    console.print(
        f"Searched {outcome.space.num_candidates:,} configurations in {answer.seconds:.2f} s (bounds "
        f"{answer.bounds_seconds:.2f} s): {len(outcome.units):,} within the limits by their bound, "
        f"{outcome.num_simulated} simulated in {outcome.num_runs} runs. Rejected by {_counts(_rejections(answer)) or 'nothing'}.",
        soft_wrap=True,
    )
    if not quiet:
        sentences = dict(outcome.space.sentences)
        if request.limits.target is not None:
            sentences["target"] = target_sentence(request.limits.target, outcome.units.refused)
        for name, count in _rejections(answer).items():
            if count and name in sentences:
                console.print(f"  {name}: {sentences[name]}", style="dim", soft_wrap=True)


def _print_notes(answer: ServingAnswer) -> None:
    """Print where the constants come from, and what of the load or the routing is not as it was recorded."""
    console, request = stdout_console(), answer.request
    winner = answer.outcome.ranked[0]
    for note in answer.costs.certainty_notes(winner.plan):
        console.print(f"Constants: {note}.", soft_wrap=True)
    for note in answer.costs.calibration_notes(winner.plan):
        console.print(f"Calibration: {note}.", soft_wrap=True)
    if request.job.workload.requests_file is not None:
        console.print(
            "Loads are simulated on the first requests of the file, closer together or further apart; 'simulate' serves all "
            "of them at their own times.",
            soft_wrap=True,
        )
    if answer.num_failed:
        console.print(failed_note(answer.num_failed), soft_wrap=True)
    longest = longest_request(request.job) or round(float(answer.profile.prompt_lengths[-1]))
    positions = request.job.model.max_position_embeddings
    if longest > positions:
        console.print(
            f"Note: the longest request, about {longest:,} tokens, is beyond the {positions:,} positions of "
            f"{request.job.model.name}; engines refuse it unless the model's positions are extended.",
            soft_wrap=True,
        )
    if request.routing is not None:
        console.print(
            f"Routing data {request.routing.name}: expert ranks are as uneven as a placement of the experts on it leaves them, "
            "over the whole of it; single steps vary more. Copies are the engine's to place, or 'meshwright place' does.",
            soft_wrap=True,
        )


def failed_note(num_failed: int) -> str:
    """Return what became of recorded requests without an answer."""
    what = "request" if num_failed == 1 else "requests"
    return f"Note: {num_failed:,} recorded {what} without an answer (failed) left out."


def _title(answer: ServingAnswer) -> str:
    limits = ", ".join(f"{name} {text}" for name, text in _slo_texts(answer)) or "no limit"
    return (
        f"{answer.request.job.model.name} on {_gpus_text(answer)}: {answer.profile.mean_prompt:,.0f} tokens in, "
        f"{answer.profile.mean_output:,.0f} out, {limits}; best: {_OBJECTIVES[answer.request.objective]}"
    )


def _gpus_text(answer: ServingAnswer) -> str:
    job = answer.request.job
    text = f"{answer.sizing.max_gpus} x {job.cluster.gpu.id}"
    apart = job.prefill_cluster
    return text if apart is None else f"{text}, prefill on {apart.num_gpus} x {apart.gpu.id}"


def _front_table(answer: ServingAnswer) -> Table:
    table = make_table(
        "",
        (
            ("tok/s\n/user", True),
            ("tok/s\n/GPU", True),
            ("prompt", True),
            ("mode", False),
            ("decoding shape", False),
            ("sequences", True),
        ),
    )
    table.columns[4].no_wrap = False
    for point in answer.front:
        table.add_row(
            f"{point.tokens_per_second_per_user:,.1f}",
            f"{point.tokens_per_second_per_gpu:,.0f}",
            format_quantity(point.ttft, "seconds", 3),
            point.mode,
            option_text(point.option)
            + (
                f", drafts {point.option.num_speculative_tokens}"
                if point.option.num_speculative_tokens
                else ""
            ),
            f"{point.num_decodes:,.0f}",
        )
    return table


def _reason(answer: ServingAnswer) -> str:
    outcome = answer.outcome
    winner = outcome.ranked[0]
    if not winner.bracket.num_runs:
        return (
            f"{plan_text(winner.unit.plan)} has the best bound; nothing was simulated, so loads are upper bounds and "
            "latencies lower ones."
        )
    certificate = "no configuration that was not simulated has a bound above it"
    if not outcome.is_certified:
        certificate = (
            f"the optimum is not certified: by their bounds, others not simulated {_gap_text(answer)}"
        )
    if len(outcome.ranked) == 1:
        return (
            f"{plan_text(winner.unit.plan)} is the only shape simulated that keeps the limits; {certificate}."
        )
    rival = outcome.ranked[1]
    gain = abs(winner.value / rival.value - 1.0)
    margin = f"is {gain:.1%} better than" if gain >= 0.0005 else "ties with"
    clear = "" if outcome.is_separated else " (within what the simulated loads tell apart)"
    return f"{plan_text(winner.unit.plan)} {margin} {plan_text(rival.unit.plan)}{clear}; {certificate}."


def _gap_text(answer: ServingAnswer) -> str:
    """Return by how much the winner may be beaten."""
    highest, value = answer.outcome.highest_unsimulated, answer.outcome.ranked[0].value
    if answer.request.objective == "cost":
        # The whole GPUs of the value, whose fraction is the room that stays free.
        return f"may need {math.ceil(-highest):,} GPUs instead of {math.ceil(-value):,}"
    return f"may be up to {highest / value - 1.0:.1%} better"


def _rejections(answer: ServingAnswer) -> dict[str, int]:
    units = answer.outcome.units
    late = {
        "slo": units.num_beyond_limits,
        "demand": units.num_beyond_demand,
        "target": sum(units.refused.values()),
    }
    return {**answer.outcome.space.rejections, **{name: count for name, count in late.items() if count}}


def _counts(counts: object) -> str:
    assert isinstance(counts, dict)
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)


def _slo_texts(answer: ServingAnswer) -> list[tuple[str, str]]:
    return [
        (limit.name, format_quantity(limit.seconds, "seconds", 3)) for limit in answer.request.job.slo.limits
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
