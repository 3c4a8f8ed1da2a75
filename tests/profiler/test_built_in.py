"""Shipped calibrations are what the tables of the pinned package give today: about ten seconds each."""

from __future__ import annotations

import importlib.util
import json
import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from meshwright.costmodels.calibration_writing import calibration_text
from meshwright.profiler.built_in import BUILT_IN, fit_built_in
from meshwright.profiler.importers.aiconfigurator import SYSTEMS

FOLDER = files("meshwright.hardware_specs") / "calibrations"
MISSING = [
    name for name in ("aiconfigurator_core", "pandas", "pyarrow") if not importlib.util.find_spec(name)
]
# Texts such as "1.25e-05 s" hold a number too.
QUANTITY = re.compile(r"([-+0-9.e]+) (\S+)")
TOLERANCE = 1e-6


def shipped(system: str, engine: str) -> str:
    return (FOLDER / f"{SYSTEMS[system]}.{engine}.json").read_text(encoding="utf-8")


def check_same(mine: object, theirs: object, where: str) -> None:
    """Hold two JSON values to be equal, every number to a millionth of the largest beside it."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        assert list(mine) == list(theirs), where
        for key in mine:
            check_same(mine[key], theirs[key], f"{where}.{key}")
    elif isinstance(mine, list) and isinstance(theirs, list):
        assert len(mine) == len(theirs), where
        if all(isinstance(item, int | float) for item in (*mine, *theirs)):
            scale = float(np.abs(theirs).max(initial=0.0))
            np.testing.assert_allclose(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE * scale, err_msg=where)
            return
        for index, pair in enumerate(zip(mine, theirs, strict=True)):
            check_same(*pair, f"{where}[{index}]")
    elif isinstance(mine, str) and isinstance(theirs, str) and QUANTITY.fullmatch(theirs):
        numbers, units = zip(*(text.split(" ") for text in (mine, theirs)), strict=True)
        assert units[0] == units[1], where
        assert float(numbers[0]) == pytest.approx(float(numbers[1]), rel=TOLERANCE), where
    elif isinstance(mine, float) or isinstance(theirs, float):
        assert mine == pytest.approx(theirs, rel=TOLERANCE), where
    else:
        assert mine == theirs, where


def test_every_shipped_table_is_listed_and_every_listed_one_shipped() -> None:
    there = {Path(entry.name).name for entry in FOLDER.iterdir() if entry.name.endswith(".json")}
    assert there == {f"{SYSTEMS[system]}.{engine}.json" for system, engine in BUILT_IN}


@pytest.mark.validation
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.parametrize(
    ("system", "engine"), BUILT_IN, ids=[f"{system}-{engine}" for system, engine in BUILT_IN]
)
def test_a_shipped_calibration_is_what_its_tables_give(system: str, engine: str) -> None:
    made, kept = (
        json.loads(calibration_text(fit_built_in(system, engine))),
        json.loads(shipped(system, engine)),
    )
    for text in (made, kept):
        assert text["provenance"].pop("created_by").startswith("meshwright ")
    check_same(made, kept, SYSTEMS[system])
