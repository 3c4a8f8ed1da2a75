"""``meshwright explain``: where a plan's time and memory go, and what another plan would change."""

from __future__ import annotations

from pathlib import Path

import click

from meshwright.cli.options import CommonOptions, common_options

__all__ = ["command"]


@click.command("explain", short_help="Say where a plan's time and memory go, and why.")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--against",
    metavar="FIELD=VALUE,...",
    help="Force these fields of the plan (tp=8,pp=4) and say what changes, or which constraint forbids it.",
)
@click.option(
    "--memory-headroom",
    default="5 %",
    show_default=True,
    help="Share of the memory that the forced plan must leave free.",
)
@click.option(
    "--flops",
    type=click.Choice(["causal", "full-attention"]),
    default="causal",
    show_default=True,
    help="How MFU counts attention.",
)
@click.option("--long-context", is_flag=True, help="Serving: what the KV cache costs from 4K to 10M tokens.")
@common_options
def command(
    *,
    plan: Path,
    against: str | None,
    memory_headroom: str,
    flops: str,
    long_context: bool,
    common: CommonOptions,
) -> None:
    """Split the iteration of PLAN (a file that 'meshwright plan' wrote) into terms that add up, stage by stage.

    \b
    meshwright explain plans/1.yaml
    meshwright explain plans/1.yaml --against tp=8,pp=4
    """
    from meshwright.cli.render.console import print_json
    from meshwright.cli.render.explanation import explanation_mapping, print_explanation
    from meshwright.costmodels.context import cost_context
    from meshwright.errors import SpecError
    from meshwright.planner.explanation import explain_plan
    from meshwright.planner.plan_file import read_plan
    from meshwright.planner.serving.plan_file import is_serving_plan
    from meshwright.planner.space import SearchLimits
    from meshwright.planner.variant import force_fields, parse_fields
    from meshwright.planner.violations import tolerated_constraints
    from meshwright.planner.whatif import Question, given_plan
    from meshwright.units import parse_quantity

    if is_serving_plan(plan):
        from meshwright.cli.simulate_serving import explain_serving

        explain_serving(plan, {"--against": against}, long_context=long_context, common=common)
        return
    if long_context:
        raise SpecError(f"{plan}: --long-context goes with serving plans, this is a training plan")
    forced = parse_fields(against) if against is not None else None
    limits = SearchLimits(memory_headroom=parse_quantity(memory_headroom, "fraction"))
    document = read_plan(plan)
    context = cost_context(document.job, calibration_paths=common.calibrations)
    explanation = explain_plan(context, document.plan, flops)  # type: ignore[arg-type]  # click.Choice holds the words
    variant = outcome = None
    if forced is not None:
        document.job.cluster.require_one_kind("explain --against")
        question = Question(
            limits=limits,
            flops=flops,  # type: ignore[arg-type]  # as above
            tolerated=tolerated_constraints(context, document.plan, limits),
        )
        variant = force_fields(document.job.model, document.job.cluster, document.plan, forced)
        outcome = given_plan(context, variant, question)
    if common.as_json:
        print_json(explanation_mapping(document, explanation, variant, outcome))
    else:
        print_explanation(document, explanation, variant, outcome, flops)
