"""Jobs as users write them: a YAML file, flags, or both (flags win)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from meshwright.costmodels.software import list_software, load_software
from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.yaml_document import Section, read_yaml
from meshwright.planner.export import EXPORTERS
from meshwright.planner.job_parts import cluster_of_request, model_of_request, path_beside, skip_key
from meshwright.planner.objectives import OBJECTIVES, Objective
from meshwright.planner.space import LIMIT_KEYS, SearchLimits
from meshwright.planner.workload_options import WorkloadOptions, software_features, workload_options
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import (
    CP_METHODS,
    OFFLOADS,
    RECOMPUTES,
    SCHEDULES_KNOWN,
    SHARDINGS,
    VOCAB_PARALLELS,
)
from meshwright.simcore.domain.workload import PRECISIONS, Precision, TrainingWorkload

__all__ = ["JobFlags", "PlanRequest", "read_request"]

_DEFAULT_SOFTWARE = "megatron-core"
# Allocators fragment and predictions err: a plan that fills the last gibibyte dies in its first hour.
_DEFAULT_HEADROOM = 0.05
_WORDS: Mapping[str, tuple[str, ...]] = {
    "cp_method": CP_METHODS,
    "optimizer_offload": OFFLOADS,
    "parameter_offload": OFFLOADS,
    "recompute": RECOMPUTES,
    "schedule": SCHEDULES_KNOWN,
    "sharding": SHARDINGS,
    "vocab_parallel": VOCAB_PARALLELS,
}
_FLAGS = ("activation_offload", "sequence_parallel")
_OVERLAP_NOTE = (
    "Overlap: experts and exchange in 2, 4 or 8 chunks (Tutel) are tried as well, which no export target writes; "
    "--target, or 'constraints: expert_overlap: 1', plans without."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFlags:
    """What flags say; None where a flag was not given."""

    model: str | None = None
    cluster: str | None = None
    global_batch_size: int | None = None
    sequence_length: int | None = None
    precision: str | None = None
    software: str | None = None
    objective: str | None = None
    target: str | None = None
    routing: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What to plan: the resolved job, where it came from, and how to search.

    Parameters
    ----------
    origin : Mapping[str, str]
        What the user named: model and cluster by name or path.
    notes : tuple[str, ...]
        What was made of the user's files, one sentence each.
    """

    job: TrainingJob
    objective: Objective
    limits: SearchLimits
    origin: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_request(path: Path | None, flags: JobFlags) -> PlanRequest:
    """Return the request of a job file and flags.

    Parameters
    ----------
    path : Path | None
        The job file; None when flags say everything.
    flags : JobFlags
        Values that win over the file's.

    Raises
    ------
    SpecError
        If something is missing, unknown or impossible: file, line and key, or the flag.
    """
    section = read_yaml(path) if path is not None else None
    if section is not None:
        _check_kind(section)
    model, model_origin = model_of_request(section, flags.model)
    cluster, cluster_origin = cluster_of_request(section, flags.cluster)
    workload, routing, max_token_drop = _workload(section, flags)
    job = TrainingJob(
        model=model,
        cluster=cluster,
        workload=workload,
        software=_software(section, flags),
        features=software_features(section),
    )
    known = load_software(job.software).precisions
    if known and job.workload.precision not in known:
        raise SpecError(
            f"precision {job.workload.precision} does not exist in software {job.software}, which trains in "
            f"{', '.join(known)}; choose one of these or another --software"
        )
    of_file = section.optional_text("objective") if section else None
    objective = flags.objective or of_file or "throughput"
    if objective not in OBJECTIVES:
        message = (
            f"unknown value '{objective}'{did_you_mean(objective, OBJECTIVES) or ';'} "
            f"known: {', '.join(OBJECTIVES)}"
        )
        if section is not None and flags.objective is None:
            raise section.error("objective", message)
        raise SpecError(f"objective: {message}")
    limits = _limits(section.optional_section("constraints") if section else None, flags)
    if section is not None:
        section.close()
    notes: tuple[str, ...] = ()
    if routing is not None:
        job, notes = _with_routing(job, routing, max_token_drop)
    if _tries_overlap(job, limits):
        notes = (*notes, _OVERLAP_NOTE)
    return PlanRequest(
        job=job,
        objective=cast("Objective", objective),
        limits=limits,
        origin={"model": model_origin, "cluster": cluster_origin},
        notes=notes,
    )


def _check_kind(section: Section) -> None:
    if section.integer("schema_version") != 1:
        raise section.error("schema_version", "this release reads version 1")
    kind = section.choice("kind", ("training", "serving"))
    if kind == "serving":
        raise section.error("kind", "expected a training job, not a serving one")


def _workload(section: Section | None, flags: JobFlags) -> tuple[TrainingWorkload, Path | None, float | None]:
    """Return the workload, the file of routing data that decides its imbalance, and what a capacity may drop."""
    part = section.optional_section("workload") if section else None
    batch, length = flags.global_batch_size, flags.sequence_length
    precision, routing = flags.precision, flags.routing
    options = WorkloadOptions()
    max_token_drop = None
    if part is not None:
        options = workload_options(part)
        file_batch = part.optional_integer("global_batch_size", minimum=1)
        file_length = part.optional_integer("sequence_length", minimum=1)
        file_precision = part.choice("precision", PRECISIONS, default="bf16")
        batch = file_batch if batch is None else batch
        length = file_length if length is None else length
        precision = precision or file_precision
        file_routing = part.optional_text("routing")
        if routing is None and file_routing is not None:
            routing = Path(path_beside(part, file_routing))
        stated = next((key for key in ("routing_imbalance", "routing_by_ep") if part.has(key)), None)
        if routing is not None and stated is not None:
            raise part.error(stated, "routing data decide the imbalance; leave out one of both")
        max_token_drop = part.optional_number("max_token_drop")
        if max_token_drop is not None:
            _check_token_drop(part, max_token_drop, has_routing=routing is not None)
        part.close()
    if batch is None:
        raise SpecError(
            "no global batch size: give --global-batch-size or 'workload: global_batch_size:' (sequences)"
        )
    if length is None:
        raise SpecError("no sequence length: give --sequence-length or 'workload: sequence_length:' (tokens)")
    workload = TrainingWorkload(
        global_batch_size=batch,
        sequence_length=length,
        precision=cast("Precision", precision or "bf16"),
        **options,
    )
    return workload, routing, max_token_drop


def _check_token_drop(part: Section, share: float, *, has_routing: bool) -> None:
    if not 0.0 <= share < 1.0:
        raise part.error("max_token_drop", f"is a share of the tokens, 0 to below 1, not {share:g}")
    if not has_routing:
        raise part.error(
            "max_token_drop", "needs recorded routing to tell what a capacity drops; add 'routing:'"
        )
    if part.has("expert_capacity_factor"):
        raise part.error(
            "max_token_drop", "chooses the capacity factor; leave out it or expert_capacity_factor"
        )


def _with_routing(
    job: TrainingJob, path: Path, max_token_drop: float | None
) -> tuple[TrainingJob, tuple[str, ...]]:
    """Return the job with what a placement reaches on the routing data, and what to say of it."""
    # Few jobs bring routing data; the solvers behind it take a while to import.
    from meshwright.planner.routing_reach import reached_routing

    deduplicates = load_software(job.software).deduplicates_dispatch or "deepep" in job.features
    reached = reached_routing(
        path,
        job.model,
        job.cluster,
        deduplicates_dispatch=deduplicates,
        max_token_drop=max_token_drop,
        sequence_length=job.workload.sequence_length,
    )
    return replace(job, workload=replace(job.workload, routing_by_ep=reached.by_ep)), reached.notes


def _tries_overlap(job: TrainingJob, limits: SearchLimits) -> bool:
    """Return whether the space holds, unasked, chunks of the expert exchange that no export target writes."""
    is_bound = limits.target is not None or "expert_overlap" in limits.allowed
    is_routed = job.model.moe is not None and bool(job.workload.routing_by_ep)
    return is_routed and not is_bound and "expert_overlap" not in load_software(job.software).supports


def _software(section: Section | None, flags: JobFlags) -> str:
    if flags.software is not None:
        skip_key(section, "software")
        return load_software(flags.software).id
    if section is None:
        return _DEFAULT_SOFTWARE
    return section.choice("software", list_software(), default=_DEFAULT_SOFTWARE)


def _limits(section: Section | None, flags: JobFlags) -> SearchLimits:
    target = flags.target
    headroom: float | None = None
    allowed: dict[str, tuple[int | str | bool, ...]] = {}
    if section is not None:
        of_file = section.optional_text("target")
        target = target or of_file
        headroom = section.optional_quantity("memory_headroom", "fraction")
        for key in LIMIT_KEYS:
            if section.has(key):
                allowed[key] = _allowed(section, key)
        section.close()
    if target is not None and target not in EXPORTERS:
        message = (
            f"unknown target '{target}'{did_you_mean(target, EXPORTERS) or ';'} "
            f"known: {', '.join(sorted(EXPORTERS))}"
        )
        if section is not None and flags.target is None:
            raise section.error("target", message)
        raise SpecError(f"target: {message}")
    try:
        return SearchLimits(
            allowed=allowed,
            memory_headroom=_DEFAULT_HEADROOM if headroom is None else headroom,
            target=target,
        )
    except SpecError as error:
        raise error if section is None else section.error("memory_headroom", str(error)) from None


def _allowed(section: Section, key: str) -> tuple[int | str | bool, ...]:
    """Return the allowed values of one plan field: a single value or a list."""
    if key in _FLAGS:
        return (section.boolean(key),)
    if key in _WORDS:
        words = section.texts(key) if section.is_list(key) else (section.text(key),)
        if not words:
            raise section.error(key, "list at least one value, or leave the key out")
        for word in words:
            if word not in _WORDS[key]:
                raise section.error(
                    key,
                    f"unknown value '{word}'{did_you_mean(word, _WORDS[key]) or ';'} "
                    f"known: {', '.join(_WORDS[key])}",
                )
        return words
    numbers = section.integers(key) if section.is_list(key) else (section.integer(key, minimum=1),)
    if not numbers or min(numbers) < 1:
        raise section.error(key, "list whole numbers above zero")
    return numbers
