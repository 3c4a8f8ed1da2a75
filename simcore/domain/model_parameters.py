"""Exact parameter counts of a decoder-only transformer, one function per term.

Counts are those of the published checkpoint: vectors (norms, biases, attention sinks, router corrections)
are included, buffers such as rotary frequencies are not, and a tied LM head is counted once, with the
embedding. Writing ``h`` for ``hidden_size``, ``d`` for ``head_dim``, ``q`` for ``num_attention_heads``,
``g`` for ``num_query_groups``, ``f`` for an MLP's width and ``n`` for the vectors of a norm (2 for
``layernorm``: weight and bias; else 1)::

    layer       = attention + norms_per_layer * n * h + (mlp | router + experts + shared experts)
    attention   = h * (q + 2 g) d  +  q d * h  [+ biases (q + 2 g) d and h, qk-norm, sinks q]
    mlp         = (3 | 2) * h * f  [+ biases (2 | 1) f + h]
    main model  = token table + positions + embedding norm + layers + final norm + head

The formulas are held to some sixty published counts by the tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshwright.simcore.domain.model import ModelSpec

__all__ = [
    "attention_parameters",
    "dense_mlp_parameters",
    "expert_parameters",
    "head_parameters",
    "layer_parameters",
    "linear_attention_difference",
    "linear_attention_parameters",
    "mlp_parameters",
    "moe_layer_parameters",
    "mtp_parameters",
    "norm_parameters",
    "output_projection_parameters",
    "parameter_breakdown",
    "position_parameters",
    "qk_norm_parameters",
    "qkv_parameters",
    "router_parameters",
    "shared_expert_parameters",
    "token_embedding_parameters",
]


def norm_parameters(model: ModelSpec, width: int) -> int:
    """Return the parameters of a norm over ``width`` channels: weights, and biases with ``layernorm``."""
    return 2 * width if model.normalization == "layernorm" else width


def qkv_parameters(model: ModelSpec) -> int:
    """Return the parameters of one layer's query, key and value projections, biases included.

    ``h (q + 2 g) d``, plus ``(q + 2 g) d`` with ``has_qkv_bias``. For MLA, see :func:`_mla_qkv_parameters`.
    """
    if model.mla is not None:
        return _mla_qkv_parameters(model)
    query_heads = model.num_attention_heads * (1 + model.has_attention_output_gate)
    width = (query_heads + 2 * model.num_query_groups) * model.head_dim
    return (model.hidden_size + model.has_qkv_bias) * width


def _mla_qkv_parameters(model: ModelSpec) -> int:
    """Return MLA's down and up projections with the norms of the two latents.

    Queries ``h r_q + r_q + r_q q (d_nope + d_rope)`` (or ``h q (d_nope + d_rope)`` without a query rank),
    keys and values ``h (r_kv + d_rope) + r_kv + r_kv q (d_nope + d_v)``; ``has_qkv_bias`` puts a bias on the
    two down projections (DeepSeek-V2, arXiv 2405.04434, section 2.1; names of its published code).
    """
    mla = model.mla
    assert mla is not None
    hidden_size, num_heads = model.hidden_size, model.num_attention_heads
    query_width = num_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    if mla.q_lora_rank is None:
        query = hidden_size * query_width
    else:
        query_down = (hidden_size + model.has_qkv_bias) * mla.q_lora_rank
        query = query_down + norm_parameters(model, mla.q_lora_rank) + mla.q_lora_rank * query_width
    key_value_down = (hidden_size + model.has_qkv_bias) * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    key_value_up = mla.kv_lora_rank * num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return query + key_value_down + norm_parameters(model, mla.kv_lora_rank) + key_value_up


def output_projection_parameters(model: ModelSpec) -> int:
    """Return the parameters of one layer's attention output projection: ``q d h``, plus ``h`` with a bias."""
    value_head_dim = model.head_dim if model.mla is None else model.mla.v_head_dim
    weight = model.num_attention_heads * value_head_dim * model.hidden_size
    return weight + model.has_attention_output_bias * model.hidden_size


def qk_norm_parameters(model: ModelSpec) -> int:
    """Return the parameters of one layer's query and key norms.

    ``n d`` each when all heads share one vector (Qwen3, Gemma-3), ``n q d`` and ``n g d`` when the norm spans
    the whole projection (MiniMax-M2, Command R+); 0 without.
    """
    if not model.has_qk_norm:
        return 0
    if model.is_qk_norm_per_head:
        return 2 * norm_parameters(model, model.head_dim)
    return norm_parameters(model, (model.num_attention_heads + model.num_query_groups) * model.head_dim)


def attention_parameters(model: ModelSpec) -> int:
    """Return the parameters of one layer's attention: projections, biases, qk-norm, a sink per head."""
    sinks = model.num_attention_heads if model.has_attention_sinks else 0
    return qkv_parameters(model) + output_projection_parameters(model) + qk_norm_parameters(model) + sinks


def linear_attention_parameters(model: ModelSpec) -> int:
    """Return the parameters of one layer's gated delta rule; 0 without linear attention.

    Projections to queries, keys, values and an output gate, to two numbers per value head, and back; the taps of the
    convolution, two numbers per value head and the norm of the heads' output.
    """
    linear = model.linear_attention
    if linear is None:
        return 0
    keys = linear.num_key_heads * linear.key_head_dim
    values = linear.num_value_heads * linear.value_head_dim
    projections = model.hidden_size * (2 * keys + 3 * values + 2 * linear.num_value_heads)
    convolution = (2 * keys + values) * linear.conv_kernel_size
    return projections + convolution + 2 * linear.num_value_heads + linear.value_head_dim


def linear_attention_difference(model: ModelSpec) -> int:
    """Return what a layer with linear attention has more than one with attention."""
    return linear_attention_parameters(model) - attention_parameters(model)


def mlp_parameters(model: ModelSpec, width: int) -> int:
    """Return the parameters of one MLP of the given inner width, biases included.

    ``3 h f`` when gated, else ``2 h f``; with ``has_mlp_bias`` also ``2 f + h`` or ``f + h``.
    """
    num_input_matrices = 2 if model.is_gated_mlp else 1
    bias = num_input_matrices * width + model.hidden_size if model.has_mlp_bias else 0
    return (num_input_matrices + 1) * model.hidden_size * width + bias


def dense_mlp_parameters(model: ModelSpec) -> int:
    """Return the parameters of the MLP of one dense layer."""
    return mlp_parameters(model, model.ffn_hidden_size)


def expert_parameters(model: ModelSpec) -> int:
    """Return the parameters of one routed expert; 0 for a dense model."""
    return 0 if model.moe is None else mlp_parameters(model, model.moe.moe_ffn_hidden_size)


def shared_expert_parameters(model: ModelSpec) -> int:
    """Return the parameters of one layer's shared experts: their MLP, and ``h`` for a gate on its output."""
    if model.moe is None or model.moe.shared_ffn_hidden_size == 0:
        return 0
    gate = model.hidden_size if model.moe.has_shared_expert_gate else 0
    return mlp_parameters(model, model.moe.shared_ffn_hidden_size) + gate


def router_parameters(model: ModelSpec) -> int:
    """Return the parameters of one layer's router: ``h E``, plus ``E`` with ``has_router_bias``."""
    if model.moe is None:
        return 0
    return (model.hidden_size + model.moe.has_router_bias) * model.moe.num_experts


def layer_parameters(model: ModelSpec) -> int:
    """Return the parameters of one dense layer: attention, MLP and norms."""
    norms = model.norms_per_layer * norm_parameters(model, model.hidden_size)
    return attention_parameters(model) + dense_mlp_parameters(model) + norms


def moe_layer_parameters(model: ModelSpec) -> int:
    """Return the parameters of one mixture-of-experts layer, all experts included; 0 for a dense model."""
    if model.moe is None:
        return 0
    experts = model.moe.num_experts * expert_parameters(model) + shared_expert_parameters(model)
    return layer_parameters(model) - dense_mlp_parameters(model) + router_parameters(model) + experts


def token_embedding_parameters(model: ModelSpec) -> int:
    """Return the parameters of the token table: ``V h``; the LM head's too when they are tied."""
    return model.vocab_size * model.hidden_size


def position_parameters(model: ModelSpec) -> int:
    """Return the parameters of learned positions: a row of ``h`` for each position, reserved ones too."""
    if model.position_embedding != "learned":
        return 0
    return (model.max_position_embeddings + model.num_reserved_positions) * model.hidden_size


def head_parameters(model: ModelSpec) -> int:
    """Return the parameters the LM head adds: ``V h`` (0 when tied), plus ``V`` with ``has_head_bias``."""
    weight = 0 if model.has_tied_embeddings else model.vocab_size * model.hidden_size
    return weight + model.has_head_bias * model.vocab_size


def mtp_parameters(model: ModelSpec) -> int:
    """Return the parameters that all multi-token-prediction modules add, without what they share.

    Per module: one layer of the kind of the model's last, norms of the two inputs, their ``2 h x h``
    projection, and the norm before the shared head (DeepSeek-V3, arXiv 2412.19437, section 2.2). The token
    table and the LM head are the main model's; published files repeat them
    (``ModelSpec.num_checkpoint_parameters``).
    """
    if model.num_mtp_layers == 0:
        return 0
    layer = layer_parameters(model) if model.moe is None else moe_layer_parameters(model)
    projection = 2 * model.hidden_size * model.hidden_size
    return model.num_mtp_layers * (layer + projection + 3 * norm_parameters(model, model.hidden_size))


def parameter_breakdown(model: ModelSpec) -> dict[str, int]:
    """Return the parameters of the whole model by term; the values add up to ``num_parameters``.

    Returns
    -------
    dict[str, int]
        Keys: ``token_embedding``, ``position_embedding``, ``embedding_norm``, ``qkv``, ``attention_output``,
        ``qk_norm``, ``attention_sinks``, ``dense_mlp``, ``router``, ``experts``, ``shared_experts``,
        ``layer_norms``, ``final_norm``, ``head``, ``mtp``; biases are in the term of their matrix.
    """
    norm = norm_parameters(model, model.hidden_size)
    num_moe_layers = model.num_moe_layers
    num_experts = 0 if model.moe is None else model.moe.num_experts
    return {
        "token_embedding": token_embedding_parameters(model),
        "position_embedding": position_parameters(model),
        "embedding_norm": norm if model.has_embedding_norm else 0,
        "qkv": model.num_layers * qkv_parameters(model),
        "attention_output": model.num_layers * output_projection_parameters(model),
        "qk_norm": model.num_layers * qk_norm_parameters(model),
        "attention_sinks": model.num_layers * model.num_attention_heads * model.has_attention_sinks,
        "dense_mlp": (model.num_layers - num_moe_layers) * dense_mlp_parameters(model),
        "router": num_moe_layers * router_parameters(model),
        "experts": num_moe_layers * num_experts * expert_parameters(model),
        "shared_experts": num_moe_layers * shared_expert_parameters(model),
        "layer_norms": model.num_layers * model.norms_per_layer * norm,
        "final_norm": norm if model.has_final_norm else 0,
        "head": head_parameters(model),
        "mtp": mtp_parameters(model),
    }
