"""Mixture-of-experts families of Hugging Face configurations."""

from __future__ import annotations

from dataclasses import replace

from meshwright.simcore.domain.model import MlaSpec, ModelSpec, MoeSpec
from meshwright.simcore.domain.model_config import ModelConfig
from meshwright.simcore.domain.model_families import qwen_window, rotary_model, with_window

__all__ = ["deepseek_v2", "deepseek_v3", "gpt_oss", "minimax_m2", "mixtral", "qwen2_moe", "qwen3_moe"]


def mixtral(config: ModelConfig, name: str) -> ModelSpec:
    """Mixtral: every layer is MoE and ``intermediate_size`` is an expert's width."""
    model = rotary_model(config, name, num_query_groups=8)
    moe = MoeSpec(
        num_experts=config.integer("num_local_experts", default=8),
        top_k=config.integer("num_experts_per_tok", default=2),
        moe_ffn_hidden_size=model.ffn_hidden_size,
    )
    return replace(model, moe=moe, sliding_window=config.optional_integer("sliding_window"))


def minimax_m2(config: ModelConfig, name: str) -> ModelSpec:
    """MiniMax-M2: norms over whole query and key projections, score correction in the router."""
    if config.text("qk_norm_type", default="per_layer") != "per_layer":
        raise config.error("qk_norm_type", "is not 'per_layer', the only kind known for this family")
    if config.integer("shared_intermediate_size", default=0, minimum=0):
        raise config.error(
            "shared_intermediate_size", "is not 0: shared experts are not known for this family"
        )
    model = rotary_model(config, name)
    moe = MoeSpec(
        num_experts=config.integer("num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        moe_ffn_hidden_size=model.ffn_hidden_size,
        has_router_bias=config.boolean("use_routing_bias", default=True),
    )
    has_qk_norm = config.boolean("use_qk_norm", default=True)
    return replace(model, moe=moe, has_qk_norm=has_qk_norm, is_qk_norm_per_head=not has_qk_norm)


def gpt_oss(config: ModelConfig, name: str) -> ModelSpec:
    """GPT-OSS: biases everywhere, experts and router too; attention sinks; every other layer windowed."""
    model = rotary_model(config, name, num_query_groups=8, head_dim=64)
    moe = MoeSpec(
        num_experts=config.integer("num_local_experts", "num_experts", default=128),
        top_k=config.integer("num_experts_per_tok", "experts_per_token", default=4),
        moe_ffn_hidden_size=model.ffn_hidden_size,
        has_router_bias=True,
    )
    has_bias = config.boolean("attention_bias", default=True)
    model = replace(
        model,
        moe=moe,
        has_qkv_bias=has_bias,
        has_attention_output_bias=has_bias,
        has_mlp_bias=True,
        has_attention_sinks=True,
    )
    return with_window(config, model, default_window=128, default_interval=2)


def qwen2_moe(config: ModelConfig, name: str) -> ModelSpec:
    """Qwen1.5-MoE and Qwen2-MoE: one gated shared expert."""
    model = rotary_model(config, name, num_query_groups=16)
    shared = config.integer("shared_expert_intermediate_size", default=5632, minimum=0)
    moe = _qwen_moe(config, model.num_layers, num_experts=60, top_k=4, width=1408)
    if moe is not None:
        moe = replace(moe, shared_ffn_hidden_size=shared, has_shared_expert_gate=shared > 0)
    model = replace(model, moe=moe, has_qkv_bias=config.boolean("qkv_bias", default=True))
    return qwen_window(config, model)


def qwen3_moe(config: ModelConfig, name: str) -> ModelSpec:
    """Qwen3-MoE: qk-norm, no shared expert."""
    model = rotary_model(config, name, num_query_groups=4)
    has_bias = config.boolean("attention_bias", default=False)
    model = replace(
        model,
        moe=_qwen_moe(config, model.num_layers, num_experts=128, top_k=8, width=768),
        has_qk_norm=True,
        has_qkv_bias=has_bias,
        has_attention_output_bias=has_bias,
    )
    return qwen_window(config, model)


def _qwen_moe(
    config: ModelConfig, num_layers: int, *, num_experts: int, top_k: int, width: int
) -> MoeSpec | None:
    """Return the MoE layout; layer ``i`` is MoE when ``(i + 1) % step == 0`` and it is not MLP-only."""
    num_experts = config.integer("num_experts", "num_local_experts", default=num_experts, minimum=0)
    if num_experts == 0:
        return None
    step = config.integer("decoder_sparse_step", default=1)
    dense_layers = config.items("mlp_only_layers")
    num_dense_layers = len(dense_layers) if dense_layers else step - 1
    if dense_layers and (step != 1 or dense_layers != list(range(num_dense_layers))):
        raise config.error(
            "mlp_only_layers",
            "is supported for leading layers with decoder_sparse_step 1 only; write a YAML preset",
        )
    if num_dense_layers >= num_layers:
        return None
    return MoeSpec(
        num_experts=num_experts,
        top_k=config.integer("num_experts_per_tok", default=top_k),
        moe_ffn_hidden_size=config.integer("moe_intermediate_size", default=width),
        num_dense_layers=num_dense_layers,
        layer_frequency=step,
    )


def deepseek_v2(config: ModelConfig, name: str) -> ModelSpec:
    """DeepSeek-V2 and V2-Lite: MLA, shared experts, leading dense layers."""
    return _deepseek(config, name, num_dense_layers=0, topk_method="greedy")


def deepseek_v3(config: ModelConfig, name: str) -> ModelSpec:
    """DeepSeek-V3, R1 and Kimi K2: V2 with a score correction per expert and multi-token prediction."""
    return _deepseek(config, name, num_dense_layers=3, topk_method="noaux_tc")


def _deepseek(config: ModelConfig, name: str, *, num_dense_layers: int, topk_method: str) -> ModelSpec:
    mla = MlaSpec(
        # Absent means the class default, null means no query latent (V2-Lite).
        q_lora_rank=config.optional_integer("q_lora_rank") if config.has("q_lora_rank") else 1536,
        kv_lora_rank=config.integer("kv_lora_rank", default=512),
        qk_nope_head_dim=config.integer("qk_nope_head_dim", default=128),
        qk_rope_head_dim=config.integer("qk_rope_head_dim", default=64),
        v_head_dim=config.integer("v_head_dim", default=128),
    )
    moe = None
    if config.optional_integer("n_routed_experts", minimum=0):
        width = config.integer("moe_intermediate_size")
        frequency = config.integer("moe_layer_freq", default=1)
        first = config.integer("first_k_dense_replace", default=num_dense_layers, minimum=0)
        moe = MoeSpec(
            num_experts=config.integer("n_routed_experts"),
            top_k=config.integer("num_experts_per_tok"),
            moe_ffn_hidden_size=width,
            shared_ffn_hidden_size=width * config.integer("n_shared_experts", default=0, minimum=0),
            # Its layers are MoE where i >= first and i % frequency == 0: round first up to a multiple.
            num_dense_layers=-(-first // frequency) * frequency,
            layer_frequency=frequency,
            num_expert_groups=config.optional_integer("n_group") or 1,
            top_k_groups=config.optional_integer("topk_group") or 1,
            has_router_bias=config.text("topk_method", default=topk_method) == "noaux_tc",
        )
    has_bias = config.boolean("attention_bias", default=False)
    num_attention_heads = config.integer("num_attention_heads")
    model = rotary_model(
        config,
        name,
        num_query_groups=num_attention_heads,
        head_dim=mla.qk_nope_head_dim + mla.qk_rope_head_dim,
    )
    return replace(
        model,
        # The file's head_dim, where a tool has added one, is the rotary part only.
        num_query_groups=num_attention_heads,
        head_dim=mla.qk_nope_head_dim + mla.qk_rope_head_dim,
        mla=mla,
        moe=moe,
        has_qkv_bias=has_bias,
        has_attention_output_bias=has_bias,
        num_mtp_layers=config.integer("num_nextn_predict_layers", default=0, minimum=0),
    )
