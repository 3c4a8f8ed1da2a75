"""What importing kernels needs, and what they say where Triton is missing."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import meshwright.kernels
from meshwright.errors import CalibrationError

torch = pytest.importorskip("torch", reason="kernels need torch, an optional extra")

from meshwright.kernels import compiler  # noqa: E402 - after the skip

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(module.name for module in pkgutil.iter_modules(meshwright.kernels.__path__))
CHILD = "\n".join(
    [
        "import importlib, sys",
        "sys.modules['triton'] = None",  # what makes an import fail as if it were not installed
        "import meshwright.kernels",
        "assert not sys.modules.keys() & {'torch', 'numpy'}",
        "import meshwright.kernels.pointer_chase",
        "assert 'torch' not in sys.modules",
        f"for name in {MODULES!r}:",
        "    importlib.import_module(f'meshwright.kernels.{name}')",
        "import torch",
        "from meshwright.kernels.compiler import has_triton",
        "from meshwright.kernels.streaming import stream_copy",
        "out = torch.zeros(3)",
        "stream_copy(out, torch.ones(3))",
        "print(has_triton(), out.tolist())",
    ]
)


def test_the_package_imports_no_torch_and_its_cpu_paths_need_no_triton():
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False [1.0, 1.0, 1.0]\n"


def test_a_gpu_tensor_without_triton_is_an_error_and_no_fallback(monkeypatch):
    monkeypatch.setattr(compiler, "_triton", None)
    with pytest.raises(CalibrationError, match=r"stream_copy: triton is not installed.*pip install triton"):
        compiler.uses_kernel("stream_copy", torch.device("cuda", 0))


def test_a_cpu_tensor_never_asks_for_triton(monkeypatch):
    monkeypatch.setattr(compiler, "_triton", None)
    assert not compiler.uses_kernel("stream_copy", torch.device("cpu"))


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_run(name):
    module = importlib.import_module(f"meshwright.kernels.{name}")
    assert doctest.testmod(module).failed == 0
