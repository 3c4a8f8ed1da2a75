"""The calibration file: what was measured on one device, each part optional, JSON or YAML.

``meshwright calibrate`` writes JSON; estimates and the constants no table holds are short YAML files written by
hand. Both are read by :func:`parse_calibration`; :func:`overlay` lays documents over each other, part by part,
so that a file may hold nothing but collectives or nothing but the constants of one software.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from meshwright.costmodels.calibration import AttentionCurve, CollectiveCurve, DeviceCalibration
from meshwright.costmodels.operators import DeviceRates, OperatorModel
from meshwright.errors import CalibrationError
from meshwright.hardware_specs.specs import GpuSpec

__all__ = ["SCHEMA_VERSION", "CalibrationDocument", "Provenance", "device_rates", "overlay"]

SCHEMA_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where the numbers of a document come from.

    Parameters
    ----------
    created_by : str
        Program and version that wrote the file.
    kernels : str
        Software whose kernels were measured, such as ``vllm 0.24.0`` or ``torch 2.13.0``.
    attribution, licence : str
        Whose data, under which licence.
    inputs : tuple[tuple[str, str, int], ...]
        Name, SHA-256 and rows of every measurement file.
    """

    created_by: str = ""
    kernels: str = ""
    attribution: str = ""
    licence: str = ""
    inputs: tuple[tuple[str, str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationDocument:
    """One calibration file; every part may be empty or None.

    Parameters
    ----------
    name : str
        File name without its ending.
    gpu : str
        Device id the numbers were measured on.
    digest : str
        SHA-256 of the text it was read from.
    estimate : str | None
        Why the numbers are not measurements, where they are not.
    sources : Mapping[str, str]
        Source of each hand-written part, by its name.
    """

    name: str
    gpu: str
    digest: str = ""
    estimate: str | None = None
    provenance: Provenance = field(default_factory=Provenance)
    operators: Mapping[str, OperatorModel] = field(default_factory=dict)
    sustained_clock: Mapping[str, float] = field(default_factory=dict)
    memory_stream_efficiency: float | None = None
    attention: Mapping[str, AttentionCurve] = field(default_factory=dict)
    attention_backward_efficiency: float | None = None
    collectives: Mapping[str, CollectiveCurve] = field(default_factory=dict)
    software: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)


def device_rates(gpu: GpuSpec, operator: str, precision: str) -> DeviceRates:
    """Return the data-sheet rates an operator in a number format is priced against.

    Copies to and from the host cross its link, copies between peers theirs; everything else the device's memory.
    """
    bandwidth = gpu.memory_bandwidth_bytes_per_second
    if operator in ("host_to_device", "device_to_host"):
        bandwidth = gpu.host_link.bandwidth_bytes_per_second
    elif operator == "peer_to_peer":
        bandwidth = (gpu.scale_up or gpu.host_link).bandwidth_bytes_per_second
    return DeviceRates(
        peak_flops_per_second=_peak(gpu, precision),
        bandwidth_bytes_per_second=bandwidth,
        num_sms=gpu.num_sms,
        l2_bytes=gpu.l2_bytes,
        is_nominal=gpu.architecture == "cpu",
    )


def _peak(gpu: GpuSpec, precision: str) -> float:
    """Return the peak of a format; one without units of its own runs at fp8's (block formats) or 16 bits'."""
    peaks = gpu.peak_flops_per_second
    names = (precision, "fp8" if "fp8" in precision else "bf16", "bf16", "fp16", "fp32")
    return next(peaks[name] for name in (*names, *peaks) if name in peaks)


def overlay(documents: Sequence[CalibrationDocument], reason: str, *, is_estimate: bool) -> DeviceCalibration:
    """Return what the documents say together; where several hold a part, the last wins.

    Raises
    ------
    CalibrationError
        If a part that every prediction needs is in none of them.
    """
    operators: dict[str, OperatorModel] = {}
    clock: dict[str, float] = {}
    attention: dict[str, AttentionCurve] = {}
    collectives: dict[str, CollectiveCurve] = {}
    software: dict[str, dict[str, float]] = {}
    stream: float | None = None
    backward: float | None = None
    for document in documents:
        operators |= document.operators
        clock |= document.sustained_clock
        attention |= document.attention
        collectives |= document.collectives
        for name, constants in document.software.items():
            software[name] = {**software.get(name, {}), **constants}
        stream = document.memory_stream_efficiency or stream
        backward = document.attention_backward_efficiency or backward
    names = "+".join(dict.fromkeys(document.name for document in documents))
    held: dict[str, object] = {
        "operators.gemm.bf16": operators.get("gemm.bf16"),
        "sustained_clock.bf16": clock.get("bf16"),
        "memory_stream.efficiency": stream,
        "attention.flash_2": attention.get("flash_2"),
        "attention.backward_efficiency": backward,
        **{
            f"collectives.{key}": collectives.get(key)
            for key in ("all_reduce", "all_gather", "reduce_scatter")
        },
    }
    missing = [key for key, value in held.items() if value is None]
    if missing or stream is None or backward is None:
        raise CalibrationError(
            f"calibration {names} lacks {', '.join(missing)}, which every prediction needs"
        )
    return DeviceCalibration(
        id=names,
        digest=hashlib.sha256("".join(document.digest for document in documents).encode()).hexdigest()[:12],
        reason=reason,
        is_estimate=is_estimate,
        operators=operators,
        sustained_clock=clock,
        memory_stream_efficiency=stream,
        attention=attention,
        attention_backward_efficiency=backward,
        collectives=collectives,
        software=software,
    )
