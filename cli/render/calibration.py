"""Calibrations as tables and as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from meshwright.cli.render.console import make_table, stdout_console
from meshwright.costmodels.calibration_choice import (
    built_in_documents,
    list_calibrations,
    list_engines,
    load_device_calibration,
)
from meshwright.costmodels.calibration_document import CalibrationDocument
from meshwright.costmodels.calibration_reading import check_header, read_calibration
from meshwright.costmodels.operators import (
    OperatorModel,
    RbfResidual,
    Residual,
    StackedResidual,
    TreeResidual,
)
from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.catalog import list_specs, load_gpu
from meshwright.hardware_specs.json_document import read_document
from meshwright.units import format_quantity

if TYPE_CHECKING:
    from meshwright.profiler.fitting.calibrate import CalibrationResult
    from meshwright.profiler.fitting.layers import LayerComparison

__all__ = [
    "calibration_mapping",
    "find_documents",
    "fit_mapping",
    "list_mapping",
    "print_calibration",
    "print_fit",
    "print_list",
]


def find_documents(name: str) -> tuple[CalibrationDocument, ...]:
    """Return the documents of a built-in calibration or of a file, by what exists.

    Raises
    ------
    SpecError
        If there is neither; names the nearest device.
    """
    path = Path(name)
    if path.suffix == ".jsonl":
        raise SpecError(
            f"{name}: is a profile; 'meshwright calibrate {name} --out FILE.json' makes a calibration of it"
        )
    if path.suffix in (".json", ".yaml") or path.is_file():
        section = read_document(path)
        check_header(section)
        return (read_calibration(section, load_gpu(section.text("gpu"))),)
    known = list_calibrations()
    try:
        gpu = load_gpu(name)
    except SpecError:
        raise SpecError(
            f"no device or calibration file '{name}'{did_you_mean(name, list_specs('gpu')) or '.'} "
            f"Built-in calibrations: {', '.join(known)}."
        ) from None
    if gpu.id not in known:
        raise SpecError(f"{gpu.id} has no calibration of its own: {load_device_calibration(gpu).reason}")
    return tuple(
        document
        for engine in (list_engines(gpu.id) or ("",))
        for document in built_in_documents(gpu.id, gpu, engine)
    )


def list_mapping() -> dict[str, object]:
    """Return every built-in calibration with its engines and errors as plain data."""
    return {
        "kind": "calibrations",
        "calibrations": {
            name: {
                "engines": list(list_engines(name)),
                "reason": load_device_calibration(load_gpu(name)).reason,
            }
            for name in list_calibrations()
        },
    }


def print_list() -> None:
    """Print one line per built-in calibration."""
    table = make_table(
        "Built-in calibrations",
        (("device", False), ("kernels", False), ("operators", True), ("median error", True), ("", False)),
    )
    for name in list_calibrations():
        documents = find_documents(name)
        operators = [model for document in documents for model in document.operators.values() if model.error]
        errors = sorted(model.error.mean for model in operators if model.error is not None)
        estimate = next((document.estimate for document in documents if document.estimate), None)
        table.add_row(
            name,
            ", ".join(document.provenance.kernels for document in documents if document.provenance.kernels)
            or "-",
            str(len(operators)) if operators else "-",
            f"{100.0 * errors[len(errors) // 2]:.1f} %" if errors else "-",
            "estimate" if estimate else "",
        )
    stdout_console().print(table)


def calibration_mapping(documents: Sequence[CalibrationDocument]) -> dict[str, object]:
    """Return what documents hold as plain data: errors, intervals, sources; not the fitted numbers."""
    return {"kind": "calibration", "documents": [_document_mapping(document) for document in documents]}


def fit_mapping(result: CalibrationResult) -> dict[str, object]:
    """Return a fit as plain data: its document, what it leaves out, and layers beside the sum of their operators."""
    return {
        **calibration_mapping((result.document,)),
        "left_out": list(result.notes),
        "layers": [
            {
                "step": each.sample.step,
                "precision": each.sample.precision,
                "is_compiled": each.sample.is_compiled,
                "shape": dict(each.sample.shape),
                "measured_seconds": each.sample.seconds,
                "predicted_seconds": each.predicted,
                "error": each.error,
            }
            for each in result.layers
        ],
    }


def _document_mapping(document: CalibrationDocument) -> dict[str, object]:
    return {
        "name": document.name,
        "gpu": document.gpu,
        "estimate": document.estimate,
        "provenance": asdict(document.provenance),
        "operators": {name: _operator_mapping(model) for name, model in document.operators.items()},
        "sustained_clock": dict(document.sustained_clock),
        "memory_stream_efficiency": document.memory_stream_efficiency,
        "attention": {name: asdict(curve) for name, curve in document.attention.items()},
        "attention_backward_efficiency": document.attention_backward_efficiency,
        "collectives": {
            name: {"ranks": list(curve.ranks), "mean_error": curve.error}
            for name, curve in document.collectives.items()
        },
        "software": {name: dict(constants) for name, constants in document.software.items()},
        "sources": dict(document.sources),
    }


def _operator_mapping(model: OperatorModel) -> dict[str, object]:
    return {
        "curve": asdict(model.curve),
        "residual": _residual_name(model),
        "error": None if model.error is None else asdict(model.error),
        "intervals": {name: list(band) for name, band in model.intervals.items()},
        "source": model.source,
    }


def print_calibration(documents: Sequence[CalibrationDocument]) -> None:
    """Print what documents hold: error by operator, collectives, constants, provenance."""
    console = stdout_console()
    for document in documents:
        provenance = document.provenance
        console.print(f"{document.name}: {document.gpu}", style="bold", soft_wrap=True)
        for line in (document.estimate, provenance.kernels, provenance.attribution, provenance.licence):
            if line:
                console.print(f"  {line}", soft_wrap=True)
        for name, sha, rows in provenance.inputs:
            console.print(f"  {name}: {rows:,} rows, sha256 {sha[:12]}", soft_wrap=True)
        _print_operators(console, document.operators)
        _print_constants(console, document)


def print_fit(result: CalibrationResult) -> None:
    """Print a fit: its document, and measured layers beside the sum of their operators."""
    print_calibration((result.document,))
    if result.layers:
        _print_layers(stdout_console(), result.layers)


def _print_layers(console: Console, layers: Sequence[LayerComparison]) -> None:
    headers = (
        ("", False),
        ("format", False),
        ("measured", True),
        ("sum of operators", True),
        ("error", True),
    )
    table = make_table("One layer against the sum of its operators", headers)
    for each in layers:
        sample = each.sample
        table.add_row(
            f"{sample.step}, compiled" if sample.is_compiled else sample.step,
            sample.precision,
            format_quantity(sample.seconds, "seconds"),
            format_quantity(each.predicted, "seconds"),
            f"{100.0 * each.error:+.1f} %",
        )
    console.print(table)


def _print_operators(console: Console, operators: Mapping[str, OperatorModel]) -> None:
    if not operators:
        return
    headers = (
        "operator",
        "shapes",
        "mean error",
        "P95",
        "bias",
        "80 % interval",
        "roofline alone",
        "residual",
    )
    table = make_table("", tuple((header, index not in (0, 7)) for index, header in enumerate(headers)))
    for name, model in operators.items():
        error = model.error
        if error is None:
            table.add_row(name, "-", "-", "-", "-", "-", "-", _residual_name(model))
            continue
        bands = model.intervals.values()
        low, high = min(band[0] for band in bands), max(band[1] for band in bands)
        table.add_row(
            name,
            f"{error.num_points:,}",
            f"{100.0 * error.mean:.1f} %",
            f"{100.0 * error.p95:.1f} %",
            f"{100.0 * error.bias:+.1f} %",
            f"{100.0 * low:+.0f} to {100.0 * high:+.0f} %",
            f"{100.0 * error.roofline:.1f} %",
            _residual_name(model),
        )
    console.print(table)


def _print_constants(console: Console, document: CalibrationDocument) -> None:
    sources = document.sources

    def line(text: str, key: str) -> None:
        console.print(f"  {text}  [{sources.get(key, '')}]", soft_wrap=True)

    for name, clock in document.sustained_clock.items():
        line(f"sustained clock {name}: {clock:.3f} of burst", "sustained_clock")
    if document.memory_stream_efficiency is not None:
        line(f"memory stream: {100.0 * document.memory_stream_efficiency:.0f} % of peak", "memory_stream")
    for name, curve in document.attention.items():
        peak = format_quantity(curve.peak_flops_per_second, "flops_per_second")
        line(f"attention {name}: {peak}, half of it at {curve.half_length:.0f} tokens", "attention")
    if document.attention_backward_efficiency is not None:
        line(
            f"attention backward: {document.attention_backward_efficiency:.2f} of the forward rate",
            "attention",
        )
    for name, collective in document.collectives.items():
        ranks = ", ".join(f"{int(size)}" for size in collective.ranks)
        error = "" if collective.error is None else f", mean error {100.0 * collective.error:.1f} %"
        line(f"{name}: {ranks} ranks{error}", "collectives")
    for generation, constants in document.software.items():
        for name, value in constants.items():
            line(f"software {generation}: {name} = {value:.4g}", "software")


def _residual_name(model: OperatorModel) -> str:
    return "none" if model.residual is None else _described(model.residual)


def _described(residual: Residual) -> str:
    if isinstance(residual, StackedResidual):
        return " and ".join(_described(part) for part in residual.parts)
    if isinstance(residual, RbfResidual):
        return f"{len(residual.weights)} radial basis functions"
    return f"{len(residual.roots)} trees" if isinstance(residual, TreeResidual) else "unknown"
