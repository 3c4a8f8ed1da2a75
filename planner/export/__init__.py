"""Exporters: one per framework, each turning a plan into files and a launch line, or into reasons why not."""

from __future__ import annotations

from meshwright.planner.export.base import ExportBundle, Exporter, ExportFile, Launcher
from meshwright.planner.export.deepspeed import DeepSpeedExporter
from meshwright.planner.export.megatron import MegatronExporter
from meshwright.planner.export.torchtitan import Torchtitan02Exporter, TorchtitanExporter
from meshwright.planner.export.writer import MANIFEST_NAME, write_bundle

__all__ = [
    "EXPORTERS",
    "MANIFEST_NAME",
    "DeepSpeedExporter",
    "ExportBundle",
    "ExportFile",
    "Exporter",
    "Launcher",
    "MegatronExporter",
    "Torchtitan02Exporter",
    "TorchtitanExporter",
    "write_bundle",
]

EXPORTERS: dict[str, Exporter] = {
    "deepspeed": DeepSpeedExporter(),
    "megatron": MegatronExporter(),
    "torchtitan": TorchtitanExporter(),
    "torchtitan-0.2": Torchtitan02Exporter(),
}
