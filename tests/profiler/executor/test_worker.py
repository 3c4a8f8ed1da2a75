from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.profiler.executor.layouts import DENSE, execution

from meshwright.profiler.executor.expected import expected_operations
from meshwright.profiler.executor.report import read_rank_report
from meshwright.simcore.domain.execution import Execution, execution_text


def run_worker(folder: Path, each: Execution | str) -> subprocess.CompletedProcess[str]:
    """Run the worker of a world of one."""
    file = folder / "execution.json"
    file.write_text(each if isinstance(each, str) else execution_text(each), encoding="utf-8")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    meeting = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-P", "-m", "meshwright.profiler.executor.worker", str(file), str(folder)],
        env={**os.environ, **meeting, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_worker_reports_its_steps(tmp_path: Path) -> None:
    each = dataclasses.replace(execution(DENSE), num_warmup_steps=1, num_steps=2)
    ended = run_worker(tmp_path, each)
    assert (ended.returncode, ended.stderr) == (0, "")
    report = read_rank_report(tmp_path / "rank0.json")
    assert (report.rank, report.stage, len(report.step_seconds)) == (0, 0, 2)
    assert set(report.phase_seconds) == {"forward", "backward", "gradient_sync", "optimizer", "wait"}
    for index, seconds in enumerate(report.step_seconds):
        parts = [times[index] for times in report.phase_seconds.values()]
        # Phases do not nest, and leave little out.
        assert 0.5 * seconds < sum(parts) <= seconds
    assert report.traffic == ()
    assert report.peak_memory_bytes > 50_000_000
    assert len(report.losses) == len(report.gradient_norms) == 2
    written = json.loads((tmp_path / "rank0.json").read_text(encoding="utf-8"))
    assert [tuple(row) for row in written["operations"]] == expected_operations(each)[0]
    assert (tmp_path / "rank0.now").read_text(encoding="utf-8").splitlines()[0].strip() == "done"


def _changed(**changes: Any) -> Execution:
    return dataclasses.replace(execution(DENSE), **changes)


@pytest.mark.parametrize(
    ("each", "code", "message"),
    [
        (_changed(model=dataclasses.replace(DENSE, num_mtp_layers=1)), 5, "multi-token prediction"),
        ("{}", 2, "expected the file of an execution"),
    ],
)
def test_what_cannot_run_ends_with_a_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    each: Execution | str,
    code: int,
    message: str,
) -> None:
    from meshwright.profiler.executor.worker import main

    monkeypatch.setenv("RANK", "0")
    file = tmp_path / "execution.json"
    file.write_text(each if isinstance(each, str) else execution_text(each), encoding="utf-8")
    assert main([str(file), str(tmp_path)]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_without_its_two_arguments_it_says_how_to_call_it(capsys: pytest.CaptureFixture[str]) -> None:
    from meshwright.profiler.executor.worker import main

    assert main([]) == 2
    assert "EXECUTION.json RUN_DIRECTORY" in capsys.readouterr().err
