"""What ``whatif`` shows: plans before and after a change, and the table of sensitivities."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from meshwright.cli.render.console import make_table, print_json, stdout_console
from meshwright.cli.render.explanation import interval_sentence, outcome_mapping, plan_phrase
from meshwright.planner.changes import CHANGES, Change, ChangeValue
from meshwright.planner.difference import speed_sentence
from meshwright.planner.plan_file import PlanDocument
from meshwright.planner.reasons import degrees_text
from meshwright.planner.scenario import Scenario
from meshwright.planner.sensitivity import Sensitivities, time_change
from meshwright.planner.whatif import Outcome
from meshwright.units import format_quantity

__all__ = [
    "print_keys",
    "print_sensitivities",
    "print_whatif",
    "sensitivities_mapping",
    "whatif_mapping",
]

_BAR = 24


def print_keys(scenario: Scenario, *, as_json: bool) -> None:
    """Print every key that can be changed with its present value."""
    values = [(change, change.read(scenario)) for change in CHANGES.values()]
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
    document: PlanDocument,
    changes: Sequence[tuple[Change, ChangeValue]],
    today: Scenario,
    now: tuple[Outcome, Outcome],
    then: tuple[Outcome, Outcome],
) -> dict[str, object]:
    """Return the answer as plain data."""
    return {
        "kind": "training_whatif",
        "model": document.job.model.name,
        "cluster": document.job.cluster.id,
        "changes": [
            {"key": change.key, "before": change.read(today), "after": value} for change, value in changes
        ],
        "today": {"this_plan": _with_plan(now[0]), "best_plan": _with_plan(now[1])},
        "changed": {"this_plan": _with_plan(then[0]), "best_plan": _with_plan(then[1])},
    }


def _with_plan(outcome: Outcome) -> dict[str, object]:
    mapping = outcome_mapping(outcome)
    if outcome.explanation is not None:
        plan = outcome.explanation.plan
        mapping["plan"] = {name: getattr(plan, name) for name in plan.__slots__}
    return mapping


def print_whatif(
    document: PlanDocument,
    changes: Sequence[tuple[Change, ChangeValue]],
    today: Scenario,
    now: tuple[Outcome, Outcome],
    then: tuple[Outcome, Outcome],
) -> None:
    """Print what changes, the given and the best plan before and after, and why they differ."""
    console = stdout_console()
    asked = ", ".join(
        f"{change.key} {change.format(change.read(today))} -> {change.format(value)}"
        for change, value in changes
    )
    console.print(f"{document.job.model.name}: what if {asked}?", style="bold", soft_wrap=True)
    columns = (
        ("", False),
        ("plan", False),
        ("iteration", True),
        ("change", True),
        ("tok/s/GPU", True),
        ("MFU", True),
        ("memory", True),
        ("$/T tokens", True),
    )
    table = make_table("Before and after", columns)
    for name, outcome in (
        ("this plan, today", now[0]),
        ("best plan, today", now[1]),
        ("this plan, changed", then[0]),
        ("best plan, changed", then[1]),
    ):
        table.add_row(name, *_outcome_cells(outcome, now[0]))
    console.print(table)
    for name, outcome in (("This plan", then[0]), ("Best plan", then[1])):
        if outcome.violation is not None:
            console.print(f"{name} cannot run, {outcome.violation.text}.", soft_wrap=True)
        if outcome.advice:
            console.print(f"No plan fits the change; nearest: {outcome.advice}.", soft_wrap=True)
    if now[0].violation is not None:
        console.print(f"Today this plan cannot run, {now[0].violation.text}.", soft_wrap=True)
    _print_reasons(console, now, then)


def _print_reasons(console: Console, now: tuple[Outcome, Outcome], then: tuple[Outcome, Outcome]) -> None:
    same_now, same_then = now[0].explanation, then[0].explanation
    best_then = then[1].explanation
    if same_now is not None and same_then is not None:
        text = speed_sentence(same_now, same_then, "with the change this plan")
        console.print(f"Why: {text}", soft_wrap=True)
    if best_then is None:
        return
    if same_then is not None and same_then.plan == best_then.plan:
        console.print("Planning again finds the same plan.")
    else:
        console.print(f"Best plan then: {plan_phrase(best_then.plan)}.", soft_wrap=True)
        if same_then is not None:
            text = speed_sentence(same_then, best_then, "planned again it")
            console.print(f"Why: {text}", soft_wrap=True)
    console.print(interval_sentence(best_then.prediction), soft_wrap=True)


def _outcome_cells(outcome: Outcome, reference: Outcome) -> tuple[str, ...]:
    if outcome.explanation is None:
        reason = f"cannot run: {outcome.violation.constraint}" if outcome.violation else "nothing fits"
        return (reason, "-", "-", "-", "-", "-", "-")
    prediction = outcome.explanation.prediction
    change = time_change(reference, outcome)
    dollars = prediction.dollars_per_trillion_tokens
    return (
        degrees_text(outcome.explanation.plan),
        f"{prediction.iteration_time:.4g} s",
        "" if change is None or outcome is reference else _percent(change),
        f"{prediction.tokens_per_second_per_gpu:,.0f}",
        f"{prediction.mfu:.1%}",
        format_quantity(prediction.peak_memory_bytes, "bytes", 3),
        "-" if dollars is None else f"{dollars:,.0f}",
    )


def sensitivities_mapping(document: PlanDocument, result: Sensitivities) -> dict[str, object]:
    """Return the sensitivities as plain data."""
    return {
        "kind": "training_sensitivities",
        "model": document.job.model.name,
        "cluster": document.job.cluster.id,
        "factor": result.factor,
        "this_plan": _with_plan(result.today),
        "best_plan": _with_plan(result.best_today),
        "effects": [
            {
                "property": effect.lever.name,
                "keys": list(effect.lever.keys),
                "value": effect.value,
                "change_divided": time_change(result.today, effect.low),
                "change_multiplied": time_change(result.today, effect.high),
                "violation_divided": _violation(effect.low),
                "violation_multiplied": _violation(effect.high),
                "best_plan_divided": effect.best_low and _with_plan(effect.best_low),
                "best_plan_multiplied": effect.best_high and _with_plan(effect.best_high),
            }
            for effect in result.effects
        ],
    }


def _violation(outcome: Outcome) -> str | None:
    return None if outcome.violation is None else outcome.violation.text


def print_sensitivities(document: PlanDocument, result: Sensitivities, *, replan: bool) -> None:
    """Print the table of sensitivities of the given plan, largest effect first, and what the winner does."""
    console = stdout_console()
    factor = f"{result.factor:g}"
    console.print(
        f"{document.job.model.name} on {document.plan.num_gpus} x {document.job.cluster.gpu.id}: "
        f"{plan_phrase(document.plan)}",
        style="bold",
        soft_wrap=True,
    )
    if result.today.explanation is None:
        assert result.today.violation is not None
        console.print(f"This plan cannot run today, {result.today.violation.text}.", soft_wrap=True)
    else:
        seconds = result.today.explanation.prediction.iteration_time
        console.print(f"{seconds:.4g} s per iteration today; change of this plan's iteration time with")
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
        for word, given, best in (
            (f"divided by {factor}", effect.low, effect.best_low),
            (f"times {factor}", effect.high, effect.best_high),
        ):
            if given.violation is not None:
                console.print(
                    f"{effect.lever.name} {word}: this plan cannot run, {given.violation.text}.",
                    soft_wrap=True,
                )
            if best is not None:
                console.print(
                    f"{effect.lever.name} {word}: {_winner(result.best_today, best)}", soft_wrap=True
                )
    if not replan:
        console.print(
            "The best plan was searched for GPU memory only; --replan does it for all.", style="dim"
        )


def _change_cell(today: Outcome, outcome: Outcome) -> str:
    if outcome.violation is not None:
        return outcome.violation.constraint
    change = time_change(today, outcome)
    return "-" if change is None else _percent(change)


def _percent(change: float) -> str:
    """Return a signed share; noise has no sign."""
    return "0.0%" if abs(change) < 0.0005 else f"{change:+.1%}"


def _winner(before: Outcome, after: Outcome) -> str:
    """Return whether the best plan changes, and what it gains."""
    if after.explanation is None:
        return f"no plan fits; nearest: {after.advice}."
    change = time_change(before, after)
    gain = "" if change is None else f" ({_percent(change)})"
    phrase = plan_phrase(after.explanation.plan)
    if before.explanation is not None and before.explanation.plan == after.explanation.plan:
        return f"the best plan stays {phrase}{gain}."
    return f"the best plan becomes {phrase}{gain}."
