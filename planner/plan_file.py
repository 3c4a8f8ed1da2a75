"""Plan files: self-contained YAML that simulates and exports with nothing else at hand."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.prediction import Prediction
from meshwright.costmodels.software import list_software
from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import cluster_from_section
from meshwright.hardware_specs.spec_writing import cluster_to_mapping, dump_yaml
from meshwright.hardware_specs.yaml_document import Section, read_yaml
from meshwright.planner.device_mapping_section import device_mapping_mapping, device_mapping_of_section
from meshwright.planner.workload_options import software_features, workload_options
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.layer_groups import (
    GROUP_RECOMPUTES,
    GROUP_SHARDINGS,
    GroupRecompute,
    GroupSharding,
    LayerGroup,
)
from meshwright.simcore.domain.model_catalog import model_from_section, model_to_mapping
from meshwright.simcore.domain.plan import (
    CP_METHODS,
    OFFLOADS,
    RECOMPUTES,
    SCHEDULES_KNOWN,
    SHARDINGS,
    VOCAB_PARALLELS,
    CpMethod,
    Offload,
    ParallelPlan,
    Recompute,
    ScheduleName,
    Sharding,
    VocabParallel,
)
from meshwright.simcore.domain.workload import PRECISIONS, TrainingWorkload
from meshwright.simcore.domain.workload_section import routing_by_ep_mappings

__all__ = ["PlanDocument", "plan_document_text", "prediction_mapping", "read_plan"]

_SCHEMA_VERSION = 1
# Fields that a file states only where they differ from their default.
_RARE_FIELDS = (
    "cp_method",
    "expert_overlap",
    "recompute_modules",
    "recompute_layers",
    "secondary_group",
    "optimizer_offload",
    "optimizer_offload_fraction",
    "parameter_offload",
    "activation_offload",
    "layer_groups",
    "device_mapping",
    "micro_batch_shares",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDocument:
    """A plan with everything it was made from."""

    job: TrainingJob
    plan: ParallelPlan
    origin: Mapping[str, str] = field(default_factory=dict)


def plan_document_text(document: PlanDocument, context: CostContext, prediction: Prediction) -> str:
    """Return the YAML of a plan: job as resolved, degrees, calibration, prediction."""
    job, plan = document.job, document.plan
    model, cluster = model_to_mapping(job.model), cluster_to_mapping(job.cluster)
    mapping: dict[str, object] = {
        "schema_version": _SCHEMA_VERSION,
        "kind": "training_plan",
        "written_by": "meshwright",
        "plan": _plan_mapping(plan),
        "prediction": prediction_mapping(prediction),
        "software": job.software,
        **({"features": list(job.features)} if job.features else {}),
        "calibration": dict(context.calibration_identity),
        "workload": _workload_mapping(job.workload),
        "origin": {
            **document.origin,
            "model_sha256": _digest(model),
            "cluster_sha256": _digest(cluster),
        },
        "model": model,
        "cluster": cluster,
    }
    return dump_yaml(mapping)


def prediction_mapping(prediction: Prediction) -> dict[str, object]:
    """Return the figures of a prediction as plain data, SI units in the key names."""
    result = prediction.iteration
    return {
        "iteration_time_seconds": prediction.iteration_time,
        "iteration_time_low_seconds": prediction.low,
        "iteration_time_high_seconds": prediction.high,
        "basis": prediction.basis,
        "tokens_per_second_per_gpu": prediction.tokens_per_second_per_gpu,
        "mfu": prediction.mfu,
        "hfu": prediction.hfu,
        "bubble_fraction": float(result.bubble_fraction),
        "exposed_communication_seconds": float(result.exposed_communication_time),
        "peak_memory_bytes": prediction.peak_memory_bytes,
        "usable_memory_bytes": prediction.usable_memory_bytes,
        "memory_headroom": prediction.memory_headroom,
        "fullest_stage": prediction.fullest_stage,
        "memory_bytes": prediction.memory.row(prediction.fullest_stage),
        "dollars_per_trillion_tokens": prediction.dollars_per_trillion_tokens,
        "joules_per_token": prediction.joules_per_token,
    }


def read_plan(path: Path) -> PlanDocument:
    """Return the plan of a file.

    Raises
    ------
    SpecError
        If the file is not a plan of ours: file, line and key.
    """
    section = read_yaml(path)
    kind = section.optional_text("kind")
    if kind != "training_plan":
        hints = {
            "training": "plan it first: 'meshwright plan'",
            "serving": "plan it first: 'meshwright plan'",
            "serving_plan": "this takes plans of training; 'simulate', 'explain', 'export' and 'run' take those of serving",
        }
        hint = hints.get(str(kind), "'meshwright plan' writes plan files")
        raise section.error(
            "kind", f"expected a plan file (kind: training_plan), not {kind or 'this'}; {hint}"
        )
    if section.integer("schema_version") != _SCHEMA_VERSION:
        raise section.error("schema_version", f"this release reads version {_SCHEMA_VERSION}")
    # Predictions are recomputed; they stand in the file for people and other tools.
    section.optional_text("written_by")
    section.optional_section("prediction")
    section.optional_section("calibration")
    origin_section = section.optional_section("origin")
    origin = {key: origin_section.text(key) for key in origin_section} if origin_section else {}
    workload = section.section("workload")
    job = TrainingJob(
        model=model_from_section(section.section("model")),
        cluster=cluster_from_section(section.section("cluster")),
        workload=TrainingWorkload(
            global_batch_size=workload.integer("global_batch_size", minimum=1),
            sequence_length=workload.integer("sequence_length", minimum=1),
            precision=workload.choice("precision", PRECISIONS),  # type: ignore[arg-type]  # a word of this very list
            **workload_options(workload),
        ),
        software=section.choice("software", list_software()),
        features=software_features(section),
    )
    workload.close()
    plan = _plan(section.section("plan"))
    _check_fits(section, job, plan)
    section.close()
    return PlanDocument(job=job, plan=plan, origin=origin)


def _plan_mapping(plan: ParallelPlan) -> dict[str, object]:
    mapping = dataclasses.asdict(plan)
    for key in ("layers_per_stage", "recompute_modules", "micro_batch_shares"):
        mapping[key] = list(mapping[key])
    mapping["layer_groups"] = [_group_mapping(group) for group in plan.layer_groups]
    if plan.device_mapping is not None:
        mapping["device_mapping"] = device_mapping_mapping(plan.device_mapping)
    defaults = {each.name: each.default for each in dataclasses.fields(plan)}
    return {
        key: value
        for key, value in mapping.items()
        if value is not None and not (key in _RARE_FIELDS and getattr(plan, key) == defaults[key])
    }


def _workload_mapping(workload: TrainingWorkload) -> dict[str, object]:
    """Return the workload, what it leaves at its default left out but for batch, length and precision."""
    stated = ("global_batch_size", "sequence_length", "precision")
    mapping: dict[str, object] = {
        each.name: getattr(workload, each.name)
        for each in dataclasses.fields(workload)
        if each.name in stated or getattr(workload, each.name) != each.default
    }
    if workload.routing_by_ep:
        mapping["routing_by_ep"] = routing_by_ep_mappings(workload.routing_by_ep)
    return mapping


def _plan(section: Section) -> ParallelPlan:
    degrees = {
        axis: section.integer(axis, default=1, minimum=1)
        for axis in ("tp", "pp", "vpp", "cp", "ep", "etp", "expert_overlap")
    }
    dp = section.integer("dp", minimum=1)
    micro_batch_size = section.integer("micro_batch_size", minimum=1)
    sequence_parallel = section.boolean("sequence_parallel", default=False)
    schedule = cast("ScheduleName", section.choice("schedule", SCHEDULES_KNOWN))
    recompute = cast("Recompute", section.choice("recompute", RECOMPUTES, default="none"))
    sharding = cast("Sharding", section.choice("sharding", SHARDINGS, default="none"))
    sharding_group = section.optional_integer("sharding_group", minimum=1)
    vocab_parallel = cast("VocabParallel", section.choice("vocab_parallel", VOCAB_PARALLELS, default="none"))
    layers_per_stage = section.integers("layers_per_stage")
    cp_method = cast("CpMethod", section.choice("cp_method", CP_METHODS, default="ring"))
    recompute_modules = section.texts("recompute_modules") if section.has("recompute_modules") else ()
    recompute_layers = section.optional_integer("recompute_layers", minimum=1)
    secondary_group = section.optional_integer("secondary_group", minimum=1)
    optimizer_offload, parameter_offload = (
        cast("Offload", section.choice(key, OFFLOADS, default="none"))
        for key in ("optimizer_offload", "parameter_offload")
    )
    fraction = section.optional_number("optimizer_offload_fraction")
    activation_offload = section.boolean("activation_offload", default=False)
    shares = section.integers("micro_batch_shares") if section.has("micro_batch_shares") else ()
    groups = section.sections("layer_groups") if section.has("layer_groups") else ()
    layer_groups = tuple(_layer_group(group) for group in groups)
    mapped = section.optional_section("device_mapping")
    device_mapping = None if mapped is None else device_mapping_of_section(mapped)
    # Before the plan is built: a mistyped key must not show as a degree that does not fit.
    section.close()
    try:
        return ParallelPlan(
            dp=dp,
            **degrees,
            sequence_parallel=sequence_parallel,
            micro_batch_size=micro_batch_size,
            schedule=schedule,
            recompute=recompute,
            sharding=sharding,
            sharding_group=sharding_group,
            vocab_parallel=vocab_parallel,
            layers_per_stage=layers_per_stage,
            cp_method=cp_method,
            recompute_modules=recompute_modules,
            recompute_layers=recompute_layers,
            secondary_group=secondary_group,
            optimizer_offload=optimizer_offload,
            optimizer_offload_fraction=1.0 if fraction is None else fraction,
            parameter_offload=parameter_offload,
            activation_offload=activation_offload,
            layer_groups=layer_groups,
            device_mapping=device_mapping,
            micro_batch_shares=shares,
        )
    except SpecError as error:
        raise section.error("", str(error)) from None


def _group_mapping(group: LayerGroup) -> dict[str, object]:
    mapping = dataclasses.asdict(group)
    modules = list(mapping.pop("recompute_modules"))
    return mapping | ({"recompute_modules": modules} if modules else {})


def _layer_group(section: Section) -> LayerGroup:
    num_layers = section.integer("num_layers", minimum=1)
    tp = section.integer("tp", default=1, minimum=1)
    sequence_parallel = section.boolean("sequence_parallel", default=False)
    sharding = cast("GroupSharding", section.choice("sharding", GROUP_SHARDINGS, default="none"))
    recompute = cast("GroupRecompute", section.choice("recompute", GROUP_RECOMPUTES, default="none"))
    modules = section.texts("recompute_modules") if section.has("recompute_modules") else ()
    section.close()
    try:
        return LayerGroup(
            num_layers=num_layers,
            tp=tp,
            sequence_parallel=sequence_parallel,
            sharding=sharding,
            recompute=recompute,
            recompute_modules=modules,
        )
    except SpecError as error:
        raise section.error("", str(error)) from None


def _check_fits(section: Section, job: TrainingJob, plan: ParallelPlan) -> None:
    if plan.num_layers != job.model.num_layers:
        raise section.error(
            "plan",
            f"layers_per_stage adds up to {plan.num_layers}, but the model has {job.model.num_layers} layers",
        )
    if plan.num_gpus > job.cluster.num_gpus:
        raise section.error(
            "plan",
            f"needs tp x cp x dp x pp = {plan.num_gpus} GPUs, but the cluster has {job.cluster.num_gpus}",
        )
    for tp in dict.fromkeys([plan.tp, *(group.tp for group in plan.layer_groups)]):
        if job.model.num_attention_heads % tp:
            raise section.error(
                "plan", f"tp {tp} does not divide {job.model.num_attention_heads} attention heads"
            )
    stage = plan.tp * plan.cp * plan.dp
    if stage % (plan.ep * plan.etp):
        raise section.error(
            "plan",
            f"ep x etp = {plan.ep * plan.etp} does not divide the tp x cp x dp = {stage} ranks of a stage",
        )
    if plan.ep * plan.etp > 1 and (job.model.moe is None or job.model.moe.num_experts % plan.ep):
        experts = f"{job.model.moe.num_experts} experts" if job.model.moe else "a model without experts"
        raise section.error("plan", f"ep {plan.ep} does not divide {experts}")
    try:
        plan.num_micro_batches(job.workload.global_batch_size)
    except SpecError as error:
        raise section.error("plan", str(error)) from None


def _digest(mapping: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()
