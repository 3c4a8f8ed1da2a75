"""``meshwright run`` for serving plans: prefill and decode steps of one replica of each pool."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.cli.options import CommonOptions
from meshwright.cli.run_folder import prepare_run_folder, run_folder

if TYPE_CHECKING:
    from meshwright.planner.serving.costs import JobCosts
    from meshwright.planner.serving.plan_file import ServingPlanDocument
    from meshwright.profiler.executor.report import ExecutionReport
    from meshwright.profiler.executor.serving_run import StepTimes
    from meshwright.simcore.domain.execution import Execution, ExecutionDevice
    from meshwright.simcore.domain.serving import ServingPool

__all__ = ["ServingRun", "run_serving"]

_DRY_PORT = 29500
_ANY_FOLDER = Path("run")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRun:
    """What the flags said.

    Parameters
    ----------
    device : ExecutionDevice | None
        None is what the plan's cluster has.
    num_steps, num_warmup_steps : int
        Prefills, each with its decode steps.
    prompt, batch : int | None
        Tokens of a prompt and sequences of a step; None is what the plan says.
    timeout : float
        Silence that ends a run [s].
    """

    device: ExecutionDevice | None
    num_steps: int
    num_warmup_steps: int
    prompt: int | None
    batch: int | None
    timeout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _PoolRun:
    """One pool: what runs, and what its steps should take."""

    pool: ServingPool
    execution: Execution
    predicted: StepTimes
    is_same_device: bool


def run_serving(
    plan: Path, run: ServingRun, out: Path | None, *, dry_run: bool, common: CommonOptions
) -> None:
    """Run one replica of each pool of a serving plan on this machine, and print its steps beside their prediction.

    Parameters
    ----------
    plan : Path
        The plan file.
    run : ServingRun
        What the flags said.
    out : Path | None
        Where logs and reports stay.
    dry_run : bool
        Print the commands and start nothing.
    common : CommonOptions
        Shared options.

    Raises
    ------
    SpecError, UnsupportedByTargetError, CalibrationError, ExecutionError
        If plan or flags do not fit, the executor cannot run it, devices are missing, or a rank fails.
    """
    from meshwright.errors import SpecError
    from meshwright.planner.serving.costs import JobCosts
    from meshwright.planner.serving.deployment import check_engine_runs
    from meshwright.planner.serving.plan_file import read_serving_plan
    from meshwright.profiler.executor.launch import check_devices, check_host_memory, launcher_rank

    document = read_serving_plan(plan)
    check_engine_runs(document.job, document.plan)
    costs = JobCosts(document.job, common.calibrations)
    runs = [_pool_run(document, costs, pool, run, common.seed) for pool in document.plan.pools]
    if dry_run:
        _print_serving_commands(runs, out, common)
        return
    if launcher_rank() is not None:
        raise SpecError("serving plans run on one machine, without torchrun; unset RANK")
    for each in runs:
        check_devices(each.execution.device, each.execution.plan.num_gpus)
        check_host_memory(each.execution, each.execution.plan.num_gpus, is_served=True)
    with run_folder(out) as base:
        reports = [_execute(each, base / each.pool.role, run, common) for each in runs]
    _show(document, runs, reports, out, common)


def _pool_run(
    document: ServingPlanDocument,
    costs: JobCosts,
    pool: ServingPool,
    run: ServingRun,
    seed: int,
) -> _PoolRun:
    from meshwright.errors import SpecError, UnsupportedByTargetError
    from meshwright.profiler.executor.serving_run import NUM_DECODES, pool_execution, unsupported_pool

    job, plan = document.job, document.plan
    lengths = job.workload.input_length
    if run.prompt is None and lengths is None:
        raise SpecError("the plan's prompts are those of a file; name the tokens of one with --prompt")
    longest = pool.max_num_batched_tokens
    prompt = run.prompt or min(longest, max(1, round(lengths.mean if lengths else 1)))
    held = pool.kv_cache_tokens or costs.kv_cache_tokens(plan, pool)
    room = min(pool.max_num_sequences, longest // prompt, held // (prompt + NUM_DECODES))
    is_cpu = job.cluster_of(pool.role).gpu.architecture == "cpu"
    execution = pool_execution(
        job.model,
        plan,
        pool,
        batch=run.batch or max(1, room),
        prompt=prompt,
        device=run.device or ("cpu" if is_cpu else "cuda"),
        num_steps=run.num_steps,
        num_warmup_steps=run.num_warmup_steps,
        seed=seed,
    )
    reasons = unsupported_pool(plan, pool, execution)
    if reasons:
        lines = "".join(f"\n  {reason}" for reason in reasons)
        raise UnsupportedByTargetError(f"the executor cannot run the {pool.role} pool:{lines}")
    return _PoolRun(
        pool=pool,
        execution=execution,
        predicted=_predicted(document, costs, pool, execution),
        is_same_device=is_cpu == (execution.device == "cpu"),
    )


def _predicted(
    document: ServingPlanDocument, costs: JobCosts, pool: ServingPool, execution: Execution
) -> StepTimes:
    """Return the times of the same steps in the plan's engine."""
    from meshwright.profiler.executor.serving_run import NUM_DECODES, StepTimes
    from meshwright.simcore.serving.step_times import decode_step_time, prompt_step_time

    table = costs.step_table(document.plan, pool)
    # What an engine's step is priced by: one attention data parallel rank's.
    batch, prompt = float(execution.plan.micro_batch_size), float(execution.workload.sequence_length)
    # A step's own token counts among its context.
    context = prompt + (NUM_DECODES + 1) / 2
    return StepTimes(
        prefill=prompt_step_time(table, prompt, batch), decode=decode_step_time(table, batch, context)
    )


def _execute(each: _PoolRun, folder: Path, run: ServingRun, common: CommonOptions) -> ExecutionReport:
    from meshwright.cli.render.run import RunProgress
    from meshwright.profiler.executor.serving_run import run_pool
    from meshwright.profiler.executor.supervise import Patience

    prepare_run_folder(folder, each.execution, is_shared=False, force=common.force)
    with RunProgress(common.quiet or common.as_json) as progress:
        return run_pool(each.execution, folder, patience=Patience(silence=run.timeout), progress=progress)


def _show(
    document: ServingPlanDocument,
    runs: list[_PoolRun],
    reports: list[ExecutionReport],
    kept: Path | None,
    common: CommonOptions,
) -> None:
    """Print the steps that each pool takes; its other kind of step belongs to the other pool."""
    from meshwright.cli.render.console import make_table, print_json, stdout_console
    from meshwright.planner.output_file import is_our_json, replace_file
    from meshwright.profiler.executor.report import report_text
    from meshwright.profiler.executor.serving_run import step_times
    from meshwright.simcore.domain.execution import execution_mapping
    from meshwright.units import format_change

    rows, written = [], []
    for each, report in zip(runs, reports, strict=True):
        measured, predicted = asdict(step_times(report)), asdict(each.predicted)
        kinds = ("prefill", "decode") if each.pool.role == "aggregated" else (each.pool.role,)
        found: list[dict[str, object]] = [
            {
                "pool": each.pool.role,
                "step": kind,
                "batch": each.execution.plan.micro_batch_size,
                "prompt": each.execution.workload.sequence_length,
                "predicted_seconds": predicted[kind],
                "measured_seconds": measured[kind],
                "error": predicted[kind] / measured[kind] - 1.0 if each.is_same_device else None,
            }
            for kind in kinds
        ]
        rows += found
        if kept is not None:
            path = kept / each.pool.role / "report.json"
            text = report_text(report, execution_mapping(each.execution), found)
            replace_file(path, text.encode(), force=common.force, is_ours=is_our_json)
            written.append(str(path))
    device, note = runs[0].execution.device, _note(document, runs)
    if common.as_json:
        print_json(
            {
                "kind": "serving_execution",
                "model": document.job.model.name,
                "cluster": document.job.cluster.id,
                "engine": document.plan.engine,
                "device": device,
                "num_steps": runs[0].execution.num_steps,
                "steps": rows,
                "note": note,
                "written": written,
            }
        )
        return
    console = stdout_console()
    titles = ("", False), ("sequences", True), ("prompt", True), ("predicted", True), ("measured", True)
    table = make_table(
        f"{document.job.model.name} on {device}, steps of one replica", (*titles, ("error", True))
    )
    for row in rows:
        error = row["error"]
        table.add_row(
            f"{row['step']}, {next(_degrees(each.pool) for each in runs if each.pool.role == row['pool'])}",
            str(row["batch"]),
            str(row["prompt"]),
            f"{row['predicted_seconds']:.4g} s",
            f"{row['measured_seconds']:.4g} s",
            format_change(error) if isinstance(error, float) else "-",
        )
    console.print(table)
    console.print(note, soft_wrap=True)
    for line in written:
        console.print(f"Wrote {line}", soft_wrap=True)


def _degrees(pool: ServingPool) -> str:
    names = ("pp", "attention_dp", "ep", "moe_tp")
    above = [f"{name.replace('_', ' ')} {getattr(pool, name)}" for name in names if getattr(pool, name) > 1]
    return " ".join([f"tp {pool.tp}", *above])


def _note(document: ServingPlanDocument, runs: list[_PoolRun]) -> str:
    told = (
        f"Predicted is a step of {document.plan.engine}; measured are its operations in PyTorch, one by one"
    )
    if all(each.is_same_device for each in runs):
        return f"{told}, without the engine's kernels and graphs."
    gpu = document.job.cluster.gpu.id
    return (
        f"{told}. The prediction is of {gpu}, and this ran on {runs[0].execution.device}: it shows that the"
        " replica runs, not how fast."
    )


def _print_serving_commands(runs: list[_PoolRun], out: Path | None, common: CommonOptions) -> None:
    from meshwright.cli.render.console import print_json, stdout_console
    from meshwright.profiler.executor.launch import shell_line
    from meshwright.profiler.executor.serving_run import serving_commands

    base = _ANY_FOLDER if out is None else out
    commands = {}
    for each in runs:
        folder = base / each.pool.role
        if out is not None:
            prepare_run_folder(folder, each.execution, is_shared=False, force=common.force)
        started = serving_commands(each.execution, folder, _DRY_PORT)
        commands[each.pool.role] = [shell_line(command) for command in started]
    if common.as_json:
        print_json({"kind": "execution_commands", "folder": str(base), "commands": commands})
        return
    console = stdout_console()
    for role, lines in commands.items():
        console.print(f"# The {role} pool: 'meshwright run' starts each of these:", soft_wrap=True)
        for line in lines:
            console.print(line, soft_wrap=True)
