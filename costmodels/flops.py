"""Model FLOPs of a training step: the numerator of MFU, with its convention printed beside every figure.

Only what one token passes is counted: of the routed experts the ``top_k`` it is sent to, with the router and the
shared experts; multi-token prediction modules with their logits, as Megatron-LM counts them
(``num_floating_point_operations``); latent attention by its own matrices. Norms, activations and look-ups are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from meshwright.simcore.domain.model import ModelSpec

__all__ = ["FlopsConvention", "hardware_flops", "model_flops"]

FlopsConvention = Literal["causal", "full-attention"]


def _attention_weights(model: ModelSpec) -> int:
    """Matrix elements of one layer's attention that a token is multiplied with."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    if model.mla is None:
        query = heads * model.head_dim
        return hidden * (query + 2 * model.num_query_groups * model.head_dim) + query * hidden
    mla = model.mla
    query = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    latent = mla.q_lora_rank
    queries = hidden * query if latent is None else hidden * latent + latent * query
    keys_values = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    keys_values += mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return queries + keys_values + heads * mla.v_head_dim * hidden


def _mlp_weights(model: ModelSpec, width: int) -> int:
    return (3 if model.is_gated_mlp else 2) * model.hidden_size * width


def _operator_weights(model: ModelSpec) -> int:
    """Matrix elements of every second product of a layer but the last, in the order they run (torchtitan's policy).

    Of queries, keys, values, output, and both halves of a gated MLP: keys, output and the second half. Routed experts
    are kept.
    """
    hidden, heads = model.hidden_size, model.num_attention_heads
    widths = [heads * model.head_dim] + 2 * [model.num_query_groups * model.head_dim]
    weights = [hidden * width for width in widths] + [hidden * widths[0]]
    if model.mla is not None:
        mla = model.mla
        query = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        latent = mla.q_lora_rank
        weights = [hidden * query] if latent is None else [hidden * latent, latent * query]
        weights += [
            hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim),
            mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim),
            hidden * heads * mla.v_head_dim,
        ]
    width = model.ffn_hidden_size if model.moe is None else model.moe.shared_ffn_hidden_size
    if width:
        weights += (3 if model.is_gated_mlp else 2) * [hidden * width]
    return sum(weights[1:-1:2])


def _moe_weights(model: ModelSpec) -> int:
    """Matrix elements of one layer's router, shared experts and the routed experts of one token."""
    moe = model.moe
    assert moe is not None
    experts = moe.top_k * moe.moe_ffn_hidden_size + moe.shared_ffn_hidden_size
    return model.hidden_size * moe.num_experts + _mlp_weights(model, experts)


def _prediction_module_weights(model: ModelSpec) -> int:
    """Matrix elements of one multi-token prediction module but its head: a layer, and ``2h x h`` before it."""
    mlp = _mlp_weights(model, model.ffn_hidden_size) if model.moe is None else _moe_weights(model)
    return _attention_weights(model) + mlp + 2 * model.hidden_size**2


def _linear_flops_per_token(model: ModelSpec) -> float:
    """Forward FLOPs per token of the matrix products with weights of all layers of the main model."""
    mlp = (model.num_layers - model.num_moe_layers) * _mlp_weights(model, model.ffn_hidden_size)
    if model.moe is not None:
        mlp += model.num_moe_layers * _moe_weights(model)
    return 2.0 * (model.num_layers * _attention_weights(model) + mlp)


def _layer_attention_flops_per_token(
    model: ModelSpec, sequence_length: int, convention: FlopsConvention
) -> float:
    """Forward FLOPs per token of one layer's scores and weighted sums: 4 s a d whole, half of it causal."""
    pairs = float(sequence_length) if convention == "full-attention" else sequence_length / 2.0
    if model.sliding_window is not None and model.sliding_window < sequence_length and convention == "causal":
        window = float(model.sliding_window)
        windowed = window - window * window / (2.0 * sequence_length)
        full_share = 1.0 / model.full_attention_interval if model.full_attention_interval else 0.0
        pairs = full_share * pairs + (1.0 - full_share) * windowed
    value_dim = model.head_dim if model.mla is None else model.mla.v_head_dim
    return 2.0 * pairs * model.num_attention_heads * (model.head_dim + value_dim)


def model_flops(
    model: ModelSpec, num_tokens: int, sequence_length: int, convention: FlopsConvention = "causal"
) -> float:
    """Return the FLOPs of forward and backward (twice forward) of ``num_tokens`` tokens.

    Logits are counted, recompute is not; the ``causal`` convention counts attention half (as Llama 3 and
    Megatron-Bridge do), ``full-attention`` whole (as PaLM, Korthikanti and llm-foundry do).

    Parameters
    ----------
    model : ModelSpec
        A model.
    num_tokens : int
        Tokens of the step.
    sequence_length : int
        Tokens of one sequence, for the attention term.
    convention : FlopsConvention
        How attention is counted.

    Returns
    -------
    float
        FLOPs of the whole cluster.
    """
    modules = model.num_mtp_layers
    logits = 2.0 * model.hidden_size * model.vocab_size * (1 + modules)
    attention = _layer_attention_flops_per_token(model, sequence_length, convention)
    forward = (
        _linear_flops_per_token(model)
        + modules * 2.0 * _prediction_module_weights(model)
        + (model.num_layers + modules) * attention
        + logits
    )
    return 3.0 * forward * num_tokens


def hardware_flops(
    model: ModelSpec,
    num_tokens: int,
    sequence_length: int,
    recompute: str,
    convention: FlopsConvention = "causal",
    *,
    recomputes_operators: bool = False,
    recompute_modules: Sequence[str] = (),
) -> float:
    """Return :func:`model_flops` plus what recompute runs again: the numerator of HFU.

    ``selective`` repeats the attention core, or every second linear product of a layer where the software's policy is
    by operator (``recomputes_operators``), or the products of the modules it names. ``full`` repeats all, as published
    figures count it, though the last product of a layer is repeated by some software only.

    Parameters
    ----------
    model, num_tokens, sequence_length, convention : ModelSpec, int, int, FlopsConvention
        As for :func:`model_flops`.
    recompute : str
        ``none``, ``selective`` or ``full``.
    recomputes_operators : bool
        What ``selective`` means where no modules are named.
    recompute_modules : Sequence[str]
        Modules that selective recompute names.
    """
    linear = _linear_flops_per_token(model)
    attention = model.num_layers * _layer_attention_flops_per_token(model, sequence_length, convention)
    selective = attention
    if recomputes_operators:
        selective = 2.0 * model.num_layers * _operator_weights(model)
    if recompute_modules:
        selective = _module_flops_per_token(model, recompute_modules, attention)
    again = {"none": 0.0, "selective": selective, "full": attention + linear}[recompute]
    return model_flops(model, num_tokens, sequence_length, convention) + again * num_tokens


def _module_flops_per_token(model: ModelSpec, modules: Sequence[str], attention: float) -> float:
    """Forward FLOPs per token of recompute modules in all layers; norms and activations have none.

    ``moe`` is the whole block, shared experts included.
    """
    num_dense = model.num_layers - model.num_moe_layers
    flops = attention if "core_attn" in modules else 0.0
    if "mlp" in modules:
        flops += 2.0 * num_dense * _mlp_weights(model, model.ffn_hidden_size)
    if "mla_up_proj" in modules and model.mla is not None:
        mla, heads = model.mla, model.num_attention_heads
        up = (mla.q_lora_rank or 0) * heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        up += mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        flops += 2.0 * model.num_layers * up
    if model.moe is not None:
        if "moe" in modules:
            flops += 2.0 * model.num_moe_layers * _moe_weights(model)
        elif "shared_experts" in modules:
            flops += 2.0 * model.num_moe_layers * _mlp_weights(model, model.moe.shared_ffn_hidden_size)
    return flops
