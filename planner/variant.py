"""A plan with some of its fields forced to other values, the rest adapted no further than it must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.plan import (
    CP_METHODS,
    OFFLOADS,
    RECOMPUTES,
    SCHEDULES_KNOWN,
    SHARDINGS,
    VOCAB_PARALLELS,
    ParallelPlan,
    can_partition,
    partition_layers,
)

__all__ = ["VARIANT_FIELDS", "PlanValue", "force_fields", "parse_fields"]

PlanValue = int | float | str | bool | tuple[str, ...]

_INTEGERS = (
    "tp",
    "pp",
    "vpp",
    "dp",
    "cp",
    "ep",
    "etp",
    "expert_overlap",
    "micro_batch_size",
    "recompute_layers",
    "sharding_group",
    "secondary_group",
)
_FLAGS = ("sequence_parallel", "activation_offload")
_WORDS: Mapping[str, tuple[str, ...]] = {
    "schedule": SCHEDULES_KNOWN,
    "recompute": RECOMPUTES,
    "sharding": SHARDINGS,
    "vocab_parallel": VOCAB_PARALLELS,
    "cp_method": CP_METHODS,
    "optimizer_offload": OFFLOADS,
    "parameter_offload": OFFLOADS,
}
VARIANT_FIELDS: tuple[str, ...] = (
    *_INTEGERS,
    *_FLAGS,
    *_WORDS,
    "recompute_modules",
    "optimizer_offload_fraction",
)
"""Fields of a plan that can be forced."""

# Schedules that follow from pp and vpp alone, so that a change of these may exchange one for another.
_PLAIN_SCHEDULES = ("none", "gpipe", "1f1b", "interleaved_1f1b")
# Schedules whose stages hold two chunks, there and back.
_V_SHAPED = ("zb_v", "v_half", "v_min", "dualpipe_v")


def parse_fields(text: str) -> dict[str, PlanValue]:
    """Return the fields of ``tp=8,pp=4,sequence_parallel=no``.

    Modules of ``recompute_modules`` are joined by ``+``.

    Raises
    ------
    SpecError
        If a pair is malformed, a field unknown or given twice, or a value of the wrong kind.
    """
    fields: dict[str, PlanValue] = {}
    for pair in text.split(","):
        name, separator, value = (part.strip() for part in pair.partition("="))
        if not separator or not name or not value:
            raise SpecError(f"'{pair.strip()}': write field=value, such as tp=8 or tp=8,pp=4")
        if name not in VARIANT_FIELDS:
            raise SpecError(
                f"unknown plan field '{name}'{did_you_mean(name, VARIANT_FIELDS) or ';'} "
                f"known: {', '.join(VARIANT_FIELDS)}"
            )
        if name in fields:
            raise SpecError(f"{name} is given twice; give each field once")
        fields[name] = _value(name, value)
    return fields


def _value(name: str, text: str) -> PlanValue:
    if name in _INTEGERS:
        if not text.isdigit() or int(text) < 1:
            raise SpecError(f"{name}: expected a whole number above zero, not '{text}'")
        return int(text)
    if name in _FLAGS:
        answers = {"yes": True, "true": True, "no": False, "false": False}
        if text.lower() not in answers:
            raise SpecError(f"{name}: expected yes or no, not '{text}'")
        return answers[text.lower()]
    if name in _WORDS:
        known = _WORDS[name]
        if text not in known:
            raise SpecError(
                f"{name}: unknown value '{text}'{did_you_mean(text, known) or ';'} known: {', '.join(known)}"
            )
        return text
    if name == "recompute_modules":
        return tuple(text.split("+"))
    try:
        return float(text)
    except ValueError:
        raise SpecError(f"{name}: expected a number from 0 to 1, not '{text}'") from None


def force_fields(
    model: ModelSpec, cluster: ClusterSpec, plan: ParallelPlan, forced: Mapping[str, PlanValue]
) -> ParallelPlan:
    """Return the plan with the forced fields; the others keep their value unless the forced ones exclude it.

    ``dp`` takes what tp, cp and pp leave of the plan's GPUs; layers are spread anew when pp or vpp change (all zero
    where they cannot be, for the pipeline constraint to say so); ``none``, ``gpipe``, ``1f1b`` and
    ``interleaved_1f1b`` follow pp and vpp; sequence parallelism ends with tp 1, sharding with a single replica,
    groups that no longer divide dp with it; a layer-wise plan becomes uniform.

    Raises
    ------
    SpecError
        If the forced fields contradict each other or the number of GPUs.
    """
    fields: dict[str, Any] = dict(forced)
    tp, pp, cp = (int(fields.get(axis, getattr(plan, axis))) for axis in ("tp", "pp", "cp"))
    dp = _replicas(cluster, plan, forced, tp * pp * cp)
    schedule, vpp = _schedule(plan, forced, pp)
    layers = plan.layers_per_stage
    if (pp, vpp) != (plan.pp, plan.vpp):
        stages = pp * vpp
        can = can_partition(model.num_layers, stages)
        layers = partition_layers(model.num_layers, stages) if can else (0,) * stages
    sequence_parallel = plan.sequence_parallel and tp > 1
    adapted: dict[str, Any] = {
        "dp": dp,
        "vpp": vpp,
        "schedule": schedule,
        "layers_per_stage": layers,
        "sequence_parallel": sequence_parallel,
        "sharding": plan.sharding if dp * cp > 1 else "none",
        **_groups(plan, dp),
        **_recompute_details(plan, str(fields.get("recompute", plan.recompute))),
    }
    sharding = fields.get("sharding", adapted["sharding"])
    if sharding != "zero3":
        adapted["secondary_group"] = None
    if sharding not in ("zero3", "hsdp"):
        adapted["parameter_offload"] = "none"
    if not set(forced) <= {"schedule"}:
        adapted["layer_groups"] = ()
    return replace(plan, **(adapted | fields))


def _replicas(
    cluster: ClusterSpec, plan: ParallelPlan, forced: Mapping[str, PlanValue], model_ranks: int
) -> int:
    product = "tp x cp x pp"
    if "dp" in forced:
        dp = int(forced["dp"])  # type: ignore[arg-type]  # parse_fields makes it a whole number
        if dp * model_ranks > cluster.num_gpus:
            raise SpecError(
                f"{product} x dp = {model_ranks} x {dp} = {model_ranks * dp} GPUs, but the cluster has "
                f"{cluster.num_gpus}; leave dp out and it adapts"
            )
        return dp
    if plan.num_gpus % model_ranks:
        raise SpecError(
            f"{product} = {model_ranks} does not divide the plan's {plan.num_gpus} GPUs; choose degrees whose "
            "product does, or give dp as well"
        )
    return plan.num_gpus // model_ranks


def _schedule(plan: ParallelPlan, forced: Mapping[str, PlanValue], pp: int) -> tuple[str, int]:
    """Return schedule and chunks, following pp where they can."""
    vpp = int(forced.get("vpp", plan.vpp if pp > 1 else 1))  # type: ignore[arg-type]  # a whole number
    if "schedule" in forced:
        schedule = str(forced["schedule"])
        if "vpp" not in forced:
            vpp = max(vpp, 2) if schedule == "interleaved_1f1b" else 2 if schedule in _V_SHAPED else 1
        return schedule, vpp
    if pp == 1:
        return "none", vpp
    if plan.schedule in _PLAIN_SCHEDULES or ("vpp" in forced and vpp != plan.vpp):
        plain = plan.schedule if plan.schedule == "gpipe" else "1f1b"
        return "interleaved_1f1b" if vpp > 1 else plain, vpp
    return plan.schedule, vpp


def _groups(plan: ParallelPlan, dp: int) -> dict[str, int | None]:
    return {
        name: group if group is not None and dp % group == 0 else None
        for name, group in (
            ("sharding_group", plan.sharding_group),
            ("secondary_group", plan.secondary_group),
        )
    }


def _recompute_details(plan: ParallelPlan, recompute: str) -> dict[str, Any]:
    return {
        "recompute_modules": plan.recompute_modules if recompute == "selective" else (),
        "recompute_layers": plan.recompute_layers if recompute == "full" else None,
    }
