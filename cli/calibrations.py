"""``meshwright calibrations``: what is known of each device, and how well."""

from __future__ import annotations

import click

from meshwright.cli.options import CommonOptions, common_options

__all__ = ["command"]


@click.group("calibrations", short_help="List and show calibrations.")
def command() -> None:
    """List and show the built-in calibrations and given files."""


@command.command("list")
@common_options
def list_command(*, common: CommonOptions) -> None:
    """List every built-in calibration: devices served, operators, error."""
    from meshwright.cli.render.calibration import list_mapping, print_list
    from meshwright.cli.render.console import print_json

    if common.as_json:
        print_json(list_mapping())
    else:
        print_list()


@command.command("show")
@click.argument("name")
@common_options
def show_command(*, name: str, common: CommonOptions) -> None:
    """Show one calibration: error by operator, provenance, sources. NAME is a device or a file."""
    from meshwright.cli.render.calibration import calibration_mapping, find_documents, print_calibration
    from meshwright.cli.render.console import print_json

    documents = find_documents(name)
    if common.as_json:
        print_json(calibration_mapping(documents))
    else:
        print_calibration(documents)
