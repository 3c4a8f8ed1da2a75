"""Run the shard of one replica of a serving pool: what runs, what is refused, and the time of its two kinds of steps."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from meshwright.profiler.executor.launch import local_commands, run_here
from meshwright.profiler.executor.limits import unsupported
from meshwright.profiler.executor.report import ExecutionReport
from meshwright.profiler.executor.supervise import Patience, Progress, WorkerCommand
from meshwright.simcore.domain.execution import Execution, ExecutionDevice
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.serving import ServingPlan, ServingPool
from meshwright.simcore.domain.workload import TrainingWorkload

__all__ = [
    "NUM_DECODES",
    "StepTimes",
    "pool_execution",
    "run_pool",
    "serving_commands",
    "stage_layers",
    "step_times",
    "unsupported_pool",
]

#: Decode steps after each prefill.
NUM_DECODES = 4
_TRAINING_WORKER = "meshwright.profiler.executor.worker"
_SERVING_WORKER = "meshwright.profiler.executor.serving_worker"
_PRECISIONS = ("fp32", "tf32", "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Seconds of one prefill step and of one decode step: medians over the steps, of the slowest rank [s]."""

    prefill: float
    decode: float


def stage_layers(num_layers: int, pp: int) -> tuple[int, ...]:
    """Return the layers of each stage, as equal as can be; the last ones hold fewer.

    Examples
    --------
    >>> stage_layers(10, 4)
    (3, 3, 2, 2)
    """
    return tuple(num_layers // pp + (stage < num_layers % pp) for stage in range(pp))


def pool_execution(
    model: ModelSpec,
    plan: ServingPlan,
    pool: ServingPool,
    *,
    batch: int,
    prompt: int,
    device: ExecutionDevice,
    num_steps: int,
    num_warmup_steps: int,
    seed: int,
) -> Execution:
    """Return what the workers of one replica run.

    Parameters
    ----------
    model, plan, pool : ModelSpec, ServingPlan, ServingPool
        What is served.
    batch, prompt : int
        Sequences of a step of one attention data parallel rank, and tokens of each prompt.
    device, num_steps, num_warmup_steps, seed : ExecutionDevice, int, int, int
        As of an :class:`Execution`; each step is a prefill and :data:`NUM_DECODES` decodes.
    """
    return Execution(
        model=model,
        plan=ParallelPlan(
            tp=pool.tp,
            pp=pool.pp,
            dp=pool.attention_dp,
            ep=pool.ep,
            etp=pool.moe_tp,
            micro_batch_size=batch,
            schedule="none" if pool.pp == 1 else "1f1b",
            layers_per_stage=stage_layers(model.num_layers, pool.pp),
        ),
        workload=TrainingWorkload(
            global_batch_size=batch * pool.attention_dp, sequence_length=prompt, precision=plan.precision
        ),
        device=device,
        num_steps=num_steps,
        num_warmup_steps=num_warmup_steps,
        seed=seed,
    )


def unsupported_pool(plan: ServingPlan, pool: ServingPool, execution: Execution) -> tuple[str, ...]:
    """Return every reason why a replica of a pool cannot be run; none if it can."""
    model, found = execution.model, list(unsupported(execution, is_served=True))
    if model.num_layers < pool.pp:
        found.append(
            f"pp {pool.pp} has more stages than the model's num_layers {model.num_layers}; use fewer"
        )
    if model.moe is None and pool.attention_dp > 1:
        found.append(
            f"attention_dp {pool.attention_dp} shares out experts, and {model.name} has none; use 1 and more replicas"
        )
    ranks = pool.tp * pool.attention_dp
    if model.moe is not None and pool.ep * pool.moe_tp != ranks:
        found.append(
            f"ep {pool.ep} x moe_tp {pool.moe_tp} is not the {ranks} ranks of tp x attention_dp, over which experts are"
            " shared out; use degrees whose product it is"
        )
    if pool.num_speculative_tokens:
        found.append(
            f"num_speculative_tokens {pool.num_speculative_tokens}: speculative decoding is not run; use 0"
        )
    if plan.precision in _PRECISIONS and plan.kv_precision != plan.precision:
        found.append(
            f"kv_precision {plan.kv_precision} beside precision {plan.precision} is not run; use the same for both"
        )
    length = execution.workload.sequence_length + NUM_DECODES
    if model.position_embedding == "learned" and model.max_position_embeddings < length:
        found.append(
            f"max_position_embeddings {model.max_position_embeddings} are fewer learned positions than the {length}"
            " tokens of a sequence; use a shorter --prompt"
        )
    return tuple(found)


def serving_commands(execution: Execution, directory: Path, port: int) -> tuple[WorkerCommand, ...]:
    """Return the command of each rank; parameters are those of ``local_commands``."""
    return tuple(
        replace(
            command,
            arguments=tuple(
                _SERVING_WORKER if each == _TRAINING_WORKER else each for each in command.arguments
            ),
        )
        for command in local_commands(execution, directory, port)
    )


def run_pool(
    execution: Execution,
    directory: Path,
    *,
    patience: Patience | None = None,
    progress: Progress | None = None,
) -> ExecutionReport:
    """Run all ranks of a replica on this machine; parameters and errors are those of ``run_here``."""
    return run_here(execution, directory, commands=serving_commands, patience=patience, progress=progress)


def step_times(report: ExecutionReport) -> StepTimes:
    """Return the times of the two kinds of steps."""

    def slowest(phase: str) -> float:
        return max(statistics.median(rank.phase_seconds[phase]) for rank in report.ranks)

    return StepTimes(prefill=slowest("prefill"), decode=slowest("decode") / NUM_DECODES)
