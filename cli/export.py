"""``meshwright export``: the files that launch a plan."""

from __future__ import annotations

from pathlib import Path

import click

from meshwright.cli.options import CommonOptions, common_options

__all__ = ["command"]


@click.command("export", short_help="Write the files that launch a plan.")
@click.argument("plan", type=click.Path(path_type=Path), required=False)
@click.option("--to", "target", help="Framework; --list names them.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--launcher", type=click.Choice(["torchrun", "slurm"]), default="torchrun", show_default=True)
@click.option(
    "--list", "lists_targets", is_flag=True, help="Show targets, releases and what each can express."
)
@common_options
def command(
    *,
    plan: Path | None,
    target: str | None,
    out: Path | None,
    launcher: str,
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
    _export(plan, target, out, launcher, common)


def _export(plan: Path, target: str, out: Path, launcher: str, common: CommonOptions) -> None:
    from meshwright.cli.render.console import print_json, stdout_console
    from meshwright.errors import SpecError, did_you_mean
    from meshwright.planner.export import EXPORTERS, write_bundle
    from meshwright.planner.plan_file import read_plan

    if target not in EXPORTERS:
        raise SpecError(
            f"--to: unknown target '{target}'{did_you_mean(target, EXPORTERS) or ';'} known: "
            f"{', '.join(sorted(EXPORTERS))}"
        )
    document = read_plan(plan)
    bundle = EXPORTERS[target].export(document.job, document.plan, launcher)  # type: ignore[arg-type]  # click.Choice
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
    from meshwright.planner.export import EXPORTERS

    if common.as_json:
        targets = [
            {"target": name, "target_version": exporter.target_version, "expresses": dict(exporter.expresses)}
            for name, exporter in sorted(EXPORTERS.items())
        ]
        print_json({"kind": "export_targets", "targets": targets})
        return
    console = stdout_console()
    for name, exporter in sorted(EXPORTERS.items()):
        console.print(f"{name} {exporter.target_version}", markup=False, soft_wrap=True)
        for topic, words in exporter.expresses.items():
            console.print(f"  {topic:<11}{words}", markup=False, soft_wrap=True)
