"""What ``plan`` shows and writes: the ranked table, the reason, the rejections, plan files and report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from meshwright.cli.render.console import stdout_console
from meshwright.cli.render.plans import FLOPS_WORDS, ranked_table
from meshwright.costmodels.context import CostContext
from meshwright.planner.constraints import constraint_sentences
from meshwright.planner.job_file import PlanRequest
from meshwright.planner.kinds_text import machines_text, placement_sentence, stages_by_kind
from meshwright.planner.output_file import check_replaceable, is_our_json, is_our_yaml, replace_file
from meshwright.planner.plan_file import PlanDocument, plan_document_text, prediction_mapping
from meshwright.planner.reasons import winning_reason
from meshwright.planner.search.base import RankedPlan, SearchResult
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.layer_groups import layer_groups_text
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["print_report", "report_mapping", "write_plans"]

# Software generations whose overheads are those of an export target, by prefix.
_TARGET_SOFTWARE: dict[str, tuple[str, ...]] = {
    "megatron": ("megatron-2", "megatron-core"),
    "deepspeed": ("megatron-deepspeed",),
}


def report_mapping(
    request: PlanRequest, context: CostContext, result: SearchResult, seconds: float, flops: str
) -> dict[str, object]:
    """Return the report as plain data: what was asked, counts, ranking with predictions, the reason."""
    return {
        "schema_version": 1,
        "written_by": "meshwright",
        "kind": "training_report",
        "model": request.job.model.name,
        "cluster": request.job.cluster.id,
        "num_gpus": request.job.cluster.num_gpus,
        "software": request.job.software,
        "objective": request.objective,
        "calibration": dict(context.calibration_identity),
        "flops_convention": flops,
        "search_seconds": seconds,
        "num_candidates": result.num_candidates,
        "num_feasible": result.num_feasible,
        "num_simulated": result.num_simulated,
        "is_certified": result.is_certified,
        "rejections": dict(result.rejections),
        "notes": [*request.notes, *result.notes],
        "reason": winning_reason(result, request.objective),
        "plans": _entries(request.job, result.ranked),
        **_optional(request, result),
    }


def _entries(job: TrainingJob, ranked: Sequence[RankedPlan]) -> list[dict[str, object]]:
    return [
        {
            "plan": _degrees(entry.plan),
            "prediction": prediction_mapping(entry.prediction),
            **({} if entry.contended_time is None else {"contended_time_seconds": entry.contended_time}),
            **({"runs_on": stages_by_kind(job, entry.plan)} if job.cluster.is_mixed else {}),
        }
        for entry in ranked
    ]


def _optional(request: PlanRequest, result: SearchResult) -> dict[str, object]:
    """Return what a report only says where it was asked for or came about: Pareto front, a search cut short."""
    optional: dict[str, object] = {}
    if result.front:
        optional["pareto_front"] = _entries(request.job, result.front)
    if result.cut is not None:
        optional["cut"] = {"num_unscored": result.cut.num_unscored, "bound_gap": result.cut.gap}
    return optional


def write_plans(
    out: Path,
    request: PlanRequest,
    context: CostContext,
    result: SearchResult,
    report: dict[str, object],
    *,
    force: bool,
) -> None:
    """Write ``1.yaml`` ... and ``report.json``; nothing is written when a file of somebody else's is in the way."""
    texts = {
        out / f"{place}.yaml": plan_document_text(
            PlanDocument(job=request.job, plan=entry.plan, origin=request.origin), context, entry.prediction
        ).encode()
        for place, entry in enumerate(result.ranked, start=1)
    }
    for path in texts:
        check_replaceable(path, force=force, is_ours=is_our_yaml)
    check_replaceable(out / "report.json", force=force, is_ours=is_our_json)
    for path, content in texts.items():
        replace_file(path, content, force=force, is_ours=is_our_yaml)
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    replace_file(out / "report.json", text.encode(), force=force, is_ours=is_our_json)


def print_report(
    request: PlanRequest,
    context: CostContext,
    result: SearchResult,
    seconds: float,
    flops: str,
    out: Path,
    *,
    quiet: bool,
) -> None:
    """Print the ranked table, the reason for the winner and what each constraint rejected."""
    job = request.job
    console = stdout_console()
    workload = job.workload
    title = (
        f"{job.model.name} on {machines_text(job.cluster)}: global batch "
        f"{workload.global_batch_size} x {workload.sequence_length} tokens, {workload.precision}, "
        f"{job.software}, objective {request.objective}"
    )
    console.print(ranked_table(title, result.ranked, request.objective, folds_offload=True))
    for place, entry in enumerate(result.ranked, start=1):
        if entry.plan.layer_groups:
            console.print(f"Layers of {place}: {layer_groups_text(entry.plan)}.", soft_wrap=True)
    if job.cluster.is_mixed:
        for place, entry in enumerate(result.ranked, start=1):
            console.print(f"{place}. {placement_sentence(job, entry.plan)}", soft_wrap=True)
    if result.front:
        title = "Pareto front of the simulated plans: iteration time, dollars, memory of the fullest rank"
        console.print(ranked_table(title, result.front, request.objective))
    for note in (*request.notes, *result.notes):
        console.print(note, soft_wrap=True)
    console.print(f"Why: {winning_reason(result, request.objective)}", soft_wrap=True)
    winner = result.ranked[0].prediction
    console.print(
        f"80 % interval of the winner: {winner.low:.4g} to {winner.high:.4g} s per iteration ({winner.basis}). "
        f"MFU: {FLOPS_WORDS[flops]}.",
        soft_wrap=True,
    )
    rejected = ", ".join(f"{name} {count:,}" for name, count in result.rejections.items() if count)
    console.print(
        f"Searched {result.num_candidates:,} plans in {seconds:.2f} s: {result.num_feasible:,} feasible, "
        f"{result.num_simulated} simulated exactly, {request.limits.memory_headroom:.0%} of memory kept free. Rejected by {rejected or 'nothing'}.",
        soft_wrap=True,
    )
    if not quiet:
        sentences = constraint_sentences()
        for name, count in result.rejections.items():
            if count and name in sentences:
                console.print(f"  {name}: {sentences[name]}", style="dim", soft_wrap=True)
    generations = _TARGET_SOFTWARE.get(request.limits.target or "", (job.software,))
    if not job.software.startswith(generations):
        console.print(
            f"Note: {request.limits.target} is predicted with the overheads of {job.software}; --software names others.",
            soft_wrap=True,
        )
    idle = job.cluster.num_gpus - result.ranked[0].plan.num_gpus
    if idle and request.objective == "throughput":
        console.print(f"Note: the winner leaves {idle} of {job.cluster.num_gpus} GPUs idle.", soft_wrap=True)
    console.print(f"Calibration: {context.calibration_text}.", soft_wrap=True)
    console.print(
        f"Wrote {out}/1.yaml to {out}/{len(result.ranked)}.yaml and {out}/report.json. Next: "
        f"meshwright simulate {out}/1.yaml",
        soft_wrap=True,
    )


def _degrees(plan: ParallelPlan) -> dict[str, object]:
    names = (
        "tp",
        "pp",
        "vpp",
        "dp",
        "cp",
        "cp_method",
        "ep",
        "etp",
        "sequence_parallel",
        "micro_batch_size",
        "schedule",
        "recompute",
        "recompute_modules",
        "recompute_layers",
        "sharding",
        "sharding_group",
        "optimizer_offload",
        "optimizer_offload_fraction",
        "parameter_offload",
        "activation_offload",
    )
    degrees = {name: getattr(plan, name) for name in names}
    if plan.layer_groups:
        degrees["layer_groups"] = layer_groups_text(plan)
    return degrees
