"""The matrix products of a layer outside attention's core and the routed experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.cases import LayerCases
from meshwright.costmodels.plan_columns import FloatColumn
from meshwright.costmodels.roofline import gemm_time, stream_time

__all__ = [
    "LinearTimes",
    "Projection",
    "linear_times",
    "operator_recompute_time",
    "product_times",
    "projections",
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Projection:
    """One matrix on one tensor parallel rank.

    Parameters
    ----------
    module : str
        The recompute module it belongs to; "" for none.
    out_width, in_width : FloatColumn
        Its sides on this rank.
    is_whole : bool
        Every rank holds all of it: under sequence parallelism it then sees this rank's part of the tokens.
    is_row_split : bool
        Ranks hold parts of its rows, so that its outputs are summed over them.
    num_before : int
        Projections of the same input before it, with whose input gradients its own is summed.
    """

    module: str
    out_width: FloatColumn
    in_width: FloatColumn
    is_whole: bool = False
    is_row_split: bool = False
    num_before: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearTimes:
    """Seconds of some products of one micro-batch; arrays of shape ``(num_cases,)``.

    ``cast`` is the part of ``forward`` that quantises inputs and weights.
    """

    forward: FloatColumn
    input_gradient: FloatColumn
    weight_gradient: FloatColumn
    cast: FloatColumn

    def __add__(self, other: LinearTimes) -> LinearTimes:
        """Return both, one after the other."""
        return LinearTimes(
            forward=self.forward + other.forward,
            input_gradient=self.input_gradient + other.input_gradient,
            weight_gradient=self.weight_gradient + other.weight_gradient,
            cast=self.cast + other.cast,
        )

    def repeated(self, times: FloatColumn) -> LinearTimes:
        """Return them so many times over."""
        return LinearTimes(
            forward=self.forward * times,
            input_gradient=self.input_gradient * times,
            weight_gradient=self.weight_gradient * times,
            cast=self.cast * times,
        )


def projections(context: CostContext, cases: LayerCases, is_moe: bool) -> list[Projection]:
    """Return the matrices of one layer on one rank: attention's, and the dense or the shared experts' MLP.

    MLA keeps its two down projections whole on every rank and splits the up projections by head (DeepSeek-V2,
    arXiv 2405.04434, section 2.1; Megatron-Core's MLA, whose ranks project down their part of the sequence and
    gather the latents).
    """
    model = context.model
    hidden = np.full_like(cases.tp, float(model.hidden_size))
    result: list[Projection] = []

    def add(
        module: str,
        out_width: FloatColumn,
        in_width: FloatColumn,
        *,
        is_whole: bool = False,
        is_row_split: bool = False,
        num_before: int = 0,
    ) -> None:
        result.append(
            Projection(
                module=module,
                out_width=out_width,
                in_width=in_width,
                is_whole=is_whole,
                is_row_split=is_row_split,
                num_before=num_before,
            )
        )

    is_split = context.software.splits_projections
    heads = model.num_attention_heads / cases.tp
    if model.mla is None:
        query = heads * model.head_dim
        key_value = cases.held_query_groups(model) * model.head_dim
        if is_split:
            add("", query, hidden)
            add("", key_value, hidden, num_before=1)
            add("", key_value, hidden, num_before=2)
        else:
            add("", query + 2.0 * key_value, hidden)
        add("", hidden, query, is_row_split=True)
    else:
        mla = model.mla
        query = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        latent = np.full_like(cases.tp, float(mla.kv_lora_rank))
        if mla.q_lora_rank is None:
            add("", query, hidden)
        else:
            query_latent = np.full_like(cases.tp, float(mla.q_lora_rank))
            add("", query_latent, hidden, is_whole=True)
            add("mla_up_proj", query, query_latent)
        add("", latent + mla.qk_rope_head_dim, hidden, is_whole=True)
        add("mla_up_proj", heads * (mla.qk_nope_head_dim + mla.v_head_dim), latent)
        add("", hidden, heads * mla.v_head_dim, is_row_split=True)
    module, width = ("mlp", float(model.ffn_hidden_size))
    if is_moe and model.moe is not None:
        module, width = ("shared_experts", float(model.moe.shared_ffn_hidden_size))
    if width:
        if is_split and model.is_gated_mlp:
            add(module, width / cases.tp, hidden)
            add(module, width / cases.tp, hidden, num_before=1)
        else:
            add(module, (2.0 if model.is_gated_mlp else 1.0) * width / cases.tp, hidden)
        add(module, hidden, width / cases.tp, is_row_split=True)
    return result


def linear_times(context: CostContext, cases: LayerCases, parts: list[Projection]) -> LinearTimes:
    """Return the times of some projections, their gradients, casts and gradient accumulation."""
    tokens = cases.num_tokens(context.workload.sequence_length)
    nothing = np.zeros_like(tokens)
    total = LinearTimes(forward=nothing, input_gradient=nothing, weight_gradient=nothing, cast=nothing)
    for part in parts:
        num_weights = part.in_width * part.out_width
        is_split = cases.sequence_parallel & part.is_whole
        rows = np.where(is_split, tokens / cases.tp, tokens)
        total = total + product_times(
            context,
            rows,
            part.out_width,
            part.in_width,
            num_weights,
            is_trained=not context.is_lora,
            casts_input=not part.num_before,
        )
        if part.num_before:
            # One kernel reads all of them and writes the sum: the second adds two reads and the write.
            passes = 3.0 if part.num_before == 1 else 1.0
            summed = stream_time(
                passes * context.element_bytes * rows * part.in_width,
                context.gpu.memory_bandwidth_bytes_per_second,
                context.calibration.memory_stream_efficiency,
            )
            total = replace(total, input_gradient=total.input_gradient + summed)
        if context.is_lora:
            total = total + _adapter_times(context, rows, part)
    return total


def operator_recompute_time(context: CostContext, cases: LayerCases, parts: list[Projection]) -> FloatColumn:
    """Return the products that an operator-level recompute repeats [s].

    Every second product of a layer, in the order they run, is not kept (torchtitan, ``_get_custom_policy``). The last
    one is not needed again; nor are row-split ones under sequence parallelism, whose scattered sums are kept. All are
    quantised again, like all element-wise work is repeated.
    """
    again = linear_times(context, cases, parts).cast
    for part in parts[1:-1:2]:
        product = linear_times(context, cases, [part])
        is_kept = cases.sequence_parallel & part.is_row_split
        again = again + np.where(is_kept, 0.0, product.forward - product.cast)
    return again


def product_times(
    context: CostContext,
    rows: FloatColumn,
    out_width: FloatColumn,
    in_width: FloatColumn,
    num_weights: FloatColumn,
    *,
    is_trained: bool,
    precision: str | None = None,
    casts_input: bool = True,
) -> LinearTimes:
    """Return forward, input gradient and weight gradient of ``rows`` tokens through one matrix or a group of them.

    Parameters
    ----------
    context : CostContext
        Job, calibration and software.
    rows : FloatColumn
        Rows of the product.
    out_width, in_width : FloatColumn
        Columns of output and input.
    num_weights : FloatColumn
        Weights read: ``out_width * in_width``, times the matrices of a grouped product.
    is_trained : bool
        False for frozen weights, which have no gradient of their own.
    precision : str | None
        Number format; None is the workload's. Routers and adapters stay in 16 bits.
    casts_input : bool
        False where the product before has quantised the same input.

    Returns
    -------
    LinearTimes
        Casts to a narrow format and the traffic of gradient accumulation included [s].
    """
    precision = precision or context.workload.precision
    is_narrow = precision not in ("fp32", "tf32", "fp16", "bf16")
    element = context.element_bytes
    width = context.operand_bytes if is_narrow else element
    calibration, software = context.calibration, context.software
    clock = calibration.clock(precision)
    bandwidth = context.gpu.memory_bandwidth_bytes_per_second
    inputs, outputs = rows * in_width, rows * out_width
    num_bytes = width * (inputs + num_weights) + element * outputs
    forward = gemm_time(rows, out_width, in_width, num_bytes, calibration.gemm(precision), clock)
    # The input gradient has the forward product's shapes permuted: same FLOPs, same bytes.
    dgrad = gemm_time(rows, in_width, out_width, num_bytes, calibration.gemm(precision, "gemm_dgrad"), clock)
    weight = np.zeros_like(forward)
    stream = calibration.memory_stream_efficiency
    if is_trained:
        fused_bytes = (
            context.gradient_accumulation_bytes if software.is_gradient_accumulation_fused else element
        )
        num_bytes = width * (inputs + outputs) + fused_bytes * num_weights
        weight = gemm_time(
            out_width, in_width, rows, num_bytes, calibration.gemm(precision, "gemm_wgrad"), clock
        )
        if not software.is_gradient_accumulation_fused:
            weight = weight + stream_time(
                context.gradient_accumulation_bytes * num_weights, bandwidth, stream
            )
    cast = np.zeros_like(forward)
    if is_narrow:
        # Inputs and weights are quantised before the forward, output gradients and weights before the backward.
        quantised = num_weights + inputs if casts_input else num_weights
        cast = stream_time(context.cast_bytes * quantised, bandwidth, stream)
        forward = forward + cast
        dgrad = dgrad + stream_time(context.cast_bytes * (outputs + num_weights), bandwidth, stream)
    return LinearTimes(forward=forward, input_gradient=dgrad, weight_gradient=weight, cast=cast)


def _adapter_times(context: CostContext, rows: FloatColumn, part: Projection) -> LinearTimes:
    """Return the two skinny products of a low-rank adapter beside a frozen matrix, ``x A B``, and their gradients."""
    rank = np.full_like(rows, float(context.workload.lora_rank or 0))

    def product(out_width: FloatColumn, in_width: FloatColumn) -> LinearTimes:
        num_weights = out_width * in_width
        precision = context.compute_precision
        return product_times(
            context, rows, out_width, in_width, num_weights, is_trained=True, precision=precision
        )

    return product(rank, part.in_width) + product(part.out_width, rank)
