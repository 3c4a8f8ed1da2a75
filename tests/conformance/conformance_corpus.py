"""Plans for the conformance tests: drawn from a seed, over models, sizes, axes, memory levers and number formats.

Each recipe draws plans of the kind that one target is for until that target has taken enough of them; every plan is then
given to every target that does not refuse it.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.export import EXPORTERS
from meshwright.planner.export.rules import server_size
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan, partition_layers, partition_with_ends
from meshwright.simcore.domain.workload import TrainingWorkload

__all__ = ["TARGETS", "CorpusPlan", "corpus", "takers"]

#: Targets whose clients are asked.
TARGETS = ("accelerate", "deepspeed", "megatron", "torchtitan", "torchtitan-0.2")
SEED = 2026

DENSE = (
    "llama-3.2-1b",
    "llama-2-7b",
    "llama-3-8b",
    "llama-3-70b",
    "llama-3.1-405b",
    "qwen3-14b",
    "qwen2.5-7b",
    "mistral-7b",
)
UNTIED = ("llama-3-8b", "llama-3-70b", "llama-2-7b")
MIXTURES = ("mixtral-8x7b", "qwen3-30b-a3b", "qwen3-235b-a22b", "qwen1.5-moe-a2.7b")
LATENT = ("deepseek-v2-lite", "deepseek-v3")
CLASSIC = ("gpt3-175b",)
NODES = ("dgx-h100", "dgx-h100", "dgx-a100", "dgx-b200", "gb200-nvl72")
# Most draws leave a lever alone; each is drawn often enough that every target meets it.
_DEGREES = (1, 1, 1, 2, 2, 4, 8)


class CorpusPlan(NamedTuple):
    """One plan: its number, the recipe that drew it, and what runs."""

    name: str
    job: TrainingJob
    plan: ParallelPlan


class Recipe(NamedTuple):
    """Plans that one target is for: how many it must take, of which models, with which fields."""

    target: str
    number: int
    models: tuple[str, ...]
    fields: Callable[[random.Random, ModelSpec], dict[str, Any]]
    precisions: tuple[str, ...] = ("bf16",)
    software: str = "megatron-core"
    trains_adapters: bool = False


def takers(job: TrainingJob, plan: ParallelPlan) -> tuple[str, ...]:
    """Return the targets that do not refuse a plan."""
    return tuple(target for target in TARGETS if not EXPORTERS[target].unsupported(job, plan))


@functools.cache
def corpus() -> tuple[CorpusPlan, ...]:
    """Return the plans; the same ones on every machine."""
    plans = []
    for place, recipe in enumerate(RECIPES):
        # A source each, so that a change of one recipe leaves the plans of the others alone.
        source = random.Random(f"{SEED}-{place}")
        plans += [
            CorpusPlan(f"{recipe.target}-{place}-{index:02d}", *_accepted(recipe, source))
            for index in range(recipe.number)
        ]
    return tuple(plans)


def _accepted(recipe: Recipe, source: random.Random) -> tuple[TrainingJob, ParallelPlan]:
    for _ in range(5000):
        try:
            job, plan = _draw(recipe, source)
        except SpecError:
            continue
        if not EXPORTERS[recipe.target].unsupported(job, plan):
            return job, plan
    raise AssertionError(f"{recipe.target} takes none of 5000 plans of its recipe")


def _draw(recipe: Recipe, source: random.Random) -> tuple[TrainingJob, ParallelPlan]:
    model = load_model(source.choice(recipe.models))
    fields = recipe.fields(source, model)
    pp, vpp = fields.get("pp", 1), fields.get("vpp", 1)
    node = source.choice(NODES)
    num_gpus = resolve_cluster(f"{node}:1").num_gpus
    if "schedule" not in fields:
        fields["schedule"] = "none" if pp == 1 else "interleaved_1f1b" if vpp > 1 else "1f1b"
    fields["layers_per_stage"] = _layers(source, model.num_layers, pp * vpp)
    plan = ParallelPlan(micro_batch_size=source.choice((1, 1, 2, 4)), **fields)
    batch = plan.dp * plan.micro_batch_size * source.choice((1, 2, 3, 4)) * source.choice((1, pp, 2 * pp))
    workload = TrainingWorkload(
        global_batch_size=batch,
        sequence_length=min(source.choice((2048, 4096, 8192, 32768)), model.max_position_embeddings),
        precision=source.choice(recipe.precisions),  # type: ignore[arg-type]
        lora_rank=16 if recipe.trains_adapters and source.random() < 0.3 else None,
        **_expert_load(source, model),
    )
    cluster = resolve_cluster(f"{node}:{-(-plan.num_gpus // num_gpus)}")
    if source.random() < 0.15:
        plan = dataclasses.replace(plan, device_mapping=_mapping(source, recipe, plan, server_size(cluster)))
    return TrainingJob(model=model, cluster=cluster, workload=workload, software=recipe.software), plan


def _mapping(source: random.Random, recipe: Recipe, plan: ParallelPlan, server: int) -> DeviceMapping:
    """Return hosts and GPUs in some order, and for Megatron maybe the other order of ranks."""
    per_node = min(server, plan.num_gpus)
    num_nodes = plan.num_gpus // per_node
    other = recipe.target == "megatron" and source.random() < 0.7
    return DeviceMapping(
        host_order=tuple(source.sample(range(num_nodes), num_nodes)),
        gpu_orders=(tuple(source.sample(range(per_node), per_node)),),
        rank_order="tp-cp-ep-pp-dp" if other else "tp-cp-ep-dp-pp",
    )


def _layers(source: random.Random, num_layers: int, num_stages: int) -> tuple[int, ...]:
    if num_stages > 2 and source.random() < 0.25:
        first = num_layers // num_stages - source.choice((0, 1))
        return partition_with_ends(num_layers, num_stages, first, max(0, first - source.choice((0, 1, 2))))
    return partition_layers(num_layers, num_stages)


def _expert_load(source: random.Random, model: ModelSpec) -> dict[str, Any]:
    if model.moe is None:
        return {}
    return {
        "routing_imbalance": source.choice((1.0, 1.0, 1.2)),
        "expert_capacity_factor": source.choice((None, None, None, 1.25)),
    }


def _degrees(source: random.Random, *axes: str) -> dict[str, Any]:
    return {axis: source.choice(_DEGREES) for axis in axes}


def _experts(source: random.Random, model: ModelSpec, *, splits: bool) -> dict[str, Any]:
    if model.moe is None:
        return {}
    return {"ep": source.choice((1, 2, 4, 8, 8, 16)), "etp": source.choice((1, 1, 2) if splits else (1,))}


def _recompute(source: random.Random, model: ModelSpec) -> dict[str, Any]:
    kind = source.choice(("none", "selective", "full"))
    modules = ["core_attn", "layernorm"]
    if model.moe is not None:
        modules += ["moe_act"]
    if model.mla is not None:
        modules += ["mla_up_proj"]
    return {
        "recompute": kind,
        "recompute_modules": tuple(source.sample(modules, source.choice((0, 1, 2))))
        if kind == "selective"
        else (),
        "recompute_layers": source.choice((None, None, 1, 2)) if kind == "full" else None,
    }


def _pipeline_megatron(source: random.Random) -> dict[str, Any]:
    pp = source.choice((1, 2, 4, 8))
    return {"pp": pp, "vpp": 1 if pp == 1 else source.choice((1, 1, 2, 3))}


def _megatron(source: random.Random, model: ModelSpec) -> dict[str, Any]:
    fields = (
        _degrees(source, "dp", "tp", "cp") | _pipeline_megatron(source) | _experts(source, model, splits=True)
    )
    sharding = source.choice(("none", "zero1", "zero1", "zero1"))
    offloads = sharding == "zero1" and source.random() < 0.15
    return {
        **fields,
        **_recompute(source, model),
        "cp_method": source.choice(("ring", "ulysses", "all_gather", "hierarchical"))
        if fields["cp"] > 1
        else "ring",
        "sequence_parallel": fields["tp"] > 1 and source.random() < 0.8,
        "sharding": sharding,
        "sharding_group": source.choice((None, None, None, 2)) if sharding == "zero1" else None,
        "optimizer_offload": "cpu" if offloads else "none",
        "optimizer_offload_fraction": source.choice((0.5, 1.0)) if offloads else 1.0,
        "activation_offload": source.random() < 0.1,
        "vocab_parallel": "redistributed" if fields["pp"] > 1 and source.random() < 0.1 else "none",
    }


def _megatron_fsdp(source: random.Random, model: ModelSpec) -> dict[str, Any]:
    fields = _degrees(source, "tp", "cp") | _experts(source, model, splits=False)
    sharding = source.choice(("zero2", "zero3", "hsdp"))
    return {
        **fields,
        **_recompute(source, model),
        "dp": source.choice((2, 4, 8, 16)),
        "sequence_parallel": fields["tp"] > 1,
        "sharding": sharding,
        "sharding_group": source.choice((2, None)) if sharding == "hsdp" else None,
    }


def _deepspeed(source: random.Random, model: ModelSpec) -> dict[str, Any]:
    axis = source.choice(("none", "none", "tp", "cp"))
    sharding = source.choice(("none", "zero1", "zero2", "zero3", "zero3"))
    offload = source.choice(("none", "none", "cpu", "cpu")) if sharding != "none" else "none"
    if sharding == "zero3" and source.random() < 0.4:
        offload = "nvme"
    degree = source.choice((2, 4, 8))
    return {
        "dp": source.choice((2, 4, 8, 16, 64)),
        "tp": degree if axis == "tp" else 1,
        "cp": degree if axis == "cp" else 1,
        "cp_method": "ulysses" if axis == "cp" else "ring",
        **_experts(source, model, splits=False),
        "sharding": sharding,
        "secondary_group": source.choice((None, 2, 8)) if sharding == "zero3" else None,
        "optimizer_offload": offload,
        "optimizer_offload_fraction": source.choice((0.5, 1.0))
        if offload == "cpu" and sharding == "zero3"
        else 1.0,
        "parameter_offload": source.choice(("none", offload)) if sharding == "zero3" else "none",
        "recompute": source.choice(("none", "full")),
        "activation_offload": source.random() < 0.2,
    }


def _fsdp2(source: random.Random, model: ModelSpec) -> dict[str, Any]:
    """Return what plain FSDP2 goes with: replicas, shards, tp without sequence parallelism, a ring or a gather."""
    sharding = source.choice(("none", "zero2", "zero3", "hsdp"))
    plain = sharding == "none"
    recompute = source.choice(("none", "full"))
    offload = source.choice(("none", "none", "cpu")) if sharding in ("zero3", "hsdp") else "none"
    cp = 1 if plain else source.choice((1, 1, 2, 4))
    return {
        "dp": source.choice((2, 4, 8, 32)),
        "tp": 1 if plain else source.choice((1, 2, 4)),
        "cp": cp,
        "cp_method": source.choice(("ring", "all_gather")) if cp > 1 else "ring",
        "sharding": sharding,
        "sharding_group": source.choice((2, 4)) if sharding == "hsdp" else None,
        "optimizer_offload": offload,
        "parameter_offload": offload,
        "recompute": recompute,
        "activation_offload": recompute == "full" and source.random() < 0.3,
    }


def _torchtitan(
    method: str, splits_experts: bool, schedules: tuple[str, ...] = ()
) -> Callable[[random.Random, ModelSpec], dict[str, Any]]:
    def fields(source: random.Random, model: ModelSpec) -> dict[str, Any]:
        degrees = _degrees(source, "dp", "tp", "pp")
        if schedules:
            degrees["pp"] = source.choice((2, 4))
        cp = source.choice((1, 1, 1, 2, 4))
        schedule = source.choice(schedules or _SCHEDULES) if degrees["pp"] > 1 else "none"
        vpp = source.choice((2, 3)) if schedule == "interleaved_1f1b" else 2 if schedule in _TWO_CHUNKS else 1
        sharding = source.choice(("none", "zero2", "zero3", "zero3", "hsdp"))
        offload = "cpu" if sharding == "zero3" and source.random() < 0.15 else "none"
        experts = _experts(source, model, splits=False)
        if experts and (experts["ep"] == 1 or (splits_experts and source.random() < 0.3)):
            experts["etp"] = degrees["tp"]
        return {
            **degrees,
            **experts,
            "vpp": vpp,
            "schedule": schedule,
            "cp": cp,
            "cp_method": method if cp > 1 else "ring",
            "sequence_parallel": degrees["tp"] > 1,
            "sharding": sharding,
            "sharding_group": source.choice((1, 2)) if sharding == "hsdp" else None,
            "recompute": source.choice(("none", "selective", "full")),
            "optimizer_offload": offload,
            "parameter_offload": offload,
        }

    return fields


_SCHEDULES = (
    *("1f1b", "gpipe", "interleaved_1f1b", "interleaved_1f1b", "zb_h1", "zb_h2"),
    *("zb_v", "v_half", "v_min", "dualpipe_v"),
)
_SPLIT = ("zb_h1", "zb_v", "dualpipe_v")
_TWO_CHUNKS = ("zb_v", "v_half", "v_min", "dualpipe_v")
_FP8 = ("bf16", "bf16", "bf16", "fp16", "fp8", "fp8_block", "mxfp8")
RECIPES = (
    Recipe("megatron", 30, (*DENSE, *CLASSIC), _megatron, _FP8),
    Recipe("megatron", 20, MIXTURES, _megatron, _FP8),
    Recipe("megatron", 15, LATENT, _megatron, _FP8),
    Recipe("megatron", 15, (*DENSE, *MIXTURES), _megatron_fsdp, _FP8),
    Recipe("deepspeed", 30, DENSE, _deepspeed, ("bf16", "bf16", "fp16", "fp32"), trains_adapters=True),
    Recipe("deepspeed", 15, (*MIXTURES, *LATENT), _deepspeed, ("bf16",)),
    Recipe("accelerate", 30, (*DENSE, *CLASSIC), _fsdp2, ("bf16", "fp16", "fp32"), trains_adapters=True),
    Recipe("accelerate", 15, MIXTURES, _fsdp2, ("bf16", "fp16")),
    Recipe(
        "torchtitan",
        10,
        UNTIED,
        _torchtitan("all_gather", False, _SPLIT),
        software="torchtitan",
        trains_adapters=True,
    ),
    Recipe("torchtitan", 20, DENSE, _torchtitan("all_gather", False), ("bf16", "fp8", "mxfp8"), "torchtitan"),
    Recipe(
        "torchtitan",
        15,
        (*MIXTURES, *LATENT),
        _torchtitan("all_gather", False),
        ("bf16", "fp8"),
        "torchtitan",
    ),
    Recipe("torchtitan-0.2", 20, DENSE, _torchtitan("ring", True), ("bf16", "fp8", "mxfp8"), "torchtitan"),
    Recipe(
        "torchtitan-0.2", 15, (*MIXTURES, *LATENT), _torchtitan("ring", True), ("bf16", "fp8"), "torchtitan"
    ),
)
