"""What a serving deployment is: the load, the limits it must keep, and the plan that meets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.speculation import Acceptance
from meshwright.simcore.domain.workload import PRECISIONS, Precision

__all__ = [
    "ARRIVALS",
    "ENGINES",
    "POLICIES",
    "POOL_ROLES",
    "ROUTERS",
    "SLO_METRICS",
    "SLO_STATISTICS",
    "Arrival",
    "EngineName",
    "LengthDistribution",
    "PolicyName",
    "PoolRole",
    "RouterName",
    "ServingJob",
    "ServingPlan",
    "ServingPool",
    "ServingWorkload",
    "Slo",
    "SloLimit",
    "SloMetric",
    "SloStatistic",
    "expert_slots_reason",
    "pools_by_cluster",
]

EngineName = Literal["vllm", "sglang", "trtllm"]
Arrival = Literal["closed_loop", "poisson", "gamma", "trace"]
PolicyName = Literal["static", "orca", "chunked_prefill", "prefill_first", "split_fuse", "inflight"]
PoolRole = Literal["aggregated", "prefill", "decode"]
RouterName = Literal["round_robin", "least_loaded", "prefix_aware"]
SloMetric = Literal["ttft", "tpot", "itl", "e2e"]
SloStatistic = Literal["mean", "p50", "p90", "p95", "p99"]
ENGINES: tuple[str, ...] = get_args(EngineName)
ARRIVALS: tuple[str, ...] = get_args(Arrival)
POLICIES: tuple[str, ...] = get_args(PolicyName)
POOL_ROLES: tuple[str, ...] = get_args(PoolRole)
ROUTERS: tuple[str, ...] = get_args(RouterName)
SLO_METRICS: tuple[str, ...] = get_args(SloMetric)
SLO_STATISTICS: tuple[str, ...] = get_args(SloStatistic)


def _check_word(where: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SpecError(
            f"{where}: unknown word '{value}'{did_you_mean(value, known) or '.'} Known: {', '.join(known)}."
        )


def _check_at_least(where: str, value: float, minimum: float) -> None:
    if value < minimum:
        raise SpecError(f"{where} must be at least {minimum:g}, not {value:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthDistribution:
    """Tokens of a prompt or an answer over requests.

    Parameters
    ----------
    mean : float
        Mean length; the nominal length when ``kind`` is ``uniform_ratio`` [tokens].
    kind : {"fixed", "uniform_ratio", "lognormal"}
        All equal; uniform between ``ratio * mean`` and ``mean`` (``vllm bench --random-range-ratio`` as the
        InferenceX recipe uses it); log-normal of this mean.
    ratio : float
        Lower end of ``uniform_ratio`` over its upper end, 0 to 1.
    coefficient_of_variation : float
        Standard deviation over mean of ``lognormal``.
    """

    mean: float
    kind: Literal["fixed", "uniform_ratio", "lognormal"] = "fixed"
    ratio: float = 1.0
    coefficient_of_variation: float = 1.0

    def __post_init__(self) -> None:
        _check_word("length.kind", self.kind, ("fixed", "uniform_ratio", "lognormal"))
        _check_at_least("length.mean", self.mean, 1)
        if not 0.0 <= self.ratio <= 1.0:
            raise SpecError(f"length.ratio is a share of the nominal length: 0 to 1, not {self.ratio:g}")
        if self.coefficient_of_variation <= 0.0:
            raise SpecError("length.coefficient_of_variation must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingWorkload:
    """Who asks, how often and for how much.

    Parameters
    ----------
    arrival : Arrival
        ``closed_loop``: ``concurrency`` clients, each with one request under way; ``poisson`` and ``gamma``:
        ``rate`` requests per second, gaps of coefficient of variation 1 or ``burstiness``; ``trace``:
        the times of ``requests_file``.
    rate : float
        Requests per second over the whole deployment [1/s]; 0 where the arrival has none.
    burstiness : float
        Coefficient of variation of the gaps of ``gamma``.
    concurrency : int
        Clients of a closed loop over the whole deployment; 0 where the arrival has none.
    num_requests : int
        Requests to simulate; of a closed loop, ``num_requests / concurrency`` per client.
    input_length, output_length : LengthDistribution | None
        Prompt and answer lengths; None with a trace.
    prefix_length : int
        Leading prompt tokens that requests of one group share (system prompt, earlier turns).
    num_prefix_groups : int
        Different shared prefixes, drawn evenly.
    num_turns : int
        Requests of one session; each turn's prompt holds all earlier ones.
    requests_file : str | None
        The trace, as the user wrote it; with an arrival other than ``trace`` only its lengths are used.
    """

    arrival: Arrival
    rate: float = 0.0
    burstiness: float = 1.0
    concurrency: int = 0
    num_requests: int = 1000
    input_length: LengthDistribution | None = None
    output_length: LengthDistribution | None = None
    prefix_length: int = 0
    num_prefix_groups: int = 1
    num_turns: int = 1
    requests_file: str | None = None

    def __post_init__(self) -> None:
        _check_word("workload.arrival", self.arrival, ARRIVALS)
        if self.arrival in ("poisson", "gamma") and not self.rate > 0.0:
            raise SpecError(f"workload.rate must be above 0 for {self.arrival} arrivals, not {self.rate:g}")
        if self.arrival == "closed_loop":
            _check_at_least("workload.concurrency", self.concurrency, 1)
        if self.arrival == "trace":
            if self.requests_file is None:
                raise SpecError("workload.requests: name the file of the trace")
        elif self.requests_file is None and (self.input_length is None or self.output_length is None):
            raise SpecError(
                "workload: input_length and output_length are needed unless requests names a file"
            )
        if not self.burstiness > 0.0:
            raise SpecError(f"workload.burstiness must be above 0, not {self.burstiness:g}")
        for field, minimum in (
            ("num_requests", 1),
            ("prefix_length", 0),
            ("num_prefix_groups", 1),
            ("num_turns", 1),
        ):
            _check_at_least(f"workload.{field}", getattr(self, field), minimum)


@dataclass(frozen=True, slots=True, kw_only=True)
class SloLimit:
    """One limit: a statistic of a metric over requests stays at or below ``seconds``."""

    metric: SloMetric
    statistic: SloStatistic
    seconds: float

    def __post_init__(self) -> None:
        _check_word("slo", self.metric, SLO_METRICS)
        _check_word("slo", self.statistic, SLO_STATISTICS)
        if not self.seconds > 0.0:
            raise SpecError(f"slo.{self.name} must be above 0 seconds, not {self.seconds:g}")

    @property
    def name(self) -> str:
        """Key in files and flags, ``ttft_p99``."""
        return f"{self.metric}_{self.statistic}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Service level objective: all limits hold. A request is good when it keeps each metric's limit itself."""

    limits: tuple[SloLimit, ...] = ()

    def __post_init__(self) -> None:
        names = [limit.name for limit in self.limits]
        for name in names:
            if names.count(name) > 1:
                raise SpecError(f"slo.{name} is given twice")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPool:
    """Equal replicas of one engine configuration.

    GPUs of one replica: ``tp * pp * attention_dp`` (attention data parallel ranks hold the whole attention each
    and share the experts; with ``attention_dp > 1`` tp splits the attention inside each of them).

    Parameters
    ----------
    role : PoolRole
        ``aggregated`` replicas prefill and decode; the others do one of both.
    num_replicas : int
        Replicas of the pool.
    tp, pp, attention_dp : int
        Tensor parallel ranks, pipeline stages, and attention data parallel ranks of one replica.
    moe_tp, ep : int
        Ranks that split each expert, and ranks that share out the experts; ``moe_tp * ep = tp * attention_dp``.
        Both 1 for a dense model.
    redundant_experts : int
        Copies of experts beyond one each, over all ranks of a replica, in every mixture-of-experts layer.
    expert_imbalance : float | None
        Rows of the most loaded expert rank over the mean, as a placement of the experts reaches; None is the skewed
        routing the kernels were measured with.
    policy : PolicyName
        How the scheduler forms a step.
    max_num_sequences : int
        Most requests in one step (per attention data parallel rank).
    max_num_batched_tokens : int
        Most tokens in one step (per attention data parallel rank).
    block_size : int
        Tokens of one block of the KV cache.
    kv_cache_tokens : int | None
        Tokens the KV cache holds (per attention data parallel rank); None lets the memory model say.
    has_prefix_cache : bool
        Finished prompts stay cached by block until evicted.
    num_speculative_tokens : int
        Tokens drafted per step; 0 is off.
    acceptance_rate : float
        Chance that a drafted token is accepted, given that those before it were.
    acceptance_lengths : tuple[float, ...]
        Probability of 1, 2, ... tokens per step, where measured; overrides the rate.
    """

    role: PoolRole = "aggregated"
    num_replicas: int = 1
    tp: int = 1
    pp: int = 1
    attention_dp: int = 1
    moe_tp: int = 1
    ep: int = 1
    redundant_experts: int = 0
    expert_imbalance: float | None = None
    policy: PolicyName = "chunked_prefill"
    max_num_sequences: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    kv_cache_tokens: int | None = None
    has_prefix_cache: bool = False
    num_speculative_tokens: int = 0
    acceptance_rate: float = 0.7
    acceptance_lengths: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_word("pool.role", self.role, POOL_ROLES)
        _check_word("pool.policy", self.policy, POLICIES)
        for field in (
            "num_replicas",
            "tp",
            "pp",
            "attention_dp",
            "moe_tp",
            "ep",
            "max_num_sequences",
            "max_num_batched_tokens",
            "block_size",
        ):
            _check_at_least(f"pool.{field}", getattr(self, field), 1)
        for field in ("num_speculative_tokens", "redundant_experts"):
            _check_at_least(f"pool.{field}", getattr(self, field), 0)
        if self.redundant_experts and self.ep == 1:
            raise SpecError(
                f"pool.redundant_experts {self.redundant_experts} needs ep of at least 2: one rank holds every expert once"
            )
        if self.expert_imbalance is not None and not 1.0 <= self.expert_imbalance <= self.ep:
            raise SpecError(
                f"pool.expert_imbalance is the most loaded rank over the mean: 1 to ep {self.ep}, not "
                f"{self.expert_imbalance:g}"
            )
        longest = self.acceptance.longest_draft
        if longest is not None and longest > self.num_speculative_tokens:
            raise SpecError(
                f"pool.acceptance_lengths states up to {longest + 1} tokens per step, which needs num_speculative_tokens "
                f"of at least {longest}, not {self.num_speculative_tokens}"
            )
        if self.moe_tp * self.ep not in (1, self.tp * self.attention_dp):
            raise SpecError(
                f"pool: moe_tp {self.moe_tp} x ep {self.ep} must be tp {self.tp} x attention_dp {self.attention_dp}"
            )
        if self.kv_cache_tokens is not None:
            _check_at_least("pool.kv_cache_tokens", self.kv_cache_tokens, self.block_size)

    @property
    def acceptance(self) -> Acceptance:
        """How many drafted tokens stand."""
        return Acceptance(rate=self.acceptance_rate, lengths=self.acceptance_lengths)

    @property
    def gpus_per_replica(self) -> int:
        """GPUs of one replica."""
        return self.tp * self.pp * self.attention_dp

    @property
    def num_gpus(self) -> int:
        """GPUs of the pool."""
        return self.gpus_per_replica * self.num_replicas


def expert_slots_reason(num_experts: int, pool: ServingPool) -> str | None:
    """Return why a pool's expert ranks cannot share out the experts and their copies; None where they can."""
    slots = num_experts + pool.redundant_experts
    if slots > num_experts * pool.ep:
        most = num_experts * (pool.ep - 1)
        return f"redundant_experts {pool.redundant_experts} exceeds one copy on each of ep {pool.ep} ranks; at most {most}"
    if slots % pool.ep == 0:
        return None
    if not pool.redundant_experts:
        return f"ep {pool.ep} does not divide {num_experts} experts"
    more = pool.redundant_experts + -slots % pool.ep
    return (
        f"{num_experts} experts and {pool.redundant_experts} redundant ones do not divide by ep {pool.ep}; use "
        f"redundant_experts {more}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan:
    """How a model is served: one aggregated pool, or a prefill and a decode pool.

    Parameters
    ----------
    engine : EngineName
        Inference engine.
    engine_version : str
        Its release; empty is the newest described.
    precision, kv_precision : Precision
        Number formats of the matrix products and of the KV cache.
    pools : tuple[ServingPool, ...]
        ``(aggregated,)`` or ``(prefill, decode)``.
    router : RouterName
        How requests choose a replica of a pool.
    """

    engine: EngineName
    pools: tuple[ServingPool, ...]
    engine_version: str = ""
    precision: Precision = "bf16"
    kv_precision: Precision = "bf16"
    router: RouterName = "least_loaded"

    def __post_init__(self) -> None:
        _check_word("plan.engine", self.engine, ENGINES)
        _check_word("plan.precision", self.precision, PRECISIONS)
        _check_word("plan.kv_precision", self.kv_precision, PRECISIONS)
        _check_word("plan.router", self.router, ROUTERS)
        if tuple(pool.role for pool in self.pools) not in (("aggregated",), ("prefill", "decode")):
            raise SpecError(
                "plan.pools must be one aggregated pool, or a prefill pool and then a decode pool"
            )

    @property
    def is_disaggregated(self) -> bool:
        """Whether prefill and decode run on pools of their own."""
        return len(self.pools) == 2

    @property
    def num_gpus(self) -> int:
        """GPUs of all pools."""
        return sum(pool.num_gpus for pool in self.pools)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingJob:
    """What stays fixed while serving plans are compared.

    Parameters
    ----------
    model, cluster, workload, slo :
        What is served, where, to whom, within which limits.
    prefill_cluster : ClusterSpec | None
        Where prefill pools run, if not on ``cluster``: other GPUs, reached over the fabric.
    """

    model: ModelSpec
    cluster: ClusterSpec
    workload: ServingWorkload
    slo: Slo = Slo()
    prefill_cluster: ClusterSpec | None = None

    def cluster_of(self, role: PoolRole) -> ClusterSpec:
        """Return where pools of a role run."""
        is_apart = role == "prefill" and self.prefill_cluster is not None
        return self.prefill_cluster if is_apart else self.cluster  # type: ignore[return-value]  # not None there

    @property
    def num_gpus(self) -> int:
        """GPUs of both clusters."""
        return self.cluster.num_gpus + (self.prefill_cluster.num_gpus if self.prefill_cluster else 0)


def pools_by_cluster(
    job: ServingJob, plan: ServingPlan
) -> tuple[tuple[tuple[ServingPool, ...], ClusterSpec], ...]:
    """Return the pools that share a cluster, each group with its cluster."""
    if job.prefill_cluster is None or not plan.is_disaggregated:
        return ((plan.pools, job.cluster),)
    return tuple(((pool,), job.cluster_of(pool.role)) for pool in plan.pools)
