"""Export targets as constraints of a search: which engines they serve, and which units they refuse and why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from meshwright.errors import SpecError, did_you_mean
from meshwright.simcore.domain.serving import EngineName

if TYPE_CHECKING:
    from meshwright.planner.serving.job_file import ServingRequest
    from meshwright.planner.serving.ranking import UnitColumns
    from meshwright.planner.serving.space import CandidateSpace

__all__ = ["check_target", "engines_of_target", "target_sentence", "without_refused"]

_ENGINE_OF_TARGET: Mapping[str, EngineName] = {"vllm": "vllm", "sglang": "sglang", "tensorrt-llm": "trtllm"}
# Different reasons that are spelt out.
_MAX_REASONS = 3


def check_target(target: str) -> None:
    """Raise when no exporter of serving plans has this name.

    Raises
    ------
    SpecError
        Names the nearest one.
    """
    # Loaded only where a target is asked for: the exporters' tables take a quarter of a second.
    from meshwright.planner.export import EXPORTERS, SERVING_EXPORTERS

    if target in SERVING_EXPORTERS:
        return
    known = f"known for serving: {', '.join(sorted(SERVING_EXPORTERS))}"
    if target in EXPORTERS:
        raise SpecError(f"target: '{target}' runs training plans; {known}")
    raise SpecError(
        f"target: unknown value '{target}'{did_you_mean(target, SERVING_EXPORTERS) or ';'} {known}"
    )


def engines_of_target(target: str, engines: tuple[EngineName, ...]) -> tuple[EngineName, ...]:
    """Return the engines of a choice that a target serves; orchestrators serve them all.

    Raises
    ------
    SpecError
        If it serves none of them.
    """
    only = _ENGINE_OF_TARGET.get(target)
    if only is None:
        return engines
    if only not in engines:
        raise SpecError(
            f"target: {target} serves engine {only}, not {' or '.join(engines)}; drop one of them"
        )
    return (only,)


def without_refused(units: UnitColumns, request: ServingRequest, space: CandidateSpace) -> UnitColumns:
    """Return the units that the request's target can express, with the count of each reason that refused one.

    Reasons that differ in numbers only are counted together, under the first of them.
    """
    from meshwright.planner.export import SERVING_EXPORTERS
    from meshwright.planner.serving.ranking import unit_of_row

    target = request.limits.target
    if target is None:
        return units
    exporter = SERVING_EXPORTERS[target]
    kept = np.ones(len(units), dtype=np.bool_)
    counts: dict[str, tuple[str, int]] = {}
    for row in units.rows():
        plan = unit_of_row(request, space, units, row).plan
        reasons = exporter.unsupported(request.job, plan)
        if reasons:
            kept[row] = False
            pattern = re.sub(r"\d+", "#", reasons[0])
            text, count = counts.get(pattern, (reasons[0], 0))
            counts[pattern] = text, count + 1
    by_count = sorted(counts.values(), key=lambda pair: -pair[1])
    return units.kept(kept, dict(by_count))


def target_sentence(target: str, refused: Mapping[str, int]) -> str:
    """Return what the constraint demands, and what it refused most often."""
    reasons = "; ".join(
        f"{count:,} x {text.rstrip('.')}" for text, count in list(refused.items())[:_MAX_REASONS]
    )
    more = len(refused) - _MAX_REASONS
    return f"{target} can express it: {reasons}" + (f"; and {more} reasons more" if more > 0 else "")
