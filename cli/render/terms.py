"""Tables and stacked bars of what adds up to an iteration or fills a memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from meshwright.cli.render.console import make_table
from meshwright.costmodels.breakdown import GROUPS, Breakdown
from meshwright.costmodels.prediction import Prediction
from meshwright.planner.difference import TermDifference
from meshwright.units import format_change, format_quantity

__all__ = [
    "byte_cells",
    "difference_table",
    "figure_cells",
    "memory_bar",
    "second_cells",
    "stage_bars",
    "terms_table",
]

# Letter and colour of each part of a bar; colour is for terminals, letters for everybody.
_TIME_MARKS: Mapping[str, tuple[str, str]] = {
    "compute": ("#", "green"),
    "recompute": ("r", "yellow"),
    "embedding and head": ("h", "bright_green"),
    "tensor parallel": ("t", "blue"),
    "context parallel": ("c", "cyan"),
    "expert parallel": ("e", "bright_cyan"),
    "data parallel": ("d", "magenta"),
    "offload": ("m", "bright_red"),
    "pipeline sends": ("s", "bright_blue"),
    "pipeline bubble": (".", "bright_black"),
    "optimizer": ("O", "bright_magenta"),
    "fixed": ("f", "white"),
}
_MEMORY_LETTERS: Mapping[str, str] = {
    "weights": "w",
    "gradients": "g",
    "optimizer_states": "O",
    "activations": "a",
    "working_set": "k",
    "logits": "l",
    "communication": "c",
    "framework": "f",
}
_MEMORY_COLOURS = ("green", "yellow", "magenta", "blue", "cyan", "bright_green", "bright_blue", "white")
_FREE = ("_", "bright_black")
_MOST_STAGES = 8
_WIDEST_BAR = 100


def shown_stages(num_stages: int, busiest: int) -> list[int]:
    """Return the stages to show: all, or of many some at even distances with first, busiest and last."""
    if num_stages <= _MOST_STAGES:
        return list(range(num_stages))
    step = (num_stages - 1) / (_MOST_STAGES - 2)
    return sorted({busiest, *(round(index * step) for index in range(_MOST_STAGES - 1))})


def terms_table(breakdown: Breakdown) -> Table:
    """Return the terms by stage, with the share of the busiest; those that are zero everywhere are left out."""
    stages = shown_stages(breakdown.num_stages, breakdown.busiest_stage)
    headers = [
        f"stage {stage} *"
        if stage == breakdown.busiest_stage and breakdown.num_stages > 1
        else f"stage {stage}"
        for stage in stages
    ]
    table = make_table(
        "Where the time goes" + (", * the busiest stage" if breakdown.num_stages > 1 else ""),
        (("", False), *((header, True) for header in headers), ("share", True)),
    )

    def seconds(value: float) -> str:
        # Terms of one table share their decimals, so that columns can be added by eye.
        return f"{value:.{decimals}f} s"

    decimals = max(0, 4 - len(f"{int(breakdown.iteration_time)}")) + 1
    grouped = [breakdown.grouped(stage) for stage in stages]
    critical = breakdown.grouped(breakdown.busiest_stage)
    for group, members in GROUPS.items():
        if not any(breakdown.terms[term].any() for term in members):
            continue
        share = critical[group] / breakdown.iteration_time
        table.add_row(group, *(seconds(each[group]) for each in grouped), f"{share:.1%}")
        for term in members if len(members) > 1 else ():
            values = breakdown.terms[term]
            if values.any():
                share = float(values[breakdown.busiest_stage]) / breakdown.iteration_time
                cells = (seconds(float(values[stage])) for stage in stages)
                table.add_row(f"  {term.replace('_', ' ')}", *cells, f"{share:.1%}", style="dim")
    table.add_section()
    table.add_row("iteration", *(seconds(breakdown.iteration_time) for _ in stages), "100.0%")
    return table


def stage_bars(breakdown: Breakdown, width: int) -> Text:
    """Return one stacked bar per shown stage and the legend of the letters in them."""
    stages = shown_stages(breakdown.num_stages, breakdown.busiest_stage)
    label = len(f"stage {stages[-1]}")
    columns = min(_WIDEST_BAR, max(20, width - label - 3))
    text = Text()
    used: set[str] = set()
    for stage in stages:
        text.append(f"{f'stage {stage}':>{label}} |")
        groups = breakdown.grouped(stage)
        used |= {name for name, seconds in groups.items() if seconds > 0.0}
        parts = [(*_TIME_MARKS[name], seconds) for name, seconds in groups.items()]
        _append_bar(text, parts, breakdown.iteration_time, columns)
        text.append("|\n")
    text.append(" " * (label + 2))
    for name in GROUPS:
        if name in used:
            letter, colour = _TIME_MARKS[name]
            text.append(f"{letter} {name}  ", style=colour)
    text.append("\n")
    return text


def memory_bar(prediction: Prediction, width: int) -> Text:
    """Return one stacked bar of the fullest rank's memory, what is free after it, and the legend."""
    uses = prediction.memory.row(prediction.fullest_stage)
    marks = {
        name: (_MEMORY_LETTERS.get(name, name[0]), colour)
        for name, colour in zip(uses, _MEMORY_COLOURS * len(uses), strict=False)
    }
    held = sum(uses.values())
    reserve = prediction.peak_memory_bytes - held
    total = max(prediction.usable_memory_bytes, prediction.peak_memory_bytes)
    columns = min(_WIDEST_BAR, max(20, width - 10))
    text = Text("  memory |")
    parts = [(*marks[name], num_bytes) for name, num_bytes in uses.items()]
    parts += [("x", "red", reserve), (*_FREE, total - held - reserve)]
    _append_bar(text, parts, total, columns)
    text.append("|")
    text.append(" the device ends before the bar does\n" if total > prediction.usable_memory_bytes else "\n")
    text.append(" " * 10)
    for name, (letter, colour) in marks.items():
        if uses[name] > 0.0:
            text.append(f"{letter} {name.replace('_', ' ')}  ", style=colour)
    if reserve > 0.0:
        text.append("x allocator reserve  ", style="red")
    text.append("_ free\n", style=_FREE[1])
    return text


def _append_bar(text: Text, parts: Sequence[tuple[str, str, float]], total: float, columns: int) -> None:
    """Append parts as runs of their letter; rounding is settled by the largest remainders, so the bar is full."""
    exact = [max(0.0, value) / total * columns if total > 0.0 else 0.0 for _, _, value in parts]
    counts = [int(value) for value in exact]
    missing = columns - sum(counts)
    by_remainder = sorted(range(len(parts)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: max(0, missing)]:
        counts[index] += 1
    for (letter, colour, _), count in zip(parts, counts, strict=True):
        text.append(letter * count, style=colour)


def difference_table(
    title: str,
    names: tuple[str, str],
    differences: Sequence[TermDifference],
    cells: Mapping[str, tuple[str, str, str]],
) -> Table:
    """Return a table of two columns and their change; terms that both lack are left out."""
    table = make_table(title, (("", False), (names[0], True), (names[1], True), ("change", True)))
    for each in differences:
        if each.first or each.second:
            table.add_row(each.name, *cells[each.name])
    return table


def second_cells(differences: Sequence[TermDifference]) -> dict[str, tuple[str, str, str]]:
    """Return the cells of times."""
    return {
        each.name: (
            _seconds(each.first),
            _seconds(each.second),
            _second_change(each),
        )
        for each in differences
    }


def byte_cells(differences: Sequence[TermDifference]) -> dict[str, tuple[str, str, str]]:
    """Return the cells of memory."""

    def shown(value: float | None) -> str:
        return "-" if value is None else format_quantity(value, "bytes", 4)

    cells = {}
    for each in differences:
        change = ""
        if each.change is not None:
            sign = "-" if each.change < 0.0 else "+" if each.change else ""
            change = f"{sign}{format_quantity(abs(each.change), 'bytes', 3)}"
        cells[each.name] = (shown(each.first), shown(each.second), change)
    return cells


def figure_cells(differences: Sequence[TermDifference]) -> dict[str, tuple[str, str, str]]:
    """Return the cells of throughput and cost; changes are relative."""

    def shown(each: TermDifference, value: float | None) -> str:
        if value is None:
            return "-"
        if each.name == "MFU":
            return f"{value:.1%}"
        return f"{value:.3g}" if each.name == "J/token" else f"{value:,.0f}"

    cells = {}
    for each in differences:
        change = ""
        if each.change is not None and each.first:
            change = format_change(each.change / each.first)
        cells[each.name] = (shown(each, each.first), shown(each, each.second), change)
    return cells


def _second_change(difference: TermDifference) -> str:
    change = difference.change
    if change is None:
        return ""
    # Sums of equal terms may differ in their last bits.
    is_noise = abs(change) < 1e-9 * max(abs(difference.first or 0.0), abs(difference.second or 0.0))
    return "0 s" if is_noise else f"{change:+.4g} s"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g} s"
