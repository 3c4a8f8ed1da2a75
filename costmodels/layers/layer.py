"""Time of one transformer layer, dense or mixture of experts, for one micro-batch on one rank.

All functions take arrays over layer cases; the few distinct cases of a search space are costed once and gathered
per plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.attention import attention_times
from meshwright.costmodels.layers.cases import LayerCases
from meshwright.costmodels.layers.elementwise import elementwise_times
from meshwright.costmodels.layers.experts import expert_times
from meshwright.costmodels.layers.projections import (
    Projection,
    linear_times,
    operator_recompute_time,
    projections,
)
from meshwright.costmodels.parallelism.context import context_parallel_times
from meshwright.costmodels.parallelism.expert import combine_time, dispatch_time, exposed_exchange_time
from meshwright.costmodels.parallelism.tensor import ExchangeTimes, tensor_parallel_times
from meshwright.costmodels.plan_columns import FloatColumn, IntColumn

__all__ = ["LayerTimes", "layer_times"]

# Kernels besides matrix products that one layer launches, forward and backward.
_FORWARD_KERNELS, _BACKWARD_KERNELS = 9.0, 14.0
# A mixture of experts adds router scores, top-k, counts, permutations and the exchange's own kernels.
_MOE_FORWARD_KERNELS, _MOE_BACKWARD_KERNELS = 12.0, 12.0
# Without torch.compile or fused modules a framework launches about this many kernels more.
_EAGER_KERNEL_FACTOR = 2.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTimes:
    """Seconds of one layer and micro-batch; arrays of shape ``(num_cases,)``.

    Parameters
    ----------
    forward, backward : FloatColumn
        Compute; ``backward`` excludes recompute.
    weight_gradient : FloatColumn
        The part of ``backward`` that only makes weight gradients.
    forward_axes, backward_axes : Mapping[str, FloatColumn]
        Exposed communication by axis: ``tp``, ``cp``, ``ep``. Not in the compute figures.
    module_forward : Mapping[str, FloatColumn]
        Compute that recomputing each module of ``RECOMPUTE_MODULES`` repeats; ``moe`` is the whole block.
    module_axes : Mapping[str, Mapping[str, FloatColumn]]
        Exposed communication by axis that it repeats, of those modules that communicate.
    selective_recompute, selective_axes : FloatColumn, Mapping[str, FloatColumn]
        What the software's own selective recompute repeats: compute, and exposed communication by axis.
    full_recompute, full_axes : FloatColumn, Mapping[str, FloatColumn]
        What recomputing the whole layer repeats.
    """

    forward: FloatColumn
    backward: FloatColumn
    weight_gradient: FloatColumn
    forward_axes: Mapping[str, FloatColumn]
    backward_axes: Mapping[str, FloatColumn]
    module_forward: Mapping[str, FloatColumn]
    module_axes: Mapping[str, Mapping[str, FloatColumn]]
    selective_recompute: FloatColumn
    selective_axes: Mapping[str, FloatColumn]
    full_recompute: FloatColumn
    full_axes: Mapping[str, FloatColumn]

    @property
    def forward_communication(self) -> FloatColumn:
        """Exposed communication of all axes, forward [s]."""
        return sum(self.forward_axes.values(), np.zeros_like(self.forward))

    @property
    def backward_communication(self) -> FloatColumn:
        """Exposed communication of all axes, backward [s]."""
        return sum(self.backward_axes.values(), np.zeros_like(self.forward))

    def take(self, index: IntColumn) -> LayerTimes:
        """Return the selected cases."""

        def chosen(columns: Mapping[str, FloatColumn]) -> dict[str, FloatColumn]:
            return {name: column[index] for name, column in columns.items()}

        return LayerTimes(
            forward=self.forward[index],
            backward=self.backward[index],
            weight_gradient=self.weight_gradient[index],
            forward_axes=chosen(self.forward_axes),
            backward_axes=chosen(self.backward_axes),
            module_forward=chosen(self.module_forward),
            module_axes={name: chosen(axes) for name, axes in self.module_axes.items()},
            selective_recompute=self.selective_recompute[index],
            selective_axes=chosen(self.selective_axes),
            full_recompute=self.full_recompute[index],
            full_axes=chosen(self.full_axes),
        )


def layer_times(context: CostContext, cases: LayerCases, *, is_moe: bool = False) -> LayerTimes:
    """Return the times of one transformer layer.

    Parameters
    ----------
    context : CostContext
        Job, calibration and software.
    cases : LayerCases
        Layer shapes.
    is_moe : bool
        The layer's MLP is a mixture of experts; otherwise it is dense.

    Notes
    -----
    Matrix products by the smooth roofline; norms, residuals, activations and rotary embedding by their memory
    traffic; attention fused or with its score matrix in memory; a layer never runs faster than the host
    launches its kernels.
    """
    model = context.model
    nothing = np.zeros_like(cases.tp)
    parts = projections(context, cases, is_moe)
    gemms = linear_times(context, cases, parts)
    attention_forward, attention_backward = attention_times(context, cases)
    shared_width = float(model.moe.shared_ffn_hidden_size) if is_moe and model.moe else 0.0
    elementwise = elementwise_times(context, cases, shared_width if is_moe else float(model.ffn_hidden_size))
    kernels = _EAGER_KERNEL_FACTOR if "eager" in context.features else 1.0
    forward_kernels, backward_kernels = _FORWARD_KERNELS, _BACKWARD_KERNELS
    num_products = float(len(parts))
    forward = gemms.forward + attention_forward + elementwise.forward
    backward = gemms.input_gradient + gemms.weight_gradient + attention_backward + elementwise.backward
    weight_gradient = gemms.weight_gradient
    modules = {
        "core_attn": attention_forward,
        "layernorm": elementwise.norms,
        "mla_up_proj": linear_times(context, cases, _of(parts, "mla_up_proj")).forward,
    }
    has_mlp = not is_moe or shared_width > 0.0
    attention_pair, mlp_pair = _tensor_parallel(context, cases, gemms.forward, has_mlp=has_mlp)
    communication = attention_pair.both + mlp_pair.both
    backward_pairs = _tensor_parallel(context, cases, gemms.forward, has_mlp=has_mlp, is_backward=True)
    backward_communication = backward_pairs[0].both + backward_pairs[1].both
    # Without latents it is the hidden state that is gathered, which no module repeats.
    latent_gather = attention_pair.gather if model.mla is not None else nothing
    context_forward, context_backward = context_parallel_times(
        context, cases, attention_forward, attention_backward
    )
    forward_axes = {"tp": communication, "cp": context_forward, "ep": nothing}
    backward_axes = {"tp": backward_communication, "cp": context_backward, "ep": nothing}
    module_axes = {"core_attn": {"cp": context_forward}, "mla_up_proj": {"tp": latent_gather}}
    if is_moe:
        experts = expert_times(context, cases)
        exchange = dispatch_time(context, cases) + combine_time(context, cases)
        forward_axes["ep"] = exposed_exchange_time(context, cases, exchange, experts.expert_forward)
        backward_axes["ep"] = exposed_exchange_time(context, cases, exchange, experts.expert_backward)
        forward, backward = forward + experts.forward, backward + experts.backward
        weight_gradient = weight_gradient + experts.weight_gradient
        forward_kernels += _MOE_FORWARD_KERNELS
        backward_kernels += _MOE_BACKWARD_KERNELS
        num_products += 3.0
        shared = linear_times(context, cases, _of(parts, "shared_experts")).forward
        modules["shared_experts"] = shared + (elementwise.activation if shared_width else 0.0)
        modules["moe_act"] = experts.activation
        modules["moe"] = experts.forward + modules["shared_experts"]
        module_axes["shared_experts"] = {"tp": mlp_pair.both}
        module_axes["moe"] = {"tp": mlp_pair.both, "ep": forward_axes["ep"]}
    else:
        modules["mlp"] = linear_times(context, cases, _of(parts, "mlp")).forward + elementwise.activation
        module_axes["mlp"] = {"tp": mlp_pair.both}
    launch = context.calibration.gemm_curve(context.compute_precision).launch_time
    host = context.software.host_launch_latency
    forward = forward + kernels * forward_kernels * launch
    backward = backward + kernels * backward_kernels * launch
    # GEMM launches are in both figures, so the bound counts every kernel once: products and the others.
    forward_launches = host * (kernels * forward_kernels + num_products)
    backward_launches = host * (kernels * backward_kernels + 2.0 * num_products)
    if context.gpu.architecture == "cpu":
        # The processor that launches is the one that computes: nothing of it is hidden.
        forward, backward = forward + forward_launches, backward + backward_launches
    forward = np.maximum(forward, forward_launches)
    backward = np.maximum(backward, backward_launches)
    selective, selective_axes = attention_forward, {"cp": context_forward}
    if context.software.selective_recompute == "operators":
        # Attention's output and the scattered sums are kept, inputs of split products are gathered again.
        selective = operator_recompute_time(context, cases, parts) + elementwise.forward
        selective_axes = {"tp": attention_pair.gather + mlp_pair.gather}
    full, full_axes = forward, forward_axes
    if context.software.recomputes_only_needed and not is_moe:
        # The backward asks for what the last product takes in, not for what it makes.
        full = forward - linear_times(context, cases, parts[-1:]).forward
        full_axes = {**forward_axes, "tp": communication - mlp_pair.reduce}
    return LayerTimes(
        forward=forward,
        backward=backward,
        weight_gradient=weight_gradient,
        forward_axes=forward_axes,
        backward_axes=backward_axes,
        module_forward=modules,
        module_axes=module_axes,
        selective_recompute=selective,
        selective_axes=selective_axes,
        full_recompute=full,
        full_axes=full_axes,
    )


def _tensor_parallel(
    context: CostContext, cases: LayerCases, cover: FloatColumn, *, has_mlp: bool, is_backward: bool = False
) -> tuple[ExchangeTimes, ExchangeTimes]:
    """Return the collectives of attention and of the MLP in one direction [s].

    ``has_mlp`` is false where routed experts alone follow attention: those exchange over expert parallel ranks. The
    MLP of a parallel block shares attention's.
    """
    model = context.model
    tokens = cases.num_tokens(context.workload.sequence_length)
    has_mlp_pair = has_mlp and not model.has_parallel_block

    def pair(share: float) -> ExchangeTimes:
        return tensor_parallel_times(
            context,
            cases.tp,
            tokens,
            cases.sequence_parallel,
            cover / (2.0 if has_mlp_pair else 1.0),
            gathered_share=share,
            gathered_width=context.gathered_bytes,
            is_backward=is_backward,
        )

    nothing = np.zeros_like(cases.tp)
    whole = pair(1.0)
    mlp = whole if has_mlp_pair else ExchangeTimes(gather=nothing, reduce=nothing)
    if model.mla is None:
        return whole, mlp
    # Without a query latent the hidden state itself is gathered for the queries.
    latents = (model.mla.q_lora_rank or model.hidden_size) + model.mla.kv_lora_rank
    return pair((latents + model.mla.qk_rope_head_dim) / model.hidden_size), mlp


def _of(parts: list[Projection], module: str) -> list[Projection]:
    return [part for part in parts if part.module == module]
