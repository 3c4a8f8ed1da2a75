"""Megatron-LM's spelling of a model (core_r0.16): shape, attention, experts, multi-token prediction.

What only changes numerics (rope base, norm epsilon, initialization) is left to Megatron's defaults and noted by
the exporter.
"""

from __future__ import annotations

import itertools

from meshwright.planner.export.rules import window_bites
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model import MlaSpec, ModelSpec, MoeSpec
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["Options", "model_options", "vocabulary_multiple"]

Options = list[tuple[str, ...]]

_POSITIONS = {"rope": "rope", "learned": "learned_absolute", "none": "none"}


def model_options(job: TrainingJob, plan: ParallelPlan) -> Options:
    """Return the options that describe the model.

    Parameters
    ----------
    job, plan : TrainingJob, ParallelPlan
        A plan that breaks no rule of the target.
    """
    model = job.model
    # Rope has no table: its "maximum" only has to reach the sequence.
    positions = max(model.max_position_embeddings, job.workload.sequence_length)
    options: Options = [
        ("--num-layers", str(model.num_layers)),
        ("--hidden-size", str(model.hidden_size)),
        ("--ffn-hidden-size", str(model.ffn_hidden_size)),
        ("--num-attention-heads", str(model.num_attention_heads)),
        *(_attention(model) if model.mla is None else _latent_attention(model.mla)),
        *(_window(model) if window_bites(job) else ()),
        ("--max-position-embeddings", str(positions)),
        ("--position-embedding-type", _POSITIONS[model.position_embedding]),
        ("--normalization", "RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm"),
        ("--make-vocab-size-divisible-by", str(vocabulary_multiple(model.vocab_size, plan.tp))),
    ]
    if model.is_gated_mlp:
        options.append(("--swiglu",))
    if not model.has_mlp_bias:
        options.append(("--disable-bias-linear",))
        if model.has_qkv_bias:
            options.append(("--add-qkv-bias",))
    if not model.has_tied_embeddings:
        options.append(("--untie-embeddings-and-output-weights",))
    options += [("--attention-dropout", "0.0"), ("--hidden-dropout", "0.0")]
    if model.moe is not None:
        options += _experts(model.moe, model.num_layers)
        options += _capacity(job.workload.capacity_at(plan.ep))
    if model.num_mtp_layers:
        options.append(("--mtp-num-layers", str(model.num_mtp_layers)))
    return options


def vocabulary_multiple(vocab_size: int, tp: int) -> int:
    """Return the padding multiple that keeps the embedding table as stored, or Megatron's usual 128.

    The target pads the table to a multiple of this value times tp.

    Examples
    --------
    >>> vocabulary_multiple(128256, tp=8), vocabulary_multiple(50257, tp=8)
    (32, 128)
    """
    return next((step for step in (128, 64, 32, 16, 8) if vocab_size % (step * tp) == 0), 128)


def _attention(model: ModelSpec) -> Options:
    options: Options = [("--kv-channels", str(model.head_dim))]
    if model.num_query_groups != model.num_attention_heads:
        options += [("--group-query-attention",), ("--num-query-groups", str(model.num_query_groups))]
    if model.has_qk_norm:
        options.append(("--qk-layernorm",))
    return options


def _window(model: ModelSpec) -> Options:
    # Megatron counts the keys before a query; the model's window counts the query's own key too.
    options: Options = [("--window-size", f"{(model.sliding_window or 1) - 1},0")]
    if model.full_attention_interval is not None:
        options.append(("--window-attn-skip-freq", str(model.full_attention_interval)))
    return options


def _latent_attention(mla: MlaSpec) -> Options:
    options: Options = [("--multi-latent-attention",), ("--qk-layernorm",)]  # norms of the latents
    if mla.q_lora_rank is not None:
        options.append(("--q-lora-rank", str(mla.q_lora_rank)))
    return [
        *options,
        ("--kv-lora-rank", str(mla.kv_lora_rank)),
        ("--qk-head-dim", str(mla.qk_nope_head_dim)),
        ("--qk-pos-emb-head-dim", str(mla.qk_rope_head_dim)),
        ("--v-head-dim", str(mla.v_head_dim)),
    ]


def _experts(moe: MoeSpec, num_layers: int) -> Options:
    options: Options = [
        ("--num-experts", str(moe.num_experts)),
        ("--moe-router-topk", str(moe.top_k)),
        ("--moe-ffn-hidden-size", str(moe.moe_ffn_hidden_size)),
        ("--moe-grouped-gemm",),
        ("--moe-token-dispatcher-type", "alltoall"),
    ]
    if moe.shared_ffn_hidden_size:
        options.append(("--moe-shared-expert-intermediate-size", str(moe.shared_ffn_hidden_size)))
    if moe.has_shared_expert_gate:
        options.append(("--moe-shared-expert-gate",))
    if moe.has_router_bias:
        options += [("--moe-router-score-function", "sigmoid"), ("--moe-router-enable-expert-bias",)]
    elif moe.top_k == 1:
        options.append(("--moe-router-pre-softmax",))  # over one chosen expert a softmax would be constant
    if moe.num_expert_groups > 1:
        options += [
            ("--moe-router-num-groups", str(moe.num_expert_groups)),
            ("--moe-router-group-topk", str(moe.top_k_groups)),
        ]
    options += _balance(moe)
    if moe.num_dense_layers or moe.layer_frequency > 1:
        options.append(("--moe-layer-freq", _layer_pattern(moe, num_layers)))
    return options


def _balance(moe: MoeSpec) -> Options:
    # Without a coefficient (Megatron's default is 0) nothing balances the experts, and no prediction holds. A score
    # correction balances by itself and needs a small one (DeepSeek-V3, arXiv 2412.19437, section 4.2); others take
    # Switch Transformer's (arXiv 2101.03961, section 2.2).
    if moe.has_router_bias:
        return [("--moe-router-load-balancing-type", "seq_aux_loss"), ("--moe-aux-loss-coeff", "1.0e-4")]
    return [("--moe-router-load-balancing-type", "aux_loss"), ("--moe-aux-loss-coeff", "1.0e-2")]


def _capacity(factor: float | None) -> Options:
    if factor is None:
        return []
    # The prediction computes full buffers: what an expert does not get is padded.
    return [("--moe-expert-capacity-factor", f"{factor:g}"), ("--moe-pad-expert-input-to-capacity",)]


def _layer_pattern(moe: MoeSpec, num_layers: int) -> str:
    """Return which layers are MoE (1) as the list expression Megatron evaluates, e.g. ``[0]*3+[1]*58``."""
    kinds = [
        int(index >= moe.num_dense_layers and (index - moe.num_dense_layers) % moe.layer_frequency == 0)
        for index in range(num_layers)
    ]
    return "+".join(f"[{kind}]*{len(list(run))}" for kind, run in itertools.groupby(kinds))
