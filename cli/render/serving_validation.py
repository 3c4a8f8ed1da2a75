"""What ``validate`` shows and writes of serving runs: errors by engine, system, model and concurrency, and each run."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from meshwright.cli.render.console import make_table, stdout_console
from meshwright.profiler.serving_validation import (
    SERVING_RESULT_COLUMNS,
    ScoredServingRun,
    ServingErrors,
    grouped,
    rank_correlations,
    summarise_serving,
)
from meshwright.units import format_change

__all__ = [
    "is_our_serving_results",
    "print_serving_validation",
    "serving_results_csv",
    "serving_validation_mapping",
]

_COLUMNS = ("rows", "coverage", "TPOT", "p90", "bias", "TTFT", "p90", "bias")
_LEAST_COVERAGE = 0.95
# What a run has in common with others, by the headings of the tables.
_KEYS: dict[str, Callable[[ScoredServingRun], str]] = {
    "engine": lambda row: (
        f"{row.run.cell('engine')} {row.run.cell('engine_version') or '(release not stated)'}"
    ),
    "system": lambda row: row.run.cell("gpu"),
    "model": lambda row: f"{row.run.cell('model')} {row.run.cell('precision')}",
    "concurrency": lambda row: row.run.cell("concurrency"),
}


def is_our_serving_results(content: bytes) -> bool:
    """Return whether a file is a results table of serving runs: its header is ours."""
    return content.startswith(",".join(SERVING_RESULT_COLUMNS).encode())


def serving_results_csv(rows: Sequence[ScoredServingRun]) -> str:
    """Return the results table, one line per run; figures with six digits."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(SERVING_RESULT_COLUMNS)
    for row in rows:
        predicted = ["" if value is None else f"{value:.6g}" for value in (row.ttft, row.tpot)]
        run = row.run
        writer.writerow(
            (
                run.id,
                row.status,
                row.reason,
                run.cell("ttft_mean_s"),
                predicted[0],
                run.cell("tpot_mean_s"),
                predicted[1],
            )
        )
    return stream.getvalue()


def serving_validation_mapping(rows: Sequence[ScoredServingRun]) -> dict[str, object]:
    """Return errors by quality, and of the headline rows by engine, system, model and concurrency, as plain data."""
    headline = [row for row in rows if row.group == "ok"]
    return {
        "kind": "serving_validation",
        "quality": [_mapping(each) for each in _errors(rows, lambda row: row.group)],
        **{name: [_mapping(each) for each in _errors(headline, key)] for name, key in _KEYS.items()},
        "rank_correlation": [asdict(each) for each in rank_correlations(headline)],
        "constants": {name: len(part) for name, part in grouped(headline, lambda row: row.reason).items()},
        "skipped": {row.run.id: row.reason for row in rows if row.status == "skipped"},
    }


def print_serving_validation(path: Path, rows: Sequence[ScoredServingRun], out: Path | None) -> None:
    """Print the tables, the headline, what was skipped and why."""
    console = stdout_console()
    headline = [row for row in rows if row.group == "ok"]
    for name, key in {"quality": lambda row: row.group, **_KEYS}.items():
        errors = _errors(rows if name == "quality" else headline, key)
        if errors:
            console.print(_table(name, errors))
    ranks = make_table(
        "Order of runs of one model on one system: Spearman's correlation",
        (("model", False), ("system", False), ("rows", True), ("TPOT", True), ("TTFT", True)),
    )
    for each in rank_correlations(headline):
        ranks.add_row(each.model, each.gpu, str(each.num_rows), f"{each.tpot:.3f}", f"{each.ttft:.3f}")
    if ranks.row_count:
        console.print(ranks)
    console.print(_headline(summarise_serving("ok", headline)), soft_wrap=True)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.status == "skipped":
            reasons.setdefault(row.reason, []).append(row.run.id)
    for reason, ids in reasons.items():
        more = " ..." if len(ids) > 1 else ""
        console.print(f"Skipped {len(ids)}: {reason} ({ids[0]}{more})", markup=False, soft_wrap=True)
    if out is not None:
        console.print(f"Wrote {out} ({len(rows)} runs of {path})", markup=False, soft_wrap=True)


def _errors(
    rows: Sequence[ScoredServingRun], key: Callable[[ScoredServingRun], str]
) -> tuple[ServingErrors, ...]:
    parts = grouped(rows, key)
    names = sorted(parts, key=lambda name: (int(name), "") if name.isdigit() else (0, name))
    return tuple(summarise_serving(name, parts[name]) for name in names)


def _mapping(errors: ServingErrors) -> dict[str, object]:
    return {**asdict(errors), "coverage": errors.coverage}


def _table(name: str, errors: Sequence[ServingErrors]) -> Table:
    table = make_table(
        f"Mean TPOT and TTFT by {name}: median of |predicted / measured - 1|",
        ((name, False), *((column, True) for column in _COLUMNS)),
    )
    for each in errors:
        table.add_row(
            each.name,
            str(each.num_rows),
            f"{each.coverage:.0%}",
            _percent(each.tpot_median),
            _percent(each.tpot_p90),
            _bias(each.tpot_bias),
            _percent(each.ttft_median),
            _percent(each.ttft_p90),
            _bias(each.ttft_bias),
        )
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _bias(value: float | None) -> str:
    return "-" if value is None else format_change(value)


def _headline(errors: ServingErrors) -> str:
    if errors.tpot_median is None:
        return "No run of quality ok could be scored."
    text = f"quality ok: {errors.num_scored} of {errors.num_rows} rows scored ({errors.coverage:.0%}), "
    if errors.coverage < _LEAST_COVERAGE:
        return text + "below 95 %: no headline error is claimed."
    return text + (f"median error TPOT {_percent(errors.tpot_median)}, TTFT {_percent(errors.ttft_median)}.")
