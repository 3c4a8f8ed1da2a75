"""A fit of software constants as tables and as plain data."""

from __future__ import annotations

from dataclasses import asdict

from meshwright.cli.render.console import make_table, stdout_console
from meshwright.profiler.fitting.software import SoftwareFit

__all__ = ["print_software_fit", "software_fit_mapping"]


def software_fit_mapping(fit: SoftwareFit) -> dict[str, object]:
    """Return a fit as plain data."""
    return {
        "kind": "software_fit",
        "software": fit.generation,
        "constants": dict(fit.constants),
        "sustained_clock": {gpu: dict(clocks) for gpu, clocks in fit.sustained_clock.items()},
        "prior": dict(fit.prior),
        "standard_errors": dict(fit.standard_errors),
        "errors": {
            "before": asdict(fit.error_before),
            "after": asdict(fit.error_after),
            "left_out": asdict(fit.error_left_out),
        },
        "rows": [asdict(row) for row in fit.rows],
        "skipped": dict(fit.skipped),
    }


def print_software_fit(fit: SoftwareFit) -> None:
    """Print the fitted constants, each row before and after, and what to expect of the next run."""
    console = stdout_console()
    table = make_table(
        f"Constants of {fit.generation}, from {fit.num_rows} runs",
        (("constant", False), ("default", True), ("fitted", True), ("standard error", True)),
    )
    fitted = dict(fit.constants)
    for gpu, clocks in fit.sustained_clock.items():
        fitted |= {f"{gpu}.sustained_clock.{name}": value for name, value in clocks.items()}
    for name, prior in fit.prior.items():
        table.add_row(
            name,
            f"{prior:.4g}",
            f"{fitted.get(name, prior):.4g}",
            f"{fit.standard_errors.get(name, 0.0):.2g}",
        )
    console.print(table)
    rows = make_table(
        "Runs", (("run", False), ("measured", True), ("before", True), ("after", True), ("left out", True))
    )
    for row in fit.rows:
        shares = (
            f"{100.0 * (value / row.measured - 1.0):+.1f} %"
            for value in (row.before, row.after, row.left_out)
        )
        rows.add_row(row.id, f"{row.measured:.4g} s", *shares)
    console.print(rows)
    for name, reason in fit.skipped.items():
        console.print(f"skipped {name}: {reason}", soft_wrap=True)
    before, left_out = fit.error_before, fit.error_left_out
    console.print(
        f"Mean error before {100.0 * before.mean:.1f} %, left out {100.0 * left_out.mean:.1f} % "
        f"(median {100.0 * before.median:.1f} % and {100.0 * left_out.median:.1f} %): expect the latter of the next run.",
        soft_wrap=True,
    )
