"""Print how well software constants fitted to a few rows of a public source predict its other rows.

    python benchmarks/software_constants.py [--rows 8] [--draws 10]

Rows are drawn at random from the timed rows of quality "ok"; a fit sees nothing of the others. It starts from
the built-in generation, which was made knowing these sources, or from neutral constants, which were not; the
device's calibration is the built-in one either way. Run from an environment that has Meshwright.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from meshwright.profiler.fitting.software import SoftwareFit
    from meshwright.profiler.measured_runs import MeasuredRun

ROOT = Path(__file__).resolve().parent.parent
# Prefix of a source's row ids, and the generation it runs.
SOURCES = {"llmf": "llm-foundry-fsdp1", "internevo": "internevo", "tt": "torchtitan"}
PRIORS: tuple[Literal["generation", "neutral"], ...] = ("generation", "neutral")


def main() -> None:
    """Print one line per source and prior."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--draws", type=int, default=10)
    options = parser.parse_args()
    print(f"median |error| of held-out rows, mean and worst of {options.draws} draws of {options.rows} rows")
    print(
        f"{'source':<20}{'prior':<12}{'rows':>5}{'before':>9}{'after':>9}{'worst':>9}{'left out':>10}{'CPU s':>8}"
    )
    for prefix, software in SOURCES.items():
        source = timed_runs(prefix)
        for prior in PRIORS:
            figures = np.array(
                [draw(source, software, prior, options.rows, seed) for seed in range(options.draws)]
            )
            before, after, left_out, seconds = figures.mean(axis=0)
            print(
                f"{software:<20}{prior:<12}{len(source):>5}{before:>9.1%}{after:>9.1%}{figures[:, 1].max():>9.1%}"
                f"{left_out:>10.1%}{seconds:>8.1f}",
                flush=True,
            )


def timed_runs(prefix: str) -> list[MeasuredRun]:
    """Return the rows of a source that a prediction can be compared with."""
    from meshwright.profiler.measured_runs import read_measured_runs
    from meshwright.profiler.validation import score_run

    runs = read_measured_runs(ROOT / "tests" / "validation" / "training_runs.csv")
    chosen = [run for run in runs if run.id.rsplit("-", 1)[0] == prefix and run.quality == "ok"]
    return [run for run in chosen if score_run(run).time_error is not None]


def draw(
    source: list[MeasuredRun],
    software: str,
    prior: Literal["generation", "neutral"],
    num_rows: int,
    seed: int,
) -> tuple[float, float, float, float]:
    """Return held-out error before and after one fit, its own left-out error, and its CPU seconds."""
    from meshwright.profiler.fitting.software import fit_software

    drawn = np.random.default_rng(seed).choice(len(source), num_rows, replace=False).tolist()
    others = [run for index, run in enumerate(source) if index not in drawn]
    started = time.process_time()
    fit = fit_software([source[index] for index in drawn], software, prior=prior)
    seconds = time.process_time() - started
    # Constants that were not chosen are at their start already.
    start = {name: fit.prior.get(name, value) for name, value in fit.constants.items()}
    before = held_out_error(replace(fit, constants=start, sustained_clock={}), others)
    return before, held_out_error(fit, others), fit.error_left_out.median, seconds


def held_out_error(fit: SoftwareFit, runs: list[MeasuredRun]) -> float:
    """Return the median absolute error of a fit on rows it has not seen."""
    from meshwright.costmodels.context import cost_context
    from meshwright.costmodels.prediction import predict
    from meshwright.profiler.measured_setup import measured_setup

    errors = []
    for run in runs:
        setup = measured_setup(run)
        context = cost_context(setup.job, features=setup.features, attention_kernel=setup.attention_kernel)
        seconds = predict(fit.apply(context), setup.plan).iteration_time
        errors.append(abs(seconds / (run.measured_seconds or 0.0) - 1.0))
    return float(np.median(errors))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))
    main()
