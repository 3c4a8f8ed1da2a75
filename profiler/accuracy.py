"""Accuracy over a table of measured runs: every source by itself, and pooled over the rows one may trust."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.profiler.ranking import RankingSummary, ranking
from meshwright.profiler.validation import ErrorSummary, ScoredRun, summarise

__all__ = [
    "CLAIMED_COVERAGE",
    "POOLS",
    "Accuracy",
    "PooledAccuracy",
    "accuracy",
    "pooled",
    "source_accuracies",
]

POOLS = (("ok",), ("ok", "recalled"))
"""Qualities whose rows are pooled: read and complete, and with those written down from memory."""

# Headline errors are claimed only when this share of the scorable rows was scored (a chosen subset flatters).
CLAIMED_COVERAGE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Errors and order of some rows of one quality.

    Parameters
    ----------
    name, quality : str
        Source and quality of the rows; of pooled rows ``all`` and the qualities joined by ``+``.
    time, memory : ErrorSummary
        Errors of the iteration time and of the peak memory.
    ranking : RankingSummary
        How well the rows are ordered.
    """

    name: str
    quality: str
    time: ErrorSummary
    memory: ErrorSummary
    ranking: RankingSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledAccuracy:
    """Errors and order of the rows of some qualities, over all sources.

    Parameters
    ----------
    rows : Accuracy
        Of all rows alike, so that long sources count for more.
    macro_median : float | None
        Mean over the sources of their median time error, so that each counts alike; None without a scored row.
    num_sources : int
        Sources with a scored time.
    """

    rows: Accuracy
    macro_median: float | None
    num_sources: int

    @property
    def is_claimed(self) -> bool:
        """Whether enough of the timed rows were scored to claim a headline error."""
        return self.macro_median is not None and self.rows.time.coverage >= CLAIMED_COVERAGE


def accuracy(name: str, quality: str, rows: Sequence[ScoredRun]) -> Accuracy:
    """Return errors and order of some rows."""
    return Accuracy(
        name=name,
        quality=quality,
        time=summarise(name, rows, "time"),
        memory=summarise(name, rows, "memory"),
        ranking=ranking(name, rows),
    )


def source_accuracies(scored: Sequence[ScoredRun]) -> tuple[Accuracy, ...]:
    """Return the accuracy of every source by quality, ``ok`` first, then as the table has them."""
    groups: dict[tuple[str, str], list[ScoredRun]] = {}
    for row in scored:
        groups.setdefault((row.run.quality, row.run.source), []).append(row)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0] != "ok", item[0][0]))
    return tuple(accuracy(source, quality, rows) for (quality, source), rows in ordered)


def pooled(scored: Sequence[ScoredRun], qualities: Sequence[str]) -> PooledAccuracy:
    """Return the accuracy of all rows of some qualities together."""
    rows = [row for row in scored if row.run.quality in qualities]
    sources: dict[str, list[ScoredRun]] = {}
    for row in rows:
        sources.setdefault(row.run.source, []).append(row)
    medians = [summarise(source, some, "time").median for source, some in sources.items()]
    known = [median for median in medians if median is not None]
    return PooledAccuracy(
        rows=accuracy("all", "+".join(qualities), rows),
        macro_median=float(np.mean(known)) if known else None,
        num_sources=len(known),
    )
