"""Attention of a serving step: decoding sequences over their caches, and prompts, each as a table over lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from meshwright.costmodels.serving.served import Column, ServedModel
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.serving import ServingPool

__all__ = ["DECODE_BATCH_SIZES", "decode_attention", "prefill_attention"]

DECODE_BATCH_SIZES = np.array([1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024], dtype=np.float64)
_CONTEXTS = np.array([1, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072], dtype=np.float64)
_PROMPT_LENGTHS = np.array(
    [128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768, 65536, 131072],
    dtype=np.float64,
)
# Sparse attention (aiconfigurator-core 0.12.0, tables dsa of sglang 0.5.14): scores, top-k and gather of a decode step take 20 us and read one 8-bit key
# per token; prompts compute at half of the 16-bit peak, 64 heads at least.
_INDEX_LATENCY, _SPARSE_EFFICIENCY, _SPARSE_HEADS = 20e-6, 0.5, 64.0
# Prompts in absorbed form run FlashInfer's paged kernel of earlier architectures, far below the peak of Blackwell; the
# share is fitted to prompts of 8,192 tokens of DeepSeek-V3 on B300.
_ABSORBED_EFFICIENCY = 0.055
# Width of scores and values of latent attention of the prompts the kernel was measured with.
_MEASURED_PREFILL_WIDTH = 192.0 + 128.0


def _windowed_layers(model: ModelSpec) -> float:
    if model.sliding_window is None:
        return 0.0
    full = 0 if model.full_attention_interval is None else model.num_layers // model.full_attention_interval
    return float(model.num_layers - full)


def decode_attention(served: ServedModel, pool: ServingPool) -> tuple[Column, Column]:
    """Return contexts and the attention of one decode step, all layers, ``(num_batch_sizes, num_contexts)``."""
    model = served.model
    contexts = _CONTEXTS
    windowed = _windowed_layers(model)
    layers = model.num_layers - model.num_linear_layers
    batch, context = (each.ravel() for each in np.meshgrid(DECODE_BATCH_SIZES, contexts, indexing="ij"))
    time = (layers - windowed) * _decode(served, pool, batch, context)
    if windowed and model.sliding_window is not None:
        time = time + windowed * _decode(
            served, pool, batch, np.minimum(context, float(model.sliding_window))
        )
    return contexts, time.reshape(len(DECODE_BATCH_SIZES), len(contexts))


def _decode(served: ServedModel, pool: ServingPool, batch: Column, context: Column) -> Column:
    model = served.model
    # Draft tokens of one sequence share its cache: they are further rows of each head.
    heads = max(1.0, model.num_attention_heads / pool.tp) * (1.0 + pool.num_speculative_tokens)
    shape: dict[str, Column] = {
        "batch_size": batch,
        "context_length": context,
        "num_heads": np.full_like(batch, heads),
    }
    if model.mla is not None:
        kv_cache = served.formats.kv_cache
        if model.mla.index_top_k is None:
            return served.kernels.attention_time("mla_decode", kv_cache, shape)
        keys = batch * context * model.mla.index_head_dim
        rate = served.stream_rate
        picked = {**shape, "context_length": np.minimum(context, float(model.mla.index_top_k))}
        return served.kernels.attention_time("mla_decode", kv_cache, picked) + _INDEX_LATENCY + keys / rate
    kv_heads = max(1.0, model.num_query_groups / pool.tp)
    shape |= {"num_kv_heads": np.full_like(batch, kv_heads), "head_dim": np.full_like(batch, model.head_dim)}
    return served.kernels.attention_time("attention_decode", served.formats.kv_cache, shape)


def prefill_attention(served: ServedModel, pool: ServingPool) -> tuple[Column, Column]:
    """Return lengths from 0 and the attention of one whole prompt of each, all layers [s]."""
    model = served.model
    heads = max(1.0, model.num_attention_heads / pool.tp)

    def kernel(lengths: Column) -> Column:
        shape: dict[str, Column] = {
            "batch_size": np.ones_like(lengths),
            "sequence_length": lengths,
            "num_heads": np.full_like(lengths, heads),
        }
        if model.mla is not None:
            width = model.head_dim + model.mla.v_head_dim
            whole = served.kernels.attention_time("mla_prefill", served.formats.kv_cache, shape)
            whole = whole * width / _MEASURED_PREFILL_WIDTH
            if model.mla.index_top_k is not None:
                return _sparse_prefill(served, heads, lengths, whole)
            return _absorbed_prefill(served, heads, lengths) if served.constants.absorbs_prompts else whole
        kv_heads = max(1.0, model.num_query_groups / pool.tp)
        shape |= {
            "num_kv_heads": np.full_like(lengths, kv_heads),
            "head_dim": np.full_like(lengths, model.head_dim),
        }
        return served.kernels.attention_time("attention_prefill", served.formats.kv_cache, shape)

    windowed = _windowed_layers(model)
    time = (model.num_layers - model.num_linear_layers - windowed) * kernel(_PROMPT_LENGTHS)
    if windowed and model.sliding_window is not None:
        time = time + windowed * _windowed_prefill(kernel, float(model.sliding_window))
    time = served.constants.prefill_attention_factor * np.maximum.accumulate(time)
    return _with_zero(_PROMPT_LENGTHS, time)


def _absorbed_prefill(served: ServedModel, heads: float, lengths: Column) -> Column:
    """Return prompts over the latent cache itself, each head on all of its width (DeepSeek-V2, section 2.1.2)."""
    mla = served.model.mla
    assert mla is not None
    flops = 2.0 * heads * 0.5 * lengths**2 * (2.0 * mla.kv_lora_rank + mla.qk_rope_head_dim)
    time: Column = flops / (_ABSORBED_EFFICIENCY * served.cluster.gpu.peak("bf16"))
    return time


def _sparse_prefill(served: ServedModel, heads: float, lengths: Column, whole: Column) -> Column:
    """Return prompts of which each token attends to the keys its indexer picks, in absorbed form (DSA)."""
    mla = served.model.mla
    assert mla is not None
    assert mla.index_top_k is not None
    top = float(mla.index_top_k)
    scores = np.where(lengths <= top, 0.5 * lengths**2, 0.5 * top**2 + top * (lengths - top))
    width = 2.0 * mla.kv_lora_rank + mla.qk_rope_head_dim
    flops = 2.0 * max(heads, _SPARSE_HEADS) * scores * width
    rate = _SPARSE_EFFICIENCY * served.cluster.gpu.peak("bf16")
    index = mla.index_num_heads * lengths**2 * mla.index_head_dim / (2.0 * rate)
    time: Column = np.where(lengths <= top, whole, flops / rate + index)
    return time


def _windowed_prefill(kernel: Callable[[Column], Column], window: float) -> Column:
    """Return the time of a prompt whose tokens see ``window`` keys: as long as the causal half, linear beyond.

    A token beyond the window multiplies with ``window`` keys where a causal prompt's mean is half of it.
    """
    # The slope of a kernel long enough to be bound by its products, where launches and ramps no longer count.
    reference = np.array([8192.0])
    per_score = float(kernel(reference)[0]) / (0.5 * reference[0] ** 2)
    inside = kernel(np.minimum(_PROMPT_LENGTHS, window))
    time: Column = inside + per_score * window * np.maximum(0.0, _PROMPT_LENGTHS - window)
    return time


def _with_zero(lengths: Column, time: Column) -> tuple[Column, Column]:
    axes: Sequence[Column] = (np.zeros(1), lengths)
    return np.concatenate(axes), np.concatenate((np.zeros(1), time))
