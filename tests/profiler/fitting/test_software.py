"""Software constants come back from iterations made with them, and from a few rows of a public source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshwright.costmodels.calibration_document import CalibrationDocument
from meshwright.costmodels.calibration_reading import parse_calibration
from meshwright.costmodels.calibration_writing import calibration_text
from meshwright.costmodels.context import CostContext, cost_context
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.software import load_software
from meshwright.errors import CalibrationError, SpecError
from meshwright.hardware_specs.catalog import load_gpu
from meshwright.profiler.fitting.software import SoftwareFit, fit_software, software_documents
from meshwright.profiler.measured_runs import COLUMNS, MeasuredRun, read_measured_runs
from meshwright.profiler.measured_setup import MeasuredSetup, measured_setup
from meshwright.simcore.training.iteration import iteration_time

TABLE = Path(__file__).parents[2] / "validation" / "training_runs.csv"

# Llama 3 8B under ZeRO-3 on DGX H100: batch, length and GPUs of six iterations that differ in what bounds them.
SHAPES = ((1, 2048, 8), (8, 2048, 8), (1, 8192, 16), (4, 8192, 64), (1, 32768, 8), (2, 4096, 256))


def run_of(micro_batch: int, length: int, num_gpus: int, seconds: float = 1.0) -> MeasuredRun:
    cells = dict.fromkeys(COLUMNS, "") | {
        "id": f"row-{micro_batch}-{length}-{num_gpus}",
        "model": "llama3-8b",
        "gpu": "H100-80GB-SXM",
        "n_gpus": str(num_gpus),
        "seq_len": str(length),
        "tp": "1",
        "pp": "1",
        "sharding": "zero3",
        "recompute": "full",
        "micro_batch": str(micro_batch),
        "global_batch": str(micro_batch * num_gpus),
        "precision": "bf16",
    }
    return MeasuredRun(
        id=cells["id"],
        source="here",
        quality="ok",
        measured="time",
        measured_seconds=seconds,
        measured_memory_bytes=None,
        cells=cells,
    )


def setup_of(run: MeasuredRun, software: str) -> tuple[CostContext, MeasuredSetup]:
    setup = measured_setup(replace(run, cells={**run.cells, "software": software}))
    context = cost_context(setup.job, features=setup.features, attention_kernel=setup.attention_kernel)
    return context, setup


def truth(noise: float = 0.0, clock: float = 0.9, **constants: float) -> list[MeasuredRun]:
    """Iterations of torchtitan with other constants than its generation's."""
    generator = np.random.default_rng(7)
    runs = []
    for shape in SHAPES:
        run = run_of(*shape)
        context, setup = setup_of(run, "torchtitan")
        calibration = replace(
            context.calibration, sustained_clock={**context.calibration.sustained_clock, "bf16": clock}
        )
        context = replace(context, software=replace(context.software, **constants), calibration=calibration)
        seconds = iteration_time(iteration_costs(context, setup.plan), "none")
        runs.append(replace(run, measured_seconds=seconds * (1.0 + noise * generator.uniform(-1.0, 1.0))))
    return runs


def test_constants_come_back_from_iterations_made_with_them() -> None:
    runs = truth(noise=0.01, attention_efficiency=0.6, fixed_time=0.1)
    fit = fit_software(runs, "torchtitan", constants=("attention_efficiency", "fixed_time"))
    assert fit.constants["attention_efficiency"] == pytest.approx(0.6, rel=0.05)
    assert fit.constants["fixed_time"] == pytest.approx(0.1, abs=0.015)
    started = load_software("torchtitan")
    assert fit.prior == {
        "attention_efficiency": started.attention_efficiency,
        "fixed_time": started.fixed_time,
    }
    assert set(fit.standard_errors) == {"attention_efficiency", "fixed_time"}
    assert fit.error_after.mean < 0.01 < fit.error_before.mean


def test_the_clock_of_the_device_comes_back() -> None:
    fit = fit_software(truth(clock=0.8), "torchtitan", constants=("sustained_clock.bf16",))
    assert fit.sustained_clock["h100-sxm-80"]["bf16"] == pytest.approx(0.8, rel=0.01)
    assert fit.constants == {}


def test_chosen_constants_predict_the_rows_they_did_not_see() -> None:
    runs = truth(noise=0.005, clock=0.8, attention_efficiency=0.6)
    fit = fit_software(runs, "torchtitan")
    assert 1 <= len(fit.prior) <= len(runs) // 2
    assert fit.error_left_out.mean < 0.5 * fit.error_before.mean
    assert fit.error_left_out.mean < 0.03


def test_nothing_is_fitted_to_a_stack_that_is_as_assumed() -> None:
    fit = fit_software(truth(), "torchtitan")
    assert (fit.constants, fit.sustained_clock) == ({}, {})
    assert fit.error_left_out == fit.error_before


def test_one_odd_row_does_not_bend_the_others() -> None:
    runs = truth(clock=0.8)
    odd = replace(runs[1], measured_seconds=1.5 * (runs[1].measured_seconds or 0.0))
    fit = fit_software([runs[0], odd, *runs[2:]], "torchtitan", constants=("sustained_clock.bf16",))
    assert fit.sustained_clock["h100-sxm-80"]["bf16"] == pytest.approx(0.8, rel=0.03)


def test_too_few_rows_say_how_many_more_are_needed() -> None:
    untimed = replace(run_of(1, 2048, 8), id="no-time", measured_seconds=None)
    with pytest.raises(
        CalibrationError, match=r"2 usable, 1 more needed; row no-time: states no measured time"
    ):
        fit_software([*truth()[:2], untimed], "torchtitan")


def test_more_constants_than_rows_support_are_refused() -> None:
    wanted = ("attention_efficiency", "fixed_time", "fsdp_contention", "elementwise_factor")
    with pytest.raises(
        CalibrationError, match="4 constants take 8 measured iterations, two each: 2 more needed"
    ):
        fit_software(truth(), "torchtitan", constants=wanted)


def test_constants_that_rows_cannot_tell_apart_are_refused() -> None:
    alike = [run_of(1, 2048, num_gpus, 1.0) for num_gpus in (8, 8, 8, 8)]
    with pytest.raises(CalibrationError, match=r"cannot be told apart: .*add 1 row"):
        fit_software(alike, "torchtitan", constants=("fixed_time", "fsdp_contention"))


def test_a_constant_no_row_depends_on_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no measured iteration depends on tp_overlap"):
        fit_software(truth(), "torchtitan", constants=("tp_overlap",))


def test_a_clock_the_device_does_not_have_is_refused() -> None:
    on_a100 = [replace(run, cells={**run.cells, "gpu": "A100-80GB-SXM"}) for run in truth()]
    with pytest.raises(CalibrationError, match=r"no measured iteration depends on sustained_clock\.fp8"):
        fit_software(on_a100, "torchtitan", constants=("sustained_clock.fp8", "fixed_time"))


def test_constants_that_rows_cannot_tell_apart_are_not_chosen_together() -> None:
    same = [replace(truth()[0], id=f"row-{index}") for index in range(6)]
    slower = [replace(run, measured_seconds=1.3 * (run.measured_seconds or 0.0)) for run in same]
    assert len(fit_software(slower, "torchtitan").prior) == 1


def given(folder: Path, gpu: str, **constants: float) -> Path:
    """Write a user's calibration of torchtitan's constants on one device."""
    path = folder / f"{gpu}.json"
    document = CalibrationDocument(name=gpu, gpu=gpu, software={"torchtitan": constants})
    path.write_text(calibration_text(document))
    return path


def test_a_constant_at_zero_stays_there(tmp_path: Path) -> None:
    fit = fit_software(
        truth(clock=0.8),
        "torchtitan",
        calibration_paths=(given(tmp_path, "h100-sxm-80", fp8_cast_bytes=0.0),),
    )
    assert fit.sustained_clock["h100-sxm-80"]["bf16"] == pytest.approx(0.8, rel=0.03)
    assert "fp8_cast_bytes" not in fit.constants


def test_devices_given_other_software_constants_are_not_fitted_together(tmp_path: Path) -> None:
    on_h200 = [
        replace(run, id=f"{run.id}-h200", cells={**run.cells, "gpu": "H200-141GB-SXM"}) for run in truth()
    ]
    paths = (
        given(tmp_path, "h100-sxm-80", fixed_time=0.5),
        given(tmp_path, "h200-sxm-141", fixed_time=0.1),
    )
    with pytest.raises(CalibrationError, match="other constants on some devices"):
        fit_software([*truth(), *on_h200], "torchtitan", calibration_paths=paths)


def test_an_unknown_constant_suggests_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean 'fixed_time'"):
        fit_software(truth(), "torchtitan", constants=("fixed_times",))


def test_rows_that_do_not_serve_are_named_with_the_reason() -> None:
    blank = run_of(1, 2048, 8)
    blank = replace(blank, id="blank", cells={**blank.cells, "recompute": ""})
    fit = fit_software([*truth(), blank], "torchtitan")
    assert dict(fit.skipped) == {"blank": "recompute is not stated"}
    assert fit.num_rows == len(SHAPES)


def test_a_fit_becomes_one_calibration_per_device(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    table.write_text("id\n")
    fit = fit_software(
        truth(clock=0.8, fixed_time=0.2), "torchtitan", constants=("fixed_time", "sustained_clock.bf16")
    )
    (document,) = software_documents(fit, table, "mine")
    assert document.gpu == "h100-sxm-80"
    assert document.software == {"torchtitan": fit.constants}
    assert document.sustained_clock == fit.sustained_clock["h100-sxm-80"]
    read = parse_calibration(calibration_text(document), "mine.json", load_gpu("h100-sxm-80"))
    assert read.software["torchtitan"]["fixed_time"] == pytest.approx(fit.constants["fixed_time"], rel=1e-6)
    assert read.sustained_clock["bf16"] == pytest.approx(document.sustained_clock["bf16"], rel=1e-6)


def held_out_median(fit: SoftwareFit, runs: Sequence[MeasuredRun]) -> float:
    errors = []
    for run in runs:
        context, setup = setup_of(run, fit.generation)
        seconds = iteration_time(iteration_costs(fit.apply(context), setup.plan), setup.plan.schedule)
        errors.append(abs(seconds / (run.measured_seconds or 0.0) - 1.0))
    return float(np.median(errors))


@pytest.mark.validation
@pytest.mark.parametrize(
    ("prefix", "software", "gate"),
    [("llmf", "llm-foundry-fsdp1", 0.03), ("internevo", "internevo", 0.04), ("tt", "torchtitan", 0.04)],
)
def test_eight_rows_of_a_public_source_predict_its_others(prefix: str, software: str, gate: float) -> None:
    # tt-14 does not state its number of chunks.
    source = [
        run
        for run in read_measured_runs(TABLE)
        if run.id.rsplit("-", 1)[0] == prefix
        and run.measured == "time"
        and run.quality == "ok"
        and run.id != "tt-14"
    ]
    medians = []
    for seed in (0, 1):
        drawn = np.random.default_rng(seed).choice(len(source), 8, replace=False).tolist()
        fit = fit_software([source[index] for index in drawn], software)
        others = [run for index, run in enumerate(source) if index not in drawn]
        medians.append(held_out_median(fit, others))
    assert np.mean(medians) <= gate


def test_left_out_rows_of_internevo_are_predicted_better_than_before() -> None:
    source = [
        run
        for run in read_measured_runs(TABLE)
        if run.id in {f"internevo-{n:02}" for n in (1, 12, 16, 25, 32, 38, 53, 44)}
    ]
    fit = fit_software(source, "internevo")
    assert fit.error_left_out.mean < fit.error_before.mean
    assert fit.error_left_out.median >= fit.error_after.median
