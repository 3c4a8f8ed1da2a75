from __future__ import annotations

import json
from importlib.resources import files

import pytest

from meshwright.errors import CalibrationError
from meshwright.profiler.importers.aiconfigurator_tables import installed_root
from meshwright.profiler.serving_kernels import read_all_reduce, read_experts


@pytest.fixture(autouse=True)
def tables():
    """Skip where the public tables or what reads them are not installed."""
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    try:
        installed_root()
    except CalibrationError as error:
        pytest.skip(str(error))


def shipped(name: str) -> dict[str, object]:
    entry = files("meshwright.costmodels.serving") / "kernels" / name
    return json.loads(entry.read_text(encoding="utf-8"))


def test_shipped_all_reduces_are_those_of_the_tables() -> None:
    device = "h100-sxm-80"
    assert read_all_reduce("h100_sxm")[device] == shipped("all_reduce.json")[device]


def test_shipped_experts_are_those_of_the_tables() -> None:
    assert read_experts("h100_sxm", "sglang") == shipped("h100-sxm-80.experts.json")["sglang"]
