"""What ``simulate`` and ``explain`` show and write for a serving plan."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np

from meshwright.cli.render.console import make_table, stdout_console
from meshwright.cli.render.serving_plan_table import gpus_text, pool_text
from meshwright.cli.render.serving_plans import failed_note
from meshwright.cli.render.serving_timeline import write_serving_timeline
from meshwright.planner.output_file import check_replaceable, is_our_json, is_our_trace, replace_file
from meshwright.planner.serving.deployment import policy_note
from meshwright.planner.serving.plan_file import serving_plan_mapping
from meshwright.planner.serving.run import ServingRun
from meshwright.planner.serving.workload_section import slo_mapping, workload_mapping
from meshwright.simcore.serving.metrics import MetricStatistics, request_metrics
from meshwright.units import format_quantity

__all__ = [
    "check_serving_outputs",
    "print_serving_simulation",
    "serving_simulation_mapping",
    "write_serving_simulation",
]

_HEADER = (
    "request,arrival_s,input_tokens,output_tokens,cached_tokens,ttft_s,tpot_s,e2e_s,queue_s,prefill_s,transfer_s,"
    "interference_s,preemptions,replica"
)
_CSV_MARK = _HEADER.encode()
_METRICS = ("ttft", "tpot", "itl", "e2e", "queue")
_STATISTICS = ("mean", "p50", "p90", "p95", "p99")


def serving_simulation_mapping(run: ServingRun) -> dict[str, object]:
    """Return the simulation as plain data, units in the key names; what was not measured is left out."""
    document, metrics = run.document, run.metrics
    plan = document.plan
    statistics = {
        f"{name}_{word}_seconds": value
        for name in _METRICS
        for word, value in asdict(getattr(metrics, name)).items()
        if not math.isnan(value)
    }
    optional = {
        "joules_per_output_token": run.joules_per_output_token,
        "dollars_per_million_output_tokens": run.dollars_per_million_output_tokens,
        "policy_note": policy_note(plan),
    }
    return {
        "kind": "serving_simulation",
        "model": document.job.model.name,
        "cluster": document.job.cluster.id,
        "plan": serving_plan_mapping(plan),
        "num_gpus": plan.num_gpus,
        "workload": workload_mapping(document.job.workload),
        "slo": slo_mapping(document.job.slo),
        "slo_violations": {limit.name: times for limit, times in run.violations},
        "num_requests": run.result.num_requests,
        "num_failed_requests_left_out": run.num_failed,
        "duration_seconds": metrics.duration,
        "requests_per_second": metrics.requests_per_second,
        "goodput_requests_per_second": metrics.goodput,
        "good_share": metrics.good_share,
        "input_tokens_per_second": metrics.input_tokens_per_second,
        "output_tokens_per_second": metrics.output_tokens_per_second,
        "output_tokens_per_second_per_gpu": metrics.output_tokens_per_second_per_gpu,
        **statistics,
        "ttft_split_seconds": asdict(metrics.ttft_split),
        "num_preemptions": metrics.num_preemptions,
        "cached_prompt_share": metrics.cached_share,
        "num_steps": run.result.num_steps,
        "prompt_time_share": run.prompt_share,
        "decode_time_share": run.decode_share,
        "watts_per_gpu": run.watts_per_gpu,
        "watts_per_gpu_by_phase": dict(run.phase_watts),
        **{key: value for key, value in optional.items() if value is not None},
        **run.costs.calibration_identities(plan),
        "constants": list(run.costs.certainty_notes(plan)),
    }


def check_serving_outputs(timeline: Path | None, out: Path | None, *, force: bool) -> None:
    """Raise when a file to be written would lose somebody's, before anything is simulated or written."""
    if timeline is not None:
        check_replaceable(timeline, force=force, is_ours=is_our_trace)
    if out is not None:
        check_replaceable(out / "requests.csv", force=force, is_ours=_is_our_csv)
        check_replaceable(out / "metrics.json", force=force, is_ours=is_our_json)


def write_serving_simulation(
    run: ServingRun, timeline: Path | None, out: Path | None, *, force: bool
) -> list[str]:
    """Write what was asked for; returns what to print."""
    check_serving_outputs(timeline, out, force=force)
    written = []
    if timeline is not None and run.result.steps is not None:
        written.append(write_serving_timeline(run.result.steps, run.document.plan, timeline, force=force))
    if out is not None:
        replace_file(out / "requests.csv", _requests_csv(run), force=force, is_ours=_is_our_csv)
        mapping = {"written_by": "meshwright", "schema_version": 1, **serving_simulation_mapping(run)}
        text = json.dumps(mapping, indent=2, allow_nan=False) + "\n"
        replace_file(out / "metrics.json", text.encode(), force=force, is_ours=is_our_json)
        written += [str(out / "requests.csv"), str(out / "metrics.json")]
    return written


def print_serving_simulation(run: ServingRun, written: list[str], *, explains: bool) -> None:
    """Print the metrics, the limits, what it costs, and with ``explains`` where the time to the first token goes."""
    console = stdout_console()
    document, metrics = run.document, run.metrics
    plan, job = document.plan, document.job
    pools = " + ".join(f"{pool.role} {pool_text(pool)}" for pool in plan.pools)
    title = (
        f"{job.model.name} on {gpus_text(job, plan)}: {plan.engine} {plan.precision}, {pools}; "
        f"{run.result.num_requests:,} requests in {format_quantity(metrics.duration, 'seconds', 3)}"
    )
    console.print(title, style="bold", soft_wrap=True)
    table = make_table("", (("", False), *((word, True) for word in _STATISTICS)))
    for name in _METRICS:
        table.add_row(name.upper() if name != "queue" else "queueing", *_cells(getattr(metrics, name)))
    console.print(table)
    if explains:
        split = asdict(metrics.ttft_split)
        console.print("Where the mean time to the first token goes:", style="bold")
        parts = make_table("", (("part", False), ("time", True), ("share", True)))
        for name, seconds in split.items():
            # The rest of a difference of sums: less than a nanosecond is rounding.
            shown = seconds if abs(seconds) >= 1e-9 else 0.0
            parts.add_row(name, format_quantity(shown, "seconds", 3), f"{shown / metrics.ttft.mean:.0%}")
        console.print(parts)
    console.print(
        f"{metrics.requests_per_second:.4g} requests/s, {metrics.output_tokens_per_second:,.0f} output tokens/s "
        f"({metrics.output_tokens_per_second_per_gpu:,.0f} per GPU), {metrics.num_preemptions:,} preemptions, "
        f"{metrics.cached_share:.0%} of the prompt tokens cached.",
        soft_wrap=True,
    )
    if job.slo.limits:
        broken = ", ".join(f"{limit.name} {times:.2f} times over" for limit, times in run.violations)
        console.print(
            f"{metrics.good_share:.1%} of the requests keep every limit themselves (goodput {metrics.goodput:.4g}/s); "
            + (f"broken: {broken}." if broken else "every limit holds."),
            soft_wrap=True,
        )
    price = run.dollars_per_million_output_tokens
    energy = run.joules_per_output_token
    console.print(
        f"Prompts fill {run.prompt_share:.0%} and decoding alone {run.decode_share:.0%} of the GPUs' time, about "
        f"{run.watts_per_gpu:,.0f} W per GPU"
        + (f", {energy:.3g} J per output token ({_phase_joules(run)})" if energy is not None else "")
        + (f", {price:.3g} $ per million output tokens" if price is not None else "")
        + ".",
        soft_wrap=True,
    )
    for note in _load_notes(run):
        console.print(note, soft_wrap=True)
    for note in run.costs.certainty_notes(plan):
        console.print(f"Constants: {note}.", soft_wrap=True)
    for note in run.costs.calibration_notes(plan):
        console.print(f"Calibration: {note}.", soft_wrap=True)
    for line in written:
        console.print(f"Wrote {line}", soft_wrap=True)


def _phase_joules(run: ServingRun) -> str:
    return ", ".join(f"{run.phase_joules_per_output_token(phase):.2g} {phase}" for phase in run.phase_watts)


def _load_notes(run: ServingRun) -> list[str]:
    """Return whether the engine forms such steps, whose load was served, and what of it the model cannot hold."""
    workload, model = run.document.job.workload, run.document.job.model
    notes = []
    foreign = policy_note(run.document.plan)
    if foreign is not None:
        notes.append(f"Note: {foreign}.")
    if run.num_failed:
        notes.append(failed_note(run.num_failed))
    if workload.arrival != "trace":
        load = (
            f"{workload.concurrency:,} clients" if workload.concurrency else f"{workload.rate:.4g} requests/s"
        )
        notes.append(
            f"Load: the job's {load}; the figures in a plan file are at the highest load it was found to hold."
        )
    too_long = int((run.result.input_length + run.result.output_length > model.max_position_embeddings).sum())
    if too_long:
        notes.append(
            f"Note: {too_long:,} of the requests are longer than the {model.max_position_embeddings:,} positions of "
            f"{model.name}; engines refuse them unless the model's positions are extended."
        )
    return notes


def _cells(statistics: MetricStatistics) -> tuple[str, ...]:
    values = (getattr(statistics, word) for word in _STATISTICS)
    return tuple("-" if math.isnan(value) else format_quantity(value, "seconds", 3) for value in values)


def _requests_csv(run: ServingRun) -> bytes:
    """Return one line per request; a request of one token has no TPOT."""
    result, each = run.result, request_metrics(run.result)
    columns = (
        np.arange(result.num_requests),
        result.arrival_time,
        result.input_length,
        result.output_length,
        result.cached_tokens,
        each.ttft,
        each.tpot,
        each.e2e,
        each.queue,
        each.prefill,
        each.transfer,
        each.interference,
        result.num_preemptions,
        result.replica,
    )
    text = io.StringIO()
    text.write(_HEADER + "\n")
    for row in zip(*(column.tolist() for column in columns), strict=True):
        text.write(",".join(_cell(value) for value in row) + "\n")
    return text.getvalue().encode()


def _cell(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return "" if math.isnan(value) else f"{value:.9g}"


def _is_our_csv(content: bytes) -> bool:
    return content.startswith(_CSV_MARK)
