"""The exact operator shapes of one model: what its layers launch on one tensor parallel rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from meshwright.profiler.suites.limits import Shape
from meshwright.simcore.domain.model import ModelSpec

__all__ = [
    "model_attention_shapes",
    "model_decode_shapes",
    "model_gemm_shapes",
    "model_mla_shapes",
    "model_moe_shapes",
]

# More values of m than these seven do not lower the error of the fit.
_NUM_TOKENS = (1, 16, 64, 256, 1024, 4096, 32768)
_PREFILL = ((1, 512), (1, 2048), (4, 2048), (1, 4096), (1, 8192), (1, 32768))
_DECODE_BATCHES, _DECODE_LENGTHS = (1, 8, 64, 256), (512, 2048, 8192, 32768)
_MOE_TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
_MOE_EP = (1, 8, 32)


def model_gemm_shapes(model: ModelSpec, tp: Sequence[int] = (1, 2, 4, 8)) -> tuple[Shape, ...]:
    """Return ``m, n, k`` of every projection of a model, for seven numbers of tokens and each degree that fits.

    Attention, dense and shared MLPs and the LM head; latent attention has its compressing products, which no
    degree divides. Routed experts are :func:`model_moe_shapes`.

    Examples
    --------
    >>> from meshwright.simcore.domain.model_catalog import load_model
    >>> shapes = model_gemm_shapes(load_model("llama-3-8b"), tp=(1,))
    >>> sorted({(shape["n"], shape["k"]) for shape in shapes})
    [(4096, 4096), (4096, 14336), (6144, 4096), (28672, 4096), (128256, 4096)]
    """
    widths = dict.fromkeys(pair for degree in _fitting(model, tp) for pair in _widths(model, degree))
    return tuple({"m": m, "n": n, "k": k} for n, k in widths for m in _NUM_TOKENS)


def model_attention_shapes(model: ModelSpec, tp: Sequence[int] = (1, 2, 4, 8)) -> tuple[Shape, ...]:
    """Return the shapes of whole sequences through a model's heads; none for latent attention."""
    return _each_once(
        {
            "batch_size": batch,
            "sequence_length": length,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": model.head_dim,
        }
        for heads, kv_heads in _heads(model, tp)
        for batch, length in _PREFILL
    )


def model_decode_shapes(model: ModelSpec, tp: Sequence[int] = (1, 2, 4, 8)) -> tuple[Shape, ...]:
    """Return the shapes of decode steps through a model's heads; none for latent attention."""
    return _each_once(
        {
            "batch_size": batch,
            "context_length": length,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": model.head_dim,
        }
        for heads, kv_heads in _heads(model, tp)
        for batch in _DECODE_BATCHES
        for length in _DECODE_LENGTHS
    )


def model_mla_shapes(
    model: ModelSpec, tp: Sequence[int] = (1, 2, 4, 8)
) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """Return the shapes of latent prefill and decode; none for other attention."""
    if model.mla is None:
        return (), ()
    heads = [model.num_attention_heads // degree for degree in _fitting(model, tp)]
    return (
        tuple(
            {"batch_size": batch, "sequence_length": length, "num_heads": each}
            for each in heads
            for batch, length in _PREFILL
        ),
        tuple(
            {"batch_size": batch, "context_length": length, "num_heads": each}
            for each in heads
            for batch in _DECODE_BATCHES
            for length in _DECODE_LENGTHS
        ),
    )


def model_moe_shapes(model: ModelSpec, tp: Sequence[int] = (1, 2, 4, 8)) -> tuple[Shape, ...]:
    """Return the shapes of a model's routed experts, balanced and skewed; none for a dense model."""
    moe = model.moe
    if moe is None:
        return ()
    return tuple(
        {
            "num_tokens": tokens,
            "hidden_size": model.hidden_size,
            "moe_ffn_hidden_size": moe.moe_ffn_hidden_size,
            "top_k": moe.top_k,
            "num_experts": moe.num_experts,
            "tp": degree,
            "ep": ep,
            "skew": skew,
        }
        for degree in tp
        if moe.moe_ffn_hidden_size % degree == 0
        for ep in _MOE_EP
        if moe.num_experts % ep == 0
        for skew in (0.0, 1.2)
        for tokens in _MOE_TOKENS
    )


def _fitting(model: ModelSpec, tp: Sequence[int]) -> tuple[int, ...]:
    """Return the degrees that divide the heads."""
    return tuple(degree for degree in tp if model.num_attention_heads % degree == 0)


def _heads(model: ModelSpec, tp: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield query and key-value heads of a rank; with fewer key-value heads than ranks each keeps a copy of one."""
    if model.mla is None:
        for degree in _fitting(model, tp):
            yield model.num_attention_heads // degree, max(1, model.num_query_groups // degree)


def _widths(model: ModelSpec, degree: int) -> Iterator[tuple[int, int]]:
    """Yield output and input width of each product of a layer, and of the LM head, on one rank."""
    hidden = model.hidden_size
    gates = 2 if model.is_gated_mlp else 1
    heads = model.num_attention_heads // degree
    mla = model.mla
    if mla is None:
        kv_heads = max(1, model.num_query_groups // degree)
        yield (heads + 2 * kv_heads) * model.head_dim, hidden
        yield hidden, heads * model.head_dim
    else:
        key_width = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        if mla.q_lora_rank is not None:
            yield mla.q_lora_rank, hidden
        yield heads * key_width, mla.q_lora_rank or hidden
        yield mla.kv_lora_rank + mla.qk_rope_head_dim, hidden
        yield heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank
        yield hidden, heads * mla.v_head_dim
    if model.num_moe_layers < model.num_layers and model.ffn_hidden_size % degree == 0:
        yield gates * model.ffn_hidden_size // degree, hidden
        yield hidden, model.ffn_hidden_size // degree
    if model.moe is not None:
        yield model.moe.num_experts, hidden
        shared = model.moe.shared_ffn_hidden_size
        if shared and shared % degree == 0:
            yield gates * shared // degree, hidden
            yield hidden, shared // degree
    # Padded as tensor parallel embeddings are.
    yield -(-model.vocab_size // degree), hidden


def _each_once(shapes: Iterable[Shape]) -> tuple[Shape, ...]:
    return tuple({tuple(shape.values()): shape for shape in shapes}.values())
