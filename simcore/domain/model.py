"""What a model is: the shape of a decoder-only transformer, and its exact parameter counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from meshwright.errors import SpecError, did_you_mean
from meshwright.simcore.domain import model_parameters

__all__ = [
    "NORMALIZATIONS",
    "POSITION_EMBEDDINGS",
    "LinearAttentionSpec",
    "MlaSpec",
    "ModelSpec",
    "MoeSpec",
    "Normalization",
    "PositionEmbedding",
]

Normalization = Literal["rmsnorm", "layernorm", "layernorm_nobias"]
PositionEmbedding = Literal["rope", "learned", "alibi", "none"]
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)
POSITION_EMBEDDINGS: tuple[str, ...] = get_args(PositionEmbedding)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """Mixture-of-experts layers.

    Layer ``i`` (from 0) is MoE when ``i >= num_dense_layers`` and ``i - num_dense_layers`` is a multiple of
    ``layer_frequency``.

    Parameters
    ----------
    num_experts, top_k : int
        Routed experts per layer and experts per token.
    moe_ffn_hidden_size : int
        FFN width of one routed expert.
    shared_ffn_hidden_size : int
        Total FFN width of the shared experts; 0 without any.
    num_dense_layers : int
        Leading layers that keep a dense MLP.
    layer_frequency : int
        After them every ``layer_frequency``-th layer is MoE; 1 is all of them.
    num_expert_groups, top_k_groups : int
        Group-limited routing: the experts stand in ``num_expert_groups`` groups and a token reaches only
        ``top_k_groups`` of them (DeepSeek-V2 and V3: at most that many nodes).
    has_shared_expert_gate, has_router_bias : bool
        Extra router parameters: Qwen2-MoE's shared gate; one number per expert, GPT-OSS's router bias or
        DeepSeek-V3's score correction.
    """

    num_experts: int
    top_k: int
    moe_ffn_hidden_size: int
    shared_ffn_hidden_size: int = 0
    num_dense_layers: int = 0
    layer_frequency: int = 1
    num_expert_groups: int = 1
    top_k_groups: int = 1
    has_shared_expert_gate: bool = False
    has_router_bias: bool = False

    def __post_init__(self) -> None:
        _check_at_least(self, "moe", 1, ("num_experts", "top_k", "moe_ffn_hidden_size", "layer_frequency"))
        _check_at_least(self, "moe", 0, ("shared_ffn_hidden_size", "num_dense_layers"))
        _check_at_least(self, "moe", 1, ("num_expert_groups", "top_k_groups"))
        if self.top_k_groups > self.num_expert_groups:
            raise SpecError(
                f"moe.top_k_groups {self.top_k_groups} is more than moe.num_expert_groups {self.num_expert_groups}"
            )
        if self.top_k > self.num_experts:
            raise SpecError(f"moe.top_k {self.top_k} is more than moe.num_experts {self.num_experts}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Parameters
    ----------
    q_lora_rank : int | None
        Width of the query latent; None projects queries straight from the hidden state (V2-Lite).
    kv_lora_rank : int
        Width of the latent that the KV cache holds, beside one rotary key of ``qk_rope_head_dim``.
    qk_nope_head_dim, qk_rope_head_dim : int
        Parts of a query and key head without and with rotary positions.
    v_head_dim : int
        Size of a value head.
    index_top_k : int | None
        Keys that an indexer picks for each query (DeepSeek Sparse Attention, arXiv 2512.02556, section 2.1); None
        attends to all.
    index_num_heads, index_head_dim : int
        Heads of the indexer and their size; its one key per token has the same size.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_top_k: int | None = None
    index_num_heads: int = 0
    index_head_dim: int = 0

    def __post_init__(self) -> None:
        _check_at_least(
            self, "mla", 1, ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise SpecError(f"mla.q_lora_rank must be at least 1 or absent, not {self.q_lora_rank}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAttentionSpec:
    """Gated delta rule in place of attention over a cache (Gated DeltaNet, arXiv 2412.06464; Qwen3-Next, Qwen3.5).

    Parameters
    ----------
    num_key_heads, num_value_heads : int
        Heads of keys and queries, and of values; each value head keeps a state of ``key_head_dim x value_head_dim``.
    key_head_dim, value_head_dim : int
        Sizes of a key and a value head.
    conv_kernel_size : int
        Taps of the causal convolution over queries, keys and values.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel_size: int = 4

    def __post_init__(self) -> None:
        fields = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_size")
        _check_at_least(self, "linear_attention", 1, fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer.

    Parameters
    ----------
    name : str
        Preset id or the name in the user's file.
    num_layers, hidden_size, ffn_hidden_size : int
        Depth, width and dense-MLP width.
    num_attention_heads, num_query_groups, head_dim : int
        Query heads, key/value heads (equal without GQA, 1 for MQA) and the size of a query and key head (with
        MLA its two parts together).
    vocab_size : int
        Rows of the embedding table as stored in the checkpoint.
    max_position_embeddings : int
        Longest context the configuration states; rows of the table when positions are learned.
    is_gated_mlp : bool
        SwiGLU/GeGLU (three matrices) instead of two.
    has_tied_embeddings : bool
        LM head shares the embedding table.
    normalization : Normalization
        ``rmsnorm`` (weight), ``layernorm`` (weight and bias), ``layernorm_nobias`` (weight only, MPT).
    norms_per_layer : int
        2 usually, 1 for a shared parallel-block norm (Falcon-7B, GPT-J), 4 for Gemma-2's sandwich.
    has_final_norm, has_embedding_norm : bool
        Norm before the head; norm after the embedding (BLOOM).
    position_embedding : PositionEmbedding
        Only ``learned`` owns parameters: hidden x (``max_position_embeddings`` + ``num_reserved_positions``).
    num_reserved_positions : int
        Rows of a learned table that no token uses; OPT keeps 2.
    has_qkv_bias, has_attention_output_bias, has_mlp_bias, has_head_bias : bool
        Bias vectors of the projections; ``has_mlp_bias`` holds for experts too (GPT-OSS).
    has_attention_sinks : bool
        One learned logit per head beside the keys (GPT-OSS).
    has_qk_norm : bool
        Norms over queries and keys.
    is_qk_norm_per_head : bool
        All heads share ``head_dim`` weights (Qwen3, Gemma-3); else one weight per channel (MiniMax-M2).
    has_parallel_block : bool
        Attention and MLP read the same input and share one residual (GPT-NeoX, Falcon, MegaScale).
    sliding_window : int | None
        Keys each query sees in windowed layers; None for full attention everywhere.
    has_attention_output_gate : bool
        A gate as wide as the heads scales the attention's output (Qwen3-Next, Qwen3.5).
    linear_attention : LinearAttentionSpec | None
        What the layers between every ``full_attention_interval``-th one have in place of attention.
    full_attention_interval : int | None
        With a window or linear attention, every ``full_attention_interval``-th layer still attends to everything: 2 for Gemma-2
        and GPT-OSS, 6 for Gemma-3; None when all layers are windowed.
    moe, mla : MoeSpec | None, MlaSpec | None
        Described and counted; not every cost model prices them.
    num_mtp_layers : int
        Multi-token-prediction modules kept in the published checkpoint.

    Notes
    -----
    Parameter counts are properties; :mod:`meshwright.simcore.domain.model_parameters` has one function per
    term, with its formula.
    """

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    is_gated_mlp: bool
    has_tied_embeddings: bool
    normalization: Normalization = "rmsnorm"
    norms_per_layer: int = 2
    has_final_norm: bool = True
    has_embedding_norm: bool = False
    position_embedding: PositionEmbedding = "rope"
    num_reserved_positions: int = 0
    has_qkv_bias: bool = False
    has_attention_output_bias: bool = False
    has_mlp_bias: bool = False
    has_head_bias: bool = False
    has_attention_sinks: bool = False
    has_qk_norm: bool = False
    is_qk_norm_per_head: bool = True
    has_parallel_block: bool = False
    has_attention_output_gate: bool = False
    linear_attention: LinearAttentionSpec | None = None
    sliding_window: int | None = None
    full_attention_interval: int | None = None
    moe: MoeSpec | None = None
    mla: MlaSpec | None = None
    num_mtp_layers: int = 0

    def __post_init__(self) -> None:
        where = f"model {self.name}"
        _check_at_least(self, where, 1, _SIZES)
        for field in _SIZES:
            if getattr(self, field) > _MAX_SIZE:
                raise SpecError(f"{where}: {field} must be at most {_MAX_SIZE}, not {getattr(self, field)}")
        _check_at_least(self, where, 0, ("norms_per_layer", "num_reserved_positions", "num_mtp_layers"))
        for field, known in (("normalization", NORMALIZATIONS), ("position_embedding", POSITION_EMBEDDINGS)):
            value = getattr(self, field)
            if value not in known:
                raise SpecError(
                    f"{where}: {field}: unknown value '{value}'{did_you_mean(value, known) or '.'} "
                    f"Known: {', '.join(known)}."
                )
        for field in ("sliding_window", "full_attention_interval"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise SpecError(f"{where}: {field} must be at least 1 or absent, not {value}")
        if self.linear_attention is not None and self.full_attention_interval is None:
            raise SpecError(f"{where}: linear_attention needs full_attention_interval beside it")
        if self.num_attention_heads % self.num_query_groups:
            raise SpecError(
                f"{where}: num_attention_heads {self.num_attention_heads} must be a multiple "
                f"of num_query_groups {self.num_query_groups}"
            )

    @property
    def num_parameters(self) -> int:
        """All distinct parameters: main model and multi-token-prediction modules, tied tables once."""
        return self.num_main_parameters + model_parameters.mtp_parameters(self)

    @property
    def num_main_parameters(self) -> int:
        """Parameters without multi-token-prediction modules: the usual figure (DeepSeek-V3: 671B)."""
        num_moe_layers = self.num_moe_layers
        norm = model_parameters.norm_parameters(self, self.hidden_size)
        return (
            self.num_embedding_parameters
            + (self.num_layers - num_moe_layers) * self.num_layer_parameters
            + num_moe_layers * self.num_moe_layer_parameters
            + self.num_linear_layers * model_parameters.linear_attention_difference(self)
            + self.has_final_norm * norm
            + self.num_head_parameters
        )

    @property
    def num_checkpoint_parameters(self) -> int:
        """Parameters as stored: each multi-token-prediction module repeats token table and LM head."""
        repeated = 2 * self.vocab_size * self.hidden_size
        return self.num_parameters + self.num_mtp_layers * repeated

    @property
    def num_active_parameters(self) -> int:
        """Parameters one token passes: the main model without the experts its routers leave out.

        Token table and LM head count; some model cards leave one or both out of "active".
        """
        if self.moe is None:
            return self.num_main_parameters
        num_idle_experts = self.moe.num_experts - self.moe.top_k
        return self.num_main_parameters - self.num_moe_layers * num_idle_experts * self.num_expert_parameters

    @property
    def num_moe_layers(self) -> int:
        """Layers whose MLP is a mixture of experts; 0 for a dense model."""
        if self.moe is None:
            return 0
        # Ceiling division: layers num_dense_layers, num_dense_layers + layer_frequency, ...
        return max(0, -(-(self.num_layers - self.moe.num_dense_layers) // self.moe.layer_frequency))

    @property
    def num_linear_layers(self) -> int:
        """Layers with linear attention; 0 without any."""
        if self.linear_attention is None or self.full_attention_interval is None:
            return 0
        return self.num_layers - self.num_layers // self.full_attention_interval

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one dense layer: attention, MLP and norms."""
        return model_parameters.layer_parameters(self)

    @property
    def num_moe_layer_parameters(self) -> int:
        """Parameters of one mixture-of-experts layer with all its experts; 0 for a dense model."""
        return model_parameters.moe_layer_parameters(self)

    @property
    def num_expert_parameters(self) -> int:
        """Parameters of one routed expert; 0 for a dense model."""
        return model_parameters.expert_parameters(self)

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters before the first layer: token table, learned positions, embedding norm."""
        norm = model_parameters.norm_parameters(self, self.hidden_size)
        tables = model_parameters.token_embedding_parameters(self) + model_parameters.position_parameters(
            self
        )
        return tables + self.has_embedding_norm * norm

    @property
    def num_head_parameters(self) -> int:
        """Parameters the LM head adds; 0 when it shares the token table."""
        return model_parameters.head_parameters(self)


# Beyond any model; larger ones are slips of a finger, and their products would leave 64 bits.
_MAX_SIZE = 100_000_000
_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


def _check_at_least(spec: object, where: str, minimum: int, fields: tuple[str, ...]) -> None:
    for field in fields:
        value = getattr(spec, field)
        if value < minimum:
            raise SpecError(f"{where}: {field} must be at least {minimum}, not {value}")
