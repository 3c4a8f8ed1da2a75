"""Rotary-position families of Hugging Face configurations; absent keys default as in each family's class."""

from __future__ import annotations

from dataclasses import replace

from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.model_config import ModelConfig

__all__ = [
    "cohere",
    "gemma",
    "gemma2",
    "gemma3",
    "glm",
    "glm4",
    "internlm",
    "internlm2",
    "llama",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen_window",
    "rotary_model",
    "with_window",
]


def rotary_model(
    config: ModelConfig,
    name: str,
    *,
    num_attention_heads: int | None = None,
    num_query_groups: int | None = None,
    head_dim: int | None = None,
    vocab_size: int | None = None,
    is_tied: bool = False,
) -> ModelSpec:
    """Return the common shape: RMSNorm, gated MLP, rotary positions, no biases.

    The keyword arguments are the family's defaults for absent keys. Without one for ``head_dim`` it is
    ``hidden_size / num_attention_heads``; without one for ``num_query_groups``, the number of heads (which a
    null ``num_key_value_heads`` always means).
    """
    num_heads = config.integer("num_attention_heads", default=num_attention_heads)
    if config.has("num_key_value_heads") or num_query_groups is None:
        num_query_groups = num_heads
    return ModelSpec(
        name=name,
        num_layers=config.integer("num_hidden_layers"),
        hidden_size=config.integer("hidden_size"),
        ffn_hidden_size=config.integer("intermediate_size"),
        num_attention_heads=num_heads,
        num_query_groups=config.integer("num_key_value_heads", default=num_query_groups),
        head_dim=config.optional_integer("head_dim") or head_dim or even_head_dim(config, num_heads),
        vocab_size=config.integer("vocab_size", default=vocab_size),
        max_position_embeddings=config.integer("max_position_embeddings", default=2048),
        is_gated_mlp=True,
        has_tied_embeddings=config.boolean("tie_word_embeddings", default=is_tied),
    )


def even_head_dim(config: ModelConfig, num_heads: int) -> int:
    """Return ``hidden_size / num_attention_heads``, which must be whole."""
    hidden_size = config.integer("hidden_size", "n_embd", "d_model", "n_embed")
    if hidden_size % num_heads:
        raise config.error(
            "head_dim", f"is needed: hidden_size {hidden_size} does not divide into {num_heads} heads"
        )
    return hidden_size // num_heads


def llama(config: ModelConfig, name: str) -> ModelSpec:
    """Llama 1 to 3, and the many models published in its format."""
    has_bias = config.boolean("attention_bias", default=False)
    return replace(
        rotary_model(config, name),
        has_qkv_bias=has_bias,
        has_attention_output_bias=has_bias,
        has_mlp_bias=config.boolean("mlp_bias", default=False),
    )


def internlm(config: ModelConfig, name: str) -> ModelSpec:
    """InternLM 1: Llama with one switch for the attention biases (on in the 7B, off in the 20B)."""
    has_bias = config.boolean("bias", default=True)
    return replace(rotary_model(config, name), has_qkv_bias=has_bias, has_attention_output_bias=has_bias)


def internlm2(config: ModelConfig, name: str) -> ModelSpec:
    """InternLM 2 and 2.5."""
    has_bias = config.boolean("bias", default=False)
    return replace(rotary_model(config, name), has_qkv_bias=has_bias, has_attention_output_bias=has_bias)


def mistral(config: ModelConfig, name: str) -> ModelSpec:
    """Mistral: all layers windowed unless ``sliding_window`` is null."""
    window = config.optional_integer("sliding_window") if config.has("sliding_window") else 4096
    return replace(rotary_model(config, name, num_query_groups=8), sliding_window=window)


def qwen2(config: ModelConfig, name: str) -> ModelSpec:
    """Qwen1.5, Qwen2 and Qwen2.5: biases on the query, key and value projections only."""
    model = replace(rotary_model(config, name, num_query_groups=32), has_qkv_bias=True)
    return qwen_window(config, model)


def qwen3(config: ModelConfig, name: str) -> ModelSpec:
    """Qwen3: qk-norm, heads of 128."""
    has_bias = config.boolean("attention_bias", default=False)
    model = replace(
        rotary_model(config, name, num_query_groups=32, head_dim=128),
        has_qk_norm=True,
        has_qkv_bias=has_bias,
        has_attention_output_bias=has_bias,
    )
    return qwen_window(config, model)


def gemma(config: ModelConfig, name: str) -> ModelSpec:
    """Gemma 1: heads of 256, tied tables."""
    has_bias = config.boolean("attention_bias", default=False)
    model = rotary_model(config, name, num_query_groups=16, head_dim=256, vocab_size=256000, is_tied=True)
    return replace(model, has_qkv_bias=has_bias, has_attention_output_bias=has_bias)


def gemma2(config: ModelConfig, name: str) -> ModelSpec:
    """Gemma 2: norms before and after attention and MLP; every other layer windowed."""
    model = rotary_model(
        config,
        name,
        num_attention_heads=8,
        num_query_groups=4,
        head_dim=256,
        vocab_size=256000,
        is_tied=True,
    )
    has_bias = config.boolean("attention_bias", default=False)
    model = replace(model, norms_per_layer=4, has_qkv_bias=has_bias, has_attention_output_bias=has_bias)
    return with_window(config, model, default_window=4096, default_interval=2)


def gemma3(config: ModelConfig, name: str) -> ModelSpec:
    """Gemma 3 (text): Gemma 2 with qk-norm; one layer of six attends to everything."""
    model = rotary_model(
        config,
        name,
        num_attention_heads=8,
        num_query_groups=4,
        head_dim=256,
        vocab_size=262208,
        is_tied=True,
    )
    has_bias = config.boolean("attention_bias", default=False)
    model = replace(
        model,
        norms_per_layer=4,
        has_qk_norm=True,
        has_qkv_bias=has_bias,
        has_attention_output_bias=has_bias,
        max_position_embeddings=config.integer("max_position_embeddings", default=131072),
    )
    interval = config.integer("sliding_window_pattern", default=6)
    return with_window(config, model, default_window=4096, default_interval=interval)


def phi3(config: ModelConfig, name: str) -> ModelSpec:
    """Phi-3 and Phi-4."""
    return replace(rotary_model(config, name), sliding_window=config.optional_integer("sliding_window"))


def glm(config: ModelConfig, name: str) -> ModelSpec:
    """GLM-4 9B as first published."""
    model = rotary_model(config, name, num_query_groups=2, head_dim=128)
    return replace(model, has_qkv_bias=config.boolean("attention_bias", default=True))


def glm4(config: ModelConfig, name: str) -> ModelSpec:
    """GLM-4-0414: norms before and after attention and MLP."""
    return replace(glm(config, name), norms_per_layer=4)


def cohere(config: ModelConfig, name: str) -> ModelSpec:
    """Command R: one weight-only LayerNorm for a parallel block."""
    has_bias = config.boolean("attention_bias", default=False)
    has_qk_norm = config.boolean("use_qk_norm", default=False)
    return replace(
        rotary_model(config, name, is_tied=True),
        normalization="layernorm_nobias",
        norms_per_layer=1,
        has_parallel_block=True,
        has_qkv_bias=has_bias,
        has_attention_output_bias=has_bias,
        has_qk_norm=has_qk_norm,
        is_qk_norm_per_head=not has_qk_norm,
    )


def with_window(
    config: ModelConfig, model: ModelSpec, *, default_window: int, default_interval: int
) -> ModelSpec:
    """Return the model with the window its file states, layer by layer or by the family's interval."""
    window = config.optional_integer("sliding_window") if config.has("sliding_window") else default_window
    kinds = config.items("layer_types")
    if window is None:
        return model
    if not kinds:
        return replace(model, sliding_window=window, full_attention_interval=default_interval)
    full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    if not full:
        return replace(model, sliding_window=window)
    interval = full[0] + 1
    if len(kinds) != model.num_layers or full != list(range(full[0], len(kinds), interval)):
        raise config.error("layer_types", "must list every layer, full attention in every n-th of them")
    if interval == 1:
        return model
    return replace(model, sliding_window=window, full_attention_interval=interval)


def qwen_window(config: ModelConfig, model: ModelSpec) -> ModelSpec:
    """Return the model with Qwen's window: layers from ``max_window_layers`` on, only if switched on."""
    if not config.boolean("use_sliding_window", default=False):
        return model
    window = config.optional_integer("sliding_window") if config.has("sliding_window") else 4096
    first = config.integer("max_window_layers", default=28, minimum=0)
    if window is None or first >= model.num_layers:
        return model
    if first > 0:
        raise config.error(
            "max_window_layers",
            f"{first} windows only a part of {model.num_layers} layers, which is not modelled; set "
            "use_sliding_window to false to plan with full attention everywhere",
        )
    return replace(model, sliding_window=window)
