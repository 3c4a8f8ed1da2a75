"""Programs that ask real clients end with one sentence where a client is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (
            ("conformance_kubernetes.py", "nothing.yaml"),
            "no file nothing.yaml; this needs the custom resource",
        ),
        (
            ("conformance_placement.py", "nowhere"),
            "no engine's code in nowhere; this needs one folder per engine",
        ),
    ],
)
def test_a_missing_client_is_one_sentence(program, says, tmp_path):
    command = [sys.executable, str(BENCHMARKS / program[0]), *program[1:]]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert outcome.returncode == 4
    assert outcome.stderr.startswith(f"error: {says}")
    assert len(outcome.stderr.splitlines()) == 1


def test_an_import_that_fails_is_told_and_one_of_ours_is_not_hidden(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from conformance_missing import exit_with

    def needs(name):
        def main():
            __import__(name)
            return 0

        return main

    with pytest.raises(SystemExit) as ended:
        exit_with(needs("no_such_engine"), "the engine's own code")
    assert ended.value.code == 4
    assert (
        capsys.readouterr().err
        == "error: No module named 'no_such_engine'; this needs the engine's own code\n"
    )
    with pytest.raises(ImportError):
        exit_with(needs("meshwright.no_such_module"), "nothing")
