"""DeepSpeed's spelling of a plan (0.19): the contents of ``ds_config.json``."""

from __future__ import annotations

from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["NVME_PLACEHOLDER", "JsonObject", "deepspeed_config"]

JsonObject = dict[str, object]

#: What stands for the folder on a drive of the node, which only the user knows.
NVME_PLACEHOLDER = "EDIT-HERE/folder-on-the-local-nvme-drive"

_STAGE = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3}
# DeepSpeed's own defaults, in elements; written out so that a change of them cannot change the run.
_BUCKET, _PREFETCH, _PERSISTENT, _LIVE = 500_000_000, 50_000_000, 100_000, 1_000_000_000
_AIO_BLOCK_BYTES, _AIO_QUEUE_DEPTH = 1_048_576, 8


def deepspeed_config(job: TrainingJob, plan: ParallelPlan) -> JsonObject:
    """Return the contents of ``ds_config.json``.

    Parameters
    ----------
    job, plan : TrainingJob, ParallelPlan
        A plan that breaks no rule of the target.
    """
    num_micro_batches = plan.num_micro_batches(job.workload.global_batch_size)
    config: JsonObject = {}
    if plan.tp == 1:
        # With AutoTP DeepSpeed may count every rank as data parallel when it checks this product,
        # unless the script hands it the tp groups; the two keys below say the same.
        config["train_batch_size"] = job.workload.global_batch_size
    config["train_micro_batch_size_per_gpu"] = plan.micro_batch_size
    config["gradient_accumulation_steps"] = num_micro_batches
    config["gradient_clipping"] = 1.0
    if plan.cp > 1:
        # Both sizes, or DeepSpeed builds no mesh and counts every rank as data parallel.
        config["sequence_parallel_size"] = plan.cp
        config["data_parallel_size"] = plan.dp
    if job.workload.precision == "bf16":
        config["bf16"] = {"enabled": True}
    elif job.workload.precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    config["zero_optimization"] = _zero(plan)
    if "nvme" in (plan.optimizer_offload, plan.parameter_offload):
        config["aio"] = {
            "block_size": _AIO_BLOCK_BYTES,
            "queue_depth": _AIO_QUEUE_DEPTH,
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
        }
    if plan.tp > 1:
        config["tensor_parallel"] = {"autotp_size": plan.tp}
    if plan.ep > 1:
        config["expert_parallel"] = {"enabled": True, "autoep_size": plan.ep}
    if plan.recompute == "full":
        config["activation_checkpointing"] = {
            "partition_activations": False,
            "contiguous_memory_optimization": False,
            "cpu_checkpointing": plan.activation_offload,
        }
    config["steps_per_print"] = 1
    return config


def _zero(plan: ParallelPlan) -> JsonObject:
    stage = _STAGE[plan.sharding]
    if stage == 0:
        return {"stage": 0}
    section: JsonObject = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": _BUCKET,
    }
    if stage < 3:
        section["allgather_bucket_size"] = _BUCKET
    else:
        section["stage3_prefetch_bucket_size"] = _PREFETCH
        section["stage3_param_persistence_threshold"] = _PERSISTENT
        section["stage3_max_live_parameters"] = _LIVE
        section["stage3_max_reuse_distance"] = _LIVE
    if plan.secondary_group is not None:
        section["zero_hpz_partition_size"] = plan.secondary_group
    if plan.optimizer_offload != "none":
        section["offload_optimizer"] = _offload_optimizer(plan)
    if plan.parameter_offload != "none":
        section["offload_param"] = _place(plan.parameter_offload)
    return section


def _offload_optimizer(plan: ParallelPlan) -> JsonObject:
    section = _place(plan.optimizer_offload)
    if plan.optimizer_offload == "nvme":
        # The prediction reads and writes one tile of the states while it updates another.
        section |= {"pipeline_read": True, "pipeline_write": True}
    if plan.optimizer_offload_fraction < 1.0:
        section["ratio"] = plan.optimizer_offload_fraction
    return section


def _place(kind: str) -> JsonObject:
    section: JsonObject = {"device": kind, "pin_memory": True}
    if kind == "nvme":
        section["nvme_path"] = NVME_PLACEHOLDER
    return section
