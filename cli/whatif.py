"""``meshwright whatif``: a plan on changed machines, and the best plan there."""

from __future__ import annotations

from pathlib import Path

import click

from meshwright.cli.options import CommonOptions, common_options

__all__ = ["command"]


@click.command("whatif", short_help="Change machines, workload or software and plan again.")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change this (repeatable): gpu.memory=141GiB, fabric.bandwidth=800Gbit/s, cluster.nodes=16, ...",
)
@click.option("--list", "lists", is_flag=True, help="List the keys with their present values.")
@click.option(
    "--factor",
    type=float,
    default=2.0,
    show_default=True,
    help="Without --set: divide and multiply each property by it.",
)
@click.option(
    "--replan", is_flag=True, help="Without --set: search the best plan for every property (takes minutes)."
)
@click.option("--objective", default="throughput", show_default=True, help="What the best plan is best at.")
@click.option(
    "--memory-headroom",
    default="5 %",
    show_default=True,
    help="Share of the memory that must stay free.",
)
@click.option(
    "--flops",
    type=click.Choice(["causal", "full-attention"]),
    default="causal",
    show_default=True,
    help="How MFU counts attention.",
)
@common_options
def command(  # one parameter per flag is click's calling convention
    *,
    plan: Path,
    changes: tuple[str, ...],
    lists: bool,
    factor: float,
    replan: bool,
    objective: str,
    memory_headroom: str,
    flops: str,
    common: CommonOptions,
) -> None:
    """Change what PLAN (a file that 'meshwright plan' wrote) runs on: the same plan then, and the best plan then.

    Without --set, scale each property of machines and software down and up, and rank them by their effect.

    \b
    meshwright whatif plans/1.yaml --set fabric.bandwidth=800Gbit/s --set gpu.memory=141GiB
    meshwright whatif plans/1.yaml
    """
    from meshwright.planner.serving.plan_file import is_serving_plan

    if is_serving_plan(plan):
        from meshwright.cli.compare_serving import whatif_serving

        whatif_serving(plan, changes, {"--list": lists, "--replan": replan}, common)
        return

    from meshwright.cli.render.console import ProgressLine, print_json
    from meshwright.cli.render.whatif import (
        print_keys,
        print_sensitivities,
        print_whatif,
        sensitivities_mapping,
        whatif_mapping,
    )
    from meshwright.errors import SpecError, did_you_mean
    from meshwright.planner.changes import apply_changes, parse_change
    from meshwright.planner.objectives import OBJECTIVES
    from meshwright.planner.plan_file import read_plan
    from meshwright.planner.scenario import Scenario, scenario_context
    from meshwright.planner.sensitivity import sensitivities
    from meshwright.planner.space import SearchLimits
    from meshwright.planner.violations import tolerated_constraints
    from meshwright.planner.whatif import Question, answer
    from meshwright.units import parse_quantity

    if objective not in OBJECTIVES:
        raise SpecError(
            f"objective: unknown value '{objective}'{did_you_mean(objective, OBJECTIVES) or ';'} "
            f"known: {', '.join(OBJECTIVES)}"
        )
    parsed = [parse_change(text) for text in changes]
    limits = SearchLimits(memory_headroom=parse_quantity(memory_headroom, "fraction"))
    document = read_plan(plan)
    today = Scenario(job=document.job, calibration_paths=common.calibrations)
    question = Question(
        limits=limits,
        objective=objective,  # type: ignore[arg-type]  # one of OBJECTIVES
        flops=flops,  # type: ignore[arg-type]  # click.Choice holds the words
        tolerated=tolerated_constraints(scenario_context(today), document.plan, limits),
    )
    if lists:
        print_keys(today, as_json=common.as_json)
        return
    with ProgressLine(common.quiet or common.as_json) as progress:
        if not parsed:
            result = sensitivities(
                today, document.plan, question, progress, factor=factor, searches_all=replan
            )
        else:
            changed = apply_changes(today, parsed)
            then = answer(changed, document.plan, question, progress)
            now = answer(today, document.plan, question, progress)
    if not parsed:
        if common.as_json:
            print_json(sensitivities_mapping(document, result))
        else:
            print_sensitivities(document, result, replan=replan)
    elif common.as_json:
        print_json(whatif_mapping(document, parsed, today, now, then))
    else:
        print_whatif(document, parsed, today, now, then)
