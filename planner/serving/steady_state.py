"""Steady state of one replica in closed form: what rate and what latencies a number of decoding sequences means.

The figures are optimistic: no request ever waits for another's prompt, batches never fluctuate, and the cache never
overflows. They are therefore an upper bound of the rate that keeps a limit, up to the curvature of the step times; the
simulation says how much of it remains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.serving.load_profile import LoadProfile
from meshwright.planner.serving.step_times import prefill_attention, step_time
from meshwright.simcore.domain.serving import PolicyName, PoolRole, Slo, SloLimit
from meshwright.simcore.serving.step_table import StepTable

__all__ = [
    "SteadyState",
    "accepted_per_step",
    "keeps_limits",
    "limited_value",
    "prefill_steady_state",
    "replica_steady_state",
]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
# Shares of requests that a percentile leaves out.
_TAILS = {"mean": 0.5, "p50": 0.5, "p90": 0.1, "p95": 0.05, "p99": 0.01}
# Policies whose prompts stop all decoding.
_PROMPTS_ALONE = frozenset({"prefill_first", "static"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteadyState:
    """States of one rank of one replica; all arrays have the shape ``(num_states, num_budgets)``.

    Parameters
    ----------
    num_decodes : NDArray[np.float64]
        Sequences that decode at once.
    rate : NDArray[np.float64]
        Requests that arrive and leave [1/s]; 0 where the state cannot last.
    tpot, itl : NDArray[np.float64]
        Mean time per output token after the first, mean time between two steps of a sequence [s].
    mixed_step, mixed_share : NDArray[np.float64]
        Time of a step that holds prompt tokens [s], and the share of steps that do.
    ttft : NDArray[np.float64]
        Time of the steps that the prompt of ``prompt`` tokens takes part in [s].
    kv_tokens : NDArray[np.float64]
        Tokens in the cache.
    """

    num_decodes: FloatArray
    rate: FloatArray
    tpot: FloatArray
    itl: FloatArray
    mixed_step: FloatArray
    mixed_share: FloatArray
    ttft: FloatArray
    kv_tokens: FloatArray


def accepted_per_step(num_speculative_tokens: int, acceptance_rate: float) -> float:
    """Return the mean tokens a sequence gains in a step: ``(1 - a^(s+1)) / (1 - a)``.

    Source: Leviathan et al. 2022 (arXiv 2211.17192), equation 1.
    """
    if acceptance_rate >= 1.0:
        return 1.0 + num_speculative_tokens
    return (1.0 - acceptance_rate ** (num_speculative_tokens + 1)) / (1.0 - acceptance_rate)


def replica_steady_state(
    table: StepTable,
    profile: LoadProfile,
    *,
    num_decodes: FloatArray,
    budgets: FloatArray,
    policy: PolicyName,
    role: PoolRole = "aggregated",
    num_speculative_tokens: int = 0,
    acceptance_rate: float = 0.0,
    has_prefix_cache: bool = False,
    prompt: float | None = None,
    num_ranks: int = 1,
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
    num_speculative_tokens, acceptance_rate : int, float
        Tokens drafted per step and the chance that one is accepted.
    has_prefix_cache : bool
        Whether prompts skip what is cached.
    prompt : float | None
        Prompt that ``ttft`` is for; the mean one when None [tokens].
    num_ranks : int
        Attention data parallel ranks whose prompts come independently, so that a step lasts as long as that of any
        rank with a prompt; 1 lets all ranks have theirs in the same steps, which is the bound.

    Notes
    -----
    A request decodes ``s = (o - 1) / a`` steps (``a`` tokens accepted per step), so that ``d`` sequences leave at ``d / s``
    per step and their successors bring ``q = d p / s`` prompt tokens per step. Those come in chunks of ``c`` tokens, in a
    share ``q / c`` of the steps. The rate is ``d / s`` over the mean step.
    """
    d = np.asarray(num_decodes, dtype=np.float64)[:, None]
    budget = np.asarray(budgets, dtype=np.float64)[None, :]
    shape = np.broadcast_shapes(d.shape, budget.shape)
    drafted = 1.0 + num_speculative_tokens
    accepted = accepted_per_step(num_speculative_tokens, acceptance_rate)
    steps = max(1e-9, (profile.mean_output - 1.0) / accepted)
    cached = profile.mean_cached if has_prefix_cache else 0.0
    own = 0.0 if role == "decode" else max(1.0, profile.mean_prompt - cached)
    attention = _mean_attention(table, profile, cached)

    def time(decodes: FloatArray, chunk: FloatArray) -> FloatArray:
        share = chunk / own if own else chunk
        return step_time(
            table,
            num_decodes=decodes,
            context=profile.decode_context,
            variation=profile.context_variation,
            tokens_per_decode=drafted,
            chunk_tokens=chunk,
            chunk_attention=attention * share,
            chunk_sequences=np.maximum(share, (chunk > 0.0) * 1.0),
        )

    alone = policy in _PROMPTS_ALONE
    room = np.maximum(budget - (0.0 if alone else d * drafted), 0.0) + 0.0 * d
    per_step = d * own / steps + 0.0 * budget
    chunk = np.minimum(room, np.maximum(own, per_step))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        mixed_share = np.where(per_step > 0.0, per_step / chunk, 0.0)
    pure = time(d + 0.0 * budget, np.zeros(shape))
    mixed = time(np.zeros(shape) if alone else d + 0.0 * budget, np.maximum(chunk, 1.0)) if own else pure
    if alone:
        # The bound lets prompts wait for each other until a step is full.
        full = time(np.zeros(shape), np.maximum(room, 1.0)) * np.maximum(chunk, 1.0) / np.maximum(room, 1.0)
        itl = pure + num_ranks * mixed_share * np.minimum(mixed, full)
        lasts = room > 0.0
        mixed = mixed + pure
    else:
        # The bound lets prompts wait for each other until a step is full, where that makes fewer steps of them.
        with np.errstate(divide="ignore", invalid="ignore"):
            full_share = np.where(per_step > 0.0, per_step / room, 0.0)
        full = time(d + 0.0 * budget, np.maximum(room, 1.0)) if own else pure
        lasts = np.minimum(mixed_share, full_share) <= 1.0
        itl = np.minimum(
            _mixed_time(pure, mixed, mixed_share, num_ranks), _mixed_time(pure, full, full_share, num_ranks)
        )
    rate = np.where(lasts, d / (steps * itl * table.stage_share), 0.0)
    longest = max(1.0, (profile.mean_prompt if prompt is None else prompt) - cached)
    with np.errstate(divide="ignore"):
        num_steps = np.ceil(longest / np.maximum(room, 1e-9)) if own else np.zeros(shape)
    first = time(np.zeros(shape) if alone else d + 0.0 * budget, np.minimum(longest, np.maximum(room, 1.0)))
    ttft = np.where(room > 0.0, num_steps * first, np.inf) if own else np.zeros(shape)
    in_prefill = rate * np.where(np.isfinite(ttft), ttft, 0.0) * own / 2.0
    running = d / table.stage_share
    kv_tokens = running * profile.decode_context + in_prefill
    return SteadyState(
        num_decodes=running + np.zeros(shape),
        rate=np.where(np.isfinite(rate), rate, 0.0),
        tpot=itl / accepted,
        itl=itl,
        mixed_step=mixed,
        mixed_share=mixed_share,
        ttft=ttft,
        kv_tokens=kv_tokens + np.zeros(shape),
    )


def _mixed_time(pure: FloatArray, mixed: FloatArray, share: FloatArray, num_ranks: int) -> FloatArray:
    """Return the mean step of which a share holds a prompt on any of the ranks [s]."""
    # States that do not last have no rate; their share may even be infinite.
    any_rank = 1.0 - (1.0 - np.minimum(share, 1.0)) ** num_ranks
    mean: FloatArray = (1.0 - any_rank) * pure + any_rank * mixed
    return mean


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
        # A percentile of single gaps is that of a mixed step as soon as more steps than its tail are mixed.
        is_mixed = limit.statistic != "mean" and state.mixed_share > _TAILS[limit.statistic]
        unmixed = state.itl if limit.statistic == "mean" else 0.0 * state.itl
        return np.where(is_mixed, state.mixed_step, unmixed)
    return state.ttft + (profile.mean_output - 1.0) * state.tpot


def _mean_attention(table: StepTable, profile: LoadProfile, cached: float) -> float:
    """Return the mean attention of a prompt, less that of its cached part [s]."""
    whole = prefill_attention(table, profile.prompt_lengths)
    skipped = prefill_attention(table, np.minimum(profile.prompt_lengths, cached))
    return float(np.mean(whole - skipped))
