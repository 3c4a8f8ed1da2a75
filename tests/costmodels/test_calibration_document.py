"""Calibration files: written, read back, laid over each other, and refused when they are broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from meshwright.costmodels.calibration import AttentionCurve, CollectiveCurve, CollectiveTable
from meshwright.costmodels.calibration_document import CalibrationDocument, Provenance, device_rates, overlay
from meshwright.costmodels.calibration_reading import parse_calibration
from meshwright.costmodels.calibration_writing import calibration_text
from meshwright.costmodels.operators import (
    OPERATORS,
    OperatorError,
    OperatorModel,
    RbfResidual,
    Residual,
    RooflineCurve,
    StackedResidual,
    TreeResidual,
)
from meshwright.errors import CalibrationError, SpecError
from meshwright.hardware_specs.catalog import load_gpu

H200 = load_gpu("h200-sxm-141")
RBF = RbfResidual(
    centres=np.array([[0.0, 5.5, 2.0], [14.0, 1 / 3, 7.0]]),
    weights=np.array([0.01, -0.01]),
    offset=0.1,
    is_baked=True,
)
TREES = TreeResidual(
    roots=np.array([0, 3]),
    feature=np.array([3, 0, 0, 1, 0, 0]),
    threshold=np.array([0.7, 0.0, 0.0, 1e-7, 0.0, 0.0]),
    left=np.array([1, -1, -1, 4, -1, -1]),
    right=np.array([2, -1, -1, 5, -1, -1]),
    value=np.array([0.0, 0.1, -0.2, 0.0, 0.03, 1 / 30]),
    offset=-0.05,
)
RESIDUALS = {
    "none": None,
    "rbf": RBF,
    "trees": TREES,
    "stacked": StackedResidual(parts=(RBF, TREES), weights=(0.5, 0.5)),
}


def model_of(
    name: str = "gemm", precision: str = "bf16", residual: Residual | None = RBF, efficiency: float = 2 / 3
) -> OperatorModel:
    operator = OPERATORS[name]
    width = operator.num_dims + 1
    return OperatorModel(
        operator=operator,
        precision=precision,
        rates=device_rates(H200, name, precision),
        curve=RooflineCurve(
            launch_time=3.123e-6, compute_efficiency=efficiency, memory_efficiency=0.81, exponent=1.7
        ),
        parameters={parameter.name: parameter.initial / 3 for parameter in operator.parameters},
        residual=residual,
        box=None if residual is None else np.stack([np.zeros(width), np.full(width, 40.0)]),
        intervals={"launch": (-0.1, 0.2), "memory": (-0.2, 0.3), "compute": (-0.3, 0.1)},
        error=OperatorError(mean=0.05, p95=0.2, bias=-0.001, roofline=0.09, num_points=321),
        source="measured",
    )


def document_of(name: str = "mine", **parts: Any) -> CalibrationDocument:
    keys = ("sustained_clock", "memory_stream", "attention", "collectives")
    return CalibrationDocument(name=name, gpu=H200.id, sources=dict.fromkeys(keys, "measured"), **parts)


SIZES = np.array([1024.0, 65536.0, 2.0**30])
COLLECTIVE = CollectiveCurve(
    ranks=(2.0, 8.0),
    latency=(8.5e-6, 1.25e-5),
    link_efficiency=(0.71, 0.83),
    exponent=(1.2, 1.4),
    tables=(None, CollectiveTable(num_bytes=SIZES, seconds=np.array([1.2e-5, 1.9e-5, 4.123456e-3]))),
    link_bandwidth=450e9,
    error=0.04,
)
WHOLE = document_of(
    provenance=Provenance(
        created_by="meshwright 0",
        kernels="vllm 1",
        attribution="me",
        licence="MIT",
        inputs=(("a", "f" * 64, 7),),
    ),
    operators={"gemm.bf16": model_of()},
    sustained_clock={"bf16": 0.9, "fp8": 1.15},
    memory_stream_efficiency=0.85,
    attention={"flash_2": AttentionCurve(peak_flops_per_second=4.1e14, half_length=1200.5)},
    attention_backward_efficiency=0.75,
    collectives=dict.fromkeys(("all_reduce", "all_gather", "reduce_scatter"), COLLECTIVE),
    software={"all": {"launch_overhead": 1.5e-6}, "torchtitan": {"gradient_bytes": 4.0}},
)
TEXT = calibration_text(WHOLE)


def parsed(text: str, name: str = "mine.json") -> CalibrationDocument:
    return parse_calibration(text, name, H200)


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    """The whole document as JSON with one change."""
    mapping = json.loads(TEXT)
    change(mapping)
    return json.dumps(mapping)


def fault(text: str, name: str = "mine.json") -> str:
    with pytest.raises(SpecError) as caught:
        parsed(text, name)
    assert str(caught.value).startswith(name)
    return str(caught.value)


@pytest.mark.parametrize("kind", RESIDUALS)
def test_a_model_read_back_predicts_the_same(kind: str) -> None:
    written = model_of(residual=RESIDUALS[kind])
    again = parsed(calibration_text(document_of(operators={"gemm.bf16": written}))).operators["gemm.bf16"]
    rng = np.random.default_rng(8)
    shape = {name: np.round(2.0 ** rng.uniform(0.0, 16.0, 1000)) for name in "mnk"}
    # Seven digits of every fitted number.
    np.testing.assert_allclose(again.time(shape), written.time(shape), rtol=1e-6)
    for mine, theirs in zip(again.interval(shape), written.interval(shape), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    assert (again.error, again.source) == (written.error, "measured")


@pytest.mark.parametrize("name", ["attention_decode", "mla_prefill", "moe", "copy", "host_to_device"])
def test_every_operator_reads_back_with_its_parameters(name: str) -> None:
    written = model_of(name, residual=None)
    again = parsed(calibration_text(document_of(operators={f"{name}.bf16": written}))).operators[
        f"{name}.bf16"
    ]
    assert again.parameters == pytest.approx(written.parameters, rel=1e-8)
    assert (again.operator, again.rates) == (written.operator, written.rates)


def test_everything_else_reads_back_to_the_same_numbers() -> None:
    again = parsed(TEXT)
    for name in (
        "gpu", "provenance", "sustained_clock", "memory_stream_efficiency", "attention",
        "attention_backward_efficiency", "software",
    ):  # fmt: skip
        assert getattr(again, name) == getattr(WHOLE, name)
    for name, curve in again.collectives.items():
        expected = WHOLE.collectives[name]
        assert curve.ranks == expected.ranks
        assert (curve.latency, curve.exponent) == (expected.latency, expected.exponent)
        assert (curve.link_bandwidth, curve.error) == (450e9, 0.04)
        assert curve.tables[0] is None
        assert curve.tables[1] is not None
        np.testing.assert_array_equal(curve.tables[1].seconds, expected.tables[1].seconds)


def test_writing_what_was_read_gives_the_same_bytes() -> None:
    again = parsed(TEXT)
    assert calibration_text(again) == TEXT
    assert again.digest == parsed(TEXT).digest != parsed(TEXT.replace("0.85", "0.86")).digest


def test_a_json_text_means_the_same_as_yaml() -> None:
    assert calibration_text(parsed(TEXT, "mine.yaml")) == TEXT


def test_a_table_is_flat_below_its_sizes_and_keeps_its_bandwidth_above() -> None:
    table = COLLECTIVE.tables[1]
    assert table is not None
    seconds = table.time(np.array([1.0, 8192.0, 2.0**31]))
    # 8,192 is halfway between 1,024 and 65,536 on a log scale.
    np.testing.assert_allclose(seconds, [1.2e-5, np.sqrt(1.2e-5 * 1.9e-5), 2 * 4.123456e-3])


def test_later_documents_win_part_by_part() -> None:
    faster = model_of(efficiency=0.9, residual=None)
    later = document_of(
        "later",
        operators={"gemm.bf16": faster},
        sustained_clock={"bf16": 0.5},
        software={"torchtitan": {"gradient_bytes": 2.0}},
    )
    both = overlay((WHOLE, later), "given", is_estimate=False)
    assert both.operators["gemm.bf16"] is faster
    assert both.sustained_clock == {"bf16": 0.5, "fp8": 1.15}
    assert both.memory_stream_efficiency == 0.85
    assert both.software == {"all": {"launch_overhead": 1.5e-6}, "torchtitan": {"gradient_bytes": 2.0}}
    assert both.id == "mine+later"
    assert overlay((later, WHOLE), "given", is_estimate=False).clock("bf16") == 0.9


@pytest.mark.parametrize(
    ("part", "nothing", "named"),
    [
        ("operators", {}, "operators.gemm.bf16"),
        ("sustained_clock", {}, "sustained_clock.bf16"),
        ("memory_stream_efficiency", None, "memory_stream.efficiency"),
        ("attention", {}, "attention.flash_2"),
        ("attention_backward_efficiency", None, "attention.backward_efficiency"),
        ("collectives", {}, "collectives.all_reduce, collectives.all_gather, collectives.reduce_scatter"),
    ],
)
def test_a_missing_part_is_named(part: str, nothing: object, named: str) -> None:
    with pytest.raises(
        CalibrationError, match=f"calibration mine lacks {named}, which every prediction needs"
    ):
        overlay((replace(WHOLE, **{part: nothing}),), "given", is_estimate=False)


GEMM = ("operators", "gemm.bf16")


def put(*keys: Any, value: object) -> Callable[[dict[str, Any]], object]:
    """A change that sets one value below nested keys."""

    def change(mapping: Any) -> None:
        for key in keys[:-1]:
            mapping = mapping[key]
        mapping[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("schema_version", value=1), "schema_version: this release reads version 2, not 1; calibrate again"),
        (put("schema_version", value=9), "schema_version: this release reads version 2, not 9; calibrate again"),
        (put("kind", value="training_plan"), "is not a calibration (kind: calibration is missing)"),
        (put("operatorz", value={}), "operatorz: unknown key"),
        (put("provenance", "kernelz", value="x"), "provenance.kernelz: unknown key"),
        (put("provenance", "inputs", 0, "sha", value="x"), "provenance.inputs[0].sha: unknown key"),
        (put("sustained_clock", "bf17", value=1), "sustained_clock.bf17: unknown key"),
        (put("memory_stream", "efficency", value=1), "memory_stream.efficency: unknown key"),
        (put("attention", "flush_3", value={}), "attention.flush_3: unknown key; did you mean 'flash_3'?"),
        (put("attention", "flash_2", "peak", value="0 TFLOP/s"), "attention.flash_2.peak: must be above zero"),
        (put("attention", "flash_2", "half", value=1), "attention.flash_2.half: unknown key"),
        (put("attention", "backward_efficiency", value=-1), "backward_efficiency: must be above zero"),
        (put("collectives", "all_to_al", value=[]), "collectives.all_to_al: unknown key; did you mean 'all_to_all'?"),
        (put("collectives", "all_reduce", value=[]), "collectives.all_reduce has no measured group size"),
        (put("collectives", "all_reduce", 0, "ranks", value=8), "in ascending order, each once"),
        (put("collectives", "all_reduce", 0, "latency", value="-8 us"), "must be a finite quantity, not negative"),
        (put("collectives", "all_reduce", 0, "latency", value="0 us"), "all_reduce[0].latency: must be above zero"),
        (put("collectives", "all_reduce", 0, "rank", value=2), "all_reduce[0].rank: unknown key"),
        (put("collectives", "all_reduce", 1, "seconds", value=[1, 2]), "sizes must ascend, each with its time"),
        (put("collectives", "all_reduce", 1, "seconds", value=[3, 2, 1]), "times may not fall"),
        (put("collectives", "all_reduce", 1, "num_bytes", value=[0, 1, 2]), "must be above zero"),
        (put("collectives", "link", value=None), "collectives.link: tables of times need the bandwidth"),
        (put("operators", "gem.bf16", value={}), "unknown operator 'gem'; did you mean 'gemm'?"),
        (put("operators", "gemm", value={}), "write OPERATOR.PRECISION"),
        (put("operators", "moe.bf16", value={"source": "x"}), "operators.moe.bf16.parameters: lacks padding,"),
        (put(*GEMM, "launch", value="1 us"), "operators.gemm.bf16.launch: unknown key"),
        (put(*GEMM, "parameters", value={"padding": 1}), "gemm.bf16.parameters.padding: unknown key"),
        (put(*GEMM, "exponent", value=0), "operators.gemm.bf16.exponent: must be above zero"),
        (put(*GEMM, "interval", "launch", value=[0.1, -0.1]), "write [P10, P90]"),
        (put(*GEMM, "interval", "lunch", value=[0, 0]), "interval.lunch: unknown key"),
        (put(*GEMM, "error", "median", value=0.1), "error.median: unknown key"),
        (put(*GEMM, "box", value=[0, 1]), "box: a residual needs the 2 x 4 bounds of what was sampled"),
        (put(*GEMM, "box", value=None), "box: a residual needs the 2 x 4 bounds"),
        (put(*GEMM, "residual", value=None), "box: a residual needs the 2 x 4 bounds"),
        (put(*GEMM, "box", value=[9, 9, 9, 9, 0, 0, 0, 0]), "box: lower bounds come first"),
        (put(*GEMM, "residual", "kind", value="rbff"), "unknown kind 'rbff'; did you mean 'rbf'?"),
        (put(*GEMM, "residual", "epsilon", value=1), "residual.epsilon: unknown key"),
        (put(*GEMM, "residual", "weights", value=[1]), "centres: must hold 3 numbers for each of the 1 weights"),
        (put(*GEMM, "residual", "centres", value=[1, 2]), "centres: must hold 3 numbers for each of the 2 weights"),
        (put(*GEMM, "residual", value={"kind": "rbf", "offset": 0, "centres": [], "weights": []}), "centres: must hold"),
        (put(*GEMM, "residual", "centres", value=[0, 0, 0, 1e5, 1e5, 1e5]), "centres: are log2 of sizes"),
        (put(*GEMM, "residual", value={"kind": "stacked", "weights": [1], "parts": []}), "one for each of the 0 parts"),
        (put(*GEMM, "residual", value={"kind": "stacked", "weights": [1], "parts": [{"kind": "stacked"}]}), "unknown kind"),
    ],
)  # fmt: skip
def test_a_changed_file_is_refused_by_key(change: Callable[[dict[str, Any]], object], message: str) -> None:
    text = changed(change)
    assert message in fault(text)
    # JSON is YAML too, read by another parser through the same checks.
    assert message in fault(text, "mine.yaml")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("left", [0, -1, -1, 4, -1, -1]),  # its own child: an endless loop
        ("left", [1, -1, -1, 1, -1, -1]),  # a child before its parent
        ("right", [9, -1, -1, 5, -1, -1]),
        ("right", [-1, -1, -1, 5, -1, -1]),
        ("roots", [0, 6]),
        ("roots", [-1]),
        ("feature", [16, 0, 0, 1, 0, 0]),  # products have 3 coordinates and 13 steps
        ("feature", [-1, 0, 0, 1, 0, 0]),
        ("value", [0, 1]),
        ("threshold", [0.5]),
        ("left", [1.5, -1, -1, 4, -1, -1]),
        ("left", [1e300, -1, -1, 4, -1, -1]),
        ("left", [2, -1, -1, 4, -1, -1]),  # two parents
    ],
)
def test_trees_that_would_loop_or_read_beyond_their_arrays_are_refused(key: str, values: list[float]) -> None:
    mapping = json.loads(calibration_text(document_of(operators={"gemm.bf16": model_of(residual=TREES)})))
    mapping["operators"]["gemm.bf16"]["residual"][key] = values
    assert "the file was changed, calibrate again" in fault(json.dumps(mapping))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT[: len(TEXT) // 2], "the file ends too early; it is truncated"),
        ("", "the file ends too early; it is truncated"),
        (TEXT.replace('"exponent": 1.7', '"exponent": NaN', 1), "NaN is not a finite number"),
        (TEXT.replace('"exponent": 1.7', '"exponent": 1e999', 1), "is not a finite number"),
        (TEXT.replace('"offset": 0.1', '"offset": ' + "9" * 5000, 1), "not finite"),
        (TEXT.replace('"weights": [0.01', '"weights": [' + "9" * 400, 1), "not finite"),
        (
            TEXT.replace('"exponent": 1.7', '"exponent": 1.7, "exponent": 2', 1),
            "key 'exponent' is given twice",
        ),
        ("[1, 2]", "expected an object {...} at the top"),
        ('{"model_type": "llama"}', "is not a calibration (kind: calibration is missing)"),
        ("kind: calibration", "not valid JSON"),
    ],
)
def test_a_text_that_is_no_calibration_is_refused(text: str, message: str) -> None:
    assert message in fault(text)


def test_lists_nested_without_end_are_refused() -> None:
    assert "nested deeper than" in fault('{"a": ' + "[" * 100_000)
