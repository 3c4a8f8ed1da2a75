"""Contexts and plans the cost-model tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import settings

from meshwright.costmodels.calibration import AttentionCurve
from meshwright.costmodels.context import CostContext, cost_context
from meshwright.costmodels.operators import RooflineCurve
from meshwright.costmodels.software import AttentionKernel
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan, ScheduleName, partition_layers
from meshwright.simcore.domain.workload import Precision, TrainingWorkload

# The first example of a session compiles the simulator's kernels.
settings.register_profile("compiles", deadline=None)
settings.load_profile("compiles")

MakeContext = Callable[..., CostContext]
MakePlan = Callable[..., ParallelPlan]
Idealise = Callable[[CostContext], CostContext]


def build_context(
    model: str = "llama-3-8b",
    cluster: str = "dgx-h100:1",
    *,
    batch: int = 64,
    length: int = 2048,
    precision: Precision = "bf16",
    software: str = "megatron-core",
    features: tuple[str, ...] = (),
    kernel: AttentionKernel | None = None,
    **model_changes: object,
) -> CostContext:
    """Return the context of a job on built-in hardware; further keywords change fields of the model."""
    job = TrainingJob(
        model=replace(load_model(model), **model_changes),  # type: ignore[arg-type]  # checked by the class
        cluster=resolve_cluster(cluster),
        workload=TrainingWorkload(global_batch_size=batch, sequence_length=length, precision=precision),
        software=software,
    )
    return cost_context(job, features=frozenset(features), attention_kernel=kernel)


def build_plan(num_layers: int = 32, **changes: object) -> ParallelPlan:
    """Return a plan whose schedule and stages follow from pp and vpp unless they are given."""
    pp, vpp = int(str(changes.get("pp", 1))), int(str(changes.get("vpp", 1)))
    schedule: ScheduleName = "none" if pp == 1 else "interleaved_1f1b" if vpp > 1 else "1f1b"
    defaults: dict[str, object] = {
        "dp": 1,
        "micro_batch_size": 1,
        "schedule": schedule,
        "layers_per_stage": partition_layers(num_layers, pp * vpp),
    }
    return ParallelPlan(**(defaults | changes))  # type: ignore[arg-type]  # keywords are checked by the class


@pytest.fixture(scope="session")
def make_context() -> MakeContext:
    return build_context


@pytest.fixture(scope="session")
def make_plan() -> MakePlan:
    return build_plan


def idealised(context: CostContext) -> CostContext:
    """Return the job on a device that computes at its data sheet's peak: no launches, endless bandwidth.

    Its attention reaches the peak too, for 16-bit inputs and as many heads as one rank has without tensor parallelism.
    """
    model, gpu, calibration = context.model, context.gpu, context.calibration
    curve = RooflineCurve(launch_time=0.0, compute_efficiency=1.0, memory_efficiency=1.0, exponent=1.0)
    operators = {
        name: replace(
            operator,
            curve=curve,
            residual=None,
            rates=replace(operator.rates, bandwidth_bytes_per_second=1e30),
        )
        for name, operator in calibration.operators.items()
    }
    head_dim = model.head_dim if model.mla is None else 0.5 * (model.head_dim + model.mla.v_head_dim)
    # What the attention model takes off for narrow heads and few of them.
    narrow = min(1.0, head_dim / 128.0) ** 0.4
    attention = AttentionCurve(
        peak_flops_per_second=gpu.peak("bf16") / narrow, half_length=-8000.0 / model.num_attention_heads
    )
    perfect = replace(
        calibration,
        operators=operators,
        sustained_clock={"bf16": 1.0},
        memory_stream_efficiency=1.0,
        attention=dict.fromkeys(("flash_2", "flash_3"), attention),
        attention_backward_efficiency=1.0,
    )
    node = replace(context.cluster.node, gpu=replace(gpu, memory_bandwidth_bytes_per_second=1e30))
    software = replace(
        context.software,
        attention_efficiency=1.0,
        host_launch_latency=0.0,
        fixed_time=0.0,
        fp8_cast_bytes=0.0,
    )
    return replace(
        context, cluster=replace(context.cluster, node=node), calibration=perfect, software=software
    )


@pytest.fixture(scope="session")
def idealise() -> Idealise:
    return idealised
