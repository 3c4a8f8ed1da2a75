"""``meshwright export``: the files that launch a plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshwright.cli.options import CommonOptions, common_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshwright.planner.export import ExportBundle, Exporter, ServingExporter

__all__ = ["command"]

# The file of a mixed cluster's bundle that says which kind each node must be.
_NODE_ORDER = "node-order.txt"


@click.command("export", short_help="Write the files that launch a plan.")
@click.argument("plan", type=click.Path(path_type=Path), required=False)
@click.option("--to", "target", help="Framework or engine; --list names them.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--target-version", help="Release of the target; the newest that is known unless given.")
@click.option(
    "--launcher",
    type=click.Choice(["torchrun", "slurm", "kubernetes"]),
    help="What starts a training plan: torchrun by hand on every node (default), Slurm or Kubernetes.",
)
@click.option(
    "--placement",
    "writes_placement",
    is_flag=True,
    help="Write host lists and GPU orders of a training plan even where ranks keep their natural order.",
)
@click.option(
    "--list", "lists_targets", is_flag=True, help="Show targets, releases and what each can express."
)
@common_options
def command(
    *,
    plan: Path | None,
    target: str | None,
    out: Path | None,
    target_version: str | None,
    launcher: str | None,
    writes_placement: bool,
    lists_targets: bool,
    common: CommonOptions,
) -> None:
    """Write arguments, environment and launch script of PLAN for a framework; refuse what it cannot express.

    \b
    meshwright export plans/1.yaml --to megatron --out launch/
    meshwright export --list
    """
    if lists_targets:
        _list_targets(common)
        return
    for value, name in ((plan, "argument 'PLAN'"), (target, "option '--to'"), (out, "option '--out'")):
        if value is None:
            raise click.UsageError(f"Missing {name}; --list shows the targets.")
    assert plan is not None
    assert target is not None
    assert out is not None
    from meshwright.planner.serving.plan_file import is_serving_plan

    if is_serving_plan(plan):
        for given, name in ((launcher is not None, "--launcher"), (writes_placement, "--placement")):
            if given:
                raise click.UsageError(
                    f"{name} is for training plans; --list shows the targets of serving plans."
                )
        bundle = _serving_bundle(plan, target, target_version)
    else:
        bundle = _training_bundle(plan, target, target_version, launcher or "torchrun", writes_placement)
    _write(bundle, out, common)


def _training_bundle(
    plan: Path, target: str, version: str | None, launcher: str, writes_placement: bool
) -> ExportBundle:
    from meshwright.planner.export import EXPORTERS, SERVING_EXPORTERS
    from meshwright.planner.export.base import ExportFile
    from meshwright.planner.export.selection import find_exporter
    from meshwright.planner.kinds_text import node_order_sentence, node_order_text
    from meshwright.planner.plan_file import read_plan
    from meshwright.simcore.domain.device_mapping import DeviceMapping

    exporter = find_exporter(EXPORTERS, SERVING_EXPORTERS, target, version, "training")
    document = read_plan(plan)
    placed = document.plan
    if writes_placement and placed.device_mapping is None:
        placed = dataclasses.replace(placed, device_mapping=DeviceMapping())
    bundle = exporter.export(document.job, placed, launcher)  # type: ignore[arg-type]  # click.Choice
    cluster = document.job.cluster
    if not cluster.is_mixed:
        return bundle
    order = ExportFile(_NODE_ORDER, node_order_text(cluster, placed))
    notes = (node_order_sentence(cluster, placed), *bundle.notes)
    return dataclasses.replace(bundle, notes=notes, files=(*bundle.files, order))


def _serving_bundle(plan: Path, target: str, version: str | None) -> ExportBundle:
    from meshwright.planner.export import EXPORTERS, SERVING_EXPORTERS
    from meshwright.planner.export.selection import find_exporter
    from meshwright.planner.serving.plan_file import read_serving_plan

    exporter = find_exporter(SERVING_EXPORTERS, EXPORTERS, target, version, "serving")
    document = read_serving_plan(plan)
    return exporter.export(document.job, document.plan)


def _write(bundle: ExportBundle, out: Path, common: CommonOptions) -> None:
    from meshwright.cli.render.console import print_json, stdout_console
    from meshwright.planner.export import write_bundle

    paths = write_bundle(bundle, out, common.force)
    if common.as_json:
        print_json(
            {
                "kind": "export",
                "target": bundle.target,
                "target_version": bundle.target_version,
                "files": [str(path) for path in paths],
                "launch_command": bundle.launch_command,
                "notes": list(bundle.notes),
            }
        )
        return
    console = stdout_console()
    for path in paths:
        console.print(f"Wrote {path}", markup=False, soft_wrap=True)
    console.print(
        f"{bundle.target} {bundle.target_version}. Launch from {out}: {bundle.launch_command}",
        markup=False,
        soft_wrap=True,
    )
    for note in bundle.notes:
        console.print(f"Note: {note}", markup=False, soft_wrap=True)


def _list_targets(common: CommonOptions) -> None:
    from meshwright.cli.render.console import print_json, stdout_console
    from meshwright.planner.export import EXPORTERS, SERVING_EXPORTERS

    tables: dict[str, Mapping[str, Exporter | ServingExporter]] = {
        "training": EXPORTERS,
        "serving": SERVING_EXPORTERS,
    }
    rows = [
        (kind, name, exporter.target_version, dict(exporter.expresses))
        for kind, table in tables.items()
        for name, exporter in sorted(table.items())
    ]
    if common.as_json:
        targets = [
            {"target": name, "target_version": version, "plans": kind, "expresses": expresses}
            for kind, name, version, expresses in rows
        ]
        print_json({"kind": "export_targets", "targets": targets})
        return
    console = stdout_console()
    heading = ""
    for kind, name, version, expresses in rows:
        if kind != heading:
            heading = kind
            console.print(f"For {kind} plans:", markup=False)
        console.print(f"{name} {version}", markup=False, soft_wrap=True)
        for topic, words in expresses.items():
            console.print(f"  {topic:<11}{words}", markup=False, soft_wrap=True)
