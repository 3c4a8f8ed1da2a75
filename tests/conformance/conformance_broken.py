"""Plans that cannot work, built by hand: each breaks one rule of its target, and maybe others that follow from it.

Those that no plan can even state (a sharding group that does not divide dp, interleaving without a pipeline) are refused
when the plan is built. Rules that only concern what the exporters write themselves (environment, overlap switches,
options that exclude each other) have no broken plan; the accepted ones show that they hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.export import EXPORTERS, ExportBundle
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.layer_groups import LayerGroup
from meshwright.simcore.domain.model import ModelSpec, MoeSpec
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan, partition_layers
from meshwright.simcore.domain.workload import TrainingWorkload

__all__ = ["BROKEN", "BrokenPlan", "reasons_of", "unchecked_bundle"]

Built = tuple[TrainingJob, ParallelPlan]


class BrokenPlan(NamedTuple):
    """One plan that must be refused: for which target, the rule it breaks, and how to build it."""

    target: str
    rule: str
    build: Callable[[], Built]


def reasons_of(broken: BrokenPlan) -> tuple[str, ...]:
    """Return why Meshwright refuses a plan; empty when it does not."""
    try:
        job, plan = broken.build()
    except SpecError as error:
        return (str(error),)
    return EXPORTERS[broken.target].unsupported(job, plan)


def unchecked_bundle(broken: BrokenPlan) -> ExportBundle | None:
    """Return what the exporter would write without its rules; None where nothing can be written."""
    try:
        job, plan = broken.build()
        with _without_rules():
            return EXPORTERS[broken.target].export(job, plan, "torchrun")
    except (SpecError, IndexError, KeyError, ZeroDivisionError):
        return None


@contextlib.contextmanager
def _without_rules() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in ("accelerate", "deepspeed", "megatron", "torchtitan"):
            stack.enter_context(mock.patch(f"meshwright.planner.export.{module}.raise_if_unsupported"))
        yield


def _built(model: str | ModelSpec, job: dict[str, Any], **plan: Any) -> Callable[[], Built]:
    def build() -> Built:
        spec = load_model(model) if isinstance(model, str) else model
        wanted = {"cluster": "dgx-h100:4", "batch": 128, "length": 4096, "software": "megatron-core"} | job
        cluster, batch, length, software = (
            wanted.pop(name) for name in ("cluster", "batch", "length", "software")
        )
        workload = TrainingWorkload(global_batch_size=batch, sequence_length=length, **wanted)
        pp, vpp = plan.get("pp", 1), plan.get("vpp", 1)
        fields = {
            "dp": 1,
            "micro_batch_size": 1,
            "schedule": "none" if pp == 1 else "interleaved_1f1b" if vpp > 1 else "1f1b",
        } | plan
        if "layers_per_stage" not in fields:
            fields["layers_per_stage"] = partition_layers(spec.num_layers, pp * vpp)
        return (
            TrainingJob(model=spec, cluster=resolve_cluster(cluster), workload=workload, software=software),
            ParallelPlan(**fields),
        )

    return build


def _changed(model: str, **fields: Any) -> ModelSpec:
    return dataclasses.replace(load_model(model), **fields)


LLAMA, BIG, MOE, MLA = "llama-3-8b", "llama-3-70b", "mixtral-8x7b", "deepseek-v2-lite"
SP = {"sequence_parallel": True}
ODD_HEADS = _changed(LLAMA, num_attention_heads=24, num_query_groups=8, ffn_hidden_size=12288)
WINDOWED = _changed(LLAMA, sliding_window=1024)
BIASED_MOE = _changed(MOE, has_mlp_bias=True, has_qkv_bias=True, has_attention_output_bias=True)
ODD_WIDTH = _changed(MOE, moe=MoeSpec(num_experts=8, top_k=2, moe_ffn_hidden_size=14340))
OTHER_ORDER = DeviceMapping(rank_order="tp-cp-ep-pp-dp")
MTP = _changed(LLAMA, num_mtp_layers=1)
LONG = {"length": 131072, "batch": 8}
TITAN = {"software": "torchtitan"}

_MEGATRON: dict[str, Callable[[], Built]] = {
    "the world fits the cluster": _built(LLAMA, {}, dp=64),
    "ranks fill whole nodes": _built(LLAMA, {"batch": 12}, dp=12),
    "etp x ep x pp divides the world": _built(MOE, {}, dp=4, ep=8),
    "etp x ep x pp divides the world, etp above 1": _built(
        "qwen3-30b-a3b", {}, dp=8, tp=4, ep=32, etp=4, **SP
    ),
    "heads divide by tp": _built(LLAMA, {"cluster": "dgx-h100:3"}, tp=3, dp=8),
    "heads divide by tp: 28 heads": _built("qwen2.5-7b", {}, tp=8, dp=4, **SP),
    "key/value heads divide by tp or tp by them": _built(ODD_HEADS, {"cluster": "dgx-h100:3"}, tp=12, dp=2),
    "sequence parallelism needs tp": _built(LLAMA, {}, dp=8, **SP),
    "experts with tp need sequence parallelism": _built(MOE, {}, dp=4, tp=2, ep=4),
    "stages hold every layer": _built("llama-3-8b", {}, dp=4, pp=4, layers_per_stage=(7, 7, 7, 7)),
    "chunks of a stage have layers each": _built(LLAMA, {}, dp=4, pp=4, vpp=2, layers_per_stage=(8, 8, 8, 8)),
    "interleaving needs a pipeline": _built(LLAMA, {}, dp=8, vpp=2, schedule="interleaved_1f1b"),
    "interleaving fills groups of pp micro-batches": _built(
        LLAMA, {"batch": 96}, dp=16, pp=2, vpp=2, micro_batch_size=2
    ),
    "interleaving fills groups of pp micro-batches: 6 of 4": _built(LLAMA, {"batch": 48}, dp=8, pp=4, vpp=2),
    "no stage holds fewer than none": _built(LLAMA, {}, dp=8, pp=2, layers_per_stage=(33, -1)),
    "the batch divides by dp x micro-batch": _built(LLAMA, {"batch": 100}, dp=8),
    "the sequence cuts into 2 cp chunks": _built(LLAMA, {"length": 4098}, dp=4, cp=2),
    "the sequence cuts by tp": _built(LLAMA, {"length": 4098}, dp=4, tp=4, **SP),
    "positions reach the sequence": _built("gpt3-175b", {"length": 4096}, dp=4, tp=8),
    "a hierarchy needs several ranks per node": _built(BIG, LONG, tp=8, cp=4, cp_method="hierarchical", **SP),
    "a hierarchy needs several nodes": _built(LLAMA, LONG, tp=2, cp=4, cp_method="hierarchical", **SP),
    "head exchange needs key/value heads": _built(LLAMA, LONG, cp=16, cp_method="ulysses"),
    "head exchange needs key/value heads, with tp": _built(
        LLAMA, LONG, cp=4, tp=4, cp_method="ulysses", **SP
    ),
    "a hierarchy needs key/value heads": _built(
        "qwen2.5-7b", {"length": 32768, "batch": 8}, tp=2, cp=16, cp_method="hierarchical", **SP
    ),
    "latent attention has no head exchange": _built(MLA, LONG, cp=4, cp_method="ulysses"),
    "a window excludes the ring": _built(WINDOWED, {}, dp=8, cp=2),
    "ep divides the experts": _built(MOE, {"cluster": "dgx-h100:3", "batch": 96}, dp=24, ep=3),
    "ep needs experts": _built(LLAMA, {}, dp=8, ep=2),
    "etp needs experts": _built(LLAMA, {}, dp=8, tp=2, etp=2),
    "etp divides the experts' width": _built(ODD_WIDTH, {}, dp=4, tp=8, etp=8, **SP),
    "expert biases need etp 1": _built(BIASED_MOE, {}, dp=4, tp=2, ep=4, etp=2, **SP),
    "FSDP has no pipeline": _built(LLAMA, {}, dp=8, pp=2, sharding="zero3"),
    "FSDP has no pipeline: zero2": _built(LLAMA, {}, dp=8, pp=2, sharding="zero2"),
    "FSDP has no pipeline: hsdp": _built(LLAMA, {}, dp=8, pp=2, sharding="hsdp", sharding_group=4),
    "zero2 spans all of dp": _built(LLAMA, {}, dp=8, sharding="zero2", sharding_group=4),
    "experts are sharded over all of dp": _built(MOE, {}, dp=16, ep=4, sharding="zero1", sharding_group=8),
    "a sharding group divides dp": _built(LLAMA, {}, dp=8, sharding="zero1", sharding_group=3),
    "recompute names what the model has": _built(
        LLAMA, {}, dp=8, recompute="selective", recompute_modules=("moe_act",)
    ),
    "recompute names modules that exist": _built(
        LLAMA, {}, dp=8, recompute="selective", recompute_modules=("mlps",)
    ),
    "recompute names no part of a part": _built(
        MOE, {}, dp=8, ep=8, recompute="selective", recompute_modules=("moe", "moe_act")
    ),
    "modules go with selective recompute": _built(
        LLAMA, {}, dp=8, recompute="full", recompute_modules=("core_attn",)
    ),
    "recompute counts the layers of a stage": _built(
        LLAMA, {}, dp=8, pp=4, recompute="full", recompute_layers=9
    ),
    "delayed scaling excludes norms": _built(
        LLAMA, {"precision": "fp8"}, dp=8, recompute="selective", recompute_modules=("layernorm",)
    ),
    "layer offload has no pipeline": _built(LLAMA, {}, dp=8, pp=2, activation_offload=True),
    "layer offload has no recompute": _built(LLAMA, {}, dp=8, recompute="full", activation_offload=True),
    "optimizer offload needs shards": _built(LLAMA, {}, dp=8, optimizer_offload="cpu"),
    "optimizer offload excludes FSDP": _built(LLAMA, {}, dp=8, sharding="zero3", optimizer_offload="cpu"),
    "optimizer offload knows host memory only": _built(
        LLAMA, {}, dp=8, sharding="zero1", optimizer_offload="nvme"
    ),
    "weights stay": _built(
        LLAMA, {}, dp=8, sharding="zero3", parameter_offload="cpu", optimizer_offload="cpu"
    ),
    "no secondary weights": _built(LLAMA, {}, dp=8, sharding="zero3", secondary_group=4),
    "experts run in one piece": _built(MOE, {}, dp=8, ep=8, expert_overlap=2),
    "schedules: gpipe": _built(LLAMA, {}, dp=8, pp=2, schedule="gpipe"),
    "schedules: zero bubble": _built(LLAMA, {}, dp=8, pp=2, schedule="zb_h1"),
    "schedules: V": _built(LLAMA, {}, dp=8, pp=2, vpp=2, schedule="zb_v"),
    "schedules: DualPipeV": _built(LLAMA, {}, dp=8, pp=2, vpp=2, schedule="dualpipe_v"),
    "schedule and pp agree": _built(LLAMA, {}, dp=8, pp=1, schedule="1f1b"),
    "the vocabulary stays whole": _built(LLAMA, {}, dp=8, pp=2, vocab_parallel="vocab_1"),
    "fp8 needs the GPU": _built(LLAMA, {"precision": "fp8", "cluster": "dgx-a100:4"}, dp=8),
    "mxfp8 needs the GPU": _built(LLAMA, {"precision": "mxfp8"}, dp=8),
    "fp8 needs aligned sizes": _built(LLAMA, {"precision": "fp8", "length": 4100}, dp=8, tp=2, **SP),
    "precision is known": _built(LLAMA, {"precision": "nvfp4"}, dp=8),
    "adapters belong to recipes": _built(LLAMA, {"lora_rank": 8}, dp=8),
    "layers run alike": _built(LLAMA, {}, dp=8, layer_groups=(LayerGroup(num_layers=32, sharding="zero3"),)),
    "a mapping names the plan's hosts": _built(
        LLAMA, {}, dp=32, device_mapping=DeviceMapping(host_order=(1, 0))
    ),
    "pp before dp needs equal replicas": _built(
        MOE, {}, dp=8, tp=2, pp=2, ep=8, device_mapping=OTHER_ORDER, **SP
    ),
    "pp before dp needs cp 1": _built(LLAMA, {}, dp=4, tp=2, pp=2, cp=2, device_mapping=OTHER_ORDER, **SP),
    "no ALiBi": _built("bloom-176b", {"length": 2048}, dp=2, tp=8),
    "blocks are sequential": _built("gpt-neox-20b", {"length": 2048}, dp=4, tp=8),
    "no attention sinks": _built("gpt-oss-20b", {}, dp=8),
}
_DEEPSPEED: dict[str, Callable[[], Built]] = {
    "a pipeline is the script's": _built(LLAMA, {}, dp=8, pp=2),
    "a pipeline excludes ZeRO-3": _built(LLAMA, {}, dp=8, pp=2, sharding="zero3"),
    "a pipeline excludes ZeRO-2": _built(LLAMA, {}, dp=8, pp=2, sharding="zero2"),
    "1F1B only": _built(LLAMA, {}, dp=8, pp=2, vpp=2),
    "AutoTP excludes ZeRO-3": _built(LLAMA, {}, dp=8, tp=2, sharding="zero3"),
    "AutoTP gives whole key/value heads": _built(LLAMA, {}, dp=2, tp=16, sharding="zero1"),
    "heads divide by tp": _built(LLAMA, {"cluster": "dgx-h100:3"}, tp=3, dp=8),
    "no Megatron sequence parallelism": _built(LLAMA, {}, dp=8, tp=2, **SP),
    "no ring": _built(LLAMA, {}, dp=8, cp=2, sharding="zero3"),
    "Ulysses splits heads": _built(
        LLAMA, {"cluster": "dgx-h100:3"}, dp=8, cp=3, cp_method="ulysses", sharding="zero3"
    ),
    "Ulysses excludes AutoTP": _built(LLAMA, {}, dp=4, cp=2, tp=2, cp_method="ulysses", sharding="zero1"),
    "Ulysses cuts the sequence": _built(
        LLAMA, {"length": 4095}, dp=8, cp=2, cp_method="ulysses", sharding="zero3"
    ),
    "hpZ divides the ranks": _built(LLAMA, {}, dp=8, sharding="zero3", secondary_group=3),
    "hpZ goes with ZeRO-3": _built(LLAMA, {}, dp=8, sharding="zero2", secondary_group=4),
    "hpZ of one is off": _built(LLAMA, {}, dp=8, sharding="zero3", secondary_group=1),
    "hpZ counts consecutive ranks": _built(
        LLAMA, {}, dp=8, cp=2, cp_method="ulysses", sharding="zero3", secondary_group=4
    ),
    "weights are offloaded under ZeRO-3": _built(
        LLAMA, {}, dp=8, sharding="zero2", parameter_offload="cpu", optimizer_offload="cpu"
    ),
    "offloaded states are shards": _built(LLAMA, {}, dp=8, optimizer_offload="cpu"),
    "states on a drive need ZeRO-3": _built(LLAMA, {}, dp=8, sharding="zero1", optimizer_offload="nvme"),
    "a ratio needs ZeRO-3": _built(
        LLAMA, {}, dp=8, sharding="zero2", optimizer_offload="cpu", optimizer_offload_fraction=0.5
    ),
    "a share lies between none and all": _built(
        LLAMA, {}, dp=8, sharding="zero3", optimizer_offload="cpu", optimizer_offload_fraction=1.5
    ),
    "MiCS is gone": _built(LLAMA, {}, dp=8, sharding="hsdp", sharding_group=4),
    "ZeRO-1 spans all of dp": _built(LLAMA, {}, dp=8, sharding="zero1", sharding_group=4),
    "the batch product holds": _built(LLAMA, {"batch": 100}, dp=8, sharding="zero1"),
    "16-bit formats only": _built(LLAMA, {"precision": "fp8"}, dp=8, sharding="zero1"),
    "whole layers are recomputed": _built(LLAMA, {}, dp=8, recompute="selective"),
    "AutoEP fits the ranks": _built(MOE, {}, dp=4, ep=8, sharding="zero1"),
    "AutoEP keeps experts whole": _built(MOE, {}, dp=8, ep=4, etp=2, sharding="zero1"),
    "experts with tp need AutoEP": _built(MOE, {}, dp=4, tp=2, sharding="zero1"),
    "AutoEP under ZeRO-3 excludes Ulysses": _built(
        MOE, {}, dp=8, cp=2, ep=8, cp_method="ulysses", sharding="zero3"
    ),
    "capacities are the script's": _built(MOE, {"expert_capacity_factor": 1.5}, dp=8, sharding="zero1"),
    "inputs of recomputed layers are offloaded": _built(
        LLAMA, {}, dp=8, sharding="zero1", activation_offload=True
    ),
}
_TORCHTITAN: dict[str, Callable[[], Built]] = {
    "tied embeddings exclude a pipeline": _built("llama-3.2-1b", TITAN, dp=8, pp=2, sharding="zero3"),
    "no ZeRO-1": _built(LLAMA, TITAN, dp=8, sharding="zero1"),
    "one copy of the model": _built(LLAMA, TITAN, dp=8, pp=2, vpp=2, schedule="dualpipe", sharding="zero3"),
    "ranks in their natural order": _built(
        LLAMA, TITAN, dp=8, pp=2, sharding="zero3", device_mapping=OTHER_ORDER
    ),
    "V schedules have two chunks": _built(LLAMA, TITAN, dp=8, pp=2, vpp=3, schedule="zb_v", sharding="zero3"),
    "1F1B needs pp micro-batches": _built(LLAMA, TITAN | {"batch": 16}, dp=8, pp=4, sharding="zero3"),
    "DualPipeV needs 2 pp micro-batches": _built(
        LLAMA, TITAN | {"batch": 48}, dp=8, pp=4, vpp=2, schedule="dualpipe_v", sharding="zero3"
    ),
    "rounds of interleaving are equal": _built(
        LLAMA, TITAN | {"batch": 72}, dp=8, pp=4, vpp=2, sharding="zero3"
    ),
    "0.3 gathers keys and values": _built(LLAMA, TITAN, dp=8, cp=2, sharding="zero3"),
    "no head exchange": _built(LLAMA, TITAN, dp=8, cp=2, cp_method="ulysses", sharding="zero3"),
    "replicas stand without cp": _built(LLAMA, TITAN, dp=8, cp=2, cp_method="all_gather"),
    "0.3 keeps experts whole": _built(MOE, TITAN, dp=4, tp=2, ep=4, etp=2, sharding="zero3", **SP),
    "positions reach the sequence": _built("qwen3-14b", TITAN | {"length": 65536}, dp=8, sharding="zero3"),
    "multi-token prediction is of deepseek_v3": _built(MTP, TITAN, dp=8, sharding="zero3"),
    "multi-token prediction excludes a pipeline": _built("deepseek-v3", TITAN, dp=8, pp=2, sharding="zero3"),
    "adapters leave experts alone": _built(MOE, TITAN | {"lora_rank": 8}, dp=8, ep=8, sharding="zero3"),
    "heads divide by tp": _built(LLAMA, TITAN | {"cluster": "dgx-h100:3"}, tp=3, dp=8, sharding="zero3"),
    "key/value heads divide by tp": _built(LLAMA, TITAN, tp=16, dp=2, sharding="zero3", **SP),
    "the expert grid fits the shards": _built(MOE, TITAN, dp=8, ep=8, sharding="hsdp", sharding_group=4),
    "recompute picks operators": _built(
        LLAMA, TITAN, dp=8, sharding="zero3", recompute="selective", recompute_modules=("mlp",)
    ),
    "recompute takes all layers": _built(
        LLAMA, TITAN, dp=8, sharding="zero3", recompute="full", recompute_layers=2
    ),
    "offload takes weights and states": _built(LLAMA, TITAN, dp=8, sharding="zero3", optimizer_offload="cpu"),
    "no offload to a drive": _built(
        LLAMA, TITAN, dp=8, sharding="zero3", optimizer_offload="nvme", parameter_offload="nvme"
    ),
    "precision is known": _built(LLAMA, TITAN | {"precision": "nvfp4"}, dp=8, sharding="zero3"),
    "the sequence cuts": _built(
        LLAMA, TITAN | {"length": 4098}, dp=8, cp=2, cp_method="all_gather", sharding="zero3"
    ),
    "DualPipeV overlaps no experts in 0.3": _built(
        MOE, TITAN, dp=8, pp=2, vpp=2, ep=8, schedule="dualpipe_v", sharding="zero3"
    ),
}
_TORCHTITAN_0_2: dict[str, Callable[[], Built]] = {
    "tp has sequence parallelism": _built(LLAMA, TITAN, dp=8, tp=2, sharding="zero3"),
    "DDP stands alone": _built(LLAMA, TITAN, dp=8, tp=2, **SP),
    "flex attention has no ring": _built("deepseek-v3", TITAN, dp=8, cp=2, ep=8, sharding="zero3"),
    "experts are split by all of tp": _built(MOE, TITAN, dp=4, tp=4, ep=4, etp=2, sharding="zero3", **SP),
    "overlapped experts are not recomputed": _built(
        MOE, TITAN, dp=8, pp=2, vpp=2, ep=8, schedule="dualpipe_v", sharding="zero3", recompute="full"
    ),
    "no adapters": _built(LLAMA, TITAN | {"lora_rank": 8}, dp=8, sharding="zero3"),
    "no multi-token prediction": _built(MTP, TITAN, dp=8, sharding="zero3"),
}
_ACCELERATE: dict[str, Callable[[], Built]] = {
    "no pipeline": _built(LLAMA, {}, dp=8, pp=2, sharding="zero3"),
    "no expert parallelism": _built(MOE, {}, dp=8, ep=8, sharding="zero3"),
    "no ZeRO-1": _built(LLAMA, {}, dp=8, sharding="zero1"),
    "replicas of tp groups need shards": _built(LLAMA, {}, dp=8, tp=2, sharding="hsdp", sharding_group=1),
    "DDP excludes tp": _built(LLAMA, {}, dp=8, tp=2),
    "DDP excludes cp": _built(LLAMA, {}, dp=8, cp=2),
    "FSDP needs ranks to shard over": _built(LLAMA, {}, dp=1, tp=8, sharding="zero3"),
    "no head exchange beside FSDP2": _built(LLAMA, {}, dp=8, cp=2, cp_method="ulysses", sharding="zero3"),
    "no sequence parallelism": _built(LLAMA, {}, dp=8, tp=2, sharding="zero3", **SP),
    "whole layers are recomputed": _built(LLAMA, {}, dp=8, sharding="zero3", recompute="selective"),
    "recompute is FSDP's": _built(LLAMA, {}, dp=8, recompute="full"),
    "16-bit formats only": _built(LLAMA, {"precision": "fp8"}, dp=8, sharding="zero3"),
    "no offload to a drive": _built(
        LLAMA, {}, dp=8, sharding="zero3", optimizer_offload="nvme", parameter_offload="nvme"
    ),
    "the sequence cuts into 2 cp chunks": _built(LLAMA, {"length": 4098}, dp=8, cp=2, sharding="zero3"),
    "heads divide by tp": _built("qwen2.5-7b", {}, dp=4, tp=8, sharding="zero3"),
    "experts exclude tp": _built(MOE, {}, dp=4, tp=2, sharding="zero3"),
    "latent attention excludes cp": _built(MLA, {}, dp=8, cp=2, sharding="zero3"),
    "a window excludes cp": _built(WINDOWED, {}, dp=8, cp=2, sharding="zero3"),
}

#: Every broken plan, by target.
BROKEN: tuple[BrokenPlan, ...] = tuple(
    BrokenPlan(target, rule, build)
    for target, plans in (
        ("accelerate", _ACCELERATE),
        ("deepspeed", _DEEPSPEED),
        ("megatron", _MEGATRON),
        ("torchtitan", _TORCHTITAN),
        ("torchtitan-0.2", _TORCHTITAN_0_2),
    )
    for rule, build in plans.items()
)
