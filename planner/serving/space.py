"""The space of serving plans: engines, formats, shapes and scheduler settings, each with its bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.hardware_specs.specs import ClusterSpec
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
from meshwright.simcore.domain.speculation import Acceptance
from meshwright.simcore.domain.workload import Precision
from meshwright.simcore.serving.policies import BATCHING_POLICIES
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

    @property
    def is_empty(self) -> bool:
        """Whether no shape serves whole requests, alone or as a pair of a prefill and a decode shape."""
        return self.aggregated is None and (self.prefill is None or self.decode is None)


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
    job = request.job
    model, gpus = job.model, [job.cluster.gpu]
    if job.prefill_cluster is not None:
        gpus.append(job.prefill_cluster.gpu)
    default = ["bf16"]
    has_narrow = all({"fp8", "fp8_block"} & set(gpu.peak_flops_per_second) for gpu in gpus)
    if has_narrow and not model.has_attention_sinks:
        narrow = "fp8" if model.moe is None else "fp8_block"
        default = [narrow] if model.mla is not None else ["bf16", narrow]
    words = request.limits.words("precision", tuple(default))
    usable = [word for word in words if all(has_units(model, gpu, word) for gpu in gpus)]
    if not usable:
        gpu = next(gpu for gpu in gpus if not all(has_units(model, gpu, word) for word in words))
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
    drafts = limits.numbers("num_speculative_tokens", _usual_drafts(request.acceptance))
    _check_drafts(max(drafts), request.acceptance)
    caching: tuple[bool, ...] = (False, True) if profile.mean_cached > 0.0 else (False,)
    return SchedulerChoices(
        budgets=limits.numbers("max_num_batched_tokens", _BUDGETS),
        max_num_sequences=limits.numbers("max_num_sequences", _MAX_NUM_SEQUENCES),
        num_speculative_tokens=drafts,
        has_prefix_cache=tuple(bool(value) for value in limits.values("has_prefix_cache", caching)),
        acceptance=request.acceptance or Acceptance(),
    )


def _usual_drafts(acceptance: Acceptance | None) -> tuple[int, ...]:
    """Return the draft lengths to try where the user names none."""
    if acceptance is None:
        return (0,)
    longest = acceptance.longest_draft
    if longest is None:
        return _DRAFTS
    return (*(drafted for drafted in _DRAFTS if drafted < longest), longest)


def _check_drafts(longest: int, acceptance: Acceptance | None) -> None:
    if not longest:
        return
    if acceptance is None:
        raise SpecError(
            "constraints.num_speculative_tokens needs 'acceptance_rate:', the chance that a drafted token is accepted, or "
            "'acceptance_lengths:', the probabilities of 1, 2, 3, ... tokens per step"
        )
    known = acceptance.longest_draft
    if known is not None and longest > known:
        raise SpecError(
            f"constraints.num_speculative_tokens: 'acceptance_lengths:' says nothing of drafts of {longest} tokens; list "
            f"{longest + 1} probabilities, or draft at most {known}"
        )


def option_pool(option: ReplicaOption, role: PoolRole = "aggregated", **settings: object) -> ServingPool:
    """Return one replica of an option as a pool."""
    return ServingPool(
        role=role,
        policy=option.policy,
        expert_imbalance=option.expert_imbalance,
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
    settings = len(choices.budgets) * len(choices.max_num_sequences)
    settings *= len(choices.num_speculative_tokens) * len(choices.has_prefix_cache)
    modes = limits.words("mode", ("aggregated", "disaggregated"))
    by_mode: Mapping[str, tuple[PoolRole, ...]] = {
        "aggregated": ("aggregated",),
        "disaggregated": ("decode", "prefill"),
    }
    roles = tuple(role for mode in modes for role in by_mode[mode])
    rejections: dict[str, int] = {}
    num_candidates = 0
    options: list[ReplicaOption] = []
    columns: dict[PoolRole, list[CandidateColumns]] = {role: [] for role in roles if role != "prefill"}
    prefills: list[PrefillColumns] = []
    for (cluster, on_cluster), engine in product(_sides(request, roles), request.engines):
        most = max_gpus if cluster is job.cluster else cluster.num_gpus
        shapes = all_shapes(job.model, cluster, limits, most, has_routing=request.routing is not None)
        for precision, kv_precision in wanted_precisions(request):
            num_candidates += len(shapes) * settings
            kept = _allowed_shapes(request, cluster, engine, precision, shapes, settings, rejections)
            for row in range(len(kept)):
                degrees = kept.row(row)
                found = _priced(
                    request, costs, profile, engine, precision, kv_precision, degrees, choices, on_cluster[-1]
                )
                if not found:
                    rejections["memory"] = rejections.get("memory", 0) + settings
                    continue
                for drafted, option in found:
                    index = len(options)
                    options.append(option)
                    own = _only_draft(choices, drafted)
                    for role in on_cluster:
                        if role == "prefill" or (role == "decode" and not can_decode_alone(engine, degrees)):
                            continue
                        settings_of = _of_decode_pool(own, option) if role == "decode" else own
                        columns[role].append(
                            replica_columns(index, option, profile, job.slo, settings_of, role)
                        )
                    # No draft changes a prompt: the first option of a shape stands for all.
                    if "prefill" in on_cluster and drafted == found[0][0]:
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


def _sides(
    request: ServingRequest, roles: tuple[PoolRole, ...]
) -> tuple[tuple[ClusterSpec, tuple[PoolRole, ...]], ...]:
    """Return the clusters, and the roles whose pools may run on each."""
    job = request.job
    if job.prefill_cluster is None or "prefill" not in roles:
        return ((job.cluster, roles),)
    rest = tuple(role for role in roles if role != "prefill")
    return ((job.cluster, rest), (job.prefill_cluster, ("prefill",)))


def _allowed_shapes(
    request: ServingRequest,
    cluster: ClusterSpec,
    engine: EngineName,
    precision: Precision,
    shapes: ReplicaShapes,
    settings: int,
    rejections: dict[str, int],
) -> ReplicaShapes:
    job = request.job
    kept = shapes
    for rule in SHAPE_RULES:
        mask = rule.holds(job.model, cluster, engine, precision, kept)
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
    role: PoolRole,
) -> list[tuple[int, ReplicaOption]]:
    """Return the option of each speculation length; none where the memory does not hold one request."""
    policy = DEFAULT_POLICIES[engine]
    found: list[tuple[int, ReplicaOption]] = []
    imbalance = None
    if request.routing is not None and degrees["ep"] > 1:
        imbalance = request.routing.imbalance(degrees["ep"], degrees.get("redundant_experts", 0))
    tokens = 0
    for drafted in choices.num_speculative_tokens:
        pool = ServingPool(
            policy=policy,
            num_speculative_tokens=drafted,
            max_num_batched_tokens=max(choices.budgets),
            expert_imbalance=imbalance,
            **degrees,  # type: ignore[arg-type]  # fields of the pool by name
        )
        plan = ServingPlan(
            engine=engine,
            engine_version=request.engine_version,
            precision=precision,
            kv_precision=kv_precision,
            pools=(pool,),
        )
        # The role says on which cluster; a plan of one pool has none but the aggregated.
        placed = replace(pool, role=role)
        if not found:
            tokens = costs.kv_cache_tokens(plan, placed)
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
                    table=costs.step_table(plan, placed),
                    num_speculative_tokens=drafted,
                    is_prefill_only=role == "prefill" and request.job.prefill_cluster is not None,
                    expert_imbalance=imbalance,
                ),
            )
        )
    return found


def _longest_request(profile: LoadProfile) -> float:
    return float(profile.prompt_lengths[-1]) + profile.mean_output


def _of_decode_pool(choices: SchedulerChoices, option: ReplicaOption) -> SchedulerChoices:
    """Return settings with one token budget: a decode pool computes no prompts, but engines want room for one.

    Those that cut prompts need the least that holds the largest batch with its drafts; TensorRT-LLM refuses requests
    longer than a step.
    """
    largest = max(choices.budgets)
    if not BATCHING_POLICIES[option.policy].splits_prompts:
        return replace(choices, budgets=(largest,))
    batch = max(choices.max_num_sequences) * (1 + max(choices.num_speculative_tokens))
    enough = min((budget for budget in choices.budgets if budget >= batch), default=largest)
    return replace(choices, budgets=(enough,))


def _only_draft(choices: SchedulerChoices, drafted: int) -> SchedulerChoices:
    return replace(choices, num_speculative_tokens=(drafted,))


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
