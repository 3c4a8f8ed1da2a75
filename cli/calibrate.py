"""``meshwright calibrate``: from measurements to a calibration file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshwright.cli.options import CommonOptions, common_options
from meshwright.errors import SpecError

if TYPE_CHECKING:
    from meshwright.profiler.measurements import Measurements

__all__ = ["command"]

_SOURCES = ("profile", "aiconfigurator", "nccl-tests", "vidur", "runs", "serving-runs")
_TAKEN_BY = {
    "gpu": ("profile", "nccl-tests", "vidur"),
    "system": ("aiconfigurator",),
    "engine": ("aiconfigurator",),
    "software": ("runs",),
    "constant": ("runs", "serving-runs"),
}


@click.command("calibrate", short_help="Fit a calibration to measurements.")
@click.argument("inputs", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--from",
    "source",
    type=click.Choice(_SOURCES),
    default="profile",
    show_default=True,
    help="What INPUTS are.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="Calibration, .json."
)
@click.option("--gpu", metavar="GPU", help="Device the inputs were measured on, where they do not say.")
@click.option(
    "--system", metavar="NAME", help="aiconfigurator: system, such as h200_sxm; 'all' for the built-in ones."
)
@click.option("--engine", metavar="NAME", help="aiconfigurator: vllm, sglang or trtllm.")
@click.option("--software", metavar="NAME", help="runs: software generation whose constants are fitted.")
@click.option(
    "--constant",
    "constants",
    multiple=True,
    metavar="NAME",
    help="runs, serving-runs: fit this constant (repeatable).",
)
@common_options
def command(
    *,
    inputs: tuple[Path, ...],
    source: str,
    out: Path,
    gpu: str | None,
    system: str | None,
    engine: str | None,
    software: str | None,
    constants: tuple[str, ...],
    common: CommonOptions,
) -> None:
    """Fit the cost models to INPUTS and write a calibration that --calibration takes.

    \b
    meshwright calibrate h200.jsonl --out h200.calibration.json
    meshwright calibrate --from aiconfigurator --system h200_sxm --engine vllm --out h200.calibration.json
    meshwright calibrate --from nccl-tests all_reduce.log --gpu h100-sxm-80 --out nccl.calibration.json
    meshwright calibrate --from runs my_runs.csv --software megatron-core --out stack.calibration.json
    meshwright calibrate --from serving-runs my_serving_runs.csv --out engine.calibration.json
    """
    if out.suffix != ".json" and system != "all":
        raise SpecError(f"{out}: calibrations are JSON; name a file that ends in .json")
    _refuse_foreign_flags(
        source, gpu=gpu, system=system, engine=engine, software=software, constant=constants
    )
    if source == "runs":
        _from_runs(inputs, software, constants, out, common)
        return
    if source == "serving-runs":
        _from_serving_runs(inputs, constants, out, common)
        return
    if source == "aiconfigurator" and system == "all":
        _built_in(out, common)
        return
    _from_measurements(_measurements(source, inputs, gpu, system, engine), out, common)


def _refuse_foreign_flags(source: str, **given: object) -> None:
    """Raise when an option was given that this kind of inputs would silently ignore."""
    for flag, value in given.items():
        if value and source not in _TAKEN_BY[flag]:
            sources = " or ".join(f"--from {name}" for name in _TAKEN_BY[flag])
            raise SpecError(f"--{flag} goes with {sources}, not with --from {source}; leave it out")


def _measurements(
    source: str, inputs: tuple[Path, ...], gpu: str | None, system: str | None, engine: str | None
) -> Measurements:
    """Read what the user named, by its kind."""
    if source == "aiconfigurator":
        from meshwright.profiler.importers.aiconfigurator import read_aiconfigurator

        if system is None or engine is None or inputs:
            raise SpecError("--from aiconfigurator takes --system and --engine, and no files")
        return read_aiconfigurator(system, engine)
    if not inputs:
        raise SpecError(f"--from {source} needs files to read; name them")
    if source == "profile":
        from meshwright.profiler.store import read_measurements

        return read_measurements(inputs, gpu)
    if gpu is None:
        raise SpecError(
            f"--from {source} needs --gpu: the files do not say which of our devices they measured"
        )
    from meshwright.hardware_specs.catalog import load_gpu

    name = load_gpu(gpu).id
    if source == "nccl-tests":
        from meshwright.profiler.importers.nccl_tests import read_nccl_tests

        return read_nccl_tests(inputs, name)
    from meshwright.profiler.importers.vidur import read_vidur

    if len(inputs) != 1:
        raise SpecError("--from vidur takes one folder")
    return read_vidur(inputs[0], name)


def _from_measurements(measurements: Measurements, out: Path, common: CommonOptions) -> None:
    from meshwright.cli.render.calibration import fit_mapping, print_fit
    from meshwright.cli.render.console import print_json, stderr_console
    from meshwright.costmodels.calibration_writing import calibration_text
    from meshwright.hardware_specs.catalog import load_gpu
    from meshwright.planner.output_file import check_replaceable, is_our_json, replace_file
    from meshwright.profiler.fitting.calibrate import calibrate
    from meshwright.profiler.fitting.operator import FitSettings

    check_replaceable(out, force=common.force, is_ours=is_our_json)
    result = calibrate(
        measurements,
        load_gpu(measurements.gpu),
        FitSettings(seed=common.seed),
        name=out.name.removesuffix(".json"),
    )
    text = calibration_text(result.document)
    replace_file(out, text.encode(), force=common.force, is_ours=is_our_json)
    if not common.quiet:
        for note in result.notes:
            stderr_console().print(f"left out: {note}", soft_wrap=True)
    if common.as_json:
        print_json(fit_mapping(result))
        return
    print_fit(result)
    click.echo(f"Wrote {out}")


def _built_in(folder: Path, common: CommonOptions) -> None:
    """Fit every built-in calibration anew; ``folder`` is where they lie."""
    from meshwright.cli.render.console import ProgressLine
    from meshwright.costmodels.calibration_writing import calibration_text
    from meshwright.planner.output_file import is_our_json, replace_file
    from meshwright.profiler.built_in import BUILT_IN, fit_built_in

    if not folder.is_dir():
        raise SpecError(f"{folder}: --system all writes one file per device; name an existing folder")
    with ProgressLine(common.quiet or common.as_json) as progress:
        for done, (system, engine) in enumerate(BUILT_IN):
            progress(f"fitting {system} {engine}", done, len(BUILT_IN))
            document = fit_built_in(system, engine)
            path = folder / f"{document.name}.json"
            replace_file(path, calibration_text(document).encode(), force=common.force, is_ours=is_our_json)
    if not common.as_json:
        click.echo(f"Wrote {len(BUILT_IN)} calibrations to {folder}")


def _from_runs(
    inputs: tuple[Path, ...],
    software: str | None,
    constants: tuple[str, ...],
    out: Path,
    common: CommonOptions,
) -> None:
    from meshwright.cli.render.console import print_json
    from meshwright.cli.render.software_fit import print_software_fit, software_fit_mapping
    from meshwright.costmodels.calibration_writing import calibration_text
    from meshwright.planner.output_file import check_replaceable, is_our_json, replace_file
    from meshwright.profiler.fitting.software import fit_software, software_documents
    from meshwright.profiler.measured_runs import read_measured_runs

    if len(inputs) != 1 or software is None:
        raise SpecError("--from runs takes one table of measured runs and --software")
    runs = read_measured_runs(inputs[0])
    check_replaceable(out, force=common.force, is_ours=is_our_json)
    fit = fit_software(runs, software, constants=constants or None, calibration_paths=common.calibrations)
    documents = software_documents(fit, inputs[0], out.name.removesuffix(".json"))
    if len(documents) > 1:
        names = ", ".join(document.gpu for document in documents)
        raise SpecError(
            f"{inputs[0]}: the runs are of several devices ({names}); calibrate each with its own table"
        )
    replace_file(out, calibration_text(documents[0]).encode(), force=common.force, is_ours=is_our_json)
    if common.as_json:
        print_json(software_fit_mapping(fit))
        return
    print_software_fit(fit)
    click.echo(f"Wrote {out}")


def _from_serving_runs(
    inputs: tuple[Path, ...], constants: tuple[str, ...], out: Path, common: CommonOptions
) -> None:
    from meshwright.cli.render.console import print_json
    from meshwright.cli.render.serving_fit import print_serving_fit, serving_fit_mapping
    from meshwright.costmodels.calibration_writing import calibration_text
    from meshwright.planner.output_file import check_replaceable, is_our_json, replace_file
    from meshwright.profiler.fitting.serving import fit_engine, serving_document
    from meshwright.profiler.serving_runs import read_serving_runs

    if len(inputs) != 1:
        raise SpecError("--from serving-runs takes one table of measured serving runs")
    runs = read_serving_runs(inputs[0])
    check_replaceable(out, force=common.force, is_ours=is_our_json)
    fit = fit_engine(runs, constants=constants, calibration_paths=common.calibrations, seed=common.seed)
    document = serving_document(fit, inputs[0], out.name.removesuffix(".json"))
    replace_file(out, calibration_text(document).encode(), force=common.force, is_ours=is_our_json)
    if common.as_json:
        print_json(serving_fit_mapping(fit))
        return
    print_serving_fit(fit)
    click.echo(f"Wrote {out}")
