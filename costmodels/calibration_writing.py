"""Write a calibration as JSON that reads back to the same numbers."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.calibration_document import SCHEMA_VERSION, CalibrationDocument
from meshwright.costmodels.operators import (
    OperatorError,
    OperatorModel,
    RbfResidual,
    Residual,
    StackedResidual,
    TreeResidual,
)
from meshwright.hardware_specs.spec_writing import exact_quantity

__all__ = ["calibration_text"]


def calibration_text(document: CalibrationDocument) -> str:
    """Return the JSON of a document: one key a line, long lists of numbers on one line each.

    Constants keep nine significant digits and long lists seven, far finer than any measurement.
    """
    provenance = document.provenance
    mapping: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "calibration",
        "written_by": "meshwright",
        "gpu": document.gpu,
        **({"estimate": document.estimate} if document.estimate else {}),
        "provenance": {
            "created_by": provenance.created_by,
            "kernels": provenance.kernels,
            "attribution": provenance.attribution,
            "licence": provenance.licence,
            "inputs": [{"name": name, "sha256": sha, "rows": rows} for name, sha, rows in provenance.inputs],
        },
    }
    sources = document.sources
    if document.sustained_clock:
        clock = {key: _rounded(value) for key, value in document.sustained_clock.items()}
        mapping["sustained_clock"] = {**clock, "source": sources["sustained_clock"]}
    if document.memory_stream_efficiency is not None:
        mapping["memory_stream"] = {
            "efficiency": _rounded(document.memory_stream_efficiency),
            "source": sources["memory_stream"],
        }
    if document.attention or document.attention_backward_efficiency is not None:
        mapping["attention"] = _attention_mapping(document)
    if document.collectives:
        mapping["collectives"] = _collectives_mapping(document)
    if document.software:
        mapping["software"] = {
            name: {key: _rounded(value) for key, value in constants.items()}
            for name, constants in document.software.items()
        }
    if document.operators:
        mapping["operators"] = {name: _operator_mapping(model) for name, model in document.operators.items()}
    return _dump(mapping) + "\n"


def _rounded(value: float) -> float:
    return float(f"{value:.9g}")


def _numbers(values: NDArray[np.float64]) -> list[float]:
    """Return fitted numbers with seven digits; whole ones, such as log2 of a power of two, as integers."""
    rounded = (float(f"{value:.7g}") for value in values.ravel().tolist())
    return [int(value) if value.is_integer() else value for value in rounded]


def _attention_mapping(document: CalibrationDocument) -> dict[str, object]:
    mapping: dict[str, object] = {
        name: {
            "peak": exact_quantity(_rounded(curve.peak_flops_per_second), "flops_per_second"),
            "half_length": _rounded(curve.half_length),
        }
        for name, curve in document.attention.items()
    }
    if document.attention_backward_efficiency is not None:
        mapping["backward_efficiency"] = _rounded(document.attention_backward_efficiency)
    return {**mapping, "source": document.sources["attention"]}


def _collectives_mapping(document: CalibrationDocument) -> dict[str, object]:
    mapping: dict[str, object] = {}
    for name, curve in document.collectives.items():
        if curve.link_bandwidth is not None:
            mapping["link"] = exact_quantity(curve.link_bandwidth, "bytes_per_second")
        rows = []
        for index, ranks in enumerate(curve.ranks):
            row: dict[str, object] = {
                "ranks": int(ranks),
                "latency": exact_quantity(_rounded(curve.latency[index]), "seconds"),
                "link_efficiency": _rounded(curve.link_efficiency[index]),
                "exponent": _rounded(curve.exponent[index]),
            }
            if curve.error is not None:
                row["error"] = _rounded(curve.error)
            table = curve.tables[index] if curve.tables else None
            if table is not None:
                row |= {"num_bytes": _numbers(table.num_bytes), "seconds": _numbers(table.seconds)}
            rows.append(row)
        mapping[name] = rows
    return {**mapping, "source": document.sources["collectives"]}


def _operator_mapping(model: OperatorModel) -> dict[str, object]:
    curve = model.curve
    mapping: dict[str, object] = {
        "launch_time": exact_quantity(_rounded(curve.launch_time), "seconds"),
        "compute_efficiency": _rounded(curve.compute_efficiency),
        "memory_efficiency": _rounded(curve.memory_efficiency),
        "exponent": _rounded(curve.exponent),
    }
    if model.parameters:
        mapping["parameters"] = {name: _rounded(value) for name, value in model.parameters.items()}
    if model.intervals:
        mapping["interval"] = {name: [_rounded(x) for x in band] for name, band in model.intervals.items()}
    if model.error is not None:
        mapping["error"] = {
            each.name: _rounded(value)
            if isinstance(value := getattr(model.error, each.name), float)
            else value
            for each in fields(OperatorError)
        }
    mapping["source"] = model.source
    if model.residual is not None and model.box is not None:
        mapping["box"] = _numbers(model.box)
        mapping["residual"] = _residual_mapping(model.residual)
    return mapping


def _residual_mapping(residual: Residual) -> dict[str, object]:
    if isinstance(residual, RbfResidual):
        return {
            "kind": "rbf",
            "offset": _rounded(residual.offset),
            "centres": _numbers(residual.centres),
            "weights": _numbers(residual.weights),
        }
    if isinstance(residual, TreeResidual):
        arrays = {
            "roots": residual.roots.tolist(),
            "feature": residual.feature.tolist(),
            "left": residual.left.tolist(),
            "right": residual.right.tolist(),
            "threshold": _numbers(residual.threshold),
            "value": _numbers(residual.value),
        }
        return {"kind": "trees", "offset": _rounded(residual.offset), **arrays}
    if isinstance(residual, StackedResidual):
        parts = [_residual_mapping(part) for part in residual.parts]
        return {"kind": "stacked", "weights": list(residual.weights), "parts": parts}
    raise TypeError(f"no file form for {type(residual).__name__}")


def _dump(value: object, indent: str = "") -> str:
    """Return JSON with mappings spread over lines and lists of numbers kept on one."""
    inner = indent + "  "
    if isinstance(value, dict):
        if not value:
            return "{}"
        lines = [f"{inner}{json.dumps(key)}: {_dump(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(f"{inner}{_dump(item, inner)}" for item in value) + f"\n{indent}]"
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
