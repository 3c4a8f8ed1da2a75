"""What every cost function of one job shares: model, machines, workload, calibration, software."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from meshwright.costmodels.calibration import DeviceCalibration
from meshwright.costmodels.calibration_choice import (
    is_calibration_of,
    load_device_calibration,
    read_device_calibrations,
)
from meshwright.costmodels.collectives import GroupPlacement
from meshwright.costmodels.plan_columns import FloatColumn
from meshwright.costmodels.rank_layout import ConsecutiveRanks, RankLayout
from meshwright.costmodels.software import AttentionKernel, SoftwareGeneration, load_software, with_constants
from meshwright.errors import SpecError
from meshwright.hardware_specs.specs import ClusterSpec, GpuSpec
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.workload import TrainingWorkload

__all__ = ["KNOWN_FEATURES", "CostContext", "cost_context"]

KNOWN_FEATURES = frozenset(
    {
        "eager",
        "compile",
        "async_tp",
        "bf16_moments",
        "deepep",
        "fp8_activations",
        "float8_linear",
        "float8_rowwise",
        "no_overlap",
        "tp_overlap",
        "overlap_grad_reduce",
        "overlap_param_gather",
    }
)

# Bytes per element of narrow formats: one scale per tensor or per 128 elements is nothing, MX has a byte per 32
# (OCP Microscaling 1.0), NVFP4 a byte per 16.
_OPERAND_BYTES = {"fp8": 1.0, "fp8_block": 1.0, "mxfp8": 1.0 + 1.0 / 32.0, "nvfp4": 0.5 + 1.0 / 16.0}
_INFERENCE_PRECISIONS = ("int8", "int4_wo")


@dataclass(frozen=True, slots=True, kw_only=True)
class CostContext:
    """The fixed side of a cost evaluation; plans are the varying side.

    Parameters
    ----------
    features : frozenset[str]
        Software switches of this run beyond its generation's defaults (``eager``, ``async_tp``, ...).
    attention_kernel : AttentionKernel
        Kernel generation in use, the software's default unless the run says otherwise.
    kinds : tuple[CostContext, ...]
        On a mixed cluster the context of each of its kinds of node, in the order of ``cluster.kinds``; empty on others.
        ``calibration`` and ``software`` are then those of the first, and :attr:`gpu` refuses: formulas take the
        context of one kind.
    layout : RankLayout | None
        Where ranks sit; None fills equal nodes in order.
    """

    model: ModelSpec
    cluster: ClusterSpec
    workload: TrainingWorkload
    software: SoftwareGeneration
    calibration: DeviceCalibration
    attention_kernel: AttentionKernel
    features: frozenset[str] = field(default_factory=frozenset)
    kinds: tuple[CostContext, ...] = ()
    layout: RankLayout | None = None

    @property
    def gpu(self) -> GpuSpec:
        """The accelerator."""
        return self.cluster.gpu

    @property
    def ranks(self) -> RankLayout:
        """Where ranks sit."""
        return self.layout or ConsecutiveRanks(gpus_per_node=self.cluster.node.num_gpus)

    def place_group(self, size: FloatColumn, stride: FloatColumn) -> GroupPlacement:
        """Return where the worst placed group of ``size`` ranks, ``stride`` apart in their order, sits."""
        return self.ranks.place(size, stride)

    @property
    def calibration_identity(self) -> Mapping[str, str]:
        """Which calibration documents, their hash and why these; of a mixed cluster those of each kind."""
        if not self.kinds:
            return self.calibration.identity
        own = [(kind.gpu.id, kind.calibration.identity) for kind in self.kinds]
        return {key: "; ".join(f"{gpu}: {identity[key]}" for gpu, identity in own) for key in own[0][1]}

    @property
    def calibration_text(self) -> str:
        """Which calibration and why, for the user; of a mixed cluster that of each kind."""
        parts = [f"{each.calibration.id} ({each.calibration.reason})" for each in self.kinds or (self,)]
        return (
            "; ".join(f"{kind.gpu.id}: {part}" for kind, part in zip(self.kinds, parts, strict=True))
            if self.kinds
            else parts[0]
        )

    @property
    def element_bytes(self) -> float:
        """Width of activations and messages [B]: 16 bits in every mixed precision."""
        return 4.0 if self.workload.precision in ("fp32", "tf32") else 2.0

    @property
    def operand_bytes(self) -> float:
        """Width of the operands of matrix products, block scales included [B]."""
        return _OPERAND_BYTES.get(self.workload.precision, self.element_bytes)

    @property
    def kept_input_bytes(self) -> float:
        """Width of what linear layers keep of their inputs for their backward [B]."""
        return self.operand_bytes if self.software.keeps_narrow_operands else self.element_bytes

    @property
    def kept_pre_activation_bytes(self) -> float:
        """Width of what an activation function keeps of its input for its backward [B]."""
        return 1.0 if "fp8_activations" in self.features else self.element_bytes

    @property
    def kept_attention_bytes(self) -> float:
        """Width in which attention's output is kept [B]: E5M6 beside 8-bit activations (DeepSeek-V3 report, 3.3.3)."""
        return 1.5 if "fp8_activations" in self.features else self.element_bytes

    @property
    def adam_state_bytes(self) -> float:
        """Width of an fp32 master weight and Adam's two moments together [B per parameter]."""
        return 8.0 if "bf16_moments" in self.features else 12.0

    @property
    def narrow_copy_bytes(self) -> float:
        """Copies of the weights in the format of the products that are kept beside the 16-bit ones [B per parameter]."""
        is_kept = self.software.keeps_narrow_operands and self.operand_bytes < self.element_bytes
        return self.operand_bytes if is_kept else 0.0

    @property
    def gathered_bytes(self) -> float:
        """Width of what sequence parallelism gathers before linear layers [B]."""
        is_narrow = self.software.gathers_narrow_operands and not self.scales_by_row
        return self.operand_bytes if is_narrow else self.element_bytes

    @property
    def scales_by_row(self) -> bool:
        """Whether fp8 operands have one scale per row, in place of one per tensor."""
        return "float8_rowwise" in self.features

    @property
    def cast_bytes(self) -> float:
        """Traffic of quantising one element of an operand to a narrow format [B]."""
        software = self.software
        return software.fp8_cast_bytes * (software.fp8_rowwise_cast_factor if self.scales_by_row else 1.0)

    @property
    def is_lora(self) -> bool:
        """Whether the weights are frozen and low-rank adapters are trained beside them."""
        return self.workload.lora_rank is not None

    @property
    def deduplicates_dispatch(self) -> bool:
        """Whether a token travels once to each node that holds experts of its own, not once per expert."""
        return self.software.deduplicates_dispatch or "deepep" in self.features

    @property
    def gradient_bytes(self) -> float:
        """Width of the main gradient buffer [B per parameter]."""
        return 4.0 if self._accumulates_in_fp32 else self.software.gradient_bytes

    @property
    def gradient_accumulation_bytes(self) -> float:
        """Traffic of adding one micro-batch's gradient to the buffer [B per parameter]."""
        software = self.software
        # An fp32 buffer is read and written at its own width.
        widening = 2.0 * (self.gradient_bytes - software.gradient_bytes)
        return software.gradient_accumulation_bytes + widening

    @property
    def _accumulates_in_fp32(self) -> bool:
        return self.software.accumulates_bf16_in_fp32 and self.workload.precision != "fp16"

    @property
    def compute_precision(self) -> str:
        """Number format of attention and LM head: 16 bits even when the linear layers run in fp8."""
        precision = self.workload.precision
        if precision in ("fp32", "tf32", "fp16", "bf16"):
            return precision
        return "bf16"


def cost_context(
    job: TrainingJob,
    *,
    features: frozenset[str] = frozenset(),
    attention_kernel: AttentionKernel | None = None,
    calibration_paths: Sequence[Path] = (),
) -> CostContext:
    """Return the context of a job, with its software generation and device calibration loaded.

    Parameters
    ----------
    job : TrainingJob
        The job.
    features : frozenset[str]
        Software switches beyond the generation's defaults and those the job names.
    attention_kernel : AttentionKernel | None
        Another attention kernel than the generation's.
    calibration_paths : Sequence[Path]
        The user's calibration files; the built-in calibration without any.

    Raises
    ------
    SpecError
        If the software is unknown or lacks a feature, the device lacks the precision or the model has linear attention.
    CalibrationError
        If the device has no calibration.
    """
    if job.cluster.is_mixed:
        own = [
            tuple(path for path in calibration_paths if is_calibration_of(path, kind.gpu))
            for kind in job.cluster.kinds
        ]
        kinds = tuple(
            cost_context(
                replace(job, cluster=job.cluster.seen_as(kind)),
                features=features,
                attention_kernel=attention_kernel,
                # Files of no kind at all are refused like those of another device.
                calibration_paths=paths if any(own) else calibration_paths,
            )
            for kind, paths in zip(job.cluster.kinds, own, strict=True)
        )
        return replace(kinds[0], cluster=job.cluster, kinds=kinds)
    job.cluster.gpu.peak(job.workload.precision)
    if job.workload.precision in _INFERENCE_PRECISIONS:
        raise SpecError(
            f"precision {job.workload.precision} does not train; use bf16, fp16, fp8 or another of the floats"
        )
    if job.model.linear_attention is not None:
        raise SpecError(
            f"model {job.model.name}: no cost model of training prices linear attention; it can be served only"
        )
    gpu, node = job.cluster.gpu, job.cluster.node
    calibration = (
        read_device_calibrations(calibration_paths, gpu, node)
        if calibration_paths
        else load_device_calibration(gpu, node)
    )
    software = with_constants(load_software(job.software), calibration.software)
    features = features | frozenset(job.features)
    _check_row_scales(job, software, features)
    return CostContext(
        model=job.model,
        cluster=job.cluster,
        workload=job.workload,
        software=software,
        calibration=calibration,
        attention_kernel=attention_kernel or _default_kernel(job, software),
        features=features,
    )


def _check_row_scales(job: TrainingJob, software: SoftwareGeneration, features: frozenset[str]) -> None:
    """Refuse one scale per row where no products are fp8, or where the software has no such recipe."""
    if "float8_rowwise" not in features:
        return
    if job.workload.precision != "fp8":
        raise SpecError(
            f"feature float8_rowwise needs precision fp8, not {job.workload.precision}; leave it out"
        )
    if not software.fp8_rowwise_cast_factor:
        raise SpecError(
            f"software {software.id} has no fp8 with one scale per row; leave the feature float8_rowwise out "
            "or use software torchtitan"
        )


def _default_kernel(job: TrainingJob, software: SoftwareGeneration) -> AttentionKernel:
    """Return the software's kernel; fused attention exists for 16-bit inputs only."""
    return "unfused" if job.workload.precision in ("fp32", "tf32") else software.attention_kernel
