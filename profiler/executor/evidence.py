"""A run as a row of the table of measured runs, which ``validate`` scores and ``calibrate --from runs`` fits to."""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from meshwright.errors import MeshwrightError, SpecError
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.profiler.executor.report import ExecutionReport
from meshwright.profiler.measured_runs import COLUMNS, MeasuredRun, read_measured_runs
from meshwright.profiler.measured_setup import IncompleteRowError, MeasuredSetup, measured_setup
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["append_row", "check_appendable", "measured_row"]

_SOURCE = "meshwright run"


def measured_row(
    job: TrainingJob, plan: ParallelPlan, report: ExecutionReport, identity: str
) -> Mapping[str, str]:
    """Return the row of a run, by column.

    Parameters
    ----------
    job, plan : TrainingJob, ParallelPlan
        What ran.
    report : ExecutionReport
        What it measured; memory of a GPU only, since a process's memory on a host holds the libraries too.
    identity : str
        The row's ``id``.

    Raises
    ------
    SpecError
        If the table's columns cannot say what ran, so that the row would be scored as another run.
    """
    row = {**_described(job, plan), "id": identity, "measured_seconds": f"{report.step_seconds:.6g}"}
    if job.cluster.gpu.architecture != "cpu":
        row |= {
            "measured_memory_gib": f"{report.peak_memory_bytes / 2**30:.4f}",
            "memory_kind": "allocated",
        }
    return row


def check_appendable(path: Path, job: TrainingJob, plan: ParallelPlan) -> None:
    """Raise before a run whose row could not be added to a table afterwards.

    Raises
    ------
    SpecError
        If the file is there and no such table, or the table's columns cannot say what runs.
    """
    _described(job, plan)
    if path.is_symlink():
        raise SpecError(f"{path}: is a symbolic link, which is never followed; name the table itself")
    if path.exists():
        read_measured_runs(path)
    elif not path.parent.is_dir():
        raise SpecError(f"{path}: there is no folder {path.parent}; make it first")


def append_row(path: Path, row: Mapping[str, str]) -> str:
    """Add a row to a table, which is begun where it is missing; return its ``id``, numbered where that is taken.

    Raises
    ------
    SpecError
        If the table lacks a column the row needs, is malformed, or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise SpecError(f"{path}: cannot be written ({error.strerror})") from None
    with open(descriptor, "r+", encoding="utf-8", newline="") as stream:
        # Runs that end at the same time must not share a line.
        fcntl.flock(stream, fcntl.LOCK_EX)
        text = stream.read()
        header, taken = COLUMNS, set[str]()
        if text.strip():
            taken = {run.id for run in read_measured_runs(path)}
            header = next(csv.reader(io.StringIO(text.removeprefix("\ufeff"))))
        missing = [column for column, cell in row.items() if cell and column not in header]
        if missing:
            raise SpecError(f"{path}: the table has no column {', '.join(missing)}; name another file")
        named = {**row, "id": _free_name(row["id"], taken)}
        lines = io.StringIO(newline="")
        writer = csv.DictWriter(
            lines, header, restval="", extrasaction="ignore", lineterminator=_line_end(text)
        )
        if not text.strip():
            writer.writeheader()
        elif not text.endswith("\n"):
            lines.write(_line_end(text))
        writer.writerow(named)
        try:
            stream.write(lines.getvalue())
            stream.flush()
            os.fsync(descriptor)
        except OSError as error:
            raise SpecError(f"{path}: cannot be written ({error.strerror})") from None
    return named["id"]


def _described(job: TrainingJob, plan: ParallelPlan) -> dict[str, str]:
    """Return the columns of what ran, after reading them back as ``validate`` would."""
    row = _columns(job, plan)
    run = MeasuredRun(
        id="run",
        source=_SOURCE,
        quality="ok",
        measured="time",
        measured_seconds=1.0,
        measured_memory_bytes=None,
        cells=row,
    )
    try:
        setup = measured_setup(run)
    except (IncompleteRowError, MeshwrightError) as error:
        raise SpecError(f"this run cannot be a row of the table of measured runs: {error}") from None
    differing = _differences(job, plan, setup)
    if differing:
        raise SpecError(
            "this run cannot be a row of the table of measured runs, which has no columns for its "
            + ", ".join(differing)
        )
    return row


def _columns(job: TrainingJob, plan: ParallelPlan) -> dict[str, str]:
    model, workload, moe = job.model, job.workload, job.model.moe
    cells: dict[str, object] = {
        "source": _SOURCE,
        "source_kind": "measured",
        "quality": "ok",
        "model": model.name,
        "n_layers": model.num_layers,
        "hidden": model.hidden_size,
        "ffn_hidden": model.ffn_hidden_size,
        "gated_mlp": model.is_gated_mlp,
        "n_heads": model.num_attention_heads,
        "n_kv_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "vocab": model.vocab_size,
        "tied_embeddings": model.has_tied_embeddings,
        "n_experts": moe.num_experts if moe else 0,
        "topk": moe.top_k if moe else "",
        "moe_ffn": moe.moe_ffn_hidden_size if moe else "",
        "seq_len": workload.sequence_length,
        "gpu": job.cluster.gpu.id,
        "n_gpus": plan.num_gpus,
        "gpus_per_node": job.cluster.node.num_gpus,
        "tp": plan.tp,
        "pp": plan.pp,
        "vpp": plan.vpp,
        "cp": plan.cp,
        "ep": plan.ep,
        "dp": plan.dp,
        "sharding": plan.sharding,
        "sharding_group": plan.sharding_group or "",
        "sequence_parallel": plan.sequence_parallel,
        "recompute": plan.recompute,
        "micro_batch": plan.micro_batch_size,
        "global_batch": workload.global_batch_size,
        "precision": workload.precision,
        "schedule": plan.schedule,
        "vocab_parallel": plan.vocab_parallel,
        "software": job.software,
        "features": ";".join(job.features),
        "measured": "time",
    }
    return {
        column: ("y" if value else "n") if isinstance(value, bool) else str(value)
        for column, value in cells.items()
    }


def _differences(job: TrainingJob, plan: ParallelPlan, setup: MeasuredSetup) -> list[str]:
    """Return what a reader of the row would take for something else."""
    read_model = replace(
        setup.job.model, name=job.model.name, max_position_embeddings=job.model.max_position_embeddings
    )
    pairs = (
        ("plan", plan, setup.plan),
        ("model", job.model, read_model),
        ("workload", job.workload, setup.job.workload),
    )
    differing = [
        f"{what}.{name}"
        for what, ours, read in pairs
        for name in ours.__dataclass_fields__
        if getattr(ours, name) != getattr(read, name)
    ]
    if _machines(job.cluster, plan) != _machines(setup.job.cluster, plan):
        differing.append("cluster")
    if (job.software, frozenset(job.features)) != (setup.job.software, setup.features):
        differing.append("software")
    return differing


def _machines(cluster: ClusterSpec, plan: ParallelPlan) -> tuple[object, ...]:
    """Return what a prediction reads of the machines a plan occupies."""
    node = cluster.node
    links = (node.intra_link, node.topology, node.num_gpus)
    if plan.num_gpus <= node.num_gpus:
        return cluster.gpu, *links
    return cluster.gpu, *links, node.nic_bandwidth_per_gpu, cluster.fabric.latency


def _free_name(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    number = 2
    while f"{name}-{number}" in taken:
        number += 1
    return f"{name}-{number}"


def _line_end(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"
