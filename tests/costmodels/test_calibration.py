from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from meshwright.costmodels.calibration_choice import load_device_calibration, read_device_calibrations
from meshwright.costmodels.context import CostContext, cost_context
from meshwright.costmodels.prediction import predict
from meshwright.errors import CalibrationError, SpecError
from meshwright.hardware_specs.catalog import list_specs, load_gpu
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

MakeContext = Callable[..., CostContext]
MakePlan = Callable[..., ParallelPlan]
BUILT_IN = files("meshwright.hardware_specs") / "calibrations"
OWN = {entry.name.removesuffix(".yaml") for entry in BUILT_IN.iterdir() if entry.name.endswith(".yaml")}
H100_TEXT = (BUILT_IN / "h100-sxm-80.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list_specs("gpu"))
def test_every_built_in_gpu_has_or_borrows_a_calibration_and_says_which(name: str) -> None:
    gpu = load_gpu(name)
    calibration = load_device_calibration(gpu)
    lender = calibration.id.split("+")[-1]
    if name in OWN:
        assert lender == name
        assert name in calibration.reason or calibration.reason.startswith("estimate")
        return
    assert name in calibration.reason
    assert lender in calibration.reason
    if calibration.is_estimate:
        assert f"borrows that of {lender} ({gpu.architecture})" in calibration.reason


@pytest.mark.parametrize("name", list_specs("gpu"))
def test_every_calibration_can_price_every_format_and_collective(name: str) -> None:
    gpu = load_gpu(name)
    calibration = load_device_calibration(gpu)
    for precision in gpu.peak_flops_per_second:
        curve = calibration.gemm_curve(precision)
        assert 0.0 < curve.compute_efficiency <= 1.0
        assert 0.0 < curve.memory_efficiency <= 1.0
        assert 0.0 < calibration.clock(precision) < 1.3
    for kernel in ("flash_2", "flash_3"):
        assert (
            0.0
            < calibration.attention_curve(kernel).peak_flops_per_second
            < max(gpu.peak_flops_per_second.values())
        )
    for collective in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        curves = calibration.collectives[collective]
        assert list(curves.ranks) == sorted(set(curves.ranks))
        assert len(curves.ranks) == len(curves.latency) == len(curves.link_efficiency) == len(curves.exponent)


def test_an_estimate_is_marked_and_widens_the_interval(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    assert load_device_calibration(load_gpu("mi300x")).is_estimate
    assert not load_device_calibration(load_gpu("h100-sxm-80")).is_estimate
    widths = []
    for cluster in ("dgx-h100:1", "mi300x-8:1"):
        prediction = predict(make_context(cluster=cluster), make_plan(dp=8, sharding="zero1"))
        assert prediction.low < prediction.iteration_time < prediction.high
        widths.append((prediction.high - prediction.low) / prediction.iteration_time)
    assert widths[0] < widths[1]


def test_the_500_watt_h100_sustains_a_slower_clock() -> None:
    slow, fast = (load_device_calibration(load_gpu(name)) for name in ("h100-sxm-96-hbm2e", "h100-sxm-80"))
    for precision in ("bf16", "fp8"):
        assert slow.clock(precision) < fast.clock(precision)


def test_a_borrowed_clock_falls_with_the_power_limit() -> None:
    # The same die and peak at 300 instead of 400 W: (3/4) ** 0.7 of the lender's clock.
    lender, borrower = (load_device_calibration(load_gpu(name)) for name in ("a100-sxm-80", "a100-pcie-80"))
    expected = lender.clock("bf16") * (300 / 400) ** 0.7
    assert borrower.clock("bf16") == pytest.approx(expected)


def test_formats_without_a_curve_borrow_a_wider_one() -> None:
    calibration = load_device_calibration(load_gpu("h100-sxm-80"))
    assert calibration.gemm("mxfp8") is calibration.operators["gemm.fp8"]
    assert calibration.gemm("fp16") is calibration.operators["gemm.bf16"]
    assert calibration.attention_curve("flash_4") is calibration.attention["flash_2"]


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def job_of(context: CostContext) -> TrainingJob:
    return TrainingJob(
        model=context.model,
        cluster=context.cluster,
        workload=context.workload,
        software=context.software.id,
    )


def test_a_copy_of_the_built_in_file_predicts_the_same(
    make_context: MakeContext, make_plan: MakePlan, tmp_path: Path
) -> None:
    context = make_context()
    copy = written(tmp_path, H100_TEXT)
    own = cost_context(job_of(context), calibration_paths=[copy])
    plan = make_plan(dp=8, sharding="zero1")
    assert predict(own, plan).iteration_time == predict(context, plan).iteration_time
    assert own.calibration.reason.startswith(f"given as {copy}; what it lacks: built-in")
    assert not own.calibration.is_estimate


def test_a_users_clock_changes_the_prediction(
    make_context: MakeContext, make_plan: MakePlan, tmp_path: Path
) -> None:
    context = make_context("llama-3-70b", "dgx-h100:8", batch=64, length=8192)
    slower = written(tmp_path, H100_TEXT.replace("  bf16: 0.9\n", "  bf16: 0.6\n"))
    own = cost_context(job_of(context), calibration_paths=[slower])
    assert own.calibration.clock("bf16") == 0.6
    plan = make_plan(80, dp=4, tp=8, pp=2, sharding="zero1")
    ratio = predict(own, plan).iteration_time / predict(context, plan).iteration_time
    # Most of the step is tensor work, which takes 0.9 / 0.6 as long.
    assert 1.2 < ratio < 1.5


def test_the_last_file_that_names_the_device_wins(tmp_path: Path) -> None:
    gpu = load_gpu("h100-sxm-80")
    first = written(tmp_path, H100_TEXT.replace("  bf16: 0.9\n", "  bf16: 0.8\n"), "first.yaml")
    second = written(tmp_path, H100_TEXT.replace("  bf16: 0.9\n", "  bf16: 0.7\n"), "second.yaml")
    other = written(tmp_path, (BUILT_IN / "a100-sxm-80.yaml").read_text(encoding="utf-8"), "a100.yaml")
    assert read_device_calibrations([first, second, other], gpu).clock("bf16") == 0.7
    assert read_device_calibrations([second, first], gpu).clock("bf16") == 0.8


def test_a_file_for_another_device_is_refused_by_name(tmp_path: Path) -> None:
    path = written(tmp_path, H100_TEXT)
    with pytest.raises(CalibrationError, match=r"for a100-sxm-80: the files are for h100-sxm-80"):
        read_device_calibrations([path], load_gpu("a100-sxm-80"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  efficiency: 0.87\n", "", r"mine\.yaml:\d+: memory_stream\.efficiency: is required"),
        ("launch_time: 3.04 us", "launch_time: 3.04", r"mine\.yaml:\d+: .*launch_time"),
        ("peak: 400 TFLOP/s", "peak: 400 GB/s", r"mine\.yaml:\d+: .*peak"),
        ("gemm.fp8:", "gem.fp8:", r"mine\.yaml:\d+: .*unknown operator 'gem'; did you mean 'gemm'"),
        (
            "schema_version: 2",
            "schema_version: 9",
            r"mine\.yaml:\d+: schema_version: this release reads version 2",
        ),
        ("kind: calibration", "kind: plan", r"mine\.yaml: is not a calibration"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in H100_TEXT
    path = written(tmp_path, H100_TEXT.replace(old, new, 1))
    with pytest.raises(SpecError, match=message):
        read_device_calibrations([path], load_gpu("h100-sxm-80"))


def test_an_empty_file_is_no_calibration(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is empty"):
        read_device_calibrations([written(tmp_path, "")], load_gpu("h100-sxm-80"))
