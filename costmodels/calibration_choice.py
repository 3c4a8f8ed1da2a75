"""Which calibration a device gets: its own, that of the same die, or the one that represents its architecture.

Built-in calibrations are files in ``hardware_specs/calibrations``: ``ID.yaml`` holds, by hand, what no operator
table tells (sustained clocks, older attention kernels, fp8 training) or an estimate; ``ID.ENGINE.json`` what
``meshwright calibrate --from aiconfigurator`` fitted to the kernels of a serving engine. The user's files are laid
over them, part by part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from meshwright.costmodels.calibration import AttentionCurve, CalibrationBasis, DeviceCalibration
from meshwright.costmodels.calibration_document import CalibrationDocument, device_rates, overlay
from meshwright.costmodels.calibration_reading import check_header, parse_calibration, read_calibration
from meshwright.costmodels.data_sheet_collectives import data_sheet_collectives
from meshwright.errors import CalibrationError
from meshwright.hardware_specs.catalog import load_gpu
from meshwright.hardware_specs.json_document import read_document
from meshwright.hardware_specs.specs import GpuSpec, NodeSpec
from meshwright.hardware_specs.yaml_document import parse_yaml

__all__ = [
    "built_in_documents",
    "is_calibration_of",
    "list_calibrations",
    "list_engines",
    "load_device_calibration",
    "read_device_calibrations",
]

# A slower power-limited sibling of the same die keeps this share of the clock: the two measured H100 parts
# differ by 0.77 at 500 W against 700 W, which is (5/7) ** 0.78; 0.7 is used for parts never measured.
CLOCK_POWER_EXPONENT = 0.7
# Devices whose collectives were measured over PCIe; the first without the L40S boxes' detour over the host.
_PCIE_DEVICES = ("rtx-pro-6000-server", "l40s", "cpu-host")


@dataclass(frozen=True, slots=True, kw_only=True)
class _BuiltIn:
    """What the hand-written file of a device says of whom it serves."""

    architecture: str
    represents_architecture: bool
    covers: tuple[str, ...]
    estimate: str | None


def list_calibrations() -> tuple[str, ...]:
    """Return the ids of the devices with a built-in calibration, sorted."""
    return tuple(_built_ins())


def built_in_documents(name: str, gpu: GpuSpec, engine: str | None = None) -> tuple[CalibrationDocument, ...]:
    """Return the documents of a built-in calibration, priced against ``gpu``; later ones win.

    Parameters
    ----------
    name : str
        Device id of the calibration.
    gpu : GpuSpec
        The device that uses it.
    engine : str | None
        Serving engine whose kernels run; None for training, which takes of the tables what trains.

    Raises
    ------
    CalibrationError
        If the device has none.
    """
    if name not in _built_ins():
        raise CalibrationError(f"no built-in calibration of {name}; there are {', '.join(_built_ins())}")
    by_hand = _read_built_in(f"{name}.yaml", gpu)
    engines = list_engines(name)
    if not engines:
        return (by_hand,)
    fitted = _read_built_in(f"{name}.{engine if engine in engines else engines[0]}.json", gpu)
    # What stands there by hand was chosen for training, so it wins there and yields to the engine's own kernels.
    return (_for_training(fitted), by_hand) if engine is None else (by_hand, fitted)


def load_device_calibration(
    gpu: GpuSpec, node: NodeSpec | None = None, *, engine: str | None = None
) -> DeviceCalibration:
    """Return the built-in calibration of a device, or the one that represents its architecture.

    Curves of collectives measured over NVLink say nothing about GPUs that meet on PCIe: in such a ``node`` they
    are those of the measured PCIe device.

    Parameters
    ----------
    gpu : GpuSpec
        The device.
    node : NodeSpec | None
        Where it sits.
    engine : str | None
        Serving engine whose kernels run; None for training.

    Raises
    ------
    CalibrationError
        If neither the device nor its architecture has one.
    """
    documents, reason, basis = _documents(gpu, node, engine)
    return _overlaid(documents, reason, basis)


def is_calibration_of(path: Path, gpu: GpuSpec) -> bool:
    """Return whether a calibration file is one of a device.

    Raises
    ------
    SpecError
        If the file is malformed: file, line and key.
    """
    section = read_document(path)
    check_header(section)
    return _names(section.text("gpu"), gpu)


def _names(name: str, gpu: GpuSpec) -> bool:
    return name.lower() in (gpu.id, *(alias.lower() for alias in gpu.aliases))


def read_device_calibrations(
    paths: Sequence[Path], gpu: GpuSpec, node: NodeSpec | None = None
) -> DeviceCalibration:
    """Return the user's calibration of a device, over the built-in one where there is any.

    Parameters
    ----------
    paths : Sequence[Path]
        Calibration files; where several name the device and hold the same part, the last wins.
    gpu : GpuSpec
        The device.
    node : NodeSpec | None
        Where it sits; collectives the files lack are those of its kind of link.

    Raises
    ------
    CalibrationError
        If none of the files is for this device, or parts are missing that nothing built-in supplies.
    SpecError
        If a file is malformed: file, line and key.
    """
    given: list[CalibrationDocument] = []
    named: list[str] = []
    for path in paths:
        section = read_document(path)
        check_header(section)
        named.append(section.text("gpu"))
        if _names(named[-1], gpu):
            given.append(read_calibration(section, gpu, _digest(path)))
    if not given:
        raise CalibrationError(f"no given calibration is for {gpu.id}: the files are for {', '.join(named)}")
    mine = f"given as {' and '.join(str(path) for path in paths)}"
    try:
        documents, reason, basis = _documents(gpu, node)
    except CalibrationError:
        if node is None or any(document.collectives for document in given):
            return overlay(given, mine, is_estimate=False)
        sheet = CalibrationDocument(name="data-sheet", gpu=gpu.id, collectives=data_sheet_collectives(node))
        return overlay((sheet, *given), f"{mine}; collectives of {node.id}'s data sheet", is_estimate=False)
    # What was measured on the device itself is no estimate once its matrix products are.
    if any(
        name in document.operators for document in given for name in ("gemm.bf16", "gemm.fp16", "gemm.fp32")
    ):
        basis = "calibrated"
    return _overlaid((*documents, *given), f"{mine}; what it lacks: {reason}", basis)


def _overlaid(
    documents: Sequence[CalibrationDocument], reason: str, basis: CalibrationBasis
) -> DeviceCalibration:
    return replace(overlay(documents, reason, is_estimate=basis != "calibrated"), basis=basis)


def _documents(
    gpu: GpuSpec, node: NodeSpec | None, engine: str | None = None
) -> tuple[tuple[CalibrationDocument, ...], str, CalibrationBasis]:
    """Return the built-in documents for a device in a node, why these, and what they rest on."""
    lender, is_borrowed, reason = _choose(gpu)
    documents = built_in_documents(lender, gpu, engine)
    if is_borrowed:
        documents = tuple(_carried(document, gpu, load_gpu(lender)) for document in documents)
    basis: CalibrationBasis = "prior of the same generation" if is_borrowed else "calibrated"
    if _built_ins()[lender].estimate is not None:
        basis = "data sheet only"
    if node is not None and node.topology == "pcie" and lender not in _PCIE_DEVICES:
        pcie = load_gpu(_PCIE_DEVICES[0])
        documents += tuple(
            CalibrationDocument(name=each.name, gpu=gpu.id, digest=each.digest, collectives=each.collectives)
            for each in built_in_documents(pcie.id, pcie)
            if each.collectives
        )
        reason = f"{reason}; collectives over PCIe as measured on {pcie.id}"
    return documents, reason, basis


def list_engines(name: str) -> tuple[str, ...]:
    """Return the engines whose kernels a built-in calibration holds."""
    files_of = (entry.name for entry in _folder().iterdir() if entry.name.startswith(f"{name}."))
    return tuple(
        sorted(file.removesuffix(".json").split(".")[1] for file in files_of if file.endswith(".json"))
    )


def _read_built_in(file: str, gpu: GpuSpec) -> CalibrationDocument:
    """Return a built-in document, priced against ``gpu``."""
    document = _parsed(file)
    operators = {
        name: replace(model, rates=device_rates(gpu, model.operator.name, model.precision))
        for name, model in document.operators.items()
    }
    return replace(document, operators=operators)


@cache
def _parsed(file: str) -> CalibrationDocument:
    """Return a built-in document, priced against the device it was measured on, read once per process."""
    text = (_folder() / file).read_text(encoding="utf-8")
    return parse_calibration(text, file, load_gpu(file.split(".", maxsplit=1)[0]))


def _for_training(document: CalibrationDocument) -> CalibrationDocument:
    """Return what training takes of a serving engine's tables: 16-bit products, attention curve, collectives.

    Of the products only the roofline: over the published training runs the residuals of these campaigns add 0.5
    points of error (they sum over twenty products a layer, and their bias stays), where the roofline alone is at
    4.0 %. Eight-bit tables time the engine's quantisation too, which trainers fuse.
    """
    products = {
        name: replace(model, residual=None, box=None)
        for name, model in document.operators.items()
        if name in ("gemm.bf16", "gemm.fp16")
    }
    return replace(document, operators=products)


def _folder() -> Traversable:
    return files("meshwright.hardware_specs") / "calibrations"


@cache
def _built_ins() -> Mapping[str, _BuiltIn]:
    """Return the hand-written part of every built-in calibration by device id, read once per process."""
    found = {}
    for entry in sorted(_folder().iterdir(), key=lambda each: each.name):
        if not entry.name.endswith(".yaml"):
            continue
        section = parse_yaml(entry.read_text(encoding="utf-8"), entry.name)
        found[entry.name.removesuffix(".yaml")] = _BuiltIn(
            architecture=section.text("architecture"),
            represents_architecture=section.boolean("represents_architecture"),
            covers=section.texts("covers"),
            estimate=section.optional_text("estimate"),
        )
    return found


def _choose(gpu: GpuSpec) -> tuple[str, bool, str]:
    """Return the lending device, whether its architecture is all they share, and the reason."""
    built_ins = _built_ins()
    own = built_ins.get(gpu.id)
    if own is not None:
        return gpu.id, False, own.estimate or f"built-in calibration of {gpu.id}"
    for lender, built_in in built_ins.items():
        if gpu.id in built_in.covers:
            reason = f"built-in calibration of {lender}, the same die and power limit as {gpu.id}"
            return lender, False, reason
    for lender, built_in in built_ins.items():
        if built_in.architecture == gpu.architecture and built_in.represents_architecture:
            reason = f"uncalibrated: no calibration of {gpu.id}; borrows that of {lender} ({gpu.architecture}), expect +-20 %"
            return lender, True, reason
    raise CalibrationError(
        f"no calibration for {gpu.id} ({gpu.architecture}), and none represents its architecture; "
        "measure it with 'meshwright profile' and 'meshwright calibrate'"
    )


def _carried(document: CalibrationDocument, gpu: GpuSpec, lender: GpuSpec) -> CalibrationDocument:
    """Scale what depends on power and peak to another part of the same architecture."""
    power_per_peak = (gpu.power_watts / _tensor_peak(gpu)) / (lender.power_watts / _tensor_peak(lender))
    clock = min(1.0, power_per_peak) ** CLOCK_POWER_EXPONENT
    peak = _tensor_peak(gpu) / _tensor_peak(lender)
    return replace(
        document,
        sustained_clock={name: value * clock for name, value in document.sustained_clock.items()},
        attention={
            name: AttentionCurve(
                peak_flops_per_second=curve.peak_flops_per_second * peak, half_length=curve.half_length
            )
            for name, curve in document.attention.items()
        },
    )


def _tensor_peak(gpu: GpuSpec) -> float:
    peaks = gpu.peak_flops_per_second
    return peaks.get("bf16") or peaks["fp16"]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
