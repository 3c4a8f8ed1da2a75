"""From measurements of known truth to a whole calibration."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.calibration_document import device_rates
from meshwright.costmodels.calibration_reading import parse_calibration
from meshwright.costmodels.calibration_writing import calibration_text
from meshwright.costmodels.operators import OPERATORS, RbfResidual, RooflineCurve, roofline_time
from meshwright.errors import CalibrationError
from meshwright.hardware_specs.catalog import load_gpu
from meshwright.profiler.fitting.attention import fit_attention_curve
from meshwright.profiler.fitting.calibrate import calibrate
from meshwright.profiler.fitting.operator import FitSettings
from meshwright.profiler.measurements import (
    CollectiveSamples,
    LayerSample,
    MeasuredConstant,
    Measurements,
    OperatorSamples,
)

H200 = load_gpu("h200-sxm-141")
SMOOTH_ONLY = FitSettings(with_trees=False)
LAYER = {
    "hidden_size": 128.0,
    "ffn_hidden_size": 256.0,
    "num_heads": 4.0,
    "num_kv_heads": 4.0,
    "head_dim": 32.0,
}
CURVE = RooflineCurve(launch_time=4e-6, compute_efficiency=0.65, memory_efficiency=0.8, exponent=1.8)


def products(
    name: str, count: int, curve: RooflineCurve = CURVE, seed: int = 0, precision: str = "bf16"
) -> OperatorSamples:
    """Products of a roofline under a deviation that all layouts share."""
    rng = np.random.default_rng(seed)
    shape = {field: np.round(2.0 ** rng.uniform(6.0, 14.0, count)) for field in "mnk"}
    deviation = 0.15 * np.sin(np.log2(np.column_stack(list(shape.values()))) / 2.0).sum(axis=1)
    rates = device_rates(H200, name, precision)
    seconds = roofline_time(OPERATORS[name].work(shape, precision, rates, {}), curve, rates) * np.exp(
        deviation
    )
    return OperatorSamples(
        operator=name, precision=precision, shape=shape, seconds=seconds, source=f"made-up {name}"
    )


def prefill(peak: float = 6e14, half_length: float = 1500.0, width: float = 128.0) -> OperatorSamples:
    """Causal attention along the curve that training uses (see costmodels/layer.py)."""
    batch, length, heads = (
        grid.ravel() for grid in np.meshgrid([1.0, 4.0], 2.0 ** np.arange(7, 15), [8.0, 32.0], indexing="ij")
    )
    rate = peak * length / (length + half_length + 8000.0 / (batch * heads))
    shape = {
        "batch_size": batch,
        "sequence_length": length,
        "num_heads": heads,
        "num_kv_heads": np.full(len(batch), 8.0),
        "head_dim": np.full(len(batch), width),
    }
    return OperatorSamples(
        operator="attention_prefill",
        precision="bf16",
        shape=shape,
        seconds=2.0 * batch * heads * length**2 * width / rate,
        source="made-up attention",
    )


def adam() -> OperatorSamples:
    """Optimizer steps at 3 TB/s after 2 us."""
    num_bytes = 2.0 ** np.arange(16, 34, 2)
    return OperatorSamples(
        operator="adam_fused",
        precision="fp32",
        shape={"num_bytes": num_bytes},
        seconds=2e-6 + num_bytes / 3e12,
        source="made-up adam",
    )


def measured(*operators: OperatorSamples, **more: object) -> Measurements:
    return replace(Measurements(gpu=H200.id, kernels="made up 1", operators=operators), **more)


def collective(name: str = "all_reduce") -> CollectiveSamples:
    sizes = 2.0 ** np.arange(10, 30)
    return CollectiveSamples(
        collective=name, ranks=8, num_bytes=sizes, seconds=1e-5 + sizes / 3e11, source="made-up nccl"
    )


def test_the_attention_curve_is_recovered_from_lengths_of_512_and_more() -> None:
    samples = prefill()
    # Shorter sequences follow no curve of training, and do not count.
    samples.seconds[samples.shape["sequence_length"] < 512.0] *= 3.0
    curve = fit_attention_curve(samples)
    assert curve is not None
    assert curve.peak_flops_per_second == pytest.approx(6e14, rel=0.001)
    assert curve.half_length == pytest.approx(1500.0, rel=0.001)


def test_other_widths_and_too_few_lengths_give_no_attention_curve() -> None:
    assert fit_attention_curve(prefill(width=64.0)) is None
    assert fit_attention_curve(prefill().take(np.arange(11))) is None


def test_a_gradient_layout_takes_the_forwards_residual_over_a_roofline_of_its_own() -> None:
    slower = replace(CURVE, compute_efficiency=0.5, launch_time=6e-6)
    forward, backward = products("gemm", 300), products("gemm_dgrad", 60, slower, seed=1)
    result = calibrate(measured(backward, forward), H200, SMOOTH_ONLY)
    model = result.document.operators["gemm_dgrad.bf16"]
    assert model.residual is result.document.operators["gemm.bf16"].residual
    assert model.source == "made-up gemm_dgrad; residual of gemm"
    unseen = products("gemm_dgrad", 500, slower, seed=2)
    errors = np.abs(model.time(unseen.shape) / unseen.seconds - 1.0)
    assert errors.mean() < 0.03
    alone = calibrate(measured(backward), H200, SMOOTH_ONLY).document.operators["gemm_dgrad.bf16"]
    assert errors.mean() < np.abs(alone.time(unseen.shape) / unseen.seconds - 1.0).mean()
    # What the error says is of the times as measured.
    assert model.error is not None
    assert model.error.mean == pytest.approx(errors.mean(), abs=0.02)


@pytest.mark.parametrize("precision", ["fp8", "fp16", "fp32", "tf32"])
def test_the_few_gradients_of_other_formats_make_a_roofline_of_their_own(precision: str) -> None:
    slower = replace(CURVE, compute_efficiency=0.5, launch_time=6e-6)
    forward = products("gemm", 100, precision=precision)
    backward = products("gemm_wgrad", 16, slower, seed=1, precision=precision)
    models = calibrate(measured(forward, backward), H200, SMOOTH_ONLY).document.operators
    own, forward_model = models[f"gemm_wgrad.{precision}"], models[f"gemm.{precision}"]
    assert own.residual is forward_model.residual
    unseen = products("gemm_wgrad", 300, slower, seed=2, precision=precision)
    error, borrowed = (
        np.abs(model.time(unseen.shape) / unseen.seconds - 1.0).mean() for model in (own, forward_model)
    )
    assert error < 0.07 < borrowed


def test_a_gradient_layout_that_shares_no_deviation_keeps_its_bare_roofline() -> None:
    forward, backward = products("gemm", 100), products("gemm_dgrad", 16, seed=1)
    rates = device_rates(H200, "gemm_dgrad", "bf16")
    work = OPERATORS["gemm_dgrad"].work(backward.shape, "bf16", rates, {})
    backward = replace(backward, seconds=roofline_time(work, CURVE, rates))
    model = calibrate(measured(forward, backward), H200, SMOOTH_ONLY).document.operators["gemm_dgrad.bf16"]
    assert model.residual is None
    assert model.error is not None
    assert model.error.mean < 0.03


def test_a_gradient_layout_of_many_shapes_stands_on_its_own() -> None:
    result = calibrate(measured(products("gemm", 60), products("gemm_wgrad", 200, seed=1)), H200, SMOOTH_ONLY)
    forward, own = (result.document.operators[f"{name}.bf16"] for name in ("gemm", "gemm_wgrad"))
    assert isinstance(own.residual, RbfResidual)
    assert own.residual is not forward.residual
    assert own.source == "made-up gemm_wgrad"


def test_everything_measured_is_in_the_document_with_its_source() -> None:
    constants = {
        "sustained_clock.bf16": MeasuredConstant(value=0.91, source="an hour"),
        "memory_stream.efficiency": MeasuredConstant(value=0.87, source="copies"),
        "attention.backward_efficiency": MeasuredConstant(value=0.7, source="backward"),
        "software.all.fsdp_contention": MeasuredConstant(value=1.1, source="overlap"),
    }
    made = measured(
        products("gemm", 60), prefill(), collectives=(collective(),), constants=constants, attribution="me",
        licence="MIT", inputs=(("a.jsonl", "0" * 64, 92),),
    )  # fmt: skip
    document = calibrate(made, H200, SMOOTH_ONLY, name="mine").document
    assert (document.name, document.gpu) == ("mine", H200.id)
    assert list(document.operators) == ["gemm.bf16", "attention_prefill.bf16"]
    assert document.sustained_clock == {"bf16": 0.91}
    assert document.memory_stream_efficiency == 0.87
    assert document.attention_backward_efficiency == 0.7
    assert document.attention["flash_3"].half_length == pytest.approx(1500.0, rel=0.001)
    assert document.software == {"all": {"fsdp_contention": 1.1}}
    assert document.collectives["all_reduce"].link_bandwidth == H200.scale_up.bandwidth_bytes_per_second  # type: ignore[union-attr]
    assert document.sources["sustained_clock"] == "an hour"
    assert document.sources["collectives"] == "made-up nccl"
    provenance = document.provenance
    assert (provenance.kernels, provenance.attribution, provenance.licence) == ("made up 1", "me", "MIT")
    assert provenance.inputs == (("a.jsonl", "0" * 64, 92),)
    # Each part is written with its source, and read back.
    assert calibration_text(
        parse_calibration(calibration_text(document), "mine.json", H200)
    ) == calibration_text(document)


@pytest.mark.parametrize(
    "more",
    [{"attention.backward_efficiency": 0.7}, {"memory_stream.efficiency": 0.8}, {"sustained_clock.fp8": 1.1}],
)
def test_a_single_constant_is_a_calibration(more: dict[str, float]) -> None:
    constants = {name: MeasuredConstant(value=value, source="once") for name, value in more.items()}
    text = calibration_text(calibrate(measured(constants=constants), H200).document)
    assert "once" in text
    parse_calibration(text, "mine.json", H200)


def test_collectives_alone_are_a_calibration() -> None:
    document = calibrate(measured(collectives=(collective(), collective("all_gather"))), H200).document
    assert list(document.collectives) == ["all_gather", "all_reduce"]
    assert not document.operators


def test_an_operator_with_too_few_shapes_is_left_out_with_a_note() -> None:
    result = calibrate(measured(products("gemm", 60), products("gemm_dgrad", 5)), H200, SMOOTH_ONLY)
    assert list(result.document.operators) == ["gemm.bf16"]
    assert result.notes == ("gemm_dgrad.bf16: 5 measured shapes are too few; measure at least 7 more",)


def test_collectives_cut_short_are_left_out_with_a_note_when_others_can_be_fitted() -> None:
    whole = collective()
    cut = replace(whole, num_bytes=whole.num_bytes[:3], seconds=whole.seconds[:3])
    result = calibrate(measured(products("gemm", 60), collectives=(cut,)), H200, SMOOTH_ONLY)
    assert list(result.document.operators) == ["gemm.bf16"]
    assert result.document.collectives == {}
    assert any("3 message sizes are too few" in note for note in result.notes)
    with pytest.raises(CalibrationError, match="3 message sizes are too few"):
        calibrate(measured(collectives=(cut,)), H200, SMOOTH_ONLY)


def test_what_no_part_of_a_calibration_takes_is_said() -> None:
    constants = {
        name: MeasuredConstant(value=1.0, source="once")
        for name in (
            "launch.kernel",
            "sustained_clock.bf16",
            "sustained.bf16.power_watts.after",
            "contention.copy",
        )
    }
    sends = [replace(collective("send"), ranks=ranks) for ranks in (2, 4)]
    layers = tuple(
        LayerSample(step="optimizer", precision=precision, is_compiled=False, shape=LAYER, seconds=1e-3)
        for precision in ("fp32", "bf16")
    )
    made = measured(
        adam(),
        collectives=(collective(), *sends, collective("broadcast")),
        constants=constants,
        layers=layers,
    )
    result = calibrate(made, H200, SMOOTH_ONLY)
    assert result.notes == (
        "launch.kernel, sustained.bf16.power_watts.after, contention.copy: no cost model takes them",
        "send: 40 samples; collectives of other kinds than all_reduce, all_gather, reduce_scatter, all_to_all "
        "are not fitted",
        "broadcast: 20 samples; collectives of other kinds than all_reduce, all_gather, reduce_scatter, all_to_all "
        "are not fitted",
        "layer optimizer in bf16: nothing to compare with, adam_fused.bf16 not fitted",
    )
    (compared,) = result.layers
    weights = 3 * 128 * 128 + 128 * 128 + 3 * 128 * 256 + 2 * 128
    assert compared.predicted == pytest.approx(2e-6 + 28 * weights / 3e12, rel=0.05)


def test_nothing_to_fit_is_an_error_that_says_how_many_more() -> None:
    with pytest.raises(
        CalibrationError, match=r"^gemm\.bf16: 4 measured shapes are too few; measure at least 8"
    ):
        calibrate(measured(products("gemm", 4)), H200)
    with pytest.raises(CalibrationError, match=f"nothing to calibrate {H200.id} with: .* at least 12 shapes"):
        calibrate(measured(), H200)
    with pytest.raises(
        CalibrationError, match=r"collective of a known bus bandwidth \(all_reduce, all_gather,"
    ):
        calibrate(measured(collectives=(collective("broadcast"),)), H200)


def test_equal_seeds_give_equal_bytes() -> None:
    made = measured(products("gemm", 120), collectives=(collective(),))
    texts = [
        calibration_text(calibrate(made, H200, FitSettings(max_points=40, seed=seed)).document)
        for seed in (3, 3, 4)
    ]
    assert texts[0] == texts[1] != texts[2]
