"""How well predictions order the plans of one job: rank correlation, and what choosing by prediction costs.

A planner is as good as its order: an error all plans share changes no choice. Plans are compared within groups of
measured runs of one source that had the same model, GPUs and sequence length to run on.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import kendalltau

from meshwright.profiler.measured_setup import MeasuredSetup
from meshwright.profiler.validation import ScoredRun

__all__ = ["RankingSummary", "kendall_tau", "plan_groups", "ranking", "regret"]

# Fewer runs than this are no choice worth scoring.
_MIN_ROWS = 4
# What one group shares beyond model, GPU and counts: the machines between the GPUs.
_MACHINE_COLUMNS = ("gpus_per_node", "internode_gbit_per_node", "cluster")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingSummary:
    """How well the predictions of some rows order them.

    Parameters
    ----------
    tau : float | None
        Kendall's tau-b between measured and predicted iteration time over all rows; None where undefined.
    num_groups, num_grouped : int
        Groups of rival plans, and rows in them.
    group_tau : float | None
        Mean over the groups of tau-b between measured and predicted time per token; None without a group.
    mean_regret, max_regret : float | None
        Over the groups, see :func:`regret`; None without a group.
    """

    name: str
    tau: float | None
    num_groups: int
    num_grouped: int
    group_tau: float | None
    mean_regret: float | None
    max_regret: float | None


def kendall_tau(measured: Sequence[float], predicted: Sequence[float]) -> float | None:
    """Return Kendall's rank correlation, 1 for the same order and -1 for the reverse.

    Parameters
    ----------
    measured, predicted : Sequence[float]
        Times of the same rows, in the same order.

    Returns
    -------
    float | None
        Tau-b, which corrects for ties (Kendall 1945); None when one of the two holds fewer than two values that
        differ.

    Examples
    --------
    >>> kendall_tau([1.0, 2.0, 3.0], [1.1, 1.9, 3.5])
    1.0
    """
    if len(set(measured)) < 2 or len(set(predicted)) < 2:
        return None
    return float(kendalltau(measured, predicted).statistic)


def regret(measured: Sequence[float], predicted: Sequence[float]) -> float:
    """Return what running the plan predicted fastest costs over running the fastest.

    Parameters
    ----------
    measured, predicted : Sequence[float]
        Times per token of rival plans, in the same order.

    Returns
    -------
    float
        Measured time of the plan predicted fastest over the least measured time, minus 1. Of plans predicted
        alike any may be chosen: they count with the mean of their measured times.

    Examples
    --------
    >>> regret([1.0, 1.25, 2.0], [1.3, 1.2, 2.0])
    0.25
    """
    times, guesses = np.asarray(measured), np.asarray(predicted)
    chosen = np.isclose(guesses, guesses.min(), rtol=1e-9, atol=0.0)
    return float(times[chosen].mean() / times.min() - 1.0)


def plan_groups(rows: Sequence[ScoredRun]) -> tuple[tuple[ScoredRun, ...], ...]:
    """Return the groups of rival plans among some rows: four rows or more of one job, each row in one group at most.

    Rivals share source, model (its shape, not its name), GPU and machines, number of GPUs, sequence length and
    global batch. What is left of a job where fewer than four rows share a batch is a group of its own, when it
    has four rows: that is why groups compare time per token. Rows of a single plan are no choice and no group.
    """
    jobs: dict[Hashable, list[ScoredRun]] = {}
    for row in rows:
        if row.time_error is not None:
            jobs.setdefault(_job(row), []).append(row)
    groups = []
    for rivals in jobs.values():
        batches: dict[int, list[ScoredRun]] = {}
        for row in rivals:
            batches.setdefault(_setup(row).job.workload.global_batch_size, []).append(row)
        groups += [batch for batch in batches.values() if len(batch) >= _MIN_ROWS]
        groups.append([row for batch in batches.values() if len(batch) < _MIN_ROWS for row in batch])
    return tuple(
        tuple(group) for group in groups if len(group) >= _MIN_ROWS and len(_times_per_token(group)) > 1
    )


def ranking(name: str, rows: Sequence[ScoredRun]) -> RankingSummary:
    """Return how well the predictions of some rows order them."""
    timed = [row for row in rows if row.time_error is not None]
    groups = plan_groups(timed)
    taus, regrets = [], []
    for group in groups:
        measured, predicted = zip(*_times_per_token(group), strict=True)
        taus.append(kendall_tau(measured, predicted))
        regrets.append(regret(measured, predicted))
    known = [tau for tau in taus if tau is not None]
    times = [_seconds(row) for row in timed]
    return RankingSummary(
        name=name,
        tau=kendall_tau([measured for measured, _ in times], [predicted for _, predicted in times]),
        num_groups=len(groups),
        num_grouped=sum(len(group) for group in groups),
        group_tau=float(np.mean(known)) if known else None,
        mean_regret=float(np.mean(regrets)) if groups else None,
        max_regret=max(regrets) if groups else None,
    )


def _times_per_token(rows: Sequence[ScoredRun]) -> list[tuple[float, float]]:
    """Return measured and predicted seconds per token of every plan; runs described alike are one plan's reruns."""
    plans: dict[Hashable, list[tuple[float, float]]] = {}
    for row in rows:
        setup = _setup(row)
        job = setup.job
        plan = (setup.plan, setup.features, setup.attention_kernel, job.workload, job.software)
        measured, predicted = _seconds(row)
        plans.setdefault(plan, []).append(
            (measured / job.workload.num_tokens, predicted / job.workload.num_tokens)
        )
    return [(float(np.mean([measured for measured, _ in runs])), runs[0][1]) for runs in plans.values()]


def _job(row: ScoredRun) -> Hashable:
    """Return what rivals share besides their batch."""
    setup = _setup(row)
    job, length = setup.job, setup.job.workload.sequence_length
    # A preset's longest sequence is no part of what is computed.
    shape = replace(job.model, name="", max_position_embeddings=length)
    machines = tuple(row.run.cell(column) for column in _MACHINE_COLUMNS)
    return row.run.source, shape, job.cluster.gpu.id, setup.plan.num_gpus, machines, length


def _setup(row: ScoredRun) -> MeasuredSetup:
    assert row.setup is not None  # a row with a time error was predicted from a setup
    return row.setup


def _seconds(row: ScoredRun) -> tuple[float, float]:
    """Return measured and predicted iteration time."""
    assert row.prediction is not None  # as above
    assert row.run.measured_seconds is not None  # as above
    return row.run.measured_seconds, row.prediction.iteration_time
