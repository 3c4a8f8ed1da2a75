"""A fit of engine constants as tables and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from meshwright.cli.render.console import make_table, stdout_console
from meshwright.costmodels.serving.constants import TIME_CONSTANTS
from meshwright.profiler.fitting.serving import ServingFit
from meshwright.units import format_change, format_quantity

__all__ = ["print_serving_fit", "serving_fit_mapping"]


def serving_fit_mapping(fit: ServingFit) -> dict[str, object]:
    """Return a fit as plain data."""
    return {"kind": "serving_fit", **asdict(fit)}


def print_serving_fit(fit: ServingFit) -> None:
    """Print the fitted constants, and each run's errors before and after."""
    console = stdout_console()
    table = make_table(
        f"Constants of {fit.engine} on {fit.gpu}, from {len(fit.rows)} runs",
        (("constant", False), ("before", True), ("fitted", True)),
    )
    for name, prior in fit.prior.items():
        table.add_row(name, _value(name, prior), _value(name, fit.constants[name]))
    console.print(table)
    runs = make_table(
        "Error of each run: predicted over measured, less 1",
        (
            ("run", False),
            ("TPOT before", True),
            ("after", True),
            ("TTFT before", True),
            ("after", True),
        ),
    )
    for row in fit.rows:
        errors = (row.tpot_before, row.tpot_after, row.ttft_before, row.ttft_after)
        runs.add_row(row.id, *(format_change(error) for error in errors))
    console.print(runs)
    for name, reason in fit.skipped.items():
        console.print(f"skipped {name}: {reason}", markup=False, soft_wrap=True)
    before, after = (
        _mean([getattr(row, f"tpot_{when}") for row in fit.rows]) for when in ("before", "after")
    )
    console.print(f"Mean TPOT error {before:.1%} before, {after:.1%} after.")


def _value(name: str, value: float) -> str:
    return format_quantity(value, "seconds", 4) if name in TIME_CONSTANTS else f"{value:.4g}"


def _mean(errors: Sequence[float]) -> float:
    return sum(abs(error) for error in errors) / len(errors)
