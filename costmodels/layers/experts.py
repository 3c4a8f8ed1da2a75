"""The routed experts of one mixture-of-experts layer: router, permutation, grouped products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.cases import LayerCases
from meshwright.costmodels.layers.elementwise import elementwise_time
from meshwright.costmodels.layers.projections import LinearTimes, product_times
from meshwright.costmodels.plan_columns import FloatColumn
from meshwright.simcore.domain.model import MoeSpec

__all__ = ["ExpertTimes", "expert_load", "expert_times", "routed_rows"]

# Rows of a tile of a grouped product; what an expert leaves of its last tile costs most of a full one
# (fitted padding of the measured MoE tables: meshwright.costmodels.operators.moe).
_TILE, _PADDING = 128.0, 0.7
# Passes over the routed rows outside the products: gather into and out of expert order on both sides of the
# exchange, forward; backward moves the gradients the same way.
_PERMUTE_PASSES = 4.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertTimes:
    """Seconds of one layer's routed experts and router on the most loaded rank; arrays ``(num_cases,)``.

    ``expert_forward`` is the part between dispatch and combine; ``activation`` that of the gated activation.
    """

    forward: FloatColumn
    backward: FloatColumn
    weight_gradient: FloatColumn
    expert_forward: FloatColumn
    expert_backward: FloatColumn
    activation: FloatColumn


def expert_load(context: CostContext, cases: LayerCases) -> FloatColumn:
    """Return the rows of the most loaded expert parallel rank over the mean.

    The stated imbalance of its ep without a capacity; with one, every expert's buffer is filled or padded to it (drop and
    pad, GShard, arXiv 2006.16668). One rank with all experts has every row whatever the routing.
    """
    workload = context.workload
    degrees, places = np.unique(cases.ep, return_inverse=True)
    capacities = [workload.capacity_at(int(ep)) for ep in degrees]
    stated = np.array(
        [
            workload.imbalance_at(int(ep)) if capacity is None else capacity
            for ep, capacity in zip(degrees, capacities, strict=True)
        ]
    )
    load: FloatColumn = stated[places].reshape(cases.ep.shape)
    return load


def routed_rows(context: CostContext, cases: LayerCases, moe: MoeSpec) -> FloatColumn:
    """Return the (token, expert) pairs one rank sends out per micro-batch.

    Tensor parallel ranks hold different parts of the sequence where experts are routed (sequence parallelism).
    """
    tokens = cases.num_tokens(context.workload.sequence_length) / cases.tp
    return tokens * moe.top_k


def expert_times(context: CostContext, cases: LayerCases) -> ExpertTimes:
    """Return the times of router, permutation and grouped products.

    A rank of an ep x etp grid computes ``etp * rows`` rows of its ``num_experts / ep`` experts, each ``1/etp``
    wide: the same work whatever the grid, in fewer or more and in narrower or wider products. Each chunk of
    ``expert_overlap`` fills tiles and reads weights by itself.
    """
    model = context.model
    moe = model.moe
    assert moe is not None
    sent = routed_rows(context, cases, moe)
    rows = sent * cases.etp * expert_load(context, cases)
    num_local = moe.num_experts / cases.ep
    hidden = np.full_like(rows, float(model.hidden_size))
    width = moe.moe_ffn_hidden_size / cases.etp
    chunk = rows / cases.expert_overlap
    tiled = num_local * np.ceil(np.maximum(chunk / num_local, 1.0) / _TILE) * _TILE
    padded = chunk + _PADDING * np.maximum(0.0, tiled - chunk)
    inner = (2.0 if model.is_gated_mlp else 1.0) * width
    is_trained = not context.is_lora

    def grouped(out_width: FloatColumn, in_width: FloatColumn) -> LinearTimes:
        num_weights = num_local * out_width * in_width
        return product_times(context, padded, out_width, in_width, num_weights, is_trained=is_trained)

    products = (grouped(inner, hidden) + grouped(hidden, width)).repeated(cases.expert_overlap)
    tokens = sent / moe.top_k
    experts = np.full_like(rows, float(moe.num_experts))
    # Routers stay in 16 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.1).
    router = product_times(
        context,
        tokens,
        experts,
        hidden,
        experts * hidden,
        is_trained=is_trained,
        precision=context.compute_precision,
    )
    element = context.element_bytes
    gated = 3.0 if model.is_gated_mlp else 2.0
    activation = elementwise_time(context, element * gated * rows * width)
    activation_backward = elementwise_time(
        context, element * (5.0 if model.is_gated_mlp else 3.0) * rows * width
    )
    # Scores are fp32: softmax or sigmoid, top-k and the balancing loss read and write them about four times.
    scores = elementwise_time(context, 4.0 * 4.0 * tokens * moe.num_experts)
    permute = elementwise_time(context, element * model.hidden_size * (_PERMUTE_PASSES * rows + 2.0 * tokens))
    expert_forward = products.forward + activation
    expert_backward = products.input_gradient + products.weight_gradient + activation_backward
    return ExpertTimes(
        forward=expert_forward + router.forward + scores + permute,
        backward=expert_backward + router.input_gradient + router.weight_gradient + scores + permute,
        weight_gradient=products.weight_gradient + router.weight_gradient,
        expert_forward=expert_forward,
        expert_backward=expert_backward,
        activation=activation,
    )
