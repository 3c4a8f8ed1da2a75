"""Megatron-LM's spelling of a model and a plan (core_r0.16).

Every option is written even where it equals Megatron's default today, if a plan's cost depends on it; what
only changes numerics (rope base, norm epsilon, initialization) is left to Megatron's defaults and noted.
"""

from __future__ import annotations

import itertools

from meshwright.costmodels.software import load_software
from meshwright.planner.export.megatron_rules import is_fully_sharded, num_sharding_groups, window_bites
from meshwright.planner.export.scripts import ArgumentGroup
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model import MlaSpec, ModelSpec, MoeSpec
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["megatron_arguments", "pipeline_layout", "vocabulary_multiple"]

Options = list[tuple[str, ...]]

_PRECISION: dict[str, tuple[tuple[str, ...], ...]] = {
    "bf16": (("--bf16",),),
    "fp16": (("--fp16",),),
    "fp8": (("--bf16",), ("--fp8-format", "hybrid"), ("--fp8-recipe", "delayed")),
    "fp8_block": (("--bf16",), ("--fp8-format", "e4m3"), ("--fp8-recipe", "blockwise")),
    "mxfp8": (("--bf16",), ("--fp8-format", "e4m3"), ("--fp8-recipe", "mxfp8")),
}
_POSITIONS = {"rope": "rope", "learned": "learned_absolute", "none": "none"}
_FSDP_STRATEGY = {"zero2": "optim_grads", "zero3": "optim_grads_params", "hsdp": "optim_grads_params"}


def megatron_arguments(job: TrainingJob, plan: ParallelPlan) -> tuple[ArgumentGroup, ...]:
    """Return the arguments of ``pretrain_gpt.py`` in four groups: model, parallelism, training, data.

    Parameters
    ----------
    job, plan : TrainingJob, ParallelPlan
        A plan that breaks no rule of the target.
    """
    return (
        ArgumentGroup(name="MODEL_ARGS", comment="The model's shape.", options=_model(job, plan)),
        ArgumentGroup(name="PARALLEL_ARGS", comment="The plan.", options=_parallel(job, plan, job.model.moe is not None)),
        ArgumentGroup(name="TRAINING_ARGS", comment="Batch, precision, recompute, optimizer.",
                      options=_training(job, plan)),
        ArgumentGroup(
            name="DATA_ARGS",
            comment="EDIT HERE: random tokens for now; put your tokenizer and --data-path in place of all four lines.",
            # The null tokenizer adds one token of its own.
            options=(("--tokenizer-type", "NullTokenizer"), ("--vocab-size", str(max(1, job.model.vocab_size - 1))),
                     ("--mock-data",), ("--split", "99,1,0")),
        ),
    )  # fmt: skip


def vocabulary_multiple(vocab_size: int, tp: int) -> int:
    """Return the padding multiple that keeps the embedding table as stored, or Megatron's usual 128.

    The target pads the table to a multiple of this value times tp.

    Examples
    --------
    >>> vocabulary_multiple(128256, tp=8), vocabulary_multiple(50257, tp=8)
    (32, 128)
    """
    return next((step for step in (128, 64, 32, 16, 8) if vocab_size % (step * tp) == 0), 128)


def pipeline_layout(layers_per_stage: tuple[int, ...]) -> str:
    """Return the explicit layout of stages: embedding, layers and loss, stages parted by bars.

    Examples
    --------
    >>> pipeline_layout((3, 4, 4, 3))
    'Et*3|t*4|t*4|t*3L'
    """
    stages = [f"t*{count}" if count else "" for count in layers_per_stage]
    stages[0] = "E" + stages[0]
    stages[-1] += "L"
    return "|".join(stages)


def _model(job: TrainingJob, plan: ParallelPlan) -> tuple[tuple[str, ...], ...]:
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
    return tuple(options)


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
    if moe.num_dense_layers or moe.layer_frequency > 1:
        options.append(("--moe-layer-freq", _layer_pattern(moe, num_layers)))
    return options


def _layer_pattern(moe: MoeSpec, num_layers: int) -> str:
    """Return which layers are MoE (1) as the list expression Megatron evaluates, e.g. ``[0]*3+[1]*58``."""
    kinds = [
        int(index >= moe.num_dense_layers and (index - moe.num_dense_layers) % moe.layer_frequency == 0)
        for index in range(num_layers)
    ]
    return "+".join(f"[{kind}]*{len(list(run))}" for kind, run in itertools.groupby(kinds))


def _parallel(job: TrainingJob, plan: ParallelPlan, has_experts: bool) -> tuple[tuple[str, ...], ...]:
    options: Options = [
        ("--tensor-model-parallel-size", str(plan.tp)),
        ("--pipeline-model-parallel-size", str(plan.pp)),
        ("--context-parallel-size", str(plan.cp)),
    ]
    if plan.sequence_parallel:
        options.append(("--sequence-parallel",))
        if plan.tp <= job.cluster.node.num_gpus and load_software(job.software).tp_overlap > 0:
            # The prediction counts on it: products pipelined with their gathers inside one scale-up domain.
            options.append(("--tp-comm-overlap",))
    if plan.cp > 1:
        options.append(("--cp-comm-type", "p2p"))
    if has_experts:
        # Unset, expert tensor parallelism would silently equal tp.
        options += [
            ("--expert-model-parallel-size", str(plan.ep)),
            ("--expert-tensor-parallel-size", str(plan.etp)),
        ]
    if len(set(plan.layers_per_stage)) > 1:
        options.append(("--pipeline-model-parallel-layout", pipeline_layout(plan.layers_per_stage)))
    elif plan.vpp > 1:
        options.append(("--num-layers-per-virtual-pipeline-stage", str(plan.layers_per_stage[0])))
    return (*options, *_sharding(plan))


def _sharding(plan: ParallelPlan) -> Options:
    options: Options = []
    if plan.sharding != "none":
        options.append(("--use-distributed-optimizer",))
    if is_fully_sharded(plan):
        options += [
            ("--use-megatron-fsdp",),
            ("--data-parallel-sharding-strategy", _FSDP_STRATEGY[plan.sharding]),
            ("--no-gradient-accumulation-fusion",),
            ("--ckpt-format", "fsdp_dtensor"),
        ]
    if num_sharding_groups(plan) > 1:
        options.append(("--num-distributed-optimizer-instances", str(num_sharding_groups(plan))))
    if plan.dp * plan.cp > 1:
        options.append(("--overlap-grad-reduce",))
        if plan.sharding != "none":
            options.append(("--overlap-param-gather",))
    return options


def _training(job: TrainingJob, plan: ParallelPlan) -> tuple[tuple[str, ...], ...]:
    options: Options = [
        ("--micro-batch-size", str(plan.micro_batch_size)),
        ("--global-batch-size", str(job.workload.global_batch_size)),
        ("--seq-length", str(job.workload.sequence_length)),
        *_PRECISION[job.workload.precision],
    ]
    if plan.recompute == "selective":
        options += [("--recompute-granularity", "selective"), ("--recompute-modules", "core_attn")]
    elif plan.recompute == "full":
        options += [
            ("--recompute-granularity", "full"),
            ("--recompute-method", "uniform"),
            ("--recompute-num-layers", "1"),
        ]
    options += [
        ("--train-iters", "100"),
        ("--lr", "3.0e-4"),
        ("--min-lr", "3.0e-5"),
        ("--lr-decay-style", "cosine"),
        ("--lr-warmup-iters", "10"),
        ("--weight-decay", "0.1"),
        ("--clip-grad", "1.0"),
        ("--log-interval", "1"),
        ("--eval-iters", "1"),
    ]
    return tuple(options)
