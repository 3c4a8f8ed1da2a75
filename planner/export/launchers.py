"""The files that start a program: a torchrun script for one node, and a Slurm job that runs it on each."""

from __future__ import annotations

from collections.abc import Iterable

from meshwright.planner.export.base import ExportFile, Launcher
from meshwright.planner.export.rules import server_size
from meshwright.planner.export.scripts import launch_script, slurm_job
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["launch_command", "launch_files"]


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
) -> tuple[ExportFile, ...]:
    """Return ``launch.sh`` and, for Slurm, ``job.sbatch``.

    A plan smaller than a server takes a part of one; any other fills whole servers (a rule of every exporter).

    Parameters
    ----------
    job, plan, launcher : TrainingJob, ParallelPlan, Launcher
        What runs, on how many nodes, started how.
    title : str
        First comment of each file.
    sources, required, words, last_words, checks : Iterable
        As in :func:`meshwright.planner.export.scripts.launch_script`.
    """
    node_size = server_size(job.cluster)
    gpus_per_node = min(node_size, plan.num_gpus)
    num_nodes = plan.num_gpus // gpus_per_node
    script = launch_script(
        title=title,
        sources=sources,
        required=required,
        num_nodes=num_nodes,
        gpus_per_node=gpus_per_node,
        words=words,
        last_words=last_words,
        checks=checks,
    )
    files = [ExportFile("launch.sh", script, is_executable=True)]
    if launcher == "slurm":
        batch = slurm_job(
            title=title,
            name=job.model.name,
            num_nodes=num_nodes,
            gpus_per_node=gpus_per_node,
            owns_nodes=gpus_per_node == node_size,
        )
        files.append(ExportFile("job.sbatch", batch, is_executable=True))
    return tuple(files)


def launch_command(launcher: Launcher, variable: str, example: str) -> str:
    """Return what to type: on every node for torchrun, once for Slurm."""
    return f"{variable}={example} " + ("sbatch job.sbatch" if launcher == "slurm" else "bash launch.sh")
