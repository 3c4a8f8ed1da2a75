"""Where output goes: results on stdout, progress and notes on stderr, plain when nobody watches."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["ProgressLine", "make_table", "print_json", "stderr_console", "stdout_console"]

_SCHEMA_VERSION = 1
# Tables keep their columns when the output is a file or a pipe and COLUMNS says nothing.
_PIPE_WIDTH = 160
# A line this often is enough to see that a long search lives.
_PLAIN_INTERVAL_SECONDS = 2.0


def stdout_console() -> Console:
    """Return the console of results; colours and width only for a terminal."""
    return _plain_text_console(width=_width(sys.stdout), stderr=False)


def stderr_console() -> Console:
    """Return the console of notes and progress."""
    return _plain_text_console(width=_width(sys.stderr), stderr=True)


def _width(stream: TextIO) -> int | None:
    """Return the width of a stream's lines; None leaves it to the terminal, or to COLUMNS."""
    return None if stream.isatty() or os.environ.get("COLUMNS", "").isdigit() else _PIPE_WIDTH


def _plain_text_console(*, width: int | None, stderr: bool) -> Console:
    # Names and paths are the user's: "[/b]" or ":x:" in one is text, never markup.
    return Console(width=width, stderr=stderr, highlight=False, markup=False, emoji=False)


def make_table(title: str, columns: tuple[tuple[str, bool], ...]) -> Table:
    """Return an empty table; each column is its header and whether it is numeric."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        pad_edge=False,
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    for header, is_numeric in columns:
        table.add_column(header, justify="right" if is_numeric else "left", no_wrap=True)
    return table


def print_json(mapping: Mapping[str, object]) -> None:
    """Print one object with the schema version; not-a-number and infinity are refused by the format."""
    sys.stdout.write(
        json.dumps({"schema_version": _SCHEMA_VERSION, **mapping}, indent=2, allow_nan=False) + "\n"
    )


class ProgressLine:
    """Progress on stderr: a live line on a terminal, a plain line now and then elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self._console = stderr_console()
        self._quiet = quiet
        self._status = self._console.status("starting") if self._console.is_terminal and not quiet else None
        self._last = time.monotonic()
        self._phase = ""

    def __enter__(self) -> ProgressLine:
        """Start the live line."""
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Clear the live line."""
        if self._status:
            self._status.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Say how far a phase is; ``total`` is 0 when unknown."""
        text = f"{phase}: {done:,}" + (f" of {total:,}" if total else "")
        if self._status:
            self._status.update(text)
            return
        is_due = phase != self._phase or time.monotonic() - self._last >= _PLAIN_INTERVAL_SECONDS
        if not self._quiet and is_due:
            self._phase, self._last = phase, time.monotonic()
            self._console.print(text)
