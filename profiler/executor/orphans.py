"""End the workers of a run whose supervisor was killed, which a signal that cannot be caught lets nobody else do.

A small process of its own, ``python -I -S orphans.py``, reads the numbers of their process groups from a pipe. When the
pipe ends without :data:`_ALL_ENDED`, the process at its other end has died, and the groups are killed. This file runs
as a script and imports nothing but the standard library, so that it is there before a worker is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from types import TracebackType

__all__ = ["OrphanKeeper"]

_ALL_ENDED = b"all ended\n"


class OrphanKeeper:
    """The supervisor's end of the pipe; on leaving it as a context all workers have ended.

    Raises
    ------
    ExecutionError
        If no process can be started.
    """

    def __init__(self) -> None:
        try:
            self._process = subprocess.Popen(
                (sys.executable, "-I", "-S", __file__),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                # What ends the supervisor's whole group must not end this one.
                start_new_session=True,
            )
        except OSError as failure:
            # Not above: a script without its package.
            from meshwright.errors import ExecutionError

            raise ExecutionError(
                f"no process can be started to end the workers with this one: {failure.strerror}"
            ) from None

    def __enter__(self) -> OrphanKeeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._write(_ALL_ENDED)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    @property
    def pid(self) -> int:
        """Number of the process that watches."""
        return self._process.pid

    def add(self, process_group: int) -> None:
        """Note a worker that leads a process group."""
        self._write(b"%d\n" % process_group)

    def _write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        # Without it the run is as good as before, but for the supervisor's own death.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line)


def _watch(lines: Iterable[bytes]) -> None:
    groups = []
    for line in lines:
        if line == _ALL_ENDED:
            return
        groups.append(int(line))
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    _watch(sys.stdin.buffer)
