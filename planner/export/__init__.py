"""Exporters: one per framework or engine, each turning a plan into files and a launch line, or into reasons why not."""

from __future__ import annotations

from meshwright.planner.export.accelerate import AccelerateExporter
from meshwright.planner.export.base import (
    LAUNCHERS,
    ExportBundle,
    Exporter,
    ExportFile,
    Launcher,
    ServingExporter,
)
from meshwright.planner.export.deepspeed import DeepSpeedExporter
from meshwright.planner.export.dynamo import DynamoExporter, DynamoV1beta1Exporter
from meshwright.planner.export.kubernetes_serving import KubernetesServingExporter
from meshwright.planner.export.megatron import MegatronExporter
from meshwright.planner.export.megatron_bridge import MegatronBridgeExporter
from meshwright.planner.export.sglang import SglangExporter
from meshwright.planner.export.tensorrt_llm import TensorrtLlmExporter
from meshwright.planner.export.torchtitan import Torchtitan02Exporter, TorchtitanExporter
from meshwright.planner.export.vllm import VllmExporter
from meshwright.planner.export.writer import MANIFEST_NAME, write_bundle

__all__ = [
    "EXPORTERS",
    "LAUNCHERS",
    "MANIFEST_NAME",
    "SERVING_EXPORTERS",
    "AccelerateExporter",
    "DeepSpeedExporter",
    "DynamoExporter",
    "DynamoV1beta1Exporter",
    "ExportBundle",
    "ExportFile",
    "Exporter",
    "KubernetesServingExporter",
    "Launcher",
    "MegatronBridgeExporter",
    "MegatronExporter",
    "ServingExporter",
    "SglangExporter",
    "TensorrtLlmExporter",
    "Torchtitan02Exporter",
    "TorchtitanExporter",
    "VllmExporter",
    "write_bundle",
]

EXPORTERS: dict[str, Exporter] = {
    "accelerate": AccelerateExporter(),
    "deepspeed": DeepSpeedExporter(),
    "megatron": MegatronExporter(),
    "megatron-bridge": MegatronBridgeExporter(),
    "torchtitan": TorchtitanExporter(),
    "torchtitan-0.2": Torchtitan02Exporter(),
}

#: Those of serving plans; a target is in one of the two tables.
SERVING_EXPORTERS: dict[str, ServingExporter] = {
    "dynamo": DynamoExporter(),
    "dynamo-v1beta1": DynamoV1beta1Exporter(),
    "kubernetes": KubernetesServingExporter(),
    "sglang": SglangExporter(),
    "tensorrt-llm": TensorrtLlmExporter(),
    "vllm": VllmExporter(),
}
