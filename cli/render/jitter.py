"""What ``simulate --jitter`` shows: the distribution of the iteration time, and who is waited for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from meshwright.cli.render.console import make_table
from meshwright.simcore.training.jitter import JitterResult
from meshwright.units import format_change

__all__ = ["jitter_mapping", "print_jitter"]

_PERCENTILES = (5, 50, 95)


def jitter_mapping(result: JitterResult) -> dict[str, object]:
    """Return the distribution as plain data, SI units in the key names."""
    percentiles = {
        f"iteration_time_p{percent}_seconds": result.percentile(percent) for percent in _PERCENTILES
    }
    return {
        "operation_spread": result.jitter.operation_spread,
        "rank_spread": result.jitter.rank_spread,
        "slow_ranks": [{"rank": rank, "factor": factor} for rank, factor in result.jitter.slow_ranks],
        "num_replicas": result.groups.num_replicas,
        "ranks_in_lock_step": result.groups.num_ranks,
        "first_seed": result.first_seed,
        "num_seeds": result.num_seeds,
        "jitter_free_seconds": result.jitter_free_time,
        "iteration_time_mean_seconds": result.mean,
        **percentiles,
        "slowdown": result.slowdown,
        "lost_share": result.lost_share,
        "lost_share_inside_replicas": result.lost_inside_replicas,
        "lost_share_between_replicas": result.lost_between_replicas,
        "straggler_stages": _counts(result.critical_stage),
        "straggler_replicas": _counts(result.critical_replica),
        "iteration_time_seconds": result.iteration_time.tolist(),
    }


def print_jitter(console: Console, result: JitterResult) -> None:
    """Print the distribution and who is waited for."""
    jitter, groups = result.jitter, result.groups
    table = make_table("Iteration time with jitter", (("", False), ("time", True), ("slowdown", True)))
    table.add_row("without jitter", f"{result.jitter_free_time:.4g} s", "")
    rows = {"mean": result.mean} | {f"P{percent}": result.percentile(percent) for percent in _PERCENTILES}
    if result.num_seeds == 1:
        rows = {"with jitter": result.mean}
    for name, seconds in rows.items():
        extra = seconds / result.jitter_free_time - 1.0 if result.jitter_free_time else 0.0
        table.add_row(name, f"{seconds:.4g} s", format_change(extra, 2))
    console.print(table)
    console.print(
        f"Lost to stragglers: {result.lost_share:.1%} of the mean iteration, {result.lost_inside_replicas:.1%} inside "
        f"replicas (lock-step ranks, pipeline) and {result.lost_between_replicas:.1%} between them (waiting at the "
        "gradient reduction).",
        soft_wrap=True,
    )
    num_slow = len({rank for rank, _ in jitter.slow_ranks})
    seeds = "1 seed" if result.num_seeds == 1 else f"{result.num_seeds} seeds"
    console.print(
        f"Drawn: {seeds} from {result.first_seed}; spread of operations {100 * jitter.operation_spread:.3g}%, of "
        f"ranks {100 * jitter.rank_spread:.3g}%; {num_slow} ranks slowed. Per stage {groups.num_replicas} replicas of "
        f"{groups.num_ranks} ranks in lock-step.",
        soft_wrap=True,
    )
    stages, replicas = _counts(result.critical_stage), _counts(result.critical_replica)
    if not stages:
        console.print("Nobody on the critical path is slow.")
        return
    console.print(
        f"Straggler of the critical path: most often {_most_often('stage', stages)} and "
        f"{_most_often('replica', replicas)}, of {seeds}.",
        soft_wrap=True,
    )


def _counts(stragglers: NDArray[np.int64]) -> dict[str, int]:
    """Return how many seeds each stage or replica was the straggler of, most often first."""
    values, counts = np.unique(stragglers[stragglers >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {str(values[index]): int(counts[index]) for index in order}


def _most_often(what: str, counts: dict[str, int]) -> str:
    name, count = next(iter(counts.items()))
    return f"{what} {name} ({count})"
