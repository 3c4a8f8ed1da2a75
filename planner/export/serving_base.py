"""What the serving exporters share: words for titles and notes, and the check for the right engine."""

from __future__ import annotations

from meshwright.planner.export.scripts import label
from meshwright.planner.export.serving_rules import pool_name
from meshwright.planner.serving.acceptance_keys import acceptance_text
from meshwright.simcore.domain.serving import ServingJob, ServingPlan, ServingPool

__all__ = ["TARGET_OF_ENGINE", "accuracy_notes", "engine_is", "pool_title", "serving_notes", "word_of"]

TARGET_OF_ENGINE = {"vllm": "vllm", "sglang": "sglang", "trtllm": "tensorrt-llm"}


def engine_is(plan: ServingPlan, *engines: str) -> str | None:
    """Return why a plan of another engine is refused; a plan's figures hold for its engine alone."""
    if plan.engine in engines:
        return None
    return (
        f"the plan is for engine '{plan.engine}'; export it with --to {TARGET_OF_ENGINE[plan.engine]}, or plan again "
        f"with engine {' or '.join(engines)}."
    )


def word_of(field: str, value: str, known: dict[str, str | None], target: str) -> str | None:
    """Return why a word of the plan has no counterpart; None where it has one."""
    if value in known:
        return None
    return f"{field} '{value}' has no counterpart in {target}; use {' or '.join(known)}."


def pool_title(job: ServingJob, plan: ServingPlan, pool: ServingPool, engine: str) -> str:
    """Return the first comment of a pool's files."""
    count = f"{pool.num_replicas} replicas" if pool.num_replicas > 1 else "1 replica"
    each = f"{pool.gpus_per_replica} GPUs each" if pool.num_replicas > 1 else f"{pool.gpus_per_replica} GPUs"
    where = "" if job.prefill_cluster is None else f" of {label(job.cluster_of(pool.role).gpu.id)}"
    return f"Meshwright: {label(job.model.name)}, {pool_name(pool)}, {count}, {each}{where}, {engine}."


def serving_notes(job: ServingJob, plan: ServingPlan, version: str) -> tuple[str, ...]:
    """Return what every serving export assumes."""
    notes = [
        f"MODEL is a checkpoint of the shape of {label(job.model.name)}; the plan's shape was not compared with it.",
        "Requests longer than the workload's longest are rejected; raise the limit on their length for others.",
    ]
    if plan.engine_version and not version.startswith(label(plan.engine_version)):
        notes.append(
            f"The prediction is for {plan.engine} {label(plan.engine_version)}; the options are those of {version}."
        )
    if any(pool.kv_cache_tokens is not None for pool in plan.pools):
        notes.append(
            "The size of the KV cache is the prediction's; drop its option to let the engine fill the memory."
        )
    for pool in plan.pools:
        if job.prefill_cluster is not None and plan.is_disaggregated:
            notes.append(f"The {pool_name(pool)} runs on {label(job.cluster_of(pool.role).gpu.id)} GPUs.")
        if pool.redundant_experts:
            notes.append(
                f"The {pool_name(pool)} holds {pool.redundant_experts} redundant experts, which the engine places by itself "
                f"from the routing it sees; 'meshwright place' writes a placement for a recorded one."
            )
        if pool.expert_imbalance is not None:
            notes.append(
                f"The prediction of the {pool_name(pool)} assumes that its most loaded expert rank gets "
                f"{pool.expert_imbalance:.3g} times the mean, as a placement of the recorded routing reaches."
            )
        if pool.num_speculative_tokens:
            notes.append(
                f"The prediction of the {pool_name(pool)} assumes that {acceptance_text(pool.acceptance)}."
            )
    return tuple(notes)


def accuracy_notes(plan: ServingPlan, from_checkpoint: tuple[str, ...]) -> tuple[str, ...]:
    """Return what the number format asks of the checkpoint."""
    if plan.precision not in from_checkpoint:
        return ()
    return (f"MODEL must hold weights in {plan.precision}; the engine reads the number format from it.",)
