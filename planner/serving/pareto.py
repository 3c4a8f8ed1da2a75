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
from meshwright.simcore.domain.serving import PoolRole

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
    budgets = np.array(choices.budgets, dtype=np.float64)
    grid = state_grid(max(choices.max_num_sequences))
    prefill = _prefill_rate_per_gpu(space)
    user, gpu, ttft, index, modes, decodes = ([] for _ in range(6))
    for number, option in enumerate(space.options):
        if option.is_prefill_only:
            continue
        roles: list[tuple[str, PoolRole]] = []
        if space.aggregated is not None:
            roles.append(("aggregated", "aggregated"))
        if space.decode is not None and _format(option) in prefill:
            roles.append(("disaggregated", "decode"))
        for mode, role in roles:
            state = replica_steady_state(
                option.table,
                profile,
                num_decodes=grid,
                budgets=budgets if role == "aggregated" else budgets[:1],
                policy=option.policy,
                role=role,
                num_ranks=option.degrees["attention_dp"],
            )
            holds = (state.kv_tokens <= option.kv_cache_tokens) & state.lasts & (state.rate > 0.0)
            rate = state.rate * option.degrees["attention_dp"]
            gpus = np.full(rate.shape, float(option.num_gpus))
            first = state.ttft
            if mode == "disaggregated":
                per_gpu, seconds = prefill[_format(option)]
                gpus = gpus + rate / per_gpu
                first = np.full(rate.shape, seconds)
            per_user, per_gpu_rate = 1.0 / state.tpot[holds], (rate * profile.mean_output / gpus)[holds]
            user.append(per_user)
            gpu.append(per_gpu_rate)
            ttft.append(first[holds])
            decodes.append(state.num_decodes[holds])
            index.append(np.full(per_user.size, number))
            modes.append(np.full(per_user.size, mode))
    if not user:
        return ()
    columns = [np.concatenate(part) for part in (user, gpu, ttft, decodes, index, modes)]
    rows = _front_rows(columns[0], columns[1])
    if len(rows) > max_points:
        rows = rows[np.unique(np.round(np.linspace(0, len(rows) - 1, max_points)).astype(np.int64))]
    return tuple(
        FrontPoint(
            tokens_per_second_per_user=float(columns[0][row]),
            tokens_per_second_per_gpu=float(columns[1][row]),
            ttft=float(columns[2][row]),
            num_decodes=float(columns[3][row]),
            option=space.options[int(columns[4][row])],
            mode=str(columns[5][row]),
        )
        for row in rows
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
