"""Steady state of one replica in closed form: what rate and what latencies a number of decoding sequences means.

The figures are optimistic: no request ever waits for its first step, batches never fluctuate, and the cache never
overflows. They are therefore an upper bound of the rate that keeps a limit, up to the curvature of the step times; the
simulation says how much of it remains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.serving.load_profile import LoadProfile
from meshwright.simcore.domain.serving import PolicyName, PoolRole, Slo, SloLimit
from meshwright.simcore.serving.step_table import StepTable
from meshwright.simcore.serving.step_times import prefill_attention, step_time

__all__ = [
    "SteadyState",
    "gap_statistics",
    "keeps_limits",
    "limited_value",
    "prefill_steady_state",
    "replica_steady_state",
]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
# Shares of requests that a percentile leaves out.
_TAILS = {"p50": 0.5, "p90": 0.1, "p95": 0.05, "p99": 0.01}
# A mean step is found to a thousandth of the difference between steps.
_BISECTIONS = 12
# Policies whose prompts stop all decoding.
_PROMPTS_ALONE = frozenset({"prefill_first", "static"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteadyState:
    """States of one rank of one replica; all arrays have the shape ``(num_states, num_budgets)``.

    Parameters
    ----------
    num_decodes : NDArray[np.float64]
        Sequences that decode at once.
    lasts : NDArray[np.bool_]
        Whether prompts leave room for so many; False where the number was cut. A single one may decode part of the time.
    rate : NDArray[np.float64]
        Requests that arrive and leave [1/s].
    tpot, gap : NDArray[np.float64]
        Mean time per output token after the first, mean time between two steps of a sequence [s].
    late_gaps : Mapping[str, NDArray[np.float64]]
        Percentiles of the time between two steps, by name; those that were asked for [s].
    ttft : NDArray[np.float64]
        Time of the steps that the prompt of ``prompt`` tokens takes part in [s].
    kv_tokens : NDArray[np.float64]
        Tokens in the cache.
    """

    num_decodes: FloatArray
    lasts: BoolArray
    rate: FloatArray
    tpot: FloatArray
    gap: FloatArray
    late_gaps: Mapping[str, FloatArray]
    ttft: FloatArray
    kv_tokens: FloatArray


def replica_steady_state(
    table: StepTable,
    profile: LoadProfile,
    *,
    num_decodes: FloatArray,
    budgets: FloatArray,
    policy: PolicyName,
    role: PoolRole = "aggregated",
    num_speculative_tokens: int = 0,
    tokens_per_step: float = 1.0,
    has_prefix_cache: bool = False,
    prompt: float | None = None,
    num_ranks: int = 1,
    gap_statistics: Sequence[str] = (),
) -> SteadyState:
    """Return the steady states of a replica that decodes.

    Parameters
    ----------
    table : StepTable
        Its step times.
    profile : LoadProfile
        The load.
    num_decodes, budgets : NDArray[np.float64]
        Decoding sequences ``(num_states,)`` and tokens per step ``(num_budgets,)``.
    policy : PolicyName
        Whether prompts share steps with decoding sequences or stop them.
    role : PoolRole
        A ``decode`` replica has no prompts.
    num_speculative_tokens, tokens_per_step : int, float
        Tokens drafted per step, and those a sequence gains in one on average.
    has_prefix_cache : bool
        Whether prompts skip what is cached.
    prompt : float | None
        Prompt that ``ttft`` is for; the mean one when None [tokens].
    num_ranks : int
        Attention data parallel ranks: a step lasts as long as that of any rank with a prompt. Requests that come in groups
        may bring all ranks their prompts at once; those of a Poisson process share a step only where they came in the
        same one.
    gap_statistics : Sequence[str]
        Percentiles of the time between two steps to return.

    Notes
    -----
    A request decodes ``s = (o - 1) / a`` steps (``a`` being ``tokens_per_step``), so that ``d`` sequences leave at ``d / s``
    per step and their successors bring ``q = d p / s`` prompt tokens per step. Those come in chunks of ``c`` tokens, in a
    share ``q / c`` of the steps. The rate is ``d / s`` over the mean step. No more sequences decode than prompts that fill
    every step can follow, nor than a step has room for with their drafts: larger numbers are cut there.

    A sequence waits for the prompts of the others, never for its own: of ``d`` that decode, itself among them, it meets
    the share ``(d - g) / d`` of the steps that hold prompts, ``g`` being those whose prompts were computed together with
    its own. A Poisson process brings prompts one by one; where requests come in groups, as many as fill a step, and where
    prompts stop decoding, all of them.
    """
    rank = _Rank.of(
        table,
        profile,
        policy=policy,
        role=role,
        drafted=1.0 + num_speculative_tokens,
        steps=max(1e-9, (profile.mean_output - 1.0) / tokens_per_step),
        cached=profile.mean_cached if has_prefix_cache else 0.0,
    )
    grid = np.asarray(num_decodes, dtype=np.float64)[:, None]
    budget = np.asarray(budgets, dtype=np.float64)[None, :]
    own, steps = rank.own, rank.steps
    most = np.full(budget.shape, np.inf) if rank.is_alone else budget / (own / steps + rank.drafted)
    d = np.minimum(grid, most)
    none = np.zeros(d.shape)
    beside = none if rank.is_alone else d
    room = np.maximum(budget - beside * rank.drafted, 0.0)
    pure = rank.time(d, none)
    step = rank.mean_step(d, beside, room, pure, num_ranks)
    rate = np.where((room > 0.0) | (own == 0.0), d / (steps * step * table.stage_share), 0.0)
    group = np.minimum(_group_size(profile, room, own, alone=rank.is_alone), d)
    met = (d - group) / d
    gap = pure + (step - pure) * met
    # Beside a prompt at least those decode that came with others.
    others = np.minimum(beside, d - group)
    left = np.maximum(budget - others * rank.drafted, 1.0)
    waits = _Waits(beside=beside, room=left, pure=pure, step=step, arrivals=d / steps * met)
    ttft = none
    if own:
        longest = max(1.0, (profile.mean_prompt if prompt is None else prompt) - rank.cached)
        ttft = np.maximum(1.0, longest / left) * rank.time(others, np.minimum(longest, left))
    running = d / table.stage_share
    return SteadyState(
        num_decodes=running,
        lasts=grid <= np.maximum(most, 1.0),
        rate=rate,
        tpot=gap / tokens_per_step,
        gap=gap,
        late_gaps={name: rank.late_gap(waits, _TAILS[name]) if own else pure for name in gap_statistics},
        ttft=ttft,
        kv_tokens=running * profile.decode_context + rate * ttft * own / 2.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Waits:
    """What a sequence meets: sequences that share a step with prompts, room beside them, steps, prompts per step."""

    beside: FloatArray
    room: FloatArray
    pure: FloatArray
    step: FloatArray
    arrivals: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rank:
    """One rank under a load.

    Parameters
    ----------
    table, profile : StepTable, LoadProfile
        Its step times and the load.
    is_alone : bool
        Prompts stop all decoding.
    drafted, steps : float
        Tokens a sequence brings to a step, and steps it decodes in.
    own, cached : float
        Tokens of the mean prompt that are computed, and those that are not; a decode pool has none.
    attention : float
        Of the mean prompt [s].
    """

    table: StepTable
    profile: LoadProfile
    is_alone: bool
    drafted: float
    steps: float
    own: float
    cached: float
    attention: float

    @classmethod
    def of(
        cls,
        table: StepTable,
        profile: LoadProfile,
        *,
        policy: PolicyName,
        role: PoolRole,
        drafted: float,
        steps: float,
        cached: float,
    ) -> _Rank:
        """Return a rank of a pool."""
        return cls(
            table=table,
            profile=profile,
            is_alone=policy in _PROMPTS_ALONE,
            drafted=drafted,
            steps=steps,
            own=0.0 if role == "decode" else max(1.0, profile.mean_prompt - cached),
            cached=cached,
            attention=_mean_attention(table, profile, cached),
        )

    def time(self, decodes: FloatArray, chunk: FloatArray) -> FloatArray:
        """Return steps of so many sequences and prompt tokens [s]."""
        share = chunk / self.own if self.own else chunk
        return step_time(
            self.table,
            num_decodes=decodes,
            context=self.profile.decode_context,
            variation=self.profile.context_variation,
            tokens_per_decode=self.drafted,
            chunk_tokens=chunk,
            chunk_attention=self.attention * share,
            chunk_sequences=np.maximum(share, (chunk > 0.0) * 1.0),
        )

    def mean_step(
        self, d: FloatArray, beside: FloatArray, room: FloatArray, pure: FloatArray, num_ranks: int
    ) -> FloatArray:
        """Return the mean step while ``d`` sequences decode [s]; at best prompts wait for each other until it is full."""
        per_step = d * self.own / self.steps + 0.0 * room
        chunk = np.minimum(room, np.maximum(self.own, per_step))
        mixed = self.time(beside, np.maximum(chunk, 1.0)) if self.own else pure
        full = self.time(beside, np.maximum(room, 1.0)) if self.own else pure
        with np.errstate(divide="ignore", invalid="ignore"):
            mixed_share, full_share = (
                np.where(per_step > 0.0, per_step / each, 0.0) for each in (chunk, room)
            )
        if self.is_alone:
            step = pure + np.minimum(mixed_share * mixed, full_share * full)
        else:
            step = np.minimum(_mixed_time(pure, mixed, mixed_share), _mixed_time(pure, full, full_share))
        if num_ranks > 1 and self.own and not self.profile.comes_in_groups:
            arrivals = num_ranks * d / self.steps
            step = np.maximum(step, _gated_time(pure, np.maximum(mixed, pure), arrivals))
        return step

    def late_gap(self, waits: _Waits, tail: float) -> FloatArray:
        """Return the time between two steps of a sequence that a share of all exceeds [s]."""
        prompts = np.maximum(1.0, self.profile.prompt_lengths - self.cached)
        if self.is_alone:
            # A Poisson process starts as many busy periods of prompts as find none under way.
            held = _shortest_late_prompt(prompts, waits.arrivals * waits.pure / waits.step, tail)
        else:
            in_groups = self.profile.comes_in_groups
            largest = waits.room if in_groups else np.minimum(waits.room, prompts[-1])
            held = _smallest_late_chunk(prompts, waits.room, largest, waits.arrivals, tail)
        late = self.time(waits.beside, np.maximum(held, 1.0)) + (waits.pure if self.is_alone else 0.0)
        return np.where(held > 0.0, late, waits.pure)


def _group_size(profile: LoadProfile, room: FloatArray, own: float, *, alone: bool) -> FloatArray:
    """Return how many prompts may be computed together, their sequences decoding in step from then on."""
    if not profile.comes_in_groups or not own:
        return np.ones_like(room)
    if alone:
        return np.full_like(room, np.inf)
    # What a client asks next misses the step that starts as its last answer ends, so that two steps' prompts meet none
    # of each other's sequences; the last of them may be cut between two steps.
    return 1.0 + 2.0 * room / own


def _shortest_late_prompt(prompts: FloatArray, share: FloatArray, tail: float) -> FloatArray:
    """Return the prompt that a percentile of the gaps holds, a share of which hold one at least; 0 for none [tokens]."""
    shortest = np.quantile(prompts, np.clip(1.0 - tail / np.maximum(share, tail), 0.0, 1.0))
    return np.where(share > tail, shortest, 0.0)


def _smallest_late_chunk(
    prompts: FloatArray, room: FloatArray, largest: FloatArray, arrivals: FloatArray, tail: float
) -> FloatArray:
    """Return the fewest prompt tokens that a percentile of the steps of a sequence can hold; 0 for none [tokens].

    Parameters
    ----------
    prompts : NDArray[np.float64]
        A sample of what is to be computed of prompts, ``(num_samples,)`` [tokens].
    room, largest : NDArray[np.float64]
        Prompt tokens that a step has room for, and that one may hold.
    arrivals : NDArray[np.float64]
        Prompts per step that a sequence waits for, on average.
    tail : float
        Share of the steps that the percentile leaves out.

    Notes
    -----
    Prompts that never share a step make the most steps, a share ``m`` of all. At best the tail holds the largest chunks
    ``c`` of the ``t`` tokens per step, so that ``(t - tail c) / (m - tail)`` remain for each of the others.
    """
    room = np.maximum(room, 1.0)
    share = np.minimum(1.0, arrivals * np.ceil(prompts[:, None, None] / room).mean(axis=0))
    held = (arrivals * prompts.mean() - tail * largest) / np.maximum(share - tail, 1e-12)
    return np.where(share > tail, np.clip(held, 0.0, room), 0.0)


def _mixed_time(pure: FloatArray, mixed: FloatArray, share: FloatArray) -> FloatArray:
    """Return the mean step of which a share holds a prompt [s]."""
    # Shares above 1 are of states that were cut.
    share = np.minimum(share, 1.0)
    mean: FloatArray = (1.0 - share) * pure + share * mixed
    return mean


def _gated_time(pure: FloatArray, mixed: FloatArray, arrivals: FloatArray) -> FloatArray:
    """Return the mean step where a step holds prompts if any came during the one before, whichever rank they came to [s].

    Parameters
    ----------
    pure, mixed : NDArray[np.float64]
        Steps without prompts, and with one on the fullest rank [s].
    arrivals : NDArray[np.float64]
        Prompts per mean step, on all ranks together.

    Notes
    -----
    Steps with and without prompts follow each other as a Markov chain: at a rate ``r`` a prompt comes during ``t`` with
    chance ``1 - exp(-r t)``, so that the share ``a / (a + b)`` holds prompts, ``a = 1 - exp(-r pure)`` and
    ``b = exp(-r mixed)``. The rate is ``arrivals`` over the mean step, which bisection finds.
    """
    low, high = pure, mixed
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        rate = arrivals / middle
        follows, ends = -np.expm1(-rate * pure), np.exp(-rate * mixed)
        mean = pure + (mixed - pure) * follows / (follows + ends)
        low, high = np.where(mean > middle, middle, low), np.where(mean > middle, high, middle)
    return low


def prefill_steady_state(
    table: StepTable,
    profile: LoadProfile,
    *,
    budgets: FloatArray,
    has_prefix_cache: bool = False,
    prompt: float | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Return the rate a replica of a prefill pool can take, and the time a prompt spends in it.

    Parameters
    ----------
    table, profile, has_prefix_cache, prompt :
        As in :func:`replica_steady_state`.
    budgets : NDArray[np.float64]
        Tokens per step, ``(num_budgets,)``.

    Returns
    -------
    tuple[NDArray[np.float64], NDArray[np.float64]]
        Requests per second [1/s] and seconds of a prompt of ``prompt`` tokens alone [s], ``(num_budgets,)``.
    """
    budget = np.asarray(budgets, dtype=np.float64)
    cached = profile.mean_cached if has_prefix_cache else 0.0
    own = max(1.0, profile.mean_prompt - cached)
    attention = _mean_attention(table, profile, cached)

    def time(chunk: FloatArray, share: FloatArray) -> FloatArray:
        return step_time(
            table,
            num_decodes=np.zeros_like(chunk),
            context=profile.decode_context,
            variation=0.0,
            tokens_per_decode=1.0,
            chunk_tokens=chunk,
            chunk_attention=attention * share,
            chunk_sequences=np.maximum(share, 1.0),
        )

    full = time(budget, budget / own) * own / budget
    chunk = np.minimum(budget, own)
    alone = time(chunk, chunk / own) * own / chunk
    rate = 1.0 / (np.minimum(full, alone) * table.stage_share)
    longest = max(1.0, (profile.mean_prompt if prompt is None else prompt) - cached)
    chunk = np.minimum(budget, longest)
    per_chunk = prefill_attention(table, np.asarray([longest]))[0] / longest
    latency = np.ceil(longest / budget) * (time(chunk, np.zeros_like(chunk)) + per_chunk * chunk)
    return rate, latency


def gap_statistics(slo: Slo) -> tuple[str, ...]:
    """Return the percentiles of the time between two steps that are limited."""
    return tuple(
        limit.statistic for limit in slo.limits if limit.metric == "itl" and limit.statistic != "mean"
    )


def keeps_limits(state: SteadyState, slo: Slo, profile: LoadProfile) -> dict[str, BoolArray]:
    """Return, by limit, whether each state can keep it; optimistic, as the states are.

    A mean over requests is below their 90th percentile, so that limits on percentiles are held against means.
    """
    kept: dict[str, BoolArray] = {}
    for limit in slo.limits:
        # The median of a skewed quantity may lie well below its mean.
        slack = 2.0 if limit.statistic == "p50" else 1.0
        kept[limit.name] = limited_value(state, limit, profile) <= limit.seconds * slack
    return kept


def limited_value(state: SteadyState, limit: SloLimit, profile: LoadProfile) -> FloatArray:
    """Return what a limit is held against in each state [s]; see :func:`keeps_limits`."""
    if limit.metric == "tpot":
        return state.tpot
    if limit.metric == "ttft":
        return state.ttft
    if limit.metric == "itl":
        return state.gap if limit.statistic == "mean" else state.late_gaps[limit.statistic]
    return state.ttft + (profile.mean_output - 1.0) * state.tpot


def _mean_attention(table: StepTable, profile: LoadProfile, cached: float) -> float:
    """Return the mean attention of a prompt, less that of its cached part [s]."""
    whole = prefill_attention(table, profile.prompt_lengths)
    skipped = prefill_attention(table, np.minimum(profile.prompt_lengths, cached))
    return float(np.mean(whole - skipped))
