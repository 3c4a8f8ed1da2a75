"""Turn exported plans into questions for the clients: what each target's files say, beside what the plan says."""

from __future__ import annotations

import json
from typing import Any

from conformance_clients import Launch

from meshwright.planner.export.torchtitan_flavors import find_flavor
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["CLIENTS", "MEGATRON_GROUPS", "TIER_1", "question", "sizes_of_arguments"]

#: Target -> the clients that are asked about it, tier 1 first.
CLIENTS = {
    "accelerate": ("accelerate",),
    "deepspeed": ("deepspeed",),
    "megatron": ("megatron_core", "megatron_lm"),
    "torchtitan": ("torchtitan",),
    "torchtitan-0.2": ("torchtitan",),
}
TIER_1 = ("accelerate", "deepspeed", "megatron_core")
#: Our name of a rank group -> Megatron's description of it.
MEGATRON_GROUPS = {
    "tp": "TENSOR_MODEL_PARALLEL_GROUP",
    "cp": "CONTEXT_PARALLEL_GROUP",
    "dp": "DATA_PARALLEL_GROUP",
    "dp_cp": "DATA_PARALLEL_GROUP_WITH_CP",
    "pp": "PIPELINE_MODEL_PARALLEL_GROUP",
    "tp_cp": "TENSOR_AND_CONTEXT_PARALLEL_GROUP",
    "tp_pp": "MODEL_PARALLEL_GROUP",
    "ep": "EXPERT_MODEL_PARALLEL_GROUP",
    "etp": "EXPERT_TENSOR_PARALLEL_GROUP",
    "edp": "EXPERT_DATA_PARALLEL_GROUP",
    "etp_ep": "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP",
    "etp_ep_pp": "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP",
}
# Worlds whose process groups are created; larger ones only cost time.
_LARGEST_WORLD = 64


def question(
    client: str, target: str, job: TrainingJob, plan: ParallelPlan, launch: Launch
) -> dict[str, Any]:
    """Return what a client is asked about one launched export."""
    words = launch.words
    if client == "accelerate":
        return {
            "path": str(launch.folder / "accelerate.yaml"),
            "words": list(words[words.index("launch") + 1 :]),
            "world": plan.num_gpus,
        }
    if client == "deepspeed":
        return {
            "config": json.loads((launch.folder / "ds_config.json").read_text()),
            "world": plan.num_gpus,
            "dp": plan.dp,
            "tp": plan.tp,
            "cp": plan.cp,
            "batch": job.workload.global_batch_size,
        }
    if client == "torchtitan":
        release = "0.2.1" if target == "torchtitan-0.2" else "0.3.0"
        return {
            "arguments": list(words[words.index("torchtitan.train") + 1 :]),
            "folder": str(launch.folder),
            "world": plan.num_gpus,
            "batch": job.workload.global_batch_size,
            "stages": plan.pp * plan.vpp,
            "layers": job.model.num_layers,
            "is_registered": find_flavor(job.model, release) is not None,
        }
    script = next(index for index, word in enumerate(words) if word.endswith("pretrain_gpt.py"))
    arguments = list(words[script + 1 :])
    asked: dict[str, Any] = {
        "arguments": arguments,
        "environment": launch.environment,
        "world": plan.num_gpus,
        "generation": 10 if job.cluster.gpu.architecture.lower().startswith("blackwell") else 9,
    }
    if client == "megatron_core" and plan.num_gpus <= _LARGEST_WORLD:
        asked |= {"groups": sizes_of_arguments(arguments), "rank": plan.num_gpus - 1, "shows_groups": True}
    return asked


def sizes_of_arguments(arguments: list[str]) -> dict[str, Any]:
    """Return the keywords of ``initialize_model_parallel`` that Megatron-LM takes from a command line."""
    sizes: dict[str, Any] = {"order": "tp-cp-ep-dp-pp"}
    if "--use-tp-pp-dp-mapping" in arguments:
        sizes["order"] = "tp-cp-ep-pp-dp"
    for option, keyword in (
        ("--tensor-model-parallel-size", "tensor_model_parallel_size"),
        ("--pipeline-model-parallel-size", "pipeline_model_parallel_size"),
        ("--context-parallel-size", "context_parallel_size"),
        ("--expert-model-parallel-size", "expert_model_parallel_size"),
        ("--expert-tensor-parallel-size", "expert_tensor_parallel_size"),
        ("--num-distributed-optimizer-instances", "num_distributed_optimizer_instances"),
    ):
        if option in arguments:
            sizes[keyword] = int(arguments[arguments.index(option) + 1])
    levels = "--hierarchical-context-parallel-sizes"
    if levels in arguments:
        first = arguments.index(levels) + 1
        sizes["hierarchical_context_parallel_sizes"] = [int(word) for word in arguments[first : first + 2]]
    return sizes
