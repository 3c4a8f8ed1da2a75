"""What ``whatif`` shows of plans of any kind: before and after a change, and the table of sensitivities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from rich.console import Console

from meshwright.cli.render.console import make_table, print_json, stdout_console
from meshwright.planner.changes import Change, ChangeValue
from meshwright.planner.scenario import Scenario
from meshwright.planner.sensitivity import Effect, Sensitivities
from meshwright.planner.whatif import AnyOutcome, figure_change
from meshwright.units import format_change

__all__ = [
    "Answers",
    "WhatifView",
    "print_keys",
    "print_sensitivities",
    "print_whatif",
    "sensitivities_mapping",
    "whatif_mapping",
]

_BAR = 24
_OutcomeT = TypeVar("_OutcomeT", bound=AnyOutcome)
_ShownT_contra = TypeVar("_ShownT_contra", bound=AnyOutcome, contravariant=True)
Answers = tuple[_OutcomeT, _OutcomeT]
"""The given plan and the best plan of one scenario."""


class WhatifView(Protocol[_ShownT_contra]):
    """What plans of one kind show."""

    @property
    def kind(self) -> str:
        """First word of the kinds of JSON."""
        ...

    @property
    def figure_name(self) -> str:
        """What the sensitivities compare."""
        ...

    @property
    def columns(self) -> tuple[tuple[str, bool], ...]:
        """Columns of a plan's figures beside its name and the change; whether each is numeric."""
        ...

    def cells(self, outcome: _ShownT_contra) -> tuple[str, ...]:
        """Return the figures of a plan that runs, as many as there are columns."""
        ...

    def figure_text(self, figure: float) -> str:
        """Return the compared figure with its unit."""
        ...

    def short_plan(self, outcome: _ShownT_contra) -> str:
        """Return a plan as a cell."""
        ...

    def plan_phrase(self, outcome: _ShownT_contra) -> str:
        """Return a plan in words."""
        ...

    def mapping(self, outcome: _ShownT_contra) -> dict[str, object]:
        """Return an outcome as plain data."""
        ...

    def more(self, now: _ShownT_contra, then: _ShownT_contra) -> Mapping[str, object]:
        """Return what else JSON says of a change, by the given plan before and after."""
        ...

    def print_reasons(
        self, console: Console, now: Answers[_ShownT_contra], then: Answers[_ShownT_contra]
    ) -> None:
        """Print why the plans differ."""
        ...


def print_keys(scenario: Scenario[Any], known: Mapping[str, Change], *, as_json: bool) -> None:
    """Print every key that can be changed with its present value."""
    values = [(change, change.read(scenario)) for change in known.values()]
    if as_json:
        keys = [
            {"key": change.key, "meaning": change.meaning, "kind": change.kind, "value": value}
            for change, value in values
        ]
        print_json({"kind": "whatif_keys", "keys": keys})
        return
    table = make_table("Keys of --set", (("key", False), ("now", True), ("meaning", False)))
    for change, value in values:
        table.add_row(change.key, change.format(value), change.meaning)
    stdout_console().print(table)


def whatif_mapping(
    view: WhatifView[_OutcomeT],
    changes: Sequence[tuple[Change, ChangeValue]],
    today: Scenario[Any],
    now: Answers[_OutcomeT],
    then: Answers[_OutcomeT],
) -> dict[str, object]:
    """Return the answer as plain data."""
    return {
        "kind": f"{view.kind}_whatif",
        "model": today.job.model.name,
        "cluster": today.job.cluster.id,
        "changes": [
            {"key": change.key, "before": change.read(today), "after": value} for change, value in changes
        ],
        "today": {"this_plan": view.mapping(now[0]), "best_plan": view.mapping(now[1])},
        "changed": {"this_plan": view.mapping(then[0]), "best_plan": view.mapping(then[1])},
        **view.more(now[0], then[0]),
    }


def print_whatif(
    view: WhatifView[_OutcomeT],
    changes: Sequence[tuple[Change, ChangeValue]],
    today: Scenario[Any],
    now: Answers[_OutcomeT],
    then: Answers[_OutcomeT],
) -> None:
    """Print what changes, the given and the best plan before and after, and why they differ."""
    console = stdout_console()
    asked = ", ".join(
        f"{change.key} {change.format(change.read(today))} -> {change.format(value)}"
        for change, value in changes
    )
    console.print(f"{today.job.model.name}: what if {asked}?", style="bold", soft_wrap=True)
    columns = (("", False), ("plan", False), (view.columns[0]), ("change", True), *view.columns[1:])
    table = make_table("Before and after", columns)
    table.columns[1].no_wrap = False
    for name, outcome in (
        ("this plan, today", now[0]),
        ("best plan, today", now[1]),
        ("this plan, changed", then[0]),
        ("best plan, changed", then[1]),
    ):
        table.add_row(name, *_outcome_cells(view, outcome, now[0]))
    console.print(table)
    for name, outcome in (("This plan", then[0]), ("Best plan", then[1])):
        if outcome.violation is not None:
            console.print(f"{name} cannot run, {outcome.violation.text}.", soft_wrap=True)
        if outcome.advice:
            console.print(f"No plan fits the change; {_nearest(outcome.advice)}.", soft_wrap=True)
    if now[0].violation is not None:
        console.print(f"Today this plan cannot run, {now[0].violation.text}.", soft_wrap=True)
    view.print_reasons(console, now, then)


def _nearest(advice: str) -> str:
    return advice if advice.startswith(("nearest: ", "closest: ")) else f"nearest: {advice}"


def _outcome_cells(view: WhatifView[_OutcomeT], outcome: _OutcomeT, reference: _OutcomeT) -> tuple[str, ...]:
    if outcome.plan is None:
        reason = f"cannot run: {outcome.violation.constraint}" if outcome.violation else "nothing fits"
        return (reason, *("-" for _ in view.columns), "-")
    change = figure_change(reference, outcome)
    first, *rest = view.cells(outcome)
    shown = "" if change is None or outcome is reference else format_change(change)
    return (view.short_plan(outcome), first, shown, *rest)


def sensitivities_mapping(
    view: WhatifView[_OutcomeT], today: Scenario[Any], result: Sensitivities[_OutcomeT]
) -> dict[str, object]:
    """Return the sensitivities as plain data."""
    return {
        "kind": f"{view.kind}_sensitivities",
        "model": today.job.model.name,
        "cluster": today.job.cluster.id,
        "factor": result.factor,
        "this_plan": view.mapping(result.today),
        "best_plan": view.mapping(result.best_today),
        "effects": [
            {
                "property": effect.lever.name,
                "keys": list(effect.lever.keys),
                "value": effect.value,
                "change_divided": figure_change(result.today, effect.low),
                "change_multiplied": figure_change(result.today, effect.high),
                "violation_divided": _violation(effect.low),
                "violation_multiplied": _violation(effect.high),
                "best_plan_divided": effect.best_low and view.mapping(effect.best_low),
                "best_plan_multiplied": effect.best_high and view.mapping(effect.best_high),
            }
            for effect in result.effects
        ],
    }


def _violation(outcome: AnyOutcome) -> str | None:
    return None if outcome.violation is None else outcome.violation.text


def print_sensitivities(
    view: WhatifView[_OutcomeT],
    headline: str,
    result: Sensitivities[_OutcomeT],
    *,
    replan: bool,
) -> None:
    """Print the table of sensitivities of the given plan, largest effect first, and what the winner does."""
    console = stdout_console()
    factor = f"{result.factor:g}"
    console.print(headline, style="bold", soft_wrap=True)
    if result.today.figure is None:
        assert result.today.violation is not None
        console.print(f"This plan cannot run today, {result.today.violation.text}.", soft_wrap=True)
    else:
        figure = view.figure_text(result.today.figure)
        console.print(f"{figure} today; change of this plan's {view.figure_name} with", soft_wrap=True)
    table = make_table(
        "Sensitivities",
        (("property", False), ("now", True), (f"/ {factor}", True), (f"x {factor}", True), ("", False)),
    )
    widest = max((effect.largest for effect in result.effects), default=0.0)
    for effect in result.effects:
        bar = "#" * round(_BAR * effect.largest / widest) if widest > 0.0 else ""
        cells = (_change_cell(result.today, each) for each in (effect.low, effect.high))
        table.add_row(effect.lever.name, effect.value, *cells, bar)
    console.print(table)
    for effect in result.effects:
        _print_effect(console, view, effect, result)
    if not replan:
        console.print(
            "The best plan was searched for GPU memory only; --replan does it for all.", style="dim"
        )


def _print_effect(
    console: Console,
    view: WhatifView[_OutcomeT],
    effect: Effect[_OutcomeT],
    result: Sensitivities[_OutcomeT],
) -> None:
    """Print what stops the given plan where a lever is moved, and the best plan there."""
    for word, given, best in (
        (f"divided by {result.factor:g}", effect.low, effect.best_low),
        (f"times {result.factor:g}", effect.high, effect.best_high),
    ):
        where = f"{effect.lever.name} {word}"
        if given.violation is not None:
            console.print(f"{where}: this plan cannot run, {given.violation.text}.", soft_wrap=True)
        if best is not None:
            console.print(f"{where}: {_winner(view, result.best_today, best)}", soft_wrap=True)


def _change_cell(today: AnyOutcome, outcome: AnyOutcome) -> str:
    if outcome.violation is not None:
        return outcome.violation.constraint
    change = figure_change(today, outcome)
    return "-" if change is None else format_change(change)


def _winner(view: WhatifView[_OutcomeT], before: _OutcomeT, after: _OutcomeT) -> str:
    """Return whether the best plan changes, and what it gains."""
    if after.plan is None:
        return f"no plan fits; {_nearest(after.advice)}."
    change = figure_change(before, after)
    gain = "" if change is None else f" ({format_change(change)})"
    verb = "stays" if before.plan == after.plan else "becomes"
    return f"the best plan {verb} {view.plan_phrase(after)}{gain}."
