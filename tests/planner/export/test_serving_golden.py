"""Serving exports are compared with files kept in ``golden_serving/<case>/``.

After a wanted change, rewrite them and review the difference::

    PYTHONPATH=src:tests/planner/export python tests/planner/export/test_serving_golden.py
"""

from __future__ import annotations

import shutil

import pytest
from serving_cases import GOLDEN_SERVING, SERVING_CASES, export_serving_case


@pytest.mark.parametrize("name", SERVING_CASES)
def test_serving_export_equals_the_golden_files(name):
    bundle = export_serving_case(name)
    kept = {path.name: path.read_text() for path in (GOLDEN_SERVING / name).iterdir()}
    assert {file.name: file.text for file in bundle.files} | {
        "launch_command.txt": bundle.launch_command + "\n"
    } == kept


def test_every_golden_folder_belongs_to_a_serving_case():
    assert {path.name for path in GOLDEN_SERVING.iterdir()} == set(SERVING_CASES)


def rewrite_golden_files() -> None:
    """Replace the golden files by what the exporters write now."""
    shutil.rmtree(GOLDEN_SERVING, ignore_errors=True)
    for name in SERVING_CASES:
        folder = GOLDEN_SERVING / name
        folder.mkdir(parents=True)
        bundle = export_serving_case(name)
        for file in bundle.files:
            (folder / file.name).write_text(file.text)
        (folder / "launch_command.txt").write_text(bundle.launch_command + "\n")


if __name__ == "__main__":
    rewrite_golden_files()
