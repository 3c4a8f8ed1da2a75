"""Distinct layer shapes of a plan space: what the time and the activations of one layer depend on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.plan_columns import FloatColumn, IntColumn, PlanColumns
from meshwright.simcore.domain.model import ModelSpec

__all__ = ["CASE_FIELDS", "LayerCases", "cases_of"]

CASE_FIELDS = (
    "tp",
    "cp",
    "cp_method",
    "ep",
    "etp",
    "expert_overlap",
    "micro_batch_size",
    "sequence_parallel",
)
"""Columns that decide what one layer costs; nothing else of a plan does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCases:
    """Distinct layer shapes; arrays of shape ``(num_cases,)``.

    Degrees are floats because everything is divided by them; ``cp_method`` is a column code.
    """

    tp: FloatColumn
    cp: FloatColumn
    cp_method: IntColumn
    ep: FloatColumn
    etp: FloatColumn
    expert_overlap: FloatColumn
    micro_batch_size: FloatColumn
    sequence_parallel: NDArray[np.bool_]

    def num_tokens(self, sequence_length: int) -> FloatColumn:
        """Tokens of one micro-batch on one rank, before the split of sequence parallelism."""
        return self.micro_batch_size * sequence_length / self.cp

    def held_query_groups(self, model: ModelSpec) -> FloatColumn:
        """Key/value heads of one rank: with fewer than ranks each keeps a copy of one (Megatron's replication)."""
        return np.maximum(model.num_query_groups / self.tp, 1.0)


def cases_of(rows: PlanColumns) -> LayerCases:
    """Return the layer shapes of some plans, one each."""

    def number(name: str) -> FloatColumn:
        values: FloatColumn = getattr(rows, name).astype(np.float64)
        return values

    return LayerCases(
        tp=number("tp"),
        cp=number("cp"),
        cp_method=rows.cp_method,
        ep=number("ep"),
        etp=number("etp"),
        expert_overlap=number("expert_overlap"),
        micro_batch_size=number("micro_batch_size"),
        sequence_parallel=rows.sequence_parallel,
    )
