"""The ranked table of serving plans, and plans in a few words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from rich.table import Table

from meshwright.cli.render.console import make_table
from meshwright.planner.serving.answer import ServingAnswer, plan_figures
from meshwright.planner.serving.search import RankedUnit
from meshwright.simcore.domain.serving import ServingJob, ServingPlan, ServingPool
from meshwright.units import format_quantity

__all__ = [
    "gpus_text",
    "load_text",
    "plan_text",
    "plans_table",
    "pool_text",
    "short_plan_text",
    "time_text",
]

_UNUSED = "-"
# Heading, whether it is numeric, and what a value that all plans share is called in the line above the table; columns
# without such words have one in any case.
_COLUMNS: tuple[tuple[str, bool, str], ...] = (
    ("engine", False, "{}"),
    ("format", False, "{}"),
    ("pools", False, ""),
    ("GPUs", True, "{} GPUs"),
    ("token\nbudget", True, "{} tokens per step"),
    ("batch", True, "{} sequences per rank"),
    ("prefix\ncache", False, "prefix cache"),
    ("draft", True, "{} drafted tokens"),
    ("{load}", True, ""),
    ("tok/s\n/GPU", True, ""),
    ("tok/s\n/user", True, ""),
    ("TTFT\n{ttft} s", True, ""),
    ("TPOT\n{tpot} ms", True, ""),
    ("$/M\ntok", True, ""),
    ("J/\ntok", True, ""),
    ("binds", False, "{} binds"),
)


def plans_table(answer: ServingAnswer, num_plans: int) -> tuple[str, Table]:
    """Return what all of the best plans share, as a line that may be empty, and their table without it, best first."""
    shown = [(plan_figures(answer, ranked), ranked) for ranked in answer.outcome.ranked[:num_plans]]
    statistics = {metric: _statistic(shown[0][0], metric) for metric in ("ttft", "tpot")}
    rows = [_row(figures, ranked, statistics) for figures, ranked in shown]
    shared, headers, kept = [], [("#", True)], []
    for index, (name, is_numeric, words) in enumerate(_COLUMNS):
        values = {row[index] for row in rows}
        if values == {_UNUSED}:
            continue
        if words and len(rows) > 1 and len(values) == 1:
            shared.append(words.format(*values))
        else:
            headers.append(
                (name.format(load=answer.load_unit.replace("requests", "req"), **statistics), is_numeric)
            )
            kept.append(index)
    table = make_table("", tuple(headers))
    for column in table.columns:
        # Pools give way to figures where the terminal is narrow.
        column.no_wrap = column.header != "pools"
    for place, row in enumerate(rows, start=1):
        cells = (str(place), *(row[index] for index in kept))
        table.add_row(*cells, style="bold green" if place == 1 else None)
    return f"All of them: {', '.join(shared)}." if shared else "", table


def gpus_text(job: ServingJob, plan: ServingPlan) -> str:
    """Return how many GPUs of which kind a plan takes."""
    counts: Counter[str] = Counter()
    for pool in plan.pools:
        counts[job.cluster_of(pool.role).gpu.id] += pool.num_gpus
    return " + ".join(f"{count} x {gpu}" for gpu, count in counts.items())


def pool_text(pool: ServingPool) -> str:
    """Return a pool in a few words."""
    degrees = " ".join(
        f"{name} {getattr(pool, name)}"
        for name in ("tp", "pp", "attention_dp", "moe_tp", "ep", "redundant_experts")
        if getattr(pool, name) > (name != "redundant_experts")
    )
    return f"{pool.num_replicas} x ({degrees or '1 GPU'})"


def short_plan_text(plan: ServingPlan) -> str:
    """Return the pools of a plan in a few words."""
    if not plan.is_disaggregated:
        return pool_text(plan.pools[0])
    return f"P {pool_text(plan.pools[0])} + D {pool_text(plan.pools[1])}"


def plan_text(plan: ServingPlan) -> str:
    """Return a plan in words."""
    roles = " + ".join(f"{pool.role} {pool_text(pool)}" for pool in plan.pools)
    return f"{plan.engine} {plan.precision} {roles}"


def load_text(value: object) -> str:
    """Return a load."""
    assert isinstance(value, int | float)
    return f"{value:,.4g}"


def time_text(figures: Mapping[str, object], metric: str) -> str:
    """Return the 99th percentile of a latency, or its mean where that is all there is."""
    statistic = _statistic(figures, metric)
    value = figures.get(f"{metric}_{statistic}_seconds")
    if not isinstance(value, float):
        return _UNUSED
    return format_quantity(value, "seconds", 3) + ("" if statistic == "p99" else " mean")


def _statistic(figures: Mapping[str, object], metric: str) -> str:
    return "p99" if f"{metric}_p99_seconds" in figures else "mean"


def _row(figures: Mapping[str, object], ranked: RankedUnit, statistics: Mapping[str, str]) -> tuple[str, ...]:
    plan = ranked.plan
    first, last = plan.pools[0], plan.pools[-1]
    binding = figures["binding"]
    assert isinstance(binding, list)
    return (
        plan.engine,
        plan.precision if plan.kv_precision == "bf16" else f"{plan.precision}/kv {plan.kv_precision}",
        short_plan_text(plan),
        str(plan.num_gpus),
        str(first.max_num_batched_tokens),
        str(last.max_num_sequences),
        "yes" if first.has_prefix_cache else _UNUSED,
        str(last.num_speculative_tokens or _UNUSED),
        load_text(figures["load"]),
        f"{figures['output_tokens_per_second_per_gpu']:,.0f}",
        f"{figures['tokens_per_second_per_user']:,.0f}",
        _figure(figures, f"ttft_{statistics['ttft']}_seconds", 1.0),
        _figure(figures, f"tpot_{statistics['tpot']}_seconds", 1e-3),
        _figure(figures, "dollars_per_million_output_tokens", 1.0),
        _figure(figures, "joules_per_output_token", 1.0),
        " ".join(str(name) for name in binding),
    )


def _figure(figures: Mapping[str, object], name: str, unit: float) -> str:
    value = figures.get(name)
    return f"{value / unit:,.3g}" if isinstance(value, float) else _UNUSED
