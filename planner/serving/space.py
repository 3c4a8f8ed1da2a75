"""The space of serving plans: engines, formats, shapes and scheduler settings, each with its bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.planner.serving.candidates import (
    CandidateColumns,
    PrefillColumns,
    ReplicaOption,
    SchedulerChoices,
    concatenate,
    prefill_columns,
    replica_columns,
)
from meshwright.planner.serving.job_file import ServingRequest
from meshwright.planner.serving.load_profile import LoadProfile
from meshwright.planner.serving.replica_shapes import (
    SHAPE_RULES,
    ReplicaShapes,
    all_shapes,
    can_decode_alone,
    has_units,
)
from meshwright.simcore.domain.serving import EngineName, PolicyName, PoolRole, ServingPlan, ServingPool
from meshwright.simcore.domain.workload import Precision
from meshwright.simcore.serving.step_table import StepTable

__all__ = [
    "DEFAULT_POLICIES",
    "CandidateSpace",
    "CostSource",
    "candidate_space",
    "option_pool",
    "scheduler_choices",
    "wanted_precisions",
]

DEFAULT_POLICIES: Mapping[EngineName, PolicyName] = {
    "vllm": "chunked_prefill",
    "sglang": "prefill_first",
    "trtllm": "inflight",
}
_BUDGETS = (2048, 4096, 8192, 16384)
_MAX_NUM_SEQUENCES = (32, 64, 128, 256, 512, 1024)
# Drafts longer than this gain little at any published acceptance (Leviathan et al. 2022, arXiv 2211.17192, figure 3).
_DRAFTS = (0, 1, 2, 3, 4)
_EIGHT_BITS = ("fp8", "fp8_block", "mxfp8", "nvfp4")


class CostSource(Protocol):
    """What a search asks of the cost models."""

    def kv_cache_tokens(self, plan: ServingPlan, pool: ServingPool) -> int:
        """Return the tokens one rank's KV cache holds; 0 or less when the weights alone do not fit."""
        ...

    def step_table(self, plan: ServingPlan, pool: ServingPool) -> StepTable:
        """Return the step times of one replica."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CandidateSpace:
    """Everything a search chooses from.

    Parameters
    ----------
    options : tuple[ReplicaOption, ...]
        Shapes that every rule and the memory allow; those of speculation lengths follow each other.
    aggregated : CandidateColumns
        Replicas that prefill and decode.
    prefill, decode : PrefillColumns | None, CandidateColumns | None
        Sides of disaggregated plans; None where they are not searched.
    num_candidates : int
        Configurations of the space before any rule.
    rejections : Mapping[str, int]
        Configurations each constraint rejected.
    sentences : Mapping[str, str]
        What each constraint demands.
    """

    options: tuple[ReplicaOption, ...]
    aggregated: CandidateColumns | None
    prefill: PrefillColumns | None
    decode: CandidateColumns | None
    num_candidates: int
    rejections: Mapping[str, int]
    sentences: Mapping[str, str] = field(default_factory=dict)


def wanted_precisions(request: ServingRequest) -> tuple[tuple[Precision, Precision], ...]:
    """Return the formats of weights and KV cache to try.

    Without a wish: 16 bits, and 8-bit weights where the device multiplies in 8 bits. Models published in one narrow
    format alone are tried in that: DeepSeek-V3 and its kin in blocks of fp8 (arXiv 2412.19437, section 3.3), GPT-OSS in
    MXFP4 whatever the word (arXiv 2508.10925, section 2.1). An 8-bit cache changes the answers, and is tried where it is
    asked for.

    Raises
    ------
    SpecError
        If the device has units for none of the formats asked for.
    """
    gpu = request.job.cluster.gpu
    model = request.job.model
    default = ["bf16"]
    if {"fp8", "fp8_block"} & set(gpu.peak_flops_per_second) and not model.has_attention_sinks:
        narrow = "fp8" if model.moe is None else "fp8_block"
        default = [narrow] if model.mla is not None else ["bf16", narrow]
    words = request.limits.words("precision", tuple(default))
    usable = [word for word in words if has_units(model, gpu, word)]
    if not usable:
        raise SpecError(
            f"constraints.precision: {gpu.id} has no units for {', '.join(words)}; it offers "
            f"{', '.join(gpu.peak_flops_per_second)}"
        )
    caches = request.limits.words("kv_precision", ("bf16",))
    return tuple(
        (cast("Precision", word), cast("Precision", cache))
        for word in usable
        for cache in caches
        if cache == "bf16" or word in _EIGHT_BITS or "kv_precision" in request.limits.allowed
    )


def scheduler_choices(request: ServingRequest, profile: LoadProfile) -> SchedulerChoices:
    """Return the scheduler settings to try: the user's, or else a ladder of the engines' usual ones."""
    limits = request.limits
    drafts = limits.numbers("num_speculative_tokens", _DRAFTS if request.acceptance_rate else (0,))
    if any(drafts) and request.acceptance_rate is None:
        raise SpecError(
            "constraints.num_speculative_tokens needs 'acceptance_rate:', the chance that a drafted token is accepted"
        )
    caching: tuple[bool, ...] = (False, True) if profile.mean_cached > 0.0 else (False,)
    return SchedulerChoices(
        budgets=limits.numbers("max_num_batched_tokens", _BUDGETS),
        max_num_sequences=limits.numbers("max_num_sequences", _MAX_NUM_SEQUENCES),
        num_speculative_tokens=drafts,
        has_prefix_cache=tuple(bool(value) for value in limits.values("has_prefix_cache", caching)),
        acceptance_rate=request.acceptance_rate or 0.0,
    )


def option_pool(option: ReplicaOption, role: PoolRole = "aggregated", **settings: object) -> ServingPool:
    """Return one replica of an option as a pool."""
    return ServingPool(
        role=role,
        policy=option.policy,
        **option.degrees,  # type: ignore[arg-type]  # fields of the pool by name
        **settings,  # type: ignore[arg-type]
    )


def candidate_space(
    request: ServingRequest, profile: LoadProfile, costs: CostSource, max_gpus: int
) -> CandidateSpace:
    """Return the space of a request with a bound for every candidate.

    Parameters
    ----------
    request : ServingRequest
        What to plan.
    profile : LoadProfile
        Its load.
    costs : CostSource
        Memory and step times.
    max_gpus : int
        GPUs there are.
    """
    job, limits = request.job, request.limits
    choices = scheduler_choices(request, profile)
    shapes = all_shapes(job.model, job.cluster, limits, max_gpus)
    settings = len(choices.budgets) * len(choices.max_num_sequences)
    settings *= len(choices.num_speculative_tokens) * len(choices.has_prefix_cache)
    modes = limits.words("mode", ("aggregated", "disaggregated"))
    roles = tuple(
        cast("PoolRole", role)
        for mode, role in (("aggregated", "aggregated"), ("disaggregated", "decode"))
        if mode in modes
    )
    rejections: dict[str, int] = {}
    num_candidates = 0
    options: list[ReplicaOption] = []
    columns: dict[PoolRole, list[CandidateColumns]] = {role: [] for role in roles}
    prefills: list[PrefillColumns] = []
    for engine in request.engines:
        for precision, kv_precision in wanted_precisions(request):
            num_candidates += len(shapes) * settings
            kept = _allowed_shapes(request, engine, precision, shapes, settings, rejections)
            for row in range(len(kept)):
                degrees = kept.row(row)
                found = _priced(request, costs, profile, engine, precision, kv_precision, degrees, choices)
                if not found:
                    rejections["memory"] = rejections.get("memory", 0) + settings
                    continue
                for drafted, option in found:
                    index = len(options)
                    options.append(option)
                    own = _only_draft(choices, drafted)
                    for role in roles:
                        if role == "decode" and not can_decode_alone(engine, degrees):
                            continue
                        columns[role].append(replica_columns(index, option, profile, job.slo, own, role))
                    if "disaggregated" in modes and not drafted:
                        prefills.append(prefill_columns(index, option, profile, job.slo, own))
    return CandidateSpace(
        options=tuple(options),
        aggregated=_joined(columns.get("aggregated")),
        decode=_joined(columns.get("decode")),
        prefill=_joined_prefills(prefills),
        num_candidates=num_candidates,
        rejections=rejections,
        sentences={rule.name: rule.sentence for rule in SHAPE_RULES}
        | {"memory": "weights, and a cache that holds the longest request, fit into a GPU"},
    )


def _allowed_shapes(
    request: ServingRequest,
    engine: EngineName,
    precision: Precision,
    shapes: ReplicaShapes,
    settings: int,
    rejections: dict[str, int],
) -> ReplicaShapes:
    job = request.job
    kept = shapes
    for rule in SHAPE_RULES:
        mask = rule.holds(job.model, job.cluster, engine, precision, kept)
        lost = int((~mask).sum())
        if lost:
            rejections[rule.name] = rejections.get(rule.name, 0) + lost * settings
        kept = kept.kept(mask)
    return kept


def _priced(
    request: ServingRequest,
    costs: CostSource,
    profile: LoadProfile,
    engine: EngineName,
    precision: Precision,
    kv_precision: Precision,
    degrees: dict[str, int],
    choices: SchedulerChoices,
) -> list[tuple[int, ReplicaOption]]:
    """Return the option of each speculation length; none where the memory does not hold one request."""
    policy = DEFAULT_POLICIES[engine]
    found: list[tuple[int, ReplicaOption]] = []
    tokens = 0
    for drafted in choices.num_speculative_tokens:
        pool = ServingPool(
            policy=policy,
            num_speculative_tokens=drafted,
            acceptance_rate=choices.acceptance_rate or 0.7,
            max_num_batched_tokens=max(choices.budgets),
            **degrees,  # type: ignore[arg-type]  # fields of the pool by name
        )
        plan = ServingPlan(
            engine=engine,
            engine_version=request.engine_version,
            precision=precision,
            kv_precision=kv_precision,
            pools=(pool,),
        )
        if not found:
            tokens = costs.kv_cache_tokens(plan, pool)
            if tokens < _longest_request(profile):
                return []
        found.append(
            (
                drafted,
                ReplicaOption(
                    engine=engine,
                    policy=policy,
                    precision=precision,
                    kv_precision=kv_precision,
                    degrees=degrees,
                    kv_cache_tokens=tokens,
                    table=costs.step_table(plan, pool),
                ),
            )
        )
    return found


def _longest_request(profile: LoadProfile) -> float:
    return float(profile.prompt_lengths[-1]) + profile.mean_output


def _only_draft(choices: SchedulerChoices, drafted: int) -> SchedulerChoices:
    return SchedulerChoices(
        budgets=choices.budgets,
        max_num_sequences=choices.max_num_sequences,
        num_speculative_tokens=(drafted,),
        has_prefix_cache=choices.has_prefix_cache,
        acceptance_rate=choices.acceptance_rate,
    )


def _joined(parts: Sequence[CandidateColumns] | None) -> CandidateColumns | None:
    return concatenate(parts) if parts else None


def _joined_prefills(parts: Sequence[PrefillColumns]) -> PrefillColumns | None:
    if not parts:
        return None
    names: tuple[str, ...] = ("option", "budget", "has_prefix_cache", "rate", "margin", "ttft")
    joined: dict[str, NDArray[np.generic]] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in names
    }
    return PrefillColumns(**joined)  # type: ignore[arg-type]  # the fields by name
