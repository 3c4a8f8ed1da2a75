"""The factor of eager element-wise kernels, from layers of a known truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.context import cost_context
from meshwright.costmodels.layers.cases import LayerCases
from meshwright.costmodels.layers.elementwise import elementwise_times
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.profiler.eager_layers import EAGER_KERNELS, eager_elementwise_factor, fused_bytes
from meshwright.profiler.measurements import LayerSample
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.workload import TrainingWorkload

STREAM, LAUNCH = 4e12, 5e-6
SHAPE = {
    "hidden_size": 4096.0,
    "ffn_hidden_size": 14336.0,
    "num_heads": 32.0,
    "num_kv_heads": 8.0,
    "head_dim": 128.0,
    "batch_size": 1.0,
    "sequence_length": 4096.0,
}


def layer(step: str, factor: float, *, products: float = 3e-3, is_compiled: bool = False) -> LayerSample:
    """A pass of so many seconds of products and attention, its element-wise kernels at ``factor``."""
    streamed = fused_bytes(step, "bf16", SHAPE) / STREAM
    seconds = products + factor * streamed
    return LayerSample(step=step, precision="bf16", is_compiled=is_compiled, shape=SHAPE, seconds=seconds)


def both_ways(factor: float, *steps: str, products: float = 3e-3) -> list[LayerSample]:
    return [
        layer(step, factor if not is_compiled else 1.0, products=products, is_compiled=is_compiled)
        for step in steps
        for is_compiled in (False, True)
    ]


@pytest.mark.parametrize("truth", [1.4, 2.7, 3.6])
def test_the_truth_is_recovered_whatever_the_products_take(truth: float) -> None:
    for products in (1e-3, 5e-3):
        layers = both_ways(truth, "forward", "backward", products=products)
        assert eager_elementwise_factor(layers, STREAM, LAUNCH) == pytest.approx(truth, rel=1e-9)


def test_one_percent_of_noise_moves_it_by_a_tenth() -> None:
    rng = np.random.default_rng(0)
    factors = []
    for _ in range(200):
        layers = [
            replace(each, seconds=each.seconds * (1.0 + 0.01 * rng.normal()))
            for each in both_ways(2.7, "forward", "backward")
        ]
        factors.append(eager_elementwise_factor(layers, STREAM, LAUNCH))
    assert np.mean(factors) == pytest.approx(2.7, rel=0.02)
    assert np.std(factors) < 0.3


def test_passes_of_the_host_and_passes_measured_one_way_do_not_count() -> None:
    eager, compiled = both_ways(2.7, "forward")
    assert eager_elementwise_factor([eager], STREAM, LAUNCH) is None
    assert eager_elementwise_factor([compiled], STREAM, LAUNCH) is None
    slow_host = eager.seconds / EAGER_KERNELS["forward"]
    assert eager_elementwise_factor([eager, compiled], STREAM, slow_host) is None
    # The backward pass, which the same host keeps up with, still counts.
    backward = both_ways(2.2, "backward", products=2e-2)
    found = eager_elementwise_factor([eager, compiled, *backward], STREAM, slow_host)
    assert found == pytest.approx(2.2)


def test_an_eager_layer_no_slower_than_the_compiled_one_tells_nothing() -> None:
    assert eager_elementwise_factor(both_ways(1.0, "forward"), STREAM, LAUNCH) is None
    decode = [replace(each, step="decode") for each in both_ways(2.7, "forward")]
    assert eager_elementwise_factor(decode, STREAM, LAUNCH) is None


def test_bytes_are_those_the_factor_multiplies_in_the_cost_model() -> None:
    job = TrainingJob(
        model=load_model("llama-3-8b"),
        cluster=resolve_cluster("dgx-h100:1"),
        workload=TrainingWorkload(global_batch_size=1, sequence_length=4096, precision="bf16"),
        software="torchtitan",
    )
    context = cost_context(job, features=frozenset({"eager"}))
    context = replace(
        context,
        calibration=replace(context.calibration, memory_stream_efficiency=1.0),
        software=replace(context.software, eager_elementwise_factor=2.7, repeats_key_value_heads=False),
    )
    one = np.ones(1)
    cases = LayerCases(
        tp=one,
        cp=one,
        cp_method=np.zeros(1, dtype=np.int64),
        ep=one,
        etp=one,
        expert_overlap=one,
        micro_batch_size=one,
        sequence_parallel=np.zeros(1, dtype=np.bool_),
    )
    times = elementwise_times(context, cases, float(context.model.ffn_hidden_size))
    bandwidth = context.gpu.memory_bandwidth_bytes_per_second
    for step, seconds in (("forward", times.forward), ("backward", times.backward)):
        assert seconds[0] == pytest.approx(2.7 * fused_bytes(step, "bf16", SHAPE) / bandwidth)
