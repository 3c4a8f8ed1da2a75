"""Serving accuracy on measured runs: the shipped constants, and each H100 model predicted without its own runs.

Leaving a model out: constants of another model of the same engine are fitted anew to the rows of all other models of
that engine, mixtures of experts and dense models apart where both are there, and the rows of the model left out are
predicted with them. Every number comes from other models; what stays is how the engine was launched and what its release
notes say: scheduling policy, hidden host, fused kernels. An engine whose other models are all dense takes the factor on
experts from mixtures on other engines.

    python benchmarks/serving_accuracy.py tests/validation/serving_runs.csv [--left-out] [--rows 24]
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from meshwright.costmodels.serving.constants import FITTABLE, EngineConstants
from meshwright.profiler.fitting.serving import search_constants
from meshwright.profiler.serving_runs import ServingRun, read_serving_runs, serving_setup
from meshwright.profiler.serving_validation import (
    ScoredServingRun,
    ServingValidator,
    grouped,
    rank_correlations,
    summarise_serving,
)
from meshwright.simcore.domain.model_catalog import load_model

SYSTEM = "H100-80GB-SXM"
GOOD_RANK = 0.95
NUM_DRAWS = 200
MOVED = (
    "kernel_time",
    "step_latency",
    "host_time_per_sequence",
    "eager_kernel_time",
    "response_latency",
    "request_time",
)


def line(name: str, rows: Sequence[ScoredServingRun]) -> str:
    """Return one line of errors."""
    errors = summarise_serving(name, rows)
    figures = (errors.tpot_median, errors.tpot_bias, errors.ttft_median, errors.ttft_bias)
    tpot, tpot_bias, ttft, ttft_bias = (100.0 * (figure or 0.0) for figure in figures)
    return (
        f"{name:44s} {errors.num_scored:4d}/{errors.num_rows:<4d} TPOT {tpot:5.1f} % ({tpot_bias:+.1f})  "
        f"TTFT {ttft:5.1f} % ({ttft_bias:+.1f})"
    )


def print_ranks(rows: Sequence[ScoredServingRun]) -> None:
    """Print how rows of one model on one system are ordered, beside what the noise of the rows themselves allows."""
    ranks = rank_correlations(rows)
    weight = sum(rank.num_rows for rank in ranks)
    for quantity in ("tpot", "ttft"):
        noise = repeat_noise(rows, quantity)
        mean = sum(getattr(rank, quantity) * rank.num_rows for rank in ranks) / weight
        good = sum(getattr(rank, quantity) >= GOOD_RANK for rank in ranks)
        print(
            f"rank correlation of {quantity}: mean over rows {mean:.3f}; >= {GOOD_RANK} in {good} of {len(ranks)} "
            f"groups; rows measured twice differ by {100.0 * noise:.1f} % (one standard deviation)"
        )
        for rank in ranks:
            if getattr(rank, quantity) < GOOD_RANK:
                part = [
                    row
                    for row in rows
                    if (row.run.cell("model"), row.run.cell("gpu")) == (rank.model, rank.gpu)
                ]
                print(
                    f"  {rank.model.split('/')[-1]} on {rank.gpu}, {len(part)} rows: {getattr(rank, quantity):.3f}; "
                    f"without any error but that noise {attainable_rank(part, quantity, noise):.3f}"
                )


def repeat_noise(rows: Sequence[ScoredServingRun], quantity: str) -> float:
    """Return the standard deviation of the logarithm of rows that mean the same run but are not the same numbers."""
    repeats = grouped(rows, lambda row: repr(serving_setup(row.run)))
    squares = [
        0.5 * math.log(measured(first, quantity) / measured(second, quantity)) ** 2
        for same in repeats.values()
        for first, second in itertools.pairwise(same)
        if measured(first, "ttft") != measured(second, "ttft")
    ]
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


def attainable_rank(rows: Sequence[ScoredServingRun], quantity: str, noise: float) -> float:
    """Return the mean rank correlation of measured times with themselves after such noise."""
    times = np.array([measured(row, quantity) for row in rows])
    generator = np.random.default_rng(0)
    return float(
        np.mean(
            [
                spearmanr(times, times * np.exp(noise * generator.standard_normal(len(times)))).statistic
                for _ in range(NUM_DRAWS)
            ]
        )
    )


def measured(row: ScoredServingRun, quantity: str) -> float:
    """Return a measured mean [s]."""
    return row.run.tpot_mean if quantity == "tpot" else row.run.ttft_mean


def left_out(runs: Sequence[ServingRun], engine: str, model: str, num_rows: int) -> list[ScoredServingRun]:
    """Return the rows of a model on H100 predicted by constants fitted to the engine's other models."""
    own = [run for run in runs if run.cell("model") == model and run.cell("engine") == engine]
    others = [run for run in runs if run.cell("engine") == engine and run.cell("model") != model]
    same_system = [run for run in others if run.cell("gpu") == SYSTEM]
    others = same_system or others
    # Constants are kept for dense models and mixtures apart, so one kind teaches its own where it can.
    is_moe = is_mixture(model)
    others = [run for run in others if is_mixture(run.cell("model")) == is_moe] or others
    teacher = Counter(run.cell("model") for run in others).most_common(1)[0][0]
    start = constants_of(next(run for run in others if run.cell("model") == teacher))
    if is_moe and not is_mixture(teacher):
        # How a router spreads tokens is a matter of models: taken from mixtures on other engines.
        elsewhere = [
            run
            for run in runs
            if run.cell("engine") != engine
            and run.cell("gpu") == SYSTEM
            and run.cell("model") != model
            and is_mixture(run.cell("model"))
        ]
        start = replace(start, expert_factor=constants_of(elsewhere[0]).expert_factor)
    thinned = others[:: max(1, len(others) // num_rows)]
    values = search_constants(
        thinned, MOVED, {name: float(getattr(start, name)) for name in FITTABLE}, rounds=1
    )

    def lent(constants: EngineConstants) -> EngineConstants:
        return replace(constants, **values)  # type: ignore[arg-type]  # number fields only

    validator = ServingValidator(constants=lent)
    return [validator.score(run) for run in own if run.cell("gpu") == SYSTEM]


def is_mixture(model: str) -> bool:
    """Return whether a model is a mixture of experts."""
    return load_model(model).moe is not None


def constants_of(run: ServingRun) -> EngineConstants:
    """Return the shipped constants of a row's engine release."""
    return ServingValidator().served(serving_setup(run)).constants


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--left-out", action="store_true")
    parser.add_argument("--rows", type=int, default=96, help="rows each left-out fit sees")
    arguments = parser.parse_args()
    runs = [run for run in read_serving_runs(arguments.table) if run.quality == "ok"]
    begin = time.perf_counter()
    validator = ServingValidator()
    scored = [validator.score(run) for run in runs]
    together = [row for row in scored if not row.run.is_disaggregated]
    on_system = [row for row in together if row.run.cell("gpu") == SYSTEM]
    elsewhere = [row for row in together if row.run.cell("gpu") != SYSTEM]
    apart = [row for row in scored if row.run.is_disaggregated]
    for name, rows in (
        ("H100", on_system),
        ("other systems", elsewhere),
        ("disaggregated, decode only", apart),
    ):
        print(line(name, rows))
    print_ranks(together)
    print(f"{len(scored)} rows in {time.perf_counter() - begin:.1f} s")
    if not arguments.left_out:
        return
    aggregated = [run for run in runs if not run.is_disaggregated]
    groups = Counter(
        (run.cell("engine"), run.cell("model")) for run in aggregated if run.cell("gpu") == SYSTEM
    )
    for (engine, model), count in groups.items():
        if count >= 10:
            rows = left_out(aggregated, engine, model, arguments.rows)
            print(line(f"without {engine} {model.split('/')[-1]}", rows), flush=True)


if __name__ == "__main__":
    main()
