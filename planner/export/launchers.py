"""The files that start a program: a torchrun script for one node, and what runs it on each: Slurm, Kubernetes."""

from __future__ import annotations

from collections.abc import Iterable

from meshwright.errors import UnsupportedByTargetError
from meshwright.planner.export.base import ExportFile, Launcher
from meshwright.planner.export.kubernetes import (
    FILES_FOLDER,
    IMAGE_VARIABLE,
    PodGroup,
    apply_file,
    gpu_resource,
    leader_worker_set,
    manifest_file,
    resource_name,
)
from meshwright.planner.export.rank_placement import PLACEMENT_NAME, placed_gpus, placement_files
from meshwright.planner.export.rules import server_size
from meshwright.planner.export.scripts import TORCHRUN, label, launch_script, slurm_job
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["launch_command", "launch_files"]

_LAUNCHED_BY = {"torchrun": "bash launch.sh", "slurm": "sbatch job.sbatch", "kubernetes": "bash apply.sh"}


def launch_files(
    job: TrainingJob,
    plan: ParallelPlan,
    launcher: Launcher,
    *,
    title: str,
    sources: Iterable[str],
    required: Iterable[tuple[str, str]],
    words: Iterable[str],
    last_words: Iterable[str] = (),
    checks: Iterable[str] = (),
    starter: Iterable[str] = TORCHRUN,
    mounted: Iterable[ExportFile] = (),
) -> tuple[ExportFile, ...]:
    """Return ``launch.sh`` and what starts it: ``job.sbatch`` for Slurm, a manifest and ``apply.sh`` for Kubernetes.

    A plan with a device mapping adds ``placement.sh``, which the scripts read, and ``place.sh``.

    A plan smaller than a server takes a part of one; any other fills whole servers (a rule of every exporter).

    Parameters
    ----------
    job, plan, launcher : TrainingJob, ParallelPlan, Launcher
        What runs, on how many nodes, started how.
    title : str
        First comment of each file.
    sources, required, words, last_words, checks, starter : Iterable
        As in :func:`meshwright.planner.export.scripts.launch_script`.
    mounted : Iterable[ExportFile]
        The bundle's other files, which pods need beside the script.

    Raises
    ------
    UnsupportedByTargetError
        If the launcher cannot start the plan on this cluster, or not where its mapping wants it.
    """
    required = tuple(required)
    num_nodes, gpus_per_node = placed_gpus(job, plan)
    is_placed = plan.device_mapping is not None
    placement = placement_files(job, plan) if is_placed else ()
    script = launch_script(
        title=title,
        sources=(*sources, PLACEMENT_NAME) if is_placed else sources,
        required=required,
        num_nodes=num_nodes,
        gpus_per_node=gpus_per_node,
        words=words,
        last_words=last_words,
        checks=checks,
        starter=starter,
        placing='place_gpus "$NODE_RANK"' if is_placed else "",
    )
    files = [*placement, ExportFile("launch.sh", script, is_executable=True)]
    if launcher == "slurm":
        batch = slurm_job(
            title=title,
            name=job.model.name,
            num_nodes=num_nodes,
            gpus_per_node=gpus_per_node,
            owns_nodes=gpus_per_node == server_size(job.cluster),
            placement=PLACEMENT_NAME if is_placed else "",
        )
        files.append(ExportFile("job.sbatch", batch, is_executable=True))
    elif launcher == "kubernetes":
        files += _kubernetes_files(job, plan, title, required, (*mounted, *files))
    return tuple(files)


def _kubernetes_files(
    job: TrainingJob,
    plan: ParallelPlan,
    title: str,
    required: tuple[tuple[str, str], ...],
    files: tuple[ExportFile, ...],
) -> tuple[ExportFile, ExportFile]:
    # A job runs on GPUs of one vendor.
    vendor = job.cluster.gpus[0].vendor
    resource = gpu_resource(vendor)
    if resource is None:
        raise UnsupportedByTargetError(
            f"--launcher kubernetes: what a GPU of {label(vendor)} is called among a pod's resources is not known; "
            "use --launcher slurm or torchrun"
        )
    if plan.device_mapping is not None and any(
        host != node for node, host in enumerate(plan.device_mapping.host_order)
    ):
        raise UnsupportedByTargetError(
            "--launcher kubernetes: its scheduler places the pods, so the host_order of device_mapping cannot be kept; "
            "use --launcher slurm or torchrun"
        )
    if job.cluster.is_mixed:
        raise UnsupportedByTargetError(
            "--launcher kubernetes: its scheduler places the pods, so it cannot be told which of them need which kind of "
            "node of a mixed cluster; use --launcher slurm or torchrun"
        )
    num_nodes, gpus_per_node = placed_gpus(job, plan)
    name = resource_name(job.model.name)
    group = PodGroup(
        name=name,
        config=name,
        num_groups=1,
        num_pods=num_nodes,
        resource=resource,
        gpus_per_pod=gpus_per_node,
        # A container that ends well would be started again; it waits to be deleted instead.
        command=(
            "/usr/bin/env",
            "NODE_RANK=$(LWS_WORKER_INDEX)",
            "MASTER_ADDR=$(LWS_LEADER_ADDRESS)",
            "NNODES=$(LWS_GROUP_SIZE)",
            "bash",
            "-c",
            f"bash {FILES_FOLDER}/launch.sh && exec sleep infinity",
        ),
    )
    manifest = manifest_file("leaderworkerset.yaml", title, [leader_worker_set(group)])
    apply = apply_file(
        title=title,
        name=name,
        manifest=manifest.name,
        files=files,
        words=(
            (IMAGE_VARIABLE, "the container image with the framework and all that the variables below name"),
        ),
        settings=required,
    )
    return manifest, apply


def launch_command(launcher: Launcher, variable: str, example: str) -> str:
    """Return what to type: on every node for torchrun, once for Slurm and Kubernetes."""
    image = f"{IMAGE_VARIABLE}=registry/image:tag " if launcher == "kubernetes" else ""
    return f"{image}{variable}={example} {_LAUNCHED_BY[launcher]}"
