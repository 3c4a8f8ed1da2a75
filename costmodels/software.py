"""Software generations: named sets of overheads that a training framework of some year pays.

One YAML file each under ``software_generations/``, with its evidence. A generation says which kernels
exist and what is overlapped; what a device does with them is its calibration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from typing import Literal, cast

from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.yaml_document import Section, parse_yaml

__all__ = [
    "NUMBER_FIELDS",
    "AttentionKernel",
    "SelectiveRecompute",
    "SoftwareGeneration",
    "list_software",
    "load_software",
    "with_constants",
]

AttentionKernel = Literal["unfused", "flash_2", "flash_3"]
SelectiveRecompute = Literal["attention_core", "operators"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftwareGeneration:
    """Overheads of one framework generation.

    Parameters
    ----------
    id, evidence : str
        Literal name and what the constants rest on.
    attention_kernel : AttentionKernel
        ``unfused`` writes the score matrix; ``flash_2`` is FlashAttention-2 on any device; ``flash_3`` the
        kernel tuned to the architecture (FlashAttention-3, cuDNN).
    attention_efficiency : float
        Share of the device's attention curve the generation's kernel build reaches.
    elementwise_factor, eager_elementwise_factor : float
        Bytes moved by norms, activations and residuals over the ideal fused count; with the feature
        ``eager`` the second applies.
    cross_entropy_bytes_per_logit : float
        Memory traffic of loss and its gradient per logit [B].
    logit_memory_bytes : float
        Peak memory per logit of the loss [B].
    gradient_bytes : float
        Width of the main gradient buffer that is accumulated and reduced [B per parameter].
    accumulates_bf16_in_fp32 : bool
        Whatever is not fp16 accumulates and reduces gradients in fp32 (Megatron's ``--bf16`` forces it).
    gradient_accumulation_bytes : float
        Traffic of adding one micro-batch's gradient to the buffer [B per parameter].
    is_gradient_accumulation_fused : bool
        The weight-gradient GEMM accumulates into the buffer itself.
    tp_overlap, async_tp_overlap : float
        Share of tensor parallel collectives hidden by compute; the second with the feature ``async_tp``.
    gradient_reduce_overlap, parameter_gather_overlap : float
        Share of the data parallel communication that may run beside the backward and forward pass.
    overlap_contention : float
        Slowdown of compute per second of gradient reduction or weight gather hidden beside it.
    fsdp_contention : float
        Slowdown of compute per second of hidden FSDP communication (SMs and HBM taken by collectives).
    fsdp_step_latency : float
        Latency of one ring step of an FSDP collective [s].
    broadcast_step_latency : float
        ZeRO-1 by one broadcast per rank over all of dp: cost of each [s]; 0 for bucketed collectives.
    inter_node_efficiency : float
        Share of the NIC bandwidth collectives and sends reach.
    is_send_blocking : bool
        Pipeline sends hold the compute stream.
    is_receive_blocking : bool
        Pipeline receives hold the compute stream as well: one instruction after the other.
    overlaps_interleaved_sends : bool
        Interleaved schedules send beside compute (Megatron's default since overlap_p2p_communication).
    has_scatter_gather : bool
        Pipeline sends are split over tensor parallel ranks (Narayanan et al. 2021, section 4.1).
    deduplicates_dispatch : bool
        The expert dispatch sends a token once per node (DeepEP), not once per expert.
    keeps_narrow_operands : bool
        Products in a narrow format keep their inputs, and a copy of their weights, in it (Transformer Engine).
    keeps_gathered_inputs : bool
        Products under sequence parallelism keep the gathered sequence for backward (DTensor's redistribution); Megatron
        keeps its own part and gathers again (Korthikanti et al. 2022, section 4.2.2).
    repeats_key_value_heads : bool
        Keys and values are copied to every query head before attention.
    has_recompute_modules : bool
        Selective recompute takes a list of modules.
    applies_router_weights_early : bool
        The router's weights are applied within the experts' activation, so that their output need not be stored.
    expert_overlap_contention : float
        Slowdown of compute per second of hidden expert all-to-all: the share of SMs its kernels hold.
    fp8_cast_bytes : float
        Traffic of quantising one element of a GEMM input for fp8, one scale per tensor [B].
    fp8_rowwise_cast_factor : float
        Traffic of quantising with one scale per row (the feature ``float8_rowwise``) over that; 0 lacks the recipe.
    vocab_pass_time : float
        What one pass of vocabulary parallelism costs besides its work: the barrier of all stages, small
        collectives and launches [s].
    fixed_time : float
        Once per iteration [s].
    host_launch_latency : float
        Host time to launch one kernel; a layer never runs faster than its launches [s].
    fsdp_keeps_parameters : bool
        Under pipeline parallelism FSDP keeps gathered weights and unreduced gradients between micro-batches.
    framework_bytes : float
        Device memory of context, communicators and workspaces [B].
    selective_recompute : SelectiveRecompute
        What "selective" recomputes: the ``attention_core`` (Megatron), or ``operators``, every second matrix
        product and all element-wise work (torchtitan).
    recomputes_only_needed : bool
        Recompute ends where the backward has all it needs: the last product of a layer and the sum of its parts
        are not repeated (``torch.utils.checkpoint`` without reentry, and what torch.compile makes of it).
    splits_projections : bool
        Queries, keys, values and both halves of a gated MLP are products of their own, whose input gradients are
        summed afterwards; otherwise one product each.
    copies_gathered_sequence : bool
        Gathers and scatters of sequence parallelism split the second dimension of (batch, sequence, hidden): the
        whole tensor is copied once more in each, but where they are pipelined with their products.
    gathers_narrow_operands : bool
        Sequence parallelism gathers inputs and output gradients in the narrow format of the products, where a
        tensor has one scale.
    extra_state_bytes : float
        Further copies held with the optimizer states, sharded like them [B per parameter].
    fragmentation : float
        Allocator reserve over the bytes in use.
    supports : Mapping[str, tuple[int | str | bool, ...]]
        Values of plan fields the software has; fields not named are free.
    precisions : tuple[str, ...]
        Number formats it trains in; empty when not restricted.
    """

    id: str
    evidence: str
    attention_kernel: AttentionKernel = "flash_2"
    attention_efficiency: float = 1.0
    elementwise_factor: float = 1.0
    eager_elementwise_factor: float = 2.7
    cross_entropy_bytes_per_logit: float = 40.0
    logit_memory_bytes: float = 6.0
    gradient_bytes: float = 4.0
    accumulates_bf16_in_fp32: bool = False
    gradient_accumulation_bytes: float = 8.0
    is_gradient_accumulation_fused: bool = True
    tp_overlap: float = 0.0
    async_tp_overlap: float = 0.25
    gradient_reduce_overlap: float = 0.0
    parameter_gather_overlap: float = 0.0
    # NCCL's ring kernels hold 16 to 24 of the 108 or 132 SMs.
    overlap_contention: float = 0.15
    fsdp_contention: float = 0.5
    fsdp_step_latency: float = 1.5e-6
    broadcast_step_latency: float = 0.0
    inter_node_efficiency: float = 0.8
    is_send_blocking: bool = True
    is_receive_blocking: bool = False
    overlaps_interleaved_sends: bool = False
    has_scatter_gather: bool = True
    deduplicates_dispatch: bool = False
    keeps_narrow_operands: bool = False
    keeps_gathered_inputs: bool = False
    repeats_key_value_heads: bool = False
    has_recompute_modules: bool = False
    applies_router_weights_early: bool = False
    # 20 of 132 SMs (DeepSeek-V3 report, arXiv 2412.19437, section 3.2.2).
    expert_overlap_contention: float = 0.15
    fp8_cast_bytes: float = 2.3
    fp8_rowwise_cast_factor: float = 0.0
    # Once per pass, whatever the vocabulary: 40 published rows of the vocabulary-parallel artifact.
    vocab_pass_time: float = 0.4e-3
    fixed_time: float = 0.0
    host_launch_latency: float = 4e-6
    fsdp_keeps_parameters: bool = False
    framework_bytes: float = 2**30
    selective_recompute: SelectiveRecompute = "attention_core"
    recomputes_only_needed: bool = False
    splits_projections: bool = False
    copies_gathered_sequence: bool = False
    gathers_narrow_operands: bool = False
    extra_state_bytes: float = 0.0
    fragmentation: float = 0.0
    supports: Mapping[str, tuple[int | str | bool, ...]] = field(default_factory=dict)
    precisions: tuple[str, ...] = ()


NUMBER_FIELDS = tuple(each.name for each in fields(SoftwareGeneration) if each.type == "float")
"""Fields that are plain numbers, which a calibration may replace."""

# Keys of the YAML files by how they are read; everything else is a plain number.
_SECONDS = (
    "vocab_pass_time",
    "fsdp_step_latency",
    "broadcast_step_latency",
    "fixed_time",
    "host_launch_latency",
)
_FLAGS = tuple(each.name for each in fields(SoftwareGeneration) if each.type == "bool")


# Plan fields whose values are words.
_WORD_FIELDS = (
    "cp_method",
    "optimizer_offload",
    "parameter_offload",
    "recompute",
    "schedule",
    "sharding",
    "vocab_parallel",
)


def list_software() -> tuple[str, ...]:
    """Return the ids of the built-in software generations, sorted."""
    folder = files("meshwright.costmodels") / "software_generations"
    return tuple(
        sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    )


@cache
def load_software(name: str) -> SoftwareGeneration:
    """Return a software generation by id.

    Raises
    ------
    SpecError
        If the name is unknown; names the nearest and all.
    """
    known = list_software()
    if name not in known:
        raise SpecError(
            f"unknown software '{name}'{did_you_mean(name, known) or '.'} Known: {', '.join(known)}."
        )
    entry = files("meshwright.costmodels") / "software_generations" / f"{name}.yaml"
    section = parse_yaml(entry.read_text(encoding="utf-8"), entry.name)
    section.integer("schema_version")
    values: dict[str, object] = {"id": name, "evidence": section.text("evidence")}
    for key in section:
        if key in ("schema_version", "evidence"):
            continue
        if key == "attention_kernel":
            kernel = section.choice(key, ("unfused", "flash_2", "flash_3"))
            values[key] = cast("AttentionKernel", kernel)
        elif key == "selective_recompute":
            values[key] = cast("SelectiveRecompute", section.choice(key, ("attention_core", "operators")))
        elif key in _FLAGS:
            values[key] = section.boolean(key)
        elif key in _SECONDS:
            values[key] = section.quantity(key, "seconds")
        elif key == "supports":
            values[key] = _supports(section.section(key))
        elif key == "precisions":
            values[key] = section.texts(key)
        elif key == "framework_bytes":
            values[key] = section.quantity(key, "bytes")
        elif key in SoftwareGeneration.__slots__:
            values[key] = section.number(key)
    section.close()
    return SoftwareGeneration(**cast("Mapping[str, object]", values))  # type: ignore[arg-type]  # keys checked above


def with_constants(
    software: SoftwareGeneration, constants: Mapping[str, Mapping[str, float]]
) -> SoftwareGeneration:
    """Return the generation with measured constants in place of its own.

    Parameters
    ----------
    software : SoftwareGeneration
        The generation.
    constants : Mapping[str, Mapping[str, float]]
        Values by field, under ``all`` and under the generation's id, which wins.

    Raises
    ------
    SpecError
        If a field is unknown or no plain number.
    """
    values = {**constants.get("all", {}), **constants.get(software.id, {})}
    for name in values:
        if name not in NUMBER_FIELDS:
            raise SpecError(
                f"calibration: software.{software.id}.{name}: unknown constant{did_you_mean(name, NUMBER_FIELDS)}"
            )
    return replace(software, **values) if values else software  # type: ignore[arg-type]  # number fields only


def _supports(section: Section) -> Mapping[str, tuple[int | str | bool, ...]]:
    """Return allowed values by plan field: words, flags, or numbers."""
    allowed: dict[str, tuple[int | str | bool, ...]] = {}
    for key in section:
        if key in ("activation_offload", "sequence_parallel"):
            allowed[key] = (section.boolean(key),)
        elif key in _WORD_FIELDS:
            allowed[key] = section.texts(key)
        else:
            allowed[key] = section.integers(key)
    return allowed
