"""Reading the file that tells workers what to run; :func:`meshwright.simcore.domain.execution.execution_text` writes it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast, get_args

from meshwright.errors import SpecError
from meshwright.hardware_specs.json_document import read_document
from meshwright.hardware_specs.yaml_document import Section
from meshwright.simcore.domain.device_mapping import RANK_ORDERS, DeviceMapping, RankOrder
from meshwright.simcore.domain.execution import Execution, ExecutionDevice
from meshwright.simcore.domain.layer_groups import (
    GROUP_RECOMPUTES,
    GROUP_SHARDINGS,
    GroupRecompute,
    GroupSharding,
    LayerGroup,
)
from meshwright.simcore.domain.model_catalog import model_from_section
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
from meshwright.simcore.domain.workload import PRECISIONS, Precision, TrainingWorkload
from meshwright.simcore.domain.workload_section import routing_by_ep_of_section

__all__ = ["read_execution"]

_SCHEMA_VERSION = 1
_GPU_ORDER = re.compile(r"\d{1,4}(,\d{1,4}){0,1023}")
_DEVICES: tuple[str, ...] = get_args(ExecutionDevice)


def read_execution(path: Path) -> Execution:
    """Return the execution of a file.

    Raises
    ------
    SpecError
        If the file is none: file and key, and what is wrong.
    """
    section = read_document(path)
    if section.optional_text("kind") != "execution":
        raise section.error("kind", "expected the file of an execution, as 'meshwright run' writes it")
    if section.integer("schema_version") != _SCHEMA_VERSION:
        raise section.error("schema_version", f"this release reads version {_SCHEMA_VERSION}")
    section.optional_text("written_by")
    execution = Execution(
        model=model_from_section(section.section("model")),
        plan=_plan(section.section("plan")),
        workload=_workload(section.section("workload")),
        device=cast("ExecutionDevice", section.choice("device", _DEVICES)),
        num_steps=section.integer("num_steps", minimum=1),
        num_warmup_steps=section.integer("num_warmup_steps", minimum=0),
        seed=section.integer("seed", minimum=0),
    )
    section.close()
    if execution.plan.num_layers != execution.model.num_layers:
        raise section.error(
            "plan",
            f"layers_per_stage adds up to {execution.plan.num_layers}, but the model has "
            f"{execution.model.num_layers} layers",
        )
    return execution


def _workload(section: Section) -> TrainingWorkload:
    capacity = section.optional_number("expert_capacity_factor")
    workload = TrainingWorkload(
        global_batch_size=section.integer("global_batch_size", minimum=1),
        sequence_length=section.integer("sequence_length", minimum=1),
        precision=cast("Precision", section.choice("precision", PRECISIONS)),
        routing_imbalance=section.number("routing_imbalance", default=1.0),
        routing_by_ep=routing_by_ep_of_section(section),
        expert_capacity_factor=capacity,
        lora_rank=section.optional_integer("lora_rank", minimum=1),
    )
    section.close()
    return workload


def _plan(section: Section) -> ParallelPlan:
    degrees = {
        axis: section.integer(axis, minimum=1)
        for axis in ("dp", "tp", "pp", "vpp", "cp", "ep", "etp", "expert_overlap", "micro_batch_size")
    }
    groups = section.sections("layer_groups") if section.has("layer_groups") else ()
    mapped = section.optional_section("device_mapping")
    fields = {
        "cp_method": cast("CpMethod", section.choice("cp_method", CP_METHODS)),
        "sequence_parallel": section.boolean("sequence_parallel"),
        "schedule": cast("ScheduleName", section.choice("schedule", SCHEDULES_KNOWN)),
        "recompute": cast("Recompute", section.choice("recompute", RECOMPUTES)),
        "recompute_modules": section.texts("recompute_modules"),
        "recompute_layers": section.optional_integer("recompute_layers", minimum=1),
        "sharding": cast("Sharding", section.choice("sharding", SHARDINGS)),
        "sharding_group": section.optional_integer("sharding_group", minimum=1),
        "secondary_group": section.optional_integer("secondary_group", minimum=1),
        "optimizer_offload": cast("Offload", section.choice("optimizer_offload", OFFLOADS)),
        "optimizer_offload_fraction": section.number("optimizer_offload_fraction"),
        "parameter_offload": cast("Offload", section.choice("parameter_offload", OFFLOADS)),
        "activation_offload": section.boolean("activation_offload"),
        "vocab_parallel": cast("VocabParallel", section.choice("vocab_parallel", VOCAB_PARALLELS)),
        "layers_per_stage": section.integers("layers_per_stage"),
        "micro_batch_shares": section.integers("micro_batch_shares"),
        "layer_groups": tuple(_layer_group(each) for each in groups),
        "device_mapping": None if mapped is None else _device_mapping(mapped),
    }
    # Before the plan is built: a mistyped key must not show as a degree that does not fit.
    section.close()
    try:
        return ParallelPlan(**degrees, **fields)  # type: ignore[arg-type]  # each checked as it was read
    except SpecError as error:
        raise section.error("", str(error)) from None


def _device_mapping(section: Section) -> DeviceMapping:
    rows = section.texts("gpu_orders")
    for row in rows:
        if not _GPU_ORDER.fullmatch(row):
            raise section.error("gpu_orders", f"expected numbers of GPUs like '0,1,2,3', not {row!r}")
    mapping = DeviceMapping(
        rank_order=cast("RankOrder", section.choice("rank_order", RANK_ORDERS)),
        host_order=section.integers("host_order"),
        gpu_orders=tuple(tuple(map(int, row.split(","))) for row in rows),
    )
    section.close()
    return mapping


def _layer_group(section: Section) -> LayerGroup:
    group = LayerGroup(
        num_layers=section.integer("num_layers", minimum=1),
        tp=section.integer("tp", minimum=1),
        sequence_parallel=section.boolean("sequence_parallel"),
        sharding=cast("GroupSharding", section.choice("sharding", GROUP_SHARDINGS)),
        recompute=cast("GroupRecompute", section.choice("recompute", GROUP_RECOMPUTES)),
        recompute_modules=section.texts("recompute_modules"),
    )
    section.close()
    return group
