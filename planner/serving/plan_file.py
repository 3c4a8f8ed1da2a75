"""Serving plan files: self-contained YAML that simulates and exports with nothing else at hand."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import cluster_from_section
from meshwright.hardware_specs.spec_writing import cluster_to_mapping, dump_yaml
from meshwright.hardware_specs.yaml_document import Section, read_yaml
from meshwright.planner.serving.acceptance_keys import acceptance_mapping, acceptance_of_section
from meshwright.planner.serving.workload_section import (
    slo_mapping,
    slo_of_section,
    workload_mapping,
    workload_of_section,
)
from meshwright.simcore.domain.model_catalog import model_from_section, model_to_mapping
from meshwright.simcore.domain.serving import (
    ENGINES,
    POLICIES,
    POOL_ROLES,
    ROUTERS,
    EngineName,
    PolicyName,
    PoolRole,
    RouterName,
    ServingJob,
    ServingPlan,
    ServingPool,
    expert_slots_reason,
    pools_by_cluster,
)
from meshwright.simcore.domain.speculation import Acceptance
from meshwright.simcore.domain.workload import PRECISIONS, Precision

__all__ = [
    "SERVING_PLAN_KIND",
    "ServingPlanDocument",
    "is_serving_plan",
    "read_serving_plan",
    "serving_plan_mapping",
    "serving_plan_text",
]

SERVING_PLAN_KIND = "serving_plan"
_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlanDocument:
    """A serving plan with everything it was made from."""

    job: ServingJob
    plan: ServingPlan
    origin: Mapping[str, str] = field(default_factory=dict)


def serving_plan_text(
    document: ServingPlanDocument,
    prediction: Mapping[str, object],
    calibrations: Mapping[str, Mapping[str, str]],
    constants: Sequence[str],
) -> str:
    """Return the YAML of a serving plan.

    Parameters
    ----------
    document : ServingPlanDocument
        Job as resolved, and the plan.
    prediction : Mapping[str, object]
        Figures of the plan at the load they were simulated at, units in the key names.
    calibrations : Mapping[str, Mapping[str, str]]
        Id and hash of the operator calibrations: ``calibration``, and ``prefill_calibration`` where prefill GPUs differ.
    constants : Sequence[str]
        Which engine constants are fitted, borrowed or defaults; one sentence each.
    """
    job = document.job
    model, cluster = model_to_mapping(job.model), cluster_to_mapping(job.cluster)
    mapping: dict[str, object] = {
        "schema_version": _SCHEMA_VERSION,
        "kind": SERVING_PLAN_KIND,
        "written_by": "meshwright",
        "plan": serving_plan_mapping(document.plan),
        "prediction": dict(prediction),
        "constants": list(constants),
        **calibrations,
        **({"slo": slo_mapping(job.slo)} if job.slo.limits else {}),
        "workload": workload_mapping(job.workload),
        "origin": {
            **{key: text for key, text in document.origin.items() if not key.endswith("_sha256")},
            "model_sha256": _digest(model),
            "cluster_sha256": _digest(cluster),
        },
        "model": model,
        "cluster": cluster,
        **(
            {"prefill_cluster": cluster_to_mapping(job.prefill_cluster)}
            if job.prefill_cluster is not None
            else {}
        ),
    }
    return dump_yaml(mapping)


def serving_plan_mapping(plan: ServingPlan) -> dict[str, object]:
    """Return a plan as plain data; what a pool leaves at its default and does not use is left out."""
    mapping = {
        each.name: getattr(plan, each.name)
        for each in dataclasses.fields(plan)
        if each.name != "pools" and getattr(plan, each.name) != ""
    }
    return {**mapping, "pools": [_pool_mapping(pool) for pool in plan.pools]}


def is_serving_plan(path: Path) -> bool:
    """Return whether a YAML file says that it is a serving plan.

    Raises
    ------
    SpecError
        If the file is no YAML mapping.
    """
    section = read_yaml(path)
    return section.has("kind") and section.text("kind") == SERVING_PLAN_KIND


def read_serving_plan(path: Path) -> ServingPlanDocument:
    """Return the serving plan of a file.

    Raises
    ------
    SpecError
        If the file is not a serving plan of ours, or the plan does not fit its model and cluster: file, line, key.
    """
    section = read_yaml(path)
    kind = section.optional_text("kind")
    if kind != SERVING_PLAN_KIND:
        raise section.error(
            "kind",
            f"expected a serving plan (kind: {SERVING_PLAN_KIND}), not {kind or 'this'}; "
            "'meshwright plan' writes plan files",
        )
    if section.integer("schema_version") != _SCHEMA_VERSION:
        raise section.error("schema_version", f"this release reads version {_SCHEMA_VERSION}")
    # Predictions are recomputed; they stand in the file for people and other tools.
    section.optional_text("written_by")
    section.optional_section("prediction")
    section.optional_section("calibration")
    section.optional_section("prefill_calibration")
    section.texts("constants")
    origin_section = section.optional_section("origin")
    origin = {key: origin_section.text(key) for key in origin_section} if origin_section else {}
    apart = section.optional_section("prefill_cluster")
    job = ServingJob(
        model=model_from_section(section.section("model")),
        cluster=cluster_from_section(section.section("cluster")),
        workload=workload_of_section(section.section("workload")),
        slo=slo_of_section(section.optional_section("slo")),
        prefill_cluster=None if apart is None else cluster_from_section(apart),
    )
    plan = _plan(section.section("plan"))
    _check_fits(section, job, plan)
    section.close()
    return ServingPlanDocument(job=job, plan=plan, origin=origin)


def _pool_mapping(pool: ServingPool) -> dict[str, object]:
    rare = (
        "attention_dp",
        "moe_tp",
        "ep",
        "redundant_experts",
        "has_prefix_cache",
        "num_speculative_tokens",
    )
    defaults = {
        each.name: each.default
        for each in dataclasses.fields(pool)
        if each.name not in ("acceptance_rate", "acceptance_lengths")
    }
    mapping = {
        key: getattr(pool, key)
        for key, default in defaults.items()
        if getattr(pool, key) is not None and not (key in rare and getattr(pool, key) == default)
    }
    return mapping | acceptance_mapping(pool.acceptance) if pool.num_speculative_tokens else mapping


def _plan(section: Section) -> ServingPlan:
    engine = cast("EngineName", section.choice("engine", ENGINES))
    version = section.optional_text("engine_version") or ""
    precision = cast("Precision", section.choice("precision", PRECISIONS, default="bf16"))
    kv_precision = cast("Precision", section.choice("kv_precision", PRECISIONS, default="bf16"))
    router = cast("RouterName", section.choice("router", ROUTERS, default="least_loaded"))
    pools = tuple(_pool(part) for part in section.sections("pools"))
    section.close()
    try:
        return ServingPlan(
            engine=engine,
            engine_version=version,
            precision=precision,
            kv_precision=kv_precision,
            router=router,
            pools=pools,
        )
    except SpecError as error:
        raise section.error("", str(error)) from None


def _pool(section: Section) -> ServingPool:
    defaults = {each.name: each.default for each in dataclasses.fields(ServingPool)}
    numbers = {
        key: section.integer(key, default=cast("int", defaults[key]))
        for key in (
            "num_replicas",
            "tp",
            "pp",
            "attention_dp",
            "moe_tp",
            "ep",
            "redundant_experts",
            "max_num_sequences",
            "max_num_batched_tokens",
            "block_size",
            "num_speculative_tokens",
        )
    }
    role = cast("PoolRole", section.choice("role", POOL_ROLES, default="aggregated"))
    policy = cast("PolicyName", section.choice("policy", POLICIES, default="chunked_prefill"))
    kv_cache_tokens = section.optional_integer("kv_cache_tokens")
    expert_imbalance = section.optional_number("expert_imbalance")
    has_prefix_cache = section.boolean("has_prefix_cache", default=False)
    acceptance = acceptance_of_section(section) or Acceptance()
    # Before the pool is built: a mistyped key must not show as a degree that does not fit.
    section.close()
    try:
        return ServingPool(
            role=role,
            policy=policy,
            kv_cache_tokens=kv_cache_tokens,
            expert_imbalance=expert_imbalance,
            has_prefix_cache=has_prefix_cache,
            acceptance_rate=acceptance.rate,
            acceptance_lengths=acceptance.lengths,
            **numbers,
        )
    except SpecError as error:
        raise section.error("", str(error)) from None


def _check_fits(section: Section, job: ServingJob, plan: ServingPlan) -> None:
    for pools, cluster in pools_by_cluster(job, plan):
        needed = sum(pool.num_gpus for pool in pools)
        if needed > cluster.num_gpus:
            what = "its pools need" if len(pools) == len(plan.pools) else f"its {pools[0].role} pool needs"
            raise section.error("plan", f"{what} {needed} GPUs, but the cluster has {cluster.num_gpus}")
    model = job.model
    for pool in plan.pools:
        where = f"{pool.role} pool"
        if model.num_attention_heads % pool.tp:
            raise section.error(
                "plan", f"{where}: tp {pool.tp} does not divide {model.num_attention_heads} attention heads"
            )
        if pool.pp > model.num_layers:
            raise section.error(
                "plan", f"{where}: pp {pool.pp} is more than the model's {model.num_layers} layers"
            )
        if pool.moe_tp * pool.ep > 1 and model.moe is None:
            raise section.error(
                "plan", f"{where}: ep {pool.ep} x moe_tp {pool.moe_tp} for a model without experts"
            )
        if model.moe is not None:
            reason = expert_slots_reason(model.moe.num_experts, pool)
            if reason is not None:
                raise section.error("plan", f"{where}: {reason}")


def _digest(mapping: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()
