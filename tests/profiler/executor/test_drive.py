"""States on a drive: they keep their values, leave memory, and leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from meshwright.errors import ExecutionError
from meshwright.profiler.executor.adamw import Adamw, FlatTensor, StatesAway
from meshwright.profiler.executor.drive import DriveVectors
from meshwright.profiler.executor.recording import Recorder


def test_vectors_keep_what_is_written_and_their_file_has_no_name(tmp_path: Path) -> None:
    states = DriveVectors(3, 1000, tmp_path)
    for index, vector in enumerate(states.vectors):
        assert vector.shape == (1000,)
        assert not vector.any()
        vector.fill_(index + 1.0)
    states.rest()
    assert [float(vector.sum()) for vector in states.vectors] == [1000.0, 2000.0, 3000.0]
    # However the process ends, there is no file to remove.
    assert not list(tmp_path.iterdir())


def test_a_full_drive_is_said_before_a_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        ExecutionError, match=r"no room for .* \(No space left on device\); name a folder .*--out"
    ):
        DriveVectors(3, 1000, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_several_groups_update_as_those_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("meshwright.profiler.executor.adamw.DRIVE_GROUP", 30)
    begin = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    updated = []
    for away in (StatesAway(), StatesAway(share=0.8, is_on_drive=True, folder=tmp_path)):
        weights, gradient = begin.clone(), torch.linspace(-1.0, 1.0, 100)
        recorder = Recorder(0, None, torch.device("cpu"))
        optimizer = Adamw([FlatTensor(weights, lambda gradient=gradient: gradient)], away, recorder)
        for _ in range(3):
            optimizer.step()
        updated.append(weights)
    assert torch.equal(*updated)
    assert not torch.equal(updated[0], begin)
    traffic = recorder.step.traffic
    # 80 parameters in groups of 30, three steps.
    assert (traffic["drive", "read"].messages, traffic["drive", "write"].num_bytes) == (9, 3 * 80 * 12)
    assert traffic["host", "to_host"].num_bytes == 3 * 80 * 4
