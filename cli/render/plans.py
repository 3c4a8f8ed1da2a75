"""Tables of plans and of one prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table

from meshwright.cli.render.console import make_table
from meshwright.costmodels.prediction import Prediction
from meshwright.planner.objectives import Objective
from meshwright.planner.search.base import RankedPlan
from meshwright.simcore.domain.plan import ParallelPlan, partition_layers
from meshwright.units import format_quantity

__all__ = ["FLOPS_WORDS", "memory_table", "offload_text", "plan_row", "ranked_table", "recompute_text"]

# How the printed MFU counts attention; every figure says so.
FLOPS_WORDS = {"causal": "causal attention counted half", "full-attention": "attention counted in full"}
_OBJECTIVE_COLUMNS: dict[Objective, str] = {"cost": "$/T tokens", "energy": "J/token"}
_COLUMNS = (
    ("#", True),
    ("GPUs", True),
    ("tp", True),
    ("pp", True),
    ("vpp", True),
    ("cp", True),
    ("dp", True),
    ("ep", True),
    ("schedule", False),
    ("vocabulary", False),
    ("layers", False),
    ("micro", True),
    ("SP", False),
    ("recompute", False),
    ("sharding", False),
    ("offload", False),
    ("iteration", True),
    ("contended", True),
    ("tok/s/GPU", True),
    ("MFU", True),
    ("memory", True),
    ("free", True),
    ("bubble", True),
    ("exposed", True),
)


# Columns that are shown only where some plan of the table makes use of them.
_RARE_COLUMNS = ("cp", "ep", "vocabulary", "layers", "offload", "contended")
_WORD_COLUMNS = ("cp", "offload", "recompute")
_UNUSED = "-"


def ranked_table(
    title: str, ranked: Sequence[RankedPlan], objective: Objective, *, folds_offload: bool = False
) -> Table:
    """Return the table of the best plans, best first; with the objective's own figure when it is not time.

    Context and expert parallelism, a split vocabulary, uneven stages and offload have a column where a plan uses them, and the time with
    contention, by which plans are then ranked, where it was simulated. With
    ``folds_offload`` plans that differ from a better one in what they offload alone stand below the table.
    """
    figure = _OBJECTIVE_COLUMNS.get(objective)
    columns = _COLUMNS if figure is None else (*_COLUMNS, (figure, True))
    variants = _offload_variants(ranked) if folds_offload else {}
    folded = {place for places in variants.values() for place in places}
    rows = []
    for place, entry in enumerate(ranked, start=1):
        if place in folded:
            continue
        cells = (str(place), *plan_row(entry.plan, entry.prediction, entry.contended_time))
        rows.append(cells if figure is None else (*cells, _objective_cell(entry.prediction, objective)))
    shown = [
        index
        for index, (name, _) in enumerate(columns)
        if name not in _RARE_COLUMNS or any(row[index] != _UNUSED for row in rows)
    ]
    table = make_table(title, tuple(columns[index] for index in shown))
    for column in table.columns:
        # Words give way to figures where the terminal is narrow.
        column.no_wrap = column.header not in _WORD_COLUMNS
    for place, row in enumerate(rows):
        table.add_row(*(row[index] for index in shown), style="bold green" if place == 0 else None)
    if variants:
        table.caption = "\n".join(_variants_text(ranked, place, variants[place]) for place in variants)
        table.caption_justify = "left"
    return table


def _offload_variants(ranked: Sequence[RankedPlan]) -> dict[int, list[int]]:
    """Return, by the place of a plan, the later places of plans that differ from it in what they offload alone."""
    first: dict[ParallelPlan, int] = {}
    variants: dict[int, list[int]] = {}
    for place, entry in enumerate(ranked, start=1):
        at_rest = replace(
            entry.plan,
            optimizer_offload="none",
            optimizer_offload_fraction=1.0,
            parameter_offload="none",
            activation_offload=False,
        )
        best = first.setdefault(at_rest, place)
        if best != place:
            variants.setdefault(best, []).append(place)
    return variants


def _variants_text(ranked: Sequence[RankedPlan], place: int, others: Sequence[int]) -> str:
    best, last = ranked[place - 1].seconds, max(ranked[each - 1].seconds for each in others)
    names = ", ".join(str(each) for each in others)
    return f"{names}: plan {place} with other offload, up to {last / best - 1.0:.2%} slower"


def _objective_cell(prediction: Prediction, objective: Objective) -> str:
    if objective == "energy":
        return f"{prediction.joules_per_token:.3g}"
    dollars = prediction.dollars_per_trillion_tokens
    return "no price" if dollars is None else f"{dollars:,.0f}"


def plan_row(
    plan: ParallelPlan, prediction: Prediction, contended_time: float | None = None
) -> tuple[str, ...]:
    """Return the cells of one plan, without its place; its time with contention [s] where it is known."""
    result = prediction.iteration
    sharding = plan.sharding if plan.sharding_group is None else f"{plan.sharding}({plan.sharding_group})"
    tp = str(plan.tp)
    if plan.layer_groups:
        tp = "/".join(dict.fromkeys(str(group.tp) for group in plan.layer_groups))
        sharding = "/".join(dict.fromkeys(group.sharding for group in plan.layer_groups))
    exposed = result.exposed_communication_time / result.iteration_time
    return (
        str(plan.num_gpus),
        tp,
        str(plan.pp),
        str(plan.vpp),
        f"{plan.cp} {plan.cp_method}" if plan.cp > 1 else _UNUSED,
        str(plan.dp),
        _expert_cell(plan),
        plan.schedule,
        _UNUSED if plan.vocab_parallel == "none" else plan.vocab_parallel,
        _layers_cell(plan),
        str(plan.micro_batch_size),
        "yes" if plan.sequence_parallel else "-",
        recompute_text(plan),
        sharding,
        offload_text(plan) or _UNUSED,
        f"{prediction.iteration_time:.4g} s",
        _UNUSED if contended_time is None else f"{contended_time:.4g} s",
        f"{prediction.tokens_per_second_per_gpu:,.0f}",
        f"{prediction.mfu:.1%}",
        format_quantity(prediction.peak_memory_bytes, "bytes", 3),
        f"{prediction.memory_headroom:.0%}",
        f"{result.bubble_fraction:.1%}",
        f"{exposed:.1%}",
    )


def recompute_text(plan: ParallelPlan) -> str:
    """Return what is recomputed: the word, the modules, or how many layers of each virtual stage."""
    if plan.recompute_modules:
        return " ".join(plan.recompute_modules)
    return plan.recompute if plan.recompute_layers is None else f"{plan.recompute} x {plan.recompute_layers}"


def offload_text(plan: ParallelPlan) -> str:
    """Return what rests in host memory (or on drives), in a few words; empty where nothing does."""
    parts = []
    if plan.optimizer_offload != "none":
        share = "" if plan.optimizer_offload_fraction == 1.0 else f" {plan.optimizer_offload_fraction:.0%}"
        parts.append(f"optimizer{share}" + ("" if plan.optimizer_offload == "cpu" else " nvme"))
    if plan.parameter_offload != "none":
        parts.append("weights" + ("" if plan.parameter_offload == "cpu" else " nvme"))
    if plan.activation_offload:
        parts.append("activations")
    return ", ".join(parts)


def _expert_cell(plan: ParallelPlan) -> str:
    if plan.ep == plan.etp == 1:
        return _UNUSED
    return str(plan.ep) if plan.etp == 1 else f"{plan.ep} x {plan.etp}"


def _layers_cell(plan: ParallelPlan) -> str:
    """Return first, most and last layers of the virtual stages where they differ from the frameworks' own split."""
    layers = plan.layers_per_stage
    if len(layers) < 2 or layers == partition_layers(plan.num_layers, len(layers)):
        return _UNUSED
    return "/".join(
        str(count) for count in (layers[0], *([max(layers[1:-1])] if layers[2:] else []), layers[-1])
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
