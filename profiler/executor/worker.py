"""One rank of a run: ``python -P -m meshwright.profiler.executor.worker EXECUTION.json RUN_DIRECTORY``.

Started under ``torchrun`` or with its variables (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``,
``MASTER_PORT``). Exit code 0 done, 2 bad input, 5 a plan that cannot run here, with the reason on stderr; a crash ends with its traceback.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from meshwright.errors import ExecutionError, MeshwrightError
from meshwright.profiler.executor.adamw import StatesAway
from meshwright.profiler.executor.build import BuildContext
from meshwright.profiler.executor.data_parallel import FlatGradients, Optimizer
from meshwright.profiler.executor.execution_file import read_execution
from meshwright.profiler.executor.limits import unsupported
from meshwright.profiler.executor.linear import WeightGradients
from meshwright.profiler.executor.local_tensors import num_copies
from meshwright.profiler.executor.mesh import RankMesh, build_mesh
from meshwright.profiler.executor.model import Chunk
from meshwright.profiler.executor.offload import HeldActivations
from meshwright.profiler.executor.pipeline import PipelineRank
from meshwright.profiler.executor.pipeline_order import PipelineOrder
from meshwright.profiler.executor.recording import Recorder
from meshwright.profiler.executor.report import RankReport, rank_report_text, report_path
from meshwright.profiler.executor.sharded_data_parallel import ShardedParameters
from meshwright.profiler.executor.tokens import MicroBatches
from meshwright.profiler.executor.vocabulary import VocabularySlice
from meshwright.profiler.executor.vocabulary_passes import VocabularyPasses
from meshwright.profiler.executor.weights import WeightSource
from meshwright.simcore.domain.execution import Execution

__all__ = ["execute", "main", "rank_report"]

# Hangs are found by whoever started the workers; this ends those that nobody watches.
_TIMEOUT = timedelta(minutes=30)


def execute(execution: Execution, recorder: Recorder) -> RankMesh:
    """Run the steps of an execution in this process, whose process group is there already.

    Parameters
    ----------
    execution : Execution
        What runs.
    recorder : Recorder
        Where the steps are noted.

    Returns
    -------
    RankMesh
        The groups that were used, for the caller to destroy.

    Raises
    ------
    ExecutionError
        If the execution cannot run here.
    """
    plan = execution.plan
    _require_supported(execution)
    if distributed.get_world_size() != plan.num_gpus:
        raise ExecutionError(
            f"the plan needs {plan.num_gpus} ranks, not the {distributed.get_world_size()} that were started"
        )
    num_micro_batches = plan.num_micro_batches(execution.workload.global_batch_size)
    order = PipelineOrder(plan, num_micro_batches)
    recorder.place = "setup"
    recorder.say("forming the groups")
    mesh = build_mesh(plan, order.edges(), recorder, num_copies(execution.model, plan))
    recorder.say("building the model")
    rank, batches, optimizer = _build(execution, order, mesh, recorder)
    for step in range(execution.num_warmup_steps + execution.num_steps):
        recorder.place = f"step {step}"
        recorder.say("drawing tokens")
        batches.draw(step)
        with recorder.whole_step() as record:
            optimizer.begin_step()
            loss = rank.run(batches)
            with recorder.phase("gradient_sync"):
                optimizer.finish_gradients()
                sums = torch.stack([_own_loss(loss, mesh), optimizer.squared_norm().to(loss.device)])
                mesh.world.all_reduce(sums)
            with recorder.phase("optimizer"):
                optimizer.step()
        record.loss, square = sums.tolist()
        record.gradient_norm = square**0.5
    recorder.place = ""
    recorder.say("done")
    return mesh


def rank_report(execution: Execution, recorder: Recorder, stage: int) -> RankReport:
    """Return what a rank measured, without the steps that warm up."""
    steps = recorder.steps[execution.num_warmup_steps :]
    phases = sorted({name for step in steps for name in step.phase_seconds})
    device = recorder.device
    return RankReport(
        rank=distributed.get_rank(),
        stage=stage,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        step_seconds=tuple(step.seconds for step in steps),
        cpu_seconds=tuple(step.cpu_seconds for step in steps),
        phase_seconds={name: tuple(step.phase_seconds.get(name, 0.0) for step in steps) for name in phases},
        phase_cpu_seconds={
            name: tuple(step.phase_cpu_seconds.get(name, 0.0) for step in steps) for name in phases
        },
        traffic=recorder.traffic_per_step(len(steps)),
        peak_memory_bytes=recorder.peak_memory_bytes(),
        losses=tuple(step.loss for step in steps),
        gradient_norms=tuple(step.gradient_norm for step in steps),
        software={"torch": torch.__version__, "python": platform.python_version()},
    )


def main(arguments: list[str], run: Callable[[Execution, Recorder], RankMesh] = execute) -> int:
    """Run as a rank; return the exit code."""
    if len(arguments) != 2:
        print(
            "usage: python -m meshwright.profiler.executor.worker EXECUTION.json RUN_DIRECTORY",
            file=sys.stderr,
        )
        return 2
    directory = Path(arguments[1])
    try:
        execution = read_execution(Path(arguments[0]))
        _run(execution, directory, run)
    except MeshwrightError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _require_supported(execution: Execution) -> None:
    reasons = unsupported(execution)
    if reasons:
        raise ExecutionError("the executor cannot run this plan: " + "; ".join(reasons))


def _run(execution: Execution, directory: Path, run: Callable[[Execution, Recorder], RankMesh]) -> None:
    if run is execute:
        _require_supported(execution)
    is_gpu = execution.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_gpu else torch.device("cpu")
    if is_gpu:
        torch.cuda.set_device(device)
    recorder = Recorder(int(os.environ["RANK"]), directory, device)
    recorder.say("meeting the other ranks")
    distributed.init_process_group(
        "nccl" if is_gpu else "gloo", timeout=_TIMEOUT, device_id=device if is_gpu else None
    )
    mesh = run(execution, recorder)
    report = rank_report(execution, recorder, mesh.at.pp)
    if run is not execute:
        # Nothing was learnt.
        report = dataclasses.replace(report, losses=(), gradient_norms=())
    document = json.loads(rank_report_text(report))
    document["operations"] = recorder.steps[-1].operations
    path = report_path(directory, report.rank)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
    recorder.close()
    distributed.destroy_process_group()


def _build(
    execution: Execution, order: PipelineOrder, mesh: RankMesh, recorder: Recorder
) -> tuple[PipelineRank, MicroBatches, Optimizer]:
    model, plan, workload = execution.model, execution.plan, execution.workload
    torch.backends.cuda.matmul.allow_tf32 = workload.precision == "tf32"
    dtype = torch.bfloat16 if workload.precision == "bf16" else torch.float32
    gradients = WeightGradients()
    context = BuildContext(
        model=model,
        plan=plan,
        mesh=mesh,
        source=WeightSource(seed=execution.seed, dtype=dtype, device=recorder.device),
        gradients=gradients,
        held=HeldActivations(recorder) if plan.activation_offload else None,
    )
    batches = MicroBatches(execution, mesh.at, recorder.device)
    virtual_stages = [int(virtual) for virtual in order.placement[mesh.at.pp]]
    chunks: list[Any] = [
        Chunk(
            context,
            first_layer=order.first_layer(virtual),
            num_layers=order.layers[virtual],
            has_embedding=order.has_embedding(virtual),
            has_head=order.has_head(virtual),
            num_tokens=workload.num_tokens,
            positions=batches.positions,
            is_vocabulary_split=order.is_vocabulary_split,
        )
        for virtual in virtual_stages
    ]
    counts_tied = [virtual == 0 for virtual in virtual_stages]
    away = StatesAway.of(plan, recorder.directory)
    optimizer: Optimizer
    if plan.sharding in ("none", "zero1"):
        optimizer = FlatGradients(
            chunks,
            mesh,
            is_sharded=plan.sharding == "zero1",
            away=away,
            copies=[virtual // order.num_virtual for virtual in virtual_stages],
            counts_tied=counts_tied,
        )
    else:
        optimizer = ShardedParameters(
            chunks,
            plan,
            mesh,
            param_dtype=dtype,
            counts_tied=counts_tied,
            num_micro_batches=order.num_micro_batches,
            away=away,
        )
    length = workload.sequence_length // plan.cp // (plan.tp if plan.sequence_parallel else 1)
    shape = (length, plan.micro_batch_size, model.hidden_size)
    # Of the one chunk of a stage.
    vocabulary: VocabularySlice | None = chunks[0].vocabulary
    passes = None
    if vocabulary is not None:
        passes = VocabularyPasses(plan, mesh, vocabulary, recorder, shape, dtype)
    return (
        PipelineRank(order, mesh, chunks, gradients, optimizer, recorder, shape, dtype, passes),
        batches,
        optimizer,
    )


def _own_loss(loss: torch.Tensor, mesh: RankMesh) -> torch.Tensor:
    """Return this rank's share of the loss; tensor parallel ranks all know the same."""
    return loss.double() / mesh.tp.size


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
