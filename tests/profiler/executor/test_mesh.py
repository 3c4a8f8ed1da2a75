"""The groups of a world of one rank are given up, whoever made them and whatever is gone already."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.profiler.executor.layouts import DENSE, execution
from torch import distributed

from meshwright.profiler.executor.mesh import RankMesh, build_mesh
from meshwright.profiler.executor.recording import Recorder


@pytest.fixture(params=["processor", "processor beside a GPU"])
def mesh(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RankMesh]:
    # Beside a GPU torch makes a group of its own for each axis as long as the world, where it else gives the world's.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param != "processor")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    recorder = Recorder(0, tmp_path, torch.device("cpu"))
    made = build_mesh(execution(DENSE).plan, [], recorder)
    names = {handle.group_name for handle in made.handles}
    assert (names == {distributed.group.WORLD.group_name}) == (request.param == "processor")
    yield made
    recorder.close()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_the_groups_go_and_the_world_stays(mesh: RankMesh) -> None:
    mesh.destroy()
    world = distributed.group.WORLD
    for handle in mesh.handles:
        if handle.group_name != world.group_name:
            with pytest.raises(ValueError, match="Invalid process group"):
                distributed.destroy_process_group(handle)
    number = torch.ones(1)
    distributed.all_reduce(number)
    assert number.item() == 1.0


def test_groups_that_are_gone_are_no_error(mesh: RankMesh) -> None:
    mesh.destroy()
    mesh.destroy()
    assert distributed.is_initialized()


def test_after_the_world_nothing_is_left_to_do(mesh: RankMesh) -> None:
    distributed.destroy_process_group()
    mesh.destroy()
    assert not distributed.is_initialized()
