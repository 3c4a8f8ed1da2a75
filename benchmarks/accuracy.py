"""Print the accuracy figures of the README against their targets, and what the headline figures do not show.

    python benchmarks/accuracy.py [--skip-held-out]

In turn: errors, order and intervals by source; the targets, each PASS or MISS; sources whose rows the columns do not
tell apart, with the least error that leaves; speed-ups of one schedule over another
as measured and as predicted, on the vocabulary-parallel and the zero-bubble table; each A100 source predicted with no
constant that was fitted to it (a minute or two). Run from an environment that has Meshwright.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from held_out_sources import TABLE, print_held_out

from meshwright.profiler.accuracy import POOLS, Accuracy, accuracy, pooled
from meshwright.profiler.measured_runs import MeasuredRun, read_measured_runs
from meshwright.profiler.ranking import kendall_tau
from meshwright.profiler.validation import ScoredRun, score_run, score_runs, summarise

TRUSTED = POOLS[-1]
# Sources of fewer rows have no median worth a target.
MIN_ROWS = 5
# Columns that say nothing of a run that could be predicted from.
UNPREDICTED = ("id", "measured", "measured_seconds", "measured_memory_gib", "memory_kind", "notes", "quality")
# Part of a source's text, and its name here and in the README.
LABELS = {
    "Korthikanti": "Korthikanti et al. 2022",
    "SC21": "Megatron SC'21 Table 1",
    "llm-foundry": "llm-foundry",
    "llama3_h100_202412": "torchtitan 2024-12",
    "asyncTP_llama3": "torchtitan 2025-06",
    "llama3-8b_h200": "torchtitan 2025-06, H200",
    "InternEvo": "InternEvo",
    "VocabularyParallelism": "Vocabulary Parallelism",
    "Zero Bubble": "Zero Bubble",
    "bigscience": "BigScience",
    "Megatron-Bridge": "Megatron-Bridge",
    "MT-NLG": "MT-NLG 530B",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A figure, the most it may be, and of what it is."""

    name: str
    value: float | None
    most: float
    note: str = ""

    def line(self) -> str:
        """Return the figure beside its target."""
        if self.value is None:
            return f"  {self.name:<44}{'-':>8}{self.most:>9.1%}  no rows"
        verdict = "PASS" if abs(self.value) <= self.most else "MISS"
        return f"  {self.name:<44}{self.value:>8.1%}{self.most:>9.1%}  {verdict}{self.note}"


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--skip-held-out", action="store_true")
    options = parser.parse_args()
    runs = read_measured_runs(TABLE)
    scored = score_runs(runs, (), lambda doing, done, total: None)
    sources = by_source(scored)
    print_sources(sources)
    print_targets(scored, sources)
    print_floor(scored)
    print_vocabulary(scored)
    print_zero_bubble(runs)
    if not options.skip_held_out:
        print()
        print_held_out()


def by_source(scored: Sequence[ScoredRun]) -> list[Accuracy]:
    """Return the accuracy of every source over its trusted rows, where any could be scored."""
    rows: dict[str, list[ScoredRun]] = {}
    for row in scored:
        if row.run.quality in TRUSTED and row.is_scorable:
            rows.setdefault(row.run.source, []).append(row)
    found = [accuracy(label(source), "+".join(TRUSTED), some) for source, some in rows.items()]
    return [each for each in found if each.time.num_scored]


def label(source: str) -> str:
    """Return the short name of a source."""
    return next((name for part, name in LABELS.items() if part in source), source[:26])


def prefix(row: ScoredRun) -> str:
    """Return the short name of a row's source."""
    return row.run.id.rsplit("-", 1)[0]


def print_sources(sources: Sequence[Accuracy]) -> None:
    """Print one line per source."""
    print("Iteration time by source, rows of quality ok and recalled")
    print(
        f"  {'source':<27}{'rows':>7}{'mean':>8}{'median':>8}{'p90':>8}{'bias':>8}{'in 80 %':>8}{'tau':>6}"
        f"{'groups':>7}{'regret':>8}{'worst':>8}"
    )
    for each in sources:
        time, order = each.time, each.ranking
        print(
            f"  {each.name:<27}{f'{time.num_scored}/{time.num_scorable}':>7}{percent(time.mean):>8}"
            f"{percent(time.median):>8}{percent(time.p90):>8}{percent(time.bias, '+'):>8}"
            f"{percent(time.in_interval):>8}{'-' if order.tau is None else f'{order.tau:.2f}':>6}"
            f"{order.num_groups:>7}{percent(order.mean_regret):>8}{percent(order.max_regret):>8}"
        )


def percent(value: float | None, sign: str = "") -> str:
    """Return a share in percent, a dash for none."""
    return "-" if value is None else f"{value:{sign}.1%}"


def print_targets(scored: Sequence[ScoredRun], sources: Sequence[Accuracy]) -> None:
    """Print every target with PASS or MISS."""
    targets = []
    for qualities in POOLS:
        pool = pooled(scored, qualities)
        name, time = " + ".join(qualities), pool.rows.time
        note = f"  {time.num_scored} of {time.num_scorable} rows, {pool.num_sources} sources"
        targets += [
            Target(name=f"macro median, {name}", value=pool.macro_median, most=0.045, note=note),
            Target(name=f"P90 over rows, {name}", value=time.p90, most=0.11),
            Target(name=f"|bias| over rows, {name}", value=time.bias, most=0.03),
            Target(
                name=f"outside the 80 % interval, {name}",
                value=None if time.in_interval is None else 1.0 - time.in_interval,
                most=0.2,
            ),
        ]
    for source, paper, most in (("kort", "Korthikanti", 0.035), ("sc21", "SC'21", 0.04)):
        rows = [row for row in scored if prefix(row) == source]
        targets.append(Target(name=f"{paper} mean", value=summarise(source, rows, "time").mean, most=most))
    for each in sources:
        if each.time.num_scored >= MIN_ROWS:
            targets += [
                Target(name=f"median, {each.name}", value=each.time.median, most=0.06),
                Target(name=f"|bias|, {each.name}", value=each.time.bias, most=0.03),
            ]
    for each in sources:
        if each.ranking.num_groups:
            note = f"  worst group; mean of {each.ranking.num_groups}: {each.ranking.mean_regret:.1%}"
            targets.append(
                Target(name=f"regret, {each.name}", value=each.ranking.max_regret, most=0.03, note=note)
            )
    targets += memory_targets(scored)
    print(f"\n  {'target':<44}{'today':>8}{'at most':>9}")
    for target in targets:
        print(target.line())


def memory_targets(scored: Sequence[ScoredRun]) -> list[Target]:
    """Return the errors of peak memory: medians of the tables of schedules, worst rows under FSDP."""
    targets = []
    for source, name in (("vocab", "Vocabulary Parallelism"), ("zb", "Zero Bubble")):
        rows = [row for row in scored if prefix(row) == source and row.run.quality in TRUSTED]
        median = summarise(name, rows, "memory").median
        targets.append(Target(name=f"memory median, {name}", value=median, most=0.03))
    for model, most in (("8B", 0.06), ("405B", 0.08)):
        errors = [
            abs(row.memory_error)
            for row in scored
            if prefix(row) == "tt" and row.run.cell("model").endswith(model) and row.memory_error is not None
        ]
        worst = max(errors, default=None)
        targets.append(Target(name=f"memory worst row, torchtitan {model}", value=worst, most=most))
    return targets


def print_floor(scored: Sequence[ScoredRun]) -> None:
    """Print what no prediction can beat where rows differ in nothing but what was measured."""
    print("\nRows that no column tells apart: the least mean error of any prediction from the columns")
    by_name: dict[str, dict[tuple[str, ...], list[ScoredRun]]] = {}
    for row in scored:
        if row.run.quality in TRUSTED and row.time_error is not None:
            by_name.setdefault(label(row.run.source), {}).setdefault(described(row), []).append(row)
    for name, plans in by_name.items():
        alike = [[times(row)[0] for row in rows] for rows in plans.values() if len(rows) > 1]
        if not alike:
            continue
        # The error is linear between the measured times of a plan, so one of them is the best prediction.
        least = sum(min(sum(abs(guess / time - 1.0) for time in plan) for guess in plan) for plan in alike)
        worst = max(max(plan) / min(plan) for plan in alike)
        num_rows = sum(len(rows) for rows in plans.values())
        print(
            f"  {name:<27}{sum(map(len, alike)):>4} of {num_rows} rows, up to {worst:.2f} times apart: "
            f"mean error >= {least / num_rows:.1%}"
        )


def described(row: ScoredRun) -> tuple[str, ...]:
    """Return all that a row says of its run: the same for runs that no prediction tells apart."""
    cells = row.run.cells
    return tuple(cells[column] for column in sorted(cells) if column not in UNPREDICTED)


def print_vocabulary(scored: Sequence[ScoredRun]) -> None:
    """Print how the vocabulary-parallel variants compare, and the error of their memory."""
    rows = [row for row in scored if prefix(row) == "vocab" and row.run.quality in TRUSTED]
    print_gaps(
        "Vocabulary parallelism: speed-up over the baseline, measured / predicted",
        rows,
        lambda run: (f"{run.cell('vocab')} words", f"s {run.cell('seq_len')}"),
        "vocab_parallel",
        ("none", "redistributed", "vocab_2", "vocab_1", "interlaced"),
    )


def print_zero_bubble(runs: Sequence[MeasuredRun]) -> None:
    """Print how the pipeline schedules compare, and the error of their memory.

    The interleaved rows leave ``vpp`` blank; the paper runs "the maximum", which is one layer a chunk where embedding
    and loss count as a layer each. Only here are they predicted with it.
    """
    rows = []
    for run in runs:
        if run.id.startswith("zb-"):
            per_stage = (int(run.cell("n_layers")) + 2) // int(run.cell("pp"))
            is_interleaved = run.cell("schedule") == "interleaved_1f1b"
            cells = {**run.cells, "vpp": str(per_stage)} if is_interleaved else run.cells
            rows.append(score_run(replace(run, cells=cells)))
    print_gaps(
        "Zero bubble (recalled; vpp of the interleaved rows assumed): speed-up over 1F1B, measured / predicted",
        rows,
        lambda run: (run.cell("model").split()[0], f"batch {run.cell('global_batch')}"),
        "schedule",
        ("1f1b", "interleaved_1f1b", "zb_h1", "zb_h2"),
    )


def print_gaps(
    title: str,
    rows: Sequence[ScoredRun],
    group_of: Callable[[MeasuredRun], tuple[str, str]],
    column: str,
    variants: Sequence[str],
) -> None:
    """Print the speed-up of every variant over the first of its group, as measured and as predicted.

    Where the first variant of the table is missing or noisy, the next one is the base, shown as 1.
    """
    groups: dict[tuple[str, str], dict[str, ScoredRun]] = {}
    for row in rows:
        if row.time_error is not None:
            groups.setdefault(group_of(row.run), {})[row.run.cell(column)] = row
    print(f"\n{title}")
    print(f"  {'':<22}{''.join(f'{name:>18}' for name in variants[1:])}{'order (tau)':>13}")
    errors: dict[str, list[float]] = {name: [] for name in variants[1:]}
    taus = []
    for name_of_group, group in groups.items():
        present = [name for name in variants if name in group]
        base, cells = group[present[0]], []
        for name in variants[1:]:
            if name not in present[1:]:
                cells.append("-" if name not in group else "1")
                continue
            measured, predicted = speedups(base, group[name])
            errors[name].append(predicted / measured - 1.0)
            cells.append(f"{measured:.3f} / {predicted:.3f}")
        tau = kendall_tau(*zip(*(times(group[name]) for name in present), strict=True))
        taus += [] if tau is None else [tau]
        print(
            f"  {' '.join(name_of_group):<22}{''.join(f'{cell:>18}' for cell in cells)}"
            f"{'-' if tau is None else f'{tau:.2f}':>13}"
        )
    for name, found in errors.items():
        if found:
            worst = max(found, key=abs)
            print(f"  {name:<22}mean error {np.mean(found):+.1%}, worst {worst:+.1%} of {len(found)}")
    pooled_errors = [error for found in errors.values() for error in found]
    print(
        f"  {'all':<22}mean size {np.mean(np.abs(pooled_errors)):.1%}, worst {max(pooled_errors, key=abs):+.1%}; "
        f"order: mean tau {np.mean(taus):.2f}"
    )
    memory = summarise("memory", rows, "memory")
    print(
        f"  {'peak memory':<22}median {percent(memory.median)}, p90 {percent(memory.p90)}, bias "
        f"{percent(memory.bias, '+')} of {memory.num_scored} rows"
    )


def speedups(base: ScoredRun, row: ScoredRun) -> tuple[float, float]:
    """Return how much faster a row is than the base, measured and predicted."""
    (measured_base, predicted_base), (measured, predicted) = times(base), times(row)
    return measured_base / measured, predicted_base / predicted


def times(row: ScoredRun) -> tuple[float, float]:
    """Return measured and predicted iteration time of a scored row [s]."""
    assert row.prediction is not None
    assert row.run.measured_seconds is not None
    return row.run.measured_seconds, row.prediction.iteration_time


if __name__ == "__main__":
    main()
