"""What ``whatif`` shows of training plans."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from meshwright.cli.render.explanation import interval_sentence, outcome_mapping, plan_phrase
from meshwright.cli.render.whatif import Answers
from meshwright.planner.difference import speed_sentence
from meshwright.planner.reasons import degrees_text
from meshwright.planner.whatif import Outcome
from meshwright.units import format_quantity

__all__ = ["TrainingView"]


class TrainingView:
    """Iteration times, compared term by term."""

    kind = "training"
    figure_name = "iteration time"
    columns = (
        ("iteration", True),
        ("tok/s/GPU", True),
        ("MFU", True),
        ("memory", True),
        ("$/T tokens", True),
    )

    def cells(self, outcome: Outcome) -> tuple[str, ...]:
        """Return time, throughput, memory and cost."""
        assert outcome.explanation is not None
        prediction = outcome.explanation.prediction
        dollars = prediction.dollars_per_trillion_tokens
        return (
            f"{prediction.iteration_time:.4g} s",
            f"{prediction.tokens_per_second_per_gpu:,.0f}",
            f"{prediction.mfu:.1%}",
            format_quantity(prediction.peak_memory_bytes, "bytes", 3),
            "-" if dollars is None else f"{dollars:,.0f}",
        )

    def figure_text(self, figure: float) -> str:
        """Return an iteration time."""
        return f"{figure:.4g} s per iteration"

    def short_plan(self, outcome: Outcome) -> str:
        """Return the degrees."""
        assert outcome.plan is not None
        return degrees_text(outcome.plan)

    def plan_phrase(self, outcome: Outcome) -> str:
        """Return the plan in words."""
        assert outcome.plan is not None
        return plan_phrase(outcome.plan)

    def mapping(self, outcome: Outcome) -> dict[str, object]:
        """Return prediction, terms and plan."""
        mapping = outcome_mapping(outcome)
        if outcome.plan is not None:
            mapping["plan"] = {name: getattr(outcome.plan, name) for name in outcome.plan.__slots__}
        return mapping

    def more(self, now: Outcome, then: Outcome) -> Mapping[str, object]:
        """Return nothing."""
        return {}

    def print_reasons(self, console: Console, now: Answers[Outcome], then: Answers[Outcome]) -> None:
        """Print which terms of the iteration change."""
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
