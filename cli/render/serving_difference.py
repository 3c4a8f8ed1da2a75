"""What ``diff`` and ``whatif`` show of serving plans: fields that differ, then latencies, memory and cost side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from rich.table import Table

from meshwright.cli.render.console import stdout_console
from meshwright.cli.render.difference import fields_table, short_names
from meshwright.cli.render.terms import byte_cells, difference_table
from meshwright.planner.difference import TermDifference
from meshwright.planner.serving.comparison import (
    figure_terms,
    latency_terms,
    memory_terms,
    serving_field_differences,
    serving_sentence,
)
from meshwright.planner.serving.run import ServingRun
from meshwright.units import format_change, format_quantity

__all__ = ["latency_table", "print_serving_difference", "serving_difference_mapping"]


def serving_difference_mapping(
    names: tuple[str, str], first: ServingRun, second: ServingRun
) -> dict[str, object]:
    """Return the difference of two simulated plans as plain data."""
    return {
        "kind": "serving_plan_difference",
        "plans": list(names),
        "fields": [asdict(each) for each in serving_field_differences(first.document, second.document)],
        "latency_seconds": _rows(latency_terms(first, second)),
        "memory_bytes": _rows(memory_terms(first, second)),
        "figures": _rows(figure_terms(first, second)),
        "reason": serving_sentence(first, second),
    }


def print_serving_difference(names: tuple[str, str], first: ServingRun, second: ServingRun) -> None:
    """Print the fields that differ, then latencies, memory and figures side by side."""
    names = short_names(names)
    console = stdout_console()
    found = serving_field_differences(first.document, second.document)
    if found:
        console.print(fields_table(names, found))
    else:
        console.print("The plans and their jobs are the same.")
    memory, figures = memory_terms(first, second), figure_terms(first, second)
    console.print(latency_table("Latencies", names, first, second))
    console.print(difference_table("Memory of a rank", names, memory, byte_cells(memory)))
    console.print(difference_table("Throughput and cost", names, figures, _cells(figures, _figure)))
    console.print(f"Why: {serving_sentence(first, second)}", soft_wrap=True)
    if first.document.job.workload != second.document.job.workload:
        console.print("Each plan serves the load of its own job; these differ.", soft_wrap=True)


def latency_table(title: str, names: tuple[str, str], first: ServingRun, second: ServingRun) -> Table:
    """Return the time to the first token by part, and means and tails of what users wait for."""
    latencies = latency_terms(first, second)
    return difference_table(title, names, latencies, _cells(latencies, _seconds))


def _rows(differences: Sequence[TermDifference]) -> list[dict[str, object]]:
    return [{**asdict(each), "change": each.change} for each in differences]


def _seconds(value: float) -> str:
    # The rest of a difference of sums: less than a nanosecond is rounding.
    return format_quantity(value if abs(value) >= 1e-9 else 0.0, "seconds", 3)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"


def _cells(
    differences: Sequence[TermDifference], shown: Callable[[float], str]
) -> dict[str, tuple[str, str, str]]:
    """Return values as text, and relative changes."""
    cells = {}
    for each in differences:
        first, second = ("-" if value is None else shown(value) for value in (each.first, each.second))
        change = format_change(each.change / each.first) if each.change is not None and each.first else ""
        cells[each.name] = (first, second, change)
    return cells
