"""What can be changed of a serving job, by name: the machines as of any job, the load and the limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from meshwright.errors import SpecError
from meshwright.planner.changes import MACHINE_CHANGES, Change
from meshwright.planner.scenario import Scenario, with_workload
from meshwright.simcore.domain.serving import LengthDistribution, ServingJob, Slo, SloLimit

__all__ = ["serving_changes"]

# Limits that may be set where the job states none of the kind.
_USUAL_LIMITS = ("ttft_p99", "tpot_p99")


def serving_changes(job: ServingJob) -> Mapping[str, Change]:
    """Return everything that can be changed of a serving job, by key."""
    limits = dict.fromkeys((*_USUAL_LIMITS, *(limit.name for limit in job.slo.limits)))
    return {
        **MACHINE_CHANGES,
        **{change.key: change for change in (*_WORKLOAD, *(_limit(name) for name in limits))},
    }


def _with_rate(scenario: Scenario[ServingJob], rate: float) -> Scenario[ServingJob]:
    if scenario.job.workload.arrival not in ("poisson", "gamma"):
        raise SpecError(f"the load is {_load_text(scenario.job)}, not requests at a rate")
    return with_workload(scenario, rate=rate)


def _with_clients(scenario: Scenario[ServingJob], clients: int) -> Scenario[ServingJob]:
    if scenario.job.workload.arrival != "closed_loop":
        raise SpecError(f"the load is {_load_text(scenario.job)}, not clients of a closed loop")
    return with_workload(scenario, concurrency=clients)


def _load_text(job: ServingJob) -> str:
    workload = job.workload
    if workload.arrival == "trace":
        return f"the requests of {workload.requests_file} at their own times"
    return f"{workload.concurrency} clients" if workload.concurrency else f"{workload.rate:g} requests/s"


def _length(field: str, meaning: str) -> Change:
    def read(scenario: Scenario[Any]) -> float | None:
        lengths: LengthDistribution | None = getattr(scenario.job.workload, field)
        return None if lengths is None else lengths.mean

    def write(scenario: Scenario[Any], value: float) -> Scenario[Any]:
        lengths: LengthDistribution | None = getattr(scenario.job.workload, field)
        if lengths is None:
            raise SpecError(f"lengths are those of {scenario.job.workload.requests_file}")
        return with_workload(scenario, **{field: replace(lengths, mean=value)})

    return Change(key=f"workload.{field}", meaning=meaning, kind="count", read=read, write=write)


def _limit(name: str) -> Change:
    metric, _, statistic = name.rpartition("_")

    def read(scenario: Scenario[Any]) -> float | None:
        return next((each.seconds for each in scenario.job.slo.limits if each.name == name), None)

    def write(scenario: Scenario[Any], seconds: float) -> Scenario[Any]:
        new = SloLimit(metric=metric, statistic=statistic, seconds=seconds)  # type: ignore[arg-type]  # checked there
        kept = tuple(each for each in scenario.job.slo.limits if each.name != name)
        return replace(scenario, job=replace(scenario.job, slo=Slo(limits=(*kept, new))))

    return Change(key=f"slo.{name}", meaning="limit", kind="seconds", read=read, write=write)


_WORKLOAD: tuple[Change, ...] = (
    Change(
        key="workload.rate",
        meaning="requests that arrive per second",
        kind="per_second",
        read=lambda scenario: scenario.job.workload.rate or None,
        write=_with_rate,
    ),
    Change(
        key="workload.concurrency",
        meaning="clients of a closed loop",
        kind="count",
        read=lambda scenario: scenario.job.workload.concurrency or None,
        write=_with_clients,
    ),
    _length("input_length", "mean prompt tokens of a request"),
    _length("output_length", "mean answer tokens of a request"),
)
