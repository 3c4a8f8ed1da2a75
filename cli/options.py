"""Options every command shares, as one decorator and one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

__all__ = ["CommonOptions", "Seed", "common_options"]

_LARGEST_SEED = 2**32 - 1


class Seed(click.ParamType[int]):
    """A seed of every generator of random numbers in use: 0 to 2**32 - 1 (numpy, Python and PyTorch take those)."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return a seed; fails with one sentence."""
        if isinstance(value, int):
            return value
        if not (value.isascii() and value.isdigit() and int(value) <= _LARGEST_SEED):
            self.fail(f"'{value}' is no seed; give a whole number from 0 to {_LARGEST_SEED}", param, ctx)
        return int(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonOptions:
    """What the shared flags said."""

    calibrations: tuple[Path, ...]
    as_json: bool
    quiet: bool
    force: bool
    seed: int


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the shared options and pass them on as one ``common`` argument."""

    @click.option(
        "--calibration",
        "calibrations",
        multiple=True,
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Use this calibration (repeatable); else built-in.",
    )
    @click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
    @click.option(
        "--seed",
        type=Seed(),
        default=0,
        show_default=True,
        help="For whatever draws random numbers: profiles and fits; planning draws none.",
    )
    @click.option("--quiet", is_flag=True, help="No progress and notes on stderr.")
    @click.option("--debug", is_flag=True, help="Show tracebacks.")
    @click.option("--force", is_flag=True, help="Replace files Meshwright did not write.")
    @wraps(command)
    def wrapped(
        *,
        calibrations: tuple[Path, ...],
        as_json: bool,
        seed: int,
        quiet: bool,
        debug: bool,
        force: bool,
        **arguments: Any,
    ) -> None:
        # --debug is read by main(), which owns tracebacks.
        common = CommonOptions(
            calibrations=calibrations, as_json=as_json, quiet=quiet, force=force, seed=seed
        )
        command(common=common, **arguments)

    return wrapped
