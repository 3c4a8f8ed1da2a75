"""Progress and outcome of a profile."""

from __future__ import annotations

from collections.abc import Mapping

from meshwright.cli.render.console import ProgressLine, make_table, stdout_console
from meshwright.profiler.device import Device
from meshwright.profiler.profile_summary import ProfileSummary, Progress

__all__ = ["ProfileProgress", "print_profile", "profile_mapping"]


class ProfileProgress:
    """Shows how far a profile is and how long it will take; live on a terminal, a line now and then elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self._line = ProgressLine(quiet)

    def __enter__(self) -> ProfileProgress:
        """Start the live line."""
        self._line.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        """Clear the live line."""
        self._line.__exit__(*exception)

    def __call__(self, progress: Progress) -> None:
        """Show one state."""
        left = f"about {progress.seconds_left:.0f} s left"
        self._line(f"measuring, {left}", progress.done, progress.total)


def profile_mapping(device: Device, summary: ProfileSummary) -> dict[str, object]:
    """Return the outcome as plain data."""
    return {
        "kind": "profile",
        "device": {
            "type": device.type,
            "name": device.name,
            "gpu": device.gpu,
            "software": dict(device.software),
        },
        "path": str(summary.path),
        "num_cases": summary.num_cases,
        "counts": dict(summary.counts),
        "missing": dict(summary.missing),
        "unfinished_suites": list(summary.unfinished_suites),
        "drift": dict(summary.drift),
        "drifting": list(summary.drifting),
        "throttle_reasons": list(summary.throttle_reasons),
        "seconds": summary.seconds,
        "is_complete": summary.is_complete,
    }


def print_profile(device: Device, summary: ProfileSummary) -> None:
    """Print what was measured, what is missing, and what to make of it."""
    console = stdout_console()
    table = make_table(f"Profile of {device.name}", (("samples", False), ("count", True)))
    for status, count in sorted(summary.counts.items()):
        table.add_row(status, f"{count:,}")
    console.print(table)
    if summary.drifting:
        worst = max(summary.drift.values())
        console.print(
            f"Times of the same kernels drifted by up to {100.0 * worst:.0f} % (more than "
            f"{100.0 * summary.max_drift:.0f} %): the device was not alone or its clocks changed.",
            soft_wrap=True,
        )
    if summary.throttle_reasons:
        console.print(f"Clocks were lowered: {', '.join(summary.throttle_reasons)}.", soft_wrap=True)
    if summary.is_complete:
        console.print(f"Complete: {summary.num_cases:,} cases in {summary.path}.", soft_wrap=True)
    else:
        console.print(
            f"{_missing(summary.missing, summary.unfinished_suites)}; run again to go on.", soft_wrap=True
        )
    console.print(f"Next: meshwright calibrate {summary.path} --out calibration.json", soft_wrap=True)


def _missing(missing: Mapping[str, int], unfinished: tuple[str, ...]) -> str:
    parts = [f"{count:,} of {suite}" for suite, count in missing.items()]
    return f"Not measured yet: {', '.join([*parts, *unfinished])}"
