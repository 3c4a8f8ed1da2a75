"""``meshwright diff``: what two plans differ in, and what that does."""

from __future__ import annotations

from pathlib import Path

import click

from meshwright.cli.options import CommonOptions, common_options

__all__ = ["command"]


@click.command("diff", short_help="Compare two plans field by field and term by term.")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option(
    "--flops",
    type=click.Choice(["causal", "full-attention"]),
    default="causal",
    show_default=True,
    help="How MFU counts attention.",
)
@common_options
def command(*, first: Path, second: Path, flops: str, common: CommonOptions) -> None:
    """Compare the plan files FIRST and SECOND: fields, jobs, time, memory and cost term by term.

    \b
    meshwright diff plans/1.yaml plans/2.yaml
    """
    from meshwright.errors import SpecError
    from meshwright.planner.serving.plan_file import is_serving_plan

    are_serving = [is_serving_plan(path) for path in (first, second)]
    if all(are_serving):
        from meshwright.cli.compare_serving import diff_serving

        diff_serving(first, second, common)
        return
    if any(are_serving):
        served, trained = (first, second) if are_serving[0] else (second, first)
        raise SpecError(f"{served} is a serving plan and {trained} is not; compare two of one kind")

    from meshwright.cli.render.console import print_json
    from meshwright.cli.render.difference import difference_mapping, print_difference
    from meshwright.costmodels.context import cost_context
    from meshwright.planner.explanation import explain_plan
    from meshwright.planner.plan_file import read_plan

    documents = read_plan(first), read_plan(second)
    explained = [
        explain_plan(
            cost_context(document.job, calibration_paths=common.calibrations),
            document.plan,
            flops,  # type: ignore[arg-type]  # click.Choice holds the words
        )
        for document in documents
    ]
    names = str(first), str(second)
    if common.as_json:
        print_json(difference_mapping(names, documents, (explained[0], explained[1])))
    else:
        print_difference(names, documents, (explained[0], explained[1]))
