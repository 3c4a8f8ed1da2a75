"""What one micro-batch costs: layers, embedding and head, with recompute and FSDP exposure."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layer import BoundaryTimes, LayerCases, LayerTimes, boundary_times, layer_times
from meshwright.costmodels.parallelism.data import fsdp_times
from meshwright.costmodels.parameters import rank_boundary_parameters, rank_layer_parameters
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns, Recomputes

__all__ = ["MicroBatchTimes", "micro_batch_times"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatchTimes:
    """One micro-batch: what one layer, the embedding and the head take; arrays of shape ``(num_plans,)`` [s].

    ``*_communication`` is the exposed communication contained in the figure of the same name.
    """

    layer_forward: FloatColumn
    layer_backward: FloatColumn
    layer_weight_gradient: FloatColumn
    layer_forward_communication: FloatColumn
    layer_backward_communication: FloatColumn
    embedding_forward: FloatColumn
    embedding_backward: FloatColumn
    head_forward: FloatColumn
    head_backward: FloatColumn
    head_weight_gradient: FloatColumn
    embedding_communication: FloatColumn
    head_communication: FloatColumn
    root_backward_communication: FloatColumn

    @property
    def boundary_forward(self) -> FloatColumn:
        """Embedding and head together, forward [s]."""
        return self.embedding_forward + self.head_forward

    @property
    def boundary_backward(self) -> FloatColumn:
        """Embedding and head together, backward [s]."""
        return self.embedding_backward + self.head_backward


def micro_batch_times(context: CostContext, columns: PlanColumns) -> MicroBatchTimes:
    """Return the times of one micro-batch, recompute and FSDP exposure included."""
    layer, boundary = _gathered_times(context, columns)
    is_full = columns.recompute == Recomputes.FULL
    is_selective = columns.recompute == Recomputes.SELECTIVE
    recompute = np.where(is_selective, layer.selective_recompute, np.where(is_full, layer.forward, 0.0))
    recompute_communication = np.where(
        is_selective, layer.selective_communication, np.where(is_full, layer.forward_communication, 0.0)
    )
    forward = layer.forward + layer.forward_communication
    backward = layer.backward + recompute + layer.backward_communication + recompute_communication
    fsdp = fsdp_times(context, columns, rank_layer_parameters, forward, backward)
    # The root unit (embedding and head): its gather precedes all compute, its reduction follows it.
    nothing = np.zeros(len(columns))
    root = fsdp_times(context, columns, rank_boundary_parameters, nothing, nothing)
    embedding_forward = boundary.embedding_forward + boundary.embedding_communication + root.forward
    return MicroBatchTimes(
        layer_forward=forward + fsdp.forward,
        layer_backward=backward + fsdp.backward,
        layer_weight_gradient=layer.weight_gradient,
        layer_forward_communication=layer.forward_communication + fsdp.forward,
        layer_backward_communication=layer.backward_communication + recompute_communication + fsdp.backward,
        embedding_forward=embedding_forward,
        embedding_backward=boundary.embedding_backward + root.backward,
        head_forward=boundary.head_forward,
        head_backward=boundary.head_backward + boundary.head_communication,
        head_weight_gradient=boundary.head_weight_gradient,
        embedding_communication=boundary.embedding_communication + root.forward,
        head_communication=boundary.head_communication,
        root_backward_communication=root.backward,
    )


def _gathered_times(context: CostContext, columns: PlanColumns) -> tuple[LayerTimes, BoundaryTimes]:
    """Cost the distinct (tp, cp, micro-batch, SP) cases once and hand every plan its case."""
    rows, inverse = columns.distinct("tp", "cp", "micro_batch_size", "sequence_parallel")
    cases = LayerCases(
        tp=rows.tp.astype(np.float64),
        cp=rows.cp.astype(np.float64),
        micro_batch_size=rows.micro_batch_size.astype(np.float64),
        sequence_parallel=rows.sequence_parallel,
    )
    layer, boundary = layer_times(context, cases), boundary_times(context, cases)
    return (
        LayerTimes(**{f.name: getattr(layer, f.name)[inverse] for f in fields(layer)}),
        BoundaryTimes(**{f.name: getattr(boundary, f.name)[inverse] for f in fields(boundary)}),
    )
