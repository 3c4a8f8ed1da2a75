"""The load and the limits of a serving deployment, as job and plan files write them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.yaml_document import Section
from meshwright.simcore.domain.serving import (
    ARRIVALS,
    SLO_METRICS,
    SLO_STATISTICS,
    Arrival,
    LengthDistribution,
    ServingWorkload,
    Slo,
    SloLimit,
    SloMetric,
    SloStatistic,
)

__all__ = [
    "SLO_NAMES",
    "slo_limit",
    "slo_mapping",
    "slo_of_section",
    "workload_mapping",
    "workload_of_section",
]

SLO_NAMES: tuple[str, ...] = tuple(
    f"{metric}_{statistic}" for metric in SLO_METRICS for statistic in SLO_STATISTICS
)


def workload_of_section(section: Section) -> ServingWorkload:
    """Return the load that a ``workload:`` section describes; the section is closed.

    Parameters
    ----------
    section : Section
        Holds one of ``requests: FILE``; ``arrival: poisson`` with ``rate: 4 /s``; ``concurrency: 64``; the last
        two with ``input_length`` and ``output_length`` (a number of tokens, or a distribution as keys), or with a
        ``requests`` file whose lengths are meant. A path that lies beside the job file is read from there.

    Raises
    ------
    SpecError
        If a key is unknown, missing or does not go with the others: file, line and key.
    """
    requests_file = section.optional_text("requests")
    num_requests = section.optional_integer("num_requests", minimum=1)
    default = "closed_loop" if section.has("concurrency") else "poisson" if section.has("rate") else ""
    known = tuple(word for word in ARRIVALS if word != "trace" or requests_file is not None)
    if requests_file is not None:
        for key in ("input_length", "output_length"):
            if section.has(key):
                raise section.error(
                    key, "goes with drawn requests; those of a file have lengths of their own"
                )
        beside = Path(section.file).parent / requests_file
        requests_file = str(beside) if beside.is_file() else requests_file
        default = default or "trace"
    elif not default and not section.has("arrival"):
        raise section.error(
            "", "no load: give 'requests: FILE', 'arrival: poisson' with 'rate: 4 /s', or 'concurrency: 64'"
        )
    arrival = section.choice("arrival", known, default) if default else section.choice("arrival", known)
    settings: dict[str, Any] = {
        "rate": section.quantity("rate", "per_second", default=0.0),
        "burstiness": section.number("burstiness", default=1.0),
        "concurrency": section.integer("concurrency", default=0, minimum=0),
        "num_requests": 1000 if num_requests is None else num_requests,
        "input_length": _length(section, "input_length"),
        "output_length": _length(section, "output_length"),
        "prefix_length": section.integer("prefix_length", default=0, minimum=0),
        "num_prefix_groups": section.integer("num_prefix_groups", default=1, minimum=1),
        "num_turns": section.integer("num_turns", default=1, minimum=1),
    }
    # Before the load is built: a mistyped key must not show as a missing one.
    section.close()
    if arrival in ("closed_loop", "trace") and settings["rate"]:
        raise section.error("rate", f"{arrival} arrivals have no rate of their own; remove it")
    if arrival != "closed_loop" and settings["concurrency"]:
        raise section.error("concurrency", f"{arrival} arrivals have no clients; remove it or 'arrival:'")
    try:
        return ServingWorkload(arrival=cast("Arrival", arrival), requests_file=requests_file, **settings)
    except SpecError as error:
        raise section.error("", str(error)) from None


def workload_mapping(workload: ServingWorkload) -> dict[str, object]:
    """Return a load as plain data that :func:`workload_of_section` reads back; defaults are left out."""
    mapping: dict[str, object] = {}
    if workload.requests_file is not None:
        mapping["requests"] = workload.requests_file
    mapping["arrival"] = workload.arrival
    if workload.rate:
        mapping["rate"] = f"{workload.rate!r} /s"
    for key in (
        "burstiness",
        "concurrency",
        "num_requests",
        "prefix_length",
        "num_prefix_groups",
        "num_turns",
    ):
        value = getattr(workload, key)
        default = next(each.default for each in dataclasses.fields(workload) if each.name == key)
        if value != default or (key == "num_requests" and workload.requests_file is None):
            mapping[key] = value
    for key in ("input_length", "output_length"):
        length = getattr(workload, key)
        if length is not None:
            mapping[key] = _length_mapping(length)
    return mapping


def slo_of_section(section: Section | None) -> Slo:
    """Return the limits of an ``slo:`` section (``ttft_p99: 2 s``); none without a section.

    Raises
    ------
    SpecError
        If a limit is unknown or no time: file, line and key.
    """
    if section is None:
        return Slo()
    limits = []
    for key in section:
        if key not in SLO_NAMES:
            raise section.error(
                key, f"unknown limit{did_you_mean(key, SLO_NAMES) or ';'} known: {', '.join(SLO_NAMES)}"
            )
        seconds = section.quantity(key, "seconds")
        try:
            limits.append(slo_limit(key, seconds))
        except SpecError as error:
            raise section.error(key, str(error)) from None
    section.close()
    return Slo(limits=tuple(limits))


def slo_limit(name: str, seconds: float) -> SloLimit:
    """Return the limit of a name such as ``ttft_p99``.

    Raises
    ------
    SpecError
        If the name is unknown or the time is not above 0.
    """
    if name not in SLO_NAMES:
        raise SpecError(
            f"unknown limit '{name}'{did_you_mean(name, SLO_NAMES) or ';'} known: {', '.join(SLO_NAMES)}"
        )
    metric, _, statistic = name.partition("_")
    return SloLimit(
        metric=cast("SloMetric", metric), statistic=cast("SloStatistic", statistic), seconds=seconds
    )


def slo_mapping(slo: Slo) -> dict[str, object]:
    """Return the limits as plain data that :func:`slo_of_section` reads back."""
    return {limit.name: f"{limit.seconds!r} s" for limit in slo.limits}


def _length(section: Section, key: str) -> LengthDistribution | None:
    if not section.has(key):
        return None
    if not section.is_section(key):
        return LengthDistribution(mean=section.number(key, minimum=1))
    part = section.section(key)
    mean = part.number("mean", minimum=1)
    kind = part.choice("kind", ("fixed", "uniform_ratio", "lognormal"), default="fixed")
    ratio = part.number("ratio", default=1.0)
    variation = part.number("coefficient_of_variation", default=1.0)
    part.close()
    try:
        return LengthDistribution(
            mean=mean,
            kind=kind,  # type: ignore[arg-type]  # a word of this very list
            ratio=ratio,
            coefficient_of_variation=variation,
        )
    except SpecError as error:
        raise section.error(key, str(error)) from None


def _length_mapping(length: LengthDistribution) -> object:
    if length == LengthDistribution(mean=length.mean):
        return int(length.mean) if float(length.mean).is_integer() else length.mean
    mapping = dataclasses.asdict(length)
    defaults = dataclasses.asdict(LengthDistribution(mean=length.mean))
    kept = {"mean", "kind"}
    return {key: value for key, value in mapping.items() if key in kept or value != defaults[key]}
