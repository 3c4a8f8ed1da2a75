"""``meshwright run``: execute a plan on the machines at hand and compare it with its prediction."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from meshwright.cli.options import CommonOptions, common_options
from meshwright.cli.run_folder import prepare_run_folder, run_folder

if TYPE_CHECKING:
    from meshwright.planner.plan_file import PlanDocument
    from meshwright.profiler.executor.launch import LauncherRank
    from meshwright.profiler.executor.report import ExecutionReport
    from meshwright.simcore.domain.execution import Execution, ExecutionDevice

__all__ = ["command"]

_DAY_SECONDS = 86400.0
# Where a dry run without --out says the run would put its files.
_ANY_FOLDER = Path("run")
_DRY_PORT = 29500


@click.command("run", short_help="Execute a plan and measure it.")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--steps", type=click.IntRange(1, 1_000_000), default=20, show_default=True, help="Steps to measure."
)
@click.option(
    "--warmup",
    type=click.IntRange(0, 10_000),
    default=2,
    show_default=True,
    help="Steps before them, not measured.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep logs and reports there; on several nodes a folder they share.",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Run on this; else what the plan's cluster has."
)
@click.option(
    "--timeout",
    default="60s",
    show_default=True,
    metavar="TIME",
    help="End a run in which no rank gets further for this long.",
)
@click.option("--dry-run", is_flag=True, help="Print the exact commands and start nothing.")
@click.option(
    "--append",
    type=click.Path(path_type=Path),
    metavar="FILE.csv",
    help="Add the result to this table of measured runs.",
)
@click.option(
    "--prompt",
    type=click.IntRange(1, 1_000_000),
    metavar="TOKENS",
    help="Serving: length of each prompt; else the plan's mean.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 100_000),
    metavar="N",
    help="Serving: sequences of a step; else what the plan's engine takes.",
)
@common_options
def command(
    *,
    plan: Path,
    steps: int,
    warmup: int,
    out: Path | None,
    device: str | None,
    timeout: str,
    dry_run: bool,
    append: Path | None,
    prompt: int | None,
    batch: int | None,
    common: CommonOptions,
) -> None:
    """Run PLAN (a file that 'meshwright plan' wrote) for some steps on random tokens, measure it, and compare.

    By itself it starts every rank on this machine; under torchrun it is the rank it was started as. Of a serving plan
    it runs prefill and decode steps of one replica.

    \b
    meshwright run plans/1.yaml --steps 20
    meshwright run plans/1.yaml --dry-run
    meshwright run plans/1.yaml --append runs.csv
    """
    from meshwright.cli.run_serving import ServingRun, run_serving
    from meshwright.errors import SpecError
    from meshwright.planner.plan_file import read_plan
    from meshwright.planner.serving.plan_file import is_serving_plan
    from meshwright.profiler.executor.evidence import check_appendable
    from meshwright.profiler.executor.launch import check_devices, check_host_memory, launcher_rank
    from meshwright.simcore.domain.execution import Execution

    seconds = _seconds(timeout)
    if is_serving_plan(plan):
        if append is not None:
            raise SpecError(
                "--append: tables of measured runs hold training runs, and this is a serving plan"
            )
        run = ServingRun(
            device=cast("ExecutionDevice | None", device),
            num_steps=steps,
            num_warmup_steps=warmup,
            prompt=prompt,
            batch=batch,
            timeout=seconds,
        )
        run_serving(plan, run, out, dry_run=dry_run, common=common)
        return
    for flag, value in (("--prompt", prompt), ("--batch", batch)):
        if value is not None:
            raise SpecError(f"{flag} is for serving plans; a training plan says its own")
    document = read_plan(plan)
    document.job.cluster.require_one_kind("run")
    has_cpu = document.job.cluster.gpu.architecture == "cpu"
    execution = Execution(
        model=document.job.model,
        plan=document.plan,
        workload=document.job.workload,
        device=cast("ExecutionDevice", device or ("cpu" if has_cpu else "cuda")),
        num_steps=steps,
        num_warmup_steps=warmup,
        seed=common.seed,
    )
    _require_supported(execution)
    if append is not None:
        _check_same_device(document, execution)
        check_appendable(append, document.job, document.plan)
    if dry_run:
        _print_commands(plan, document, execution, out, timeout, common)
        return
    here = launcher_rank()
    num_local = execution.plan.num_gpus if here is None else _num_local_ranks(here)
    check_devices(execution.device, num_local)
    check_host_memory(execution, num_local)
    _run(document, execution, out, append, seconds, here, common)


def _run(
    document: PlanDocument,
    execution: Execution,
    out: Path | None,
    append: Path | None,
    timeout: float,
    here: LauncherRank | None,
    common: CommonOptions,
) -> None:
    """Run, and print what came of it; only rank 0 prints."""
    from meshwright.errors import SpecError

    if out is None and here is not None:
        raise SpecError("under torchrun the ranks meet in a folder: name one that all nodes share with --out")
    with run_folder(out) as folder:
        _execute_and_show(document, execution, folder, append, timeout, here, common, is_kept=out is not None)


def _execute_and_show(
    document: PlanDocument,
    execution: Execution,
    folder: Path,
    append: Path | None,
    timeout: float,
    here: LauncherRank | None,
    common: CommonOptions,
    *,
    is_kept: bool,
) -> None:
    from meshwright.cli.render.console import print_json
    from meshwright.cli.render.run import RunProgress, print_run, run_mapping
    from meshwright.costmodels.breakdown import iteration_breakdown
    from meshwright.costmodels.context import cost_context
    from meshwright.costmodels.prediction import predict
    from meshwright.planner.output_file import is_our_json, replace_file
    from meshwright.profiler.executor.comparison import compare, compare_traffic, comparison_mapping
    from meshwright.profiler.executor.launch import run_as_rank, run_here
    from meshwright.profiler.executor.report import report_text
    from meshwright.profiler.executor.supervise import Patience
    from meshwright.simcore.domain.execution import execution_mapping

    # Before the run: a calibration that cannot be read must not cost one.
    context = cost_context(document.job, calibration_paths=common.calibrations)
    prediction = predict(context, document.plan)
    breakdown = iteration_breakdown(context, document.plan, prediction.iteration)
    prepare_run_folder(folder, execution, is_shared=here is not None, force=common.force)
    is_quiet = common.quiet or common.as_json or (here is not None and here.rank != 0)
    patience = Patience(silence=timeout)
    with RunProgress(is_quiet) as progress:
        report: ExecutionReport | None
        if here is None:
            report = run_here(execution, folder, patience=patience, progress=progress)
        else:
            report = run_as_rank(execution, folder, here, patience=patience, progress=progress)
    if report is None:
        return
    comparison = compare(
        document.plan,
        prediction,
        breakdown,
        report,
        device=execution.device,
        is_same_device=_is_same_device(document, execution),
    )
    traffic = compare_traffic(execution, report)
    written = []
    if is_kept:
        path = folder / "report.json"
        text = report_text(report, execution_mapping(execution), comparison_mapping(comparison, traffic))
        replace_file(path, text.encode(), force=common.force, is_ours=is_our_json)
        written.append(str(path))
    if append is not None:
        written.append(f"{append} (row {_append(document, report, append)})")
    if common.as_json:
        print_json(
            {**run_mapping(document, context, execution, report, comparison, traffic), "written": written}
        )
    else:
        print_run(document, context, execution, report, comparison, traffic, written)


def _append(document: PlanDocument, report: ExecutionReport, path: Path) -> str:
    from meshwright.profiler.executor.evidence import append_row, measured_row

    plan = document.plan
    degrees = (("tp", plan.tp), ("cp", plan.cp), ("dp", plan.dp), ("pp", plan.pp), ("ep", plan.ep))
    shape = "".join(f"-{name}{degree}" for name, degree in degrees if degree > 1)
    identity = f"{document.job.model.name}-{document.job.cluster.gpu.id}{shape}-mbs{plan.micro_batch_size}"
    return append_row(path, measured_row(document.job, plan, report, identity))


def _seconds(text: str) -> float:
    from meshwright.errors import SpecError
    from meshwright.units import parse_quantity

    try:
        seconds = parse_quantity(text, "seconds")
    except SpecError:
        seconds = 0.0
    if not 1.0 <= seconds <= _DAY_SECONDS:
        raise SpecError(
            f"--timeout: '{text}' is no time from 1 s to a day; write a number and a unit, e.g. 60s or 10min"
        )
    return seconds


def _require_supported(execution: Execution) -> None:
    """Refuse what the executor cannot run, with every reason."""
    from meshwright.errors import UnsupportedByTargetError
    from meshwright.profiler.executor.limits import unsupported

    reasons = unsupported(execution)
    if reasons:
        lines = "".join(f"\n  {reason}" for reason in reasons)
        raise UnsupportedByTargetError(f"the executor cannot run this plan:{lines}")


def _is_same_device(document: PlanDocument, execution: Execution) -> bool:
    """Return whether the run is on the kind of device that was planned for; which GPU it is, is not asked here."""
    return (document.job.cluster.gpu.architecture == "cpu") == (execution.device == "cpu")


def _check_same_device(document: PlanDocument, execution: Execution) -> None:
    from meshwright.errors import SpecError

    if not _is_same_device(document, execution):
        raise SpecError(
            f"--append: the plan is for {document.job.cluster.gpu.id} and runs on {execution.device}; its time says"
            " nothing of the planned device"
        )


def _num_local_ranks(here: LauncherRank) -> int:
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isdecimal() else here.local_rank + 1


def _print_commands(
    plan: Path,
    document: PlanDocument,
    execution: Execution,
    out: Path | None,
    timeout: str,
    common: CommonOptions,
) -> None:
    """Print what a run would start; with --out also write what its workers read, so that the lines can be pasted."""
    from meshwright.cli.render.console import print_json
    from meshwright.cli.render.run import print_commands
    from meshwright.profiler.executor.launch import local_commands, multi_node_commands, shell_line

    folder = _ANY_FOLDER if out is None else out
    if out is not None:
        prepare_run_folder(out, execution, is_shared=False, force=common.force)
    words = [
        "run",
        str(plan),
        "--steps",
        str(execution.num_steps),
        "--warmup",
        str(execution.num_warmup_steps),
    ]
    words += ["--device", execution.device, "--timeout", timeout, "--seed", str(execution.seed)]
    words += [word for path in common.calibrations for word in ("--calibration", str(path))]
    words += ["--out", str(folder)]
    per_node = min(document.job.cluster.node.num_gpus, execution.plan.num_gpus)
    commands = {
        "local": [shell_line(each) for each in local_commands(execution, folder, _DRY_PORT)],
        **multi_node_commands(words, -(-execution.plan.num_gpus // per_node), per_node),
    }
    if common.as_json:
        print_json({"kind": "execution_commands", "folder": str(folder), "commands": commands})
    else:
        print_commands(commands, folder, is_written=out is not None)
