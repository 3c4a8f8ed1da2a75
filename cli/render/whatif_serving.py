"""What ``whatif`` shows of serving plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rich.console import Console

from meshwright.cli.render.serving_difference import latency_table, serving_difference_mapping
from meshwright.cli.render.serving_plan_table import load_text, plan_text, short_plan_text, time_text
from meshwright.cli.render.whatif import Answers
from meshwright.planner.serving.comparison import serving_sentence
from meshwright.planner.serving.plan_file import serving_plan_mapping
from meshwright.planner.serving.whatif import ServingOutcome
from meshwright.planner.whatif import figure_change
from meshwright.units import format_change

__all__ = ["ServingView"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingView:
    """Highest loads that keep the limits, and what they cost.

    Parameters
    ----------
    is_closed_loop : bool
        Loads count clients.
    """

    is_closed_loop: bool

    @property
    def kind(self) -> str:
        """First word of the kinds of JSON."""
        return "serving"

    @property
    def figure_name(self) -> str:
        """What the sensitivities compare."""
        return "tokens/s/GPU within the limits"

    @property
    def columns(self) -> tuple[tuple[str, bool], ...]:
        """Throughput, load, GPUs, latencies and cost."""
        return (
            ("tok/s\n/GPU", True),
            ("clients" if self.is_closed_loop else "req/s", True),
            ("GPUs", True),
            ("TTFT\np99", True),
            ("TPOT\np99", True),
            ("$/M\ntok", True),
        )

    def cells(self, outcome: ServingOutcome) -> tuple[str, ...]:
        """Return throughput, load, GPUs, latencies and cost."""
        figures = outcome.figures
        dollars = figures.get("dollars_per_million_output_tokens")
        return (
            f"{outcome.figure:,.0f}",
            load_text(figures["load"]),
            str(figures["num_gpus"]),
            time_text(figures, "ttft"),
            time_text(figures, "tpot"),
            "-" if dollars is None else f"{dollars:.3g}",
        )

    def figure_text(self, figure: float) -> str:
        """Return a throughput."""
        return f"{figure:,.0f} output tokens/s/GPU within the limits"

    def short_plan(self, outcome: ServingOutcome) -> str:
        """Return the pools."""
        assert outcome.plan is not None
        return short_plan_text(outcome.plan)

    def plan_phrase(self, outcome: ServingOutcome) -> str:
        """Return the plan in words."""
        assert outcome.plan is not None
        return plan_text(outcome.plan)

    def mapping(self, outcome: ServingOutcome) -> dict[str, object]:
        """Return prediction and plan, or the constraint in its way."""
        if outcome.plan is None:
            violation = outcome.violation
            return {
                "prediction": None,
                "violation": None if violation is None else asdict(violation),
                "advice": outcome.advice or None,
            }
        return {
            "prediction": dict(outcome.figures),
            "violation": None,
            "advice": None,
            "plan": serving_plan_mapping(outcome.plan),
        }

    def more(self, now: ServingOutcome, then: ServingOutcome) -> Mapping[str, object]:
        """Return the given plan on the load of its job, before and after."""
        if now.run is None or then.run is None:
            return {"at_stated_load": None}
        return {"at_stated_load": serving_difference_mapping(("now", "then"), now.run, then.run)}

    def print_reasons(
        self, console: Console, now: Answers[ServingOutcome], then: Answers[ServingOutcome]
    ) -> None:
        """Print how the loads change, and what the change means for the stated load."""
        change = figure_change(now[0], then[0])
        if change is not None:
            stops = [" ".join(each[0].binding) for each in (now, then)]
            moved = f"stopped by {stops[1]}" + (f" instead of {stops[0]}" if stops[0] != stops[1] else "")
            console.print(f"Why: with the change this plan carries {_more(change)}, {moved}.", soft_wrap=True)
        if then[1].plan is not None:
            if then[0].plan == then[1].plan:
                console.print("Planning again finds the same plan.")
            else:
                gain = figure_change(then[0], then[1])
                more = "" if gain is None else f" carries {_more(gain)} per GPU than this one"
                console.print(f"Best plan then: {plan_text(then[1].plan)}{more}.", soft_wrap=True)
        before, after = now[0].run, then[0].run
        if before is not None and after is not None:
            console.print()
            console.print(latency_table("This plan on the stated load", ("now", "then"), before, after))
            console.print(f"There {serving_sentence(before, after)}", soft_wrap=True)
        console.print("Loads are found to 0.5 %; smaller changes mean nothing.", style="dim")


def _more(change: float) -> str:
    """Return a change of what is carried in words."""
    text = format_change(change)
    return "no more" if text == "0.0%" else f"{text[1:]} {'more' if change > 0.0 else 'less'}"
