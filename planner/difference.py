"""What differs between two plans: their fields, their jobs, and their time, memory and cost term by term."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass

from meshwright.costmodels.prediction import Prediction
from meshwright.planner.explanation import Explanation
from meshwright.planner.plan_file import PlanDocument

__all__ = [
    "FieldDifference",
    "TermDifference",
    "field_differences",
    "figure_differences",
    "memory_differences",
    "section_differences",
    "speed_sentence",
    "term_differences",
]

# Where numbers come from and how things are printed says nothing about what they do.
_IGNORED = frozenset({"sources", "aliases"})
_PRINTED_NAMES = ("node.name", "node.gpu.name", "node.gpu.vendor", "fabric.name")
# A term that differs by less than this share of the iteration is not named in the sentence.
_SMALLEST_SHARE = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldDifference:
    """One field that two plan documents have different values of, or that one lacks (None)."""

    section: str
    key: str
    first: object
    second: object


@dataclass(frozen=True, slots=True, kw_only=True)
class TermDifference:
    """One figure of two plans; None where a plan has none."""

    name: str
    first: float | None
    second: float | None

    @property
    def change(self) -> float | None:
        """Second minus first."""
        if self.first is None or self.second is None:
            return None
        return self.second - self.first


def field_differences(first: PlanDocument, second: PlanDocument) -> tuple[FieldDifference, ...]:
    """Return the fields of plan, model, cluster, workload and software that differ, in that order."""
    found = list(
        section_differences(
            (
                ("plan", first.plan, second.plan),
                ("model", first.job.model, second.job.model),
                ("cluster", first.job.cluster, second.job.cluster),
                ("workload", first.job.workload, second.job.workload),
            )
        )
    )
    if first.job.software != second.job.software:
        found.append(
            FieldDifference(
                section="job", key="software", first=first.job.software, second=second.job.software
            )
        )
    return tuple(found)


def section_differences(sections: Iterable[tuple[str, object, object]]) -> tuple[FieldDifference, ...]:
    """Return the fields that differ of pairs of dataclasses or mappings, each pair with its name."""
    found = []
    for section, one, other in sections:
        mine, others = dict(_flat(one)), dict(_flat(other))
        for key in (*mine, *(key for key in others if key not in mine)):
            values = mine.get(key), others.get(key)
            if values[0] != values[1] and not (section.endswith("cluster") and key in _PRINTED_NAMES):
                found.append(FieldDifference(section=section, key=key, first=values[0], second=values[1]))
    return tuple(found)


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the plain fields of nested dataclasses and mappings, keys joined by dots."""
    if is_dataclass(value):
        parts = {each.name: getattr(value, each.name) for each in fields(value) if each.name not in _IGNORED}
    elif prefix == "routing_by_ep." and isinstance(value, tuple):
        parts = {str(each.ep): each for each in value}
    elif isinstance(value, Mapping):
        parts = {str(key): part for key, part in value.items()}
    else:
        yield prefix.removesuffix("."), value
        return
    for key, part in parts.items():
        yield from _flat(part, f"{prefix}{key}.")


def term_differences(first: Explanation, second: Explanation) -> tuple[TermDifference, ...]:
    """Return the time terms of the busiest stage of each, and the iteration time last [s]."""
    mine, others = (each.breakdown.grouped(each.breakdown.busiest_stage) for each in (first, second))
    terms = [TermDifference(name=name, first=mine[name], second=others[name]) for name in mine]
    total = TermDifference(
        name="iteration time",
        first=first.breakdown.iteration_time,
        second=second.breakdown.iteration_time,
    )
    return (*terms, total)


def memory_differences(first: Prediction, second: Prediction) -> tuple[TermDifference, ...]:
    """Return the memory of the fullest stage of each by use, and the peak and what is usable last [B]."""
    mine, others = (each.memory.row(each.fullest_stage) for each in (first, second))
    uses = [
        TermDifference(name=name.replace("_", " "), first=mine[name], second=others[name]) for name in mine
    ]
    return (
        *uses,
        TermDifference(name="peak", first=first.peak_memory_bytes, second=second.peak_memory_bytes),
        TermDifference(name="usable", first=first.usable_memory_bytes, second=second.usable_memory_bytes),
    )


def figure_differences(first: Explanation, second: Explanation) -> tuple[TermDifference, ...]:
    """Return GPUs, throughput, MFU and cost of each."""
    pairs = []
    for each in (first, second):
        prediction, plan = each.prediction, each.plan
        pairs.append(
            {
                "GPUs": float(plan.num_gpus),
                "tokens/s": prediction.tokens_per_second_per_gpu * plan.num_gpus,
                "tokens/s/GPU": prediction.tokens_per_second_per_gpu,
                "MFU": prediction.mfu,
                "$/T tokens": prediction.dollars_per_trillion_tokens,
                "J/token": prediction.joules_per_token,
            }
        )
    return tuple(TermDifference(name=name, first=pairs[0][name], second=pairs[1][name]) for name in pairs[0])


def speed_sentence(first: Explanation, second: Explanation, name: str = "the second plan") -> str:
    """Return one sentence: how much faster or slower the second plan is, and by which terms.

    Plans of different workloads are compared by their tokens per second, equal ones by their iterations.
    """
    mine, other = first.prediction, second.prediction
    if first.context.workload.num_tokens == second.context.workload.num_tokens:
        ratio = other.iteration_time / mine.iteration_time
        unit = "per iteration"
    else:
        ratio = (mine.tokens_per_second_per_gpu * first.plan.num_gpus) / (
            other.tokens_per_second_per_gpu * second.plan.num_gpus
        )
        unit = "per token"
    if abs(ratio - 1.0) < 0.0005:
        verdict = f"{name} takes as long {unit}"
    elif ratio > 1.0:
        verdict = f"{name} takes {ratio - 1.0:.1%} longer {unit}"
    else:
        verdict = f"{name} takes {1.0 - ratio:.1%} less time {unit}"
    threshold = _SMALLEST_SHARE * mine.iteration_time
    changes = [each for each in term_differences(first, second)[:-1] if abs(each.change or 0.0) > threshold]
    more = _listed([each for each in changes if (each.change or 0.0) > 0.0], "more")
    less = _listed([each for each in changes if (each.change or 0.0) < 0.0], "less")
    if not more and not less:
        return f"{verdict}; every term is within {_SMALLEST_SHARE:.1%}."
    return f"{verdict}: {', '.join(part for part in (more, less) if part)}."


def _listed(changes: list[TermDifference], word: str) -> str:
    ordered = sorted(changes, key=lambda each: -abs(each.change or 0.0))[:3]
    return " and ".join(f"{abs(each.change or 0.0):.2g} s {word} {each.name}" for each in ordered)
