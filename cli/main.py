"""The ``meshwright`` command: finds the subcommand, and is the only place that turns errors into exits."""

from __future__ import annotations

import importlib
import os
import sys
from typing import ClassVar

import click

from meshwright import __version__
from meshwright.errors import MeshwrightError

__all__ = ["LazyGroup", "cli", "main"]


class LazyGroup(click.Group):
    """Lists its commands without importing them, so that ``--help`` answers at once."""

    # Command, its module, and the line of the overview.
    COMMANDS: ClassVar[dict[str, tuple[str, str]]] = {
        "plan": (
            "meshwright.cli.plan",
            "Search every way to train or serve; rank, explain and write plans.",
        ),
        "simulate": ("meshwright.cli.simulate", "Simulate a plan's exact schedule; draw its timeline."),
        "explain": ("meshwright.cli.explain", "Say where a plan's time and memory go, and why."),
        "diff": ("meshwright.cli.diff", "Compare two plans field by field and term by term."),
        "whatif": (
            "meshwright.cli.whatif",
            "Change machines, workload or software; the same plan and the best plan then.",
        ),
        "export": (
            "meshwright.cli.export",
            "Write the files that launch a plan on Megatron-LM, vLLM and others.",
        ),
        "run": (
            "meshwright.cli.run",
            "Execute a plan on this machine or under torchrun; compare and keep it.",
        ),
        "place": ("meshwright.cli.place", "Place the experts of a mixture-of-experts model on ranks."),
        "validate": ("meshwright.cli.validate", "Score predictions against a table of measured runs."),
        "profile": ("meshwright.cli.profile", "Measure this machine: kernels, copies, collectives, clocks."),
        "calibrate": (
            "meshwright.cli.calibrate",
            "Fit a calibration to measurements, tables or your own runs.",
        ),
        "calibrations": ("meshwright.cli.calibrations", "List and show calibrations with their errors."),
        "specs": ("meshwright.cli.specs", "List, show, import and export machines, networks and models."),
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order users meet them."""
        return list(self.COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in self.COMMANDS:
            return None
        module = importlib.import_module(self.COMMANDS[cmd_name][0])
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the overview from :data:`COMMANDS` alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest command when one is unknown."""
        if args and args[0] not in self.COMMANDS and not args[0].startswith("-"):
            from meshwright.errors import did_you_mean

            guess = did_you_mean(args[0], self.COMMANDS) or "."
            ctx.fail(f"no such command '{args[0]}'{guess} Known: {', '.join(self.COMMANDS)}.")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="meshwright")
def cli() -> None:
    """Find, predict, explain and launch the best parallel plan for a large language model.

    Start with: meshwright plan --model llama-3-70b --cluster dgx-h100:8 --global-batch-size 1024
    --sequence-length 8192
    """


def main() -> None:
    """Run the command line and exit with the code of the outcome."""
    try:
        cli.main(prog_name="meshwright", standalone_mode=False)
    except MeshwrightError as error:
        if "--debug" in sys.argv:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        click.echo(_usage_message(error), err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader (head, less) went away: nothing more to say, and no second error at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _usage_message(error: click.ClickException) -> str:
    """Return a mistake in the flags in the form of every other error, or the overview when nothing was asked."""
    text = error.format_message()
    if text.startswith("Usage:"):
        return text
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = f" See '{context.command_path} --help'." if context is not None else ""
    return f"error: {text.rstrip('.')}.{hint}"
