"""Older families of Hugging Face configurations: LayerNorm, two-matrix MLPs of four times the width."""

from __future__ import annotations

from meshwright.simcore.domain.model import ModelSpec, PositionEmbedding
from meshwright.simcore.domain.model_config import ModelConfig
from meshwright.simcore.domain.model_families import even_head_dim

__all__ = ["bloom", "falcon", "gpt2", "gpt_neox", "gptj", "mpt", "opt", "phi"]


def gpt2(config: ModelConfig, name: str) -> ModelSpec:
    """GPT-2: learned positions, biases everywhere."""
    hidden_size = config.integer("n_embd", "hidden_size")
    num_heads = config.integer("n_head", "num_attention_heads")
    return ModelSpec(
        name=name,
        num_layers=config.integer("n_layer", "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=config.integer("n_inner", default=4 * hidden_size),
        num_attention_heads=num_heads,
        num_query_groups=num_heads,
        head_dim=even_head_dim(config, num_heads),
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("n_positions", "max_position_embeddings", "n_ctx"),
        is_gated_mlp=False,
        has_tied_embeddings=config.boolean("tie_word_embeddings", default=True),
        normalization="layernorm",
        position_embedding="learned",
        has_qkv_bias=True,
        has_attention_output_bias=True,
        has_mlp_bias=True,
    )


def gptj(config: ModelConfig, name: str) -> ModelSpec:
    """GPT-J: parallel block with one norm, biases in the MLP and the head only."""
    hidden_size = config.integer("n_embd", "hidden_size")
    num_heads = config.integer("n_head", "num_attention_heads")
    return ModelSpec(
        name=name,
        num_layers=config.integer("n_layer", "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=config.integer("n_inner", default=4 * hidden_size),
        num_attention_heads=num_heads,
        num_query_groups=num_heads,
        head_dim=even_head_dim(config, num_heads),
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("n_positions", "max_position_embeddings"),
        is_gated_mlp=False,
        has_tied_embeddings=config.boolean("tie_word_embeddings", default=False),
        normalization="layernorm",
        norms_per_layer=1,
        has_mlp_bias=True,
        has_head_bias=True,
        has_parallel_block=True,
    )


def gpt_neox(config: ModelConfig, name: str) -> ModelSpec:
    """GPT-NeoX and Pythia: two norms, parallel block unless switched off."""
    has_bias = config.boolean("attention_bias", default=True)
    num_heads = config.integer("num_attention_heads")
    return ModelSpec(
        name=name,
        num_layers=config.integer("num_hidden_layers"),
        hidden_size=config.integer("hidden_size"),
        ffn_hidden_size=config.integer("intermediate_size"),
        num_attention_heads=num_heads,
        num_query_groups=num_heads,
        head_dim=even_head_dim(config, num_heads),
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("max_position_embeddings", default=2048),
        is_gated_mlp=False,
        has_tied_embeddings=config.boolean("tie_word_embeddings", default=False),
        normalization="layernorm",
        has_qkv_bias=has_bias,
        has_attention_output_bias=has_bias,
        has_mlp_bias=True,
        has_parallel_block=config.boolean("use_parallel_residual", default=True),
    )


def phi(config: ModelConfig, name: str) -> ModelSpec:
    """Phi-1, 1.5 and 2: parallel block with one norm, biases everywhere, head included."""
    num_heads = config.integer("num_attention_heads")
    return ModelSpec(
        name=name,
        num_layers=config.integer("num_hidden_layers"),
        hidden_size=config.integer("hidden_size"),
        ffn_hidden_size=config.integer("intermediate_size"),
        num_attention_heads=num_heads,
        num_query_groups=config.integer("num_key_value_heads", default=num_heads),
        head_dim=even_head_dim(config, num_heads),
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("max_position_embeddings", default=2048),
        is_gated_mlp=False,
        has_tied_embeddings=config.boolean("tie_word_embeddings", default=False),
        normalization="layernorm",
        norms_per_layer=1,
        has_qkv_bias=True,
        has_attention_output_bias=True,
        has_mlp_bias=True,
        has_head_bias=True,
        has_qk_norm=config.boolean("qk_layernorm", default=False),
        has_parallel_block=True,
    )


def falcon(config: ModelConfig, name: str) -> ModelSpec:
    """Falcon: multi-query (7B); grouped queries and two norms (``new_decoder_architecture``: 40B, 180B)."""
    hidden_size = config.integer("hidden_size", "n_embed")
    num_heads = config.integer("num_attention_heads", "n_head")
    is_new = config.boolean("new_decoder_architecture", default=False)
    if is_new:
        num_query_groups = config.integer("num_kv_heads", "n_head_kv", default=num_heads)
    else:
        num_query_groups = 1 if config.boolean("multi_query", default=True) else num_heads
    is_parallel = config.boolean("parallel_attn", default=True)
    num_parallel_norms = config.integer("num_ln_in_parallel_attn", default=2 if is_new else 1)
    has_bias = config.boolean("bias", default=False)
    return ModelSpec(
        name=name,
        num_layers=config.integer("num_hidden_layers", "n_layer"),
        hidden_size=hidden_size,
        ffn_hidden_size=config.integer("ffn_hidden_size", default=4 * hidden_size),
        num_attention_heads=num_heads,
        num_query_groups=num_query_groups,
        head_dim=even_head_dim(config, num_heads),
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("max_position_embeddings", default=2048),
        is_gated_mlp=False,
        has_tied_embeddings=config.boolean("tie_word_embeddings", default=True),
        normalization="layernorm",
        norms_per_layer=num_parallel_norms if is_parallel else 2,
        position_embedding="alibi" if config.boolean("alibi", default=False) else "rope",
        has_qkv_bias=has_bias,
        has_attention_output_bias=has_bias,
        has_mlp_bias=has_bias,
        has_parallel_block=is_parallel,
    )


def mpt(config: ModelConfig, name: str) -> ModelSpec:
    """MPT: ALiBi or learned positions; ``no_bias`` drops the norms' biases too."""
    hidden_size = config.integer("d_model", "hidden_size")
    num_heads = config.integer("n_heads", "num_attention_heads")
    attention = config.section("attn_config")
    kind = attention.text("attn_type", default="multihead_attention")
    num_query_groups = attention.integer(
        "kv_n_heads", default=1 if kind == "multiquery_attention" else num_heads
    )
    has_bias = not config.boolean("no_bias", default=True)
    has_qk_norm = attention.boolean("qk_ln", default=False)
    return ModelSpec(
        name=name,
        num_layers=config.integer("n_layers", "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=hidden_size * config.integer("expansion_ratio", default=4),
        num_attention_heads=num_heads,
        num_query_groups=num_query_groups,
        head_dim=even_head_dim(config, num_heads),
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("max_seq_len", default=2048),
        is_gated_mlp=False,
        has_tied_embeddings=config.boolean("tie_word_embeddings", default=True),
        normalization="layernorm" if has_bias else "layernorm_nobias",
        position_embedding=_mpt_positions(config, attention),
        has_qkv_bias=has_bias,
        has_attention_output_bias=has_bias,
        has_mlp_bias=has_bias,
        has_qk_norm=has_qk_norm,
        is_qk_norm_per_head=not has_qk_norm,
    )


def _mpt_positions(config: ModelConfig, attention: ModelConfig) -> PositionEmbedding:
    if attention.boolean("alibi", default=True):
        return "alibi"
    if attention.boolean("rope", default=False):
        return "rope"
    return "learned" if config.boolean("learned_pos_emb", default=True) else "none"


def bloom(config: ModelConfig, name: str) -> ModelSpec:
    """BLOOM: ALiBi, a norm after the embedding, biases everywhere."""
    hidden_size = config.integer("hidden_size", "n_embed")
    num_heads = config.integer("n_head", "num_attention_heads")
    return ModelSpec(
        name=name,
        num_layers=config.integer("n_layer", "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=4 * hidden_size,
        num_attention_heads=num_heads,
        num_query_groups=num_heads,
        head_dim=even_head_dim(config, num_heads),
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("seq_length", default=2048),
        is_gated_mlp=False,
        has_tied_embeddings=config.boolean("tie_word_embeddings", default=True),
        normalization="layernorm",
        has_embedding_norm=True,
        position_embedding="alibi",
        has_qkv_bias=True,
        has_attention_output_bias=True,
        has_mlp_bias=True,
    )


def opt(config: ModelConfig, name: str) -> ModelSpec:
    """OPT: learned positions with two unused rows, biases everywhere; post-norm has no final norm."""
    hidden_size = config.integer("hidden_size")
    if config.integer("word_embed_proj_dim", default=hidden_size) != hidden_size:
        raise config.error(
            "word_embed_proj_dim", "differs from hidden_size (as in OPT-350m), which is not modelled"
        )
    if not config.boolean("layer_norm_elementwise_affine", default=True):
        raise config.error(
            "layer_norm_elementwise_affine", "is false: norms without weights are not modelled"
        )
    num_heads = config.integer("num_attention_heads")
    has_bias = config.boolean("enable_bias", default=True)
    return ModelSpec(
        name=name,
        num_layers=config.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=config.integer("ffn_dim"),
        num_attention_heads=num_heads,
        num_query_groups=num_heads,
        head_dim=even_head_dim(config, num_heads),
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("max_position_embeddings", default=2048),
        is_gated_mlp=False,
        has_tied_embeddings=config.boolean("tie_word_embeddings", default=True),
        normalization="layernorm",
        has_final_norm=config.boolean("do_layer_norm_before", default=True)
        and not config.boolean("_remove_final_layer_norm", default=False),
        position_embedding="learned",
        num_reserved_positions=2,
        has_qkv_bias=has_bias,
        has_attention_output_bias=has_bias,
        has_mlp_bias=has_bias,
    )
