"""Placement files read by the engines' own parsers, where a folder of them is at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "conformance_placement.py"
ENGINES = ("sglang", "vllm", "vllm-ascend", "trtllm")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_reads_what_was_placed(engine):
    root = os.environ.get("MESHWRIGHT_ENGINES")
    if root is None or not (Path(root) / engine).is_dir():
        pytest.skip(
            f"MESHWRIGHT_ENGINES names no folder with {engine}'s sources; see benchmarks/conformance_placement.py"
        )
    pytest.importorskip("torch", reason="the engines' parsers are written with torch")
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), root, engine], check=False, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "read as placed" in ran.stdout
    assert "REFUSED" not in ran.stdout


def test_a_folder_that_is_not_there_is_named(tmp_path):
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), "vllm"], check=False, capture_output=True, text=True
    )
    assert ran.returncode == 4, ran.stderr
    assert "vllm: not asked, no folder" in ran.stdout
    assert ran.stderr.startswith("error: no engine's code in ")
