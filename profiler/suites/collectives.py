"""Collectives and sends inside a node, in processes of their own, and across nodes under ``torchrun``.

Message sizes are those of the whole buffer, as nccl-tests counts them. Times are those of the slowest rank, by device
events on GPUs and by the wall clock on a CPU, where waiting for the others is what counts.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.multiprocessing
from torch import distributed

from meshwright.errors import CalibrationError
from meshwright.profiler.device import Device
from meshwright.profiler.failures import Failure
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.suites.base import Case, Suite
from meshwright.profiler.suites.collective_ranks import CollectiveJob, Result, join, measure_jobs, plan_jobs

__all__ = ["SUITE", "follow_collectives", "is_under_torchrun", "run_collectives"]

_NAME = "collectives"
_CPU_RANKS = 2
_MAX_CPU_BYTES = 2.0**24
# Longer than the processes wait for each other.
_PATIENCE_SECONDS = 300.0


class _CollectivesSuite:
    name = _NAME

    def cases(self, device: Device, settings: ProfileSettings) -> Iterator[Case]:
        """Yield what one node measures; :func:`run_collectives` measures it, a case alone cannot."""
        for job in _local_jobs(device, settings):
            yield _case(job)


SUITE: Suite = _CollectivesSuite()


def run_collectives(
    device: Device, settings: ProfileSettings, is_measured: Callable[[Case], bool] = lambda case: False
) -> Iterator[tuple[Case, Result]]:
    """Start a process per device (two on a CPU) and yield each result as it comes; closing it ends them.

    Under ``torchrun`` this process is rank 0 of those that are already there.

    Parameters
    ----------
    device : Device
        Of this node; all of its kind take part.
    settings : ProfileSettings
        Largest message.
    is_measured : Callable[[Case], bool]
        Whether an earlier run has measured a case; on one node it is left out.

    Raises
    ------
    CalibrationError
        If torch has no library for it, or there is only one GPU.
    """
    _require_backend(device)
    if is_under_torchrun():
        yield from _run_under_torchrun(device, settings)
        return
    jobs = _local_jobs(device, settings)
    if not jobs:
        raise CalibrationError("collectives need at least two GPUs; leave out --collectives")
    jobs = tuple(job for job in jobs if not is_measured(_case(job)))
    if not jobs:
        return
    context = torch.multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        size = _num_ranks(device)
        processes = [
            context.Process(
                target=_work,
                args=(rank, size, meeting, jobs, device.is_gpu, sender if rank == 0 else None),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        sender.close()
        try:
            for job in jobs:
                result = _received(receiver)
                yield (
                    _case(job),
                    result or Failure(status="failed", reason="a process of the group has ended"),
                )
                if result is None:
                    return
        finally:
            for process in processes:
                process.terminate()
                process.join()


def is_under_torchrun() -> bool:
    """Return whether ``torchrun`` has started this process."""
    return distributed.is_available() and distributed.is_torchelastic_launched()


def follow_collectives(device: Device, settings: ProfileSettings) -> None:
    """Take part in the collectives that rank 0 measures until it stops.

    What every other process that ``torchrun`` starts calls instead of profiling.
    """
    _require_backend(device)
    hosts = join()
    jobs = plan_jobs(hosts, _max_bytes(device, settings))
    for _ in measure_jobs(jobs, hosts, is_gpu=device.is_gpu):
        pass
    distributed.destroy_process_group()


def _run_under_torchrun(device: Device, settings: ProfileSettings) -> Iterator[tuple[Case, Result]]:
    hosts = join()
    try:
        jobs = plan_jobs(hosts, _max_bytes(device, settings))
        with contextlib.closing(measure_jobs(jobs, hosts, is_gpu=device.is_gpu)) as results:
            for job, result in results:
                yield _case(job), result
    finally:
        distributed.destroy_process_group()


def _work(
    rank: int,
    num_ranks: int,
    meeting: str,
    jobs: tuple[CollectiveJob, ...],
    is_gpu: bool,
    sender: Connection | None,
) -> None:
    """Be one process of a node; rank 0 sends what it measures."""
    hosts = join(rank, num_ranks, meeting)
    for _, result in measure_jobs(jobs, hosts, is_gpu=is_gpu):
        if sender is not None:
            sender.send(result)
    distributed.destroy_process_group()


def _received(receiver: Connection) -> Result | None:
    """Return the next result; None when its sender has ended or is stuck."""
    try:
        received: Result | None = receiver.recv() if receiver.poll(_PATIENCE_SECONDS) else None
    except EOFError:
        return None
    return received


def _local_jobs(device: Device, settings: ProfileSettings) -> tuple[CollectiveJob, ...]:
    return plan_jobs(("here",) * _num_ranks(device), _max_bytes(device, settings))


def _num_ranks(device: Device) -> int:
    return device.num_devices if device.is_gpu else _CPU_RANKS


def _max_bytes(device: Device, settings: ProfileSettings) -> float:
    return min(settings.max_collective_bytes, float("inf") if device.is_gpu else _MAX_CPU_BYTES)


def _require_backend(device: Device) -> None:
    is_there = distributed.is_available() and (
        distributed.is_gloo_available() and (not device.is_gpu or distributed.is_nccl_available())
    )
    if not is_there:
        raise CalibrationError(
            f"torch {torch.__version__} has no {'NCCL' if device.is_gpu else 'gloo'} here; leave collectives out"
        )


def _case(job: CollectiveJob) -> Case:
    """Return the case of a job; what crosses nodes is an operator of its own, which no node's curve is fitted to."""

    def prepare() -> Callable[[], object]:
        raise NotImplementedError("a collective needs its processes")

    sizes = {"ranks": len(job.ranks), "num_bytes": job.num_bytes}
    is_local = job.num_nodes == 1
    return Case(
        suite=_NAME,
        operator=job.collective if is_local else f"{job.collective}_across_nodes",
        precision="fp32",
        shape=sizes if is_local else {**sizes, "num_nodes": job.num_nodes},
        prepare=prepare,
    )
