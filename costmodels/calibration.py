"""What one device achieves: constants measured on it, loaded from a file, with their sources.

Data sheets say what a device could do (:mod:`meshwright.hardware_specs.specs`); a calibration says what
kernels and collectives reach. Devices without a measured calibration borrow the one that represents their
architecture, and the borrowing is said in :attr:`DeviceCalibration.reason`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from meshwright.errors import CalibrationError, SpecError
from meshwright.hardware_specs.specs import GpuSpec, NodeSpec
from meshwright.hardware_specs.yaml_document import Section, parse_yaml, read_yaml

__all__ = [
    "AttentionCurve",
    "CollectiveCurve",
    "DeviceCalibration",
    "GemmCurve",
    "load_device_calibration",
    "read_device_calibrations",
]

# What every prediction looks up; other formats and kernels borrow from these.
_REQUIRED_CURVES: Mapping[str, tuple[str, ...]] = {
    "gemm": ("bf16",),
    "sustained_clock": ("bf16",),
    "attention": ("flash_2",),
    "collectives": ("all_reduce", "all_gather", "reduce_scatter"),
}
# A slower power-limited sibling of the same die keeps this share of the clock: the two measured H100 parts
# differ by 0.77 at 500 W against 700 W, which is (5/7) ** 0.78; 0.7 is used for parts never measured.
CLOCK_POWER_EXPONENT = 0.7
# The device whose collectives were measured over PCIe without NVLink and without the L40S boxes' detour.
_PCIE_DEVICE = "rtx-pro-6000-server"


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmCurve:
    """Smooth four-parameter roofline of matrix multiplications in one number format.

    ``time = launch_time + ((flops / (peak * compute_efficiency)) ** exponent
    + (bytes / (bandwidth * memory_efficiency)) ** exponent) ** (1 / exponent)``.
    """

    launch_time: float
    compute_efficiency: float
    memory_efficiency: float
    exponent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCurve:
    """Fused attention: FLOP/s approach ``peak_flops_per_second`` as sequences pass ``half_length`` tokens."""

    peak_flops_per_second: float
    half_length: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCurve:
    """One collective inside a node by group size: p-norm of a latency and a bandwidth term.

    Parameters
    ----------
    ranks, latency, link_efficiency, exponent : tuple[float, ...]
        One entry per measured group size, ascending; latency [s]; bus bandwidth over link bandwidth.
    """

    ranks: tuple[float, ...]
    latency: tuple[float, ...]
    link_efficiency: tuple[float, ...]
    exponent: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCalibration:
    """Everything operator times need beyond the data sheet.

    Parameters
    ----------
    id : str
        File the constants come from.
    reason : str
        Why this calibration was chosen, one sentence for the user.
    is_estimate : bool
        True when the constants were not measured on this device.
    gemm : Mapping[str, GemmCurve]
        By number format; formats without a curve borrow bf16's.
    sustained_clock : Mapping[str, float]
        Sustained over burst tensor throughput under hours of training, by format (bf16, fp8).
    memory_stream_efficiency : float
        Streaming bandwidth of element-wise kernels over the data sheet's.
    attention : Mapping[str, AttentionCurve]
        By kernel generation (``flash_2``, ``flash_3``).
    attention_backward_efficiency : float
        Backward FLOP/s of fused attention over forward.
    collectives : Mapping[str, CollectiveCurve]
        ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all`` inside one node.
    """

    id: str
    reason: str
    is_estimate: bool
    gemm: Mapping[str, GemmCurve]
    sustained_clock: Mapping[str, float]
    memory_stream_efficiency: float
    attention: Mapping[str, AttentionCurve]
    attention_backward_efficiency: float
    collectives: Mapping[str, CollectiveCurve]

    def gemm_curve(self, precision: str) -> GemmCurve:
        """Return the curve of a number format; formats without one of their own borrow bf16's."""
        return (
            self.gemm.get(precision)
            or self.gemm["fp8" if "fp8" in precision and "fp8" in self.gemm else "bf16"]
        )

    def clock(self, precision: str) -> float:
        """Return sustained over burst tensor throughput for a number format."""
        is_narrow = precision not in ("fp32", "tf32", "fp16", "bf16")
        return self.sustained_clock["fp8" if is_narrow and "fp8" in self.sustained_clock else "bf16"]

    def attention_curve(self, kernel: str) -> AttentionCurve:
        """Return the curve of a fused-attention generation, or of the best older one the device has."""
        return self.attention.get(kernel) or self.attention["flash_2"]


def load_device_calibration(gpu: GpuSpec) -> DeviceCalibration:
    """Return the built-in calibration of a device, or the one that represents its architecture.

    Raises
    ------
    CalibrationError
        If neither the device nor its architecture has one.
    """
    sections = _built_in_sections()
    own = sections.get(gpu.id)
    if own is not None:
        note = own.optional_text("estimate")
        return _read(own, gpu, borrowed=False, reason=note or f"built-in calibration of {gpu.id}")
    for lender, section in sections.items():
        if gpu.id in section.texts("covers"):
            reason = f"built-in calibration of {lender}, the same die and power limit as {gpu.id}"
            return _read(section, gpu, borrowed=False, reason=reason)
    for lender, section in sections.items():
        if section.text("architecture") == gpu.architecture and section.boolean("represents_architecture"):
            reason = (
                f"no calibration of {gpu.id}; borrows that of {lender} ({gpu.architecture}), expect +-20 %"
            )
            return _read(section, gpu, borrowed=True, reason=reason)
    raise CalibrationError(
        f"no calibration for {gpu.id} ({gpu.architecture}), and none represents its architecture"
    )


def on_node(calibration: DeviceCalibration, node: NodeSpec) -> DeviceCalibration:
    """Return the calibration with collectives of the node's own kind of link.

    Curves measured over NVLink say nothing about GPUs that meet on PCIe; those take the curves of the measured
    PCIe device.
    """
    if node.topology != "pcie" or _PCIE_DEVICE in calibration.id or calibration.id == "l40s":
        return calibration
    lender = _built_in_sections()[_PCIE_DEVICE]
    return replace(
        calibration,
        collectives=_collective_curves(lender.section("collectives")),
        reason=f"{calibration.reason}; collectives over PCIe as measured on {_PCIE_DEVICE}",
    )


def read_device_calibrations(paths: Sequence[Path], gpu: GpuSpec) -> DeviceCalibration:
    """Return the calibration of a device from the user's files.

    Parameters
    ----------
    paths : Sequence[Path]
        Calibration files in the form of the built-in ones; the last that names the device wins.
    gpu : GpuSpec
        The device.

    Raises
    ------
    CalibrationError
        If none of the files is for this device.
    SpecError
        If a file is malformed: file, line and key.
    """
    found: DeviceCalibration | None = None
    named = []
    for path in paths:
        section = read_yaml(path)
        named.append(section.text("gpu"))
        if section.text("gpu").lower() in (gpu.id, *(alias.lower() for alias in gpu.aliases)):
            found = _read(section, gpu, borrowed=False, reason=f"given as {path}")
            section.close()
    if found is None:
        raise CalibrationError(f"no given calibration is for {gpu.id}: the files are for {', '.join(named)}")
    return found


@cache
def _built_in_sections() -> Mapping[str, Section]:
    """Return every built-in calibration file by device id, parsed once per process."""
    entries = (files("meshwright.hardware_specs") / "calibrations").iterdir()
    named = {entry.name.removesuffix(".yaml"): entry for entry in entries if entry.name.endswith(".yaml")}
    return {
        name: parse_yaml(named[name].read_text(encoding="utf-8"), f"{name}.yaml") for name in sorted(named)
    }


def _read(section: Section, gpu: GpuSpec, *, borrowed: bool, reason: str) -> DeviceCalibration:
    if section.integer("schema_version") != 1:
        raise section.error("schema_version", "this release reads version 1")
    lender = section.text("gpu")
    section.text("architecture")
    section.boolean("represents_architecture")
    section.texts("covers")
    note = section.optional_text("estimate")
    for key, names in _REQUIRED_CURVES.items():
        for name in names:
            if not section.section(key).has(name):
                raise section.section(key).error(name, "is required but missing")
    gemm_section = section.section("gemm")
    gemm = {name: _gemm_curve(gemm_section.section(name)) for name in gemm_section}
    clock_section = section.section("sustained_clock")
    clock_section.text("source")
    scale = _clock_scale(gpu, lender) if borrowed else 1.0
    clock = {name: _positive(clock_section, name) * scale for name in clock_section if name != "source"}
    stream = section.section("memory_stream")
    stream.text("source")
    attention_section = section.section("attention")
    attention_section.text("source")
    attention = {
        name: AttentionCurve(
            peak_flops_per_second=attention_section.section(name).quantity("peak", "flops_per_second")
            * (_peak_scale(gpu, lender) if borrowed else 1.0),
            half_length=_positive(attention_section.section(name), "half_length"),
        )
        for name in attention_section
        if name.startswith("flash")
    }
    return DeviceCalibration(
        id=section.file.removesuffix(".yaml"),
        reason=reason,
        is_estimate=borrowed or note is not None,
        gemm=gemm,
        sustained_clock=clock,
        memory_stream_efficiency=_positive(stream, "efficiency"),
        attention=attention,
        attention_backward_efficiency=_positive(attention_section, "backward_efficiency"),
        collectives=_collective_curves(section.section("collectives")),
    )


def _positive(section: Section, key: str) -> float:
    value = section.number(key)
    if value <= 0.0:
        raise section.error(key, f"must be above zero, not {value}")
    return value


def _gemm_curve(section: Section) -> GemmCurve:
    section.text("source")
    return GemmCurve(
        launch_time=section.quantity("launch_time", "seconds"),
        compute_efficiency=_positive(section, "compute_efficiency"),
        memory_efficiency=_positive(section, "memory_efficiency"),
        exponent=_positive(section, "exponent"),
    )


def _collective_curves(section: Section) -> Mapping[str, CollectiveCurve]:
    section.text("source")
    return {name: _collective_curve(section, name) for name in section if name != "source"}


def _collective_curve(section: Section, name: str) -> CollectiveCurve:
    rows = section.sections(name)
    if not rows:
        raise SpecError(f"{section.file}: collectives.{name} has no measured group size")
    ranks = [row.integer("ranks", minimum=2) for row in rows]
    if ranks != sorted(set(ranks)):
        raise section.error(name, "list the measured group sizes in ascending order, each once")
    return CollectiveCurve(
        ranks=tuple(float(size) for size in ranks),
        latency=tuple(row.quantity("latency", "seconds") for row in rows),
        link_efficiency=tuple(_positive(row, "link_efficiency") for row in rows),
        exponent=tuple(_positive(row, "exponent") for row in rows),
    )


def _clock_scale(gpu: GpuSpec, lender: str) -> float:
    """Scale the lender's sustained clock to a part with another power limit for the same peak."""
    from meshwright.hardware_specs.catalog import load_gpu

    other = load_gpu(lender)
    power_per_peak = (gpu.power_watts / _tensor_peak(gpu)) / (other.power_watts / _tensor_peak(other))
    return float(min(1.0, power_per_peak) ** CLOCK_POWER_EXPONENT)


def _peak_scale(gpu: GpuSpec, lender: str) -> float:
    from meshwright.hardware_specs.catalog import load_gpu

    return _tensor_peak(gpu) / _tensor_peak(load_gpu(lender))


def _tensor_peak(gpu: GpuSpec) -> float:
    peaks = gpu.peak_flops_per_second
    return peaks.get("bf16") or peaks["fp16"]
