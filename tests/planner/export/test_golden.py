"""Exports are compared with files kept in ``golden/<case>/``.

After a wanted change, rewrite them and review the difference::

    PYTHONPATH=src python tests/planner/export/test_golden.py
"""

from __future__ import annotations

import shutil

import pytest
from export_cases import CASES, GOLDEN, export_case


def kept_name(name: str) -> str:
    """Return the name a file is kept under: tools for our own Python must not take up what a target imports."""
    return f"{name}.txt" if name.endswith(".py") else name


@pytest.mark.parametrize("name", CASES)
def test_export_equals_the_golden_files(name):
    bundle = export_case(name)
    kept = {path.name: path.read_text() for path in (GOLDEN / name).iterdir()}
    assert {kept_name(file.name): file.text for file in bundle.files} | {
        "launch_command.txt": bundle.launch_command + "\n"
    } == kept


def test_every_golden_folder_belongs_to_a_case():
    assert {path.name for path in GOLDEN.iterdir()} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_equal_input_gives_equal_output(name):
    assert export_case(name) == export_case(name)


def rewrite_golden_files() -> None:
    """Replace the golden files by what the exporters write now."""
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for name in CASES:
        folder = GOLDEN / name
        folder.mkdir(parents=True)
        bundle = export_case(name)
        for file in bundle.files:
            (folder / kept_name(file.name)).write_text(file.text)
        (folder / "launch_command.txt").write_text(bundle.launch_command + "\n")


if __name__ == "__main__":
    rewrite_golden_files()
