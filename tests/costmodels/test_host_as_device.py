"""A processor that is its own device pays for every launch; an accelerator works through a queue meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.cases import cases_of
from meshwright.costmodels.layers.layer import layer_times
from meshwright.costmodels.operators import OPERATORS
from meshwright.costmodels.parallelism.data import fsdp_times
from meshwright.costmodels.parameters import RankParameters, layer_parameters
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.costmodels.stage import optimizer_time
from meshwright.simcore.domain.plan import ParallelPlan

MakeContext = Callable[..., CostContext]
MakePlan = Callable[..., ParallelPlan]


@pytest.mark.parametrize(("cluster", "adds"), [("cpu-host-1:1", True), ("dgx-h100:1", False)])
def test_launches_add_to_compute_where_the_host_computes(
    make_context: MakeContext, make_plan: MakePlan, cluster: str, adds: bool
) -> None:
    context = make_context(cluster=cluster, software="meshwright-executor")
    cases = cases_of(PlanColumns.from_plans([make_plan()], 64))

    def layer(latency: float) -> np.ndarray:
        software = replace(context.software, host_launch_latency=latency)
        times = layer_times(replace(context, software=software), cases)
        return np.array([times.forward[0], times.backward[0]])

    # Nine kernels and four products forward, fourteen and eight backward.
    extra = np.array([13.0, 22.0]) * 1e-6 if adds else np.zeros(2)
    assert layer(2e-6) - layer(1e-6) == pytest.approx(extra, abs=1e-12)


@pytest.mark.parametrize(("cluster", "copies"), [("cpu-host-1:1", True), ("dgx-h100:1", False)])
def test_a_processor_copies_what_fsdp_gathers_and_reduces(
    make_context: MakeContext, make_plan: MakePlan, cluster: str, copies: bool
) -> None:
    context = make_context(cluster=cluster, software="meshwright-executor")
    columns = PlanColumns.from_plans([make_plan(dp=2, sharding="zero3")], 64)

    def unit(each: PlanColumns) -> RankParameters:
        return layer_parameters(context, each, is_moe=False)

    window = np.ones(1)
    times = fsdp_times(context, columns, unit, window, window)
    if not copies:
        assert not times.forward_handling.any()
        assert not times.backward_handling.any()
        return
    weights = unit(columns).total
    rate = context.gpu.memory_bandwidth_bytes_per_second * context.calibration.memory_stream_efficiency
    calls = 60 * context.software.host_launch_latency
    # Half a copy for the shard, one for the whole, in bf16; gradients in fp32: each read and written.
    gather = weights * 2.0 * (2.0 + 2.0 / 2.0) / rate + calls
    reduction = weights * 2.0 * 4.0 / rate + calls
    assert times.forward_handling == pytest.approx(gather)
    assert times.backward_handling == pytest.approx(gather + reduction)


def test_the_optimizer_takes_the_time_that_was_measured(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    context = make_context(cluster="cpu-host-1:1", software="meshwright-executor")
    columns = PlanColumns.from_plans([make_plan()], 64)
    parameters = layer_parameters(context, columns, is_moe=False)

    def step(each: CostContext) -> float:
        return float(optimizer_time(each, columns, parameters, np.zeros(1))[0])

    copy = replace(context.calibration.gemm("fp32"), operator=OPERATORS["adam_fused"])

    def measured(efficiency: float) -> CostContext:
        curve = replace(copy.curve, launch_time=1e-3, memory_efficiency=efficiency)
        operators = {**context.calibration.operators, "adam_fused.fp32": replace(copy, curve=curve)}
        return replace(context, calibration=replace(context.calibration, operators=operators))

    # At the speed of a copy it is what it is without a measurement, and the launch; at half of it the update doubles.
    alike = measured(context.calibration.memory_stream_efficiency)
    assert step(alike) == pytest.approx(step(context) + 1e-3, rel=1e-9)
    slower = step(measured(0.5 * context.calibration.memory_stream_efficiency)) - step(alike)
    bandwidth = context.gpu.memory_bandwidth_bytes_per_second * context.calibration.memory_stream_efficiency
    assert slower == pytest.approx(28.0 * float(parameters.dense_trained[0]) / bandwidth, rel=1e-9)
