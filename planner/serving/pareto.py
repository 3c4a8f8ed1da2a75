"""What a cluster can trade: tokens per second a user sees against tokens per second a GPU makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.serving.candidates import ReplicaOption, SchedulerChoices, state_grid
from meshwright.planner.serving.load_profile import LoadProfile
from meshwright.planner.serving.space import CandidateSpace
from meshwright.planner.serving.steady_state import replica_steady_state

__all__ = ["FrontPoint", "interactivity_front"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPoint:
    """One point of the front, by steady state.

    Parameters
    ----------
    tokens_per_second_per_user, tokens_per_second_per_gpu : float
        One over the mean time per output token, and output tokens over GPUs [1/s].
    ttft : float
        Steps of the mean prompt [s].
    option : ReplicaOption
        What decodes.
    mode : str
        ``aggregated`` or ``disaggregated``.
    num_decodes : float
        Sequences each of its ranks decodes at once.
    """

    tokens_per_second_per_user: float
    tokens_per_second_per_gpu: float
    ttft: float
    option: ReplicaOption
    mode: str
    num_decodes: float


def interactivity_front(
    space: CandidateSpace, profile: LoadProfile, choices: SchedulerChoices, max_points: int = 10
) -> tuple[FrontPoint, ...]:
    """Return the steady states that no other beats in both rates, fastest for the user first.

    Limits of the objective are left aside. A disaggregated state's GPUs are those of the decode replica and as many of
    the best prefill pool as its rate needs, in fractions.

    Parameters
    ----------
    space, profile, choices :
        As searched.
    max_points : int
        Points to keep, spread evenly over the front.
    """
    grid = state_grid(max(choices.max_num_sequences))
    prefill = _prefill_rate_per_gpu(space)
    found = []
    for number, option in enumerate(space.options):
        if option.is_prefill_only:
            continue
        if space.aggregated is not None:
            found.append(_states(number, option, profile, choices, grid, None))
        if space.decode is not None and _format(option) in prefill:
            found.append(_states(number, option, profile, choices, grid, prefill[_format(option)]))
    if not found:
        return ()
    user, gpu, ttft, decodes, index, is_apart = (
        np.concatenate([state[column] for state in found]) for column in range(6)
    )
    rows = _front_rows(user, gpu)
    if len(rows) > max_points:
        rows = rows[np.unique(np.round(np.linspace(0, len(rows) - 1, max_points)).astype(np.int64))]
    return tuple(
        FrontPoint(
            tokens_per_second_per_user=float(user[row]),
            tokens_per_second_per_gpu=float(gpu[row]),
            ttft=float(ttft[row]),
            num_decodes=float(decodes[row]),
            option=space.options[int(index[row])],
            mode="disaggregated" if is_apart[row] else "aggregated",
        )
        for row in rows
    )


def _states(
    number: int,
    option: ReplicaOption,
    profile: LoadProfile,
    choices: SchedulerChoices,
    grid: FloatArray,
    prefill: tuple[float, float] | None,
) -> tuple[FloatArray, ...]:
    """Return the states an option can hold as columns: user, GPU, first token, sequences, option, whether pools are apart.

    Parameters
    ----------
    prefill : tuple[float, float] | None
        Requests per second and GPU of the prefill pool that feeds it, and its seconds; None where it prefills itself.
    """
    drafts, ranks = option.num_speculative_tokens, option.degrees["attention_dp"]
    budgets = np.array(choices.budgets, dtype=np.float64)
    state = replica_steady_state(
        option.table,
        profile,
        num_decodes=grid,
        # A decode pool's budget only has to hold its batch.
        budgets=budgets if prefill is None else budgets.max(keepdims=True),
        policy=option.policy,
        role="aggregated" if prefill is None else "decode",
        num_speculative_tokens=drafts,
        tokens_per_step=choices.acceptance.tokens_per_step(drafts),
        num_ranks=ranks,
    )
    holds = (state.kv_tokens <= option.kv_cache_tokens) & state.lasts & (state.rate > 0.0)
    rate = state.rate[holds] * ranks
    gpus, ttft = np.full(rate.shape, float(option.num_gpus)), state.ttft[holds]
    if prefill is not None:
        gpus, ttft = gpus + rate / prefill[0], np.full(rate.shape, prefill[1])
    return (
        1.0 / state.tpot[holds],
        rate * profile.mean_output / gpus,
        ttft,
        state.num_decodes[holds],
        np.full(rate.shape, float(number)),
        np.full(rate.shape, float(prefill is not None)),
    )


def _front_rows(user: FloatArray, gpu: FloatArray) -> NDArray[np.int64]:
    """Return the rows that no other beats in both, by falling ``user``."""
    order = np.lexsort((-gpu, -user))
    best = np.maximum.accumulate(gpu[order])
    is_new = np.concatenate([[True], best[1:] > best[:-1]])
    rows: NDArray[np.int64] = order[is_new]
    return rows


def _format(option: ReplicaOption) -> tuple[str, str, str]:
    return option.engine, option.precision, option.kv_precision


def _prefill_rate_per_gpu(space: CandidateSpace) -> Mapping[tuple[str, str, str], tuple[float, float]]:
    """Return the best requests per second and GPU of a prefill pool, and its seconds, by engine and formats."""
    found: dict[tuple[str, str, str], tuple[float, float]] = {}
    if space.prefill is None:
        return found
    for row in range(len(space.prefill)):
        option = space.options[int(space.prefill.option[row])]
        rate = float(space.prefill.rate[row]) / option.num_gpus
        if rate > found.get(_format(option), (0.0, 0.0))[0]:
            found[_format(option)] = (rate, float(space.prefill.ttft[row]))
    return found
