"""What a run measured: one report per rank, and all of them together.

A worker writes ``rank{r}.json`` (:func:`rank_report_text`) when it is through, and before each operation that may wait
``rank{r}.now``: one line of text that names the operation. Both replace the file by a rename, so that a reader never
sees half of one.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from meshwright.errors import SpecError
from meshwright.profiler.json_rows import JsonRow, parse_object
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = [
    "ExecutionReport",
    "GroupTraffic",
    "RankReport",
    "log_path",
    "merge_reports",
    "now_path",
    "rank_report_text",
    "read_rank_report",
    "read_reports",
    "report_path",
    "report_text",
]

_SCHEMA_VERSION = 1
# A report is a few numbers per step.
_MAX_BYTES = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTraffic:
    """What one rank sends over one kind of group in one step.

    Parameters
    ----------
    axis : str
        The parallel axis whose group it is: ``tp``, ``cp``, ``ep``, ``dp``, ``pp``.
    operation : str
        ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all``, ``send``, ...
    num_messages, num_bytes : int
        Calls of a step, and the bytes of their whole buffers together [B].
    seconds : float
        Wall time inside them, waiting for others included, median over the measured steps [s].
    """

    axis: str
    operation: str
    num_messages: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What one rank measured.

    Parameters
    ----------
    rank, stage : int
        Global rank and its pipeline stage.
    device : str
        Name of its processor or GPU.
    step_seconds, cpu_seconds : tuple[float, ...]
        Wall time and the process's own CPU time of each measured step [s].
    phase_seconds : Mapping[str, tuple[float, ...]]
        Wall time of each step by phase: ``forward``, ``backward``, ``gradient_sync``, ``optimizer``, ... [s].
    phase_cpu_seconds : Mapping[str, tuple[float, ...]]
        CPU time of the thread that computes, by the same phases, outside collectives; empty where nobody counts it [s].
    traffic : tuple[GroupTraffic, ...]
        What it sent per step.
    peak_memory_bytes : int
        Most memory held at once [B].
    losses, gradient_norms : tuple[float, ...]
        Of each measured step; empty where this rank does not know them.
    software : Mapping[str, str]
        Versions.
    """

    rank: int
    stage: int
    device: str
    step_seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...] = ()
    phase_seconds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    phase_cpu_seconds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    traffic: tuple[GroupTraffic, ...] = ()
    peak_memory_bytes: int = 0
    losses: tuple[float, ...] = ()
    gradient_norms: tuple[float, ...] = ()
    software: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionReport:
    """All ranks of a run.

    Parameters
    ----------
    ranks : tuple[RankReport, ...]
        In the order of their rank.
    step_seconds : float
        Median over the measured steps of the slowest rank's time [s].
    """

    ranks: tuple[RankReport, ...]
    step_seconds: float

    @property
    def num_steps(self) -> int:
        """Measured steps."""
        return len(self.ranks[0].step_seconds)

    @property
    def losses(self) -> tuple[float, ...]:
        """Loss of each step, from the first rank that knows it; empty when none does."""
        return next((rank.losses for rank in self.ranks if rank.losses), ())

    @property
    def gradient_norms(self) -> tuple[float, ...]:
        """Gradient norm of each step, from the first rank that knows it; empty when none does."""
        return next((rank.gradient_norms for rank in self.ranks if rank.gradient_norms), ())

    @property
    def peak_memory_bytes(self) -> int:
        """Memory of the fullest rank [B]."""
        return max(rank.peak_memory_bytes for rank in self.ranks)

    def of_stage(self, stage: int) -> tuple[RankReport, ...]:
        """Return the ranks of a pipeline stage."""
        return tuple(rank for rank in self.ranks if rank.stage == stage)


def report_path(directory: Path, rank: int) -> Path:
    """Return where a rank writes its report."""
    return directory / f"rank{rank}.json"


def now_path(directory: Path, rank: int) -> Path:
    """Return where a rank says what it is doing."""
    return directory / f"rank{rank}.now"


def log_path(directory: Path, rank: int) -> Path:
    """Return where the output of a rank goes."""
    return directory / f"rank{rank}.log"


def rank_report_text(report: RankReport) -> str:
    """Return a rank's report as JSON."""
    return json.dumps({**_marks("rank_report"), **asdict(report)}, indent=2, allow_nan=False) + "\n"


def read_rank_report(path: Path) -> RankReport:
    """Return the report that a rank has written.

    Raises
    ------
    SpecError
        If the file is missing, cut short or no such report.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise SpecError(f"{path}: is larger than any report of a rank")
        content = path.read_bytes()
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from None
    row = parse_object(content, str(path))
    row.choice("kind", ("rank_report",))
    row.choice("written_by", ("meshwright",))
    if row.number("schema_version") != _SCHEMA_VERSION:
        raise row.error(f"schema_version: this release reads {_SCHEMA_VERSION}")
    return RankReport(
        rank=_count(row, "rank"),
        stage=_count(row, "stage"),
        device=row.text("device"),
        step_seconds=_times(row, "step_seconds", least=1),
        cpu_seconds=_times(row, "cpu_seconds"),
        phase_seconds=_phases(row, "phase_seconds"),
        phase_cpu_seconds=_phases(row, "phase_cpu_seconds"),
        traffic=_traffic(row),
        peak_memory_bytes=_count(row, "peak_memory_bytes"),
        losses=_numbers(row, "losses"),
        gradient_norms=_numbers(row, "gradient_norms"),
        software={name: str(value) for name, value in row.mapping("software").items()},
    )


def read_reports(directory: Path, plan: ParallelPlan) -> ExecutionReport:
    """Return the reports of all ranks of a plan.

    Raises
    ------
    SpecError
        If one is missing or malformed, or they do not belong together.
    """
    reports = [read_rank_report(report_path(directory, rank)) for rank in range(plan.num_gpus)]
    return merge_reports(reports)


def merge_reports(reports: Sequence[RankReport]) -> ExecutionReport:
    """Return all ranks of a run as one report.

    Raises
    ------
    SpecError
        If ranks are missing, or measured different numbers of steps.
    """
    ranks = tuple(sorted(reports, key=lambda report: report.rank))
    if not ranks or [report.rank for report in ranks] != list(range(len(ranks))):
        raise SpecError(f"reports of the ranks {[report.rank for report in ranks]} are not those of one run")
    counts = {len(report.step_seconds) for report in ranks}
    if len(counts) > 1:
        raise SpecError(f"the ranks measured different numbers of steps: {sorted(counts)}")
    slowest = (max(times) for times in zip(*(report.step_seconds for report in ranks), strict=True))
    return ExecutionReport(ranks=ranks, step_seconds=statistics.median(slowest))


def report_text(report: ExecutionReport, execution: Mapping[str, object], comparison: object) -> str:
    """Return the measured report of a run as JSON: what was run, what was measured, and how it compares.

    Parameters
    ----------
    report : ExecutionReport
        Measured.
    execution : Mapping[str, object]
        What was run, as written for the workers.
    comparison : object
        Predicted against measured as plain data.
    """
    mapping = {
        **_marks("execution_report"),
        "step_seconds": report.step_seconds,
        "num_steps": report.num_steps,
        "losses": report.losses,
        "gradient_norms": report.gradient_norms,
        "peak_memory_bytes": report.peak_memory_bytes,
        "comparison": comparison,
        "ranks": [asdict(rank) for rank in report.ranks],
        "execution": execution,
    }
    return json.dumps(mapping, indent=2, allow_nan=False) + "\n"


def _marks(kind: str) -> dict[str, object]:
    return {"schema_version": _SCHEMA_VERSION, "kind": kind, "written_by": "meshwright"}


def _count(row: JsonRow, name: str) -> int:
    number = row.number(name)
    if number < 0.0 or number != int(number):
        raise row.error(f"{name} must be a whole number, 0 or more, not {number:g}")
    return int(number)


def _times(row: JsonRow, name: str, least: int = 0) -> tuple[float, ...]:
    times = _numbers(row, name)
    if len(times) < least or min(times, default=0.0) < 0.0:
        raise row.error(f"{name}: expected {least} or more times that are not negative")
    return times


def _phases(row: JsonRow, name: str) -> Mapping[str, tuple[float, ...]]:
    phases = JsonRow(row.mapping(name), f"{row.where}: {name}")
    return {phase: _times(phases, phase) for phase in phases.names()}


def _traffic(row: JsonRow) -> tuple[GroupTraffic, ...]:
    found = []
    for index, cells in enumerate(row.items("traffic")):
        if not isinstance(cells, dict):
            raise row.error("traffic: expected a list of objects {...}")
        each = JsonRow(cells, f"{row.where}: traffic[{index}]")
        found.append(
            GroupTraffic(
                axis=each.text("axis"),
                operation=each.text("operation"),
                num_messages=_count(each, "num_messages"),
                num_bytes=_count(each, "num_bytes"),
                seconds=each.number("seconds"),
            )
        )
    return tuple(found)


def _numbers(row: JsonRow, name: str) -> tuple[float, ...]:
    return tuple(_finite(row, name, row.items(name)))


def _finite(row: JsonRow, name: str, values: Iterable[object]) -> Iterable[float]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise row.error(f"{name}: expected finite numbers, not {json.dumps(value)[:60]}")
        yield float(value)
