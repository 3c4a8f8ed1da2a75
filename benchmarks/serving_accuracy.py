"""Serving accuracy on measured runs: the shipped constants, and each H100 model predicted without its own runs.

Leaving a model out: constants of another model of the same engine are fitted anew to the rows of all other models of
that engine, mixtures of experts and dense models apart where both are there, and the rows of the model left out are predicted with them. Policy and flags are the other model's too.

    python benchmarks/serving_accuracy.py tests/validation/serving_runs.csv [--left-out] [--rows 24]
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from meshwright.costmodels.serving.constants import FITTABLE, EngineConstants
from meshwright.profiler.fitting.serving import search_constants
from meshwright.profiler.serving_runs import ServingRun, read_serving_runs, serving_setup
from meshwright.profiler.serving_validation import (
    ScoredServingRun,
    ServingValidator,
    rank_correlations,
    summarise_serving,
)
from meshwright.simcore.domain.model_catalog import load_model

SYSTEM = "H100-80GB-SXM"
MOVED = (
    "kernel_time",
    "step_latency",
    "host_time_per_sequence",
    "eager_layer_time",
    "prompts_per_step",
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


def left_out(runs: Sequence[ServingRun], engine: str, model: str, num_rows: int) -> list[ScoredServingRun]:
    """Return the rows of a model on H100 predicted by constants fitted to the engine's other models."""
    own = [run for run in runs if run.cell("model") == model and run.cell("engine") == engine]
    others = [run for run in runs if run.cell("engine") == engine and run.cell("model") != model]
    same_system = [run for run in others if run.cell("gpu") == SYSTEM]
    others = same_system or others
    # Constants are kept for dense models and mixtures apart, so one kind teaches its own where it can.
    is_moe = load_model(model).moe is not None
    of_kind = [run for run in others if (load_model(run.cell("model")).moe is not None) == is_moe]
    others = of_kind or others
    teacher = Counter(run.cell("model") for run in others).most_common(1)[0][0]
    example = next(run for run in others if run.cell("model") == teacher)
    start = ServingValidator().served(serving_setup(example)).constants
    thinned = others[:: max(1, len(others) // num_rows)]
    values = search_constants(
        thinned, MOVED, {name: float(getattr(start, name)) for name in FITTABLE}, rounds=1
    )
    fitted = replace(start, **values)  # type: ignore[arg-type]  # number fields only

    def lent(constants: EngineConstants) -> EngineConstants:
        return replace(fitted, engine=constants.engine, version=constants.version)

    validator = ServingValidator(constants=lent)
    return [validator.score(run) for run in own if run.cell("gpu") == SYSTEM]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--left-out", action="store_true")
    parser.add_argument("--rows", type=int, default=24, help="rows each left-out fit sees")
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
    ranks = rank_correlations(together)
    weight = sum(rank.num_rows for rank in ranks)
    for quantity in ("tpot", "ttft"):
        mean = sum(getattr(rank, quantity) * rank.num_rows for rank in ranks) / weight
        good = sum(getattr(rank, quantity) >= 0.95 for rank in ranks)
        print(
            f"rank correlation of {quantity}: mean over rows {mean:.3f}; >= 0.95 in {good} of {len(ranks)} groups"
        )
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
