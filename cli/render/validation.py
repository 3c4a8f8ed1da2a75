"""What ``validate`` shows and writes: errors and order by source and pooled, and one line per run."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from meshwright.cli.render.console import make_table, stdout_console
from meshwright.profiler.accuracy import POOLS, Accuracy, PooledAccuracy, pooled, source_accuracies
from meshwright.profiler.measured_setup import unknown_features
from meshwright.profiler.validation import RESULT_COLUMNS, ErrorSummary, ScoredRun
from meshwright.units import format_change

__all__ = ["is_our_results", "print_validation", "results_csv", "validation_mapping"]

_ERROR_COLUMNS = ("rows", "coverage", "mean", "median", "p90", "bias")
_RANKING_COLUMNS = ("tau", "groups", "rows", "group tau", "regret", "worst")
# What the numbers of the widest table take of a line; a source's name has the rest, within bounds.
_NUMBERS_WIDTH = 60
_SOURCE_WIDTHS = (24, 66)


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
        if prediction is not None and row.predicted_memory_bytes is not None:
            seconds = (prediction.iteration_time, prediction.low, prediction.high)
            predicted = (
                *(f"{value:.6g}" for value in seconds),
                f"{row.predicted_memory_bytes / 2**30:.6g}",
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
    """Return errors and order by quality and source, and pooled, as plain data."""
    sources = source_accuracies(scored)
    return {
        "kind": "validation",
        "time": [_error_mapping(each, each.time) for each in sources if each.time.num_scorable],
        "memory": [_error_mapping(each, each.memory) for each in sources if _has_memory(each)],
        "ranking": [
            {"quality": each.quality, **asdict(each.ranking)} for each in sources if each.time.num_scored
        ],
        "pooled": [_pooled_mapping(pooled(scored, qualities)) for qualities in POOLS],
        "skipped": {row.run.id: row.reason for row in scored if row.status == "skipped"},
    }


def print_validation(path: Path, scored: Sequence[ScoredRun], out: Path | None) -> None:
    """Print the tables, the headline, what was skipped and why."""
    console = stdout_console()
    low, high = _SOURCE_WIDTHS
    width = min(max(console.width - _NUMBERS_WIDTH, low), high)
    sources = source_accuracies(scored)
    pools = [pooled(scored, qualities) for qualities in POOLS]
    if pools[0].rows.time.num_scorable == pools[1].rows.time.num_scorable:
        pools = pools[:1]
    everything = [*sources, *(pool.rows for pool in pools)]
    tables = (
        _table(
            "Iteration time: |predicted / measured - 1|",
            (*_ERROR_COLUMNS, "in 80 %"),
            [each for each in everything if each.time.num_scorable],
            lambda each: (*_error_cells(each.time), _percent(each.time.in_interval, ".0%")),
            width,
        ),
        _table(
            "Order of plans: Kendall's tau, and regret of the plan predicted best",
            _RANKING_COLUMNS,
            [each for each in everything if each.time.num_scored],
            _ranking_cells,
            width,
        ),
        _table(
            "Peak memory of the worst rank: |predicted / measured - 1|",
            (*_ERROR_COLUMNS, "no fit"),
            [each for each in everything if _has_memory(each)],
            lambda each: (*_error_cells(each.memory), str(each.memory.num_wrongly_infeasible)),
            width,
        ),
    )
    for table in tables:
        if table.row_count:
            console.print(table)
    console.print(_headline(pools[0]), soft_wrap=True)
    for pool in pools[1:]:
        console.print(_with_recalled(pool), soft_wrap=True)
    _print_fits(console, scored)
    for title, is_complete in (("Skipped", True), ("Not scorable", False)):
        reasons: dict[str, list[str]] = {}
        for row in scored:
            if row.status == "skipped" and row.is_complete == is_complete:
                reasons.setdefault(row.reason, []).append(row.run.id)
        for reason, ids in reasons.items():
            console.print(f"{title} {len(ids)}: {reason} ({_first(ids)})", markup=False, soft_wrap=True)
    ignored = unknown_features(tuple(row.run for row in scored))
    if ignored:
        console.print(f"Ignored features: {', '.join(ignored)}", markup=False, soft_wrap=True)
    if out is not None:
        console.print(f"Wrote {out} ({len(scored)} runs of {path})", markup=False, soft_wrap=True)


def _has_memory(each: Accuracy) -> bool:
    return bool(each.memory.num_scorable or each.memory.num_wrongly_infeasible)


def _error_mapping(each: Accuracy, summary: ErrorSummary) -> dict[str, object]:
    return {"quality": each.quality, **asdict(summary), "coverage": summary.coverage}


def _pooled_mapping(pool: PooledAccuracy) -> dict[str, object]:
    rows = pool.rows
    return {
        "quality": rows.quality,
        "macro_median": pool.macro_median,
        "num_sources": pool.num_sources,
        "is_claimed": pool.is_claimed,
        "time": {**asdict(rows.time), "coverage": rows.time.coverage},
        "memory": {**asdict(rows.memory), "coverage": rows.memory.coverage},
        "ranking": asdict(rows.ranking),
    }


def _table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Accuracy],
    cells: Callable[[Accuracy], tuple[str, ...]],
    width: int,
) -> Table:
    """Return a table of one line per source under a line per quality, pooled rows last."""
    table = make_table(title, (("source", False), *((column, True) for column in columns)))
    heading = ""
    for each in rows:
        name = f"{each.name} {each.quality}"
        if each.name != "all":
            if each.quality != heading:
                heading = each.quality
                table.add_row(heading)
            name = f"  {_shortened(each.name, width - 2)}"
        table.add_row(name, *cells(each))
    return table


def _shortened(name: str, width: int) -> str:
    """Cut the middle out of a long name: what tells the tables of one publisher apart is at the end."""
    kept = width - len("...")
    head = kept * 2 // 5
    return name if len(name) <= width else f"{name[:head]}...{name[head - kept :]}"


def _percent(value: float | None, form: str = ".1%") -> str:
    return "-" if value is None else f"{value:{form}}"


def _bias(value: float | None) -> str:
    return "-" if value is None else format_change(value)


def _error_cells(summary: ErrorSummary) -> tuple[str, ...]:
    return (
        str(summary.num_scorable),
        _percent(summary.coverage if summary.num_scorable else None, ".0%"),
        _percent(summary.mean),
        _percent(summary.median),
        _percent(summary.p90),
        _bias(summary.bias),
    )


def _ranking_cells(each: Accuracy) -> tuple[str, ...]:
    ranking = each.ranking
    return (
        "-" if ranking.tau is None else f"{ranking.tau:.2f}",
        str(ranking.num_groups) if ranking.num_groups else "-",
        str(ranking.num_grouped) if ranking.num_groups else "-",
        "-" if ranking.group_tau is None else f"{ranking.group_tau:.2f}",
        _percent(ranking.mean_regret),
        _percent(ranking.max_regret),
    )


def _headline(pool: PooledAccuracy) -> str:
    time = pool.rows.time
    if time.mean is None or time.median is None or time.bias is None or pool.macro_median is None:
        return "No timed run of quality ok could be scored."
    text = f"quality ok: {time.num_scored} of {time.num_scorable} timed rows scored ({time.coverage:.0%}), "
    if not pool.is_claimed:
        return text + "below 95 %: no headline error is claimed."
    return text + (
        f"mean error {time.mean:.1%}, median {time.median:.1%}, bias {format_change(time.bias)}, "
        f"mean of the sources' medians {pool.macro_median:.1%}."
    )


def _with_recalled(pool: PooledAccuracy) -> str:
    """Return the sentence on rows written down from memory: a figure beside the headline, never the headline."""
    time = pool.rows.time
    text = f"quality ok + recalled: {time.num_scored} of {time.num_scorable} timed rows scored ({time.coverage:.0%})"
    if pool.macro_median is None:
        return f"{text}."
    return f"{text}, mean of the medians of {pool.num_sources} sources {pool.macro_median:.1%}."


def _print_fits(console: Console, scored: Sequence[ScoredRun]) -> None:
    """Say how often the verdict on whether a run fits is wrong, of runs that did not fit and of runs that did."""
    failed = [row for row in scored if row.run.measured == "oom" and row.prediction is not None]
    if failed:
        right = sum(row.status == "infeasible" for row in failed)
        console.print(
            f"Out of memory: {right} of {len(failed)} runs that did not fit are predicted not to fit."
        )
    ran = [row for row in scored if row.run.measured in ("time", "memory") and row.prediction is not None]
    wrong = [row.run.id for row in ran if row.is_wrongly_infeasible]
    if wrong:
        console.print(
            f"Predicted not to fit, but ran: {len(wrong)} of {len(ran)} ({_first(wrong)}).", soft_wrap=True
        )


def _first(ids: Sequence[str]) -> str:
    return f"{ids[0]}{' ...' if len(ids) > 1 else ''}"
