"""An execution: a training plan reduced to what a worker process needs to run it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.model_catalog import model_to_mapping
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.workload import TrainingWorkload
from meshwright.simcore.domain.workload_section import routing_by_ep_mappings

__all__ = ["Execution", "ExecutionDevice", "execution_mapping", "execution_text"]

ExecutionDevice = Literal["cpu", "cuda"]
_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """A plan to run for a few steps on random tokens.

    Parameters
    ----------
    model, plan, workload : ModelSpec, ParallelPlan, TrainingWorkload
        What runs, how it is laid out, and the size of a step.
    device : ExecutionDevice
        ``cuda`` with NCCL or ``cpu`` with gloo.
    num_steps, num_warmup_steps : int
        Measured steps, after steps that are run and not measured.
    seed : int
        Of weights and tokens.
    """

    model: ModelSpec
    plan: ParallelPlan
    workload: TrainingWorkload
    device: ExecutionDevice
    num_steps: int
    num_warmup_steps: int = 2
    seed: int = 0


def execution_mapping(execution: Execution) -> dict[str, object]:
    """Return the execution as plain data, with its schema version; the order of keys is fixed, absent fields have none."""
    return {
        "schema_version": _SCHEMA_VERSION,
        "kind": "execution",
        "written_by": "meshwright",
        "device": execution.device,
        "num_steps": execution.num_steps,
        "num_warmup_steps": execution.num_warmup_steps,
        "seed": execution.seed,
        "plan": _plan_mapping(execution.plan),
        "workload": _workload_mapping(execution.workload),
        "model": model_to_mapping(execution.model),
    }


def execution_text(execution: Execution) -> str:
    """Return the execution as JSON."""
    return json.dumps(execution_mapping(execution), indent=2) + "\n"


def _workload_mapping(workload: TrainingWorkload) -> dict[str, object]:
    mapping = asdict(workload) | {"routing_by_ep": routing_by_ep_mappings(workload.routing_by_ep)}
    return {key: value for key, value in mapping.items() if key != "routing_by_ep" or value}


def _plan_mapping(plan: ParallelPlan) -> dict[str, object]:
    mapping = {key: value for key, value in asdict(plan).items() if value is not None}
    if plan.device_mapping is not None:
        # Rows as CUDA_VISIBLE_DEVICES writes them, as in plan files.
        rows = [",".join(map(str, row)) for row in plan.device_mapping.gpu_orders]
        mapping["device_mapping"] = asdict(plan.device_mapping) | {"gpu_orders": rows}
    return mapping
