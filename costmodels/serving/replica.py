"""One replica as the simulator takes it: step table and behaviour of an engine that serves a model on a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from meshwright.costmodels.serving.constants import (
    EngineConstants,
    engine_constants,
    with_engine_constants,
)
from meshwright.costmodels.serving.formats import ServingFormats, serving_formats
from meshwright.costmodels.serving.kernels import ServingKernels, load_serving_kernels
from meshwright.costmodels.serving.memory import ServingMemory, serving_memory
from meshwright.costmodels.serving.step import ServedModel, step_table
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.serving import ServingPlan, ServingPool
from meshwright.simcore.serving.behaviour import EngineBehaviour
from meshwright.simcore.serving.step_table import StepTable

__all__ = ["Replica", "engine_behaviour", "replica", "served_model", "with_engine_defaults"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replica:
    """What the simulator needs of one replica, and what it rests on.

    Parameters
    ----------
    table : StepTable
        Step times.
    behaviour : EngineBehaviour
        Scheduler, cache and front end.
    memory : ServingMemory
        Where a rank's memory goes.
    constants : EngineConstants
        With their certainty and evidence.
    """

    table: StepTable
    behaviour: EngineBehaviour
    memory: ServingMemory
    constants: EngineConstants


def served_model(
    model: ModelSpec,
    cluster: ClusterSpec,
    plan: ServingPlan,
    *,
    expert_precision: str = "",
    calibration_paths: Sequence[Path] = (),
    kernels: ServingKernels | None = None,
    constants: EngineConstants | None = None,
) -> ServedModel:
    """Return a model with everything a step of its engine costs.

    Parameters
    ----------
    model, cluster, plan : ModelSpec, ClusterSpec, ServingPlan
        What is served, where, by which engine release and in which formats.
    expert_precision : str
        Format of routed experts where it is not the plan's.
    calibration_paths : Sequence[Path]
        The user's calibrations.
    kernels, constants : ServingKernels | None, EngineConstants | None
        Loaded before, or changed; None loads the built-in ones.
    """
    gpu = cluster.gpu
    if kernels is None:
        kernels = load_serving_kernels(gpu, cluster.node, plan.engine, calibration_paths)
    formats: ServingFormats = serving_formats(
        model,
        plan.precision,
        plan.kv_precision,
        expert_precision=expert_precision,
        architecture=gpu.architecture,
        engine=plan.engine,
    )
    if constants is None:
        known = engine_constants(
            plan.engine,
            plan.engine_version,
            is_moe=model.moe is not None,
            architecture=gpu.architecture,
            experts=formats.experts,
        )
        constants = with_engine_constants(known, kernels.calibration.software)
    return ServedModel(
        model=model,
        formats=formats,
        cluster=cluster,
        kernels=kernels,
        constants=constants,
    )


def engine_behaviour(
    constants: EngineConstants, pool: ServingPool, kv_cache_tokens: int, *, prompt_length: float = 0.0
) -> EngineBehaviour:
    """Return how an engine of a pool schedules.

    Parameters
    ----------
    constants : EngineConstants
        Front end and output of the release.
    pool : ServingPool
        Policy, limits, speculation and degrees.
    kv_cache_tokens : int
        Tokens the cache holds where the pool does not say (per attention data parallel rank).
    prompt_length : float
        Typical prompt; with ``prompts_per_step`` it bounds the token budget [tokens].
    """
    constants = constants.drafting(pool.num_speculative_tokens)
    budget = float(pool.max_num_batched_tokens)
    if constants.prompts_per_step and prompt_length:
        # Decoding sequences count against the budget of a mixed step.
        budget = min(budget, constants.prompts_per_step * prompt_length + pool.max_num_sequences)
    tokens = pool.kv_cache_tokens or kv_cache_tokens
    return EngineBehaviour(
        policy=pool.policy,
        max_num_sequences=pool.max_num_sequences,
        max_num_batched_tokens=max(1, int(budget)),
        num_kv_blocks=max(1, tokens // pool.block_size // pool.pp),
        block_size=pool.block_size,
        overlaps_steps=constants.overlaps_steps,
        serial_time_per_request=constants.request_time,
        fixed_time_per_request=constants.response_latency,
        stream_time_per_token=constants.token_time,
        num_speculative_tokens=pool.num_speculative_tokens,
        acceptance=pool.acceptance,
        has_prefix_cache=pool.has_prefix_cache,
        attention_dp=pool.attention_dp,
        pipeline_stages=pool.pp,
        reserves_output=constants.reserves_output or None,
    )


def replica(served: ServedModel, pool: ServingPool, *, prompt_length: float = 0.0) -> Replica:
    """Return one replica of a pool, ready to simulate.

    Raises
    ------
    InfeasiblePlanError
        If the model does not fit; says how much is missing.
    """
    memory = serving_memory(served.model, served.formats, pool, served.cluster.gpu, served.constants)
    return Replica(
        table=step_table(served, pool),
        behaviour=engine_behaviour(
            served.constants, pool, memory.kv_cache_tokens, prompt_length=prompt_length
        ),
        memory=memory,
        constants=served.constants,
    )


def with_engine_defaults(pool: ServingPool, constants: EngineConstants) -> ServingPool:
    """Return the pool with the engine's own policy, token budget and batch in place of the general defaults."""
    return replace(
        pool,
        policy=constants.policy,
        max_num_batched_tokens=int(constants.max_num_batched_tokens),
        max_num_sequences=int(constants.max_num_sequences),
    )
