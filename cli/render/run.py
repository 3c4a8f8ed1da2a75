"""What ``run`` shows: its commands, how far it is, and predicted against measured."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from meshwright.cli.render.console import make_table, stderr_console, stdout_console
from meshwright.costmodels.context import CostContext
from meshwright.planner.plan_file import PlanDocument
from meshwright.planner.reasons import degrees_text
from meshwright.profiler.executor.comparison import (
    ComparedTerm,
    ComparedTraffic,
    Comparison,
    comparison_mapping,
    shared_cores,
)
from meshwright.profiler.executor.report import ExecutionReport
from meshwright.simcore.domain.execution import Execution
from meshwright.units import format_change, format_quantity

__all__ = ["RunProgress", "print_commands", "print_run", "run_mapping"]

_PLAIN_INTERVAL_SECONDS = 2.0
# Ranks that are listed one by one.
_MOST_RANKS = 8


class RunProgress:
    """Shows what rank 0 is doing; live on a terminal, a line now and then elsewhere."""

    def __init__(self, quiet: bool) -> None:
        console = stderr_console()
        self._console = None if quiet else console
        self._status = console.status("starting") if console.is_terminal and not quiet else None
        self._last = 0.0

    def __enter__(self) -> RunProgress:
        """Start the live line."""
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Clear the live line."""
        if self._status:
            self._status.stop()

    def __call__(self, operation: str) -> None:
        """Show one operation."""
        if self._status:
            self._status.update(operation)
        elif self._console and time.monotonic() - self._last >= _PLAIN_INTERVAL_SECONDS:
            self._last = time.monotonic()
            self._console.print(operation, soft_wrap=True)


def run_mapping(
    document: PlanDocument,
    context: CostContext,
    execution: Execution,
    report: ExecutionReport,
    comparison: Comparison,
    traffic: Sequence[ComparedTraffic],
) -> dict[str, object]:
    """Return a run as plain data."""
    return {
        "kind": "execution",
        "model": document.job.model.name,
        "cluster": document.job.cluster.id,
        "software": document.job.software,
        "calibration": dict(context.calibration_identity),
        "plan": asdict(execution.plan),
        "device": execution.device,
        "num_steps": report.num_steps,
        "step_seconds": report.step_seconds,
        "losses": list(report.losses),
        "gradient_norms": list(report.gradient_norms),
        "comparison": comparison_mapping(comparison, traffic),
        "phase_seconds": _phases(report),
        "peak_memory_bytes": [rank.peak_memory_bytes for rank in report.ranks],
    }


def print_run(
    document: PlanDocument,
    context: CostContext,
    execution: Execution,
    report: ExecutionReport,
    comparison: Comparison,
    traffic: Sequence[ComparedTraffic],
    written: list[str],
) -> None:
    """Print predicted against measured, phases, traffic, memory and loss."""
    console = stdout_console()
    job, plan = document.job, document.plan
    console.print(
        _comparison_table(
            f"{job.model.name}, {plan.num_gpus} x {execution.device}: {degrees_text(plan)}, {plan.schedule}, "
            f"{report.num_steps} steps",
            comparison,
            has_stages=plan.pp > 1,
        )
    )
    if comparison.is_same_device:
        where = "inside" if comparison.is_inside else "outside"
        console.print(
            f"The measured iteration lies {where} the predicted 80 % interval, {comparison.low:.4g} to"
            f" {comparison.high:.4g} s.",
            soft_wrap=True,
        )
    else:
        console.print(
            f"The prediction is of {job.cluster.gpu.id}, and this ran on {execution.device}: it shows that the plan"
            " runs, not how fast.",
            soft_wrap=True,
        )
    note = shared_cores(comparison, plan.num_gpus, os.cpu_count() or 1)
    if note is not None:
        console.print(note, soft_wrap=True)
    phases = make_table("Phases of a step, median", (("", False), ("mean of ranks", True), ("slowest", True)))
    for name, seconds in _phases(report).items():
        phases.add_row(name.replace("_", " "), f"{seconds['mean']:.4g} s", f"{seconds['slowest']:.4g} s")
    console.print(phases)
    _print_traffic(console, traffic)
    _print_ranks(console, report)
    console.print(f"Calibration: {context.calibration_text}.", soft_wrap=True)
    for line in written:
        console.print(f"Wrote {line}", soft_wrap=True)


def print_commands(commands: Mapping[str, object], folder: Path, *, is_written: bool) -> None:
    """Print what a run would start, as lines for a shell."""
    console = stdout_console()

    def line(text: str) -> None:
        console.print(text, soft_wrap=True)

    local = commands["local"]
    assert isinstance(local, list)
    note = (
        "" if is_written else f"; a run writes {folder}/execution.json first, and so does --dry-run --out DIR"
    )
    line(f"# On this machine 'meshwright run' starts each of these{note}:")
    for each in local:
        line(each)
    line("# With torchrun, on every node, HEAD_NODE being the name of the first:")
    line(str(commands["torchrun"]))
    line("# With Slurm, once inside an allocation:")
    line(str(commands["slurm"]))


def _comparison_table(title: str, comparison: Comparison, *, has_stages: bool) -> Table:
    table = make_table(title, (("", False), ("predicted", True), ("measured", True), ("error", True)))
    for term in comparison.terms:
        is_of_stage = has_stages and term.name not in ("iteration", "peak memory")
        name = f"{term.name}, stage {comparison.stage}" if is_of_stage else term.name
        error = term.error if comparison.is_same_device else None
        # Where next to nothing was measured a ratio says nothing.
        shown = "-" if error is None or abs(error) >= 10.0 else format_change(error)
        table.add_row(
            name,
            _shown(term, term.predicted),
            _shown(term, term.measured),
            shown,
        )
    return table


def _shown(term: ComparedTerm, value: float) -> str:
    return format_quantity(value, "bytes", 4) if term.unit == "B" else f"{value:.4g} s"


def _phases(report: ExecutionReport) -> dict[str, dict[str, float]]:
    """Return mean and largest over the ranks of each phase's median [s]."""
    names = dict.fromkeys(name for rank in report.ranks for name in rank.phase_seconds)
    found = {}
    for name in names:
        medians = [
            statistics.median(times) if (times := rank.phase_seconds.get(name, ())) else 0.0
            for rank in report.ranks
        ]
        found[name] = {"mean": statistics.fmean(medians), "slowest": max(medians)}
    return found


def _print_traffic(console: Console, traffic: Sequence[ComparedTraffic]) -> None:
    if not traffic:
        return
    table = make_table(
        "Communication of all ranks in a step",
        (
            ("axis", False),
            ("operation", False),
            ("messages", True),
            ("predicted", True),
            ("bytes", True),
            ("predicted", True),
            ("time of a rank", True),
        ),
    )
    for each in traffic:
        table.add_row(
            each.axis,
            each.operation.replace("_", "-"),
            f"{each.measured_messages:,}",
            f"{each.predicted_messages:,}",
            f"{each.measured_bytes:,}",
            f"{each.predicted_bytes:,}",
            f"{each.seconds:.4g} s",
            style=None if each.is_exact else "bold red",
        )
    console.print(table)
    differing = [f"{each.axis} {each.operation}" for each in traffic if not each.is_exact]
    words = f"differ in {', '.join(differing)}" if differing else "are exactly as predicted"
    console.print(f"Messages and bytes {words}.", soft_wrap=True)


def _print_ranks(console: Console, report: ExecutionReport) -> None:
    held = [rank.peak_memory_bytes for rank in report.ranks]
    shown = [format_quantity(value, "bytes", 4) for value in held]
    if len(held) <= _MOST_RANKS:
        console.print(f"Peak memory by rank: {', '.join(shown)}.", soft_wrap=True)
    else:
        least, most = min(held), max(held)
        console.print(
            f"Peak memory of a rank: {format_quantity(least, 'bytes', 4)} to {format_quantity(most, 'bytes', 4)}.",
            soft_wrap=True,
        )
    if report.losses:
        console.print(
            f"Loss: {report.losses[0]:.6g} in the first measured step, {report.losses[-1]:.6g} in the last."
        )
