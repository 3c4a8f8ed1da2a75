"""``meshwright diff`` for serving plans."""

from __future__ import annotations

from pathlib import Path

from meshwright.cli.options import CommonOptions

__all__ = ["diff_serving"]


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
