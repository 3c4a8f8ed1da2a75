"""Predict each A100 source of the published runs with no constant that was fitted to it.

    python benchmarks/held_out_sources.py

Two kinds of constants were chosen with published runs in view: the sustained clock of the A100, and the overheads of a
software generation that differ from the neutral ones of ``SoftwareGeneration`` and that measured iterations can fix.
For every source held out, the clock is the mean of those that the other sources ask for, each fitted from a neutral
start together with the overheads its rows can tell apart; the overheads of the held-out source's generation are those
fitted to another source of the same generation, or neutral where there is none. What stays: operator curves (fitted to
operator tables), what is counted (traffic, messages, FLOPs), and which kernels and overlaps a generation has at all.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from meshwright.costmodels.software import SoftwareGeneration, load_software
from meshwright.errors import CalibrationError
from meshwright.profiler.fitting.fittable_constants import FITTABLE_CONSTANTS
from meshwright.profiler.fitting.software import SoftwareFit, fit_software
from meshwright.profiler.measured_runs import MeasuredRun, read_measured_runs
from meshwright.profiler.validation import ScoredRun, score_run

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "validation" / "training_runs.csv"
GPU = "a100-sxm-80"
CLOCK = "sustained_clock.bf16"
# Prefix of a source's row ids, and the generation it runs.
SOURCES = {
    "kort": "megatron-2021",
    "sc21": "megatron-2021",
    "zb": "megatron-2023",
    "vocab": "megatron-2024",
    "internevo": "internevo",
}
# No fit behind these: an fp16 main gradient is read and written once, 2 B each.
COUNTED = {
    "megatron-2021": ("gradient_accumulation_bytes",),
    "megatron-2023": ("gradient_accumulation_bytes",),
}
AIM = 0.08


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """A source predicted by the others: clock and overheads used, and signed errors of its rows."""

    source: str
    clock: float
    overheads: Mapping[str, float]
    errors: np.ndarray
    built_in_errors: np.ndarray


def neutral_overheads(software: str) -> dict[str, float]:
    """Return the neutral value of every overhead of a generation that may have been chosen knowing its rows."""
    generation = load_software(software)
    neutral = {
        each.name: each.default for each in fields(SoftwareGeneration) if isinstance(each.default, float)
    }
    names = [constant.name for constant in FITTABLE_CONSTANTS if constant.name in neutral]
    return {
        name: neutral[name]
        for name in names
        if getattr(generation, name) != neutral[name] and name not in COUNTED.get(software, ())
    }


def trusted_runs(prefix: str) -> list[MeasuredRun]:
    """Return the timed rows of a source that can be predicted, read or recalled."""
    runs = [run for run in read_measured_runs(TABLE) if run.id.rsplit("-", 1)[0] == prefix]
    return [
        run for run in runs if run.quality in ("ok", "recalled") and score_run(run).time_error is not None
    ]


def calibration(folder: Path, clock: float, software: str, overheads: Mapping[str, float]) -> Path:
    """Write a calibration with one clock and one generation's overheads; what it lacks is the built-in's."""
    path = folder / "held-out.json"
    document = {
        "schema_version": 2,
        "kind": "calibration",
        "gpu": GPU,
        "sustained_clock": {"bf16": clock, "source": "the other sources"},
        "software": {software: dict(overheads)},
    }
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def refit(runs: Sequence[MeasuredRun], software: str, folder: Path) -> SoftwareFit:
    """Fit the clock, and every overhead that the rows can tell from it, from a neutral start."""
    neutral = neutral_overheads(software)
    start = calibration(folder, 1.0, software, neutral)
    constants: tuple[str, ...] = (CLOCK,)
    fit = fit_software(runs, software, constants=constants, calibration_paths=[start])
    for name in neutral:
        try:
            fit = fit_software(runs, software, constants=(*constants, name), calibration_paths=[start])
        except CalibrationError:
            continue
        constants = (*constants, name)
    return fit


def clock_of(fit: SoftwareFit) -> float:
    """Return the clock a fit ended at; its start where it did not move."""
    return fit.sustained_clock.get(GPU, {}).get("bf16", 1.0)


def held_out(
    source: str, runs: Mapping[str, Sequence[MeasuredRun]], fits: Mapping[str, SoftwareFit]
) -> HeldOut:
    """Predict a source by what the fits to the other ones say."""
    software = SOURCES[source]
    others = {name: fit for name, fit in fits.items() if name != source}
    clock = float(np.mean([clock_of(fit) for fit in others.values()]))
    siblings = [fit for name, fit in others.items() if SOURCES[name] == software]
    overheads = {
        name: float(np.mean([fit.constants.get(name, neutral) for fit in siblings])) if siblings else neutral
        for name, neutral in neutral_overheads(software).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = calibration(Path(folder), clock, software, overheads)
        scored = [score_run(run, [path]) for run in runs[source]]
    return HeldOut(
        source=source,
        clock=clock,
        overheads=overheads,
        errors=time_errors(scored),
        built_in_errors=time_errors([score_run(run) for run in runs[source]]),
    )


def time_errors(scored: Sequence[ScoredRun]) -> np.ndarray:
    """Return the signed time errors of rows."""
    return np.array([row.time_error for row in scored if row.time_error is not None])


def print_held_out() -> None:
    """Print what each source asks for by itself, and each source as the others predict it."""
    runs = {source: trusted_runs(source) for source in SOURCES}
    with tempfile.TemporaryDirectory() as folder:
        fits = {source: refit(rows, SOURCES[source], Path(folder)) for source, rows in runs.items()}
    print("What each A100 source asks for by itself, from a neutral start")
    for source, fit in fits.items():
        overheads = ", ".join(f"{name} {value:.3g}" for name, value in fit.constants.items())
        print(f"  {source:<11}clock {clock_of(fit):.3f}{', ' if overheads else ''}{overheads}")
    print(
        "\nEach A100 source predicted with no constant fitted to it: clock of the others, overheads as below"
    )
    print(
        f"  {'source':<11}{'rows':>5}{'clock':>7}{'mean':>8}{'median':>8}{'bias':>8}{'built-in':>10}{'aim':>12}"
    )
    for source in SOURCES:
        result = held_out(source, runs, fits)
        mean = float(np.abs(result.errors).mean())
        print(
            f"  {source:<11}{len(result.errors):>5}{result.clock:>7.3f}{mean:>8.1%}"
            f"{np.median(np.abs(result.errors)):>8.1%}{np.median(result.errors):>+8.1%}"
            f"{np.abs(result.built_in_errors).mean():>10.1%}{'<= 8 %':>8} {'PASS' if mean <= AIM else 'MISS'}"
        )
        print(f"  {'':<11}{', '.join(f'{name} {value:.3g}' for name, value in result.overheads.items())}")


if __name__ == "__main__":
    print_held_out()
