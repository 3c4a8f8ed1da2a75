"""Prediction intervals: what widens them, and what they rest on."""

from __future__ import annotations

import math

import pytest

from meshwright.costmodels.interval import UNMEASURED_SOFTWARE, error_sources, prediction_interval
from meshwright.costmodels.prediction import predict


def half_width(context, plan) -> float:
    interval = prediction_interval(context, plan, 1.0)
    assert interval.low == pytest.approx(1.0 / interval.high)
    return math.log(interval.high)


def test_causes_add_up_in_squares_and_those_that_do_not_apply_are_left_out(make_context, make_plan):
    context = make_context(cluster="dgx-h100:8", precision="fp8")
    plan = make_plan(32, tp=2, pp=4, dp=8, sequence_parallel=True)
    interval = prediction_interval(context, plan, 2.0)
    assert set(interval.widths) == {
        "software megatron-core",
        "scale",
        "pipeline at scale",
        "fp8",
        "fp8 with tensor parallelism",
    }
    half = math.sqrt(sum(width**2 for width in interval.widths.values()))
    assert (interval.low, interval.high) == pytest.approx((2.0 * math.exp(-half), 2.0 * math.exp(half)))


def test_a_job_on_one_node_of_measured_software_has_the_width_of_that_software(make_context, make_plan):
    context = make_context(software="llm-foundry-fsdp1")
    interval = prediction_interval(context, make_plan(32, dp=8, sharding="zero3"), 1.0)
    assert set(interval.widths) == {"software llm-foundry-fsdp1"}
    assert interval.basis == "calibrated"
    assert interval.high < 1.03


@pytest.mark.parametrize(
    ("wider", "narrower"),
    [
        (("llama-3-8b", {"cluster": "dgx-h100:8"}, {"dp": 64}), ("llama-3-8b", {}, {"dp": 8})),
        (
            ("llama-3-8b", {"cluster": "dgx-h100:8"}, {"dp": 16, "pp": 4}),
            ("llama-3-8b", {"cluster": "dgx-h100:8"}, {"dp": 64}),
        ),
        (("llama-3-8b", {"precision": "fp8"}, {"dp": 8}), ("llama-3-8b", {}, {"dp": 8})),
        (
            ("llama-3-8b", {"precision": "fp8"}, {"dp": 4, "tp": 2}),
            ("llama-3-8b", {"precision": "fp8"}, {"dp": 8}),
        ),
        (("mixtral-8x7b", {}, {"dp": 8}), ("llama-3-8b", {}, {"dp": 8})),
        (
            ("llama-3-8b", {"software": "megatron-deepspeed-2022"}, {"dp": 8}),
            ("llama-3-8b", {"software": "megatron-2021"}, {"dp": 8}),
        ),
        (
            ("llama-3-8b", {"cluster": "l4-8:1"}, {"dp": 8}),
            ("llama-3-8b", {"cluster": "l40s-8:1"}, {"dp": 8}),
        ),
        (
            ("llama-3-8b", {"cluster": "mi300x-8:1"}, {"dp": 8}),
            ("llama-3-8b", {"cluster": "l4-8:1"}, {"dp": 8}),
        ),
    ],
    ids=["scale", "pipeline", "fp8", "fp8 over tp", "experts", "software", "borrowed", "estimate"],
)
def test_the_less_is_known_the_wider(make_context, make_plan, wider, narrower):
    widths = []
    for model, job, fields in (wider, narrower):
        context = make_context(model, **job)
        widths.append(half_width(context, make_plan(context.model.num_layers, **fields)))
    assert widths[0] > widths[1]


@pytest.mark.parametrize(
    ("cluster", "basis"),
    [
        ("dgx-h100:1", "calibrated"),
        ("hgx-h800:1", "calibrated"),
        ("l4-8:1", "prior of the same generation"),
        ("h100-pcie-8:1", "prior of the same generation"),
        ("mi300x-8:1", "data sheet only"),
        ("gaudi2-8:1", "data sheet only"),
    ],
)
def test_a_prediction_says_what_its_device_rests_on(make_context, make_plan, cluster, basis):
    prediction = predict(make_context(cluster=cluster), make_plan(32, dp=8, sharding="zero3"))
    assert prediction.basis == basis
    assert (basis in prediction.interval_widths) == (basis != "calibrated")
    assert prediction.low < prediction.iteration_time < prediction.high


def test_software_nobody_measured_is_as_wide_as_sources_predicted_without_a_fit(make_context, make_plan):
    sources = error_sources(make_context(software="megatron-deepspeed-2022"), make_plan(32, dp=8))
    assert sources["software megatron-deepspeed-2022"] == UNMEASURED_SOFTWARE


def test_a_calibration_of_the_users_own_makes_a_device_calibrated(tmp_path):
    from importlib.resources import files

    from meshwright.costmodels.calibration_choice import load_device_calibration, read_device_calibrations
    from meshwright.hardware_specs.catalog import load_gpu

    gpu = load_gpu("l4")
    own = tmp_path / "l4.json"
    text = (files("meshwright.hardware_specs") / "calibrations" / "l40s.vllm.json").read_text()
    own.write_text(text.replace('"gpu": "l40s"', '"gpu": "l4"'))
    assert load_device_calibration(gpu).basis == "prior of the same generation"
    assert read_device_calibrations([own], gpu).basis == "calibrated"
    assert not read_device_calibrations([own], gpu).is_estimate
