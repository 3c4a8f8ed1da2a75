"""Export to NVIDIA Dynamo: a DynamoGraphDeployment of a frontend and workers, in either version of its API.

Facts from ai-dynamo/dynamo 1.6 (examples/backends/*/deploy and their v1beta1 folders, deploy/operator/api/v1beta1,
components' argument groups): the operator adds the options that join the servers of one worker; workers say what they
do with ``--disaggregation-mode``; the frontend routes by ``--router-mode``.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from meshwright.hardware_specs.spec_writing import dump_yaml
from meshwright.planner.export.base import ExportBundle, ExportFile, raise_reasons
from meshwright.planner.export.kubernetes import (
    FILES_FOLDER,
    IMAGE_VARIABLE,
    apply_file,
    manifest_file,
    placeholder,
    resource_name,
)
from meshwright.planner.export.scripts import label
from meshwright.planner.export.serving_base import pool_title, serving_notes
from meshwright.planner.export.serving_rules import pool_name
from meshwright.planner.export.serving_scripts import MODEL_VARIABLE, pool_script_name, replica_shape
from meshwright.planner.export.sglang import sglang_arguments, sglang_reasons
from meshwright.planner.export.tensorrt_llm import tensorrt_llm_options, tensorrt_llm_reasons
from meshwright.planner.export.vllm import vllm_arguments, vllm_reasons
from meshwright.simcore.domain.serving import ServingJob, ServingPlan, ServingPool

__all__ = ["DynamoExporter", "DynamoV1beta1Exporter"]

_RUNTIME = "1.6"
_REASONS: dict[str, Callable[[ServingJob, ServingPlan], tuple[str, ...]]] = {
    "vllm": vllm_reasons,
    "sglang": sglang_reasons,
    "trtllm": tensorrt_llm_reasons,
}
_ROUTER_MODE = {"round_robin": "round-robin", "least_loaded": "least-loaded", "prefix_aware": "kv"}
_FRONTEND_PORT, _EVENTS_PORT = 8000, 20080
_GPU = "nvidia.com/gpu"
_MANIFEST = "dynamo.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Component:
    """One entry of the graph: pods that run the same command."""

    name: str
    kind: str
    command: tuple[str, ...]
    args: tuple[str, ...]
    num_replicas: int = 1
    num_servers: int = 1
    gpus: int = 0
    reads_files: bool = False


class _Exporter(ABC):
    """What both versions of the API share."""

    target: str
    target_version: str
    expresses: Mapping[str, str] = MappingProxyType(
        {
            "engines": "vllm, sglang, trtllm; each as its own target",
            "replicas": "workers, over several servers where they do not fit one",
            "pools": "aggregated; prefill and decode",
            "router": "round_robin, least_loaded, prefix_aware (with a prefix cache)",
        }
    )

    def unsupported(self, job: ServingJob, plan: ServingPlan) -> tuple[str, ...]:
        """Return every reason why Dynamo cannot run the plan; empty when it can."""
        reasons = list(_REASONS[plan.engine](job, plan))
        vendor = job.cluster.gpu.vendor
        if vendor.lower() != "nvidia":
            reasons.append(f"Dynamo's workers take GPUs of NVIDIA, not of {label(vendor)}.")
        first = plan.pools[0]
        if plan.router == "prefix_aware" and not first.has_prefix_cache:
            reasons.append(
                f"{pool_name(first)}: router 'prefix_aware' needs has_prefix_cache, or use 'least_loaded'."
            )
        return tuple(reasons)

    def export(self, job: ServingJob, plan: ServingPlan) -> ExportBundle:
        """Return the manifest, the engine's files and the script that applies both.

        Raises
        ------
        UnsupportedByTargetError
            If ``unsupported`` is not empty; the message lists every reason.
        """
        raise_reasons(self.target, self.target_version, self.unsupported(job, plan))
        name = resource_name(job.model.name)
        title = f"Meshwright: {label(job.model.name)} on Dynamo {_RUNTIME}, {self.target_version}."
        files = tuple(_option_file(job, plan, pool) for pool in plan.pools) if plan.engine == "trtllm" else ()
        components = (_frontend(plan), *(_worker(job, plan, pool) for pool in plan.pools))
        document = {
            "apiVersion": f"nvidia.com/{self.target_version}",
            "kind": "DynamoGraphDeployment",
            "metadata": {"name": name},
            "spec": {"backendFramework": plan.engine} | self._spec(components, name),
        }
        apply = apply_file(
            title=title,
            name=name,
            manifest=_MANIFEST,
            files=files,
            words=(
                (IMAGE_VARIABLE, f"the image of the Dynamo {_RUNTIME} runtime for {plan.engine}"),
                MODEL_VARIABLE,
            ),
        )
        return ExportBundle(
            target=self.target,
            target_version=self.target_version,
            files=(manifest_file(_MANIFEST, title, [document]), *files, apply),
            launch_command="IMAGE=registry/image:tag MODEL=organization/model bash apply.sh",
            notes=(
                *serving_notes(job, plan, f"the engine in Dynamo's image {_RUNTIME}"),
                "The manifest names no secret and no volume: add those that the checkpoint needs.",
            ),
        )

    @abstractmethod
    def _spec(self, components: tuple[_Component, ...], name: str) -> dict[str, object]:
        """Return the components as the version of the API writes them."""


class DynamoExporter(_Exporter):
    """DynamoGraphDeployment v1alpha1: services by name."""

    target = "dynamo"
    target_version = "v1alpha1"

    def _spec(self, components: tuple[_Component, ...], name: str) -> dict[str, object]:
        services: dict[str, object] = {}
        for component in components:
            is_pool = component.kind in ("prefill", "decode")
            entry: dict[str, object] = {"componentType": "worker" if is_pool else component.kind}
            if is_pool:
                entry["subComponentType"] = component.kind
            entry["replicas"] = component.num_replicas
            if component.num_servers > 1:
                entry["multinode"] = {"nodeCount": component.num_servers}
            if component.gpus:
                entry["resources"] = {"limits": {"gpu": str(component.gpus)}}
            container: dict[str, object] = {
                "image": placeholder(IMAGE_VARIABLE),
                "command": list(component.command),
                "args": list(component.args),
            }
            pod: dict[str, object] = {"mainContainer": container}
            if component.reads_files:
                container["volumeMounts"] = [_files_mount()]
                pod["volumes"] = [_files_volume(name)]
            services[component.name] = entry | {"extraPodSpec": pod}
        return {"services": services}


class DynamoV1beta1Exporter(_Exporter):
    """DynamoGraphDeployment v1beta1: a list of components with pod templates."""

    target = "dynamo-v1beta1"
    target_version = "v1beta1"

    def _spec(self, components: tuple[_Component, ...], name: str) -> dict[str, object]:
        entries = []
        for component in components:
            entry: dict[str, object] = {
                "name": component.name,
                "type": component.kind,
                "replicas": component.num_replicas,
            }
            if component.num_servers > 1:
                entry["multinode"] = {"nodeCount": component.num_servers}
            container: dict[str, object] = {
                "name": "main",
                "image": placeholder(IMAGE_VARIABLE),
                "command": list(component.command),
                "args": list(component.args),
            }
            if component.gpus:
                container["resources"] = {"limits": {_GPU: str(component.gpus)}}
            pod: dict[str, object] = {"containers": [container]}
            if component.reads_files:
                container["volumeMounts"] = [_files_mount()]
                pod["volumes"] = [_files_volume(name)]
            entries.append(entry | {"podTemplate": {"spec": pod}})
        return {"components": entries}


def _files_mount() -> dict[str, object]:
    return {"name": "files", "mountPath": FILES_FOLDER, "readOnly": True}


def _files_volume(name: str) -> dict[str, object]:
    return {"name": "files", "configMap": {"name": f"{name}-files"}}


def _frontend(plan: ServingPlan) -> _Component:
    return _Component(
        name="Frontend",
        kind="frontend",
        command=("python3", "-m", "dynamo.frontend"),
        args=("--http-port", str(_FRONTEND_PORT), "--router-mode", _ROUTER_MODE[plan.router]),
    )


def _worker(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> _Component:
    shape = replica_shape(job, pool)
    return _Component(
        name="worker" if pool.role == "aggregated" else pool.role,
        kind="worker" if pool.role == "aggregated" else pool.role,
        command=("python3", "-m", f"dynamo.{plan.engine}"),
        args=_worker_args(job, plan, pool),
        num_replicas=pool.num_replicas,
        num_servers=shape.num_servers,
        gpus=shape.gpus_per_server,
        reads_files=plan.engine == "trtllm",
    )


def _worker_args(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> tuple[str, ...]:
    model = placeholder(MODEL_VARIABLE[0])
    mode = () if pool.role == "aggregated" else ("--disaggregation-mode", pool.role)
    # The router learns of cached prefixes from those that compute them.
    tells = plan.router == "prefix_aware" and pool.role != "decode"
    if plan.engine == "trtllm":
        options = f"{FILES_FOLDER}/{pool_script_name(pool)}.yaml"
        publishes = ("--publish-kv-events",) if tells else ()
        return ("--model", model, "--extra-engine-args", options, *mode, *publishes)
    events = ("--kv-events-config", json.dumps(_events(plan))) if tells else ()
    if plan.engine == "sglang":
        # Its own options say the role.
        groups = sglang_arguments(job, plan, pool)
        words = tuple(word for group in groups for word in group.argv)
        return ("--model-path", model, "--served-model-name", model, "--host", "0.0.0.0", *words, *events)
    groups = vllm_arguments(job, plan, pool)
    return ("--model", model, *(word for group in groups for word in group.argv), *mode, *events)


def _events(plan: ServingPlan) -> dict[str, object]:
    events: dict[str, object] = {
        "publisher": "zmq",
        "topic": "kv-events",
        "endpoint": f"tcp://*:{_EVENTS_PORT}",
    }
    return events | {"enable_kv_cache_events": True} if plan.engine == "vllm" else events


def _option_file(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> ExportFile:
    title = pool_title(job, plan, pool, "TensorRT-LLM")
    return ExportFile(
        f"{pool_script_name(pool)}.yaml", f"# {title}\n" + dump_yaml(tensorrt_llm_options(job, plan, pool))
    )
