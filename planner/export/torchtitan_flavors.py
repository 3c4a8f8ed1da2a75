"""Models that torchtitan registers, by shape: the command line names one, it never states a dimension."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.simcore.domain.model import ModelSpec, MoeSpec

__all__ = ["Flavor", "find_flavor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavor:
    """One registered model (torchtitan 0.2.1 and 0.3.0, ``models/*/__init__.py``).

    Parameters
    ----------
    family, name : str
        Folder under ``torchtitan/models`` and key of its table.
    base : str
        Config function of 0.3 whose data, optimizer and vocabulary fit.
    num_layers, hidden_size, num_attention_heads, vocab_size : int
        Shape.
    num_query_groups : int
        Key/value heads; not compared with latent attention, which has none.
    ffn_hidden_size : int | None
        Dense MLP width; None where every layer is a mixture of experts.
    has_tied_embeddings : bool
        As in :class:`~meshwright.simcore.domain.model.ModelSpec`; queries and keys have norms in qwen3 only.
    experts : tuple[int, ...] | None
        Experts, experts per token, width of one, width of the shared ones, leading dense layers, groups of experts
        and those that a token reaches.
    query_latent : int | None
        Width of the query latent of DeepSeek's attention; None projects queries straight from the hidden state.
    longest_sequence : int
        Tokens that the rotary positions of 0.3 reach.
    has_ring_attention : bool
        Built on plain SDPA in 0.2, which is what context parallelism there needs.
    """

    family: str
    name: str
    base: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int | None
    vocab_size: int
    longest_sequence: int
    has_tied_embeddings: bool = False
    experts: tuple[int, ...] | None = None
    query_latent: int | None = None
    has_ring_attention: bool = True


def _llama3(name: str, layers: int, hidden: int, heads: int, ffn: int, *, is_tied: bool = False) -> Flavor:
    return Flavor(
        family="llama3",
        name=name,
        base="llama3_8b",
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=8,
        ffn_hidden_size=ffn,
        vocab_size=128256,
        longest_sequence=131072,
        has_tied_embeddings=is_tied,
    )


def _qwen3(
    name: str, layers: int, hidden: int, heads: int, ffn: int | None, *, groups: int = 8, is_tied: bool = False,
    experts: tuple[int, ...] | None = None,
) -> Flavor:  # fmt: skip
    return Flavor(
        family="qwen3",
        name=name,
        base="qwen3_14b",
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=ffn,
        vocab_size=151936,
        longest_sequence=40960,
        has_tied_embeddings=is_tied,
        experts=experts,
    )


def _deepseek(
    name: str,
    layers: int,
    hidden: int,
    heads: int,
    ffn: int,
    experts: tuple[int, ...],
    query_latent: int | None,
) -> Flavor:
    is_largest = name == "671B"
    return Flavor(
        family="deepseek_v3",
        name=name,
        base="deepseek_v3_671b" if is_largest else "deepseek_v3_16b",
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        ffn_hidden_size=ffn,
        vocab_size=129280 if is_largest else 102400,
        longest_sequence=16384,
        experts=experts,
        query_latent=query_latent,
        has_ring_attention=False,
    )


#: Flavors of both releases; llama3 1B and 3B are of 0.3 only.
_FLAVORS = (
    _llama3("1B", 16, 2048, 32, 8192, is_tied=True),
    _llama3("3B", 28, 3072, 24, 8192, is_tied=True),
    _llama3("8B", 32, 4096, 32, 14336),
    _llama3("70B", 80, 8192, 64, 28672),
    _llama3("405B", 126, 16384, 128, 53248),
    _qwen3("0.6B", 28, 1024, 16, 3072, is_tied=True),
    _qwen3("1.7B", 28, 2048, 16, 6144, is_tied=True),
    _qwen3("4B", 36, 2560, 32, 9728, is_tied=True),
    _qwen3("8B", 36, 4096, 32, 12288),
    _qwen3("14B", 40, 5120, 40, 17408),
    _qwen3("32B", 64, 5120, 64, 25600),
    _qwen3("30B-A3B", 48, 2048, 32, None, groups=4, experts=(128, 8, 768, 0, 0, 1, 1)),
    _qwen3("235B-A22B", 94, 4096, 64, None, groups=4, experts=(128, 8, 1536, 0, 0, 1, 1)),
    _deepseek("16B", 27, 2048, 16, 10944, (64, 6, 1408, 2816, 1, 1, 1), None),
    _deepseek("236B", 60, 5120, 128, 12288, (160, 6, 1536, 3072, 1, 8, 3), 1536),
    _deepseek("671B", 61, 7168, 128, 18432, (256, 8, 2048, 2048, 3, 8, 4), 1536),
)
#: All of them share these dimensions of latent attention: key/value latent, head without and with rope, value head.
_LATENT_ATTENTION = (512, 128, 64, 128)
_ONLY_IN_0_3 = (("llama3", "1B"), ("llama3", "3B"))


def find_flavor(model: ModelSpec, release: str) -> Flavor | None:
    """Return the registered model of this shape, None when there is none.

    Parameters
    ----------
    model : ModelSpec
        What the plan is for.
    release : str
        Version of torchtitan, ``0.2.1`` or ``0.3.0``.
    """
    for flavor in _FLAVORS:
        if release.startswith("0.2") and (flavor.family, flavor.name) in _ONLY_IN_0_3:
            continue
        if _is_same(flavor, model):
            return flavor
    return None


def _is_same(flavor: Flavor, model: ModelSpec) -> bool:
    compared = (
        (flavor.num_layers, model.num_layers),
        (flavor.hidden_size, model.hidden_size),
        (flavor.num_attention_heads, model.num_attention_heads),
        (flavor.vocab_size, model.vocab_size),
        (flavor.has_tied_embeddings, model.has_tied_embeddings),
        (flavor.experts, None if model.moe is None else _experts(model.moe)),
        (None, model.sliding_window),
    )
    if any(ours != theirs for ours, theirs in compared):
        return False
    if flavor.ffn_hidden_size not in (None, model.ffn_hidden_size):
        return False
    if model.mla is None:
        own = ("qwen3" if model.has_qk_norm else "llama3", model.num_query_groups)
        return own == (flavor.family, flavor.num_query_groups)
    latent = model.mla
    dimensions = (latent.kv_lora_rank, latent.qk_nope_head_dim, latent.qk_rope_head_dim, latent.v_head_dim)
    return (flavor.family, flavor.query_latent) == ("deepseek_v3", latent.q_lora_rank) and (
        dimensions == _LATENT_ATTENTION
    )


def _experts(moe: MoeSpec) -> tuple[int, ...]:
    return (
        moe.num_experts,
        moe.top_k,
        moe.moe_ffn_hidden_size,
        moe.shared_ffn_hidden_size,
        moe.num_dense_layers,
        moe.num_expert_groups,
        moe.top_k_groups,
    )
