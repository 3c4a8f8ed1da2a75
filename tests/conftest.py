"""Stops with one sentence when a clone has lost its links, and runs the command line inside the process."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

_ROOT = Path(__file__).resolve().parents[1]


def _require_links() -> None:
    settings = tomllib.loads((_ROOT / "pyproject.toml").read_text())
    sources = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["sources"]
    for folder in (name for name in sources if "/" not in name):
        link = _ROOT / "src" / "meshwright" / folder
        if not link.is_symlink() or link.resolve() != _ROOT / folder:
            # SystemExit, because pytest shows any other exception of a conftest with its traceback.
            raise SystemExit(
                f"{link.relative_to(_ROOT)} is not a link to {folder}/: this clone has lost its symbolic links; "
                f"clone again with 'git clone -c core.symlinks=true', or run 'ln -sfn ../../{folder} "
                f"{link.relative_to(_ROOT)}' from the root."
            )


_require_links()
# Readline sets the width of the terminal, and processes that run tests in parallel inherit it.
os.environ.pop("COLUMNS", None)


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


def run_in_process(*arguments: object) -> Outcome:
    """Run ``meshwright ARGUMENTS`` in this process."""
    from meshwright.cli.main import main

    code: int | str | None = 0
    words = ["meshwright", *(str(argument) for argument in arguments)]
    with (
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        mock.patch.object(sys, "argv", words),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    return Outcome(code if isinstance(code, int) else 1, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope="session")
def meshwright() -> Callable[..., Outcome]:
    """Return the function that runs the command line in this process."""
    return run_in_process
