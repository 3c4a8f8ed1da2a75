"""``meshwright diff`` and ``whatif`` for serving plans."""

from __future__ import annotations

from pathlib import Path

from meshwright.cli.options import CommonOptions

__all__ = ["diff_serving", "whatif_serving"]


def diff_serving(first: Path, second: Path, common: CommonOptions) -> None:
    """Simulate two serving plans, each on the load of its job, and show what differs."""
    from meshwright.cli.render.console import print_json
    from meshwright.cli.render.serving_difference import (
        print_serving_difference,
        serving_difference_mapping,
    )
    from meshwright.planner.serving.costs import JobCosts
    from meshwright.planner.serving.deployment import check_engine_runs
    from meshwright.planner.serving.plan_file import read_serving_plan
    from meshwright.planner.serving.run import serve_plan

    runs = []
    for path in (first, second):
        document = read_serving_plan(path)
        check_engine_runs(document.job, document.plan)
        runs.append(serve_plan(document, JobCosts(document.job, common.calibrations), seed=common.seed))
    names = str(first), str(second)
    if common.as_json:
        print_json(serving_difference_mapping(names, runs[0], runs[1]))
    else:
        print_serving_difference(names, runs[0], runs[1])


def whatif_serving(
    plan: Path, changes: tuple[str, ...], other_flags: dict[str, object], common: CommonOptions
) -> None:
    """Simulate a serving plan on its machines and on changed ones.

    Parameters
    ----------
    plan : Path
        The plan file.
    changes : tuple[str, ...]
        ``KEY=VALUE`` each.
    other_flags : dict[str, object]
        Options that serving plans do not have, by flag; False or None where not given.
    common : CommonOptions
        Shared options.
    """
    from meshwright.cli.render.console import print_json
    from meshwright.cli.render.serving_difference import (
        print_serving_difference,
        serving_difference_mapping,
    )
    from meshwright.errors import SpecError
    from meshwright.planner.changes import parse_change
    from meshwright.planner.serving.comparison import changed_document
    from meshwright.planner.serving.costs import JobCosts
    from meshwright.planner.serving.deployment import check_engine_runs
    from meshwright.planner.serving.plan_file import read_serving_plan
    from meshwright.planner.serving.run import serve_plan

    given = [flag for flag, value in other_flags.items() if value]
    if given:
        raise SpecError(f"{', '.join(given)}: not for serving plans; give --set KEY=VALUE")
    if not changes:
        raise SpecError("a serving plan needs --set KEY=VALUE, such as --set gpu.memory=141GiB")
    document = read_serving_plan(plan)
    changed = changed_document(document, [parse_change(text) for text in changes])
    check_engine_runs(changed.job, changed.plan)
    runs = [
        serve_plan(each, JobCosts(each.job, common.calibrations), seed=common.seed)
        for each in (document, changed)
    ]
    if common.as_json:
        print_json(serving_difference_mapping(("now", "then"), runs[0], runs[1]))
    else:
        print_serving_difference(("now", "then"), runs[0], runs[1])
