"""The work of one profile: in which order, how long, what is written down, and what is given back."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from meshwright.errors import ExecutionError
from meshwright.profiler.device import Device, DeviceState, device_state
from meshwright.profiler.failures import Failure, describe_failure, expected_errors, release_memory
from meshwright.profiler.profile_summary import ProfileSummary, Progress
from meshwright.profiler.protocol import MeasureLimits, Timing, measure
from meshwright.profiler.records import (
    ConstantRecord,
    FinishedRecord,
    SampleRecord,
    SentinelRecord,
    identity_of,
)
from meshwright.profiler.sentinels import drift_of, measure_sentinels
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.store import MeasurementLog
from meshwright.profiler.suites.base import Case

__all__ = ["COLLECTIVES", "CollectiveResults", "ProfileRun", "case_identity"]

COLLECTIVES = "collectives"
CollectiveResults: TypeAlias = Callable[[Callable[[Case], bool]], Iterator[tuple[Case, Timing | Failure]]]

# Share of the time that is kept for collectives, and the largest share that is kept for anything but shapes.
_COLLECTIVES_SHARE = 0.15
_MAX_RESERVE = 0.5
# Shares of the time that shapes leave free for the one that ends too late, and that constants may end too late.
_SLACK, _GRACE = 0.02, 0.05
# Enough for drifts of a percent, and a second a round on a slow processor.
_SENTINEL_LIMITS = MeasureLimits(max_repeats=50)
# Rounds over all shapes on a processor, whose neighbours come and go; a GPU has sentinels.
_CPU_PASSES = 3
# The driver's figures are averages over about as long; reading them through nvidia-smi takes 50 ms [s].
_STATE_SECONDS = 1.0
_GOES_ON = "the same command leaves this case out and goes on with the next"


def case_identity(case: Case) -> str:
    """Return the identity under which a case's records are found."""
    return identity_of(case.operator, case.precision, case.shape)


class ProfileRun:
    """One call of :func:`meshwright.profiler.profile.run_profile`, from its first sentinel to its summary.

    Parameters
    ----------
    log : MeasurementLog
        Where results go, and what earlier runs left there.
    cases : Sequence[Case]
        All different cases, but collectives.
    device : Device
        What is measured.
    settings : ProfileSettings
        How, and for how long.
    progress : Callable[[Progress], None] | None
        Called after each measurement.
    """

    def __init__(
        self,
        log: MeasurementLog,
        cases: Sequence[Case],
        device: Device,
        settings: ProfileSettings,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._log = log
        self._shapes = [case for case in cases if case.value is None]
        self._constants = [case for case in cases if case.value is not None]
        self._device = device
        self._settings = settings
        self._progress = progress
        self._begin = time.perf_counter()
        self._counts: Counter[str] = Counter()
        self._without_memory: set[str] = set()
        self._sentinels: dict[str, list[float]] = {}
        self._next_sentinels = 0.0
        self._state, self._next_state = DeviceState(), 0.0
        self._throttle_reasons: set[str] = set()
        self._num_done = self._num_planned = 0

    def measure_all(self, collectives: CollectiveResults | None) -> ProfileSummary:
        """Measure what the file lacks until the time is over.

        Parameters
        ----------
        collectives : CollectiveResults | None
            Starts the processes that measure collectives, told which are there already; None when they are not wanted.
        """
        settings = self._settings
        num_passes = settings.num_passes or (1 if self._device.is_gpu else _CPU_PASSES)
        constants = [case for case in self._constants if self._is_pending(case, 0)]
        if COLLECTIVES in self._log.finished_suites:
            collectives = None
        self._num_planned = len(constants) + sum(
            self._is_pending(case, index) for index in range(num_passes) for case in self._shapes
        )
        if self._num_planned or collectives:
            self._watch()
        for_constants = sum(case.expected_seconds for case in constants)
        for_collectives = _COLLECTIVES_SHARE * settings.max_seconds if collectives else 0.0
        reserve = min(for_constants + for_collectives, _MAX_RESERVE * settings.max_seconds)
        deadline = (1.0 - _SLACK) * settings.max_seconds - reserve
        for index in range(num_passes):
            self._measure_shapes(index, settings.pass_of(num_passes), deadline)
        is_finished = collectives is None or self._measure_collectives(
            collectives, settings.max_seconds - for_constants
        )
        for case in constants:
            if self._elapsed() + case.expected_seconds <= (1.0 + _GRACE) * settings.max_seconds:
                self._measure_constant(case)
        if self._num_done:
            self._watch()
        return self._summary(unfinished_suites=() if is_finished else (COLLECTIVES,))

    def _measure_shapes(self, index: int, settings: ProfileSettings, deadline: float) -> None:
        """Measure every shape that has been measured ``index`` times at most."""
        order = np.random.default_rng((settings.seed, index)).permutation(len(self._shapes))
        for row in order:
            if self._elapsed() >= deadline:
                return
            case = self._shapes[row]
            if self._is_pending(case, index):
                self._measure_shape(case, _limits(case, settings))
                if self._elapsed() >= self._next_sentinels:
                    self._watch()

    def _is_pending(self, case: Case, num_measured: int) -> bool:
        identity = case_identity(case)
        if identity in self._log.failed or identity in self._without_memory:
            return False
        return self._log.num_measured(identity) <= num_measured

    def _measure_shape(self, case: Case, limits: MeasureLimits) -> None:
        try:
            result = self._attempt(case, limits)
            if isinstance(result, Failure) and result.status == "out_of_memory":
                # What the cases before have left behind has been given back by now.
                result = self._attempt(case, limits)
        except ExecutionError as error:
            self._note_sample(case, Failure(status="failed", reason=str(error)))
            raise ExecutionError(f"{case.label}: {error}; {_GOES_ON}") from None
        self._note_sample(case, result)

    def _attempt(self, case: Case, limits: MeasureLimits) -> Timing | Failure:
        try:
            function = case.prepare()
        except expected_errors() as error:
            failure = describe_failure(error)
        else:
            return measure(function, self._device, limits)
        if failure.status == "out_of_memory":
            release_memory(self._device)
        return failure

    def _note_sample(self, case: Case, result: Timing | Failure) -> None:
        state = self._read_state()
        blank = SampleRecord(
            suite=case.suite,
            operator=case.operator,
            precision=case.precision,
            shape=case.shape,
            status="failed",
            clock_hertz=state.sm_clock_hertz,
            temperature_celsius=state.temperature_celsius,
            power_watts=state.power_watts,
        )
        record = blank.with_result(result)
        self._log.append(record)
        if record.status == "out_of_memory":
            self._without_memory.add(record.identity)
        self._report(record.status, case.label)

    def _measure_constant(self, case: Case) -> None:
        blank = ConstantRecord(suite=case.suite, name=str(case.shape["name"]), value=None, status="failed")
        try:
            record = _with_value(case, blank)
        except ExecutionError as error:
            self._log.append(dataclasses.replace(blank, reason=str(error)))
            raise ExecutionError(f"{case.label}: {error}; {_GOES_ON}") from None
        release_memory(self._device)
        self._log.append(record)
        if record.status == "out_of_memory":
            self._without_memory.add(record.identity)
        self._report(record.status, case.label)

    def _measure_collectives(self, collectives: CollectiveResults, deadline: float) -> bool:
        """Take what the processes of the suite yield; return whether they came to their end in time."""
        if self._elapsed() >= deadline:
            return False
        release_memory(self._device)
        # Closing the generator ends its processes.
        with contextlib.closing(_generator(collectives, self._is_measured)) as results:
            for case, result in results:
                if not self._is_measured(case):
                    self._note_sample(case, result)
                if self._elapsed() >= deadline:
                    return False
        self._log.append(FinishedRecord(suite=COLLECTIVES))
        return True

    def _is_measured(self, case: Case) -> bool:
        return case_identity(case) in self._log.done

    def _watch(self) -> None:
        """Measure the sentinels."""
        for name, seconds in measure_sentinels(self._device, _SENTINEL_LIMITS).items():
            self._log.append(SentinelRecord(name=name, seconds=seconds, elapsed=self._elapsed()))
            self._sentinels.setdefault(name, []).append(seconds)
        self._next_sentinels = self._elapsed() + self._settings.sentinel_interval

    def _read_state(self) -> DeviceState:
        now = self._elapsed()
        if now >= self._next_state:
            self._state, self._next_state = device_state(self._device), now + _STATE_SECONDS
            self._throttle_reasons |= set(self._state.throttle_reasons or ()) - {"idle"}
        return self._state

    def _report(self, status: str, label: str) -> None:
        self._counts[status] += 1
        self._num_done += 1
        if self._progress is None:
            return
        elapsed = self._elapsed()
        total = max(self._num_planned, self._num_done)
        left = elapsed / self._num_done * (total - self._num_done)
        self._progress(
            Progress(
                done=self._num_done,
                total=total,
                elapsed=elapsed,
                seconds_left=max(0.0, min(left, self._settings.max_seconds - elapsed)),
                label=label,
            )
        )

    def _elapsed(self) -> float:
        return time.perf_counter() - self._begin

    def _summary(self, unfinished_suites: tuple[str, ...]) -> ProfileSummary:
        cases = (*self._shapes, *self._constants)
        settled = self._log.done | self._without_memory
        return ProfileSummary(
            path=self._log.path,
            num_cases=len(cases),
            counts=dict(self._counts),
            missing=dict(Counter(case.suite for case in cases if case_identity(case) not in settled)),
            unfinished_suites=unfinished_suites,
            drift=drift_of(self._sentinels),
            max_drift=self._settings.max_drift,
            throttle_reasons=tuple(sorted(self._throttle_reasons)),
            seconds=self._elapsed(),
        )


def _limits(case: Case, settings: ProfileSettings) -> MeasureLimits:
    return MeasureLimits(
        num_warm_ups=settings.warm_up,
        min_repeats=settings.min_repeats,
        max_repeats=settings.max_repeats,
        relative_interval=settings.confidence,
        kernel_seconds=settings.kernel_seconds,
        graph_below_seconds=settings.graph_below_seconds,
        is_capturable=case.is_capturable,
    )


def _with_value(case: Case, blank: ConstantRecord) -> ConstantRecord:
    """Return the record of a constant, measured now."""
    assert case.value is not None
    try:
        value = float(case.value())
    except expected_errors() as error:
        failure = describe_failure(error)
        return dataclasses.replace(blank, status=failure.status, reason=failure.reason)
    if not math.isfinite(value):
        return dataclasses.replace(blank, reason=f"the result is {value}")
    return dataclasses.replace(blank, value=value, status="ok")


def _generator(
    collectives: CollectiveResults, is_measured: Callable[[Case], bool]
) -> Generator[tuple[Case, Timing | Failure]]:
    yield from collectives(is_measured)
