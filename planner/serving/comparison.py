"""Two serving plans side by side: latencies, memory and cost term by term, each on the load of its own job."""

from __future__ import annotations

from dataclasses import asdict, fields

from meshwright.planner.difference import FieldDifference, TermDifference, section_differences
from meshwright.planner.serving.plan_file import ServingPlanDocument, serving_plan_mapping
from meshwright.planner.serving.run import ServingRun
from meshwright.simcore.domain.serving import PoolRole, ServingPool
from meshwright.units import format_quantity

__all__ = [
    "figure_terms",
    "latency_terms",
    "memory_terms",
    "serving_field_differences",
    "serving_sentence",
]

_ROLES: tuple[PoolRole, ...] = ("aggregated", "prefill", "decode")


def serving_field_differences(
    first: ServingPlanDocument, second: ServingPlanDocument
) -> tuple[FieldDifference, ...]:
    """Return the fields of plan, model, clusters, workload and limits that differ, in that order."""
    one, other = first.job, second.job
    return section_differences(
        (
            ("plan", _without_pools(first), _without_pools(second)),
            *(
                (role, _written(first, role), _written(second, role))
                for role in _ROLES
                if _pool(first, role) is not None or _pool(second, role) is not None
            ),
            ("model", one.model, other.model),
            ("cluster", one.cluster, other.cluster),
            ("prefill cluster", one.prefill_cluster, other.prefill_cluster),
            ("workload", one.workload, other.workload),
            ("slo", _limits(first), _limits(second)),
        )
    )


def latency_terms(first: ServingRun, second: ServingRun) -> tuple[TermDifference, ...]:
    """Return the mean time to the first token by part, and the means and tails of what users wait for [s]."""
    parts = [asdict(run.metrics.ttft_split) for run in (first, second)]
    terms = [_term(f"TTFT: {name}", parts[0][name], parts[1][name]) for name in parts[0]]
    for metric in ("ttft", "tpot", "e2e"):
        for word in ("mean", "p99"):
            values = (getattr(getattr(run.metrics, metric), word) for run in (first, second))
            terms.append(_term(f"{metric.upper()} {word}", *values))
    return tuple(terms)


def memory_terms(first: ServingRun, second: ServingRun) -> tuple[TermDifference, ...]:
    """Return where the memory of a rank goes, by pool [B]; a role that one plan lacks has no figures there."""
    terms = []
    for role in _ROLES:
        pools = [_pool(run.document, role) for run in (first, second)]
        held = [
            None if pool is None else run.costs.memory(run.document.plan, pool)
            for run, pool in zip((first, second), pools, strict=True)
        ]
        if held == [None, None]:
            continue
        for use in ("weight_bytes", "overhead_bytes", "kv_cache_bytes"):
            values = (None if each is None else float(getattr(each, use)) for each in held)
            terms.append(_term(f"{role}: {use.removesuffix('_bytes').replace('_', ' ')}", *values))
    return tuple(terms)


def figure_terms(first: ServingRun, second: ServingRun) -> tuple[TermDifference, ...]:
    """Return GPUs, rates, energy and cost of each."""

    def figures(run: ServingRun) -> dict[str, float | None]:
        metrics = run.metrics
        return {
            "GPUs": float(run.document.plan.num_gpus),
            "requests/s": metrics.requests_per_second,
            "goodput requests/s": metrics.goodput,
            "output tokens/s/GPU": metrics.output_tokens_per_second_per_gpu,
            "W per GPU": run.watts_per_gpu,
            "J per output token": run.joules_per_output_token,
            "$ per million output tokens": run.dollars_per_million_output_tokens,
        }

    mine, others = figures(first), figures(second)
    return tuple(_term(name, mine[name], others[name]) for name in mine)


def serving_sentence(first: ServingRun, second: ServingRun) -> str:
    """Return which part of the latencies changes most, in one sentence."""
    terms = {each.name: each for each in latency_terms(first, second)}
    parts = [each for name, each in terms.items() if name.startswith("TTFT: ")]
    most = max(parts, key=lambda each: abs(each.change or 0.0))
    ttft, tpot = terms["TTFT mean"], terms["TPOT mean"]
    sentence = f"the first token {_change_text(ttft)}"
    if ttft.change and most.change:
        sentence += f", most of it {most.name.removeprefix('TTFT: ')} ({_signed(most.change)})"
    return f"{sentence}; each further token {_change_text(tpot)}."


def _without_pools(document: ServingPlanDocument) -> dict[str, object]:
    plan = document.plan
    return {each.name: getattr(plan, each.name) for each in fields(plan) if each.name != "pools"}


def _pool(document: ServingPlanDocument, role: PoolRole) -> ServingPool | None:
    return next((pool for pool in document.plan.pools if pool.role == role), None)


def _written(document: ServingPlanDocument, role: PoolRole) -> dict[str, object]:
    """Return what a plan file says of a pool; nothing where the plan has none."""
    pools = serving_plan_mapping(document.plan)["pools"]
    assert isinstance(pools, list)
    return next(({**pool, "role": None} for pool in pools if pool["role"] == role), {})


def _limits(document: ServingPlanDocument) -> dict[str, float]:
    return {limit.name: limit.seconds for limit in document.job.slo.limits}


def _term(name: str, first: float | None, second: float | None) -> TermDifference:
    return TermDifference(name=name, first=first, second=second)


def _change_text(term: TermDifference) -> str:
    assert term.first is not None
    assert term.second is not None
    change = term.second - term.first
    if abs(change) <= 5e-4 * term.first:
        return "takes as long"
    return f"takes {abs(change) / term.first:.1%} {'longer' if change > 0.0 else 'less'} ({_signed(change)})"


def _signed(seconds: float) -> str:
    return f"{'+' if seconds > 0.0 else '-'}{format_quantity(abs(seconds), 'seconds', 3)}"
