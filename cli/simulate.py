"""``meshwright simulate``: the exact schedule of one plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshwright.cli.options import CommonOptions, common_options

if TYPE_CHECKING:
    from meshwright.costmodels.prediction import Prediction

__all__ = ["command"]


@click.command("simulate", short_help="Simulate a plan's exact schedule.")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--timeline",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a trace (.json.gz) that opens in ui.perfetto.dev.",
)
@click.option("--picture", type=click.Path(path_type=Path), metavar="FILE", help="Write the timeline as SVG.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Write the result as DIR/result.json."
)
@click.option(
    "--flops",
    type=click.Choice(["causal", "full-attention"]),
    default="causal",
    show_default=True,
    help="How MFU counts attention.",
)
@common_options
def command(
    *,
    plan: Path,
    timeline: Path | None,
    picture: Path | None,
    out: Path | None,
    flops: str,
    common: CommonOptions,
) -> None:
    """Simulate the exact schedule of PLAN (a file that 'meshwright plan' wrote), operation by operation.

    \b
    meshwright simulate plans/1.yaml --timeline step.json.gz
    """
    from meshwright.cli.render.console import print_json
    from meshwright.cli.render.simulation import print_simulation, simulation_mapping
    from meshwright.costmodels.context import cost_context
    from meshwright.costmodels.prediction import predict
    from meshwright.planner.plan_file import read_plan

    document = read_plan(plan)
    context = cost_context(document.job, calibration_paths=common.calibrations)
    prediction = predict(context, document.plan, flops)  # type: ignore[arg-type]  # click.Choice holds the words
    written = _write(prediction, timeline, picture, out, force=common.force)
    if common.as_json:
        print_json({**simulation_mapping(document, context, prediction), "written": written})
    else:
        print_simulation(document, context, prediction, flops, written)


def _write(
    prediction: Prediction, timeline: Path | None, picture: Path | None, out: Path | None, *, force: bool
) -> list[str]:
    """Write what was asked for; every target is checked before the first is written. Returns what to print."""
    from meshwright.errors import SpecError
    from meshwright.planner.output_file import (
        check_replaceable,
        is_our_json,
        is_our_svg,
        is_our_trace,
        replace_file,
    )
    from meshwright.planner.plan_file import prediction_mapping
    from meshwright.simcore.chrome_trace import write_chrome_trace
    from meshwright.simcore.timeline import timeline_svg

    result_path = out / "result.json" if out is not None else None
    for path, is_ours in ((timeline, is_our_trace), (picture, is_our_svg), (result_path, is_our_json)):
        if path is not None:
            check_replaceable(path, force=force, is_ours=is_ours)
    written = []
    if timeline is not None:
        try:
            timeline.parent.mkdir(parents=True, exist_ok=True)
            summary = write_chrome_trace(prediction.iteration, timeline)
        except OSError as error:
            raise SpecError(f"{timeline}: cannot be written ({error.strerror})") from None
        note = f"; {summary.note}" if summary.note else ""
        written.append(
            f"{timeline} ({summary.num_events:,} events, open it in https://ui.perfetto.dev{note})"
        )
    if picture is not None:
        svg = timeline_svg(prediction.iteration)
        replace_file(picture, svg.encode(), force=force, is_ours=is_our_svg)
        written.append(str(picture))
    if result_path is not None:
        mapping = {"written_by": "meshwright", "schema_version": 1, **prediction_mapping(prediction)}
        text = json.dumps(mapping, indent=2, allow_nan=False) + "\n"
        replace_file(result_path, text.encode(), force=force, is_ours=is_our_json)
        written.append(str(result_path))
    return written
