"""What one step of a serving engine costs: kernels, collectives and host summed into a :class:`StepTable`.

A rank of a replica runs, per layer, the projections of its heads, attention over the cache, the MLP or its experts, two
all-reduces (Shoeybi et al. 2019, arXiv 1909.08053) or, under attention data parallelism, a gather and a scatter around
the experts, and a handful of small kernels. Attention over the cache depends on contexts and is tabulated apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.costmodels.collectives import (
    Collective,
    GroupPlacement,
    all_to_all_time,
    collective_time,
    send_time,
)
from meshwright.costmodels.operators import element_bytes
from meshwright.costmodels.serving.attention import DECODE_BATCH_SIZES, decode_attention, prefill_attention
from meshwright.costmodels.serving.constants import EngineConstants
from meshwright.costmodels.serving.served import Column, ServedModel
from meshwright.simcore.domain.serving import ServingPool
from meshwright.simcore.serving.step_table import StepTable

__all__ = ["TOKEN_COUNTS", "ServedModel", "StepBreakdown", "step_breakdown", "step_table"]

TOKEN_COUNTS = np.unique(
    np.concatenate(([1.0, 32768.0], 2.0 ** np.arange(1, 15), 3.0 * 2.0 ** np.arange(13)))
)
# A step that holds prompts samples for its decoding sequences and the last token of each prompt only.
_SAMPLED_ROWS = 256.0
_ACTIVATION_BYTES = 2.0
# Inside a rack NCCL's curves are measured up to 8 or so ranks; between nodes as for training.
_INTER_NODE_EFFICIENCY = 0.8
# DeepEP and its kin replace gather and scatter beyond this many expert ranks (DeepSeek-V3, arXiv 2412.19437, 3.2.2).
_WIDE_EP = 16
# Largest buffers that vLLM reduces, with the residual and the norm that follow, in FlashInfer's kernel on Blackwell, which
# is TensorRT-LLM's (FI_ALLREDUCE_FUSION_MAX_SIZE_MB in vllm/compilation/passes/fusion/allreduce_rms_fusion.py).
_FUSED_BYTES = {2: 64.0 * 2.0**20, 4: 32.0 * 2.0**20, 8: 2.0**20}
# Small kernels of a layer beside products, attention and experts: two norms with the residual, rotary embedding, cache
# write, activation; norms of queries and keys; top-k of the router and the sum with the shared experts; latent norms,
# absorbed products and concatenation of MLA.
_BASE_KERNELS, _QK_NORM_KERNELS, _ROUTER_KERNELS, _MLA_KERNELS = 5.0, 1.0, 1.0, 4.0
_ACTIVATION_KERNELS, _ROTARY_KERNELS = 1.0, 2.0
# An indexer beside its scores and top-k: rotary embedding and its two copies, rotation and quantisation of the queries
# (those of the keys run beside), the write of its cache and the scaling of its heads (sglang 0.5.9, nsa_indexer.py).
_INDEX_KERNELS = 7.0
# Convolution and recurrence are counted apart; the gated delta rule also splits, normalises and gates in small kernels.
_LINEAR_KERNELS = 9.0
# Routed experts of the one architecture whose shared expert SGLang fuses.
_FUSED_EXPERTS = 256
# Quantising the inputs of a layer's products in blocks takes a kernel each: two products around the attention, two in a
# dense or shared MLP. Scales of whole tensors are applied by the norms before.
_QUANTISED_PAIR = 2.0
_BLOCK_FORMATS = ("fp8_block", "mxfp8", "nvfp4")
_NARROW_FORMATS = ("fp8", "fp8_block")
# What the host starts per layer of a step with prompts beside small kernels: two products around the attention, and the
# attention over prompts and over the cache; for MLA five products, the up-projection's splits, copies and concatenations,
# and, where prompts do not run alone, the absorbed form of what decodes beside; chunks of a linear recurrence; the two
# products of an MLP; router, its top-k, permutation, two grouped products with their quantisation, and the weighted sum
# of routed experts.
_ATTENTION_LAUNCHES, _MLA_LAUNCHES, _ABSORBED_LAUNCHES, _LINEAR_LAUNCHES = 4.0, 14.0, 16.0, 40.0
_MLP_PRODUCTS, _EXPERT_LAUNCHES = 2.0, 7.0
# Gated delta rule as sglang 0.5.14 times it on H200 and B200 (aiconfigurator-core 0.12.0, table gdn): a state is read
# and written at 85 % of the memory's bandwidth; prompts move 14 kB per token and value head after 45 us.
_STATE_PASSES, _STATE_EFFICIENCY, _RECURRENT_LATENCY = 2.0, 0.85, 6e-6
_CHUNK_LATENCY, _CHUNK_BYTES = 45e-6, 14e3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepBreakdown:
    """Device time by part at each of :data:`TOKEN_COUNTS`, all layers, ``(num_counts,)`` each [s].

    ``head`` samples every token (pure decode), ``prompt_head`` those of a step that holds prompts; ``overlapped`` is
    what a step replayed from a graph hides of the rest.
    """

    products: Column
    experts: Column
    small_kernels: Column
    collectives: Column
    head: Column
    prompt_head: Column
    overlapped: Column

    @property
    def body(self) -> Column:
        """Everything but the head, one kernel after the other [s]."""
        return self.products + self.experts + self.small_kernels + self.collectives


def step_table(served: ServedModel, pool: ServingPool) -> StepTable:
    """Return the step times of one replica.

    Tokens and sequences count per attention data parallel rank; the ranks are taken to hold as many each.

    Parameters
    ----------
    served : ServedModel
        Model, formats, device and engine.
    pool : ServingPool
        Degrees and speculation.
    """
    constants = served.constants.drafting(pool.num_speculative_tokens)
    parts = step_breakdown(served, pool)
    slower = constants.prompt_expert_factor - 1.0 if served.formats.experts in _NARROW_FORMATS else 0.0
    sends = _send_time(served, pool)
    lengths, prefill = prefill_attention(served, pool)
    contexts, decode = decode_attention(served, pool)
    return StepTable(
        token_counts=TOKEN_COUNTS,
        graph_token_time=parts.body - parts.overlapped + parts.head + sends,
        eager_token_time=parts.body + slower * parts.experts + parts.prompt_head + sends,
        decode_batch_sizes=DECODE_BATCH_SIZES,
        decode_contexts=contexts,
        decode_attention_time=decode,
        prompt_lengths=lengths,
        prefill_attention_time=prefill,
        decode_skew=constants.decode_skew,
        mixed_decode_factor=constants.mixed_decode_factor,
        step_latency=constants.step_latency,
        host_time=constants.host_time,
        host_time_per_sequence=constants.host_time_per_sequence,
        host_time_per_prompt=constants.host_time_per_prompt,
        eager_host_time=constants.eager_kernel_time * _num_launches(served, pool) / pool.pp,
        is_host_hidden=constants.is_host_hidden,
        max_graph_tokens=constants.max_graph_tokens * _tokens_per_captured(constants, pool),
        stage_share=1.0 / pool.pp,
    )


def _tokens_per_captured(constants: EngineConstants, pool: ServingPool) -> int:
    """Return the tokens of each unit that a limit of captured batches counts.

    SGLang and TensorRT-LLM capture numbers of sequences, each with its drafts (cuda_graph_max_bs and num_tokens_per_bs,
    cuda_graph_config.max_batch_size); vLLM captures numbers of tokens (cudagraph_capture_sizes).
    """
    return 1 if constants.engine == "vllm" else 1 + pool.num_speculative_tokens


def step_breakdown(served: ServedModel, pool: ServingPool) -> StepBreakdown:
    """Return the device time of a step by part, attention over the cache apart."""
    model, formats = served.model, served.formats
    dense_layers = float(model.num_layers - model.num_moe_layers)
    moe_layers = float(model.num_moe_layers)
    products = (model.num_layers - model.num_linear_layers) * _attention_products(served, pool)
    if model.num_linear_layers:
        products = products + model.num_linear_layers * _linear_products(served, pool)
    if dense_layers:
        products = products + dense_layers * _mlp(served, model.ffn_hidden_size, formats.mlp, pool)
    experts, overlapped = np.zeros_like(TOKEN_COUNTS), np.zeros_like(TOKEN_COUNTS)
    if model.moe is not None and moe_layers:
        experts = moe_layers * _experts(served, pool)
        if _runs_shared_experts(served, pool):
            shared = moe_layers * _mlp(served, model.moe.shared_ffn_hidden_size, formats.shared_experts, pool)
            products = products + shared
            if served.constants.overlaps_shared_experts:
                kernels = _num_shared_kernels(served, pool) * served.constants.kernel_time
                overlapped = np.minimum(shared + moe_layers * kernels, experts)
    return StepBreakdown(
        products=products,
        experts=experts,
        small_kernels=_small_kernels(served, pool),
        collectives=_collectives(served, pool),
        head=_head(served, pool, TOKEN_COUNTS),
        prompt_head=_head(served, pool, np.minimum(TOKEN_COUNTS, _SAMPLED_ROWS)),
        overlapped=overlapped,
    )


def _product(served: ServedModel, precision: str, m: Column, n: float, k: float) -> Column:
    shape = {"m": m, "n": np.full_like(m, np.ceil(n)), "k": np.full_like(m, np.ceil(k))}
    return served.kernels.gemm_time(precision, shape)


def _attention_products(served: ServedModel, pool: ServingPool) -> Column:
    """Return the projections of one layer's attention on one rank."""
    model, precision = served.model, served.formats.attention
    heads = model.num_attention_heads / pool.tp
    m = TOKEN_COUNTS
    if model.mla is None:
        kv_heads = max(1.0, model.num_query_groups / pool.tp)
        query_heads = heads * (1.0 + model.has_attention_output_gate)
        return _product(
            served, precision, m, (query_heads + 2.0 * kv_heads) * model.head_dim, model.hidden_size
        ) + _product(served, precision, m, model.hidden_size, heads * model.head_dim)
    mla = model.mla
    latent = mla.kv_lora_rank + mla.qk_rope_head_dim
    query_in = mla.q_lora_rank or model.hidden_size
    # The down-projections are one product that every rank repeats; the absorbed products of a decode step multiply
    # what the up-projection of a prompt does (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
    down = (mla.q_lora_rank or 0) + latent
    index = np.zeros_like(m)
    if mla.index_top_k is not None:
        # Every rank computes all heads of the indexer.
        index = _product(served, precision, m, mla.index_num_heads * mla.index_head_dim, query_in) + _product(
            served, "bf16", m, mla.index_num_heads + mla.index_head_dim, model.hidden_size
        )
    return (
        index
        + _product(served, precision, m, down, model.hidden_size)
        + _product(served, precision, m, heads * model.head_dim, query_in)
        + _product(served, "bf16", m, heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
        + _product(served, precision, m, model.hidden_size, heads * mla.v_head_dim)
    )


def _linear_products(served: ServedModel, pool: ServingPool) -> Column:
    """Return the projections and the recurrent kernels of one layer of linear attention on one rank.

    A decode step reads and writes each sequence's state, 32 bits wide; a prompt's chunks cost a fixed traffic per
    token and value head. Pure decode and prompts share one column of the table: the dearer counts, which below a few
    hundred tokens is the state's.
    """
    model, precision = served.model, served.formats.attention
    linear = model.linear_attention
    assert linear is not None
    keys = linear.num_key_heads * linear.key_head_dim / pool.tp
    values = linear.num_value_heads * linear.value_head_dim / pool.tp
    heads = linear.num_value_heads / pool.tp
    m = TOKEN_COUNTS
    inputs = [(precision, 2.0 * keys + 2.0 * values), ("bf16", 2.0 * heads)]
    if served.constants.splits_linear_projections:
        inputs = [(precision, 2.0 * keys + values), (precision, values), ("bf16", heads), ("bf16", heads)]
    projections = _product(served, precision, m, model.hidden_size, values)
    for name, width in inputs:
        projections = projections + _product(served, name, m, width, model.hidden_size)
    rate = served.cluster.gpu.memory_bandwidth_bytes_per_second
    state = _STATE_PASSES * 4.0 * heads * linear.key_head_dim * linear.value_head_dim * m
    decode = state / (_STATE_EFFICIENCY * rate)
    prompt = _CHUNK_LATENCY + _CHUNK_BYTES * heads * m / rate
    return projections + _RECURRENT_LATENCY + np.minimum(decode, prompt)


def _mlp(served: ServedModel, width: int, precision: str, pool: ServingPool) -> Column:
    model = served.model
    gates = 2.0 if model.is_gated_mlp else 1.0
    part = width / pool.tp
    return _product(served, precision, TOKEN_COUNTS, gates * part, model.hidden_size) + _product(
        served, precision, TOKEN_COUNTS, model.hidden_size, part
    )


def _fuses_shared_experts(served: ServedModel, pool: ServingPool) -> bool:
    """Whether the engine runs the shared expert as one more routed expert, which every token takes.

    SGLang's condition (models/deepseek_v2.py, determine_num_fused_shared_experts): the architecture of DeepSeek-V3, 256
    routed experts and one shared, no expert parallelism.
    """
    model, moe = served.model, served.model.moe
    if moe is None or not served.constants.fused_expert_factor or pool.ep > 1:
        return False
    is_dense_latent = model.mla is not None and model.mla.index_top_k is None
    return (
        is_dense_latent
        and moe.num_experts == _FUSED_EXPERTS
        and moe.shared_ffn_hidden_size == moe.moe_ffn_hidden_size
    )


def _runs_shared_experts(served: ServedModel, pool: ServingPool) -> bool:
    """Whether shared experts have products of their own."""
    moe = served.model.moe
    return moe is not None and bool(moe.shared_ffn_hidden_size) and not _fuses_shared_experts(served, pool)


def _experts(served: ServedModel, pool: ServingPool) -> Column:
    """Return router and routed experts of one layer; tokens of all attention ranks meet there."""
    model, moe = served.model, served.model.moe
    assert moe is not None
    tokens = TOKEN_COUNTS * pool.attention_dp
    fields = {
        "num_tokens": tokens * (pool.expert_imbalance or 1.0),
        "hidden_size": model.hidden_size,
        "moe_ffn_hidden_size": moe.moe_ffn_hidden_size,
        "top_k": moe.top_k,
        "num_experts": moe.num_experts,
        "tp": pool.moe_tp,
        "ep": pool.ep,
        # The skew of the measured kernels is that of experts nobody placed.
        "skew": 1.01 if pool.expert_imbalance is None else 0.0,
    }
    shape = {
        name: np.broadcast_to(np.asarray(value, dtype=np.float64), tokens.shape)
        for name, value in fields.items()
    }
    router = _product(served, "bf16", TOKEN_COUNTS, moe.num_experts, model.hidden_size)
    grouped = served.kernels.expert_time(served.formats.experts, shape) + _copies_time(served, pool, tokens)
    factor = served.constants.expert_factor
    if _fuses_shared_experts(served, pool):
        factor = served.constants.fused_expert_factor
    return router + factor * grouped


def _copies_time(served: ServedModel, pool: ServingPool, tokens: Column) -> Column:
    """Return the reading of the weights of copies that have a token, beyond those of one copy each.

    Kernels were measured with one copy; rows stay as many, and each of n slots has one of r rows with chance
    ``1 - exp(-r/n)``.
    """
    model, moe = served.model, served.model.moe
    assert moe is not None
    if not pool.redundant_experts:
        return np.zeros_like(tokens)
    rows = tokens * moe.top_k / pool.ep
    single, slots = (
        number / pool.ep for number in (moe.num_experts, moe.num_experts + pool.redundant_experts)
    )
    more = slots * (1.0 - np.exp(-rows / slots)) - single * (1.0 - np.exp(-rows / single))
    weights = model.num_expert_parameters / pool.moe_tp * element_bytes(served.formats.experts)
    time: Column = more * weights / served.stream_rate
    return time


def _num_small_kernels(served: ServedModel, pool: ServingPool) -> float:
    """Return norms, rotary embeddings, cache writes, activations and quantisation of all layers."""
    model, constants = served.model, served.constants
    moe_layers, layers = float(model.num_moe_layers), float(model.num_layers)
    is_whole = model.is_qk_norm_per_head or pool.tp == 1
    norms = _QK_NORM_KERNELS if is_whole else constants.split_norm_kernels
    count = layers * (_BASE_KERNELS + norms * model.has_qk_norm + _MLA_KERNELS * (model.mla is not None))
    if model.mla is not None and model.mla.index_top_k is not None:
        count += _INDEX_KERNELS * layers
    # The experts' kernel holds their activation.
    count += moe_layers * (_ROUTER_KERNELS - _ACTIVATION_KERNELS)
    count += _LINEAR_KERNELS * model.num_linear_layers
    if served.formats.attention in _BLOCK_FORMATS:
        count += _QUANTISED_PAIR * layers + model.num_linear_layers * constants.splits_linear_projections
    dense_layers = layers - moe_layers
    if served.formats.mlp in _BLOCK_FORMATS:
        count += _QUANTISED_PAIR * dense_layers
    count += moe_layers * _num_shared_kernels(served, pool)
    if constants.fuses_all_reduce_norm and pool.tp > 1 and pool.attention_dp == 1:
        count -= 2.0 * layers
    if constants.fuses_rotary_cache and model.mla is None:
        count -= _ROTARY_KERNELS * layers
    return count


def _num_shared_kernels(served: ServedModel, pool: ServingPool) -> float:
    """Return the small kernels of one layer's shared experts."""
    is_quantised = served.formats.shared_experts in _BLOCK_FORMATS
    return _QUANTISED_PAIR if is_quantised and _runs_shared_experts(served, pool) else 0.0


def _small_kernels(served: ServedModel, pool: ServingPool) -> Column:
    """Return the time of the small kernels of all layers."""
    model, constants = served.model, served.constants
    moe_layers, layers = float(model.num_moe_layers), float(model.num_layers)
    hidden, heads = model.hidden_size, model.num_attention_heads / pool.tp
    kv_heads = max(1.0, model.num_query_groups / pool.tp) if model.mla is None else 1.0
    width = 2.0 * 4.0 * hidden + 4.0 * (heads + 2.0 * kv_heads) * model.head_dim
    mlp_width = (model.num_layers - moe_layers) / layers * model.ffn_hidden_size
    num_bytes = layers * _ACTIVATION_BYTES * (width + 3.0 * mlp_width / pool.tp)
    rate = served.stream_rate
    total: Column = (
        _num_small_kernels(served, pool) * constants.kernel_time
        + constants.elementwise_factor * num_bytes * TOKEN_COUNTS / rate
    )
    return total


def _num_launches(served: ServedModel, pool: ServingPool) -> float:
    """Return all kernels that the host starts in a step which no graph replays: what its time is proportional to."""
    model = served.model
    moe_layers, layers = float(model.num_moe_layers), float(model.num_layers)
    count = _num_small_kernels(served, pool)
    attention = _ATTENTION_LAUNCHES
    if model.mla is not None:
        is_mixed = served.constants.policy != "prefill_first"
        attention = _MLA_LAUNCHES + _ABSORBED_LAUNCHES * is_mixed
    count += layers * attention + (layers - moe_layers) * _MLP_PRODUCTS
    count += model.num_linear_layers * _LINEAR_LAUNCHES
    if model.moe is not None:
        shared = _MLP_PRODUCTS if _runs_shared_experts(served, pool) else 0.0
        count += moe_layers * (_EXPERT_LAUNCHES + shared)
    if pool.tp * pool.attention_dp > 1:
        count += 2.0 * layers
    return count


def _placement(size: float, gpus_per_node: int) -> GroupPlacement:
    ranks = np.full_like(TOKEN_COUNTS, size)
    return GroupPlacement(size=ranks, ranks_per_node=np.minimum(ranks, float(gpus_per_node)))


def _collective(served: ServedModel, kind: Collective, num_bytes: Column, size: int) -> Column:
    """Return NCCL's collective over the first ranks of the cluster."""
    cluster = served.cluster
    name = f"{kind}.{size}.{cluster.id}.{cluster.num_nodes}"
    return served.kernels.remembered(
        name,
        {"num_bytes": num_bytes},
        lambda: collective_time(
            kind,
            num_bytes,
            _placement(size, cluster.node.num_gpus),
            cluster,
            served.kernels.calibration,
            _INTER_NODE_EFFICIENCY,
        ),
    )


def _all_reduce(served: ServedModel, num_bytes: Column, size: int, *, is_fused: bool = False) -> Column:
    """Return an all-reduce of each buffer: one-shot, or fused with what follows, where it is quicker than NCCL."""
    if size <= 1:
        return np.zeros_like(num_bytes)
    nccl = _collective(served, "all_reduce", num_bytes, size)
    table = served.kernels.all_reduce.get(size)
    time = nccl if table is None else np.minimum(nccl, table.time(num_bytes))
    fused = served.kernels.fused_all_reduce.get(size)
    if fused is None or not is_fused:
        return time
    fits = num_bytes <= _FUSED_BYTES.get(size, 0.0)
    return np.where(fits, np.minimum(time, fused.time(num_bytes)), time)


def _collectives(served: ServedModel, pool: ServingPool) -> Column:
    """Return all-reduces of all layers and the embedding, or dispatch and combine around the experts."""
    model = served.model
    buffer = TOKEN_COUNTS * model.hidden_size * _ACTIVATION_BYTES
    layers, moe_layers = float(model.num_layers), float(model.num_moe_layers)
    reduced = _all_reduce(served, buffer, pool.tp, is_fused=served.constants.fuses_all_reduce_norm)
    if model.has_qk_norm and not model.is_qk_norm_per_head:
        # Norms over all heads of a split layer share their sums of squares: one number per token for queries and keys.
        reduced = reduced + 0.5 * _all_reduce(served, TOKEN_COUNTS * 2.0 * 4.0, pool.tp)
    if pool.attention_dp == 1 or model.moe is None:
        return (2.0 * layers + 1.0) * reduced
    ranks = pool.tp * pool.attention_dp
    group = _placement(ranks, served.cluster.node.num_gpus)
    if pool.ep >= _WIDE_EP:
        routed = min(float(model.moe.top_k), float(ranks)) * buffer / pool.tp
        # Dispatch in 8 bits, combine in 16.
        exchange = sum(
            all_to_all_time(
                share * routed, group, served.cluster, served.kernels.calibration, _INTER_NODE_EFFICIENCY
            )
            for share in (0.5, 1.0)
        )
    else:
        whole = buffer * pool.attention_dp
        exchange = _collective(served, "all_gather", whole, ranks) + _collective(
            served, "reduce_scatter", whole, ranks
        )
    return (2.0 * layers - moe_layers + 1.0) * reduced + moe_layers * exchange


def _head(served: ServedModel, pool: ServingPool, rows: Column) -> Column:
    """Return LM head, gather of the logits and sampling."""
    model, constants = served.model, served.constants
    product = _product(served, served.formats.head, rows, model.vocab_size / pool.tp, model.hidden_size)
    gathered = np.zeros_like(rows)
    if pool.tp > 1:
        logits = rows * model.vocab_size * _ACTIVATION_BYTES
        gathered = _collective(served, "all_gather", logits, pool.tp)
    rate = served.stream_rate
    return product + gathered + constants.logit_bytes * rows * model.vocab_size / rate


def _send_time(served: ServedModel, pool: ServingPool) -> Column:
    """Return the sends between pipeline stages, one after the other."""
    if pool.pp == 1:
        return np.zeros_like(TOKEN_COUNTS)
    crosses = np.full_like(TOKEN_COUNTS, float(pool.gpus_per_replica > served.cluster.node.num_gpus))
    num_bytes = TOKEN_COUNTS * served.model.hidden_size * _ACTIVATION_BYTES / pool.tp
    one = send_time(num_bytes, crosses, served.cluster, _INTER_NODE_EFFICIENCY)
    return (pool.pp - 1.0) * one
