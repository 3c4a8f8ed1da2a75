"""Measured layers against sums of operators of a known truth."""

from __future__ import annotations

import pytest

from meshwright.costmodels.operators import OPERATORS, DeviceRates, OperatorModel, RooflineCurve
from meshwright.profiler.fitting.layers import compare_layers
from meshwright.profiler.measurements import LayerSample

WIDTHS = {
    "hidden_size": 256.0,
    "ffn_hidden_size": 640.0,
    "num_heads": 8.0,
    "num_kv_heads": 2.0,
    "head_dim": 32.0,
}
TRAINING = {**WIDTHS, "batch_size": 2.0, "sequence_length": 128.0}
DECODING = {**WIDTHS, "batch_size": 4.0, "context_length": 512.0}
# Widths of the products' outputs and inputs: queries with keys and values, attention's output, gate with up, down.
QKV, OUT, UP, DOWN = (12 * 32, 256), (256, 8 * 32), (2 * 640, 256), (256, 640)
PRODUCTS = (QKV, OUT, UP, DOWN)
STREAMING = ("copy", "rms_norm", "rotary", "swiglu")


def models(*, launch: float = 0.0, flops: float = 1e30, bandwidth: float = 1e30) -> dict[str, OperatorModel]:
    """Every operator at so many launches, FLOP/s and bytes of memory-bound kernels a second."""
    found = {}
    for name in (*STREAMING, "gemm", "gemm_dgrad", "gemm_wgrad", "attention_prefill", "attention_backward", "attention_decode"):  # fmt: skip
        operator = OPERATORS[name]
        rate = bandwidth if name in STREAMING else 1e30
        rates = DeviceRates(
            peak_flops_per_second=flops, bandwidth_bytes_per_second=rate, num_sms=1, l2_bytes=1.0
        )
        curve = RooflineCurve(launch_time=launch, compute_efficiency=1.0, memory_efficiency=1.0, exponent=8.0)
        parameters = {each.name: 0.0 for each in operator.parameters}
        found[f"{name}.bf16"] = OperatorModel(
            operator=operator, precision="bf16", rates=rates, curve=curve, parameters=parameters
        )
    return found


def layer(
    step: str, seconds: float = 1.0, precision: str = "bf16", *, is_compiled: bool = False
) -> LayerSample:
    shape = {"decode": DECODING, "optimizer": WIDTHS}.get(step, TRAINING)
    return LayerSample(step=step, precision=precision, is_compiled=is_compiled, shape=shape, seconds=seconds)


def predicted(step: str, **truth: float) -> float:
    (found,), notes = compare_layers([layer(step)], models(**truth))
    assert notes == ()
    return found.predicted


@pytest.mark.parametrize(
    ("step", "kernels"),
    # Products, attention, two norms, two residual sums, rotary of queries and of keys, SwiGLU.
    [("forward", 4 + 1 + 2 + 2 + 2 + 1), ("backward", 8 + 1 + 7), ("decode", 4 + 1 + 7 + 2)],
)
def test_every_kernel_of_a_layer_is_launched_once(step: str, kernels: int) -> None:
    assert predicted(step, launch=1.0) == pytest.approx(kernels)


def test_a_layer_computes_its_products_and_attention() -> None:
    tokens, weights = 2 * 128, sum(n * k for n, k in PRODUCTS)
    attention = 2 * 2 * 8 * 128 * 128 * 32  # the causal half of two products
    assert predicted("forward", flops=1.0) == pytest.approx(2 * tokens * weights + attention)
    # Two products for each, and five of attention's for two.
    assert predicted("backward", flops=1.0) == pytest.approx(4 * tokens * weights + 2.5 * attention)
    # Sixteen queries fill a tile of each of the two KV heads; the past is seen whole.
    decode = 4 * 4 * (2 * 16) * 512 * 32
    assert predicted("decode", flops=1.0) == pytest.approx(2 * 4 * weights + decode)


def test_a_layer_streams_its_activations() -> None:
    def activations(tokens: int, norm: int, swiglu: int) -> float:
        hidden, ffn, tables = 256, 640, 2
        numbers = 2 * norm * hidden + 2 * 3 * hidden + 2 * (8 + 2 + tables) * 32 + swiglu * ffn
        return 2.0 * tokens * numbers

    assert predicted("forward", bandwidth=1.0) == pytest.approx(activations(256, 2, 3))
    assert predicted("backward", bandwidth=1.0) == pytest.approx(activations(256, 3, 5))
    # The keys and the values of one token are read and written once more.
    assert predicted("decode", bandwidth=1.0) == pytest.approx(
        activations(4, 2, 3) + 2 * 2.0 * 2 * 4 * 2 * 32
    )


def test_an_optimizer_step_moves_28_bytes_a_weight() -> None:
    adam = models(bandwidth=1.0)["copy.bf16"]
    (found,), _ = compare_layers([layer("optimizer", precision="fp32")], {"adam_fused.fp32": adam})
    assert found.predicted == pytest.approx(28 * (sum(n * k for n, k in PRODUCTS) + 2 * 256))


def test_errors_are_of_the_sum_over_the_measured_layer() -> None:
    truth = models(launch=1e-6, flops=1e12, bandwidth=1e11)
    alone = compare_layers([layer("forward")], truth)[0][0].predicted
    samples = [layer("forward", 1.25 * alone), layer("forward", 0.8 * alone, is_compiled=True)]
    eager, compiled = compare_layers(samples, truth)[0]
    assert (eager.error, compiled.error) == (pytest.approx(-0.2), pytest.approx(0.25))
    assert compiled.sample.is_compiled


def test_gradient_layouts_without_a_model_borrow_the_forward_one() -> None:
    truth = {name: model for name, model in models(flops=1.0).items() if "grad" not in name}
    (found,), _ = compare_layers([layer("backward")], truth)
    assert found.predicted == pytest.approx(predicted("backward", flops=1.0))


def test_layers_that_cannot_be_compared_say_what_is_missing() -> None:
    truth = models()
    del truth["swiglu.bf16"]
    samples = [layer("forward"), layer("decode", is_compiled=True), layer("forward", precision="fp16")]
    found, notes = compare_layers(samples, truth)
    assert found == ()
    assert (
        notes[0]
        == "layer forward in bf16, decode in bf16, compiled: nothing to compare with, swiglu.bf16 not fitted"
    )
    assert notes[1].startswith(
        "layer forward in fp16: nothing to compare with, gemm.fp16, attention_prefill.fp16, "
    )
