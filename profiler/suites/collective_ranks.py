"""What each process of the collectives suite does: plan the same jobs, and measure them in step with the others."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from meshwright.profiler.failures import Failure, describe_failure, expected_errors
from meshwright.profiler.gpu_timing import event_times
from meshwright.profiler.protocol import Timing, timing_of

__all__ = ["COLLECTIVES", "CollectiveJob", "Result", "join", "measure_jobs", "plan_jobs"]

Result = Timing | Failure

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
_ELEMENT_BYTES = 4
_SMALLEST_BYTES = 1024
_SIZE_STEP = 4
_WARM_UP = 3
# A rank that waits this long for another has lost it.
_TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveJob:
    """One collective over one group of ranks with one message size.

    Parameters
    ----------
    collective : str
        One of :data:`COLLECTIVES` or ``send``.
    ranks : tuple[int, ...]
        Global ranks of the group; rank 0 is one of them.
    num_nodes : int
        Nodes they are on.
    num_bytes : int
        Of the whole buffer, a multiple of an element per rank [B].
    """

    collective: str
    ranks: tuple[int, ...]
    num_nodes: int
    num_bytes: int


def plan_jobs(hosts: Sequence[str], max_bytes: float) -> tuple[CollectiveJob, ...]:
    """Return the jobs of a world, smallest group and message first.

    Parameters
    ----------
    hosts : Sequence[str]
        Name of each rank's node.
    max_bytes : float
        Largest message [B].

    Notes
    -----
    Groups are the divisors of the first node's ranks, one rank per node, and all ranks.

    Examples
    --------
    >>> sorted({(len(job.ranks), job.num_nodes) for job in plan_jobs(["a"] * 4 + ["b"] * 4, 2048)})
    [(2, 1), (2, 2), (4, 1), (8, 2)]
    """
    local = [rank for rank, host in enumerate(hosts) if host == hosts[0]]
    leaders = [rank for rank, host in enumerate(hosts) if host not in hosts[:rank]]
    groups = [tuple(local[:size]) for size in range(2, len(local) + 1) if len(local) % size == 0]
    if len(leaders) > 1:
        groups += [tuple(leaders[:2]), tuple(leaders), tuple(range(len(hosts)))]
    jobs = []
    for ranks in dict.fromkeys(groups):
        num_nodes = len({hosts[rank] for rank in ranks})
        names = (*COLLECTIVES, "send") if len(ranks) == 2 else COLLECTIVES
        size = _SMALLEST_BYTES
        while size <= max_bytes:
            unit = _ELEMENT_BYTES * len(ranks)
            jobs += [
                CollectiveJob(
                    collective=name, ranks=ranks, num_nodes=num_nodes, num_bytes=max(1, size // unit) * unit
                )
                for name in names
            ]
            size *= _SIZE_STEP
    return tuple(jobs)


def join(rank: int = -1, world_size: int = -1, init_method: str = "env://") -> tuple[str, ...]:
    """Meet the other processes and return the node of each rank; without arguments as ``torchrun`` arranges it."""
    # Processes agree over gloo, whatever carries the messages: a rank that waits must not keep its GPU busy.
    distributed.init_process_group(
        "gloo", rank=rank, world_size=world_size, init_method=init_method, timeout=_TIMEOUT
    )
    hosts: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(hosts, socket.gethostname())
    return tuple(hosts)


def measure_jobs(
    jobs: Sequence[CollectiveJob], hosts: Sequence[str], *, is_gpu: bool
) -> Generator[tuple[CollectiveJob, Result]]:
    """Yield the result of each job; every rank iterates, rank 0's results count, and closing its generator ends all."""
    rank = distributed.get_rank()
    if is_gpu:
        torch.cuda.set_device(sum(host == hosts[rank] for host in hosts[:rank]))
    else:
        torch.set_num_threads(1)
    groups = {
        ranks: distributed.new_group(list(ranks), backend="nccl" if is_gpu else "gloo", timeout=_TIMEOUT)
        for ranks in dict.fromkeys(job.ranks for job in jobs)
    }
    for job in jobs:
        if not _goes_on(True):
            return
        if rank in job.ranks:
            result = _measured(job, groups[job.ranks], is_gpu=is_gpu)
            try:
                yield job, result
            except GeneratorExit:
                if rank == 0:
                    _goes_on(False)
                raise


def _goes_on(answer: bool) -> bool:
    """Return what rank 0 answers."""
    flag = torch.tensor([int(answer)])
    distributed.broadcast(flag, src=0)
    return bool(flag.item())


def _measured(job: CollectiveJob, group: distributed.ProcessGroup, *, is_gpu: bool) -> Result:
    started = time.perf_counter()
    device = "cuda" if is_gpu else "cpu"
    try:
        operate = _operation(job, group, device)
        calls, num_blocks = _repeats(job.num_bytes, is_gpu=is_gpu)
        flag = torch.zeros(1, device=device)
        for _ in range(_WARM_UP):
            operate()
        seconds = []
        for _ in range(num_blocks):
            distributed.all_reduce(flag, group=group)  # so that all begin together
            seconds.append((_gpu_seconds if is_gpu else _wall_seconds)(operate, calls))
        slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
        distributed.all_reduce(slowest, op=distributed.ReduceOp.MAX, group=group)
    except expected_errors() as error:
        return describe_failure(error)
    # A message there and back is two sends.
    trips = 2.0 if job.collective == "send" else 1.0
    times = [float(each) / calls / trips for each in slowest.tolist()]
    if not statistics.median(times) > 0.0:
        return Failure(status="failed", reason="shorter than the timer can tell")
    return timing_of(times, "eager", time.perf_counter() - started)


def _repeats(num_bytes: int, *, is_gpu: bool) -> tuple[int, int]:
    """Return calls per timed block, and blocks; the same on every rank."""
    calls = 20 if num_bytes <= 2**16 else 5 if num_bytes <= 2**22 else 2 if num_bytes <= 2**26 else 1
    return (calls, 8) if is_gpu else (max(1, calls // 2), 5)


def _gpu_seconds(operate: Callable[[], object], calls: int) -> float:
    def block() -> None:
        for _ in range(calls):
            operate()

    torch.cuda.synchronize()
    return event_times(block, 1, None)[0]


def _wall_seconds(operate: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        operate()
    return time.perf_counter() - begin


def _operation(job: CollectiveJob, group: distributed.ProcessGroup, device: str) -> Callable[[], object]:
    """Return the call of one rank; zeros stay zeros however often they are summed."""
    num_elements = job.num_bytes // _ELEMENT_BYTES
    whole = torch.zeros(num_elements, dtype=torch.float32, device=device)
    part = torch.zeros(num_elements // len(job.ranks), dtype=torch.float32, device=device)
    if job.collective == "all_reduce":
        return lambda: distributed.all_reduce(whole, group=group)
    # Torch 2.13 has renamed these two, and warns of the old names.
    if job.collective == "all_gather":
        gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
        return lambda: gather(whole, part, group=group)
    if job.collective == "reduce_scatter":
        scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
        return lambda: scatter(part, whole, group=group)
    if job.collective == "all_to_all":
        received = torch.empty_like(whole)
        return lambda: distributed.all_to_all_single(received, whole, group=group)
    if job.collective == "broadcast":
        return lambda: distributed.broadcast(whole, src=job.ranks[0], group=group)
    return lambda: _there_and_back(whole, job.ranks, group)


def _there_and_back(message: torch.Tensor, ranks: tuple[int, ...], group: distributed.ProcessGroup) -> None:
    # One direction at a time: blocking sends both ways wait for each other.
    first, second = ranks
    if distributed.get_rank() == first:
        distributed.send(message, dst=second, group=group)
        distributed.recv(message, src=second, group=group)
    else:
        distributed.recv(message, src=first, group=group)
        distributed.send(message, dst=first, group=group)
