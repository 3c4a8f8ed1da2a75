"""The cycle, the build with nvcc, and what is said without nvcc or a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from meshwright.errors import CalibrationError, SpecError
from meshwright.kernels import pointer_chase
from meshwright.kernels.pointer_chase import (
    build_pointer_chase,
    pointer_chase_latency,
    single_cycle_permutation,
)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on the PATH")


def has_gpu() -> bool:
    """Return whether CUDA's driver finds a GPU; asked without torch, which the chase does not need."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


HAS_GPU = has_gpu()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the built kernel."""
    return build_pointer_chase(tmp_path_factory.mktemp("build") / "made")


@pytest.mark.parametrize("num_slots", [1, 2, 3, 17, 1000])
def test_a_permutation_is_one_cycle_over_every_slot(num_slots):
    successors = single_cycle_permutation(num_slots, np.random.default_rng(3))
    slot, visited = 0, []
    for _ in range(num_slots):
        visited.append(slot)
        slot = int(successors[slot])
    assert slot == 0
    assert sorted(visited) == list(range(num_slots))


def test_every_cycle_is_equally_likely():
    # Four slots have 3! = 6 cycles; 6000 draws give each 1000 with a deviation of sqrt(1000 * 5 / 6) = 29.
    generator = np.random.default_rng(5)
    drawn = [tuple(single_cycle_permutation(4, generator)) for _ in range(6000)]
    counts = [drawn.count(cycle) for cycle in set(drawn)]
    assert len(counts) == 6
    assert all(abs(count - 1000) < 5 * 29 for count in counts)


def test_equal_seeds_give_equal_cycles():
    first, second = (single_cycle_permutation(50, np.random.default_rng(7)) for _ in range(2))
    assert first.tolist() == second.tolist()


def test_a_cycle_has_a_slot():
    with pytest.raises(SpecError, match="num_slots is 0; pass at least 1"):
        single_cycle_permutation(0, np.random.default_rng(0))


@pytest.mark.parametrize(("num_bytes", "num_steps"), [(127, 1), (128, 0)])
def test_too_little_to_walk_is_refused(tmp_path, num_bytes, num_steps):
    with pytest.raises(SpecError, match="pass at least 128 and 1"):
        pointer_chase_latency(
            num_bytes, build_folder=tmp_path, generator=np.random.default_rng(0), num_steps=num_steps
        )


def test_without_nvcc_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CalibrationError, match="no nvcc on the PATH; install the CUDA toolkit"):
        build_pointer_chase(tmp_path)


def test_what_nvcc_says_is_in_the_error(tmp_path, monkeypatch):
    failing = tmp_path / "nvcc"
    failing.write_text("#!/bin/sh\necho unsupported GNU version >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(CalibrationError, match=r"(?s)failed with exit code 3.*unsupported GNU version"):
        build_pointer_chase(tmp_path / "build")
    assert list((tmp_path / "build").iterdir()) == []


@needs_nvcc
def test_nvcc_builds_the_kernel_once(library, monkeypatch):
    assert library.is_file()
    assert [path.name for path in library.parent.iterdir()] == [library.name]
    monkeypatch.setattr(subprocess, "run", None)
    assert build_pointer_chase(library.parent) == library


@needs_nvcc
@pytest.mark.skipif(HAS_GPU, reason="there is a GPU, so there is no error")
def test_without_a_gpu_the_error_says_so(library):
    with pytest.raises(CalibrationError, match=r"CUDA device 0: .*; run on a machine with an NVIDIA GPU"):
        pointer_chase_latency(4096, build_folder=library.parent, generator=np.random.default_rng(0))


@needs_nvcc
@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
def test_a_walk_ends_where_the_cycle_says(library):
    successors = single_cycle_permutation(1000, np.random.default_rng(9))
    walk = pointer_chase._walk(library, successors, num_steps=1234, device_index=0)
    slot = 0
    for _ in range(pointer_chase._warm_up_steps(1000) + 1234):
        slot = int(successors[slot])
    assert walk.last_slot == slot


@needs_nvcc
@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
def test_memory_takes_longer_than_the_first_cache(library):
    cache, memory = (
        pointer_chase_latency(size, build_folder=library.parent, generator=np.random.default_rng(0))
        for size in (16 * 2**10, 512 * 2**20)
    )
    assert 1e-9 < cache < memory < 5e-6
