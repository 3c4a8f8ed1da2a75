"""Watch the workers of a run: end all when one fails, hangs or the user interrupts, and leave no process behind.

Every worker leads a process group of its own, which signals reach as a whole. A leader that has ended is not waited
for (:func:`os.waitid` with ``WNOWAIT``) until its group is gone, so that its number cannot have become another's.
Should this process be killed, :mod:`meshwright.profiler.executor.orphans` ends the workers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from meshwright.errors import ExecutionError
from meshwright.profiler.executor.orphans import OrphanKeeper
from meshwright.profiler.executor.report import log_path, now_path

__all__ = ["Patience", "WorkerCommand", "supervise"]

Progress = Callable[[str], None]

# What a user or a batch system sends to end a program.
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_SECONDS = 0.02
_MAX_OPERATION = 200
_NOT_STARTED = "starting"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCommand:
    """One worker process.

    Parameters
    ----------
    rank : int
        Its global rank.
    arguments : tuple[str, ...]
        Program and arguments; no shell is involved.
    environment : Mapping[str, str]
        Variables on top of this process's own.
    """

    rank: int
    arguments: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait.

    Parameters
    ----------
    silence : float
        All workers that still run may say nothing new for this long [s].
    start : float
        From the start to the first word of a worker, which imports torch meanwhile [s].
    goodbye : float
        From the request to end until the processes are killed [s].
    """

    silence: float = 60.0
    start: float = 120.0
    goodbye: float = 2.0


@dataclass(slots=True, kw_only=True)
class _Worker:
    """A started worker: what it last said, when, and how it ended."""

    rank: int
    process: subprocess.Popen[bytes]
    operation: str = _NOT_STARTED
    word: tuple[int, str] | None = None
    last_change: float = field(default_factory=time.monotonic)
    exit_code: int | None = None


def supervise(
    commands: Sequence[WorkerCommand],
    directory: Path,
    *,
    patience: Patience | None = None,
    progress: Progress | None = None,
) -> None:
    """Start the workers and wait until all have ended well.

    Parameters
    ----------
    commands : Sequence[WorkerCommand]
        The workers of this machine.
    directory : Path
        The run's folder: their output goes to ``rank{r}.log``, and they say in ``rank{r}.now`` what they do.
    patience : Patience | None
        Defaults when None.
    progress : Callable[[str], None] | None
        Called with what the first of them does when that changes.

    Raises
    ------
    ExecutionError
        If a worker cannot be started, fails or all hang: names ranks, operations and logs. No worker runs any more.
    KeyboardInterrupt
        After an interrupt; ``SIGTERM`` and ``SIGHUP`` end this process as usual. No worker runs any more.
    """
    patience = patience or Patience()
    workers: list[_Worker] = []
    with _deferred_signals() as received, OrphanKeeper() as keeper:
        try:
            for command in commands:
                if received:
                    break
                workers.append(_start(command, directory))
                keeper.add(workers[-1].process.pid)
            while not received and any(worker.exit_code is None for worker in workers):
                _observe(workers, directory, progress)
                _check_exits(workers, directory)
                _check_silence(workers, directory, patience)
                time.sleep(_POLL_SECONDS)
        finally:
            _end(workers, patience.goodbye)


@contextlib.contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Collect the signals that end a program, and deliver the first of them at the end."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in _ENDING_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def _start(command: WorkerCommand, directory: Path) -> _Worker:
    path = log_path(directory, command.rank)
    try:
        with path.open("wb") as log:
            process = subprocess.Popen(
                command.arguments,
                env={**os.environ, **command.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A session of its own: a terminal's Ctrl-C reaches this process alone, which then ends the group.
                start_new_session=True,
            )
    except OSError as error:
        raise ExecutionError(
            f"rank {command.rank} cannot be started: {error.strerror} ({error.filename})"
        ) from None
    return _Worker(rank=command.rank, process=process)


def _observe(workers: Sequence[_Worker], directory: Path, progress: Progress | None) -> None:
    """Note what the workers say and which have ended."""
    for worker in workers:
        # What it is in first, its end second: the last word of a worker is read before it counts as dead.
        word = _word(now_path(directory, worker.rank))
        if word is not None and word != worker.word:
            worker.word, worker.operation, worker.last_change = word, word[1], time.monotonic()
            if progress is not None and worker is workers[0]:
                progress(worker.operation)
        if worker.exit_code is None:
            worker.exit_code = _exit_code(worker.process.pid)


def _word(path: Path) -> tuple[int, str] | None:
    """Return time and text of a worker's last word; None before the first."""
    try:
        changed = path.stat().st_mtime_ns
        with path.open("rb") as stream:
            text = stream.read(_MAX_OPERATION)
    except OSError:
        return None
    lines = text.decode("utf-8", errors="replace").splitlines()
    # Into a message and onto a terminal: nothing but printable text.
    operation = "".join(char for char in (lines or [""])[0] if char.isprintable())
    return changed, operation.strip()


def _exit_code(pid: int) -> int | None:
    """Return how a process ended, as :mod:`subprocess` counts, and leave it there to be waited for."""
    state = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if state is None:
        return None
    return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status


def _check_exits(workers: Sequence[_Worker], directory: Path) -> None:
    failed = [worker for worker in workers if worker.exit_code]
    if not failed:
        return

    def last_output(worker: _Worker) -> float:
        return log_path(directory, worker.rank).stat().st_mtime

    # One that is killed says nothing; of the others the first to complain is the one the rest complain about.
    first = min(failed, key=lambda worker: (not _is_signal(worker), last_output(worker)))
    code = first.exit_code or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    hint = "; a machine that runs out of memory does this" if code == -signal.SIGKILL else ""
    raise ExecutionError(
        f"rank {first.rank} {how} in: {first.operation}; its output is in {log_path(directory, first.rank)}"
        f" (all other ranks were ended){hint}"
    )


def _is_signal(worker: _Worker) -> bool:
    return worker.exit_code is not None and worker.exit_code < 0


def _check_silence(workers: Sequence[_Worker], directory: Path, patience: Patience) -> None:
    """Raise when nothing new was said for too long by anyone: one that computes lets the others wait."""
    running = [worker for worker in workers if worker.exit_code is None]
    if not running:
        return
    now = time.monotonic()
    limits = [
        worker.last_change + (patience.silence if worker.word else max(patience.start, patience.silence))
        for worker in running
    ]
    if now < max(limits):
        return
    waits = "\n".join(f"  rank {worker.rank}: {worker.operation}" for worker in running)
    raise ExecutionError(
        f"the run hangs: no rank got further for {now - max(worker.last_change for worker in running):.0f} s;"
        f" all were ended. They waited in\n{waits}\n"
        f"Their output is in {log_path(directory, running[0].rank).parent}/rank*.log; give slow steps a longer"
        " --timeout"
    )


def _end(workers: Sequence[_Worker], goodbye: float) -> None:
    """End every process group that is left, by request and then by force, and wait for the leaders."""
    _signal_groups(workers, signal.SIGTERM)
    deadline = time.monotonic() + goodbye
    while time.monotonic() < deadline and any(_exit_code(worker.process.pid) is None for worker in workers):
        time.sleep(_POLL_SECONDS)
    # Groups whose leader is gone may still hold others.
    _signal_groups(workers, signal.SIGKILL)
    for worker in workers:
        worker.process.wait()


def _signal_groups(workers: Sequence[_Worker], number: int) -> None:
    for worker in workers:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.process.pid, number)
