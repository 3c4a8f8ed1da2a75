"""The long-context report: what the KV cache of a request costs from 4K to 10M tokens."""

from __future__ import annotations

from dataclasses import asdict, replace

from rich.table import Table

from meshwright.cli.options import CommonOptions
from meshwright.cli.render.console import make_table, print_json, stdout_console
from meshwright.cli.render.serving_plan_table import pool_text
from meshwright.planner.serving.costs import JobCosts
from meshwright.planner.serving.infeasible import infeasible_serving
from meshwright.planner.serving.job_file import ServingRequest
from meshwright.planner.serving.long_context import LongContextRow, long_context_rows
from meshwright.planner.serving.sizing import Sizing
from meshwright.planner.serving.space import candidate_space, option_pool
from meshwright.planner.serving.unit_simulation import JobSimulator
from meshwright.simcore.domain.serving import ServingJob, ServingPlan
from meshwright.simcore.serving.traces import load_requests
from meshwright.units import format_quantity

__all__ = ["print_long_context", "show_long_context"]


def show_long_context(request: ServingRequest, common: CommonOptions) -> None:
    """Print the report for the replica of a request with the largest cache within one node.

    Raises
    ------
    InfeasiblePlanError
        If no replica of the space fits.
    """
    job = request.job
    costs = JobCosts(job, common.calibrations)
    trace = load_requests(job.workload, seed=common.seed) if job.workload.requests_file is not None else None
    profile = JobSimulator(job, costs, trace=trace, seed=common.seed).profile()
    one_node = replace(request, job=replace(job, cluster=replace(job.cluster, num_nodes=1)))
    max_gpus = min(request.limits.max_gpus or job.cluster.num_gpus, job.cluster.node.num_gpus)
    space = candidate_space(one_node, profile, costs, max_gpus)
    options = [each for each in space.options if not each.is_prefill_only]
    if not options:
        sizing = Sizing(objective=request.objective, max_gpus=max_gpus, demand=0.0, mean_output=1.0)
        raise infeasible_serving(one_node, profile, sizing, space, costs)
    option = max(
        options,
        key=lambda each: (each.kv_cache_tokens * each.degrees["attention_dp"], -each.degrees["pp"]),
    )
    plan = ServingPlan(
        engine=option.engine,
        engine_version=request.engine_version,
        precision=option.precision,
        kv_precision=option.kv_precision,
        pools=(option_pool(option),),
    )
    print_long_context(job, plan, costs, as_json=common.as_json)


def print_long_context(job: ServingJob, plan: ServingPlan, costs: JobCosts, *, as_json: bool) -> None:
    """Print the four costs by context length on one replica of the pool that decodes."""
    pool = plan.pools[-1]
    # Of that pool's GPU alone, what calibration and constants say of a prefill pool is left out.
    plan = replace(plan, pools=(replace(pool, role="aggregated"),))
    gpu = job.cluster_of(pool.role).gpu.id
    rows = long_context_rows(job, plan, pool, costs)
    notes = costs.certainty_notes(plan)
    if as_json:
        print_json(
            {
                "kind": "long_context_report",
                "model": job.model.name,
                "engine": plan.engine,
                "precision": plan.precision,
                "kv_precision": plan.kv_precision,
                "gpu": gpu,
                "num_gpus": pool.gpus_per_replica,
                "rows": [_mapping(row) for row in rows],
                **costs.calibration_identities(plan),
                "constants": list(notes),
            }
        )
        return
    console = stdout_console()
    one = replace(pool, num_replicas=1)
    console.print(
        f"{job.model.name} on one replica {pool_text(one)} of {gpu}: {plan.engine} {plan.precision}, KV cache in "
        f"{plan.kv_precision}",
        style="bold",
        soft_wrap=True,
    )
    console.print(_rows_table(rows))
    if any(row.is_beyond_model for row in rows):
        console.print(f"* beyond the {job.model.max_position_embeddings:,} positions the model states.")
    console.print("Kernels were measured up to 131,072 tokens; longer prompts continue their last growth.")
    for note in notes:
        console.print(f"Constants: {note}.", soft_wrap=True)
    for note in costs.calibration_notes(plan):
        console.print(f"Calibration: {note}.", soft_wrap=True)


def _rows_table(rows: tuple[LongContextRow, ...]) -> Table:
    table = make_table(
        "",
        (
            ("context", True),
            ("KV cache", True),
            ("prefill", True),
            ("sequences", True),
            ("token, alone", True),
            ("token, full cache", True),
            ("swap out and in", True),
        ),
    )
    for row in rows:
        fits = row.concurrency >= 1.0
        table.add_row(
            f"{row.context:,}" + ("*" if row.is_beyond_model else ""),
            format_quantity(row.kv_bytes, "bytes", 3),
            format_quantity(row.prefill_time, "seconds", 3),
            f"{row.concurrency:,.0f}" if fits else "does not fit",
            format_quantity(row.decode_time, "seconds", 3),
            format_quantity(row.full_decode_time, "seconds", 3) if fits else "-",
            format_quantity(row.swap_time, "seconds", 3),
        )
    return table


def _mapping(row: LongContextRow) -> dict[str, object]:
    names = {
        "context": "context_tokens",
        "prefill_time": "prefill_seconds",
        "decode_time": "decode_seconds",
        "full_decode_time": "full_decode_seconds",
        "swap_time": "swap_seconds",
    }
    return {names.get(key, key): value for key, value in asdict(row).items()}
