"""What importing costs, and which imports are allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1"}
HEAVY = ("networkx", "numba", "numpy", "pandas", "rich", "scipy", "torch", "triton", "yaml")


def loaded(code: str) -> set[str]:
    """Return which heavy packages a piece of code imports."""
    report = f"{code}\nimport sys\nprint(*({HEAVY!r} & sys.modules.keys()), file=sys.stderr)"
    report = report.replace(repr(HEAVY), repr(set(HEAVY)))
    done = subprocess.run(
        [sys.executable, "-c", report], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


def run_main(*arguments: str) -> str:
    return (
        f"import sys\nsys.argv = ['meshwright', *{list(arguments)!r}]\n"
        "from meshwright.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass"
    )


def test_importing_the_package_imports_nothing_heavy():
    assert loaded("import meshwright") == set()


@pytest.mark.parametrize(
    "command",
    [
        "",
        "plan",
        "simulate",
        "explain",
        "diff",
        "whatif",
        "export",
        "validate",
        "profile",
        "calibrate",
        "calibrations",
        "specs",
        "run",
        "place",
    ],
)
def test_help_imports_nothing_heavy(command):
    # This is what keeps --help under 0.3 s; a clock would measure the machine's load.
    assert loaded(run_main(*command.split(), "--help")) == set()


def test_listing_specs_needs_no_array_library():
    assert not loaded(run_main("specs", "list")) & {"networkx", "numba", "pandas", "scipy", "torch"}


@pytest.mark.parametrize("package", ["numba", "pandas", "torch"])
def test_importing_every_command_leaves_compilers_and_tables_alone(package):
    names = (
        "plan",
        "simulate",
        "explain",
        "diff",
        "whatif",
        "export",
        "validate",
        "profile",
        "calibrate",
        "calibrations",
        "specs",
    )
    modules = "".join(f"import meshwright.cli.{name}\n" for name in names)
    assert package not in loaded(modules)


def test_imports_point_down():
    # Contracts stand in pyproject.toml; the package must be importable for the linter to find it.
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--no-cache"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
