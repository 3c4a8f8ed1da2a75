"""Export to torchtitan: arguments and a model module for 0.3, a TOML job file for 0.2; torchrun script, Slurm job.

The release 0.3 replaced TOML files by registered Python configs; 0.2 still has ring attention and DualPipeV's overlap
of expert communication, so both are targets. Rank order is the plan's: pp slowest, replicas, shards, cp, tp fastest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

from meshwright.planner.export.base import (
    ExportBundle,
    ExportFile,
    Launcher,
    raise_if_unsupported,
)
from meshwright.planner.export.launchers import launch_command, launch_files
from meshwright.planner.export.rules import Rule, broken_rules
from meshwright.planner.export.scripts import ArgumentGroup, args_file, label
from meshwright.planner.export.torchtitan_flavors import find_flavor
from meshwright.planner.export.torchtitan_module import model_module
from meshwright.planner.export.torchtitan_rules import TORCHTITAN_0_2_RULES, TORCHTITAN_0_3_RULES
from meshwright.planner.export.torchtitan_schedule import PLACED_LIKE, SCHEDULE_FILE, schedule_csv
from meshwright.planner.export.torchtitan_settings import (
    as_arguments,
    as_toml,
    compiles_model,
    torchtitan_settings,
)
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["Torchtitan02Exporter", "TorchtitanExporter"]

_MODULE = "meshwright_model"
_ASSETS = (
    "HF_ASSETS_PATH",
    "a folder with the tokenizer of the model (scripts/download_hf_assets.py of torchtitan)",
)
_LIMITS: dict[str, tuple[int | str | bool, ...]] = {
    "cp_method": ("ring", "all_gather"),
    "schedule": (
        "none",
        "gpipe",
        "1f1b",
        "interleaved_1f1b",
        "zb_h1",
        "zb_h2",
        "zb_v",
        "v_half",
        "v_min",
        "dualpipe_v",
    ),
    "sharding": ("none", "zero2", "zero3", "hsdp"),
    "expert_overlap": (1,),
    "secondary_group": (0,),
    "recompute_modules": (0,),
    "optimizer_offload": ("none", "cpu"),
    "parameter_offload": ("none", "cpu"),
    "activation_offload": (False,),
    "vocab_parallel": ("none", "redistributed"),
}
_EXPRESSES = {
    "schedule": "gpipe, 1f1b, interleaved_1f1b, zb_h1, zb_v, dualpipe_v; zb_h2, v_half, v_min as tables",
    "stages": "any number of layers each",
    "sharding": "none (replicas), zero2, zero3, hsdp",
    "recompute": "none, selective (operators), full",
    "offload": "weights with optimizer states to cpu",
    "precision": "fp32, bf16, fp8, mxfp8",
}


class _Exporter(ABC):
    """What both releases share."""

    target: str
    target_version: str
    search_limits: Mapping[str, tuple[int | str | bool, ...]]
    expresses: Mapping[str, str]
    _rules: tuple[Rule, ...]

    def unsupported(self, job: TrainingJob, plan: ParallelPlan) -> tuple[str, ...]:
        """Return every reason why torchtitan cannot run the plan; empty when it can."""
        return broken_rules(self._rules, job, plan)

    def export(self, job: TrainingJob, plan: ParallelPlan, launcher: Launcher) -> ExportBundle:
        """Return ``env.sh``, the settings, ``launch.sh`` and what the launcher adds.

        Raises
        ------
        UnsupportedByTargetError
            If ``unsupported`` is not empty; the message lists every reason.
        """
        raise_if_unsupported(self, job, plan)
        title = (
            f"Meshwright: {label(job.model.name)} on {plan.num_gpus} GPUs, torchtitan {self.target_version}."
        )
        default = self._model_name(job)
        notes = (*_notes(job, plan, is_registered=default is not None), *self._more_notes(job, plan))
        settings, sources, words, last_words = self._settings(job, plan, title, notes)
        if plan.schedule in PLACED_LIKE:
            settings = (*settings, ExportFile(SCHEDULE_FILE, schedule_csv(job, plan)))
            words = (*words, f'--parallelism.pipeline-parallel-schedule-csv "$EXPORT_DIR/{SCHEDULE_FILE}"')
        files = (ExportFile("env.sh", _environment(default)), *settings)
        model = ("TORCHTITAN_MODEL", self._model_meaning)
        scripts = launch_files(
            job,
            plan,
            launcher,
            title=title,
            sources=("env.sh", *sources),
            required=(_ASSETS,) if default else (_ASSETS, model),
            words=("-m torchtitan.train", *words),
            last_words=last_words,
            mounted=files,
        )
        command = launch_command(launcher, _ASSETS[0], "/path/to/tokenizer")
        return ExportBundle(
            target=self.target,
            target_version=self.target_version,
            files=(*files, *scripts),
            launch_command=command if default else f"TORCHTITAN_MODEL={self._model_example} {command}",
            notes=notes,
        )

    _model_meaning: str
    _model_example: str

    @abstractmethod
    def _model_name(self, job: TrainingJob) -> str | None:
        """Return the registered model as the launch script splits it, ``left:right``; None for other shapes."""

    def _more_notes(self, job: TrainingJob, plan: ParallelPlan) -> tuple[str, ...]:
        """Return what holds for this release alone."""
        return ()

    @abstractmethod
    def _settings(
        self, job: TrainingJob, plan: ParallelPlan, title: str, notes: tuple[str, ...]
    ) -> tuple[tuple[ExportFile, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Return the files of the settings, those to be sourced, and the words before and after the user's."""


class TorchtitanExporter(_Exporter):
    """torchtitan 0.3: ``--section.key value`` on a registered Python config."""

    target = "torchtitan"
    target_version = "0.3.0"
    search_limits = MappingProxyType(_LIMITS)
    expresses = MappingProxyType(
        {
            "parallel": "dp, tp with or without sequence parallelism, pp, vpp, cp, ep; etp is tp where ep is 1",
            "context": "all_gather",
            **_EXPRESSES,
            "experts": "multi-token prediction (pp 1, cp 1)",
            "adapters": "LoRA on dense models",
        }
    )
    _rules = TORCHTITAN_0_3_RULES
    _model_meaning = (
        "module:function of a config whose model has the shape, number format and adapters of the plan"
    )
    _model_example = "my_package.configs:train"

    def _model_name(self, job: TrainingJob) -> str | None:
        return None if find_flavor(job.model, self.target_version) is None else f"{_MODULE}:train"

    def _settings(
        self, job: TrainingJob, plan: ParallelPlan, title: str, notes: tuple[str, ...]
    ) -> tuple[tuple[ExportFile, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        policy = ArgumentGroup(
            name="ACTIVATION_CHECKPOINT_ARGS",
            comment="Recompute: a subcommand, which must come last.",
            options=((f"activation-checkpoint:{plan.recompute}",),),
        )
        groups = as_arguments(torchtitan_settings(job, plan, self.target_version))
        files = [ExportFile("args.sh", args_file(title, (*groups, policy), notes))]
        flavor = find_flavor(job.model, self.target_version)
        if flavor is not None:
            files.append(ExportFile(f"{_MODULE}.py", model_module(job, plan, flavor)))
        words = (
            '--module "${TORCHTITAN_MODEL%%:*}"',
            '--config "${TORCHTITAN_MODEL#*:}"',
            '--hf-assets-path "$HF_ASSETS_PATH"',
            *(f'"${{{group.name}[@]}}"' for group in groups),
        )
        return tuple(files), ("args.sh",), words, (f'"${{{policy.name}[@]}}"',)


class Torchtitan02Exporter(_Exporter):
    """torchtitan 0.2: a TOML job file (0.2.2 ignores the rotation of ring attention, so 0.2.1)."""

    target = "torchtitan-0.2"
    target_version = "0.2.1"
    search_limits = MappingProxyType(_LIMITS)
    expresses = MappingProxyType(
        {
            "parallel": "dp, tp with sequence parallelism, pp, vpp, cp, ep, etp 1 or tp",
            "context": "ring (alltoall), all_gather",
            **_EXPRESSES,
            "experts": "all-to-all beside compute under dualpipe_v",
        }
    )
    _rules = TORCHTITAN_0_2_RULES
    _model_meaning = "name:flavor of a registered model of that shape"
    _model_example = "my_model:my_flavor"

    def _model_name(self, job: TrainingJob) -> str | None:
        flavor = find_flavor(job.model, self.target_version)
        return None if flavor is None else f"{flavor.family}:{flavor.name}"

    def _more_notes(self, job: TrainingJob, plan: ParallelPlan) -> tuple[str, ...]:
        if job.workload.precision != "fp8" or plan.tp == 1 or "float8_rowwise" in job.features:
            return ()
        return (
            "torchtitan 0.2.1 gathers for tp in 16 bits: parallelize.py looks for a converter 'float8', which has another "
            "name by then. The prediction counts on 8 bits.",
        )

    def _settings(
        self, job: TrainingJob, plan: ParallelPlan, title: str, notes: tuple[str, ...]
    ) -> tuple[tuple[ExportFile, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        head = "\n".join([f"# {title}", *(f"# Note: {note}" for note in notes)])
        text = head + "\n" + as_toml(torchtitan_settings(job, plan, self.target_version))
        words = (
            '--job.config-file "$EXPORT_DIR/job.toml"',
            '--model.name "${TORCHTITAN_MODEL%%:*}"',
            '--model.flavor "${TORCHTITAN_MODEL#*:}"',
            '--model.hf-assets-path "$HF_ASSETS_PATH"',
        )
        return (ExportFile("job.toml", text),), (), words, ()


def _environment(model: str | None) -> str:
    lines = [
        "# shellcheck shell=bash",
        "# Environment of every rank.",
        "# Lets the allocator grow its segments, as torchtitan's own launcher does.",
        "export PYTORCH_ALLOC_CONF=expandable_segments:True",
    ]
    if model is not None:
        lines += [
            "# The registered model; give another one of the same shape here.",
            f'export TORCHTITAN_MODEL="${{TORCHTITAN_MODEL:-{model}}}"',
        ]
    if model is not None and model.startswith(_MODULE):
        lines.append('export PYTHONPATH="$EXPORT_DIR${PYTHONPATH:+:$PYTHONPATH}"')
    return "\n".join(lines) + "\n"


def _notes(job: TrainingJob, plan: ParallelPlan, *, is_registered: bool) -> tuple[str, ...]:
    notes = [
        "Data, optimizer and learning rate are those of torchtitan's config; the plan sets neither them nor the 100 steps."
    ]
    if not is_registered:
        notes.append("No registered model has this shape: register one and name it in TORCHTITAN_MODEL.")
    if job.software != "torchtitan":
        notes.append(
            f"The prediction is for software '{label(job.software)}'; predict with software torchtitan for this target."
        )
    if not compiles_model(plan):
        notes.append("torch refuses this schedule on compiled layers, so only the loss is compiled.")
    if plan.schedule == "zb_v":
        notes.append(
            "torch runs the weight gradients of a pair of micro-batches later than the simulated schedule."
        )
    if plan.vocab_parallel == "redistributed":
        notes.append("Vocabulary redistributed: layers make room for embedding and head by the stages alone.")
    if job.model.moe is not None:
        notes.append(
            f"The prediction assumes that the busiest expert rank gets {job.workload.imbalance_at(plan.ep):g} times the mean."
        )
    if job.workload.precision in ("fp8", "mxfp8"):
        notes.append("Number format by torchao; layers whose sizes do not align stay in bf16.")
    if plan.parameter_offload != "none":
        notes.append("Offload to host memory takes gradients along with weights and optimizer states.")
    return tuple(notes)
