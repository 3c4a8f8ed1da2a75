"""``meshwright whatif``: a plan on changed machines, and the best plan there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from meshwright.cli.options import CommonOptions, common_options

if TYPE_CHECKING:
    from meshwright.cli.render.whatif import WhatifView
    from meshwright.planner.changes import Change
    from meshwright.planner.scenario import Scenario
    from meshwright.planner.search.base import Progress
    from meshwright.planner.whatif import Subject

__all__ = ["command"]

_HEADROOM = "5 %"


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
@click.option(
    "--objective",
    help="What the best plan is best at: throughput, or goodput_per_gpu of a serving plan, unless said.",
)
@click.option("--memory-headroom", help="Training: share of the memory that must stay free [5 %].")
@click.option(
    "--flops",
    type=click.Choice(["causal", "full-attention"]),
    help="Training: how MFU counts attention [causal].",
)
@common_options
def command(  # one parameter per flag is click's calling convention
    *,
    plan: Path,
    changes: tuple[str, ...],
    lists: bool,
    factor: float,
    replan: bool,
    objective: str | None,
    memory_headroom: str | None,
    flops: str | None,
    common: CommonOptions,
) -> None:
    """Change what PLAN (a file that 'meshwright plan' wrote) runs on: the same plan then, and the best plan then.

    Training plans are compared by their iteration time, serving plans by the load they carry within their limits.

    Without --set, scale each property of machines and software down and up, and rank them by their effect.

    \b
    meshwright whatif plans/1.yaml --set fabric.bandwidth=800Gbit/s --set gpu.memory=141GiB
    meshwright whatif plans/1.yaml
    """
    from meshwright.cli.render.console import ProgressLine, print_json
    from meshwright.cli.render.whatif import (
        print_keys,
        print_sensitivities,
        print_whatif,
        sensitivities_mapping,
        whatif_mapping,
    )
    from meshwright.planner.changes import apply_changes, parse_change
    from meshwright.planner.sensitivity import sensitivities
    from meshwright.planner.serving.plan_file import is_serving_plan
    from meshwright.planner.whatif import answer

    with ProgressLine(common.quiet or common.as_json) as progress:
        if is_serving_plan(plan):
            refused = {"--memory-headroom": memory_headroom, "--flops": flops}
            asked = _serving(plan, objective, refused, progress, common, serves=bool(changes))
        else:
            asked = _training(plan, objective, memory_headroom, flops, progress, common)
        today, view = asked.today, asked.view
        parsed = [parse_change(text, asked.known) for text in changes]
        if lists:
            print_keys(today, asked.known, as_json=common.as_json)
            return
        if not parsed:
            result = sensitivities(today, asked.subject, factor=factor, searches_all=replan)
        else:
            then = answer(apply_changes(today, parsed), asked.subject)
            now = answer(today, asked.subject)
    if parsed and common.as_json:
        print_json(whatif_mapping(view, parsed, today, now, then))
    elif parsed:
        print_whatif(view, parsed, today, now, then)
    elif common.as_json:
        print_json(sensitivities_mapping(view, today, result))
    else:
        print_sensitivities(view, asked.headline, result, replan=replan)


class _Asked(NamedTuple):
    """A plan of one kind, ready to be asked about: its job, what can be changed of it, its search and its tables."""

    today: Scenario[Any]
    known: Mapping[str, Change]
    subject: Subject[Any, Any]
    view: WhatifView[Any]
    headline: str


def _training(
    path: Path,
    objective: str | None,
    memory_headroom: str | None,
    flops: str | None,
    progress: Progress,
    common: CommonOptions,
) -> _Asked:
    from meshwright.cli.render.explanation import plan_phrase
    from meshwright.cli.render.whatif_training import TrainingView
    from meshwright.planner.changes import CHANGES
    from meshwright.planner.objectives import OBJECTIVES
    from meshwright.planner.plan_file import read_plan
    from meshwright.planner.scenario import Scenario, scenario_context
    from meshwright.planner.space import SearchLimits
    from meshwright.planner.violations import tolerated_constraints
    from meshwright.planner.whatif import Question, TrainingSubject
    from meshwright.units import parse_quantity

    limits = SearchLimits(memory_headroom=parse_quantity(memory_headroom or _HEADROOM, "fraction"))
    chosen = _checked(objective or "throughput", OBJECTIVES)
    document = read_plan(path)
    job, plan = document.job, document.plan
    job.cluster.require_one_kind("whatif")
    today = Scenario(job=job, calibration_paths=common.calibrations)
    question = Question(
        limits=limits,
        objective=chosen,  # type: ignore[arg-type]  # one of OBJECTIVES
        flops=flops or "causal",  # type: ignore[arg-type]  # click.Choice holds the words
        tolerated=tolerated_constraints(scenario_context(today), plan, limits),
    )
    return _Asked(
        today=today,
        known=CHANGES,
        subject=TrainingSubject(plan=plan, question=question, progress=progress),
        view=TrainingView(),
        headline=f"{job.model.name} on {plan.num_gpus} x {job.cluster.gpu.id}: {plan_phrase(plan)}",
    )


def _serving(
    path: Path,
    objective: str | None,
    refused: dict[str, str | None],
    progress: Progress,
    common: CommonOptions,
    *,
    serves: bool,
) -> _Asked:
    from meshwright.cli.render.serving_plan_table import gpus_text, plan_text
    from meshwright.cli.render.whatif_serving import ServingView
    from meshwright.errors import SpecError
    from meshwright.planner.scenario import Scenario
    from meshwright.planner.serving.changes import serving_changes
    from meshwright.planner.serving.job_file import SERVING_OBJECTIVES
    from meshwright.planner.serving.plan_file import read_serving_plan
    from meshwright.planner.serving.whatif import ServingSubject

    given = [flag for flag, value in refused.items() if value]
    if given:
        raise SpecError(f"{', '.join(given)}: not for serving plans")
    chosen = _checked(objective or "goodput_per_gpu", SERVING_OBJECTIVES)
    document = read_serving_plan(path)
    job, plan = document.job, document.plan
    return _Asked(
        today=Scenario(job=job, calibration_paths=common.calibrations),
        known=serving_changes(job),
        subject=ServingSubject(
            plan=plan,
            objective=chosen,  # type: ignore[arg-type]  # one of SERVING_OBJECTIVES
            progress=progress,
            seed=common.seed,
            serves_stated_load=serves,
        ),
        view=ServingView(is_closed_loop=job.workload.arrival == "closed_loop"),
        headline=f"{job.model.name} on {gpus_text(job, plan)}: {plan_text(plan)}",
    )


def _checked(objective: str, known: Sequence[str]) -> str:
    from meshwright.errors import SpecError, did_you_mean

    if objective not in known:
        raise SpecError(
            f"objective: unknown value '{objective}'{did_you_mean(objective, known) or ';'} known: {', '.join(known)}"
        )
    return objective
