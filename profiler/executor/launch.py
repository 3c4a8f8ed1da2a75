"""Start the workers of a plan: on this machine, or as the rank that a launcher has made this process."""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshwright.errors import CalibrationError, ExecutionError, SpecError
from meshwright.profiler.executor.local_tensors import local_tensors
from meshwright.profiler.executor.pipeline_order import PipelineOrder
from meshwright.profiler.executor.report import (
    ExecutionReport,
    log_path,
    now_path,
    read_reports,
    report_path,
)
from meshwright.profiler.executor.supervise import Patience, Progress, WorkerCommand, supervise
from meshwright.simcore.domain.execution import Execution, ExecutionDevice

__all__ = [
    "EXECUTION_FILE",
    "KEEPS_PAGES",
    "LauncherRank",
    "check_devices",
    "check_host_memory",
    "launcher_rank",
    "local_commands",
    "multi_node_commands",
    "run_as_rank",
    "run_here",
    "shell_line",
]

EXECUTION_FILE = "execution.json"
#: glibc (mallopt(3)): what a tensor leaves stays with the process, which else faults the pages of every one in again:
#: 5 to 13 % of a step's CPU time for tensors of some MiB.
KEEPS_PAGES: Mapping[str, str] = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
_WORKER = "meshwright.profiler.executor.worker"
# Every process imports torch (a third of a GiB); more than this on one machine is a slip, or belongs on several.
_MAX_CPU_PROCESSES = 64
# Of a parameter, in single precision [B].
_GRADIENT_BYTES, _MOMENTS_BYTES = 4.0, 8.0
_PORT = 29500
# Reports of other nodes reach a shared folder with a delay [s].
_SHARED_FOLDER_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherRank:
    """What ``torchrun`` says of this process."""

    rank: int
    world_size: int
    local_rank: int


def launcher_rank(environment: Mapping[str, str] | None = None) -> LauncherRank | None:
    """Return which rank of a launcher this process is, None when it was started by itself.

    Raises
    ------
    SpecError
        If the variables are there in part or are no numbers.
    """
    environment = os.environ if environment is None else environment
    if "RANK" not in environment:
        return None
    found = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        text = environment.get(name, "")
        if not text.isdecimal() or len(text) > 9:
            raise SpecError(
                f"RANK is set, as torchrun sets it, but {name} is '{text[:40]}'; start this under torchrun, or unset RANK"
            )
        found.append(int(text))
    if not environment.get("MASTER_ADDR"):
        raise SpecError(
            "RANK is set, as torchrun sets it, but MASTER_ADDR is not; start this under torchrun, or unset RANK"
        )
    return LauncherRank(rank=found[0], world_size=found[1], local_rank=found[2])


def check_devices(device: ExecutionDevice, num_ranks: int) -> None:
    """Raise unless this machine has what so many ranks need.

    Raises
    ------
    CalibrationError
        If torch, or enough devices, are missing.
    """
    if device == "cpu":
        _require_torch()
        if num_ranks > _MAX_CPU_PROCESSES:
            raise CalibrationError(
                f"the plan needs {num_ranks} processes, and one machine runs {_MAX_CPU_PROCESSES} at most;"
                " --dry-run prints how to start it on several"
            )
        return
    from meshwright.profiler.device import discover_device

    try:
        found = discover_device("cuda")
    except CalibrationError as error:
        # What a profile could do instead is no help here.
        found_none = str(error).removesuffix(", or measure the processor with --device cpu")
        raise CalibrationError(
            f"{found_none}; --device cpu runs the plan on the processor, to check it and not its speed"
        ) from None
    if found.num_devices < num_ranks:
        raise CalibrationError(
            f"the plan needs {num_ranks} GPUs and this machine has {found.num_devices} ({found.name}); --dry-run"
            " prints how to start it on several"
        )


def check_host_memory(execution: Execution, num_ranks: int, *, is_served: bool = False) -> None:
    """Raise unless this machine's memory holds the weights of the ranks that it runs on its processor.

    Counted are weights, and of a training run their gradients and optimizer states; activations come on top.

    Parameters
    ----------
    execution : Execution
        What runs.
    num_ranks : int
        Ranks of this machine.
    is_served : bool
        Weights are all there is.

    Raises
    ------
    CalibrationError
        If it does not.
    """
    if execution.device != "cpu":
        return
    plan = execution.plan
    order = PipelineOrder(plan, plan.num_micro_batches(execution.workload.global_batch_size))
    held = [
        sum(
            tensor.size
            for virtual in order.placement[stage]
            for tensor in local_tensors(execution.model, plan, order, int(virtual))
        )
        for stage in range(plan.pp)
    ]
    weight = 2.0 if execution.workload.precision == "bf16" else 4.0
    shares = (plan.sharding_group or plan.dp) * plan.cp
    moments = _MOMENTS_BYTES
    if plan.optimizer_offload == "nvme":
        moments *= 1.0 - plan.optimizer_offload_fraction
    per_parameter = weight + _GRADIENT_BYTES + moments / (1 if plan.sharding == "none" else shares)
    if plan.sharding in ("zero3", "hsdp"):
        # What they gather for a while is left out.
        per_parameter = (weight + _GRADIENT_BYTES + moments) / shares
    needed = (weight if is_served else per_parameter) * sum(held) * num_ranks / plan.pp
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        what = "weights" if is_served else "weights, gradients and optimizer states"
        raise CalibrationError(
            f"the {num_ranks} ranks hold {needed / 2**30:,.0f} GiB of {what}, and this"
            f" machine has {available / 2**30:,.0f} GiB of memory; run a smaller model, or on GPUs"
        )


def _require_torch() -> None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise CalibrationError(
            "running a plan needs torch, which is not installed; run pip install 'meshwright[profile]'"
        )


def local_commands(execution: Execution, directory: Path, port: int) -> tuple[WorkerCommand, ...]:
    """Return the command of each rank when all run on this machine.

    Parameters
    ----------
    execution : Execution
        What runs.
    directory : Path
        The run's folder, which holds :data:`EXECUTION_FILE`.
    port : int
        Where rank 0 listens for the others.
    """
    size = execution.plan.num_gpus
    return tuple(
        WorkerCommand(
            rank=rank,
            arguments=_worker_arguments(directory),
            environment={
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                **(KEEPS_PAGES if execution.device == "cpu" else {}),
            },
        )
        for rank in range(size)
    )


def run_here(
    execution: Execution,
    directory: Path,
    *,
    commands: Callable[[Execution, Path, int], tuple[WorkerCommand, ...]] = local_commands,
    patience: Patience | None = None,
    progress: Progress | None = None,
) -> ExecutionReport:
    """Run all ranks on this machine and return what they measured.

    Parameters
    ----------
    execution : Execution
        What runs; the folder holds its text as :data:`EXECUTION_FILE`.
    directory : Path
        The run's folder.
    commands : Callable[[Execution, Path, int], tuple[WorkerCommand, ...]]
        What starts each rank, as :func:`local_commands`.
    patience : Patience | None
        How long to wait.
    progress : Callable[[str], None] | None
        Told what rank 0 does.

    Raises
    ------
    ExecutionError
        If a rank fails, hangs or writes no report.
    """
    _forget(directory, range(execution.plan.num_gpus))
    supervise(commands(execution, directory, _free_port()), directory, patience=patience, progress=progress)
    return _reports(execution, directory)


def run_as_rank(
    execution: Execution,
    directory: Path,
    here: LauncherRank,
    *,
    patience: Patience | None = None,
    progress: Progress | None = None,
) -> ExecutionReport | None:
    """Be one rank under ``torchrun``; rank 0 returns what all measured, the others None.

    The folder must be one that all nodes share. Parameters and errors are those of :func:`run_here`.
    """
    if here.world_size != execution.plan.num_gpus:
        raise SpecError(
            f"the plan needs {execution.plan.num_gpus} ranks, and torchrun started {here.world_size}"
        )
    _forget(directory, (here.rank,))
    if here.rank == 0:
        # No other rank gets past the start, let alone reports, before rank 0 has joined: these are of earlier runs.
        _remove(report_path(directory, rank) for rank in range(here.world_size))
    command = WorkerCommand(
        rank=here.rank,
        arguments=_worker_arguments(directory),
        environment={
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            **(KEEPS_PAGES if execution.device == "cpu" else {}),
        },
    )
    supervise((command,), directory, patience=patience, progress=progress)
    if here.rank != 0:
        return None
    deadline = time.monotonic() + _SHARED_FOLDER_SECONDS
    while time.monotonic() < deadline:
        if all(report_path(directory, rank).exists() for rank in range(here.world_size)):
            break
        time.sleep(0.1)
    return _reports(execution, directory)


def multi_node_commands(words: Sequence[str], num_nodes: int, ranks_per_node: int) -> dict[str, str]:
    """Return what starts a run on several nodes, by launcher: for ``torchrun`` on each node, for Slurm once.

    Parameters
    ----------
    words : Sequence[str]
        Arguments of ``meshwright`` itself.
    num_nodes, ranks_per_node : int
        Size of the run.
    """
    size = ("--nnodes", str(num_nodes), "--nproc-per-node", str(ranks_per_node))
    program = ("-m", "meshwright", *words)
    meeting = ("--rdzv-backend", "c10d")
    if num_nodes == 1:
        single = shlex.join(("torchrun", "--standalone", *size[2:], *program))
        return {"torchrun": single, "slurm": f"srun --nodes 1 --ntasks 1 {single}"}
    # The two words that a shell must expand stand outside the quoting.
    first, last = shlex.join(("torchrun", *size, *meeting)), shlex.join(program)
    head = '"$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"'
    return {
        "torchrun": f'{first} --rdzv-id meshwright --rdzv-endpoint "$HEAD_NODE:{_PORT}" {last}',
        "slurm": (
            f"srun --nodes {num_nodes} --ntasks-per-node 1 {first}"
            f' --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint {head}:{_PORT} {last}'
        ),
    }


def shell_line(command: WorkerCommand) -> str:
    """Return a worker's command as a line for a shell."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in command.environment.items()]
    return " ".join((*variables, shlex.join(command.arguments)))


def _worker_arguments(directory: Path) -> tuple[str, ...]:
    # -P: the folder this is started in must not lend its modules.
    return (sys.executable, "-P", "-m", _WORKER, str(directory / EXECUTION_FILE), str(directory))


def _forget(directory: Path, ranks: Iterable[int]) -> None:
    """Remove what ranks of earlier runs have left."""
    _remove(name(directory, rank) for rank in ranks for name in (report_path, now_path, log_path))


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise SpecError(f"{path}: is in the way and cannot be removed ({error.strerror})") from None


def _reports(execution: Execution, directory: Path) -> ExecutionReport:
    try:
        return read_reports(directory, execution.plan)
    except SpecError as error:
        raise ExecutionError(f"the run ended, but not all ranks reported: {error}") from None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
