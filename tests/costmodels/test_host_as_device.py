"""A processor that is its own device pays for every launch; an accelerator works through a queue meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.cases import cases_of
from meshwright.costmodels.layers.layer import layer_times
from meshwright.costmodels.plan_columns import PlanColumns
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
