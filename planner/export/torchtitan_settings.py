"""torchtitan's spelling of a plan: sections of keys, written as TOML (0.2) or as arguments (0.3).

Every key is written even where it equals the default, if a plan's cost depends on it: the registered configs of 0.3
have defaults of their own.
"""

from __future__ import annotations

import json

from meshwright.costmodels.software import load_software
from meshwright.planner.export.scripts import ArgumentGroup
from meshwright.planner.export.torchtitan_schedule import PLACED_LIKE
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = [
    "SCHEDULE_NAMES",
    "SPLIT_BACKWARD",
    "Settings",
    "as_arguments",
    "as_toml",
    "compiles_model",
    "module_names",
    "sharding_degrees",
    "torchtitan_settings",
]

Settings = dict[str, dict[str, object]]

#: Words of a plan -> torch.distributed.pipelining.schedules. The operations of each were compared: equal, but for
#: zb_v, where torch runs the two weight gradients of a pair later.
SCHEDULE_NAMES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved1F1B",
    "zb_h1": "InterleavedZeroBubble",
    "zb_v": "ZBVZeroBubble",
    "dualpipe_v": "DualPipeV",
}
#: Schedules that split the backward pass, which torch refuses on compiled modules.
SPLIT_BACKWARD = ("zb_h1", "zb_v", "dualpipe_v", *PLACED_LIKE)
_ROTATE_METHOD = {"ring": "alltoall", "all_gather": "allgather"}


def torchtitan_settings(job: TrainingJob, plan: ParallelPlan, release: str) -> Settings:
    """Return the settings of a plan, by section.

    Parameters
    ----------
    job, plan : TrainingJob, ParallelPlan
        A plan that breaks no rule of the target.
    release : str
        ``0.2.1`` or ``0.3.0``, whose keys differ.
    """
    is_old = release.startswith("0.2")
    settings: Settings = {
        "training": _training(job, plan),
        "parallelism": _parallelism(job, plan, is_old),
        "compile": {
            "enable": True,
            "components": ["model", "loss"] if compiles_model(plan) else ["loss"],
        },
    }
    if not is_old:
        # Graphs go with neither pipelines nor expert parallelism, and no prediction counts on them.
        settings["training"]["disable_cuda_graphs"] = True
        settings["compile"]["enable_async_tensor_parallel"] = False
        settings["profiler"] = {"enable_profiling": False}
        return settings
    settings["training"]["dataset"] = "c4"
    settings["activation_checkpoint"] = {"mode": plan.recompute, "selective_ac_option": "op"}
    return settings | _quantization(job)


def compiles_model(plan: ParallelPlan) -> bool:
    """Return whether torch.compile may work on the layers too."""
    return plan.schedule not in SPLIT_BACKWARD


def sharding_degrees(plan: ParallelPlan) -> tuple[int, int]:
    """Return replicas and shards of the weights; their product is dp."""
    if plan.sharding == "none":
        return plan.dp, 1
    group = plan.sharding_group or plan.dp
    return plan.dp // group, group


def module_names(plan: ParallelPlan, head: str) -> list[list[str]]:
    """Return the modules of each virtual stage, in model order, by their names in torchtitan's decoders.

    Parameters
    ----------
    plan : ParallelPlan
        Layers of each stage.
    head : str
        What the release calls the LM head.

    Examples
    --------
    >>> plan = ParallelPlan(dp=1, pp=2, micro_batch_size=1, schedule="1f1b", layers_per_stage=(1, 2))
    >>> module_names(plan, "lm_head")
    [['tok_embeddings', 'layers.0'], ['layers.1', 'layers.2', 'norm', 'lm_head']]
    """
    stages: list[list[str]] = []
    first = 0
    for count in plan.layers_per_stage:
        stages.append([f"layers.{index}" for index in range(first, first + count)])
        first += count
    stages[0].insert(0, "tok_embeddings")
    stages[-1] += ["norm", head]
    return stages


def as_toml(settings: Settings) -> str:
    """Return the settings as a TOML document; strings and lists are written the way JSON writes them."""
    lines: list[str] = []
    for section, values in settings.items():
        lines += ["", f"[{section}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def as_arguments(settings: Settings) -> tuple[ArgumentGroup, ...]:
    """Return the settings as one array of arguments per section."""
    return tuple(
        ArgumentGroup(
            name=f"{section.upper()}_ARGS",
            comment=f"Section {section}.",
            options=tuple(_argument(f"--{section}.", key, value) for key, value in values.items()),
        )
        for section, values in settings.items()
    )


def _argument(prefix: str, key: str, value: object) -> tuple[str, ...]:
    option = key.replace("_", "-")
    if isinstance(value, bool):
        return (f"{prefix}{option}" if value else f"{prefix}no-{option}",)
    if isinstance(value, list):
        parts = value if value and isinstance(value[0], list) else [value]
        return (f"{prefix}{option}", *(",".join(map(str, part)) for part in parts))
    return (f"{prefix}{option}", str(value))


def _training(job: TrainingJob, plan: ParallelPlan) -> dict[str, object]:
    # A pipeline cuts one local batch into its micro-batches; otherwise the trainer accumulates over them.
    count = plan.num_micro_batches(job.workload.global_batch_size) if plan.pp > 1 else 1
    return {
        "local_batch_size": plan.micro_batch_size * count,
        "global_batch_size": job.workload.global_batch_size,
        "seq_len": job.workload.sequence_length,
        "steps": 100,
        "dtype": "float32",
        "mixed_precision_param": "float32" if job.workload.precision == "fp32" else "bfloat16",
        "enable_cpu_offload": plan.parameter_offload == "cpu",
    }


def _parallelism(job: TrainingJob, plan: ParallelPlan, is_old: bool) -> dict[str, object]:
    replicas, shards = sharding_degrees(plan)
    values: dict[str, object] = {
        "data_parallel_replicate_degree": replicas,
        "data_parallel_shard_degree": shards,
        "fsdp_reshard_after_forward": _reshard(job, plan),
        "tensor_parallel_degree": plan.tp,
    }
    if is_old:
        values |= {"disable_loss_parallel": False, "enable_async_tensor_parallel": False}
    elif plan.tp > 1:
        values["enable_sequence_parallel"] = plan.sequence_parallel
    values["pipeline_parallel_degree"] = plan.pp
    if plan.pp > 1:
        values |= {
            # A schedule of a table is named after one that places its stages alike.
            "pipeline_parallel_schedule": (SCHEDULE_NAMES | PLACED_LIKE)[plan.schedule],
            "pipeline_parallel_microbatch_size": plan.micro_batch_size,
            "module_fqns_per_model_part": module_names(plan, "output" if is_old else "lm_head"),
        }
    values["context_parallel_degree"] = plan.cp
    if is_old and plan.cp > 1:
        values["context_parallel_rotate_method"] = _ROTATE_METHOD[plan.cp_method]
    values["expert_parallel_degree"] = plan.ep
    if is_old:
        values["expert_tensor_parallel_degree"] = plan.etp
        values["pipeline_parallel_expert_parallel_overlap"] = plan.schedule == "dualpipe_v"
    return values


def _reshard(job: TrainingJob, plan: ParallelPlan) -> str:
    if plan.sharding in ("none", "zero2"):
        return "never"
    keeps = plan.pp > 1 and load_software(job.software).fsdp_keeps_parameters
    # The default keeps gathered weights under a pipeline; the prediction says which was meant.
    return "default" if keeps else "always"


def _quantization(job: TrainingJob) -> Settings:
    kind = {"fp8": "float8", "mxfp8": "mx"}.get(job.workload.precision)
    if kind is None:
        return {}
    converters = [f"quantize.linear.{kind}"]
    linear: dict[str, object] = {"filter_fqns": ["output"]}
    if kind == "float8":
        recipe = "rowwise" if "float8_rowwise" in job.features else "tensorwise"
        linear = {"recipe_name": recipe, **linear}
    settings: Settings = {"model": {"converters": converters}, f"quantize.linear.{kind}": linear}
    if job.model.moe is not None:
        linear["filter_fqns"] = ["output", "router.gate"]
        converters.append(f"quantize.grouped_mm.{kind}")
        settings[f"quantize.grouped_mm.{kind}"] = {"fqns": ["experts"]}
    return settings
