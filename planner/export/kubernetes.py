"""Kubernetes manifests: groups of pods that start together (LeaderWorkerSet), and the script that applies them.

Facts from kubernetes-sigs/lws (api/leaderworkerset/v1, pkg/utils/pod): every container gets LWS_LEADER_ADDRESS,
LWS_GROUP_SIZE and LWS_WORKER_INDEX; the name of a set is a DNS-1035 label and becomes a headless service, so that the
leader of group ``i`` is ``NAME-i.NAME``; leaders carry the label ``leaderworkerset.sigs.k8s.io/worker-index: "0"``.
Files reach the pods in a ConfigMap, which holds 1 MiB (Kubernetes documentation, ConfigMaps).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from meshwright.errors import ExportError
from meshwright.hardware_specs.spec_writing import dump_yaml
from meshwright.planner.export.base import ExportFile
from meshwright.planner.export.scripts import label, required_variables

__all__ = [
    "APPLY_NAME",
    "FILES_FOLDER",
    "IMAGE_VARIABLE",
    "PodGroup",
    "apply_file",
    "gpu_resource",
    "leader_worker_set",
    "manifest_file",
    "placeholder",
    "resource_name",
    "service",
]

APPLY_NAME = "apply.sh"
FILES_FOLDER = "/meshwright"
IMAGE_VARIABLE = "IMAGE"
_API_VERSION = "leaderworkerset.x-k8s.io/v1"
# The controller's pods and revisions append up to 22 characters to a name; labels hold 63.
_LONGEST_NAME = 40
_LARGEST_CONFIG_MAP = 1_000_000
_CREATE_CONFIG_MAP = """
create_config_map() { # name, count of the words that follow, these words, arguments of kubectl apply
  local name="$1" count="$2"
  shift 2
  kubectl create configmap "$name" "${@:1:count}" --dry-run=client --output=yaml |
    kubectl apply "${@:count+1}" --filename=-
}
"""
_GPU_RESOURCES = {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PodGroup:
    """Equal groups of pods, each with a leader.

    Parameters
    ----------
    name : str
        Name of the set, from :func:`resource_name`.
    num_groups, num_pods : int
        Groups, and pods of one group.
    resource : str
        What a GPU is called among a pod's resources.
    gpus_per_pod : int
        GPUs of one pod.
    command : tuple[str, ...]
        What every container runs; ``$(NAME)`` stands for a variable of the container.
    port : int | None
        Where the leader answers once it is ready; None for programs that serve nobody.
    config : str
        What the names of the ConfigMaps start with.
    """

    name: str
    config: str
    num_groups: int
    num_pods: int
    resource: str
    gpus_per_pod: int
    command: tuple[str, ...]
    port: int | None = None


def resource_name(name: str, suffix: str = "") -> str:
    """Return a name for Kubernetes: a DNS label of lower-case letters, digits and dashes that starts with a letter.

    Examples
    --------
    >>> resource_name("Llama-3.1-405B", "decode")
    'meshwright-llama-3-1-405b-decode'
    """
    ending = f"-{suffix}" if suffix else ""
    words = re.sub(r"[^a-z0-9]+", "-", f"meshwright-{label(name).lower()}")
    return words[: _LONGEST_NAME - len(ending)].strip("-") + ending


def gpu_resource(vendor: str) -> str | None:
    """Return what the vendor's device plugin calls a GPU; None for vendors without one we know."""
    return _GPU_RESOURCES.get(vendor.lower())


def placeholder(variable: str) -> str:
    """Return the word that stands in a manifest until ``apply.sh`` puts the user's value of a variable there."""
    return f"MESHWRIGHT_{variable}"


def leader_worker_set(group: PodGroup) -> dict[str, object]:
    """Return the manifest of the groups; all files of the bundle lie in :data:`FILES_FOLDER` of each container."""
    template: dict[str, object] = {
        "size": group.num_pods,
        "restartPolicy": "RecreateGroupOnPodRestart",
    }
    if group.num_pods > 1 and group.port is not None:
        # Only the leader answers, so only it can be asked.
        template["leaderTemplate"] = _pod(group, answers=True)
    answers = group.num_pods == 1 and group.port is not None
    template["workerTemplate"] = _pod(group, answers=answers)
    return {
        "apiVersion": _API_VERSION,
        "kind": "LeaderWorkerSet",
        "metadata": {"name": group.name},
        "spec": {"replicas": group.num_groups, "leaderWorkerTemplate": template},
    }


def service(name: str, selector: Mapping[str, str], port: int) -> dict[str, object]:
    """Return a service in front of pods."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "selector": dict(selector),
            "ports": [{"name": "http", "port": port, "targetPort": port}],
        },
    }


def manifest_file(name: str, title: str, documents: Iterable[Mapping[str, object]]) -> ExportFile:
    """Return documents as one YAML file."""
    head = f"# {title}\n# {APPLY_NAME} fills in what starts with MESHWRIGHT_ and applies it.\n"
    text = "---\n".join(dump_yaml(document) for document in documents)
    # Quoted, so that no value reads as a number.
    return ExportFile(name, head + re.sub(r"MESHWRIGHT_[A-Z_]+$", r'"\g<0>"', text, flags=re.MULTILINE))


def apply_file(
    *,
    title: str,
    name: str,
    manifest: str,
    files: Sequence[ExportFile],
    words: Iterable[tuple[str, str]],
    settings: Iterable[tuple[str, str]] = (),
) -> ExportFile:
    """Return the script that creates the ConfigMaps and applies a manifest.

    Parameters
    ----------
    title : str
        First comment.
    name : str
        Name that the ConfigMaps start with: ``NAME-files`` and ``NAME-settings``.
    manifest : str
        File to apply.
    files : Sequence[ExportFile]
        What travels to the pods.
    words : Iterable[tuple[str, str]]
        Variables that go into the manifest, and what each must name: images, checkpoints.
    settings : Iterable[tuple[str, str]]
        Variables that every container gets, and what each must name.

    Raises
    ------
    ExportError
        If the files are larger than a ConfigMap.
    """
    size = sum(len(file.text.encode()) for file in files)
    if size > _LARGEST_CONFIG_MAP:
        raise ExportError(
            f"the files of this export have {size} bytes, which a ConfigMap of Kubernetes cannot hold; "
            "use --launcher slurm or torchrun"
        )
    words, settings = tuple(words), tuple(settings)
    checks = "\n".join(
        f"""if ! [[ "${variable}" =~ ^[A-Za-z0-9/][A-Za-z0-9._:/@-]*$ ]]; then
  echo "{APPLY_NAME}: {variable} ${variable} holds more than letters, digits and ._:/@-" >&2
  exit 2
fi"""
        for variable, _ in words
    )
    replaced = "\n".join(
        f'MANIFEST="${{MANIFEST//{placeholder(variable)}/${variable}}}"' for variable, _ in words
    )
    from_files = "\n  ".join(f'--from-file="$EXPORT_DIR/{file.name}"' for file in files)
    literals = "\n  ".join(f'--from-literal="{variable}=${variable}"' for variable, _ in settings)
    text = f"""#!/usr/bin/env bash
# {title}
# Run once, where kubectl reaches a cluster with the controller of the manifest; further arguments go to kubectl apply.
# Folders and files that you name are those inside the image.
set -euo pipefail

EXPORT_DIR="$(cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")" && pwd)"

{required_variables((*words, *settings))}

{checks}
"""
    if files or settings:
        text += _CREATE_CONFIG_MAP
    if files:
        text += f"""
FILES=(
  {from_files}
)
create_config_map {name}-files "${{#FILES[@]}}" "${{FILES[@]}}" "$@"
"""
    if settings:
        text += f"""
SETTINGS=(
  {literals}
)
create_config_map {name}-settings "${{#SETTINGS[@]}}" "${{SETTINGS[@]}}" "$@"
"""
    text += f"""
MANIFEST="$(<"$EXPORT_DIR/{manifest}")"
{replaced}
printf '%s\\n' "$MANIFEST" | kubectl apply "$@" --filename=-
"""
    return ExportFile(APPLY_NAME, text, is_executable=True)


def _pod(group: PodGroup, *, answers: bool) -> dict[str, object]:
    container: dict[str, object] = {
        "name": "main",
        "image": placeholder(IMAGE_VARIABLE),
        "command": list(group.command),
        "envFrom": [{"configMapRef": {"name": f"{group.config}-settings"}}],
        "resources": {"limits": {group.resource: str(group.gpus_per_pod)}},
        "volumeMounts": [
            {"name": "files", "mountPath": FILES_FOLDER, "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    if answers:
        container["ports"] = [{"name": "http", "containerPort": group.port}]
        container["readinessProbe"] = {"tcpSocket": {"port": group.port}, "periodSeconds": 10}
    return {
        "spec": {
            "containers": [container],
            "volumes": [
                {"name": "files", "configMap": {"name": f"{group.config}-files"}},
                # NCCL and the workers of an engine exchange data there; the default of 64 MiB is too little.
                {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
            ],
        }
    }
