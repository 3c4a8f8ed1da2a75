"""What a worker notes while it runs: what it is doing, how long each phase takes, and what it sends."""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from meshwright.profiler.executor.report import GroupTraffic, now_path

__all__ = ["Recorder", "StepRecord", "Traffic"]

# A line of this length is written in one piece, and read as one [B].
_LINE_BYTES = 200


@dataclass(slots=True)
class Traffic:
    """Messages and bytes one rank contributed to one kind of collective over one axis, and the time inside."""

    messages: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class StepRecord:
    """One step of one rank.

    Parameters
    ----------
    seconds, cpu_seconds : float
        Wall and the process's CPU time [s].
    phase_seconds, phase_cpu_seconds : dict[str, float]
        The same by phase [s]; wall time is the device's on a GPU, CPU time that of the thread that computes.
    traffic : dict[tuple[str, str], Traffic]
        By axis and operation.
    operations : list[tuple[int, int, int]]
        Pipeline operations as run: kind (:mod:`meshwright.simcore.schedules`), micro-batch, virtual stage.
    loss, gradient_norm : float
        Of the whole batch.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    phase_cpu_seconds: dict[str, float] = field(default_factory=dict)
    traffic: dict[tuple[str, str], Traffic] = field(default_factory=dict)
    operations: list[tuple[int, int, int]] = field(default_factory=list)
    loss: float = 0.0
    gradient_norm: float = 0.0


class Recorder:
    """Notes of one rank.

    Parameters
    ----------
    rank : int
        Global rank.
    directory : Path | None
        Where ``rank{r}.now`` says what the rank is in; None says it nowhere.
    device : torch.device
        Its processor or GPU.

    Notes
    -----
    Phases do not nest. Time inside a collective that a phase's own operations call (tensor, context and expert
    parallel) belongs to the phase, and is in the collective's traffic as well; ``wait`` is what a pipeline stage waits
    for its neighbours. CPU time inside collectives is not in that of the phase. On a GPU collectives are not waited for by the host: the seconds of traffic are those of the
    calls, and phases are timed by events.
    """

    def __init__(self, rank: int, directory: Path | None, device: torch.device) -> None:
        self.device, self.directory = device, directory
        self.steps: list[StepRecord] = []
        self.step = StepRecord()
        self.place = ""
        self._inside = 0.0
        # Threads of gloo move and sum the messages: without theirs, compute is alone in the time of this one.
        self._cpu_clock = time.thread_time if torch.get_num_threads() == 1 else time.process_time
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._file = (
            None
            if directory is None
            else os.open(now_path(directory, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        )

    def close(self) -> None:
        """Close the file of the operation the rank is in."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def say(self, operation: str) -> None:
        """Say which operation begins; called before everything that may wait for another rank."""
        if self._file is not None:
            line = f"{self.place}: {operation}" if self.place else operation
            text = line.encode("ascii", "replace")[: _LINE_BYTES - 1] + b"\n"
            os.pwrite(self._file, text.ljust(_LINE_BYTES), 0)

    @contextlib.contextmanager
    def sending(self, axis: str, operation: str, num_bytes: int, partners: str) -> Iterator[None]:
        """Count one message and time what is done inside."""
        self.say(f"{operation} over {axis} ({partners})")
        traffic = self.step.traffic.setdefault((axis, operation), Traffic())
        traffic.messages += 1
        traffic.num_bytes += num_bytes
        with self._timed(traffic):
            yield

    @contextlib.contextmanager
    def waiting(self, axis: str, operation: str, partners: str) -> Iterator[None]:
        """Add what is waited inside to the time of messages that were counted when they began."""
        self.say(f"wait for {operation} over {axis} ({partners})")
        with self._timed(self.step.traffic.setdefault((axis, operation), Traffic())):
            yield

    @contextlib.contextmanager
    def _timed(self, traffic: Traffic) -> Iterator[None]:
        cpu, wall = self._cpu_clock(), time.perf_counter()
        try:
            yield
        finally:
            traffic.seconds += time.perf_counter() - wall
            self._inside += self._cpu_clock() - cpu

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step."""
        cpu, wall = self._cpu_clock() - self._inside, time.perf_counter()
        begin = None
        if self.device.type == "cuda":
            begin = _new_event()
            begin.record()
        try:
            yield
        finally:
            _add(self.step.phase_cpu_seconds, name, self._cpu_clock() - self._inside - cpu)
            if begin is None:
                _add(self.step.phase_seconds, name, time.perf_counter() - wall)
            else:
                end = _new_event()
                end.record()
                self._events.append((name, begin, end))

    @contextlib.contextmanager
    def whole_step(self) -> Iterator[StepRecord]:
        """Time a step and keep its record."""
        self.step = StepRecord()
        self._synchronize()
        cpu, wall = time.process_time(), time.perf_counter()
        yield self.step
        self._synchronize()
        self.step.seconds = time.perf_counter() - wall
        self.step.cpu_seconds = time.process_time() - cpu
        for name, begin, end in self._events:
            _add(self.step.phase_seconds, name, begin.elapsed_time(end) / 1e3)
        self._events.clear()
        self.steps.append(self.step)

    def peak_memory_bytes(self) -> int:
        """Return the most memory held at once: of the device, or of the process on a CPU [B]."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def traffic_per_step(self, num_steps: int) -> tuple[GroupTraffic, ...]:
        """Return the mean traffic of the last steps, seconds as their median."""
        steps = self.steps[-num_steps:]
        keys = sorted({key for step in steps for key in step.traffic})
        found = []
        for axis, operation in keys:
            each = [step.traffic.get((axis, operation), Traffic()) for step in steps]
            found.append(
                GroupTraffic(
                    axis=axis,
                    operation=operation,
                    num_messages=round(statistics.mean(one.messages for one in each)),
                    num_bytes=round(statistics.mean(one.num_bytes for one in each)),
                    seconds=statistics.median(one.seconds for one in each),
                )
            )
        return tuple(found)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _add(sums: dict[str, float], name: str, value: float) -> None:
    sums[name] = sums.get(name, 0.0) + value
