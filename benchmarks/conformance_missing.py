"""How the programs that ask real clients end when a client is missing: one sentence and exit code 4, as the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

__all__ = ["exit_missing", "exit_with"]

_MISSING = 4


def exit_with(main: Callable[[], int], needs: str) -> NoReturn:
    """Exit with what a program returns, or with one sentence where its client cannot be imported or read.

    Parameters
    ----------
    main : Callable[[], int]
        The program.
    needs : str
        What it needs and where that comes from, for a sentence.
    """
    try:
        sys.exit(main())
    except ImportError as error:
        if (error.name or "").startswith("meshwright"):
            raise
        exit_missing(str(error), needs)
    except FileNotFoundError as error:
        exit_missing(f"no file {error.filename}", needs)


def exit_missing(what: str, needs: str) -> NoReturn:
    """Say what is missing and what is needed, and exit."""
    print(f"error: {what}; this needs {needs}", file=sys.stderr)
    sys.exit(_MISSING)
