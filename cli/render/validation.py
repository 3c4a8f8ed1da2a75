"""What ``validate`` shows and writes: errors by source, and one line per run."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console

from meshwright.cli.render.console import make_table, stdout_console
from meshwright.profiler.measured_setup import unknown_features
from meshwright.profiler.validation import RESULT_COLUMNS, ErrorSummary, Quantity, ScoredRun, summarise

__all__ = ["is_our_results", "print_validation", "results_csv", "validation_mapping"]

_COLUMNS = (
    ("source", False),
    ("rows", True),
    ("scored", True),
    ("coverage", True),
    ("mean", True),
    ("median", True),
    ("bias", True),
    ("p90", True),
)
_SOURCE_WIDTH = 66
# Headline errors are claimed only when this share of the scorable rows was scored (a chosen subset flatters).
_CLAIMED_COVERAGE = 0.95


_TITLES: dict[Quantity, str] = {"time": "Iteration time", "memory": "Peak memory of the worst rank"}


def is_our_results(content: bytes) -> bool:
    """Return whether a file is a results table: its header is ours."""
    return content.startswith(",".join(RESULT_COLUMNS).encode())


def results_csv(scored: Sequence[ScoredRun]) -> str:
    """Return the results table, one line per run; figures with six digits."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(RESULT_COLUMNS)
    for row in scored:
        run, prediction = row.run, row.prediction
        predicted: tuple[str, ...] = ("", "", "", "")
        if prediction is not None:
            seconds = (prediction.iteration_time, prediction.low, prediction.high)
            predicted = (
                *(f"{value:.6g}" for value in seconds),
                f"{prediction.peak_memory_bytes / 2**30:.6g}",
            )
        writer.writerow(
            (
                run.id,
                run.source,
                row.status,
                row.reason,
                run.cell("measured_seconds"),
                *predicted[:3],
                run.cell("measured_memory_gib"),
                predicted[3],
            )
        )
    return stream.getvalue()


def validation_mapping(scored: Sequence[ScoredRun]) -> dict[str, object]:
    """Return the errors by quality and source as plain data."""
    return {
        "kind": "validation",
        "time": [{"quality": quality, **asdict(summary)} for quality, summary in _summaries(scored, "time")],
        "memory": [
            {"quality": quality, **asdict(summary)} for quality, summary in _summaries(scored, "memory")
        ],
        "skipped": {row.run.id: row.reason for row in scored if row.status == "skipped"},
    }


def print_validation(path: Path, scored: Sequence[ScoredRun], out: Path | None) -> None:
    """Print the error tables, the headline, what was skipped and why."""
    console = stdout_console()
    for quantity, title in _TITLES.items():
        table = make_table(f"{title}: |predicted / measured - 1|", (("quality", False), *_COLUMNS))
        for quality, summary in _summaries(scored, quantity):
            table.add_row(quality, *_cells(summary))
        if table.row_count:
            console.print(table)
    console.print(_headline([row for row in scored if row.run.quality == "ok"]), soft_wrap=True)
    _print_oom(console, scored)
    reasons: dict[str, list[str]] = {}
    for row in scored:
        if row.status == "skipped" and row.is_scorable:
            reasons.setdefault(row.reason, []).append(row.run.id)
    for reason, ids in reasons.items():
        console.print(
            f"Skipped {len(ids)}: {reason} ({ids[0]}{' ...' if len(ids) > 1 else ''})",
            markup=False,
            soft_wrap=True,
        )
    ignored = unknown_features(tuple(row.run for row in scored))
    if ignored:
        console.print(f"Ignored features: {', '.join(ignored)}", markup=False, soft_wrap=True)
    if out is not None:
        console.print(f"Wrote {out} ({len(scored)} runs of {path})", markup=False, soft_wrap=True)


def _summaries(scored: Sequence[ScoredRun], quantity: Quantity) -> list[tuple[str, ErrorSummary]]:
    """Return quality and summary of each source with something to score, ``ok`` first."""
    groups: dict[tuple[str, str], list[ScoredRun]] = {}
    for row in scored:
        groups.setdefault((row.run.quality, row.run.source), []).append(row)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0] != "ok", item[0][0]))
    summaries = [(quality, summarise(source, rows, quantity)) for (quality, source), rows in ordered]
    return [(quality, summary) for quality, summary in summaries if summary.num_scorable]


def _cells(summary: ErrorSummary) -> tuple[str, ...]:
    name = summary.name if len(summary.name) <= _SOURCE_WIDTH else summary.name[: _SOURCE_WIDTH - 3] + "..."

    def percent(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:{sign}.1%}"

    return (
        name,
        str(summary.num_scorable),
        str(summary.num_scored),
        f"{summary.coverage:.0%}",
        percent(summary.mean),
        percent(summary.median),
        percent(summary.bias, "+"),
        percent(summary.p90),
    )


def _headline(rows: Sequence[ScoredRun]) -> str:
    pooled = summarise("all", rows, "time")
    if pooled.mean is None or pooled.median is None or pooled.bias is None:
        return "No timed run of quality ok could be scored."
    sources = {row.run.source for row in rows}
    medians = [
        summarise(source, [row for row in rows if row.run.source == source], "time").median
        for source in sources
    ]
    macro = float(np.mean([median for median in medians if median is not None]))
    text = f"quality ok: {pooled.num_scored} of {pooled.num_scorable} timed rows scored ({pooled.coverage:.0%}), "
    if pooled.coverage < _CLAIMED_COVERAGE:
        return text + "below 95 %: no headline error is claimed."
    return text + (
        f"mean error {pooled.mean:.1%}, median {pooled.median:.1%}, bias {pooled.bias:+.1%}, "
        f"mean of the sources' medians {macro:.1%}."
    )


def _print_oom(console: Console, scored: Sequence[ScoredRun]) -> None:
    rows = [row for row in scored if row.run.measured == "oom" and row.prediction is not None]
    if rows:
        right = sum(row.status == "infeasible" for row in rows)
        console.print(
            f"Out of memory: {right} of {len(rows)} runs that did not fit are predicted not to fit."
        )
