"""Megatron-LM's spelling of a plan (core_r0.16): parallelism, batch, precision, recompute, offload.

Every option is written even where it equals Megatron's default today, if a plan's cost depends on it.
"""

from __future__ import annotations

from meshwright.costmodels.software import load_software
from meshwright.planner.export.megatron_model import Options, model_options
from meshwright.planner.export.megatron_rules import (
    head_exchange_ranks,
    is_fully_sharded,
    num_sharding_groups,
)
from meshwright.planner.export.scripts import ArgumentGroup
from meshwright.simcore.domain.device_mapping import RANK_ORDERS
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = [
    "CP_COMM_TYPE",
    "FSDP_STRATEGY",
    "counts_on_tp_overlap",
    "megatron_arguments",
    "pipeline_layout",
]

_PRECISION: dict[str, tuple[tuple[str, ...], ...]] = {
    "bf16": (("--bf16",),),
    "fp16": (("--fp16",),),
    "fp8": (("--bf16",), ("--fp8-format", "hybrid"), ("--fp8-recipe", "delayed")),
    "fp8_block": (("--bf16",), ("--fp8-format", "e4m3"), ("--fp8-recipe", "blockwise")),
    "mxfp8": (("--bf16",), ("--fp8-format", "e4m3"), ("--fp8-recipe", "mxfp8")),
}
FSDP_STRATEGY = {"zero2": "optim_grads", "zero3": "optim_grads_params", "hsdp": "optim_grads_params"}
# Names that Transformer Engine knows; the help text of the option says "allgather", which it does not.
CP_COMM_TYPE = {"ring": "p2p", "ulysses": "a2a", "all_gather": "all_gather", "hierarchical": "a2a+p2p"}


def megatron_arguments(job: TrainingJob, plan: ParallelPlan) -> tuple[ArgumentGroup, ...]:
    """Return the arguments of ``pretrain_gpt.py`` in four groups: model, parallelism, training, data.

    Parameters
    ----------
    job, plan : TrainingJob, ParallelPlan
        A plan that breaks no rule of the target.
    """
    return (
        ArgumentGroup(name="MODEL_ARGS", comment="The model's shape.", options=tuple(model_options(job, plan))),
        ArgumentGroup(name="PARALLEL_ARGS", comment="The plan.", options=tuple(_parallel(job, plan))),
        ArgumentGroup(name="TRAINING_ARGS", comment="Batch, precision, recompute, optimizer.",
                      options=tuple(_training(job, plan))),
        ArgumentGroup(
            name="DATA_ARGS",
            comment="EDIT HERE: random tokens for now; put your tokenizer and --data-path in place of all four lines.",
            # The null tokenizer adds one token of its own.
            options=(("--tokenizer-type", "NullTokenizer"), ("--vocab-size", str(max(1, job.model.vocab_size - 1))),
                     ("--mock-data",), ("--split", "99,1,0")),
        ),
    )  # fmt: skip


def pipeline_layout(layers_per_stage: tuple[int, ...], num_mtp_layers: int = 0) -> str:
    """Return the explicit layout of stages: embedding, layers, multi-token prediction and loss, parted by bars.

    Examples
    --------
    >>> pipeline_layout((3, 4, 4, 3))
    'Et*3|t*4|t*4|t*3L'
    >>> pipeline_layout((2, 1), num_mtp_layers=1)
    'Et*2|t*1mL'
    """
    stages = [f"t*{count}" if count else "" for count in layers_per_stage]
    stages[0] = "E" + stages[0]
    stages[-1] += "m" * num_mtp_layers + "L"
    return "|".join(stages)


def counts_on_tp_overlap(job: TrainingJob, plan: ParallelPlan) -> bool:
    """Return whether the prediction pipelines products with their gathers, inside one scale-up domain."""
    fits = plan.sequence_parallel and plan.tp <= job.cluster.node.num_gpus
    return fits and load_software(job.software).tp_overlap > 0


def _parallel(job: TrainingJob, plan: ParallelPlan) -> Options:
    options: Options = [
        ("--tensor-model-parallel-size", str(plan.tp)),
        ("--pipeline-model-parallel-size", str(plan.pp)),
        ("--context-parallel-size", str(plan.cp)),
    ]
    if plan.device_mapping is not None and plan.device_mapping.rank_order != RANK_ORDERS[0]:
        options.append(("--use-tp-pp-dp-mapping",))
    if plan.sequence_parallel:
        options.append(("--sequence-parallel",))
        if counts_on_tp_overlap(job, plan):
            options.append(("--tp-comm-overlap",))
    options += _context_parallel(job, plan)
    if job.model.moe is not None:
        # Unset, expert tensor parallelism would silently equal tp.
        options += [
            ("--expert-model-parallel-size", str(plan.ep)),
            ("--expert-tensor-parallel-size", str(plan.etp)),
        ]
    if len(set(plan.layers_per_stage)) > 1:
        layout = pipeline_layout(plan.layers_per_stage, job.model.num_mtp_layers)
        options.append(("--pipeline-model-parallel-layout", layout))
    elif plan.vpp > 1:
        options.append(("--num-layers-per-virtual-pipeline-stage", str(plan.layers_per_stage[0])))
    return [*options, *_sharding(plan)]


def _context_parallel(job: TrainingJob, plan: ParallelPlan) -> Options:
    if plan.cp == 1:
        return []
    options: Options = [("--cp-comm-type", CP_COMM_TYPE[plan.cp_method])]
    if plan.cp_method == "hierarchical":
        inner = head_exchange_ranks(job, plan)
        # The first level is the innermost: neighbours in rank.
        options.append(("--hierarchical-context-parallel-sizes", str(inner), str(plan.cp // inner)))
    return options


def _sharding(plan: ParallelPlan) -> Options:
    options: Options = []
    if plan.sharding != "none":
        options.append(("--use-distributed-optimizer",))
    if is_fully_sharded(plan):
        options += [
            ("--use-megatron-fsdp",),
            ("--data-parallel-sharding-strategy", FSDP_STRATEGY[plan.sharding]),
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


def _training(job: TrainingJob, plan: ParallelPlan) -> Options:
    return [
        ("--micro-batch-size", str(plan.micro_batch_size)),
        ("--global-batch-size", str(job.workload.global_batch_size)),
        ("--seq-length", str(job.workload.sequence_length)),
        *_PRECISION[job.workload.precision],
        *_recompute(plan),
        *_offload(plan),
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


def _recompute(plan: ParallelPlan) -> Options:
    if plan.recompute == "selective":
        modules = tuple(dict.fromkeys(plan.recompute_modules)) or ("core_attn",)
        return [("--recompute-granularity", "selective"), ("--recompute-modules", *modules)]
    if plan.recompute == "none":
        return []
    # "block" recomputes the first layers of every chunk of the model, one by one; "uniform" all of them.
    method, count = ("uniform", 1) if plan.recompute_layers is None else ("block", plan.recompute_layers)
    return [
        ("--recompute-granularity", "full"),
        ("--recompute-method", method),
        ("--recompute-num-layers", str(count)),
    ]


def _offload(plan: ParallelPlan) -> Options:
    options: Options = []
    if plan.optimizer_offload == "cpu":
        options += [
            ("--optimizer-cpu-offload",),
            ("--optimizer-offload-fraction", f"{plan.optimizer_offload_fraction:g}"),
            ("--use-precision-aware-optimizer",),
            ("--overlap-cpu-optimizer-d2h-h2d",),
        ]
    if plan.activation_offload:
        # The last layer is needed again at once; Megatron offloads fewer layers than there are.
        options.append(("--cpu-offloading-num-layers", str(plan.num_layers - 1)))
    return options
