"""A profile: all cases of all suites in random order, each written down as soon as it is measured."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

from meshwright.profiler.device import Device
from meshwright.profiler.failures import Failure
from meshwright.profiler.profile_run import COLLECTIVES, CollectiveResults, ProfileRun, case_identity
from meshwright.profiler.profile_summary import ProfileSummary, Progress
from meshwright.profiler.protocol import Timing
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.store import MeasurementLog
from meshwright.profiler.suites.base import Case

__all__ = ["ProfileSummary", "Progress", "run_profile"]


def run_profile(
    path: Path,
    device: Device,
    settings: ProfileSettings,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> ProfileSummary:
    """Measure what a file still lacks, and return what was done.

    Shapes come first, in random order, then collectives, and the numbers that heat the device last. Each result is
    on the disk before the next begins: however the run ends, the same call goes on where it was.

    Parameters
    ----------
    path : Path
        File to begin or to go on with.
    device : Device
        From :func:`meshwright.profiler.device.discover_device`.
    settings : ProfileSettings
        What to measure and for how long.
    progress : Callable[[Progress], None] | None
        Called after each measurement.

    Raises
    ------
    SpecError
        If the file is not usable, or ``settings`` name an unknown suite.
    ExecutionError
        If the GPU is lost or the file cannot be written.
    """
    cases = _all_cases(device, settings)
    with MeasurementLog.open(path, device, settings) as log:
        run = ProfileRun(log, cases, device, settings, progress)
        return run.measure_all(_collectives(device, settings))


def _suite_names(device: Device, settings: ProfileSettings) -> tuple[str, ...]:
    from meshwright.profiler.suites import SUITES

    if settings.suites:
        return settings.suites
    with_collectives = settings.with_collectives or device.num_devices >= 2
    return tuple(name for name in SUITES if name != COLLECTIVES or with_collectives)


def _all_cases(device: Device, settings: ProfileSettings) -> tuple[Case, ...]:
    """Return each different case once, in the order of the suites."""
    from meshwright.profiler.suites import load_suite

    found: dict[str, Case] = {}
    for name in _suite_names(device, settings):
        if name == COLLECTIVES:
            continue
        for case in load_suite(name).cases(device, settings):
            found.setdefault(case_identity(case), case)
    return tuple(found.values())


def _collectives(device: Device, settings: ProfileSettings) -> CollectiveResults | None:
    """Return the generator of the suite that measures in processes of its own, None when it is not wanted."""
    from meshwright.profiler.suites import SUITES

    if COLLECTIVES not in _suite_names(device, settings):
        return None
    start: Callable[
        [Device, ProfileSettings, Callable[[Case], bool]], Iterator[tuple[Case, Timing | Failure]]
    ]
    start = importlib.import_module(SUITES[COLLECTIVES]).run_collectives
    return lambda is_measured: start(device, settings, is_measured)
