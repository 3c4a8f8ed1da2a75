"""Which operator tables the shipped calibrations are fitted to."""

from __future__ import annotations

from pathlib import Path

from meshwright.costmodels.calibration_document import CalibrationDocument
from meshwright.hardware_specs.catalog import load_gpu
from meshwright.profiler.fitting.calibrate import calibrate
from meshwright.profiler.fitting.operator import FitSettings
from meshwright.profiler.importers.aiconfigurator import read_aiconfigurator

__all__ = ["BUILT_IN", "fit_built_in"]

BUILT_IN: tuple[tuple[str, str], ...] = (
    ("a100_sxm", "sglang"),  # four times the shapes of vLLM's A100 tables
    ("b200_sxm", "vllm"),
    ("b300_sxm", "vllm"),
    ("gb200", "vllm"),
    ("gb300", "vllm"),
    ("h100_sxm", "vllm"),
    ("h200_sxm", "vllm"),
    ("l40s", "vllm"),
    ("rtx_pro_6000_server", "vllm"),
)
"""System and engine of each; the file is named ``GPU.ENGINE.json``."""


def fit_built_in(system: str, engine: str, *, root: Path | None = None) -> CalibrationDocument:
    """Return one shipped calibration, fitted anew to the installed tables (or those below ``root``)."""
    measurements = read_aiconfigurator(system, engine, root=root)
    result = calibrate(
        measurements, load_gpu(measurements.gpu), FitSettings(), name=f"{measurements.gpu}.{engine}"
    )
    return result.document
