"""``meshwright specs``: what hardware and models are known."""

from __future__ import annotations

import click

from meshwright.cli.options import CommonOptions, common_options

__all__ = ["command"]

_KINDS = ("gpu", "node", "fabric", "cluster", "model")


@click.group("specs", short_help="List and show hardware and models.")
def command() -> None:
    """List and show the built-in GPUs, nodes, fabrics, clusters and models."""


@command.command("list")
@click.option("--kind", type=click.Choice(_KINDS), help="Only this kind.")
@common_options
def list_command(*, kind: str | None, common: CommonOptions) -> None:
    """List every built-in spec by kind."""
    from meshwright.cli.render.console import print_json, stdout_console
    from meshwright.cli.render.specs import spec_names

    names = {each: spec_names(each) for each in (_KINDS if kind is None else (kind,))}
    if common.as_json:
        print_json({"kind": "specs", "specs": {each: list(ids) for each, ids in names.items()}})
        return
    console = stdout_console()
    for each, ids in names.items():
        console.print(f"{each} ({len(ids)})", style="bold")
        console.print("  " + ", ".join(ids), soft_wrap=not console.is_terminal)


@command.command("show")
@click.argument("name")
@common_options
def show_command(*, name: str, common: CommonOptions) -> None:
    """Show one spec with the source of each number; NAME may be an alias or the path of a config.json."""
    from meshwright.cli.render.console import print_json, stdout_console
    from meshwright.cli.render.specs import find_spec
    from meshwright.hardware_specs.spec_writing import dump_yaml

    kind, mapping = find_spec(name)
    if common.as_json:
        print_json({"kind": kind, "spec": mapping})
    else:
        # A comment, because a fabric has a key 'kind' of its own; the rest can be pasted into a cluster file.
        stdout_console().print(f"# {kind}\n{dump_yaml(mapping)}", soft_wrap=True, end="")
