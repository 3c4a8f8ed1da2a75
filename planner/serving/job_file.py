"""Serving jobs as users write them: a YAML file, flags, or both (flags win)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.specs import ClusterSpec, GpuSpec
from meshwright.hardware_specs.yaml_document import Section, read_yaml
from meshwright.planner.job_parts import cluster_of_request, model_of_request, path_beside, skip_key
from meshwright.planner.serving.acceptance_keys import acceptance_of_section
from meshwright.planner.serving.limits import ServingLimits, limits_of_section
from meshwright.planner.serving.replica_shapes import vendor_reason
from meshwright.planner.serving.target import check_target, engines_of_target
from meshwright.planner.serving.workload_section import slo_limit, slo_of_section, workload_of_section
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.serving import (
    ENGINES,
    Arrival,
    EngineName,
    LengthDistribution,
    ServingJob,
    ServingWorkload,
    Slo,
)
from meshwright.simcore.domain.speculation import Acceptance
from meshwright.simcore.domain.workload import PRECISIONS
from meshwright.units import parse_quantity

if TYPE_CHECKING:
    from meshwright.planner.serving.expert_routing import ServedRouting

__all__ = [
    "SERVING_OBJECTIVES",
    "ServingFlags",
    "ServingObjective",
    "ServingRequest",
    "read_serving_request",
]

ServingObjective = Literal["goodput_per_gpu", "cost", "throughput"]
SERVING_OBJECTIVES: tuple[str, ...] = get_args(ServingObjective)
# Requests drawn where a trace is none and nothing is said: enough for a 99th percentile of ten.
_DEFAULT_REQUESTS = 1000
# Limits with a flag of their own; the others come with --slo.
_LIMIT_FLAGS = ("ttft_p99", "tpot_p99", "ttft_mean", "tpot_mean", "itl_p99", "e2e_p99")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingFlags:
    """What flags say; None where a flag was not given. ``slo`` maps ``ttft_p99`` to text such as ``2 s``."""

    model: str | None = None
    cluster: str | None = None
    prefill_cluster: str | None = None
    requests: str | None = None
    rate: str | None = None
    concurrency: int | None = None
    input_length: int | None = None
    output_length: int | None = None
    engine: str | None = None
    precision: str | None = None
    objective: str | None = None
    target: str | None = None
    routing: Path | None = None
    slo: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRequest:
    """What to plan.

    Parameters
    ----------
    job : ServingJob
        The resolved job.
    engines : tuple[EngineName, ...]
        Engines to try.
    engine_version : str
        Release of a fixed engine; empty is the newest described.
    acceptance : Acceptance | None
        How many drafted tokens stand; None where the user has no draft model, and nothing is drafted.
    routing : ServedRouting | None
        Recorded routing of the experts; None leaves the skew the kernels were measured with.
    origin : Mapping[str, str]
        What the user named: model and cluster by name or path.
    """

    job: ServingJob
    objective: ServingObjective = "goodput_per_gpu"
    limits: ServingLimits = field(default_factory=ServingLimits)
    engines: tuple[EngineName, ...] = cast("tuple[EngineName, ...]", ENGINES)
    engine_version: str = ""
    acceptance: Acceptance | None = None
    routing: ServedRouting | None = None
    origin: Mapping[str, str] = field(default_factory=dict)


def read_serving_request(path: Path | None, flags: ServingFlags) -> ServingRequest:
    """Return the request of a serving job file and flags.

    Parameters
    ----------
    path : Path | None
        The job file; None when flags say everything.
    flags : ServingFlags
        Values that win over the file's.

    Raises
    ------
    SpecError
        If something is missing, unknown or impossible: file, line and key, or the flag.
    """
    section = read_yaml(path) if path is not None else None
    if section is not None:
        if section.integer("schema_version") != 1:
            raise section.error("schema_version", "this release reads version 1")
        if section.choice("kind", ("training", "serving")) != "serving":
            raise section.error("kind", "flags of a serving job go with 'kind: serving'")
    model, model_origin = model_of_request(section, flags.model)
    cluster, cluster_origin = cluster_of_request(section, flags.cluster)
    apart, origin = None, {"model": model_origin, "cluster": cluster_origin}
    if flags.prefill_cluster is not None or (section is not None and section.has("prefill_cluster")):
        apart, origin["prefill_cluster"] = cluster_of_request(
            section, flags.prefill_cluster, "prefill_cluster"
        )
    workload = _workload(section, flags)
    slo = _slo(section, flags)
    for each in (cluster, apart):
        if each is not None:
            each.require_one_kind("plan --serve")
    gpus = (cluster.gpu,) if apart is None else (cluster.gpu, apart.gpu)
    engines, version = _engines(section, flags, gpus)
    objective = _word(section, "objective", flags.objective, SERVING_OBJECTIVES) or "goodput_per_gpu"
    limits = limits_of_section(section.optional_section("constraints") if section else None)
    if flags.precision is not None:
        _check_word("precision", flags.precision, PRECISIONS)
        limits = replace(limits, allowed={**limits.allowed, "precision": (flags.precision,)})
    if flags.target is not None:
        limits = replace(limits, target=flags.target)
    if limits.target is not None:
        check_target(limits.target)
        engines = engines_of_target(limits.target, engines)
    if apart is not None:
        _check_apart(limits)
    acceptance = acceptance_of_section(section) if section is not None else None
    routing = _routing(section, flags)
    if section is not None:
        section.close()
    return ServingRequest(
        job=ServingJob(model=model, cluster=cluster, workload=workload, slo=slo, prefill_cluster=apart),
        objective=cast("ServingObjective", objective),
        limits=limits,
        engines=engines,
        engine_version=version,
        acceptance=acceptance,
        routing=None if routing is None else _served_routing(routing, model, cluster),
        origin=origin,
    )


def _check_apart(limits: ServingLimits) -> None:
    """Raise when restrictions do not go with prefill pools on a cluster of their own."""
    if "disaggregated" not in limits.words("mode", ("disaggregated",)):
        raise SpecError("prefill_cluster: goes with disaggregated plans, which constraints.mode leaves out")
    if limits.max_gpus is not None:
        raise SpecError(
            "constraints.max_gpus does not say of which cluster; leave it out and state fewer nodes of cluster or "
            "prefill_cluster"
        )


def _routing(section: Section | None, flags: ServingFlags) -> Path | None:
    """Return the file of recorded routing: the flag's, or else the job file's, found beside it."""
    of_file = section.optional_text("routing") if section else None
    if flags.routing is not None or of_file is None or section is None:
        return flags.routing
    return Path(path_beside(section, of_file))


def _served_routing(path: Path, model: ModelSpec, cluster: ClusterSpec) -> ServedRouting:
    # Few jobs bring routing data; the solvers behind it take a while to import.
    from meshwright.planner.serving.expert_routing import ServedRouting

    return ServedRouting(path, model, cluster)


def _workload(section: Section | None, flags: ServingFlags) -> ServingWorkload:
    """Return the load of the file with what flags say in its place.

    Flags that name a load (requests, rate or clients) replace the file's arrivals; lengths stay, unless the flags or a
    request file bring their own.
    """
    part = section.optional_section("workload") if section else None
    of_file = workload_of_section(part) if part is not None else None
    if flags.rate is not None and flags.concurrency is not None:
        raise SpecError("--rate and --concurrency each say how requests come; give one of them")
    rate = None if flags.rate is None else _flag_quantity("--rate", flags.rate, "per_second")
    requests_file = of_file.requests_file if of_file is not None else None
    requests_file = flags.requests if flags.requests is not None else requests_file
    inputs, outputs = (
        None if value is None else LengthDistribution(mean=value)
        for value in (flags.input_length, flags.output_length)
    )
    if requests_file is not None and (inputs or outputs):
        raise SpecError(f"{requests_file} has lengths of its own; drop --input-length and --output-length")
    if of_file is not None and requests_file is None:
        inputs, outputs = inputs or of_file.input_length, outputs or of_file.output_length
    if of_file is None and requests_file is None:
        _check_drawn(flags)
    arrival: Arrival = of_file.arrival if of_file is not None else "trace"
    concurrency = of_file.concurrency if of_file is not None else 0
    if rate is not None:
        arrival, concurrency = ("gamma" if arrival == "gamma" else "poisson"), 0
    elif flags.concurrency is not None:
        arrival, rate, concurrency = "closed_loop", 0.0, flags.concurrency
    elif flags.requests is not None:
        arrival, rate, concurrency = "trace", 0.0, 0
    elif of_file is not None:
        rate = of_file.rate
    return ServingWorkload(
        arrival=arrival,
        rate=rate or 0.0,
        burstiness=of_file.burstiness if of_file is not None else 1.0,
        concurrency=concurrency,
        num_requests=of_file.num_requests if of_file is not None else _DEFAULT_REQUESTS,
        input_length=inputs,
        output_length=outputs,
        prefix_length=of_file.prefix_length if of_file is not None else 0,
        num_prefix_groups=of_file.num_prefix_groups if of_file is not None else 1,
        num_turns=of_file.num_turns if of_file is not None else 1,
        requests_file=requests_file,
    )


def _check_drawn(flags: ServingFlags) -> None:
    """Raise unless flags alone describe requests that can be drawn."""
    if flags.rate is None and flags.concurrency is None:
        raise SpecError(
            "no load: give --requests FILE, --rate '4 /s' or --concurrency 64 (with --input-length and --output-length), "
            "or 'workload:' in the job file"
        )
    for name in ("input_length", "output_length"):
        if getattr(flags, name) is None:
            raise SpecError(
                f"no --{name.replace('_', '-')}: give the tokens of a request, or --requests FILE"
            )


def _slo(section: Section | None, flags: ServingFlags) -> Slo:
    of_file = slo_of_section(section.optional_section("slo") if section else None)
    limits = {limit.name: limit for limit in of_file.limits}
    for name, text in flags.slo.items():
        flag = f"--{name.replace('_', '-')}" if name in _LIMIT_FLAGS else f"--slo {name}"
        seconds = _flag_quantity(flag, text, "seconds")
        try:
            limits[name] = slo_limit(name, seconds)
        except SpecError as error:
            raise SpecError(f"{flag}: {error}") from None
    return Slo(limits=tuple(limits.values()))


def _engines(
    section: Section | None, flags: ServingFlags, gpus: tuple[GpuSpec, ...]
) -> tuple[tuple[EngineName, ...], str]:
    version = section.optional_text("engine_version") if section else None
    engine = _word(section, "engine", flags.engine, ENGINES)
    if engine is None:
        if version is not None and section is not None:
            raise section.error("engine_version", "goes with 'engine:'")
        usable = tuple(name for name in ENGINES if not any(vendor_reason(name, gpu) for gpu in gpus))
        return cast("tuple[EngineName, ...]", usable), ""
    for gpu in gpus:
        reason = vendor_reason(engine, gpu)
        if reason is not None:
            raise SpecError(f"engine: {reason}")
    return (cast("EngineName", engine),), version or ""


def _word(section: Section | None, key: str, flag: str | None, known: tuple[str, ...]) -> str | None:
    """Return the word of a flag, or else of the file; None where neither has one."""
    if flag is not None:
        skip_key(section, key)
        _check_word(key, flag, known)
        return flag
    if section is None or not section.has(key):
        return None
    return section.choice(key, known)


def _check_word(key: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        raise SpecError(
            f"{key}: unknown value '{word}'{did_you_mean(word, known) or ';'} known: {', '.join(known)}"
        )


def _flag_quantity(flag: str, text: str, kind: Literal["per_second", "seconds"]) -> float:
    try:
        return parse_quantity(text, kind)
    except SpecError as error:
        raise SpecError(f"{flag}: {error}") from None
