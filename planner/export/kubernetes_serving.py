"""Export to Kubernetes: every pool a LeaderWorkerSet of vLLM or SGLang replicas, and a router where one is needed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from meshwright.planner.export.base import ExportBundle, ServingExporter, raise_reasons
from meshwright.planner.export.kubernetes import (
    FILES_FOLDER,
    IMAGE_VARIABLE,
    PodGroup,
    apply_file,
    gpu_resource,
    leader_worker_set,
    manifest_file,
    placeholder,
    resource_name,
    service,
)
from meshwright.planner.export.scripts import label
from meshwright.planner.export.serving_base import engine_is
from meshwright.planner.export.serving_scripts import MODEL_VARIABLE, pool_script_name, replica_shape
from meshwright.planner.export.sglang import SglangExporter
from meshwright.planner.export.vllm import VllmExporter
from meshwright.simcore.domain.serving import ServingJob, ServingPlan, ServingPool

__all__ = ["KubernetesServingExporter"]

_ENGINES: dict[str, ServingExporter] = {"vllm": VllmExporter(), "sglang": SglangExporter()}
_PORT, _ROUTER_PORT = 8000, 8080
_BOOTSTRAP_PORT = 8998
_ROUTER_IMAGE = "ROUTER_IMAGE"
_MANIFEST = "leaderworkerset.yaml"


class KubernetesServingExporter:
    """LeaderWorkerSets that run the scripts of the vllm and sglang targets."""

    target = "kubernetes"
    target_version = "leaderworkerset v1"
    expresses: Mapping[str, str] = MappingProxyType(
        {
            "engines": "vllm, sglang; each as its own target",
            "replicas": "groups of pods, one pod per server",
            "pools": "aggregated; prefill and decode",
            "router": "a Deployment of the engine's router, for several replicas or pools",
        }
    )

    def unsupported(self, job: ServingJob, plan: ServingPlan) -> tuple[str, ...]:
        """Return every reason why the plan cannot run on Kubernetes; empty when it can."""
        if plan.engine not in _ENGINES:
            reason = engine_is(plan, *_ENGINES)
            assert reason is not None
            return (f"{reason.removesuffix('.')}; or export it with --to dynamo.",)
        reasons = _ENGINES[plan.engine].unsupported(job, plan)
        vendor = job.cluster.gpu.vendor
        if gpu_resource(vendor) is None:
            reasons = (
                *reasons,
                f"what a GPU of {label(vendor)} is called among a pod's resources is not known.",
            )
        return reasons

    def export(self, job: ServingJob, plan: ServingPlan) -> ExportBundle:
        """Return the engine's scripts, a manifest and the script that applies it.

        Raises
        ------
        UnsupportedByTargetError
            If ``unsupported`` is not empty; the message lists every reason.
        """
        raise_reasons(self.target, self.target_version, self.unsupported(job, plan))
        bundle = _ENGINES[plan.engine].export(job, plan)
        base, title = resource_name(job.model.name), f"Meshwright: {label(job.model.name)} on Kubernetes."
        resource = gpu_resource(job.cluster.gpu.vendor)
        assert resource is not None
        documents = [leader_worker_set(_pod_group(job, pool, base, resource)) for pool in plan.pools]
        has_router = any(file.name == "router.sh" for file in bundle.files)
        words = [(IMAGE_VARIABLE, f"the container image with {bundle.target} {bundle.target_version}")]
        if has_router:
            documents += _router(plan, base)
            words.append((_ROUTER_IMAGE, f"the container image with the router of {bundle.target}"))
        else:
            leaders = {
                "leaderworkerset.sigs.k8s.io/name": _set_name(job.model.name, plan.pools[0]),
                "leaderworkerset.sigs.k8s.io/worker-index": "0",
            }
            documents.append(service(base, leaders, _PORT))
        apply = apply_file(
            title=title,
            name=base,
            manifest=_MANIFEST,
            files=bundle.files,
            words=words,
            settings=(MODEL_VARIABLE,),
        )
        images = " ".join(f"{variable}=registry/image:tag" for variable, _ in words)
        return ExportBundle(
            target=self.target,
            target_version=self.target_version,
            files=(*bundle.files, manifest_file(_MANIFEST, title, documents), apply),
            launch_command=f"{images} MODEL=/path/to/checkpoint bash apply.sh",
            notes=(
                *bundle.notes,
                "Pods take whole GPUs and shared memory; add your fabric's resources, node selectors and volumes with "
                "the checkpoint to the manifest.",
            ),
        )


def _set_name(model: str, pool: ServingPool) -> str:
    return resource_name(model, pool_script_name(pool))


def _pod_group(job: ServingJob, pool: ServingPool, base: str, resource: str) -> PodGroup:
    shape = replica_shape(job, pool)
    settings = [f"PORT={_PORT}"]
    if shape.num_servers > 1:
        settings += ["NODE_RANK=$(LWS_WORKER_INDEX)", "MASTER_ADDR=$(LWS_LEADER_ADDRESS)"]
    if pool.role == "prefill":
        # Every replica has an address of its own, so all use the same port.
        settings.append(f"BOOTSTRAP_PORT={_BOOTSTRAP_PORT}")
    return PodGroup(
        name=_set_name(job.model.name, pool),
        config=base,
        num_groups=pool.num_replicas,
        num_pods=shape.num_servers,
        resource=resource,
        gpus_per_pod=shape.gpus_per_server,
        command=("/usr/bin/env", *settings, "bash", f"{FILES_FOLDER}/{pool_script_name(pool)}.sh"),
        port=_PORT,
    )


def _router(plan: ServingPlan, base: str) -> list[dict[str, object]]:
    variables = {"aggregated": "REPLICA_URLS", "prefill": "PREFILL_URLS", "decode": "DECODE_URLS"}
    name = f"{base}-router"
    labels = {"app": name}
    environment = [
        {"name": variables[pool.role], "value": " ".join(_leader_urls(base, pool))} for pool in plan.pools
    ]
    environment += [
        {"name": "PORT", "value": str(_ROUTER_PORT)},
        {"name": "BOOTSTRAP_PORT", "value": str(_BOOTSTRAP_PORT)},
    ]
    container = {
        "name": "main",
        "image": placeholder(_ROUTER_IMAGE),
        "command": ["bash", f"{FILES_FOLDER}/router.sh"],
        "env": environment,
        "ports": [{"name": "http", "containerPort": _ROUTER_PORT}],
        "readinessProbe": {"tcpSocket": {"port": _ROUTER_PORT}, "periodSeconds": 10},
        "volumeMounts": [{"name": "files", "mountPath": FILES_FOLDER, "readOnly": True}],
    }
    deployment: dict[str, object] = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "containers": [container],
                    "volumes": [{"name": "files", "configMap": {"name": f"{base}-files"}}],
                },
            },
        },
    }
    return [deployment, service(base, labels, _ROUTER_PORT)]


def _leader_urls(base: str, pool: ServingPool) -> list[str]:
    # The set is its own headless service, and its leaders are numbered.
    name = f"{base}-{pool_script_name(pool)}"
    return [f"http://{name}-{index}.{name}:{_PORT}" for index in range(pool.num_replicas)]
