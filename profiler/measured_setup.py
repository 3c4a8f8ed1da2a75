"""What a measured run means: one row becomes a job and a plan, or a reason why it cannot.

Dimensions in a row win over a preset of the model's name; a row that does not state what its prediction
needs is skipped, never guessed, except for :data:`DEFAULT_VOCAB_SIZE` and :data:`_NODES`; what was assumed
is among the remarks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from meshwright.costmodels.context import KNOWN_FEATURES
from meshwright.costmodels.plan_columns import V_SHAPED
from meshwright.costmodels.software import AttentionKernel, list_software
from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import load_fabric, load_gpu, load_node, resolve_cluster
from meshwright.hardware_specs.specs import ClusterSpec, NodeSpec
from meshwright.profiler.measured_runs import MeasuredRun
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model import ModelSpec, MoeSpec
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import (
    ParallelPlan,
    Recompute,
    ScheduleName,
    Sharding,
    VocabParallel,
    partition_layers,
)
from meshwright.simcore.domain.workload import Precision, TrainingWorkload

__all__ = [
    "DEFAULT_VOCAB_SIZE",
    "IncompleteRowError",
    "MeasuredSetup",
    "UnstatedError",
    "measured_setup",
    "unknown_features",
]

# GPT-2's vocabulary padded to a multiple of 128, what Megatron trains with when a paper does not say.
DEFAULT_VOCAB_SIZE = 50_304
# The node a bare GPU id means, when a row names no cluster.
_NODES: Mapping[str, str] = {
    "v100-sxm2-32": "v100-4",
    "a100-sxm-40": "dgx-a100-40",
    "a100-sxm-80": "dgx-a100",
    "a100-pcie-80": "a100-pcie-8",
    "a800-sxm-80": "hgx-a800",
    "h100-sxm-80": "dgx-h100",
    "h100-pcie-80": "h100-pcie-8",
    "h100-sxm-96-hbm2e": "h100-96-8",
    "h800-sxm-80": "hgx-h800",
    "h20-sxm-96": "hgx-h20",
    "h200-sxm-141": "dgx-h200",
    "b200-sxm-180": "dgx-b200",
    "b300-sxm-270": "dgx-b300",
    "gb200": "gb200-nvl72",
    "gb300": "gb300-nvl72",
    "mi250x-gcd": "frontier",
    "mi300x": "mi300x-8",
    "mi325x": "mi325x-8",
    "mi355x": "mi355x-8",
    "gaudi3": "gaudi3-8",
    "ascend-910b": "ascend-910b-8",
    "l4": "l4-8",
    "l40s": "l40s-8",
    "a10g": "a10g-8",
    "rtx-4090": "rtx-4090-8",
    "rtx-pro-6000-server": "rtx-pro-6000-8",
    "cpu-host": "cpu-host-1",
}
# Named stacks without a generation file of their own, and the one whose overheads they borrow.
_SOFTWARE_LENDERS: Mapping[str, str] = {
    "meta-llama3": "megatron-core",
    "megatron-bridge": "megatron-core",
    "nemo": "megatron-core",
    "primus": "megatron-core",
    "deepseek-hai": "megatron-core",
    "megatron-2022": "megatron-2021",
    "megatron-deepspeed-2023": "megatron-deepspeed-2022",
    "metaseq-2022": "megatron-2021",
}
# Beyond any count or dimension of a table; keeps products inside 64 bits.
_MAX_INTEGER = 1e9
_FALLBACK_SOFTWARE = "megatron-core"


class IncompleteRowError(Exception):
    """A row does not state what its prediction needs; the message is the reason printed for it."""


class UnstatedError(IncompleteRowError):
    """A row leaves blank what its prediction needs: context for a reader, nothing that could be scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSetup:
    """What a row means: the job, the plan and how the software was switched."""

    job: TrainingJob
    plan: ParallelPlan
    features: frozenset[str]
    attention_kernel: AttentionKernel | None
    remarks: tuple[str, ...]


def measured_setup(run: MeasuredRun) -> MeasuredSetup:
    """Return the job and plan a row describes.

    Raises
    ------
    IncompleteRowError
        If the row lacks or misstates what its prediction needs.
    """
    remarks: list[str] = []
    try:
        model = _model(run, remarks)
        num_gpus = _integer(run, "n_gpus")
        cluster = _cluster(run, num_gpus)
        workload = TrainingWorkload(
            global_batch_size=_integer(run, "global_batch"),
            sequence_length=_integer(run, "seq_len"),
            precision=cast("Precision", run.cell("precision") or "bf16"),
        )
        plan = _plan(run, model, num_gpus)
        plan = _split_local_batch(run, plan, workload.global_batch_size, remarks)
        plan.num_micro_batches(workload.global_batch_size)
    except SpecError as error:
        raise IncompleteRowError(str(error)) from None
    features = frozenset(_features(run))
    software = _software(run, remarks)
    if "parallel_block" in features:
        model = replace(model, has_parallel_block=True)
    kernel: AttentionKernel | None = None
    states_attention = bool(run.cell("flash_attention"))
    is_fused = _flag(run, "flash_attention", True)
    if states_attention and not is_fused:
        kernel = "unfused"
    elif states_attention and software in ("megatron-2021", "megatron-deepspeed-2022"):
        kernel = "flash_2"
    job = TrainingJob(model=model, cluster=cluster, workload=workload, software=software)
    return MeasuredSetup(
        job=job,
        plan=plan,
        features=features & KNOWN_FEATURES,
        attention_kernel=kernel,
        remarks=tuple(remarks),
    )


def unknown_features(runs: tuple[MeasuredRun, ...]) -> tuple[str, ...]:
    """Return the features of a table that no cost model knows, each once, sorted."""
    words = {word for run in runs for word in _features(run)}
    return tuple(sorted(words - KNOWN_FEATURES - {"balanced_routing", "parallel_block"}))


def _features(run: MeasuredRun) -> tuple[str, ...]:
    return tuple(word.strip() for word in run.cell("features").split(";") if word.strip())


def _integer(run: MeasuredRun, column: str, default: int | None = None) -> int:
    text = run.cell(column)
    if not text:
        if default is None:
            raise UnstatedError(f"{column} is not stated")
        return default
    try:
        value = float(text)
    except ValueError:
        raise IncompleteRowError(f"{column}: '{text}' is not a whole number") from None
    if not 1.0 <= value <= _MAX_INTEGER or value != int(value):
        raise IncompleteRowError(f"{column}: '{text}' is not a whole number above zero")
    return int(value)


def _flag(run: MeasuredRun, column: str, default: bool) -> bool:
    text = run.cell(column)
    if text not in ("", "y", "n"):
        raise IncompleteRowError(f"{column}: '{text}' is neither y nor n")
    return default if not text else text == "y"


# The two recipes a table's rows follow when no preset has their name; the sizes are always the row's.
_GPT = ModelSpec(
    name="gpt",
    num_layers=1,
    hidden_size=1,
    ffn_hidden_size=1,
    num_attention_heads=1,
    num_query_groups=1,
    head_dim=1,
    vocab_size=DEFAULT_VOCAB_SIZE,
    max_position_embeddings=2048,
    is_gated_mlp=False,
    has_tied_embeddings=True,
    normalization="layernorm",
    position_embedding="learned",
    has_qkv_bias=True,
    has_attention_output_bias=True,
    has_mlp_bias=True,
)
_LLAMA = replace(
    _GPT,
    name="llama",
    is_gated_mlp=True,
    has_tied_embeddings=False,
    normalization="rmsnorm",
    position_embedding="rope",
    has_qkv_bias=False,
    has_attention_output_bias=False,
    has_mlp_bias=False,
)


def _model(run: MeasuredRun, remarks: list[str]) -> ModelSpec:
    preset = _preset(run.cell("model").lower())
    base = preset or (_LLAMA if _flag(run, "gated_mlp", False) else _GPT)
    heads = _integer(run, "n_heads", preset.num_attention_heads if preset else None)
    hidden = _integer(run, "hidden", preset.hidden_size if preset else None)
    if preset is None and not run.cell("vocab"):
        remarks.append(f"vocab {DEFAULT_VOCAB_SIZE} assumed")
    keeps_shape = (heads, hidden) == (base.num_attention_heads, base.hidden_size)
    return replace(
        base,
        name=run.cell("model"),
        num_layers=_integer(run, "n_layers", preset.num_layers if preset else None),
        hidden_size=hidden,
        ffn_hidden_size=_integer(run, "ffn_hidden", preset.ffn_hidden_size if preset else None),
        num_attention_heads=heads,
        num_query_groups=_integer(run, "n_kv_heads", preset.num_query_groups if preset else heads),
        head_dim=_integer(run, "head_dim", base.head_dim if keeps_shape else max(1, hidden // heads)),
        vocab_size=_integer(run, "vocab", base.vocab_size),
        max_position_embeddings=max(base.max_position_embeddings, _integer(run, "seq_len")),
        is_gated_mlp=_flag(run, "gated_mlp", base.is_gated_mlp),
        has_tied_embeddings=_flag(run, "tied_embeddings", base.has_tied_embeddings),
        moe=_experts(run, base.moe),
    )


def _experts(run: MeasuredRun, base: MoeSpec | None) -> MoeSpec | None:
    """Return the row's mixture of experts over the preset's; None for a dense model."""
    num_experts = (
        0 if run.cell("n_experts") == "0" else _integer(run, "n_experts", base.num_experts if base else 1)
    )
    if num_experts <= 1:
        return None
    top_k = _integer(run, "topk", base.top_k if base else None)
    width = _integer(run, "moe_ffn", base.moe_ffn_hidden_size if base else None)
    if base is None:
        return MoeSpec(num_experts=num_experts, top_k=top_k, moe_ffn_hidden_size=width)
    return replace(base, num_experts=num_experts, top_k=top_k, moe_ffn_hidden_size=width)


def _preset(name: str) -> ModelSpec | None:
    """Return the preset of a published name; None when there is none (a table never names a file)."""
    try:
        return None if "/" in name or name.endswith((".json", ".yaml")) else load_model(name)
    except SpecError:
        return None


def _cluster(run: MeasuredRun, num_gpus: int) -> ClusterSpec:
    if run.cell("cluster"):
        named = resolve_cluster(run.cell("cluster"))
        if named.num_gpus < num_gpus:
            raise IncompleteRowError(
                f"cluster {named.id} has {named.num_gpus} GPUs, but the row says {num_gpus}"
            )
        return named
    gpu = load_gpu(run.cell("gpu"))
    base = load_node(_NODES.get(gpu.id, "dgx-h100"))
    per_node = _integer(run, "gpus_per_node", min(base.num_gpus, 8) if gpu.id in _NODES else 8)
    node = _node(base, gpu.id, per_node)
    if run.cell("internode_gbit_per_node"):
        bandwidth = float(_integer(run, "internode_gbit_per_node")) * 1e9 / 8.0 / node.num_nics
        node = replace(node, nic=replace(node.nic, bandwidth_bytes_per_second=bandwidth))
    num_nodes = -(-num_gpus // node.num_gpus)
    return ClusterSpec(
        id=f"{run.id}", node=node, num_nodes=num_nodes, fabric=load_fabric(node.default_fabric)
    )


def _node(base: NodeSpec, gpu_id: str, per_node: int) -> NodeSpec:
    """Return the node with the row's GPU and count; NICs stay one share per GPU. Rack domains stay whole."""
    is_rack = base.num_gpus > 8
    num_gpus = base.num_gpus if is_rack else per_node
    if num_gpus == base.num_gpus and base.gpu.id == gpu_id:
        return base
    num_nics = max(1, round(base.num_nics * num_gpus / base.num_gpus))
    return replace(base, gpu=load_gpu(gpu_id), num_gpus=num_gpus, num_nics=num_nics)


def _plan(run: MeasuredRun, model: ModelSpec, num_gpus: int) -> ParallelPlan:
    tp, pp, cp = _integer(run, "tp"), _integer(run, "pp"), _integer(run, "cp", 1)
    if num_gpus % (tp * pp * cp):
        raise IncompleteRowError(f"tp x pp x cp = {tp} x {pp} x {cp} does not divide {num_gpus} GPUs")
    dp = _integer(run, "dp", num_gpus // (tp * pp * cp))
    if dp * tp * pp * cp != num_gpus:
        raise IncompleteRowError(f"tp x pp x cp x dp = {tp * pp * cp * dp}, but the row says {num_gpus} GPUs")
    schedule, vpp = _schedule(run, pp)
    if not run.cell("recompute"):
        raise UnstatedError("recompute is not stated")
    # ParallelPlan checks the words themselves and names the known ones.
    sharding = cast("Sharding", run.cell("sharding") or "none")
    if not run.cell("sharding") and dp > 1:
        raise UnstatedError("sharding is not stated")
    vocab_parallel = cast("VocabParallel", run.cell("vocab_parallel") or "none")
    recompute = cast("Recompute", run.cell("recompute"))
    ep = _integer(run, "ep", 1) if model.moe is not None else 1
    layers = partition_layers(model.num_layers, pp * vpp)
    if vocab_parallel == "redistributed":
        layers = _redistributed_layers(model, pp)
    return ParallelPlan(
        dp=dp,
        tp=tp,
        pp=pp,
        vpp=vpp,
        cp=cp,
        ep=ep,
        # Megatron splits experts like everything else unless they are spread; rows never say otherwise.
        etp=tp if model.moe is not None and ep == 1 else 1,
        sequence_parallel=_flag(run, "sequence_parallel", False) and tp > 1,
        micro_batch_size=_integer(run, "micro_batch"),
        schedule=schedule,
        recompute=recompute,
        sharding=sharding if dp * cp > 1 else "none",
        sharding_group=_integer(run, "sharding_group") if run.cell("sharding_group") else None,
        vocab_parallel=vocab_parallel,
        layers_per_stage=layers,
    )


def _split_local_batch(
    run: MeasuredRun, plan: ParallelPlan, global_batch: int, remarks: list[str]
) -> ParallelPlan:
    """Split a torchtitan local batch into its pipeline micro-batches.

    torchtitan's tables state the local batch; under a pipeline it runs as ``pp`` micro-batches by default
    (``--experimental.pipeline_parallel_microbatches`` of the 2024 releases).
    """
    is_whole_batch = plan.micro_batch_size * plan.dp == global_batch
    if (
        run.cell("software") != "torchtitan"
        or plan.pp == 1
        or not is_whole_batch
        or plan.micro_batch_size % plan.pp
    ):
        return plan
    remarks.append(f"local batch {plan.micro_batch_size} run as {plan.pp} micro-batches")
    return replace(plan, micro_batch_size=plan.micro_batch_size // plan.pp)


def _schedule(run: MeasuredRun, pp: int) -> tuple[ScheduleName, int]:
    if pp == 1:
        return "none", 1
    name = run.cell("schedule")
    stated = run.cell("vpp")
    if name in ("", "interleaved_1f1b") and not stated:
        raise UnstatedError("vpp is not stated for an interleaved or unnamed schedule")
    vpp = 2 if name in V_SHAPED else _integer(run, "vpp", 1)
    if not name or name == "none":
        name = "interleaved_1f1b" if vpp > 1 else "1f1b"
    if name == "interleaved_1f1b" and vpp == 1:
        name = "1f1b"
    return cast("ScheduleName", name), vpp


def _redistributed_layers(model: ModelSpec, pp: int) -> tuple[int, ...]:
    """Move layers from the last stage to those before it, so that the LM head's weights make up for them.

    The vocabulary-parallel artifact (artifact/test_one_host.csv: 4, 4, 4, 5, 5, 5, 5, 0 for 32 layers and a head of
    6.25) lets the last stage hold head and layers of about one layer more than the even share, and gives what it
    moves to the stages before it, one each; its other vocabularies take the times and memories of the same rule.
    """
    head = model.vocab_size * model.hidden_size / model.num_layer_parameters
    even = model.num_layers // pp
    if pp < 3 or model.num_layers % pp:
        return partition_layers(model.num_layers, pp)
    last = min(max(round(even + 1 - head), 0), even)
    moved = even - last
    every, rest = divmod(moved, pp - 1)
    others = [even + every + (stage >= pp - 1 - rest) for stage in range(pp - 1)]
    return (*others, last)


def _software(run: MeasuredRun, remarks: list[str]) -> str:
    name = run.cell("software")
    if name in list_software():
        return name
    lender = _SOFTWARE_LENDERS.get(name, _FALLBACK_SOFTWARE)
    remarks.append(f"software '{name or 'blank'}' borrows the overheads of {lender}")
    return lender
