"""``meshwright plan``: search, rank, explain, write."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from meshwright.cli.options import CommonOptions, common_options
from meshwright.cli.plan_serving import (
    ServingOptions,
    plan_serving,
    refuse_serving_options,
    serving_options,
)

__all__ = ["command"]


@click.command("plan", short_help="Search every way to run a job.")
@click.argument("job", required=False, type=click.Path(path_type=Path))
@click.option("--model", help="Preset id, or path of a Hugging Face config.json.")
@click.option("--cluster", help="NODE:COUNT (dgx-h100:8 is 8 nodes), a preset, or a YAML file.")
@click.option("--global-batch-size", type=click.IntRange(min=1), help="Sequences per optimizer step.")
@click.option("--sequence-length", type=click.IntRange(min=1), help="Tokens per sequence.")
@click.option("--precision", help="bf16 (default), fp16, fp8, ...")
@click.option("--software", help="Software generation whose overheads apply [megatron-core].")
@click.option("--objective", help="throughput (default), cost or energy.")
@click.option(
    "--target",
    help="Only plans this export target can run: megatron, deepspeed, torchtitan, torchtitan-0.2; vllm, sglang, "
    "tensorrt-llm, kubernetes, dynamo for serving.",
)
@click.option(
    "--routing",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Recorded routing of the experts, as 'meshwright place' reads it: plan with the imbalance a placement reaches.",
)
@click.option(
    "--search",
    type=click.Choice(["exhaustive", "layerwise"]),
    default="exhaustive",
    show_default=True,
    help="layerwise: also plans whose layers differ in tp, sharding and recompute.",
)
@click.option(
    "--top", type=click.IntRange(1, 100), default=10, show_default=True, help="Plans to rank and write."
)
@click.option(
    "--flops",
    type=click.Choice(["causal", "full-attention"]),
    default="causal",
    show_default=True,
    help="How MFU counts attention.",
)
@click.option("--pareto", is_flag=True, help="Also show what is best in time, dollars or memory.")
@click.option("--max-seconds", type=float, metavar="S", help="Stop after S seconds with the best so far.")
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep the search's state in FILE and continue from it.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("plans"),
    show_default=True,
    help="Folder of 1.yaml ... and report.json.",
)
@serving_options
@common_options
def command(  # one parameter per flag is click's calling convention
    *,
    job: Path | None,
    model: str | None,
    cluster: str | None,
    global_batch_size: int | None,
    sequence_length: int | None,
    precision: str | None,
    software: str | None,
    objective: str | None,
    target: str | None,
    routing: Path | None,
    search: str,
    top: int,
    flops: str,
    pareto: bool,
    max_seconds: float | None,
    resume: Path | None,
    out: Path,
    serving: ServingOptions,
    common: CommonOptions,
) -> None:
    """Search every way to run a training job, or to serve a model, and rank the best plans.

    JOB is a job file (model, cluster, workload, objective); flags win over it, and can replace it.

    \b
    meshwright plan examples/llama-3-70b-64xh100.yaml
    meshwright plan --model llama-3-70b --cluster dgx-h100:8 --global-batch-size 1024 --sequence-length 8192
    meshwright plan examples/serve-llama-3.3-70b.yaml
    meshwright plan --serve --model deepseek-v3 --cluster dgx-h200:8 --requests trace.csv --ttft-p99 2s --tpot-p99 50ms
    """
    from meshwright.planner.job_parts import job_kind

    if serving["serve"] or (job is not None and job_kind(job) == "serving"):
        plan_serving(
            job,
            {**serving, "routing": routing},
            {
                "--global-batch-size": global_batch_size,
                "--sequence-length": sequence_length,
                "--software": software,
                "--pareto": pareto,
                "--max-seconds": max_seconds,
                "--resume": resume,
            },
            model=model,
            cluster=cluster,
            precision=precision,
            objective=objective,
            target=target,
            top=top,
            out=out,
            common=common,
        )
        return
    refuse_serving_options(serving)

    from meshwright.cli.render.console import ProgressLine
    from meshwright.costmodels.context import cost_context
    from meshwright.errors import InfeasiblePlanError, SpecError
    from meshwright.planner.job_file import JobFlags, read_request
    from meshwright.planner.mapping.plan_mapping import search_mapped
    from meshwright.planner.relaxation import infeasible
    from meshwright.planner.search import SEARCHES, SearchRequest

    if search != "exhaustive" and (pareto or max_seconds is not None or resume is not None):
        raise SpecError(f"--pareto, --max-seconds and --resume go with --search exhaustive, not {search}")
    request = read_request(
        job,
        JobFlags(
            model=model,
            cluster=cluster,
            global_batch_size=global_batch_size,
            sequence_length=sequence_length,
            precision=precision,
            software=software,
            objective=objective,
            target=target,
            routing=routing,
        ),
    )
    context = cost_context(request.job, calibration_paths=common.calibrations)
    wanted = SearchRequest(
        job=request.job,
        context=context,
        limits=request.limits,
        objective=request.objective,
        num_plans=top,
        flops=flops,  # type: ignore[arg-type]  # click.Choice holds the words
        max_seconds=max_seconds,
        resume=resume,
        wants_front=pareto,
    )
    started = time.perf_counter()
    with ProgressLine(common.quiet or common.as_json) as progress:
        try:
            result = search_mapped(SEARCHES[search], wanted, progress, seed=common.seed)
        except InfeasiblePlanError as error:
            raise infeasible(request.job, context, request.limits, error.rejections) from None
    seconds = time.perf_counter() - started

    from meshwright.cli.render.plan_report import print_report, report_mapping, write_plans

    report = report_mapping(request, context, result, seconds, flops)
    write_plans(out, request, context, result, report, force=common.force)
    if common.as_json:
        click.echo(json.dumps(report, indent=2, allow_nan=False))
    else:
        print_report(request, context, result, seconds, flops, out, quiet=common.quiet)
