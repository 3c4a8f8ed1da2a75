"""Tables of plans and of one prediction."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from meshwright.cli.render.console import make_table
from meshwright.costmodels.prediction import Prediction
from meshwright.planner.objectives import Objective
from meshwright.planner.search.base import RankedPlan
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.units import format_quantity

__all__ = ["FLOPS_WORDS", "memory_table", "plan_row", "ranked_table"]

# How the printed MFU counts attention; every figure says so.
FLOPS_WORDS = {"causal": "causal attention counted half", "full-attention": "attention counted in full"}
_OBJECTIVE_COLUMNS: dict[Objective, str] = {"cost": "$/T tokens", "energy": "J/token"}
_COLUMNS = (
    ("#", True),
    ("GPUs", True),
    ("tp", True),
    ("pp", True),
    ("vpp", True),
    ("dp", True),
    ("schedule", False),
    ("micro", True),
    ("SP", False),
    ("recompute", False),
    ("sharding", False),
    ("iteration", True),
    ("tok/s/GPU", True),
    ("MFU", True),
    ("memory", True),
    ("free", True),
    ("bubble", True),
    ("exposed", True),
)


def ranked_table(title: str, ranked: Sequence[RankedPlan], objective: Objective) -> Table:
    """Return the table of the best plans, best first; with the objective's own figure when it is not time."""
    figure = _OBJECTIVE_COLUMNS.get(objective)
    table = make_table(title, _COLUMNS if figure is None else (*_COLUMNS, (figure, True)))
    for place, entry in enumerate(ranked, start=1):
        cells = plan_row(entry.plan, entry.prediction)
        if figure is not None:
            cells = (*cells, _objective_cell(entry.prediction, objective))
        table.add_row(str(place), *cells, style="bold green" if place == 1 else None)
    return table


def _objective_cell(prediction: Prediction, objective: Objective) -> str:
    if objective == "energy":
        return f"{prediction.joules_per_token:.3g}"
    dollars = prediction.dollars_per_trillion_tokens
    return "no price" if dollars is None else f"{dollars:,.0f}"


def plan_row(plan: ParallelPlan, prediction: Prediction) -> tuple[str, ...]:
    """Return the cells of one plan, without its place."""
    result = prediction.iteration
    sharding = plan.sharding if plan.sharding_group is None else f"{plan.sharding}({plan.sharding_group})"
    exposed = result.exposed_communication_time / result.iteration_time
    return (
        str(plan.num_gpus),
        str(plan.tp),
        str(plan.pp),
        str(plan.vpp),
        str(plan.dp),
        plan.schedule,
        str(plan.micro_batch_size),
        "yes" if plan.sequence_parallel else "-",
        plan.recompute,
        sharding,
        f"{prediction.iteration_time:.4g} s",
        f"{prediction.tokens_per_second_per_gpu:,.0f}",
        f"{prediction.mfu:.1%}",
        format_quantity(prediction.peak_memory_bytes, "bytes", 3),
        f"{prediction.memory_headroom:.0%}",
        f"{result.bubble_fraction:.1%}",
        f"{exposed:.1%}",
    )


def memory_table(prediction: Prediction) -> Table:
    """Return the memory breakdown of first, fullest and last stage."""
    total = prediction.memory.total
    stages = sorted({0, prediction.fullest_stage, len(total) - 1})
    table = make_table(
        "Memory of one rank", (("use", False), *((f"stage {stage}", True) for stage in stages))
    )
    for use in prediction.memory.row(0):
        table.add_row(
            use.replace("_", " "),
            *(format_quantity(prediction.memory.row(stage)[use], "bytes", 3) for stage in stages),
        )
    table.add_section()
    table.add_row("total", *(format_quantity(float(total[stage]), "bytes", 3) for stage in stages))
    return table
