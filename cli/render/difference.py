"""What ``diff`` shows: the fields that differ, and times, memory and cost side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePath

from rich.table import Table

from meshwright.cli.render.console import make_table, stdout_console
from meshwright.cli.render.explanation import interval_sentence
from meshwright.cli.render.terms import byte_cells, difference_table, figure_cells, second_cells
from meshwright.planner.difference import (
    FieldDifference,
    TermDifference,
    field_differences,
    figure_differences,
    memory_differences,
    speed_sentence,
    term_differences,
)
from meshwright.planner.explanation import Explanation
from meshwright.planner.plan_file import PlanDocument, prediction_mapping
from meshwright.units import Kind, format_quantity

__all__ = ["difference_mapping", "fields_table", "print_difference", "short_names"]

# Quantities by a word in their key, the longer first.
_KINDS: Mapping[str, Kind] = {
    "flops_per_second": "flops_per_second",
    "bytes_per_second": "bytes_per_second",
    "dollars_per_hour": "dollars_per_hour",
    "watts": "watts",
    "bytes": "bytes",
    "latency": "seconds",
}


def difference_mapping(
    names: tuple[str, str],
    documents: tuple[PlanDocument, PlanDocument],
    explained: tuple[Explanation, Explanation],
) -> dict[str, object]:
    """Return the difference as plain data."""
    first, second = explained
    return {
        "kind": "plan_difference",
        "files": list(names),
        "fields": [asdict(each) for each in field_differences(*documents)],
        "time_seconds": _rows(term_differences(first, second)),
        "memory_bytes": _rows(memory_differences(first.prediction, second.prediction)),
        "figures": _rows(figure_differences(first, second)),
        "predictions": [prediction_mapping(each.prediction) for each in explained],
        "reason": speed_sentence(first, second),
    }


def _rows(differences: tuple[TermDifference, ...]) -> list[dict[str, object]]:
    return [{**asdict(each), "change": each.change} for each in differences]


def print_difference(
    names: tuple[str, str],
    documents: tuple[PlanDocument, PlanDocument],
    explained: tuple[Explanation, Explanation],
) -> None:
    """Print the fields that differ, then times, memory and figures side by side."""
    names = short_names(names)
    console = stdout_console()
    first, second = explained
    found = field_differences(*documents)
    if found:
        console.print(fields_table(names, found))
    else:
        console.print("The plans and their jobs are the same.")
    times = term_differences(first, second)
    memory = memory_differences(first.prediction, second.prediction)
    figures = figure_differences(first, second)
    console.print(difference_table("Time of the busiest stage", names, times, second_cells(times)))
    console.print(difference_table("Memory of the fullest stage", names, memory, byte_cells(memory)))
    console.print(difference_table("Throughput and cost", names, figures, figure_cells(figures)))
    console.print(f"Why: {speed_sentence(first, second)}", soft_wrap=True)
    for name, explanation in zip(names, explained, strict=True):
        console.print(f"{name}: {interval_sentence(explanation.prediction)}", soft_wrap=True)


def short_names(names: tuple[str, str]) -> tuple[str, str]:
    """Return paths without the folders that both begin with: as headings, long ones leave a table no room.

    Examples
    --------
    >>> short_names(("runs/plans/1.yaml", "runs/plans/2.yaml"))
    ('1.yaml', '2.yaml')
    >>> short_names(("plans/1.yaml", "other.yaml"))
    ('plans/1.yaml', 'other.yaml')
    """
    first, second = (PurePath(name).parts for name in names)
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    return str(PurePath(*first[shared:])), str(PurePath(*second[shared:]))


def fields_table(names: tuple[str, str], found: Sequence[FieldDifference]) -> Table:
    """Return the table of fields that differ."""
    table = make_table("What differs", (("", False), ("field", False), (names[0], True), (names[1], True)))
    for each in found:
        table.add_row(each.section, each.key, _shown(each.key, each.first), _shown(each.key, each.second))
    return table


def _shown(key: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        kind = next((kind for word, kind in _KINDS.items() if word in key), None)
        return f"{value:.6g}" if kind is None else format_quantity(value, kind)
    if isinstance(value, tuple):
        return _runs(value)
    return str(value)


def _runs(values: tuple[object, ...]) -> str:
    """Return a sequence with its repetitions counted: ``15, 6 x 16, 15``."""
    runs: list[tuple[object, int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    return ", ".join(str(value) if count == 1 else f"{count} x {value}" for value, count in runs) or "-"
