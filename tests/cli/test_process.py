"""The command as a process: entry point, pipes, colour, tracebacks and exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import meshwright

SOURCE = Path(meshwright.__file__).parents[1]
ESCAPE = "\x1b"


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    return {**kept, "PYTHONPATH": str(SOURCE), "PYTHONSAFEPATH": "1", **changes}


def start(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meshwright", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**changes), check=False)


def test_the_module_runs_as_a_program():
    done = start("--version")
    assert (done.returncode, done.stdout) == (0, f"meshwright, version {meshwright.__version__}\n")


def test_help_lists_every_command():
    done = start("--help")
    assert done.returncode == 0
    for name in ("plan", "simulate", "export", "validate", "specs"):
        assert f"\n  {name} " in done.stdout


def test_without_a_command_the_overview_is_shown():
    done = start()
    assert done.returncode == 2
    assert "Usage: meshwright" in done.stdout + done.stderr


def test_a_plan_is_made_by_a_process_as_in_process(job, plans, folder):
    done = start("plan", job, "--top", 6)
    assert done.returncode == 0, done.stderr
    assert (folder / "plans" / "1.yaml").read_bytes() == (plans / "1.yaml").read_bytes()


def test_output_that_is_no_terminal_has_no_escape_codes(plans):
    done = start("simulate", plans / "1.yaml", TERM="xterm-256color")
    assert done.returncode == 0
    assert ESCAPE not in done.stdout + done.stderr


def test_the_winner_is_coloured_on_a_terminal_only_without_no_color(job):
    def shown(**changes: str) -> str:
        main, terminal = os.openpty()
        command = [sys.executable, "-m", "meshwright", "plan", str(job), "--top", "1", "--quiet"]
        settings = environment(TERM="xterm-256color", COLUMNS="200", **changes)
        with subprocess.Popen(command, stdout=terminal, stderr=subprocess.DEVNULL, env=settings) as process:
            os.close(terminal)
            text = b""
            while True:
                try:
                    block = os.read(main, 65536)
                except OSError:  # Linux's end of a pseudo-terminal
                    break
                if not block:
                    break
                text += block
        os.close(main)
        assert process.returncode == 0
        return text.decode()

    green = f"{ESCAPE}[1;32m"
    assert green in shown()
    assert green not in shown(NO_COLOR="1")


@pytest.mark.parametrize(
    "arguments",
    [("specs", "list"), ("specs", "show", "deepseek-v3", "--json"), ("--help",), ("simulate", "{plan}")],
    ids=lambda arguments: arguments[0],
)
def test_a_reader_that_goes_away_causes_no_traceback(plans, arguments):
    words = [word.format(plan=plans / "1.yaml") for word in arguments]
    process = subprocess.Popen(
        [sys.executable, "-m", "meshwright", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    complaint = process.stderr.read().decode()
    process.stderr.close()
    process.wait()
    assert complaint == ""


def test_debug_shows_the_traceback_of_an_error():
    plain = start("specs", "show", "h10O")
    debug = start("specs", "show", "h10O", "--debug")
    assert (plain.returncode, plain.stderr.count("\n")) == (2, 1)
    assert "Traceback" not in plain.stderr
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
    assert "SpecError" in debug.stderr


def test_exit_codes_tell_the_kinds_of_failure_apart(plans, folder):
    flags = ("--global-batch-size", 8, "--sequence-length", 4096)
    calibration = SOURCE / "meshwright" / "hardware_specs" / "calibrations" / "h100-sxm-80.yaml"
    codes = [
        start("specs", "list").returncode,
        start("specs", "show", "nothing-of-that-name").returncode,
        start("plan", "--model", "llama-3-70b", "--cluster", "l4-8:1", *flags).returncode,
        start("simulate", plans / "1.yaml", "--calibration", calibration).returncode,
    ]
    assert codes == [0, 2, 3, 4]
