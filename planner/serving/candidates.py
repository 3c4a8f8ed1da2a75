"""Candidates of a search as columns: every scheduler setting of every replica shape, with its bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.serving.load_profile import LoadProfile
from meshwright.planner.serving.steady_state import (
    SteadyState,
    gap_statistics,
    keeps_limits,
    prefill_steady_state,
    replica_steady_state,
)
from meshwright.simcore.domain.serving import EngineName, PolicyName, PoolRole, Slo, SloLimit
from meshwright.simcore.domain.speculation import Acceptance
from meshwright.simcore.domain.workload import Precision
from meshwright.simcore.serving.step_table import StepTable

__all__ = [
    "CAUSES",
    "CandidateColumns",
    "PrefillColumns",
    "ReplicaOption",
    "SchedulerChoices",
    "concatenate",
    "prefill_columns",
    "replica_columns",
    "state_grid",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
# What ends the growth of a rate beside the limits of the objective, in the order they are asked.
CAUSES: tuple[str, ...] = ("kv_cache", "prompt_tokens", "max_num_sequences")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplicaOption:
    """One shape of a replica on one engine with its costs.

    Parameters
    ----------
    engine, policy, precision, kv_precision :
        As in a plan.
    degrees : dict[str, int]
        tp, pp, attention_dp, moe_tp, ep; redundant_experts where there are any.
    kv_cache_tokens : int
        Tokens of the cache of one rank.
    table : StepTable
        Step times of one replica.
    num_speculative_tokens : int
        Drafts that the step times are for.
    is_prefill_only : bool
        On a cluster that only prefill pools use.
    expert_imbalance : float | None
        Of the placement that recorded routing allows; None where none was recorded.
    """

    engine: EngineName
    policy: PolicyName
    precision: Precision
    kv_precision: Precision
    degrees: dict[str, int]
    kv_cache_tokens: int
    table: StepTable
    num_speculative_tokens: int = 0
    is_prefill_only: bool = False
    expert_imbalance: float | None = None

    @property
    def num_gpus(self) -> int:
        """GPUs of the replica."""
        return self.degrees["tp"] * self.degrees["pp"] * self.degrees["attention_dp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerChoices:
    """Settings that are tried of every shape."""

    budgets: tuple[int, ...]
    max_num_sequences: tuple[int, ...]
    num_speculative_tokens: tuple[int, ...] = (0,)
    has_prefix_cache: tuple[bool, ...] = (False,)
    acceptance: Acceptance = field(default_factory=Acceptance)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CandidateColumns:
    """Replicas that decode, one entry per candidate.

    Parameters
    ----------
    option : NDArray[np.int64]
        Index of the shape.
    budget, max_num_sequences, num_speculative_tokens, has_prefix_cache : NDArray
        The scheduler's settings.
    rate, clients : NDArray[np.float64]
        Bound of the rate of one replica that keeps every limit [1/s], and of the requests under way at once.
    estimate : NDArray[np.float64]
        Rate that is rather to be expected: prompts do not come together, neither on one rank nor on all [1/s].
    tpot, ttft : NDArray[np.float64]
        Mean time per token and time of the longest counted prompt in that state [s].
    cause : NDArray[np.int64]
        What stops a higher rate: index in :data:`CAUSES`, or ``len(CAUSES)`` + index of a limit; -1 for nothing.
    """

    option: IntArray
    budget: IntArray
    max_num_sequences: IntArray
    num_speculative_tokens: IntArray
    has_prefix_cache: IntArray
    rate: FloatArray
    clients: FloatArray
    estimate: FloatArray
    tpot: FloatArray
    ttft: FloatArray
    cause: IntArray

    def __len__(self) -> int:
        """Number of candidates."""
        return len(self.option)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefillColumns:
    """Replicas of a prefill pool, one entry per candidate; fields as in :class:`CandidateColumns`.

    ``margin`` is what a pool keeps free of its rate, whatever its size, for the wait to stay within the limit [1/s].
    """

    option: IntArray
    budget: IntArray
    has_prefix_cache: IntArray
    rate: FloatArray
    margin: FloatArray
    ttft: FloatArray

    def __len__(self) -> int:
        """Number of candidates."""
        return len(self.option)


def state_grid(largest: int) -> FloatArray:
    """Return numbers of decoding sequences to look at: every one up to 32, then about 4 % apart."""
    exact = np.arange(1, min(32, largest) + 1)
    if largest <= 32:
        return exact.astype(np.float64)
    count = int(np.ceil(np.log(largest / 32.0) / np.log(1.04)))
    spread = 32.0 * (largest / 32.0) ** (np.arange(1, count + 1) / count)
    return np.unique(np.concatenate([exact, np.round(spread)])).astype(np.float64)


def replica_columns(
    index: int,
    option: ReplicaOption,
    profile: LoadProfile,
    slo: Slo,
    choices: SchedulerChoices,
    role: PoolRole = "aggregated",
) -> CandidateColumns:
    """Return the candidates of one shape whose replicas decode.

    Parameters
    ----------
    index : int
        What ``option`` of the columns says.
    option, profile, slo, choices :
        The shape, the load, the limits and the scheduler settings to try.
    role : PoolRole
        ``aggregated`` or ``decode``.
    """
    return concatenate(
        [
            _setting_columns(index, option, profile, slo, choices, role, drafted, has_prefix_cache)
            for drafted in choices.num_speculative_tokens
            for has_prefix_cache in choices.has_prefix_cache
        ]
    )


def _setting_columns(
    index: int,
    option: ReplicaOption,
    profile: LoadProfile,
    slo: Slo,
    choices: SchedulerChoices,
    role: PoolRole,
    drafted: int,
    has_prefix_cache: bool,
) -> CandidateColumns:
    """Return the candidates of one draft length with or without a prefix cache: every batch with every budget."""
    caps = np.array(choices.max_num_sequences, dtype=np.int64)
    budgets = np.array(choices.budgets, dtype=np.float64)
    # A pipeline's batches are in flight side by side; the states are those of one of them.
    grid = state_grid(max(1, int(np.ceil(caps.max() * option.table.stage_share))))
    ranks = option.degrees["attention_dp"]

    def steady(load: LoadProfile) -> SteadyState:
        return replica_steady_state(
            option.table,
            load,
            num_decodes=grid,
            budgets=budgets,
            policy=option.policy,
            role=role,
            num_speculative_tokens=drafted,
            tokens_per_step=choices.acceptance.tokens_per_step(drafted),
            has_prefix_cache=has_prefix_cache,
            prompt=_slo_prompt(slo, profile),
            num_ranks=ranks,
            gap_statistics=gap_statistics(slo),
        )

    def best_rate(state: SteadyState, best: _BestStates) -> FloatArray:
        return np.where(best.state.ravel() >= 0, state.rate[best.rate_state.ravel(), columns], 0.0)

    rows, columns = (
        axis.ravel() for axis in np.meshgrid(np.arange(len(caps)), np.arange(len(budgets)), indexing="ij")
    )
    state = steady(profile)
    best = _best_states(option, state, slo, profile, caps)
    at = (np.maximum(best.state, 0).ravel(), columns)
    rate, tpot, ttft = best_rate(state, best), state.tpot[at], state.ttft[at]
    estimate = rate
    if profile.comes_in_groups and role == "aggregated":
        apart = steady(replace(profile, comes_in_groups=False))
        estimate = best_rate(apart, _best_states(option, apart, slo, profile, caps))
    return CandidateColumns(
        option=np.full(rows.size, index, dtype=np.int64),
        budget=budgets[columns].astype(np.int64),
        max_num_sequences=caps[rows],
        num_speculative_tokens=np.full(rows.size, drafted, dtype=np.int64),
        has_prefix_cache=np.full(rows.size, has_prefix_cache, dtype=np.int64),
        rate=rate * ranks,
        estimate=estimate * ranks,
        clients=rate * ranks * (ttft + (profile.mean_output - 1.0) * tpot),
        tpot=tpot,
        ttft=ttft,
        cause=best.cause.ravel(),
    )


def prefill_columns(
    index: int, option: ReplicaOption, profile: LoadProfile, slo: Slo, choices: SchedulerChoices
) -> PrefillColumns:
    """Return the candidates of one shape in a prefill pool that keep the limits of the first token."""
    budgets = np.array(choices.budgets, dtype=np.float64)
    parts = []
    for has_prefix_cache in choices.has_prefix_cache:
        rate, ttft = prefill_steady_state(
            option.table,
            profile,
            budgets=budgets,
            has_prefix_cache=has_prefix_cache,
            prompt=_slo_prompt(slo, profile),
        )
        kept = np.ones(len(budgets), dtype=np.bool_)
        margin = np.zeros(len(budgets))
        for limit in slo.limits:
            if limit.metric in ("ttft", "e2e"):
                kept &= ttft <= limit.seconds * (2.0 if limit.statistic == "p50" else 1.0)
                margin = np.maximum(margin, _waiting_margin(limit, ttft))
        parts.append(
            PrefillColumns(
                option=np.full(len(budgets), index, dtype=np.int64),
                budget=budgets.astype(np.int64),
                has_prefix_cache=np.full(len(budgets), has_prefix_cache, dtype=np.int64),
                rate=np.where(kept, rate, 0.0) * option.degrees["attention_dp"],
                margin=margin,
                ttft=ttft,
            )
        )
    return PrefillColumns(
        **{
            each.name: np.concatenate([getattr(part, each.name) for part in parts])
            for each in fields(PrefillColumns)
        }
    )


def _waiting_margin(limit: SloLimit, ttft: FloatArray) -> FloatArray:
    """Return the rate a pool must keep free for a share of the requests to wait no longer than the limit leaves [1/s].

    The wait for one of many servers of fixed service times has the tail ``exp(-2 (capacity - rate) t)`` under heavy load
    (Kingman 1962, "On queues in heavy traffic"): the share ``q`` waits longer than ``-ln q / (2 (capacity - rate))``.
    """
    tails = {"mean": 1.0, "p50": 0.69, "p90": 2.3, "p95": 3.0, "p99": 4.61}
    left = np.maximum(limit.seconds - ttft, 1e-3)
    margin: FloatArray = tails[limit.statistic] / (2.0 * left)
    return margin


def concatenate(parts: Sequence[CandidateColumns]) -> CandidateColumns:
    """Return columns one after the other."""
    return CandidateColumns(
        **{
            each.name: np.concatenate([getattr(part, each.name) for part in parts])
            for each in fields(CandidateColumns)
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _BestStates:
    """Indices of states, ``(num_caps, num_budgets)``: the best that holds (-1 for none), the one whose rate bounds it."""

    state: IntArray
    rate_state: IntArray
    cause: IntArray


def _best_states(
    option: ReplicaOption, state: SteadyState, slo: Slo, profile: LoadProfile, caps: IntArray
) -> _BestStates:
    held = state.kv_tokens
    if option.engine == "trtllm":
        # Its default scheduler (guaranteed no evict) takes a request in only with room for its whole answer.
        held = held * (profile.reserved_tokens / profile.decode_context)
    masks = [held <= option.kv_cache_tokens, state.lasts & (state.rate > 0.0)]
    limits = keeps_limits(state, slo, profile)
    masks += list(limits.values())
    all_hold = np.logical_and.reduce(masks)
    last = len(state.rate) - 1
    shape = (len(caps), state.rate.shape[1])
    best, bound, cause = (np.full(shape, -1, dtype=np.int64) for _ in range(3))
    stacked = np.stack(masks)
    columns = np.arange(shape[1])
    for row, cap in enumerate(caps):
        allowed = state.num_decodes <= max(float(cap), float(state.num_decodes[0, 0]))
        rate = np.where(all_hold & allowed, state.rate, -1.0)
        found = rate.argmax(axis=0)
        is_found = rate[found, columns] > 0.0
        following = np.minimum(found + 1, last)
        is_capped = ~allowed[following, columns] | (found == last)
        # The true optimum lies before the first state that fails: its rate is the bound.
        grows = ~is_capped & (state.rate[following, columns] > state.rate[found, columns])
        best[row] = np.where(is_found, found, -1)
        bound[row] = np.where(grows, following, found)
        fails = ~stacked[:, following, columns]
        # kv_cache, prompt_tokens, then the limits; where nothing holds at all, the first state says why.
        fails = np.where(is_found, fails, ~stacked[:, np.zeros_like(found), columns])
        first = fails.argmax(axis=0)
        shifted = np.where(first >= 2, first + 1, first)
        reason = np.where(fails.any(axis=0), shifted, -1)
        cause[row] = np.where(is_found & is_capped, CAUSES.index("max_num_sequences"), reason)
    return _BestStates(state=best, rate_state=np.maximum(bound, 0), cause=cause)


def _slo_prompt(slo: Slo, profile: LoadProfile) -> float:
    """Return the prompt whose time the first limit on the first token is about [tokens]."""
    shares = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
    for limit in slo.limits:
        if limit.metric == "ttft" and limit.statistic in shares:
            share = shares[limit.statistic]
            # As far below as a quantile of other requests may lie by chance.
            error = math.sqrt(share * (1.0 - share) / len(profile.prompt_lengths))
            return profile.prompt_quantile(max(0.0, share - 2.0 * error))
    return profile.mean_prompt
