"""``meshwright profile``: measure this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, cast

import click

from meshwright.cli.options import CommonOptions, common_options

__all__ = ["command"]


@click.command("profile", short_help="Measure this machine.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Append samples to this .jsonl.",
)
@click.option("--quick", is_flag=True, help="Under a minute: fewer shapes, 16 and 8 bits.")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(["bf16", "fp8", "fp16", "fp32", "tf32"]),
    help="Measure only this format (repeatable); else all the device has, quick 16 and 8 bits.",
)
@click.option("--model", metavar="MODEL", help="Add the exact shapes of this model (id or config.json).")
@click.option(
    "--device",
    type=click.Choice(["auto", "cuda", "cpu"]),
    default="auto",
    show_default=True,
    help="What to measure.",
)
@click.option("--collectives", is_flag=True, help="Measure collectives even with one device.")
@click.option("--max-seconds", type=click.FloatRange(min=1.0), help="Stop after this long; 300, quick 55.")
@common_options
def command(
    *,
    out: Path,
    quick: bool,
    precisions: tuple[str, ...],
    model: str | None,
    device: str,
    collectives: bool,
    max_seconds: float | None,
    common: CommonOptions,
) -> None:
    """Measure kernels, copies, collectives and clocks of this machine and append every sample to a file.

    A run that was interrupted goes on where it stopped when started again with the same file.

    \b
    meshwright profile --out h200.jsonl
    meshwright profile --quick --device cpu --precision fp32 --out host.jsonl
    torchrun --nnodes 2 --nproc-per-node 8 -m meshwright profile --out across.jsonl
    """
    from dataclasses import replace

    from meshwright.cli.render.console import print_json
    from meshwright.cli.render.profile import ProfileProgress, print_profile, profile_mapping
    from meshwright.profiler.device import discover_device
    from meshwright.profiler.profile import run_profile
    from meshwright.profiler.settings import ProfileSettings, quick_settings
    from meshwright.simcore.domain.model_catalog import load_model

    spec = None if model is None else load_model(model)
    settings = quick_settings(spec) if quick else ProfileSettings(model=spec)
    settings = replace(settings, with_collectives=collectives, seed=common.seed)
    if precisions:
        settings = replace(settings, precisions=precisions)
    if max_seconds is not None:
        settings = replace(settings, max_seconds=max_seconds)
    found = discover_device(cast('Literal["auto", "cuda", "cpu"]', device))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Under torchrun every process takes part in collectives across nodes; only the first one writes.
        from meshwright.profiler.suites.collectives import follow_collectives

        if os.environ.get("RANK", "0") != "0":
            follow_collectives(found, settings)
            return
        settings = replace(settings, suites=("collectives",), with_collectives=True)
    with ProfileProgress(common.quiet or common.as_json) as progress:
        summary = run_profile(out, found, settings, progress=progress)
    if common.as_json:
        print_json(profile_mapping(found, summary))
    else:
        print_profile(found, summary)
