"""``meshwright simulate`` and ``explain`` for serving plans: requests through the engines, figures, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.cli.options import CommonOptions

if TYPE_CHECKING:
    from meshwright.planner.serving.plan_file import ServingPlanDocument

__all__ = ["explain_serving", "simulate_serving"]


def explain_serving(
    plan: Path, other_flags: dict[str, object], *, long_context: bool, common: CommonOptions
) -> None:
    """Split the time to the first token of a serving plan, or say what long contexts cost it.

    Parameters
    ----------
    plan : Path
        The plan file.
    other_flags : dict[str, object]
        As in :func:`simulate_serving`.
    long_context : bool
        The four costs of the KV cache by context length instead, on the pool that decodes.
    common : CommonOptions
        Shared options.
    """
    if not long_context:
        simulate_serving(
            plan,
            other_flags,
            requests=None,
            timeline=None,
            out=None,
            explains=True,
            policy=None,
            common=common,
        )
        return
    from meshwright.cli.render.serving_long_context import print_long_context
    from meshwright.planner.serving.costs import JobCosts
    from meshwright.planner.serving.deployment import check_engine_runs
    from meshwright.planner.serving.plan_file import read_serving_plan

    _refuse_training_flags(other_flags)
    document = read_serving_plan(plan)
    check_engine_runs(document.job, document.plan)
    costs = JobCosts(document.job, common.calibrations)
    print_long_context(document.job, document.plan, costs, as_json=common.as_json)


def simulate_serving(
    plan: Path,
    other_flags: dict[str, object],
    *,
    requests: Path | None,
    timeline: Path | None,
    out: Path | None,
    explains: bool,
    policy: str | None,
    common: CommonOptions,
) -> None:
    """Simulate a serving plan request by request.

    Parameters
    ----------
    plan : Path
        The plan file.
    other_flags : dict[str, object]
        Options that mean nothing for serving, by flag; None or empty where not given.
    requests : Path | None
        Requests to serve instead of the plan's own load.
    timeline, out : Path | None
        Trace of all engine steps; folder of ``requests.csv`` and ``metrics.json``.
    explains : bool
        Split the time to the first token.
    policy : str | None
        How every pool forms its steps instead of as the plan says, whether its engine can or not.
    common : CommonOptions
        Shared options.
    """
    from meshwright.cli.render.console import print_json
    from meshwright.cli.render.serving_simulation import (
        check_serving_outputs,
        print_serving_simulation,
        serving_simulation_mapping,
        write_serving_simulation,
    )
    from meshwright.planner.serving.costs import JobCosts
    from meshwright.planner.serving.deployment import check_engine_runs
    from meshwright.planner.serving.plan_file import read_serving_plan
    from meshwright.planner.serving.run import serve_plan

    _refuse_training_flags(other_flags)
    document = read_serving_plan(plan)
    if requests is not None:
        document = _with_requests(document, requests)
    check_engine_runs(document.job, document.plan)
    if policy is not None:
        document = _with_policy(document, policy)
    check_serving_outputs(timeline, out, force=common.force)
    costs = JobCosts(document.job, common.calibrations)
    run = serve_plan(document, costs, seed=common.seed, is_recording=timeline is not None)
    written = write_serving_simulation(run, timeline, out, force=common.force)
    if common.as_json:
        print_json({**serving_simulation_mapping(run), "written": written})
    else:
        print_serving_simulation(run, written, explains=explains)


def _refuse_training_flags(flags: dict[str, object]) -> None:
    from meshwright.errors import SpecError

    given = [flag for flag, value in flags.items() if value]
    if given:
        raise SpecError(
            f"{', '.join(given)} {'go' if len(given) > 1 else 'goes'} with training plans, not with serving plans"
        )


def _with_requests(document: ServingPlanDocument, requests: Path) -> ServingPlanDocument:
    from meshwright.simcore.domain.serving import ServingWorkload
    from meshwright.simcore.serving.traces import has_lengths_only

    own = document.job.workload
    if own.arrival != "trace" and has_lengths_only(requests):
        workload = ServingWorkload(
            arrival=own.arrival,
            rate=own.rate,
            burstiness=own.burstiness,
            concurrency=own.concurrency,
            requests_file=str(requests),
        )
    else:
        workload = ServingWorkload(arrival="trace", requests_file=str(requests))
    return replace(document, job=replace(document.job, workload=workload))


def _with_policy(document: ServingPlanDocument, word: str) -> ServingPlanDocument:
    from meshwright.errors import SpecError
    from meshwright.planner.serving.deployment import with_policy

    try:
        return replace(document, plan=with_policy(document.plan, word))
    except SpecError as error:
        raise SpecError(f"--policy: {error}") from None
