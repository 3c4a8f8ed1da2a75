"""The Python module of a torchtitan 0.3 export: number format, adapters and model are not reachable by arguments."""

from __future__ import annotations

from meshwright.planner.export.scripts import label
from meshwright.planner.export.torchtitan_flavors import Flavor
from meshwright.planner.export.torchtitan_settings import compiles_model
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["model_module"]


def model_module(job: TrainingJob, plan: ParallelPlan, flavor: Flavor) -> str:
    """Return the source of ``meshwright_model.py``, whose ``train`` returns the config of the model.

    Parameters
    ----------
    job, plan : TrainingJob, ParallelPlan
        A plan that breaks no rule of the target.
    flavor : Flavor
        The registered model of the job.
    """
    converters = _converters(job, compiles_model(plan))
    package = f"torchtitan.models.{flavor.family}"
    imports = [
        *_converter_imports(converters),
        f"from {package} import model_registry",
        f"from {package}.config_registry import {flavor.base}",
    ]
    arguments = [f'"{flavor.name}"', 'attn_backend="flex"']
    loss = []
    if job.model.num_mtp_layers:
        imports += [
            f"from {package}.mtp import MTPLoss",
            "from torchtitan.models.common.config_utils import decoder_vocab_size",
        ]
        arguments.append(f"num_mtp_layers={job.model.num_mtp_layers}")
        loss = ["    config.loss = MTPLoss.Config(global_vocab_size=decoder_vocab_size(config.model_spec))"]
    arguments.append(
        "converters=["
        + "".join(f"\n            {call}," for call in converters)
        + ("\n        ]" if converters else "]")
    )
    lines = [
        f'"""Model of a Meshwright plan: {label(job.model.name)}, torchtitan\'s {flavor.family} {flavor.name}."""',
        "",
        *sorted(imports),
        "",
        "",
        "def train():",
        f"    config = {flavor.base}()",
        "    config.model_spec = model_registry(",
        *(f"        {argument}," for argument in arguments),
        "    )",
        *loss,
        "    return config",
    ]
    return "\n".join(lines) + "\n"


def _converters(job: TrainingJob, is_compiled: bool) -> list[str]:
    """Return the constructor calls, number formats before adapters as torchtitan demands."""
    compiled = f"model_compile_enabled={is_compiled}"
    has_experts = job.model.moe is not None
    calls = []
    if job.workload.precision == "fp8":
        left_out = '["lm_head", "router.gate"]' if has_experts else '["lm_head"]'
        recipe = 'recipe_name="rowwise"'
        calls.append(f"Float8LinearConverter.Config({recipe}, filter_fqns={left_out}, {compiled})")
        if has_experts:
            calls.append(f"Float8GroupedExpertsConverter.Config({compiled})")
    elif job.workload.precision == "mxfp8":
        converted = '["attention", "feed_forward", "shared_experts"]'
        calls.append(f"MXFP8LinearConverter.Config(fqns={converted}, {compiled})")
        if has_experts:
            # 128 rows: what the quantization kernel of sm_100 asks.
            calls.append(f"MXFP8GroupedExpertsConverter.Config(pad_multiple=128, {compiled})")
    if job.workload.lora_rank is not None:
        calls.append(f"LoRAConverter.Config(rank={job.workload.lora_rank})")
    return calls


def _converter_imports(calls: list[str]) -> list[str]:
    names = sorted(call.split(".", 1)[0] for call in calls)
    formats = [name for name in names if name != "LoRAConverter"]
    imports = [f"from torchtitan.components.quantization import {', '.join(formats)}"] if formats else []
    if len(formats) < len(names):
        imports.append("from torchtitan.components.lora import LoRAConverter")
    return imports
