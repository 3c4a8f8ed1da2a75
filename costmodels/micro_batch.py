"""What one micro-batch costs: layers, embedding and head, with recompute and FSDP exposure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.activations import WITHIN_MOE
from meshwright.costmodels.layers.boundary import BoundaryTimes, boundary_times
from meshwright.costmodels.layers.cases import CASE_FIELDS, LayerCases, cases_of
from meshwright.costmodels.layers.layer import LayerTimes, layer_times
from meshwright.costmodels.layers.projections import product_times
from meshwright.costmodels.memory import layer_activations
from meshwright.costmodels.parallelism.data import fsdp_times, shard_ranks
from meshwright.costmodels.parallelism.offload import activation_offload_time, parameter_offload_time
from meshwright.costmodels.parameters import RankParameters, boundary_parameters, layer_parameters
from meshwright.costmodels.plan_columns import ALL_LAYERS, FloatColumn, Offloads, PlanColumns, Recomputes
from meshwright.simcore.domain.plan import RECOMPUTE_MODULES

__all__ = ["LayerCost", "MicroBatchTimes", "layers_backward", "layers_forward", "micro_batch_times"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerCost:
    """One layer and one micro-batch of each plan; arrays of shape ``(num_plans,)`` [s].

    Parameters
    ----------
    forward, backward : FloatColumn
        Everything, exposed communication included; ``backward`` without recompute.
    recompute : FloatColumn
        What recomputing this layer adds to its backward, with the communication it repeats; plans that recompute
        only some layers pay it for those.
    weight_gradient : FloatColumn
        The part of ``backward`` that only makes weight gradients.
    recompute_axes : Mapping[str, FloatColumn]
        Exposed communication in ``recompute`` by axis: tp, cp, ep.
    forward_axes, backward_axes : Mapping[str, FloatColumn]
        Exposed communication in ``forward`` and ``backward`` by axis: tp, cp, ep, dp.
    """

    forward: FloatColumn
    backward: FloatColumn
    recompute: FloatColumn
    weight_gradient: FloatColumn
    recompute_axes: Mapping[str, FloatColumn]
    forward_axes: Mapping[str, FloatColumn]
    backward_axes: Mapping[str, FloatColumn]

    @property
    def forward_communication(self) -> FloatColumn:
        """Exposed communication of all axes in ``forward`` [s]."""
        return sum(self.forward_axes.values(), np.zeros_like(self.forward))

    @property
    def backward_communication(self) -> FloatColumn:
        """Exposed communication of all axes in ``backward`` [s]."""
        return sum(self.backward_axes.values(), np.zeros_like(self.forward))

    @property
    def recompute_communication(self) -> FloatColumn:
        """Exposed communication of all axes in ``recompute`` [s]."""
        return sum(self.recompute_axes.values(), np.zeros_like(self.forward))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatchTimes:
    """One micro-batch: what a layer, the embedding and the head take; arrays of shape ``(num_plans,)`` [s].

    ``layer`` is the model's layer, a mixture of experts where it has one; ``dense_layer`` is what the leading dense
    layers of such a model cost, and the same object as ``layer`` elsewhere. ``*_communication`` is the exposed
    communication contained in the figure of the same name. Multi-token prediction is part of the head.
    """

    layer: LayerCost
    dense_layer: LayerCost
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
    model = context.model
    rows, inverse = columns.distinct(*CASE_FIELDS)
    cases = cases_of(rows)
    layer = _layer_cost(
        context, columns, layer_times(context, cases, is_moe=model.moe is not None).take(inverse)
    )
    dense_layer = layer
    if model.moe is not None:
        dense_times = layer_times(context, cases, is_moe=False).take(inverse)
        dense_layer = _layer_cost(context, columns, dense_times, is_moe=False)
        if model.moe.layer_frequency > 1:
            layer = _mixed(layer, dense_layer, _moe_share(context))
    boundary = boundary_times(context, cases).take(inverse)
    projection = _mtp_projection(context, cases)[:, inverse]

    def root_parameters(part: PlanColumns) -> RankParameters:
        tables = float(model.num_embedding_parameters + model.num_head_parameters)
        return boundary_parameters(context, tables / part.tp)

    # The root unit (embedding and head): its gather precedes all compute, its reduction follows it.
    nothing = np.zeros(len(columns))
    root = fsdp_times(context, columns, root_parameters, nothing, nothing)
    head = _head_cost(context, boundary, layer, projection)
    return MicroBatchTimes(
        layer=layer,
        dense_layer=dense_layer,
        embedding_forward=boundary.embedding_forward
        + boundary.embedding_communication
        + root.forward
        + root.forward_handling,
        embedding_backward=boundary.embedding_backward + root.backward + root.backward_handling,
        head_forward=head.forward,
        head_backward=head.backward,
        head_weight_gradient=head.weight_gradient,
        embedding_communication=boundary.embedding_communication + root.forward,
        # Prediction modules run the head again.
        head_communication=boundary.head_communication * (1.0 + model.num_mtp_layers),
        root_backward_communication=root.backward,
    )


def layers_forward(times: MicroBatchTimes, layers: FloatColumn, leading: FloatColumn) -> FloatColumn:
    """Return the forward of some layers, of which the first ``leading`` are a MoE model's dense ones [s]."""
    return layers * times.layer.forward + leading * (times.dense_layer.forward - times.layer.forward)


def layers_backward(
    times: MicroBatchTimes, layers: FloatColumn, leading: FloatColumn, recomputed: FloatColumn
) -> FloatColumn:
    """Return the backward of some layers [s].

    The first ``leading`` of them are a MoE model's dense ones, the first ``recomputed`` are recomputed.
    """
    layer, dense = times.layer, times.dense_layer
    both = np.minimum(leading, recomputed)
    return (
        layers * layer.backward
        + leading * (dense.backward - layer.backward)
        + (recomputed - both) * layer.recompute
        + both * dense.recompute
    )


def _layer_cost(
    context: CostContext, columns: PlanColumns, times: LayerTimes, *, is_moe: bool | None = None
) -> LayerCost:
    """Return one kind of layer with its recompute and what FSDP exposes beside it."""
    is_expert_layer = context.model.moe is not None if is_moe is None else is_moe
    recompute, recompute_axes = _recompute(columns, times)
    forward = times.forward + times.forward_communication
    backward = times.backward + times.backward_communication

    def unit(part: PlanColumns) -> RankParameters:
        return layer_parameters(context, part, is_moe=is_expert_layer)

    # A layer that is recomputed gives the exchange that much longer to hide.
    fsdp = fsdp_times(context, columns, unit, forward, backward + recompute)
    forward_axes = {**times.forward_axes, "dp": fsdp.forward}
    backward_axes = {**times.backward_axes, "dp": fsdp.backward}
    copies_forward, copies_backward = _copy_times(context, columns, unit, forward, backward)
    if copies_forward.any() or copies_backward.any():
        forward_axes["offload"], backward_axes["offload"] = copies_forward, copies_backward
    return LayerCost(
        forward=forward + fsdp.forward + fsdp.forward_handling + copies_forward,
        backward=backward + fsdp.backward + fsdp.backward_handling + copies_backward,
        recompute=recompute,
        weight_gradient=times.weight_gradient,
        recompute_axes=recompute_axes,
        forward_axes=forward_axes,
        backward_axes=backward_axes,
    )


def _copy_times(
    context: CostContext,
    columns: PlanColumns,
    unit: Callable[[PlanColumns], RankParameters],
    forward: FloatColumn,
    backward: FloatColumn,
) -> tuple[FloatColumn, FloatColumn]:
    """Return what copies to and from host memory add to one layer, forward and backward [s]."""
    copies_forward, copies_backward = np.zeros(len(columns)), np.zeros(len(columns))
    if columns.activation_offload.any():
        layer = layer_activations(context, columns)
        # Where only some layers are recomputed all are priced as those that keep everything.
        kept = np.where(columns.recompute_layers < ALL_LAYERS, layer.whole, layer.stored)
        stored = np.where(columns.activation_offload, kept, 0.0)
        activations = activation_offload_time(context, stored, forward, backward)
        copies_forward, copies_backward = activations.forward, activations.backward
    if (columns.parameter_offload != Offloads.NONE).any():
        num_parameters, ranks = unit(columns).total, shard_ranks(columns)

        def fetched(window: FloatColumn) -> FloatColumn:
            return parameter_offload_time(context, num_parameters, columns.parameter_offload, ranks, window)

        copies_forward, copies_backward = (
            copies_forward + fetched(forward),
            copies_backward + fetched(backward),
        )
    return copies_forward, copies_backward


def _recompute(columns: PlanColumns, times: LayerTimes) -> tuple[FloatColumn, dict[str, FloatColumn]]:
    """Return the seconds recomputing one layer adds, and the exposed communication among them by axis."""
    is_full = columns.recompute == Recomputes.FULL
    is_selective = columns.recompute == Recomputes.SELECTIVE
    nothing = np.zeros(len(columns))
    own = times.selective_recompute
    own_axes = {axis: times.selective_axes.get(axis, nothing) for axis in times.forward_axes}
    if columns.recompute_modules.any():
        named, named_axes = nothing, dict.fromkeys(own_axes, nothing)
        is_block = (columns.recompute_modules >> RECOMPUTE_MODULES.index("moe")) & 1
        for bit, module in enumerate(RECOMPUTE_MODULES):
            is_named = (columns.recompute_modules >> bit) & 1
            if module in WITHIN_MOE:
                is_named = is_named * (1 - is_block)
            named = named + is_named * times.module_forward.get(module, nothing)
            for axis, seconds in times.module_axes.get(module, {}).items():
                named_axes[axis] = named_axes[axis] + is_named * seconds
        names_modules = columns.recompute_modules > 0
        own = np.where(names_modules, named, own)
        own_axes = {axis: np.where(names_modules, named_axes[axis], own_axes[axis]) for axis in own_axes}
    compute = np.where(is_selective, own, np.where(is_full, times.full_recompute, 0.0))
    axes = {
        axis: np.where(is_selective, own_axes[axis], np.where(is_full, times.full_axes[axis], 0.0))
        for axis in own_axes
    }
    return sum(axes.values(), compute), axes


def _moe_share(context: CostContext) -> float:
    """Return the share of mixture-of-experts layers behind the leading dense ones."""
    moe = context.model.moe
    assert moe is not None
    return context.model.num_moe_layers / max(1, context.model.num_layers - moe.num_dense_layers)


def _mixed(layer: LayerCost, other: LayerCost, share: float) -> LayerCost:
    """Return a layer of the mean cost of two kinds that alternate."""

    def mean(name: str) -> FloatColumn:
        result: FloatColumn = share * getattr(layer, name) + (1.0 - share) * getattr(other, name)
        return result

    def mean_axes(name: str) -> dict[str, FloatColumn]:
        mine, others = getattr(layer, name), getattr(other, name)
        return {axis: share * mine[axis] + (1.0 - share) * others[axis] for axis in mine}

    return LayerCost(
        forward=mean("forward"),
        backward=mean("backward"),
        recompute=mean("recompute"),
        weight_gradient=mean("weight_gradient"),
        recompute_axes=mean_axes("recompute_axes"),
        forward_axes=mean_axes("forward_axes"),
        backward_axes=mean_axes("backward_axes"),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _HeadCost:
    forward: FloatColumn
    backward: FloatColumn
    weight_gradient: FloatColumn


def _head_cost(
    context: CostContext, boundary: BoundaryTimes, layer: LayerCost, projection: FloatColumn
) -> _HeadCost:
    """Return the head, and for each multi-token-prediction module a projection, a layer and the head once more.

    DeepSeek-V3, arXiv 2412.19437, section 2.2: the modules sit behind the last layer, on the last stage.
    """
    forward = boundary.head_forward
    backward = boundary.head_backward + boundary.head_communication
    weight_gradient = boundary.head_weight_gradient
    modules = float(context.model.num_mtp_layers)
    if modules:
        project_forward, project_input, project_weight = projection
        forward = forward + modules * (forward + layer.forward + project_forward)
        backward = backward + modules * (
            backward + layer.backward + layer.recompute + project_input + project_weight
        )
        weight_gradient = weight_gradient + modules * (
            weight_gradient + layer.weight_gradient + project_weight
        )
    return _HeadCost(forward=forward, backward=backward, weight_gradient=weight_gradient)


def _mtp_projection(context: CostContext, cases: LayerCases) -> FloatColumn:
    """Return forward, input gradient and weight gradient of the ``2h x h`` projection, shape ``(3, num_cases)``."""
    if not context.model.num_mtp_layers:
        return np.zeros((3, len(cases.tp)))
    hidden = np.full_like(cases.tp, float(context.model.hidden_size))
    tokens = cases.num_tokens(context.workload.sequence_length)
    out_width = hidden / cases.tp
    times = product_times(
        context, tokens, out_width, 2.0 * hidden, 2.0 * hidden * out_width, is_trained=not context.is_lora
    )
    return np.stack([times.forward, times.input_gradient, times.weight_gradient])
