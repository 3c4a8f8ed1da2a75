"""``meshwright validate``: predicted against measured."""

from __future__ import annotations

from pathlib import Path

import click

from meshwright.cli.options import CommonOptions, common_options

__all__ = ["command"]


@click.command("validate", short_help="Score predictions against measured runs.")
@click.argument("runs", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write one line per run as CSV.")
@common_options
def command(*, runs: Path, out: Path | None, common: CommonOptions) -> None:
    """Predict every run of the table RUNS (CSV); print errors and the order of plans by source.

    A table with the columns engine, ttft_mean_s and tpot_mean_s holds serving runs: each is simulated as the closed
    loop of clients that was measured.

    \b
    meshwright validate validation/training_runs.csv --out results.csv
    """
    from meshwright.cli.render.console import ProgressLine, print_json
    from meshwright.cli.render.validation import (
        is_our_results,
        print_validation,
        results_csv,
        validation_mapping,
    )
    from meshwright.planner.output_file import check_replaceable, replace_file
    from meshwright.profiler.measured_runs import read_measured_runs
    from meshwright.profiler.serving_runs import is_serving_table
    from meshwright.profiler.validation import score_runs

    if is_serving_table(runs):
        _validate_serving(runs, out, common)
        return
    table = read_measured_runs(runs)
    if out is not None:
        check_replaceable(out, force=common.force, is_ours=is_our_results)
    with ProgressLine(common.quiet or common.as_json) as progress:
        scored = score_runs(table, common.calibrations, progress)
    if out is not None:
        replace_file(out, results_csv(scored).encode(), force=common.force, is_ours=is_our_results)
    if common.as_json:
        print_json(validation_mapping(scored))
    else:
        print_validation(runs, scored, out)


def _validate_serving(runs: Path, out: Path | None, common: CommonOptions) -> None:
    from meshwright.cli.render.console import ProgressLine, print_json
    from meshwright.cli.render.serving_validation import (
        is_our_serving_results,
        print_serving_validation,
        serving_results_csv,
        serving_validation_mapping,
    )
    from meshwright.planner.output_file import check_replaceable, replace_file
    from meshwright.profiler.serving_runs import read_serving_runs
    from meshwright.profiler.serving_validation import ServingValidator

    table = read_serving_runs(runs)
    if out is not None:
        check_replaceable(out, force=common.force, is_ours=is_our_serving_results)
    validator = ServingValidator(common.calibrations, seed=common.seed)
    scored = []
    with ProgressLine(common.quiet or common.as_json) as progress:
        for index, run in enumerate(table, start=1):
            scored.append(validator.score(run))
            progress("simulating runs", index, len(table))
    if out is not None:
        text = serving_results_csv(scored)
        replace_file(out, text.encode(), force=common.force, is_ours=is_our_serving_results)
    if common.as_json:
        print_json(serving_validation_mapping(scored))
    else:
        print_serving_validation(runs, scored, out)
